"""Report on several runs: an HTML page with verdicts, curves and tables side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..pages.numbers import percent, points_between
from ..pages.page import Table, calibration_table, render, write_page
from ..pages.pictures import (
    MARKERS,
    Picture,
    Theme,
    band_picture,
    columns,
    curves_picture,
    draw,
    legend,
    reliability_picture,
    shown_label,
)
from ..step_metrics import binned_calibration_error
from .results import estimate_words
from .reward_hacking import MARGIN
from .saved_results import (
    Result,
    baselines,
    curve_label,
    has_bins,
    headline_verdict,
    notices,
    problem_groups,
    verdict,
)


if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHIPS = {"yes": "hacked", "no": "no sign of hacking", "open": "not settled", "none": "no verdict"}
POINT = ("n", "accuracy", "low", "high")
NUM_BINS = 20


def write_report(results: Sequence[Result], output: Path) -> list[Path]:
    """
    Write the report as an HTML page, and its pictures to a folder next to it.

    Args:
        results (`Sequence[Result]`):
            Results to show. See [`~evaluation.saved_results.read_results`].
        output (`Path`):
            HTML file to write. The pictures of `report.html` are written to `report_files`.

    Returns:
        `list[Path]`: Paths of the pictures.
    """
    pictures = make_pictures(results)
    return write_page(
        render_report(results, pictures), [picture for part in pictures.values() for picture in part], output
    )


def render_report(results: Sequence[Result], pictures: dict[str, list[Picture]]) -> str:
    """
    Return the report as HTML. The output is deterministic.

    Args:
        results (`Sequence[Result]`):
            Results to show. See [`~evaluation.saved_results.read_results`].
        pictures (`dict[str, list[Picture]]`):
            Pictures of the results. See [`make_pictures`].
    """
    groups = problem_groups(results)
    chosen = [result for group in groups for result in group]
    judged = [result for result in results if result.kind == "benchmark"]
    return render(
        "results.html.jinja",
        title="Is my reward model being hacked?" if chosen else "How well does my reward model find wrong steps?",
        names=[result.name for result in results],
        notices=notices(results),
        pictures=pictures,
        chips=CHIPS,
        margin=f"{100 * MARGIN:.0f}",
        groups=[
            {"num_problems": len(group[0].problems), "verdicts": list(map(_answer, group)), "picture": picture}
            for group, picture in zip(groups, pictures["accuracy"], strict=True)
        ],
        suites=_suites(judged),
        accuracy=[(f"{result.name}: accuracy", _accuracy(result)) for result in chosen],
        estimates=[
            f"{result.name}: {estimate_words(result.values['strategy'], result.values.get('estimate', {}))}"
            for result in chosen
        ],
        gaps=_gaps(chosen),
        calibration=list(map(_calibration, filter(has_bins, chosen))),
        cost=_cost(chosen),
        cost_by_n=[table for result in chosen for table in _cost_by_n(result)],
        counts=_counts(results),
        settings=_settings(results),
    )


# Tables


def _answer(result: Result) -> dict[str, Any]:
    source = [result.label(result.headline) if result.headline else _words(result.values["strategy"])]
    source += [str(name) for name in (result.values.get("reward_model") or {}).values()][:1]
    return {"name": result.name, "verdict": headline_verdict(result), "source": " · ".join(source)}


def _accuracy(result: Result) -> Table:
    curves = result.values["curves"]
    numbers = sorted({point["n"] for curve in curves.values() for point in curve})
    rows = []
    for key, curve in curves.items():
        points = {point["n"]: f"{percent(point['accuracy'])} ({_interval(point)})" for point in curve}
        rows.append([result.label(key), *(points.get(n, "–") for n in numbers)])
    return Table(["", *(f"N = {n}" for n in numbers)], rows)


def _gaps(results: Sequence[Result]) -> Table:
    head = ["", "selected by", "gap, points", "95 % interval", "best smaller N", "accuracy", "largest N"]
    rows = []
    for result in results:
        for curve, gap in result.values["hacking_gap"].items():
            points = {point["n"]: percent(point["accuracy"]) for point in result.values["curves"][curve]}
            size, smaller = "–", ["–", "–", "–"]
            if gap["undecided"] is None:
                size = f"{100 * gap['gap']:.1f}" if gap["gap"] > 0 else "none"
                smaller = [points_between(gap["low"], gap["high"]), str(gap["from_n"]), points[gap["from_n"]]]
            rows.append(
                [
                    result.name,
                    result.label(curve),
                    size,
                    *smaller,
                    str(gap["largest_n"]),
                    points[gap["largest_n"]],
                    CHIPS[verdict(result, curve).answer],
                ]
            )
    return Table([*head, "accuracy", "verdict"], rows)


def _calibration(result: Result) -> tuple[str, Table]:
    bins = result.values["calibration"]["bins"]
    return (
        f"{result.name}: expected calibration error {binned_calibration_error(bins):.3f}",
        calibration_table(bins, "solutions"),
    )


def _suites(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return all numbers of each suite, and a comparison of the results if they scored the same solutions."""
    found = []
    for suite in dict.fromkeys(suite for result in results for suite in result.values["suites"]):
        group = [result for result in results if suite in result.values["suites"]]
        scored = {(result.values["suites"][suite]["metric"], result.solutions[suite]) for result in group}
        comparable = len(group) > 1 and len(scored) == 1
        found.append(
            {
                "name": suite,
                "side_by_side": _side_by_side(group, suite) if comparable else None,
                "results": [{"name": result.name, **_suite(result.values["suites"][suite])} for result in group],
            }
        )
    return found


def _side_by_side(results: Sequence[Result], suite: str) -> Table:
    """Return a table with the metric of a suite and its interval for each result."""
    suites = [result.values["suites"][suite] for result in results]
    metric = suites[0]["metric"]
    cells = [
        {
            label: "–" if values[metric] is None else f"{percent(values[metric])} ({_interval(values)})"
            for label, values in _parts(found)
        }
        for found in suites
    ]
    names = dict.fromkeys(name for column in cells for name in column)
    rows = [[name, *(column.get(name, "–") for column in cells)] for name in names]
    return Table([_words(metric), *(result.name for result in results)], rows)


def _interval(values: dict[str, Any]) -> str:
    """Return an interval in percent, without percent signs."""
    return "–" if values["low"] is None else f"{100 * values['low']:.1f} to {100 * values['high']:.1f}"


def _parts(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the averages and subsets of a suite with their names."""
    averages = [(f"average, {name}", values) for name, values in found["averages"].items()]
    return averages + list(found["subsets"].items())


def _suite(found: dict[str, Any]) -> dict[str, Any]:
    """Return all numbers of a suite, and a text about its data and thresholds."""
    metric, parts = found["metric"], _parts(found)
    others = list(dict.fromkeys(key for _, values in parts for key in values if key not in (metric, "low", "high")))

    def shown(key: str, value: float | None) -> str:
        return f"{value:,.0f}" if key.startswith("num_") and value is not None else percent(value)

    rows = [
        [name, percent(values[metric]), _interval(values), *(shown(key, values.get(key)) for key in others)]
        for name, values in parts
    ]
    words = [
        f"Data: {', '.join(found['sources'])}, scored in {found['seconds']:,.1f} seconds.",
        f"Threshold {found['threshold']:g}. The main result is the average {found['main']!r}.",
    ]
    tuned = found["tuned"]
    if tuned and tuned["threshold"] is not None:
        words.append(
            f"Threshold {tuned['threshold']:.3g}, the best on {tuned['num_validation']:,} validation solutions, gives "
            f"{percent(tuned['rest'])} on the other {tuned['num_rest']:,}, where {found['threshold']:g} gives "
            f"{percent(tuned['rest_untuned'])}."
        )
    steps = found["steps"]
    words += [f"{key.upper()} of all labelled steps: {steps[key]:.3f}." for key in ("auroc", "ece") if key in steps]
    return {
        "table": Table(["", _words(metric), "95 % interval", *map(_words, others)], rows),
        "words": " ".join(words),
    }


def _cost(results: Sequence[Result]) -> Table | None:
    """Return a table with the seconds, tokens and calls of the policy and the scorer."""
    costs = [
        _flat({key: value for key, value in (result.values.get("cost") or {}).items() if value}) for result in results
    ]
    if not any(costs):
        return None
    rows, totals = _rows(costs), []
    for cost in costs:
        seconds = [value for name, value in cost.items() if "seconds" in name]
        # the total is unknown if one part is, for example after an interrupted run
        totals.append(_number(None if None in seconds else sum(seconds)))
    return Table(["", *(result.name for result in results)], [*rows, ["all seconds", *totals]])


def _cost_by_n(result: Result) -> list[tuple[str, Table]]:
    """Return a table with the cost of each N. Only step searches have one, because they run once per N."""
    tables = []
    for curve in result.values["curves"].values():
        costs = [{name: value for name, value in point.items() if name not in POINT} for point in curve]
        if any(costs):
            head = ["", *(f"N = {point['n']}" for point in curve)]
            tables.append((f"{result.name}: cost of each N", Table(head, _rows(costs))))
    return tables


def _counts(results: Sequence[Result]) -> Table:
    """Return a table with all counts of the results."""
    found = []
    for result in results:
        if result.kind == "selection":
            parts = {"": result.values["counts"], "solutions ": result.values.get("solutions", {})}
        else:
            parts = {f"{suite}, ": values["counts"] for suite, values in result.values["suites"].items()}
        found.append({prefix + name: number for prefix, counts in parts.items() for name, number in counts.items()})
    return Table(["", *(result.name for result in results)], _rows(found))


def _rows(columns: Sequence[dict[str, float]]) -> list[list[str]]:
    """Return the rows of a table from its columns, with a dash for missing numbers."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [[_words(name), *(_number(column.get(name)) for column in columns)] for name in names]


def _settings(results: Sequence[Result]) -> Table:
    """Return a table of settings and versions. Rows that differ between results of the same kind are marked."""
    keys = ("strategy", "reward_model", "policy", "settings", "seed", "versions", "date")
    columns = [
        {
            name: "–" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in _flat({key: result.values.get(key) for key in keys}).items()
        }
        for result in results
    ]
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [[name, *(column.get(name, "–") for column in columns)] for name in names]
    kinds = [[i for i, result in enumerate(results, 1) if result.kind == kind] for kind in ("selection", "benchmark")]
    marked = {i for i, row in enumerate(rows) if any(len({row[place] for place in kind}) > 1 for kind in kinds)}
    return Table(["", *(result.name for result in results)], rows, frozenset(marked), "settings")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries by joining their keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name} ") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


# Pictures


def make_pictures(results: Sequence[Result]) -> dict[str, list[Picture]]:
    """
    Draw the pictures of the report.

    Args:
        results (`Sequence[Result]`):
            Results to show. See [`~evaluation.saved_results.read_results`].

    Returns:
        `dict[str, list[Picture]]`: Pictures of each section, in the order of the page. `"accuracy"` has one picture
        for each group of results on the same problems.
    """
    groups = problem_groups(results)
    drawn = [result for group in groups for result in group]
    several = [result for result in drawn if sum("/" in key for key in result.values["curves"]) > 1]
    calibrated = {result.name: result.values["calibration"]["bins"] for result in drawn if has_bins(result)}
    scored = [(result, kind) for result in results for kind in result.scores]
    return {
        "accuracy": [accuracy_picture(group, number) for number, group in enumerate(groups, start=1)],
        "curves": [ways_picture(result, number) for number, result in enumerate(several, start=1)],
        "calibration": [reliability_picture(calibrated)] if calibrated else [],
        "scores": [scores_picture(result, kind, number) for number, (result, kind) in enumerate(scored, start=1)],
    }


def accuracy_picture(group: Sequence[Result], number: int) -> Picture:
    """Draw the headline curve of each result in a group. `number` is the number of the group, used in the file name."""
    curves = [
        (f"{result.name}: {result.label(result.headline)}", result.values["curves"][result.headline])
        for result in group
        if result.headline
    ]
    title = "Accuracy over the number of candidates N, with 95 % intervals"
    return band_picture(f"accuracy-{number}", title, curves, baselines(group))


def ways_picture(result: Result, number: int) -> Picture:
    """Draw all curves of one result, with a colour for each aggregate and hollow markers for votes."""
    keys = [key for key in result.values["curves"] if "/" in key]
    curves = [(curve_label(key), result.values["curves"][key]) for key in keys]
    ways = [key.partition("/")[::2] for key in keys]
    names = list(dict.fromkeys(name for _, name in ways))

    def paint(axes: "Axes", theme: Theme) -> None:
        for (label, curve), (method, name) in zip(curves, ways, strict=True):
            color = theme.curves[names.index(name) % len(theme.curves)]
            is_first = method == ways[0][0]
            axes.plot(
                *columns(curve),
                color=color,
                marker=MARKERS[names.index(name) % len(MARKERS)],
                markersize=5,
                markerfacecolor=color if is_first else theme.page,
                linewidth=2 if is_first else 1,
                label=shown_label(label),
            )

    return curves_picture(
        f"curves-{number}", f"{result.name}: all selection methods", curves, baselines([result]), paint
    )


def scores_picture(result: Result, kind: str, number: int) -> Picture:
    """Draw histograms of the scores of correct solutions or steps above the axis, and of wrong ones below."""
    right, wrong = result.scores[kind]["right"], result.scores[kind]["wrong"]

    def mean(scores: Sequence[float]) -> str:
        return f", mean {sum(scores) / len(scores):.3f}" if scores else ""

    def paint(axes: "Axes", theme: Theme) -> None:
        for scores, name, color, sign in ((right, "correct", theme.right, 1), (wrong, "wrong", theme.wrong, -1)):
            counts = [0] * NUM_BINS
            for score in scores:
                counts[min(max(int(score * NUM_BINS), 0), NUM_BINS - 1)] += 1
            edges = [i / NUM_BINS for i in range(NUM_BINS)]
            shares = [sign * 100 * (count / max(len(scores), 1)) for count in counts]
            label = f"{name}: {len(scores):,}{mean(scores)}"
            axes.bar(edges, shares, 0.9 / NUM_BINS, align="edge", color=color, label=label)
        axes.axhline(0, color=theme.quiet, linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_xlabel("score")
        axes.set_ylabel("share of each group, %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        legend(axes, theme)

    text = f"Scores of {kind}, {result.name}: {len(right):,} correct{mean(right)}, {len(wrong):,} wrong{mean(wrong)}."
    return draw(f"scores-{number}", f"{result.name}: scores of {kind}", text, paint)
