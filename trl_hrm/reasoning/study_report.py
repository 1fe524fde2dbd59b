"""The results of `trl-hrm reason` as a table for the terminal and as an HTML page with boards that change from segment to segment."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..pages.numbers import percent, points_between
from ..pages.page import Table, render, write_page
from ..pages.pictures import MARKERS, Picture, Theme, draw, legend, shown_label
from .study import BUDGETS, MARGIN
from .vocab import MAZE_VOCAB, GridVocab, box_shape, sudoku_vocab


if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Exact accuracy in percent that the papers and users report, on other puzzles and with other hardware than any run here
PAPERS = Table(
    [
        "Reported by",
        "Sudoku-Extreme, 1,000 puzzles",
        "Maze-Hard, 1,000 puzzles",
        "ARC-AGI-1, public",
        "ARC-AGI-2",
        "Parameters",
    ],
    [
        ["HRM paper: direct prediction", "0.0", "0.0", "21.0", "0.0", "27 M"],
        ["HRM paper: HRM", "55.0", "74.5", "40.3", "5.0", "27 M"],
        ["TRM paper: TRM with attention", "74.7", "85.3", "44.6", "7.8", "7 M"],
        ["TRM paper: TRM with MLP", "87.4", "0.0", "29.6", "2.4", "5 M"],
        ["ARC Prize: HRM, semi-private sets", "–", "–", "32", "2", "27 M"],
    ],
)
ANSWERS = {"holds": "held", "does not hold": "failed", "open": ""}  # CSS classes
# Cells that the solution fills in, by family
BLANKS = {"sudoku": "number of blanks", "maze": "cells of the path"}
STRATEGY_WORDS = {"first_halt": "first halt (q > 0)", "choose_by_q": "choose by q"}


def versions_of() -> dict[str, str]:
    """Return the versions that the results depend on."""
    from importlib.metadata import version

    from .. import __version__

    return {
        "trl_hrm": __version__,
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


# Tables


def with_interval(found: Mapping[str, Any]) -> str:
    """
    Format an estimate of an accuracy with its interval.

    Example:

    ```python
    >>> with_interval({"mean": 0.5, "low": 0.4, "high": 0.625})
    '50.0 % (40.0 to 62.5)'
    ```
    """
    return f"{percent(found['mean'])} ({points_between(found['low'], found['high'])})"


def accuracy_table(results: Mapping[str, Any], budget: str) -> Table:
    """Return the main table: every system after equal seconds or after equal steps."""
    head = [
        "System", "Exact accuracy (95 % interval)", "Each seed", "Chosen by q", "Cell accuracy", "Parameters", "Steps", "Seconds", "ms per step",
        "Learning rate",
    ]  # fmt: skip
    rows = []
    for found in results["systems"].values():
        exact = found["exact"][budget]
        steps = found["steps"] if budget == "seconds" else results["equal_steps"]
        measured = [
            seconds for seconds in found["run_seconds"] if seconds is not None
        ]  # unknown after an interruption
        seconds = f"{fmean(measured) * steps / found['steps']:.0f}" if measured else "–"
        rows.append(
            [
                found["title"],
                with_interval(exact),
                " / ".join(f"{100 * value:.1f}" for value in exact["seeds"]),
                percent(found["strategies"][budget][f"choose_by_q, {found['segments']} segments"]["mean"]),
                percent(found["cell"][budget]["mean"]),
                f"{found['parameters']:,}",
                f"{steps:,}",
                seconds,
                f"{1000 * found['seconds_per_step']:.1f}",
                f"{found['learning_rate']:g}",
            ]
        )
    return Table(head, rows)


def segments_table(results: Mapping[str, Any]) -> Table:
    """Return the exact accuracy by the number of segments at test, after equal seconds."""
    trained = max(found["segments"] for found in results["systems"].values())
    numbers = [number for number in (1, 2, 4, 8, 16, 32, 64) if number < trained] + [trained, 2 * trained, 4 * trained]
    rows = []
    for found in results["systems"].values():
        curve = found["by_segment"]
        rows.append([found["title"], *(with_interval(curve[n - 1]) if n <= len(curve) else "–" for n in numbers)])
    return Table(["System", *(f"{n} segment{'s' * (n > 1)}" for n in numbers)], rows)


def strategies_table(results: Mapping[str, Any], budget: str = "seconds") -> Table:
    """Return the exact accuracy by how the segment is chosen, with the mean number of the chosen segment."""
    rows = []
    for found in results["systems"].values():
        fixed = found["exact"][budget]
        rows.append(
            [found["title"], f"fixed, {found['segments']} segments", with_interval(fixed), str(found["segments"])]
        )
        for name, one in found["strategies"][budget].items():
            strategy, _, limit = name.partition(", ")
            rows.append(
                [
                    found["title"],
                    f"{STRATEGY_WORDS[strategy]}, up to {limit.replace(' segments', '')}",
                    with_interval(one),
                    f"{one['mean_segments']:.1f}",
                ]
            )
    return Table(["System", "Segment", "Exact accuracy (95 % interval)", "Mean segment"], rows)


def groups_table(results: Mapping[str, Any], key: str, title: str) -> Table:
    """Return the exact accuracy by group of puzzles."""
    names = list(dict.fromkeys(name for found in results["systems"].values() for name in found[key]))
    rows = [
        [found["title"], *(with_interval(found[key][name]) if name in found[key] else "–" for name in names)]
        for found in results["systems"].values()
    ]
    return Table([f"System, by {title}", *names], rows)


def claims_table(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the claims for the page: each with its verdicts and differences."""
    rows = []
    for claim in results["claims"]:
        verdicts = [
            {
                "budget": words,
                "verdict": claim[budget]["verdict"],
                "style": ANSWERS[claim[budget]["verdict"]],
                "parts": [f"{name}: {difference_words(part)}" for name, part in claim[budget]["parts"].items()],
            }
            for budget, words in BUDGETS.items()
            if budget in claim
        ]
        rows.append({"claim": claim["claim"], "margin": claim["margin"], "verdicts": verdicts})
    return rows


def difference_words(part: Mapping[str, Any]) -> str:
    """
    Format a difference in points with its interval.

    Example:

    ```python
    >>> difference_words({"mean": 0.05, "low": -0.01, "high": 0.11})
    '+5.0 points (−1.0 to 11.0)'
    ```
    """
    mean = f"{round(100 * part['mean'], 1) + 0.0:+.1f}".replace("-", "−")
    return f"{mean} points ({points_between(part['low'], part['high'])})"


def format_results(results: Mapping[str, Any]) -> str:
    """Return the results as text: a table for each budget, the few-blanks table, the claims, and the papers' numbers."""
    seeds = f"{len(results['seeds'])} seed{'s' * (len(results['seeds']) != 1)}"
    num_test = results["data"]["splits"]["test"]
    parts = []
    for budget, words in BUDGETS.items():
        table = accuracy_table(results, budget)
        columns = [0, 1, 3, 4, 5, 6, 7, 8]
        short = Table([table.head[i] for i in columns], [[row[i] for i in columns] for row in table.rows])
        parts.append(f"After {words}, {num_test} test puzzles, {seeds}:\n\n{short.markdown(is_aligned=True)}")
    if "few_blanks" in results["data"]["splits"]:
        few = groups_table(results, "few_blanks", "number of blanks")
        short = Table(few.head, [[row[0], *(cell.partition(" (")[0] for cell in row[1:])] for row in few.rows])
        parts.append(
            f"Boards with few blanks, on which HRM was reported to fail. Exact accuracy:\n\n{short.markdown(is_aligned=True)}"
        )
    lines = []
    for claim in claims_table(results):
        for verdict in claim["verdicts"]:
            lines.append(
                [
                    claim["claim"],
                    verdict["budget"],
                    verdict["verdict"],
                    "; ".join(part.rpartition(": ")[2] for part in verdict["parts"]),
                ]
            )
    if lines:
        parts.append(
            Table(["Claim", "After", "Verdict", "Difference (95 % interval)"], lines).markdown(is_aligned=True)
        )
    parts.append(
        "The papers report 55.0 % (HRM) and 87.4 % (TRM) on Sudoku-Extreme, which are other puzzles. They are not results of this run."
    )
    return "\n\n".join(parts)


# Pictures


def make_pictures(results: Mapping[str, Any]) -> dict[str, list[Picture]]:
    """Return the pictures of the page."""
    systems = list(results["systems"].values())

    def lines(
        name: str,
        title: str,
        axis: str,
        curves: Sequence[tuple[str, Sequence[float], Sequence[Mapping[str, Any]]]],
        log: bool,
    ) -> Picture:
        def paint(axes: "Axes", theme: Theme) -> None:
            for place, (label, x, points) in enumerate(curves):
                color, marker = theme.curves[place % len(theme.curves)], MARKERS[place % len(MARKERS)]
                low, mean, high = ([100 * point[key] for point in points] for key in ("low", "mean", "high"))
                axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
                if len(x) == 1:
                    axes.vlines(x, low, high, color=color, alpha=0.4)
                axes.plot(x, mean, color=color, marker=marker, markersize=3.5, linewidth=1.6, label=shown_label(label))
            if log:
                numbers = sorted({1, *(2**k for k in range(1, 8) if 2**k <= max(max(x) for _, x, _ in curves))})
                axes.set_xscale("log", base=2)
                axes.set_xticks(numbers, [str(number) for number in numbers])
                axes.minorticks_off()
            axes.set_ylim(-3, 103)
            axes.set_xlabel(axis)
            axes.set_ylabel("exact accuracy, %")
            legend(axes, theme)

        text = "; ".join(
            f"{label}: {percent(points[0]['mean'])} at {x[0]:g}, {percent(points[-1]['mean'])} at {x[-1]:g}"
            for label, x, points in curves
        )
        return draw(name, title, f"{title}. {text}", paint, 3.2 + 0.17 * len(curves))

    by_segment = [(one["title"], range(1, len(one["by_segment"]) + 1), one["by_segment"]) for one in systems]
    by_step = [(one["title"], [point["step"] for point in one["validation"]], one["validation"]) for one in systems]
    by_second = [
        (one["title"], [point["step"] * one["seconds_per_step"] for point in one["validation"]], one["validation"])
        for one in systems
    ]
    return {
        "segments": [
            lines("segments", "Exact accuracy by segments at test", "segments", by_segment, True),
        ],
        "learning": [
            lines("seconds", "Learning curves over seconds (validation)", "seconds of training", by_second, False),
            lines("steps", "Learning curves over steps (validation)", "steps", by_step, False),
        ],
    }


# Page


def render_report(results: Mapping[str, Any], pictures: Mapping[str, list[Picture]]) -> str:
    """
    Return the report as HTML. The output is deterministic.

    Args:
        results (`Mapping[str, Any]`):
            Content of `results.json`.
        pictures (`Mapping[str, list[Picture]]`):
            Pictures of the results. See [`make_pictures`].
    """
    data = results["data"]
    few_settings = {name: value for name, value in results["settings"].items() if value is not None}
    boards = board_views(results)
    return render(
        "reasoning.html.jinja",
        title="What does the hierarchy of the Hierarchical Reasoning Model add?",
        data=data,
        family={"sudoku": "Sudoku", "maze": "mazes"}.get(data["family"], data["family"]),
        num_seeds=len(results["seeds"]),
        margin=f"{100 * MARGIN:.0f}",
        leads=leads(results),
        main={title: accuracy_table(results, budget) for budget, title in BUDGETS.items()},
        pictures=pictures,
        segments=segments_table(results),
        strategies=strategies_table(results),
        groups=[
            groups_table(results, "by_blanks", BLANKS[data["family"]]),
            groups_table(results, "by_rating", "rating"),
        ],
        few=groups_table(results, "few_blanks", "number of blanks") if "few_blanks" in data["splits"] else None,
        claims=claims_table(results),
        papers=PAPERS,
        boards=boards,
        settings=Table(
            ["Setting", "Value"],
            [[name, words(value)] for name, value in (few_settings | results["versions"]).items()],
            style="settings",
        ),
        tuning=Table(
            ["System", "Learning rate", "Tried (exact accuracy on the validation split)"],
            [
                [
                    one["title"],
                    f"{one['learning_rate']:g}",
                    ", ".join(f"{rate}: {percent(value)}" for rate, value in one["tried_learning_rates"].items())
                    or "none: set in the configuration",
                ]
                for one in results["systems"].values()
            ],
        ),
    )


def words(value: Any) -> str:
    """Return a setting as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def leads(results: Mapping[str, Any]) -> list[str]:
    """Return the first sentences of the page: the accuracy of each system after equal seconds."""
    systems = sorted(results["systems"].values(), key=lambda one: -one["exact"]["seconds"]["mean"])
    return [f"{one['title']}: {with_interval(one['exact']['seconds'])}" for one in systems]


def board_views(results: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the boards for the page and its script: for each system, board and segment, the symbols as text.

    Each cell of the drawn boards is a dictionary with the symbol as `text` and its kind: `given`, `right` or `wrong`.
    """
    boards = results["boards"]
    height, width = boards["height"], boards["width"]
    vocab = sudoku_vocab(height) if results["data"]["family"] == "sudoku" else MAZE_VOCAB
    symbols = ["" if len(symbol) > 1 else "\u00b7" if symbol == "." else symbol for symbol in vocab.symbols]
    box = box_shape(height) if results["data"]["family"] == "sudoku" else None
    # without a script, the page shows the answers of the first HRM, or else of the first system
    names = list(boards["answers"])
    if not names:
        return {"names": []}
    first = next((name for name in names if name.startswith("hrm")), names[0])
    shown = results["systems"][first]["segments"]
    drawn = []
    for place, (puzzle, solution) in enumerate(zip(boards["puzzles"], boards["solutions"], strict=True)):
        answer = boards["answers"][first][shown - 1][place]
        cells = [
            {"text": symbols[found], "kind": kind_of(given, right, found, vocab)}
            for given, right, found in zip(puzzle, solution, answer, strict=True)
        ]
        num_wrong = sum(cell["kind"] == "wrong" for cell in cells)
        rows = [cells[start : start + width] for start in range(0, height * width, width)]
        drawn.append({"rows": rows, "num_wrong": num_wrong, "q_halt": boards["q_halt"][first][shown - 1][place]})
    return {
        "names": names,
        "titles": {name: results["systems"][name]["title"] for name in names},
        "segments": {name: results["systems"][name]["segments"] for name in names},
        "first": first,
        "shown": shown,
        "box": box,
        "width": width,
        "height": height,
        "drawn": drawn,
        "family": results["data"]["family"],
        "script": {
            "symbols": symbols,
            "blanks": [vocab.symbols.index(symbol) for symbol in (".", " ") if symbol in vocab.symbols],
            "puzzles": boards["puzzles"],
            "solutions": boards["solutions"],
            "answers": boards["answers"],
            "q_halt": boards["q_halt"],
            "segments": {name: results["systems"][name]["segments"] for name in names},
        },
    }


def kind_of(given: int, right: int, found: int, vocab: GridVocab) -> str:
    """Return the kind of a cell: `"wrong"`, `"given"` (right, and not blank in the puzzle), or `"right"`."""
    if found != right:
        return "wrong"
    return "right" if vocab.symbols[given] in (".", " ") else "given"


def write_report(results: Mapping[str, Any], output: Path) -> list[Path]:
    """
    Write the page, and its pictures to a folder next to it.

    Args:
        results (`Mapping[str, Any]`):
            Content of `results.json`.
        output (`Path`):
            HTML file to write. The pictures of `report.html` are written to `report_files`.

    Returns:
        `list[Path]`: Paths of the pictures.
    """
    pictures = make_pictures(results)
    found = [picture for part in pictures.values() for picture in part]
    return write_page(render_report(results, pictures), found, output)
