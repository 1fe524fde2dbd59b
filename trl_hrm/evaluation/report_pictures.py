"""The pictures of a report, each in light and dark."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ..data.score_picture import new_figure
from .hacking import percent
from .report import Result, baselines, curve_label, has_bins, problem_groups


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Panel = tuple[Figure, Axes]

Curves = Sequence[tuple[str, list[dict[str, Any]]]]  # labels and points

NUM_BINS = 20
DPI = 180
WIDTH = 4.5  # inches: small, so that letters can be read on a phone
MOST_CHARACTERS = 60  # of a label in a legend
MARKERS = "osD^vPX"


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: page, text, lines of the grid, and the curves. Blue and orange are told apart by all eyes."""

    page: str
    text: str
    quiet: str
    grid: str
    curves: tuple[str, ...]

    @property
    def right(self) -> str:
        """Colour of what is right."""
        return self.curves[0]

    @property
    def wrong(self) -> str:
        """Colour of what is wrong."""
        return self.curves[1]


THEMES = {
    "light": Theme(
        "#ffffff", "#1f1e1b", "#68645b", "#e4e0d8", ("#1d64ad", "#c2410c", "#00795a", "#9b4a86", "#8a6d00", "#3f3a8f")
    ),
    "dark": Theme(
        "#1b1d21", "#e7e5df", "#9d9a92", "#34373e", ("#62a8ec", "#ee7f3f", "#3fc79a", "#d68ac0", "#d9b62f", "#a7a2f2")
    ),
}


@dataclass(frozen=True)
class Picture:
    """
    A picture of the report.

    Args:
        name (`str`):
            Name of its file, without the ending.
        title (`str`):
            What it shows, in one line.
        text (`str`):
            What is to be seen in it, for those who cannot see it.
        images (`dict[str, bytes]`):
            The PNG of each theme.
    """

    name: str
    title: str
    text: str
    images: dict[str, bytes]


def draw(
    name: str,
    title: str,
    text: str,
    paint: Callable[["Axes", Theme], None],
    height: float = 3.0,
    width: float = WIDTH,
) -> Picture:
    """
    A picture in every theme. The same input gives the same bytes.

    Args:
        name, title, text:
            See [`Picture`].
        paint (`Callable`):
            Draws on the axes it is given, in the colours of a theme.
        height (`float`, *optional*, defaults to `3.0`):
            Height in inches.
        width (`float`, *optional*, defaults to `4.5`):
            Width in inches.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    images = {}
    for key, theme in THEMES.items():
        with _panel(theme, width, height) as (figure, axes):
            paint(axes, theme)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=DPI, facecolor=theme.page, metadata={"Software": None})
        images[key] = buffer.getvalue()
    return Picture(name, title, text, images)


@contextmanager
def _panel(theme: Theme, width: float, height: float) -> Iterator["Panel"]:
    """An empty figure in the colours of a theme."""
    figure = new_figure()
    figure.set_size_inches(width, height)
    axes = figure.subplots()
    axes.set_facecolor(theme.page)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.quiet, labelsize=9, length=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(theme.quiet)
        axis.label.set_size(9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    yield figure, axes


def accuracy_picture(group: Sequence[Result], number: int) -> Picture:
    """Accuracy over N of the headline curve of each result, with votes and pass@N. `number` tells it from other groups'."""
    curves = [
        (f"{result.name}: {result.label(result.headline)}", result.values["curves"][result.headline])
        for result in group
        if result.headline
    ]
    title = "Accuracy over the number of candidates N, with 95 % intervals"
    return band_picture(f"accuracy-{number}", title, curves, baselines(group))


def band_picture(
    name: str, title: str, curves: Curves, beside: Curves, places: Sequence[int] | None = None
) -> Picture:
    """
    Accuracy over N, each curve in a band.

    Args:
        name, title:
            See [`Picture`].
        curves (`Sequence[tuple[str, list[dict]]]`):
            Labels, and points with `n`, `accuracy`, and `low` and `high` of the band.
        beside (`Sequence[tuple[str, list[dict]]]`):
            The same for what no reward model has a part in, drawn without a band.
        places (`Sequence[int]`, *optional*):
            Places of the curves among colours and marks, so that several pictures show one thing alike.
    """
    places = range(len(curves)) if places is None else places

    def paint(axes: "Axes", theme: Theme) -> None:
        for (label, curve), place in zip(curves, places, strict=True):
            color, marker = theme.curves[place % len(theme.curves)], MARKERS[place % len(MARKERS)]
            n, accuracy = _columns(curve)
            low, high = ([100 * point[key] for point in curve] for key in ("low", "high"))
            axes.fill_between(n, low, high, color=color, alpha=0.15, linewidth=0)
            if len(n) == 1:  # nothing to fill
                axes.vlines(n, low, high, color=color, alpha=0.4)
            axes.plot(n, accuracy, color=color, marker=marker, markersize=4, linewidth=2, label=shown_label(label))
        _paint_beside(axes, theme, curves, beside)

    return _curves_picture(name, title, curves, beside, paint)


def curves_picture(result: Result, number: int) -> Picture:
    """All curves of one result that a reward model has a part in: a colour for each aggregate, hollow marks for votes."""
    curves = [(curve_label(key), curve) for key, curve in result.values["curves"].items() if "/" in key]
    ways = [key.partition("/")[::2] for key in result.values["curves"] if "/" in key]
    names = list(dict.fromkeys(name for _, name in ways))
    beside = baselines([result])

    def paint(axes: "Axes", theme: Theme) -> None:
        for (label, curve), (method, name) in zip(curves, ways, strict=True):
            n, accuracy = _columns(curve)
            color = theme.curves[names.index(name) % len(theme.curves)]
            marker, is_first = MARKERS[names.index(name) % len(MARKERS)], method == ways[0][0]
            axes.plot(
                n,
                accuracy,
                color=color,
                marker=marker,
                markersize=5,
                markerfacecolor=color if is_first else theme.page,
                linewidth=2 if is_first else 1,
                label=shown_label(label),
            )
        _paint_beside(axes, theme, curves, beside)

    return _curves_picture(f"curves-{number}", f"{result.name}: every way to choose", curves, beside, paint)


def _curves_picture(name: str, title: str, curves: Curves, beside: Curves, paint: Callable) -> Picture:
    """A picture of accuracies over N, higher by its legend."""
    rows = math.ceil((len(curves) + len(beside)) / _num_columns([label for label, _ in (*curves, *beside)]))
    return draw(name, title, f"Accuracy over N. {_spoken([*curves, *beside])}", paint, 2.75 + 0.17 * rows)


def _spoken(curves: Curves) -> str:
    """First and last point of each curve, in words."""
    ends = [(label, curve[0], curve[-1]) for label, curve in curves]
    return "; ".join(
        f"{label}: {percent(first['accuracy'])} at N = {first['n']}, {percent(last['accuracy'])} at N = {last['n']}"
        for label, first, last in ends
    )


def _paint_beside(axes: "Axes", theme: Theme, curves: Curves, beside: Curves) -> None:
    """Votes and pass@N, the axes, and the legend of all."""
    for (label, curve), (style, marker) in zip(beside, cycle((("--", "_"), (":", "x"), ("-.", "+"))), strict=False):
        n, accuracy = _columns(curve)
        marker = marker if len(n) == 1 else None  # a line of one point would not be seen
        axes.plot(
            n, accuracy, color=theme.quiet, linestyle=style, marker=marker, linewidth=1.5, label=shown_label(label)
        )
    numbers = sorted({point["n"] for _, curve in (*curves, *beside) for point in curve})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.minorticks_off()
    axes.set_xlabel("N")
    low, high = axes.get_ylim()
    if high - low < 10:  # all accuracies are nearly equal: do not enlarge their differences
        low, high = (low + high) / 2 - 5, (low + high) / 2 + 5
    axes.set_ylim(max(low, -2), min(high, 102))
    axes.set_ylabel("accuracy, %")
    legend(axes, theme)


def shown_label(text: str) -> str:
    """A text as matplotlib shows it in a legend: it reads formulas between dollars, and leaves out what begins with `_`."""
    short = text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 1]}…"
    return " " * short.startswith("_") + short.replace("$", r"\$")


def _columns(curve: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """N, and accuracy in percent."""
    return [point["n"] for point in curve], [100 * point["accuracy"] for point in curve]


def _num_columns(labels: Sequence[str]) -> int:
    """Columns of a legend: two if there are many labels, and all are short."""
    return 2 if len(labels) > 4 and max(map(len, labels)) <= 24 else 1


def legend(axes: "Axes", theme: Theme) -> None:
    """Above the axes, so that it hides no curve."""
    _, labels = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.01),
        ncols=_num_columns(labels),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.text,
        borderaxespad=0,
        labelspacing=0.25,
    )


def calibration_picture(results: Sequence[Result]) -> Picture:
    """Share of right ones over the mean score of each bin. A point on the diagonal is a score that means what it says."""
    return reliability_picture({result.name: result.values["calibration"]["bins"] for result in results})


def reliability_picture(calibrations: dict[str, list[dict[str, Any]]]) -> Picture:
    """The same for bins by the names of what has them."""
    filled = {name: [one for one in bins if one["count"]] for name, bins in calibrations.items()}
    text = "Share of right solutions over their mean score, by bins. " + "; ".join(
        f"{name}: {len(bins)} bins, the highest at score {bins[-1]['mean_score']:.2f} with {percent(bins[-1]['share_right'])} right"
        for name, bins in filled.items()
        if bins
    )

    def paint(axes: "Axes", theme: Theme) -> None:
        axes.plot([0, 1], [0, 100], color=theme.quiet, linestyle=":", linewidth=1.2)
        for (name, bins), color, marker in zip(filled.items(), cycle(theme.curves), cycle(MARKERS), strict=False):
            largest = max((one["count"] for one in bins), default=1)
            x, y = [one["mean_score"] for one in bins], [100 * one["share_right"] for one in bins]
            axes.plot(x, y, color=color, linewidth=1.2, alpha=0.6)
            sizes = [12 + 90 * one["count"] / largest for one in bins]
            axes.scatter(x, y, sizes, color=color, marker=marker, label=shown_label(name), linewidths=0)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-2, 102)
        axes.set_xlabel("mean score of the bin (a larger mark: more solutions)")
        axes.set_ylabel("right, %")
        legend(axes, theme)

    return draw("calibration", "Is a score of 0.9 right nine times in ten?", text, paint, 3.3)


def scores_picture(result: Result, kind: str, number: int) -> Picture:
    """Scores of what is right above the axis, of what is wrong below it, each as shares of its own."""
    parts = result.scores[kind]
    right, wrong = parts["right"], parts["wrong"]
    text = f"Scores of {kind}, {result.name}: {len(right):,} right{_mean(right)}, {len(wrong):,} wrong{_mean(wrong)}."

    def paint(axes: "Axes", theme: Theme) -> None:
        for scores, name, color, sign in ((right, "right", theme.right, 1), (wrong, "wrong", theme.wrong, -1)):
            shares = _shares(scores)
            edges = [i / NUM_BINS for i in range(NUM_BINS)]
            label = f"{name}: {len(scores):,}{_mean(scores)}"
            axes.bar(
                edges, [sign * 100 * share for share in shares], 0.9 / NUM_BINS, align="edge", color=color, label=label
            )
        axes.axhline(0, color=theme.quiet, linewidth=1)
        axes.set_xlim(0, 1)
        axes.set_xlabel("score")
        axes.set_ylabel("share of each, %")
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        legend(axes, theme)

    return draw(f"scores-{number}", f"{result.name}: scores of {kind}", text, paint)


def _shares(scores: Sequence[float]) -> list[float]:
    """Share of scores in each of `NUM_BINS` bins from 0 to 1."""
    counts = [0] * NUM_BINS
    for score in scores:
        counts[min(int(score * NUM_BINS), NUM_BINS - 1)] += 1
    return [count / max(len(scores), 1) for count in counts]


def _mean(scores: Sequence[float]) -> str:
    return f", mean {sum(scores) / len(scores):.3f}" if scores else ""


@dataclass(frozen=True)
class Pictures:
    """The pictures of a report, by section: accuracy has one for each group of results of the same problems."""

    accuracy: list[Picture]
    curves: list[Picture]
    calibration: list[Picture]
    scores: list[Picture]

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Pictures":
        """Draw what the results hold."""
        drawn = [result for group in problem_groups(results) for result in group]
        several = [result for result in drawn if sum("/" in key for key in result.values["curves"]) > 1]
        calibrated = [result for result in drawn if has_bins(result)]
        scored = [(result, kind) for result in results for kind in result.scores]
        return cls(
            [accuracy_picture(group, number) for number, group in enumerate(problem_groups(results), start=1)],
            [curves_picture(result, number) for number, result in enumerate(several, start=1)],
            [calibration_picture(calibrated)] if calibrated else [],
            [scores_picture(result, kind, number) for number, (result, kind) in enumerate(scored, start=1)],
        )

    @property
    def all(self) -> list[Picture]:
        """Every picture, in the order of the page."""
        return [*self.accuracy, *self.curves, *self.calibration, *self.scores]
