"""The demo's report: measurements in, a page out."""

from pathlib import Path
from typing import Any

from ..evaluation.report_page import write_page
from .report_html import html_page
from .report_pictures import make_pictures


def write_report(data: dict[str, Any], output: Path) -> Path:
    """
    Write the report as one page that asks nothing of the network, and its pictures into a folder beside it.

    Args:
        data (`dict[str, Any]`):
            The measurements, as `report.json` of the demo holds them. Shares are from 0 to 1, and lists of seeds are parallel to
            the `seeds` beside them.
        output (`Path`):
            The page, by convention `report.html`; its pictures go to `report_files`.

    Returns:
        `Path`: The folder of the pictures.

    Raises:
        `ImportError`: If matplotlib is not installed.
    """
    pictures = make_pictures(data)
    return write_page(html_page(data, pictures), [one for part in pictures.values() for one in part], output)
