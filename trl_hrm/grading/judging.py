"""Whether one answer is right: what it says, and how it compares with the reference."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from .extraction import BOX, NUMBER, last_box, open_box


@dataclass(frozen=True)
class Grade:
    """
    Whether an answer is right.

    Args:
        correct (`bool`, *optional*):
            `None` wherever `status` is not `"graded"`: what could not be judged is not wrong.
        status (`str`):
            `"graded"`; `"unparseable"` (the answer cannot be read, or cannot be compared with the reference);
            `"ungradable"` (the reference cannot be read, so no answer to this problem can be judged); `"timeout"` (the
            deadline passed); `"died"` (the worker ended twice, for want of memory for instance).
    """

    correct: bool | None
    status: str


class Reading(NamedTuple):
    """An answer as its words (`None` for a formula) and as the SymPy objects in it, if any."""

    words: str | None
    values: list


# Words of three letters or more: `abc` is one, and a product only in `2abc` or `abc + 1`.
_WORD = re.compile(
    r"(?<![^\s(])(?!(?:and|sqrt|sin|cos|tan|cot|sec|csc|log|exp|infinity|percent)\b)(?:[^\W\d_]{3,}|no)\b"
)
_FORMULA = re.compile(r"[=+*/^_\\{}<>|]")
_IN_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm)\s*\{([^{}]*)\}")
# No formula: "$48 and $24", two prices.
_IN_MATH = re.compile(
    r"\$\$([^$]+)\$\$|\$(\S|\S[^$]*\S|\s[^$]*\s)\$(?!\d)|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]",
    re.DOTALL,
)
_LEAD = re.compile(r"^(?:the\s+)?(?:final\s+)?answer\s*(?:is\b\s*:?|:)[\s*]*", re.IGNORECASE)
_MIXED = re.compile(r"^(-?\d+)\s+(\d+)/(\d+)$")
# A number beside one of these is not the number that is meant.
_NUMERALS = re.compile(r"\b(?:half|third|quarter|hundred|thousand|[mb]illion|trillion|dozen)s?\b", re.IGNORECASE)


def judge(answer: str, reference: str) -> Grade:
    r"""
    Compare an answer with the reference by math-verify. There is no deadline here: see [`AnswerGrader`].

    Formulas are compared by value. Words are compared as texts without case and punctuation. A number among words, such
    as `72 clips`, counts as that number if it is the only one. Where words and numbers do not settle it (`May 5` against
    `June 5`, `not Evelyn` against `Evelyn`, `three` against `3`), the answer is unparseable, not wrong.

    Args:
        answer (`str`):
            The answer, as it was extracted: LaTeX with or without `$`, a number, or words.
        reference (`str`):
            The right answer. If it is readable, the same text is always correct.

    Returns:
        [`Grade`]
    """
    gold = _read(reference)
    if not (gold.words or gold.values):
        return Grade(None, "ungradable")
    if answer.split() == reference.split():
        return Grade(True, "graded")
    correct = _compare(gold, _read(answer))
    return Grade(correct, "unparseable" if correct is None else "graded")


def _compare(gold: Reading, found: Reading) -> bool | None:
    if not (found.words or found.values):
        return None
    if gold.words and found.words:
        if gold.words == found.words:
            return True
        if f" {gold.words} " in f" {found.words} ":  # "it is Evelyn", or "not Evelyn"
            return None
    if gold.values and found.values:
        equal = _verify(gold.values, found.values)
        if equal and gold.words and found.words:  # "5 feet" and "5 foot", or "May 5" and "June 5"
            return None
        return equal
    return None if gold.values else False


def _verify(gold: list, found: list) -> bool | None:
    from math_verify import verify

    try:
        # the comparison of relations: x > 2 is (2, oo)
        return bool(verify(gold, found, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True))
    except Exception:  # whatever SymPy raises; by default math-verify would call the answer wrong
        return None


def _read(text: str) -> Reading:
    text = _unwrap(text)
    boxes = len(BOX.findall(text))
    formulas = [next(filter(None, found), "") for found in _IN_MATH.findall(text)]
    if boxes == 1 and last_box(text):
        return _read(last_box(text))
    if len(formulas) == 1:
        return _read(formulas[0])
    if boxes or formulas:
        return Reading(None, _parse(text))
    plain = _IN_TEXT.sub(r"\1", text).replace("%", " percent ")
    plain = re.sub(r"(?<=[a-zA-Z])/(?=[a-zA-Z])", " per ", plain)
    if not _WORD.search(plain) or _FORMULA.search(NUMBER.sub("0", plain)):
        return Reading(None, _parse_formula(_MIXED.sub(r"\1\\frac{\2}{\3}", text)))
    words = " ".join(re.findall(rf"{NUMBER.pattern}|\w+", plain.casefold()))
    numbers = NUMBER.findall(plain)
    if len(numbers) != 1 or _NUMERALS.search(plain):
        return Reading(words, [])
    return Reading(words, _parse_formula(numbers[0] + (r"\%" if "percent" in plain else "")))


def _parse_formula(text: str) -> list:
    return _parse(r"\boxed{" + text + "}")


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    try:
        return parse(
            text, [LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None, raise_on_error=True
        )
    except Exception:  # whatever the parser raises: it cannot read this
        return []


def _unwrap(text: str) -> str:
    r"""The answer without what policies like to put around it: `The answer is **72.**` is `72`."""
    text = text.strip("* \t\r\n").removesuffix(".")
    text = open_box(_LEAD.sub("", text).strip("* \t\r\n"))
    for written, latex in ((r"\$", ""), (r"\%", "%"), ("−", "-"), ("°", r"^\circ")):
        text = text.replace(written, latex)
    text = re.sub(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi", text)
    return re.sub(r"[€£¥₹]", "", text.replace("$", "") if text.count("$") == 1 else text).strip()
