"""Colours of scores in a terminal, and text that is safe to print there."""

import os
import sys
import unicodedata


# Red, yellow, green among the 256 colours; legible on white and on black
RAMP = (160, 166, 172, 178, 142, 106, 70, 34)


def has_color() -> bool:
    """Return whether stdout is a terminal with colours. The variable `NO_COLOR` turns them off."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def color_of(score: float) -> int:
    """Return the number of the colour of a score between 0 and 1, among the 256 of a terminal."""
    return RAMP[max(0, min(int(score * len(RAMP)), len(RAMP) - 1))]


def plain(text: str) -> str:
    """Return a text as one line that is safe to print: white space becomes a space, other control characters become visible."""

    def visible(character: str) -> str:
        if unicodedata.category(character)[0] != "C":
            return character
        if character < " ":
            return chr(0x2400 + ord(character))  # the symbol of a control character
        return f"\\u{ord(character):04x}"

    return "".join(map(visible, " ".join(text.split())))
