"""What the sections of the demo's report are made of."""

import statistics
from collections.abc import Sequence

from ..evaluation.hacking import percent
from ..evaluation.report_page import figure, kept
from ..evaluation.report_pictures import Picture


def paragraph(text: str, style: str = "") -> str:
    """Sentences."""
    return f'<p class="{style}">{kept(text)}</p>'


def note(text: str) -> str:
    """What is read by who wants to know more."""
    return paragraph(text, "quiet")


def grid(pictures: Sequence[Picture]) -> str:
    """Pictures side by side where there is room."""
    return f'<div class="grid">{"".join(map(figure, pictures))}</div>'


def beside(pictures: Sequence[Picture], content: str) -> str:
    """A picture and what is said of it, side by side on a wide screen."""
    if not pictures:
        return content
    return f'<div class="pair">{"".join(map(figure, pictures))}<div>{content}</div></div>'


def shares(values: Sequence[float]) -> str:
    """Mean of shares over seeds in percent, from the lowest to the highest where there are several."""
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def numbers(values: Sequence[float | None], form: str = ".2f") -> str:
    """The same of numbers that are no shares, in a format. A dash where one was not measured."""
    if None in values or not values:
        return "–"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
