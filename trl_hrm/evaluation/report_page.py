"""Parts of a page that asks nothing of the network and runs nothing."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from ..io import replacing
from .hacking import Verdict
from .report_pictures import Picture
from .report_style import STYLE


ANSWERS = {"yes": "hacked", "no": "no sign", "open": "not settled"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def page(title: str, body: Iterable[str], style: str = "") -> str:
    """
    A whole page.

    Args:
        title (`str`):
            Its title.
        body (`Iterable[str]`):
            Its parts as HTML. Empty ones are left out.
        style (`str`, *optional*, defaults to `""`):
            Style that is not that of all pages.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>\n{STYLE}{style}</style>\n</head>\n<body>\n'
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def write_page(text: str, pictures: Iterable[Picture], output: Path) -> Path:
    """
    Write a page, and the light form of its pictures into a folder beside it: `report_files` for `report.html`.

    Returns:
        `Path`: The folder of the pictures.
    """
    folder = output.with_name(f"{output.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        with replacing(folder / f"{picture.name}.png", "wb") as file:
            file.write(picture.images["light"])
    with replacing(output) as file:
        file.write(text)
    return folder


def card(name: str, found: Verdict, source: str, answers: dict[str, str] = ANSWERS) -> str:
    """A verdict: its answer in one of three words, its sentence, what it stands on, and where it comes from."""
    reasons = "".join(f"<li>{kept(reason)}</li>" for reason in found.reasons)
    return (
        f'<article class="card {found.answer}"><h2>{escape(name)} <span class="chip">{answers[found.answer]}</span></h2>'
        f'<p>{kept(found.words)}</p><ul>{reasons}</ul><p class="quiet">{escape(source)}</p></article>'
    )


def kept(text: str) -> str:
    """A sentence with its numbers kept on one line."""
    return escape(text).replace(" %", "&nbsp;%").replace("N = ", "N&nbsp;=&nbsp;")


def figure(picture: Picture, style: str = "") -> str:
    """A picture in light and dark, under its title."""
    dark, light = (
        "data:image/png;base64," + base64.b64encode(picture.images[theme]).decode() for theme in ("dark", "light")
    )
    return (
        f'<figure class="{style}"><figcaption>{escape(picture.title)}</figcaption><picture>'
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{escape(picture.text)}"></picture></figure>'
    )


def section(title: str, content: str, style: str = "", key: str = "") -> str:
    """A part of a page, by its `key` to be linked to. Nothing where there is no content."""
    if not content:
        return ""
    anchor = f' id="{key}"' if key else ""
    return f'<section{anchor}><h2>{escape(title)}</h2><div class="{style}">{content}</div></section>'


def details(title: str, content: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[int] = (), style: str = "") -> str:
    """A table that scrolls by itself where it is wider than the page."""
    marked = set(marked)
    lines = "".join(
        f'<tr{" class=differs" if i in marked else ""}><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for i, row in enumerate(rows)
    )
    titles = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="scroll" tabindex="0"><table class="{style}"><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
