"""Pictures of the demo's report."""

import statistics
import textwrap
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..pages.numbers import percent
from ..pages.pictures import MARKERS, Picture, Theme, band_picture, draw, legend, reliability_picture, shown_label
from .claims import (
    MAIN,
    WAYS,
    baseline_curves,
    compared,
    curve_of,
    curve_over_seeds,
    fall_of,
    headlines,
    titles,
)
from .over_seeds import Spread, spread, told


if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = {
    "correction": "correction",
    "locally_right": "locally correct",
    "new_error": "new error",
    "first_error": "first error",
    "right": "correct",
}
SCALINGS = {"log1p": "log", "none": "no log"}
REDUCTIONS = {"sum": "summed over a solution", "token_mean": "mean over tokens"}
TREE_WIDTH = 9.5  # inches
BOX = (0.82, 0.66)  # width and height of a node, as shares of its cell
EDGES = {
    "right": ("correct step", "-", 1.4),
    "first_error": ("first error", "--", 2.0),
    "correction": ("correction", "-", 3.4),
    "locally_right": ("locally correct", ":", 1.8),
    "new_error": ("new error", "-.", 1.8),
    "lucky": ("correct again by chance", (0, (1, 3)), 1.8),
    "answer": ("answer", "-", 0.8),
}


def make_pictures(data: dict[str, Any]) -> dict[str, list[Picture]]:
    """
    Return all pictures of the report.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`~demo.report.write_report`].

    Returns:
        `dict[str, list[Picture]]`: Pictures by the key of their section, in the order of the page.
    """
    names, n, shown = titles(data), data["n"], headlines(data)
    curves = [(f"{one.title} ({WAYS[one.way]})", one.points) for one in shown]
    places = [MAIN.index(one.name) for one in shown]
    first = band_picture("accuracy", "Accuracy over the number of candidates N", curves, baseline_curves(data), places)
    falls = [
        (f"{names[model['name']]}, {WAYS[way]}", fall.spread)
        for way in WAYS
        for model in data[way]["models"]
        if not (fall := fall_of(model, n)).undecided
    ]
    gap_title = f"Points lost from the best smaller N to N = {n[-1]}"
    calibrations = {calibration_name(data, one): one["bins"] for one in data["calibration"] if one["name"] in MAIN}
    labels = [
        (
            f"{eta_name(one)} (mean label {one['mean_label']:.2f})",
            spread([accuracy[-1] for accuracy in one["accuracy"]]),
        )
        for one in sorted(data["eta"], key=lambda one: one["mean_label"])
    ]
    eta_title = f"Accuracy of best-of-N at N = {n[-1]}, by labels of the reward model"
    pictures = {
        "first": [first],
        "accuracy": _way_pictures(data),
        "gap": [spreads_picture("gap", gap_title, falls, "points lost")] if falls else [],
        "wrong-prefix": _wrong_prefix_pictures(data["wrong_prefix"]),
        "step-kinds": [_kinds_picture(data["step_kinds"])],
        "depth-cap": [_caps_picture(data["values_by_cap"], data["solution_length"])],
        "calibration": [reliability_picture(calibrations)],
        "lambda": _lambda_pictures(data["self_training"]["runs"]),
        "eta": [spreads_picture("eta", eta_title, labels, "accuracy, %", is_difference=False)],
    }
    if hnc := data["hnc"]:
        rows = [(comparison_name(names, one), compared(one["difference"][-1])) for one in hnc["comparisons"]]
        title = f"Paired differences over seeds at N = {hnc['n'][-1]}"
        pictures["hnc"] = [spreads_picture("hnc", title, rows, "difference, points")]
    return pictures | {"tree": [tree_picture(data["tree"])]}


def eta_name(one: dict[str, Any]) -> str:
    """
    Return the displayed name of the labels in the η study.

    Example:

    ```python
    >>> eta_name({"labels": "entropy", "eta": 2.0})
    'entropy, η = 2'
    ```
    """
    return one["labels"] if one["eta"] is None else f"{one['labels']}, η = {one['eta']:g}".replace("-", "−")


def band_words(data: dict[str, Any]) -> str:
    """Return a text that explains the bands of the curves."""
    several = {len(model["seeds"]) > 1 for way in WAYS for model in data[way]["models"]}
    if several == {False}:
        return "One seed of each reward model. Bands: 95 % intervals over problems."
    words = "Lines: means over reward-model seeds. Bands: from the lowest to the highest seed"
    return f"{words}{', or the 95 % interval over problems if there is one seed' * (False in several)}."


def _way_pictures(data: dict[str, Any]) -> list[Picture]:
    """Return the pictures of best-of-N and step search: the main models, with the same colours everywhere, and their variants."""
    names, pictures = titles(data), []
    for way, words in WAYS.items():
        main = [model for model in data[way]["models"] if model["name"] in MAIN]
        variants = [model for model in data[way]["models"] if model["name"] not in MAIN]
        parts = (
            ("", "", main, [MAIN.index(model["name"]) for model in main]),
            ("-variants", ", variants", variants, None),
        )
        for end, title, models, places in parts:
            if models:
                name, title = f"accuracy-{way.replace('_', '-')}{end}", f"By {words}{title}"
                curves = [(names[model["name"]], curve_of(model, data["n"])) for model in models]
                pictures.append(band_picture(name, title, curves, baseline_curves(data), places))
    return pictures


def spreads_picture(
    name: str, title: str, rows: Sequence[tuple[str, Spread]], axis: str, is_difference: bool = True
) -> Picture:
    """
    Return a picture of numbers over seeds: small marks are seeds, large marks are means, bars are 95 % intervals.

    Args:
        name, title:
            See [`Picture`].
        rows (`Sequence[tuple[str, Spread]]`):
            Labels and shares or their differences, from top to bottom.
        axis (`str`):
            Label of the x axis.
        is_difference (`bool`, *optional*, defaults to `True`):
            Whether the numbers are differences. If so, a line marks 0.
    """

    def paint(axes: "Axes", theme: Theme) -> None:
        for y, (_, found) in enumerate(rows):
            axes.scatter(
                [100 * value for value in found.values], [y] * len(found.values), 14, color=theme.quiet, alpha=0.7
            )
            if found.is_settled:
                axes.hlines(y, 100 * found.low, 100 * found.high, color=theme.right, linewidth=2.5)
            axes.scatter([100 * found.mean], [y], 46, color=theme.right, marker="D", zorder=3)
        if is_difference:
            axes.axvline(0, color=theme.text, linewidth=1)
        axes.set_yticks(range(len(rows)), [_wrapped(label) for label, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(axis)

    text = f"{title}. " + "; ".join(
        f"{label}: {told(found) if is_difference else percent(found.mean)}" for label, found in rows
    )
    num_lines = max((_wrapped(label).count("\n") + 1 for label, _ in rows), default=1)
    return draw(name, title, text, paint, 0.9 + (0.1 + 0.15 * num_lines) * len(rows))


def _wrapped(label: str) -> str:
    return "\n".join(map(shown_label, textwrap.wrap(label, 30, break_on_hyphens=False)))


def _wrong_prefix_pictures(found: dict[str, Any]) -> list[Picture]:
    """Return one picture per kind of labels, because one picture cannot show all models."""
    pictures = []
    for end, is_judged in (("", True), ("-search", False)):
        models = [one for one in found["models"] if one["name"].startswith("judged") == is_judged]
        if models:
            curves = [(scored_title(one), curve_over_seeds(one["accuracy"], found["n"])) for one in models]
            title = f"Accuracy from a wrong prefix, {'first-error labels' if is_judged else 'labels from MC scores'}"
            pictures.append(band_picture(f"wrong-prefix{end}", title, curves, []))
    return pictures


def scored_title(one: dict[str, Any]) -> str:
    """Return the title of a model and which spans of steps it scores."""
    return f"{one['title']}, {'single steps' if one['spans'] == [1] else 'steps and pairs'}"


def _kinds_picture(found: Sequence[dict[str, Any]]) -> Picture:
    kinds = ("correction", "locally_right", "new_error")

    def paint(axes: "Axes", theme: Theme) -> None:
        colors = (theme.right, theme.curves[2], theme.wrong)
        for kind, color, marker, shift in zip(kinds, colors, "Dos", (-0.22, 0, 0.22), strict=True):
            y = [row + shift for row in range(len(found))]
            axes.hlines(
                y, [min(one[kind]) for one in found], [max(one[kind]) for one in found], color=color, linewidth=2
            )
            means = [statistics.fmean(one[kind]) for one in found]
            axes.scatter(means, y, 34, color=color, marker=marker, label=KINDS[kind], zorder=3)
        axes.set_yticks(range(len(found)), [_wrapped(scored_title(one)) for one in found])
        axes.set_ylim(len(found) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("score")
        legend(axes, theme)

    text = "Mean scores of steps after an error. " + "; ".join(
        f"{scored_title(one)}: " + ", ".join(f"{KINDS[kind]} {statistics.fmean(one[kind]):.2f}" for kind in kinds)
        for one in found
    )
    return draw("step-kinds", "Scores of steps after an error", text, paint, 1.5 + 0.5 * len(found))


def _caps_picture(found: Sequence[dict[str, Any]], solution_length: int) -> Picture:
    kinds = ("right", "first_error", "correction", "locally_right")
    caps = [one["cap"] for one in found]

    def paint(axes: "Axes", theme: Theme) -> None:
        axes.axvline(solution_length, color=theme.quiet, linestyle=":", linewidth=1.5, label="length of a solution")
        colors = (theme.curves[2], theme.wrong, theme.right, theme.curves[3])
        for kind, color, marker in zip(kinds, colors, MARKERS, strict=False):
            means = [float("nan") if one[kind]["mean"] is None else one[kind]["mean"] for one in found]
            axes.plot(caps, means, color=color, marker=marker, markersize=5, linewidth=2, label=KINDS[kind])
        axes.set_xticks(caps, [str(cap) for cap in caps])
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("maximum depth of the search tree, steps")
        axes.set_ylabel("mean MC score")
        legend(axes, theme)

    text = "Mean MC score by maximum depth. " + "; ".join(
        f"maximum depth {one['cap']}: " + ", ".join(f"{KINDS[kind]} {shown_mean(one[kind])}" for kind in kinds)
        for one in found
    )
    return draw("depth-cap", "Mean MC score of steps, by maximum depth", text, paint, 3.4)


def shown_mean(found: dict[str, Any]) -> str:
    """Return the mean of a kind of steps, or a dash if there are none."""
    return "–" if found["mean"] is None else f"{found['mean']:.3f}"


def calibration_name(data: dict[str, Any], one: dict[str, Any]) -> str:
    """Return the title of a reward model and its seed."""
    return f"{titles(data)[one['name']]}, seed {one['seed']}"


def run_name(run: dict[str, Any]) -> str:
    """
    Return the displayed name of a run: its λ and scaling.

    Example:

    ```python
    >>> run_name({"kl_coef": 0.5, "kl_scaling": "log1p"})
    'λ = 0.5, log'
    ```
    """
    name = f"λ = {run['kl_coef']:g}"
    return f"{name}, {SCALINGS[run['kl_scaling']]}" if run["kl_coef"] else name


def _lambda_pictures(runs: Sequence[dict[str, Any]]) -> list[Picture]:
    """Return the pictures of LM loss and KL over steps, for each KL reduction. All pictures include λ = 0."""
    reductions = list(dict.fromkeys(run["kl_reduction"] for run in runs if run["kl_coef"]))
    pictures = []
    for reduction in reductions:
        drawn = [run for run in runs if run["kl_coef"] == 0 or run["kl_reduction"] == reduction]
        pictures += [_lambda_picture(drawn, reduction, "kl"), _lambda_picture(drawn, reduction, "lm_loss")]
    return pictures


def _lambda_picture(runs: Sequence[dict[str, Any]], reduction: str, key: str) -> Picture:
    coefs = sorted({run["kl_coef"] for run in runs})
    what = {"kl": "KL(ref ‖ policy), nats per solution", "lm_loss": "LM loss, nats per token"}[key]

    def paint(axes: "Axes", theme: Theme) -> None:
        colors = dict(zip(coefs, cycle((theme.wrong, *theme.curves[:1], *theme.curves[2:])), strict=False))
        named = set()
        for run in runs:
            label = f"_{run_name(run)}" if run_name(run) in named else run_name(run)
            named.add(run_name(run))
            style = "--" if run["kl_scaling"] == "none" else "-"
            points = [
                point for point in run["curve"] if key != "kl" or point["kl"] > 0
            ]  # KL is 0 at the start, which a log scale cannot show
            steps, values = [point["step"] for point in points], [point[key] for point in points]
            axes.plot(steps, values, color=colors[run["kl_coef"]], linestyle=style, linewidth=1.4, label=label)
        if key == "kl":
            axes.set_yscale("log")
            axes.tick_params(which="minor", colors=theme.quiet, labelsize=8, length=0)
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(what)
        legend(axes, theme)

    ends = "; ".join(f"{run_name(run)}: {run['curve'][0][key]:.3g} to {run['curve'][-1][key]:.3g}" for run in runs)
    title = f"{'KL' if key == 'kl' else 'LM loss'} by optimizer step (KL in the loss: {REDUCTIONS[reduction]})"
    name = f"lambda-{reduction.replace('_', '-')}-{key.replace('_', '-')}"
    return draw(name, title, f"{title}. {ends}", paint, 3.3)


def comparison_name(data_titles: dict[str, str], one: dict[str, Any]) -> str:
    """Return the displayed name of a comparison: both models and their training steps."""
    a, b = (data_titles.get(one[key], one[key]) for key in ("a", "b"))
    return f"{a} − {b}, {one['steps']:,} steps"


def tree_picture(tree: dict[str, Any]) -> Picture:
    """
    Return a picture of a search tree, from left to right.

    Args:
        tree (`dict[str, Any]`):
            `problem`, and `nodes` with `parent` (-1 for the problem), `text`, mean MC score (`value`), `count` (number of times the step was
            sampled), `kind`, and `correct` for answers.
    """
    nodes = tree["nodes"]
    places = tree_places([node["parent"] for node in nodes])
    num_rows = max((y for _, y in places), default=0) + 1
    depth = max((x for x, _ in places), default=0)

    def paint(axes: "Axes", theme: Theme) -> None:
        root = (-1.0, sum(y for (x, y) in places if x == 0) / max(sum(x == 0 for x, _ in places), 1))
        for node, place in zip(nodes, places, strict=True):
            start, (_, style, line) = root if node["parent"] < 0 else places[node["parent"]], EDGES[node["kind"]]
            x, y = (start[0] + BOX[0] / 2, place[0] - BOX[0] / 2), (start[1], place[1])
            axes.plot(x, y, color=_edge_color(theme, node["kind"]), linestyle=style, linewidth=line, zorder=1)
        _box(axes, theme, root, "problem", theme.page, theme.quiet, 1)
        for node, place in zip(nodes, places, strict=True):
            color, width = (theme.right, 2.4) if node["kind"] == "correction" else (theme.quiet, 0.8)
            _box(axes, theme, place, node_words(node), _shade(theme, node["value"]), color, width)
        for kind, (label, style, line) in EDGES.items():  # legend above the tree
            axes.plot([], [], color=_edge_color(theme, kind), linestyle=style, linewidth=line, label=label)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=len(EDGES),
            frameon=False,
            fontsize=7.5,
            labelcolor=theme.text,
            borderaxespad=0,
            handlelength=2.6,
        )
        axes.set_xlim(-1.5, depth + 0.5)
        axes.set_ylim(num_rows - 0.4, -0.6)
        axes.axis("off")

    corrections = [node for node in nodes if node["kind"] == "correction"]
    text = f"A search tree of {len(nodes)} steps for: {tree['problem']} " + " ".join(
        f"Correction {step_text(node)}, MC score {_number(node['value'])}, after {step_text(nodes[node['parent']])}, "
        f"MC score {_number(nodes[node['parent']]['value'])}."
        for node in corrections
        if node["parent"] >= 0
    )
    title = "Steps with their mean MC scores: blue is high, orange is low. Corrections have a thick line and frame"
    return draw("tree", title, text, paint, 1.0 + 0.46 * num_rows, TREE_WIDTH)


def tree_places(parents: Sequence[int]) -> list[tuple[float, float]]:
    """Return the depth and row of each node. Leaves have one row each, and parents are centered on their children."""
    children: dict[int, list[int]] = {}
    for i, parent in enumerate(parents):
        children.setdefault(parent, []).append(i)
    places: dict[int, tuple[float, float]] = {}
    num_leaves = 0

    def place(i: int, depth: int) -> float:
        nonlocal num_leaves
        rows = [place(child, depth + 1) for child in children.get(i, ())]
        if not rows:
            rows = [float(num_leaves)]
            num_leaves += 1
        places[i] = (float(depth), sum(rows) / len(rows))
        return places[i][1]

    for top in children.get(-1, ()):
        place(top, 0)
    return [places[i] for i in range(len(parents))]


def step_text(node: dict[str, Any]) -> str:
    """Return the step in one line, without its header."""
    lines = [line for line in node["text"].splitlines() if not line.startswith(("# Step", "# END"))]
    return " ".join(" ".join(lines).replace("# Answer", "answer").split())


def node_words(node: dict[str, Any]) -> str:
    """Return the text of a node: its step, whether its answer is correct, its mean MC score and its count."""
    mark = "" if node["correct"] is None else " ✓" if node["correct"] else " ✗"
    return f"{step_text(node)[:24]}{mark}\n{_number(node['value'])}, n = {node['count']}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _edge_color(theme: Theme, kind: str) -> str:
    if kind == "correction":
        return theme.right
    return theme.wrong if kind in ("first_error", "new_error") else theme.quiet


def _box(
    axes: "Axes", theme: Theme, place: tuple[float, float], words: str, color: object, frame: str, width: float
) -> None:
    from matplotlib.patches import Rectangle

    corner = (place[0] - BOX[0] / 2, place[1] - BOX[1] / 2)
    axes.add_patch(Rectangle(corner, *BOX, facecolor=color, edgecolor=frame, linewidth=width, zorder=2))
    axes.text(*place, shown_label(words), color=theme.text, fontsize=7, ha="center", va="center", zorder=3)


def _shade(theme: Theme, value: float | None) -> object:
    """Return a pale color on which text is readable: `theme.wrong` for 0, the color of the page for 0.5, `theme.right` for 1."""
    from matplotlib.colors import to_rgb

    if value is None:
        return theme.page
    end = to_rgb(theme.right if value > 0.5 else theme.wrong)
    share = 0.45 * abs(2 * value - 1)
    return tuple(share * mine + (1 - share) * page for mine, page in zip(end, to_rgb(theme.page), strict=True))
