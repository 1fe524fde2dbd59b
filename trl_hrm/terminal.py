"""Colours of scores in a terminal, and text that is safe to print there."""

import os
import re
import sys
import unicodedata
from typing import TextIO


# Red, yellow, green among the 256 colours; legible on white and on black
RAMP = (160, 166, 172, 178, 142, 106, 70, 34)
_COLORED = re.compile(rf"(\033\[38;5;(?:{'|'.join(map(str, RAMP))})m)([^\033]*)(\033\[0m)")


def has_color() -> bool:
    """Return whether stdout is a terminal with colours. The variable `NO_COLOR` turns them off."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def color_of(score: float) -> int:
    """Return the number of the colour of a score between 0 and 1, among the 256 of a terminal."""
    return RAMP[max(0, min(int(score * len(RAMP)), len(RAMP) - 1))]


def colored(text: str, score: float) -> str:
    """Return a text in the colour of a score between 0 and 1."""
    return f"\033[38;5;{color_of(score)}m{text}\033[0m"


def plain(text: str) -> str:
    """Return a text as one line that is safe to print: white space becomes a space, other control characters become visible."""
    return _visible(" ".join(text.split()))


def one_line(text: str, limit: int = 1000) -> str:
    """Return a message as one line that is safe to print. If it is longer than `limit` characters, its middle is left out."""
    text = plain(text)
    if len(text) <= limit:
        return text
    end = limit // 3  # what to do is usually at the end
    return f"{text[: limit - end - 5]} ... {text[-end:]}"


def printable(text: str, color: bool = False) -> str:
    """
    Return a text of several lines that is safe to show. Control characters become visible, except line breaks and tabs, and with
    `color` the colours of [`colored`].
    """
    parts = _COLORED.split(text) if color else [text]  # text, code, coloured text, code, text, ...
    return "".join(
        part if i % 2 else "\n".join(_visible(line, "\t") for line in part.split("\n")) for i, part in enumerate(parts)
    )


def say(text: object, file: TextIO | None = None) -> None:
    """
    Print a text of several lines that may contain texts of data. See [`printable`]. Characters that the terminal cannot encode are
    escaped. `file` defaults to `sys.stdout`.
    """
    file = sys.stdout if file is None else file
    encoding = file.encoding or "utf-8"
    text = (
        printable(str(text), file is sys.stdout and has_color()).encode(encoding, "backslashreplace").decode(encoding)
    )
    print(text, file=file, flush=True)  # noqa: T201


def _visible(text: str, kept: str = "") -> str:
    """Replace control, format, surrogate and unassigned characters, and all line breaks, except those in `kept`."""
    if text.isprintable():
        return text

    def visible(character: str) -> str:
        if character in kept or (unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029"):
            return character
        if character < " ":
            return chr(0x2400 + ord(character))  # the symbol of a control character
        return f"\\u{ord(character):04x}"

    return "".join(map(visible, text))
