"""
Render HTML pages from the templates in `templates/` and the style sheets next to this file.

A page contains its style, scripts and pictures. It makes no network requests, and its content security policy forbids
them. The HTML templates (`.html.jinja`) escape all text. `huggingface_hub` renders the templates of model and dataset
cards (`.md.jinja`) and escapes nothing, so texts of data go through [`markdown`] or [`code`] first.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..io import claimed_file, remove_partial, replacing
from ..terminal import one_line, printable
from .latex import with_math
from .numbers import percent, tint
from .pictures import Picture


@dataclass(frozen=True)
class Table:
    """
    A table, for a page or for Markdown.

    Args:
        head (`Sequence[str]`):
            Titles of the columns: text for a page, Markdown for [`Table.markdown`].
        rows (`Sequence[Sequence[str]]`):
            Cells of each row. The first cell is the title of the row.
        marked (`frozenset[int]`, *optional*, defaults to `frozenset()`):
            Indices of rows to highlight.
        style (`str`, *optional*, defaults to `""`):
            CSS class of the table.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    style: str = ""

    def markdown(self, is_aligned: bool = False) -> str:
        """Return the table in Markdown. With `is_aligned`, columns have the same width in every line, for a terminal."""
        lines = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        widths = [max(3, *map(len, column)) if is_aligned else 3 for column in zip(*lines, strict=True)]
        lines.insert(1, ["-" * width for width in widths])
        if is_aligned:
            lines = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def calibration_table(bins: Sequence[dict[str, Any]], judged: str) -> Table:
    """Return a table of score bins with the share of correct ones. `judged` says what is scored: `"solutions"` or `"steps"`."""
    rows = [
        [
            f"{one['low']:g} to {one['high']:g}",
            f"{one['count']:,}",
            "–" if one["mean_score"] is None else f"{one['mean_score']:.3f}",
            percent(one["share_right"]),
        ]
        for one in bins
    ]
    return Table(["score", judged, "mean score", "correct"], rows)


def markdown(text: str) -> str:
    """
    Return a text for Markdown, on one line and with at most 1,000 characters. If it contains characters that could be markup, it
    becomes a code span, in which Markdown and HTML mean nothing.

    Example:

    ```python
    >>> markdown("my model"), markdown("<b>*my* model")
    ('my model', '`<b>*my* model`')
    ```
    """
    text = one_line(text)
    return code(text) if _MARKUP.search(text) else text


def code(text: str) -> str:
    """Return a text as a Markdown code span, on one line and with at most 1,000 characters."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}" if text else ""


def render(template: str, **values: Any) -> str:
    """
    Render a template.

    Args:
        template (`str`):
            Name of a file in `templates/`.
        **values:
            Variables of the template. A missing variable is an error.

    Returns:
        `str`: Rendered text. The output is deterministic.
    """
    return _ENVIRONMENT.get_template(template).render(values)


@contextmanager
def claimed_page(path: str | Path, option: str) -> Iterator[Path]:
    """
    Context manager that claims the file of a page before any work is done. See [`~io.claimed_file`].

    Raises:
        `FileExistsError`: If the file exists and is not a page, so that a page never replaces results or notes.
    """
    with claimed_file(path, option) as file:
        if file.exists() and file.stat().st_size:
            with open(file, "rb") as existing:
                if not re.match(rb"\s*<(!doctype html|html)", existing.read(64), re.IGNORECASE):
                    raise FileExistsError(f"{path} exists and is not an HTML page. Choose another `{option}`.")
        yield file


def write_page(text: str, pictures: Iterable[Picture], output: Path) -> list[Path]:
    """
    Write a page and its pictures. See [`write_pictures`].

    Returns:
        `list[Path]`: Picture files.
    """
    files = write_pictures(pictures, output)
    with replacing(output) as file:
        file.write(text)
    return files


def write_pictures(pictures: Iterable[Picture], output: Path) -> list[Path]:
    """
    Write the pictures of a page in the light theme to a folder next to it, such as `report_files` for `report.html`.

    Returns:
        `list[Path]`: Picture files.
    """
    folder = output.with_name(f"{output.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures:
        files.append(folder / f"{picture.name}.png")
        remove_partial(files[-1])
        with replacing(files[-1], "wb") as file:
            file.write(picture.images["light"])
    return files


def resource(name: str) -> str:
    """Return the content of a file in this package: a style sheet, a script, or a card template."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _kept(text: str) -> str:
    """Replace spaces by no-break spaces in `12 %`, `N = 4` and `λ = 0.5`."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _png(image: bytes) -> str:
    """Return a PNG image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


def _visible(value: Any) -> Any:
    """Make control characters of a text visible: they could reverse or hide the text around it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


# Text that is not plain everywhere in a line: markup, links that need no brackets, and what is special at the start of a line
_MARKUP = re.compile(r"[\\`*\[\]<>&~$|@]|(?<!\w)_|_(?!\w)|://|www\.|^[-+=#]|^\d+[.)](\s|$)")
_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    finalize=_visible,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals["resource"] = lambda name: Markup(resource(name))
_ENVIRONMENT.filters |= {"kept": _kept, "math": with_math, "percent": percent, "png": _png, "tint": tint}
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
