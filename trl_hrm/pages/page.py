"""
Pages from templates: `templates/` holds them, `style.css` is the style of all.

A page loads nothing from the network: it contains its style, scripts and pictures, and its content security policy forbids all requests.
Templates of pages (`.html.jinja`) escape every text. Cards are made by `huggingface_hub` from theirs (`.md`).
"""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..io import replacing
from .numbers import percent
from .pictures import Picture


@dataclass(frozen=True)
class Table:
    """
    A table, for a page or for Markdown.

    Args:
        head (`Sequence[str]`):
            Titles of the columns.
        rows (`Sequence[Sequence[str]]`):
            The cells. The first of each row is its title.
        marked (`frozenset[int]`, *optional*, defaults to `frozenset()`):
            Indices of rows to highlight.
        style (`str`, *optional*, defaults to `""`):
            Class of the table in the style sheet.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    style: str = ""

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [[" ".join(cell.splitlines()).replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        lines.insert(1, ["---"] * len(self.head))
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(template: str, **values: Any) -> str:
    """
    Fill in a template.

    Args:
        template (`str`):
            Name of a file in `templates/`.
        **values:
            What the template shows. A missing value is an error.

    Returns:
        `str`: The text. The same values give the same bytes.
    """
    return _ENVIRONMENT.get_template(template).render(values)


def write_page(text: str, pictures: Iterable[Picture], output: Path) -> list[Path]:
    """
    Write a page, and its pictures in light colours into a folder next to it: `report_files` for `report.html`.

    Returns:
        `list[Path]`: The files of the pictures.
    """
    folder = output.with_name(f"{output.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for picture in pictures:
        files.append(folder / f"{picture.name}.png")
        with replacing(files[-1], "wb") as file:
            file.write(picture.images["light"])
    with replacing(output) as file:
        file.write(text)
    return files


def resource(name: str) -> str:
    """The text of a file of this package: a style sheet, a script, or a template of a card."""
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _kept(text: str) -> str:
    """A sentence with its numbers kept on one line."""
    return text.replace(" %", "\N{NO-BREAK SPACE}%").replace("N = ", "N\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")


def _png(image: bytes) -> str:
    """A picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(image).decode()


_ENVIRONMENT = Environment(
    loader=PackageLoader(__package__),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.globals["resource"] = lambda name: Markup(resource(name))
_ENVIRONMENT.filters |= {"kept": _kept, "percent": percent, "png": _png}
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
