"""Draw pictures with matplotlib in a light and a dark theme, and the charts that several reports share."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..terminal import plain
from .numbers import percent


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Sequence[tuple[str, list[dict[str, Any]]]]  # labels, and points with `n` and `accuracy`

DPI = 180
WIDTH = 4.5  # inches. Small, so that text is readable on a phone
MAX_LABEL_CHARACTERS = 60
MARKERS = "osD^vPX"
NUM_SCORE_BINS = 40


@dataclass(frozen=True)
class Theme:
    """Colours of a picture: page, text, grid lines and curves. Blue and orange are distinguishable for colour-blind readers."""

    page: str
    text: str
    quiet: str
    grid: str
    curves: tuple[str, ...]

    @property
    def right(self) -> str:
        """Colour of correct solutions or steps."""
        return self.curves[0]

    @property
    def wrong(self) -> str:
        """Colour of wrong solutions or steps."""
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
    A picture for a page.

    Args:
        name (`str`):
            File name without extension.
        title (`str`):
            Caption, on one line.
        text (`str`):
            Alternative text for screen readers.
        images (`dict[str, bytes]`):
            PNG image for each theme.
    """

    name: str
    title: str
    text: str
    images: dict[str, bytes]


def new_figure() -> "Figure":
    """Return an empty figure."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained")


def style_axes(axes: "Axes", theme: Theme) -> None:
    """Apply the colours of a theme to empty axes, and remove the frame."""
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


def draw(
    name: str,
    title: str,
    text: str,
    paint: Callable[["Axes", Theme], None],
    height: float = 3.0,
    width: float = WIDTH,
) -> Picture:
    """
    Draw a picture in every theme. The output is deterministic.

    Args:
        name, title, text:
            See [`Picture`].
        paint (`Callable`):
            Function that draws on the given axes with the colours of a theme.
        height (`float`, *optional*, defaults to `3.0`):
            Height in inches.
        width (`float`, *optional*, defaults to `4.5`):
            Width in inches.
    """
    images = {}
    for key, theme in THEMES.items():
        figure = new_figure()
        figure.set_size_inches(width, height)
        axes = figure.subplots()
        style_axes(axes, theme)
        paint(axes, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=theme.page, metadata={"Software": None})
        images[key] = buffer.getvalue()
    return Picture(name, title, text, images)


def shown_label(text: str) -> str:
    """
    Shorten and escape a label for a legend, on one line. Otherwise matplotlib renders text between dollar signs as a formula, and
    ignores labels that start with `_`.
    """
    text = plain(text)
    short = text if len(text) <= MAX_LABEL_CHARACTERS else f"{text[: MAX_LABEL_CHARACTERS - 1]}…"
    return " " * short.startswith("_") + short.replace("$", r"\$")


def legend(axes: "Axes", theme: Theme) -> None:
    """Put the legend above the axes, so that it does not cover the curves."""
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


def _num_columns(labels: Sequence[str]) -> int:
    """Return the number of columns of a legend: two for many short labels, otherwise one."""
    return 2 if len(labels) > 4 and max(map(len, labels)) <= 24 else 1


def curves_picture(
    name: str, title: str, curves: Curves, baselines: Curves, paint: Callable[["Axes", Theme], None]
) -> Picture:
    """
    Draw accuracy over N.

    Args:
        name, title:
            See [`Picture`].
        curves (`Sequence[tuple[str, list[dict]]]`):
            Labels and points of the curves drawn by `paint`.
        baselines (`Sequence[tuple[str, list[dict]]]`):
            Labels and points of curves without a reward model.
        paint (`Callable`):
            Function that draws `curves` on the given axes with the colours of a theme.
    """
    shown = [*curves, *baselines]

    def paint_all(axes: "Axes", theme: Theme) -> None:
        paint(axes, theme)
        for (label, curve), (style, marker) in zip(
            baselines, cycle((("--", "_"), (":", "x"), ("-.", "+"))), strict=False
        ):
            marker = marker if len(curve) == 1 else None  # a line with one point is invisible
            axes.plot(
                *columns(curve),
                color=theme.quiet,
                linestyle=style,
                marker=marker,
                linewidth=1.5,
                label=shown_label(label),
            )
        numbers = sorted({point["n"] for _, curve in shown for point in curve})
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.minorticks_off()
        axes.set_xlabel("N")
        low, high = axes.get_ylim()
        if high - low < 10:  # do not exaggerate small differences
            low, high = (low + high) / 2 - 5, (low + high) / 2 + 5
        axes.set_ylim(max(low, -2), min(high, 102))
        axes.set_ylabel("accuracy, %")
        legend(axes, theme)

    ends = [(label, curve[0], curve[-1]) for label, curve in shown]
    text = "; ".join(
        f"{label}: {percent(first['accuracy'])} at N = {first['n']}, {percent(last['accuracy'])} at N = {last['n']}"
        for label, first, last in ends
    )
    num_rows = math.ceil(len(shown) / _num_columns([label for label, _ in shown]))
    return draw(name, title, f"Accuracy over N. {text}", paint_all, 2.75 + 0.17 * num_rows)


def columns(curve: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """Return N, and accuracy in percent."""
    return [point["n"] for point in curve], [100 * point["accuracy"] for point in curve]


def band_picture(
    name: str, title: str, curves: Curves, baselines: Curves, places: Sequence[int] | None = None
) -> Picture:
    """
    Draw accuracy over N, with a band around each curve.

    Args:
        name, title:
            See [`Picture`].
        curves (`Sequence[tuple[str, list[dict]]]`):
            Labels, and points with `n`, `accuracy`, and the bounds `low` and `high` of the band. A curve without bounds, such as one
            of a paper, is a broken line.
        baselines (`Sequence[tuple[str, list[dict]]]`):
            Curves without a reward model, drawn without a band.
        places (`Sequence[int]`, *optional*):
            Index of the colour and marker of each curve. Use the same index for a model in several pictures.
    """
    places = range(len(curves)) if places is None else places

    def paint(axes: "Axes", theme: Theme) -> None:
        for (label, curve), place in zip(curves, places, strict=True):
            color, marker = theme.curves[place % len(theme.curves)], MARKERS[place % len(MARKERS)]
            n, accuracy = columns(curve)
            line = {"linewidth": 2}
            if "low" in curve[0]:
                low, high = ([100 * point[key] for point in curve] for key in ("low", "high"))
                axes.fill_between(n, low, high, color=color, alpha=0.15, linewidth=0)
                if len(n) == 1:  # nothing to fill
                    axes.vlines(n, low, high, color=color, alpha=0.4)
            else:
                line = {"linewidth": 1.5, "linestyle": "--"}
            axes.plot(n, accuracy, color=color, marker=marker, markersize=4, label=shown_label(label), **line)

    return curves_picture(name, title, curves, baselines, paint)


def reliability_picture(calibrations: dict[str, list[dict[str, Any]]], judged: str = "solutions") -> Picture:
    """
    Draw the share of correct solutions (or steps) over the mean score of each bin. A calibrated model lies on the diagonal.

    Args:
        calibrations (`dict[str, list[dict]]`):
            Bins of each name with `count`, `mean_score` and `share_right`.
        judged (`str`, *optional*, defaults to `"solutions"`):
            What has a score: `"solutions"` or `"steps"`.
    """
    filled = {name: [one for one in bins if one["count"]] for name, bins in calibrations.items()}
    text = f"Share of correct {judged} over their mean score, by bins. " + "; ".join(
        f"{name}: {len(bins)} bins, the highest at score {bins[-1]['mean_score']:.2f} with {percent(bins[-1]['share_right'])} correct"
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
        axes.set_xlabel(f"mean score of the bin (larger marks: more {judged})")
        axes.set_ylabel("correct, %")
        legend(axes, theme)

    return draw("calibration", f"Calibration: are 90 % of {judged} with a score of 0.9 correct?", text, paint, 3.3)


def draw_scores(judged: Sequence[float], chosen: Sequence[float], axis: str, path: Path) -> "Figure":
    """
    Draw histograms of all scores and of the scores of selected candidates, with their means. The output is
    deterministic.

    Args:
        judged (`Sequence[float]`):
            Scores of all candidates.
        chosen (`Sequence[float]`):
            Scores of the selected candidates.
        axis (`str`):
            Label of the axis.
        path (`Path`):
            PNG file to write.

    Returns:
        `Figure`: The figure that was written.
    """
    theme = THEMES["light"]
    figure = new_figure()
    figure.set_size_inches(6, 4)
    panels = figure.subplots(2, 1, sharex=True)
    for panel, scores, name, color in zip(
        panels, (judged, chosen), ("all judged candidates", "chosen"), (theme.quiet, theme.right), strict=True
    ):
        style_axes(panel, theme)
        mean = sum(scores) / len(scores)
        panel.hist(scores, bins=NUM_SCORE_BINS, range=(0, 1), color=color)
        panel.axvline(mean, color=theme.text, linestyle="--", linewidth=1)
        panel.set_title(f"{name}: {len(scores):,}, mean {mean:.3f}", fontsize=10, color=theme.text)
        panel.set_ylabel("candidates")
        panel.yaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xlabel(axis)
    panels[1].set_xlim(0, 1)
    figure.savefig(path, dpi=120, facecolor=theme.page, metadata={"Software": None})
    return figure
