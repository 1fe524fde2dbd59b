"""A picture of scores: all candidates above, the chosen ones below."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_BINS = 40


def new_figure() -> "Figure":
    """
    An empty figure.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the picture of the scores needs matplotlib: pip install "trl-hrm[plots]"') from error
    return Figure(figsize=(6, 4), layout="constrained")


def draw_scores(judged: Sequence[float], chosen: Sequence[float], axis: str, path: Path) -> "Figure":
    """
    Two histograms on one axis from 0 to 1, each with its mean. The same scores give the same bytes.

    Args:
        judged (`Sequence[float]`):
            Scores of all candidates that were judged.
        chosen (`Sequence[float]`):
            Scores of those that were chosen.
        axis (`str`):
            What the scores are.
        path (`Path`):
            PNG file to write.

    Returns:
        `Figure`: What was written.
    """
    figure = new_figure()
    panels = figure.subplots(2, 1, sharex=True)
    for panel, scores, name, color in zip(
        panels, (judged, chosen), ("all judged candidates", "chosen"), ("tab:gray", "tab:blue"), strict=True
    ):
        mean = sum(scores) / len(scores)
        panel.hist(scores, bins=NUM_BINS, range=(0, 1), color=color)
        panel.axvline(mean, color="black", linestyle="--", linewidth=1)
        panel.set_title(f"{name}: {len(scores):,}, mean {mean:.3f}", fontsize=10)
        panel.set_ylabel("candidates")
        panel.yaxis.get_major_locator().set_params(integer=True)
    panels[1].set_xlabel(axis)
    panels[1].set_xlim(0, 1)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    return figure
