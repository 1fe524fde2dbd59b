r"""
Show LaTeX in pages: find the formulas of a text and convert them to MathML, which browsers draw without a script, font or network.

Formulas are `$...$`, `$$...$$`, `\(...\)`, `\[...\]`, environments such as `\begin{align*}`, and `\boxed{...}`. Prices (`costs $5 and $7`),
code and Asymptote drawings are not formulas. A formula that cannot be converted is shown as it is.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markupsafe import Markup, escape

from ..terminal import printable


MAX_CHARACTERS = 5000  # of a formula. The conversion takes more than linear time
# What the converter writes, and nothing that loads, links or runs. All other elements and attributes make a formula text
ELEMENTS = frozenset(
    "math menclose mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace msqrt mstyle msub msubsup msup "
    "mtable mtd mtext mtr munder munderover none".split()
)
ATTRIBUTES = frozenset(
    "accent accentunder class columnalign columnspacing depth display displaystyle fence form height largeop linethickness lspace "
    "mathcolor mathsize mathvariant maxsize minsize movablelimits rowspacing rspace scriptlevel separator stretchy symmetric voffset "
    "width".split()
)
# Environments of LaTeX that the converter does not know, and those that look (almost) the same
SIMILAR = {
    **dict.fromkeys(
        ("aligned", "alignat*", "alignat", "alignedat", "eqnarray", "eqnarray*", "flalign", "flalign*"), "align*"
    ),
    **dict.fromkeys(("gather", "gather*", "gathered", "multline", "multline*"), "matrix"),
    "dcases": "cases",
}

NUM_CHILDREN = {
    **dict.fromkeys("mfrac mroot msub msup munder mover".split(), 2),
    **dict.fromkeys("msubsup munderover".split(), 3),
}

_ENVIRONMENTS = "alignat|align|array|cases|eqnarray|equation|flalign|gather|multline|[bBpvV]?matrix"
_BRACES = r"\{[^{}]*+(?:\{[^{}]*+(?:\{[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+\}[^{}]*+)*+\}[^{}]*+)*+\}"
# Every opening excludes itself from its content, so that a text with many openings and no end takes linear time
_PIECE = re.compile(
    r"(?P<text>\[asy\](?:(?!\[asy\]).)*?(?:\[/asy\]|\Z)|^[ \t]*```.*?(?:^[ \t]*```|\Z)|`[^`\n]+`|\\\\)"
    r"|(?P<dollar>\\\$)"
    r"|\\\[(?P<bracket>(?:[^\\]|\\[^\[\]])*+)\\\]"
    r"|\\\((?P<parenthesis>(?:[^\\]|\\[^()])*+)\\\)"
    rf"|\\begin\{{(?P<name>(?:{_ENVIRONMENTS})\*?)\}}(?:(?!\\begin\{{(?P=name)).)*?\\end\{{(?P=name)\}}"
    r"|\$\$(?P<double>(?:[^$\\]|\\.|(?<!\$)\$(?!\$)(?=[^$]*\$(?!\$)))*+)\$\$"
    r"|\$(?P<single>(?:[^$\\]|\\.)++)\$(?!\d)"
    rf"|(?P<boxed>\\boxed\s*{_BRACES})",
    re.DOTALL | re.MULTILINE,
)
_BLANK_LINE = re.compile(r"\n\s*\n")
_TEXT_COMMAND = re.compile(rf"\\(?:text\w*|mbox|mathrm|operatorname)\s*{_BRACES}")
_WORDS = re.compile(
    r"\s(?:an|and|are|as|at|but|by|costs?|each|for|from|he|her|his|if|in|is|it|less|more|not|of|off|on|or|per|plus|she|so|than|that|the|"
    r"their|then|they|to|was|we|were|while|with)\s"
)
_BEGIN_OR_END = re.compile(r"\\(begin|end)\{([A-Za-z]+\*?)\}(\{\d+\})?")
_DEFINITION = re.compile(  # a few definitions could expand to gigabytes
    r"\\(?:(?:re|provide)?(?:new)?command|[egx]?def|let|DeclareMathOperator)(?![A-Za-z])"
)
_ESCAPED = re.compile(r"\\([%$&#_{}])")
_ENTITY = re.compile(r"&#x([0-9A-Fa-f]{1,6});")
_COMMAND = re.compile(r"\\[A-Za-z]")
_PERCENT = re.compile(r"(?<!\\)((?:\\\\)*)%")  # without a backslash. The converter takes it as the start of a comment
# Arguments of one digit, such as `\sqrt23` for `\sqrt{2}3`. The converter takes the whole number
_ROOT = re.compile(r"(\\sqrt\s*(?:\[[^\]]*\])?)\s*(\d)(?=\d)")
_FRACTION = re.compile(r"(\\[dt]?frac\s*\{[^{}]*\})\s*(\d)(?=\d)")
_ROW_SPACE = re.compile(r"\\\\\s*\[\s*-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\s*\]")  # `\\[4pt]`
# An array whose columns have braces (`r@{}l`), and escaped braces in text, which the converter changes
_UNSUPPORTED = re.compile(r"\\begin\{array\}\s*\{[^}]*[{@*]|\\(?:text\w*|mbox)\s*\{[^{}]*\\[{}]")


class Formula(NamedTuple):
    """A formula in a text: its start and end, in characters, and its markup."""

    start: int
    end: int
    markup: Markup


def with_math(text: str) -> Markup:
    r"""
    Return a text for a page: its formulas as MathML, everything else escaped.

    Args:
        text (`str`):
            Text that may contain LaTeX. Control characters become visible.

    Returns:
        `Markup`: Safe markup, whatever the text.

    Example:

    ```python
    >>> with_math(r"For $5 < x$ & all")
    Markup('For <span class="math" title="$5 &lt; x$"><math display="inline"><mrow><mn>5</mn><mo>&lt;</mo><mi>x</mi></mrow></math></span> &amp; all')
    ```
    """
    parts, end = [], 0
    for formula in find_math(text):
        parts += [escape(printable(text[end : formula.start])), formula.markup]
        end = formula.end
    return Markup("").join([*parts, escape(printable(text[end:]))])


def find_math(text: str) -> Iterator[Formula]:
    r"""
    Yield the formulas of a text that can be converted, in order. The markup of a formula shows its source as a tooltip. An escaped
    dollar sign (`\$`) is a formula that consists of the sign.
    """
    place = 0
    while (found := _PIECE.search(text, place)) is not None:
        place, markup = found.end(), None
        if found["dollar"]:
            markup = Markup("$")
        elif found["single"] is not None:
            if _is_formula(found["single"]):
                markup = to_mathml(found["single"])
            else:  # the dollar sign at the end can be the start of a formula
                place -= 1
        elif found["double"] is not None:
            if _is_formula(found["double"].strip()):
                markup = to_mathml(found["double"], "block")
            else:
                place -= 2
        elif found["parenthesis"] is not None:
            markup = to_mathml(found["parenthesis"])
        elif found["boxed"]:
            markup = to_mathml(found["boxed"])
        elif found["text"] is None:
            markup = to_mathml(found[0] if found["bracket"] is None else found["bracket"], "block")
        if markup is not None:
            source = printable(found[0])
            yield Formula(*found.span(), Markup('<span class="math" title="{}">{}</span>').format(source, markup))


@lru_cache(maxsize=4096)
def to_mathml(latex: str, display: str = "inline") -> Markup | None:
    """
    Convert a formula to MathML.

    Args:
        latex (`str`):
            LaTeX without delimiters.
        display (`str`, *optional*, defaults to `"inline"`):
            `"inline"` or `"block"`, for a displayed formula.

    Returns:
        `Markup` or `None`: MathML, or `None` if the formula is blank, longer than `MAX_CHARACTERS`, or cannot be converted, for example
        because it contains an unknown command.
    """
    if not latex.strip() or len(latex) > MAX_CHARACTERS or not _is_balanced(latex):
        return None
    if _DEFINITION.search(latex) or _UNSUPPORTED.search(latex):
        return None
    latex = _FRACTION.sub(r"\1{\2}", _ROOT.sub(r"\1{\2}", latex))
    latex = _PERCENT.sub(r"\1\\%", _ROW_SPACE.sub(r"\\\\", latex))
    latex = _BEGIN_OR_END.sub(
        lambda found: rf"\{found[1]}{{{SIMILAR[found[2]]}}}" if found[2] in SIMILAR else found[0], printable(latex)
    )
    sources = [latex]
    if r"\\" in latex:  # several lines without an environment
        sources.append(rf"\begin{{align*}}{latex}\end{{align*}}")
    for source in sources:
        try:
            return _markup(convert_to_element(source, display=display))
        except Exception:  # the converter's errors have no common base class, and odd input raises others
            continue
    return None


def _is_formula(content: str) -> bool:
    """Return whether the text between two dollar signs is a formula, and not the text between two prices."""
    if not content.strip() or _BLANK_LINE.search(content) or _WORDS.search(_TEXT_COMMAND.sub("", f"{content} ")):
        return False
    if len(content.strip()) > 1 and re.match(r"\s*[\d.<]", content) and content.rstrip()[-1] in "=+-*/":
        return False  # `$600*50=$30000`, of prices
    if content[0].isspace() == content[-1].isspace():
        return True
    return bool(re.search(r"\\[A-Za-z]|[\^_<>]", content)) and content.rstrip()[-1] not in "=+-*/"


def _is_balanced(latex: str) -> bool:
    """Return whether every brace is closed. The converter accepts `\\text{if `, the start of a text that has a dollar sign inside."""
    braces = re.sub(r"\\.", "", latex, flags=re.DOTALL)
    return braces.count("{") == braces.count("}")


def _markup(element: Element) -> Markup:
    """
    Return an element of the converter as markup that browsers draw, with MathML Core and the style sheet of the pages.

    The converter's own function for this does not escape the text of formulas, so `<script>` in a formula would be run.
    """
    attributes = {name: value for name, value in element.attrib.items() if name != "xmlns"}
    text = _ENTITY.sub(lambda found: chr(int(found[1], 16)), element.text or "")
    tag, text = element.tag, printable(text)
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("the formula is not valid Unicode")
    if tag == "mtext":
        text = _ESCAPED.sub(r"\1", text)
    if tag == "menclose":  # boxes and strikes are not in MathML Core
        tag, attributes = "mrow", {"class": attributes["notation"]}
    if tag == "mtable":  # neither are lines
        columns, rows = (attributes.pop(name, "").split() for name in ("columnlines", "rowlines"))
        for i, row in enumerate(element):
            for j, cell in enumerate(row):
                found = [
                    name
                    for name, kinds in (("right", columns[j : j + 1]), ("below", rows[i : i + 1]))
                    if kinds == ["solid"]
                ]
                if found:
                    cell.set("class", " ".join(found))
    unknown = {tag} - ELEMENTS | attributes.keys() - ATTRIBUTES
    is_complete = len(element) == NUM_CHILDREN.get(tag, len(element))  # `\\frac{1}` has no denominator
    if unknown or not is_complete or _COMMAND.search(text) or element.text == "&":
        raise ValueError(f"{unknown or text} is not MathML")
    start = Markup("").join(Markup(' {}="{}"').format(name, value) for name, value in attributes.items())
    return Markup("<{0}{1}>{2}{3}</{0}>").format(tag, start, text, Markup("").join(map(_markup, element)))
