r"""
Normalize the text of answers before they are compared.

[`clean`] removes the text around an answer and normalizes its characters. [`to_latex`] rewrites a formula as LaTeX that
math-verify parses correctly.
"""

import re
import unicodedata
from fractions import Fraction

from .exact_numbers import BASE_NUMERAL, REPEATING_DECIMAL, base_value, repeating_value


GREEK = "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau|upsilon|phi|chi|psi|omega"
TRIGONOMETRIC = r"sin|cos|tan|cot|sec|csc"
FUNCTION_NAMES = rf"arc(?:{TRIGONOMETRIC})|a(?:sin|cos|tan)|(?:{TRIGONOMETRIC})h?|ln|lg|log|exp|sqrt|cbrt|abs"

# Characters ----------------------------------------------------------------------------------------------------------

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱˣʸ", "0123456789+-=()nixy", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₙₓᵢⱼₖₘ", "0123456789+-=()aenxijkm", strict=True))
_PLAIN_SCRIPTS = str.maketrans(_SUPERSCRIPTS | _SUBSCRIPTS)
_SCRIPTS = re.compile(f"([{''.join(_SUPERSCRIPTS)}]+)|([{''.join(_SUBSCRIPTS)}]+)")
_COMMANDS = {
    "times": "×", "cdot": "·⋅∙", "ne": "≠", "le": "≤⩽≦", "ge": "≥⩾≧", "approx": "≈", "infty": "∞", "pm": "±", "mp": "∓",
    "cup": "∪", "cap": "∩", "in": "∈", "setminus": "∖", "emptyset": "∅", "angle": "∠", "langle": "⟨", "rangle": "⟩",
    "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈", "rceil": "⌉", "int": "∫", "sum": "∑", "Omega": "ΩΩ", "mu": "µ", "phi": "ϕ",
}  # fmt: skip
_CHARACTERS = str.maketrans(
    {
        **{character: rf"\{name} " for name, characters in _COMMANDS.items() for character in characters},
        **{
            unicodedata.lookup(f"GREEK SMALL LETTER {name.replace('lambda', 'lamda')}"): rf"\{name} "
            for name in GREEK.split("|")
        },
        **{character: rf"\mathbb{{{letter}}}" for character, letter in zip("ℝℤℕℚℂ", "RZNQC", strict=True)},
        **dict.fromkeys("−–‒‐‑﹣", "-"),
        **dict.fromkeys("÷∕⁄", "/"),
        **dict.fromkeys("°º", r"^\circ "),
        **dict.fromkeys("\u00a0\u2002\u2003\u2005\u2007\u2009\u202f\u3000", " "),
        **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\u2061\u2062\ufeff", ""),
        **dict.fromkeys("“”„«»「」『』", '"'),
        **dict.fromkeys("‘’′", "'"),
        **{"—": " - ", "。": ". ", "、": ", ", "″": "''", "√": r"\sqrt ", "∛": r"\sqrt[3] ", "∜": r"\sqrt[4] "},
    }
)
_VULGAR_FRACTIONS = re.compile("[¼-¾⅐-⅞↉]")
_SIZES = re.compile(r"\\(?:(?:left|right)\.|(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z]))")
_ANGLES = re.compile(r"\\langle(?![a-zA-Z])(.*?)\\rangle(?![a-zA-Z])|^<(?=[^<>=]*,[^<>=]*>$)(.*)>$")
_COLORS = re.compile(r"\\(?:text)?color\{\w+\}")
_WIDE_THOUSANDS = re.compile(
    r"(?<![\d.,_^])\d{1,3}(?P<gap>\{,\}|,\\!\s?|(?<!\\)\\[!,;: ]|[ ~]|\{ \})\d{3}(?:(?P=gap)\d{3})*(?![\d/]|\s*\\frac)"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:! ]|(?:quad|qquad|displaystyle|textstyle|limits)(?![a-zA-Z]))|~")
_FONTS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|hbox|operatorname\*?|math(?:rm|bf|it|sf|tt|op)|boldsymbol|bm|underline)"
    r"\s*\{([^{}]*)\}|\{\s*\\(?:rm|bf|it|sf)\s+([^{}]*)\}"
)

# Marks around an answer ----------------------------------------------------------------------------------------------

_SPECIAL_TOKEN = re.compile(
    r"<\|[^<>|]{1,40}\|>|</?(?:s|eos|bos|pad|answer|(?:end|start)_of_turn)>|\[/?(?:EOS|INST)\]", re.IGNORECASE
)
_LEAD = re.compile(
    r"^(?:(?:so|thus|therefore|hence|and)\b,?\s*)?(?:the\s+|my\s+)?(?:(?:final|correct|right)\s+)?"
    r"(?:answer|result|solution)(?:\s+(?:to|of|for)\s+[^:=$\\]{1,80}?)?\s*(?:(?:is|are)\b\s*:?|:|=)[\s*]*"
    r"|^(?:所以|因此|故|综上)?[,\s]*(?:最终|正确)?(?:答案|结果|答)\s*应?(?:是|为|:)\s*:?\s*"
    r"|^(?:it|that|this|there)\s+(?:is|are)\s+(?=[-+]?[\d$\\])"
    r"|^[a-z]{4,}(?: [a-z]+){0,2}:\s*(?=[-+\\(\[{$\d])"
    r"|^(?:about|approximately|approx\.?|around|roughly|exactly|precisely|only|just|共|约|大约)\s*(?=[-+]?[\d$])",
    re.IGNORECASE,
)
_MARKS = ' \t\r\n*`";,:✅✓□■•#→⇒∴'
_BEFORE = re.compile(r"\\(?:implies|Rightarrow|therefore|approx)(?![a-zA-Z])|=>|=(?![=<>])")
_BEHIND = re.compile(r"(?:(?<!\.)\.|\\|\\(?:blacksquare|square|qed))$")
_SIGN_WORD = re.compile(r"^(?:(negative|minus)|positive|plus)\s+(?=[a-zA-Z](?![a-zA-Z])|[\\(\d])", re.IGNORECASE)
_CLAUSE = re.compile(
    r"(?<=\S) ?[,;]? ?\(?(?:\b(?:where|for\s+(?:some|any|all|every))\b[^=<>]*"
    r"|, ?[a-zA-Z] ?\\in ?\\mathbb ?\{?[ZNQRC]\}?[^=<>]*)$"
)
_REASON = re.compile(r"(?<=\S)[,;.]? \(?(?:because|since)\b.*$", re.IGNORECASE)
_ENCLOSED = re.compile(r"(['_]{1,2})(.+)\1", re.DOTALL)


def clean(text: str) -> str:
    r"""
    Return an answer in plain characters and without the text around it: `**Answer:** ６０％。` becomes `60%`.

    Args:
        text (`str`):
            Answer to clean.
    """
    text = _SPECIAL_TOKEN.sub(" ", text)
    text = re.sub("([²³⁴⁵])√", lambda match: rf"\sqrt[{_SUPERSCRIPTS[match[1]]}] ", text)
    text = _SCRIPTS.sub(lambda match: f"{'^' if match[1] else '_'}{{{match.group().translate(_PLAIN_SCRIPTS)}}}", text)
    text = _VULGAR_FRACTIONS.sub(
        lambda match: f" {_latex_fraction(Fraction(unicodedata.numeric(match.group())).limit_denominator(10))}", text
    )
    # NFKC converts full-width and mathematical letters to plain ones, which may yield more characters of the table
    text = unicodedata.normalize("NFKC", text.translate(_CHARACTERS)).translate(_CHARACTERS)
    text = _COLORS.sub("", _SIZES.sub("", text)).replace(r"\%", "%")
    text = _WIDE_THOUSANDS.sub(lambda match: re.sub(r"\D", "", match.group()), text)
    text = _ANGLES.sub(lambda match: f"({match[1] or match[2]})", text)
    text = re.sub(r"(?<=\d) \. (?=\d)", ".", text)
    text = _FONTS.sub(lambda match: f" {match[1] or match[2] or ''} ", _SPACES.sub(" ", text))
    text, before = " ".join(text.split()), None
    while text != before:  # marks may be nested
        before = text
        text = text.strip(_MARKS)
        if found := _BEFORE.match(text) or _LEAD.match(text):
            text = text[found.end() :]
        if found := _BEHIND.search(text[-20:]):
            text = text[: -len(found.group())]
        if enclosed := _ENCLOSED.fullmatch(text):
            text = enclosed[2]
        if text[:1] == "{" and "," not in text and closing_bracket(text, 0) == len(text) - 1:
            text = text[1:-1]
    text = _REASON.sub("", text)
    return _CLAUSE.sub("", _SIGN_WORD.sub(lambda match: "-" if match[1] else "", text))


def _latex_fraction(value: Fraction) -> str:
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


# Brackets and lists --------------------------------------------------------------------------------------------------

_BRACKET = r"(?P<open>\\begin\b|\\\{|[\[({])|(?P<close>\\end\b|\\\}|[\])}])"
_JOINT = re.compile(rf"{_BRACKET}|,?\s*(?<![a-zA-Z\\])(?P<word>and|or)(?![a-zA-Z])|[或且]|[,;]")
_EQUALS = re.compile(rf"{_BRACKET}|(?<![<>!:=])=(?![=<>])")
_APPROXIMATELY = re.compile(rf"{_BRACKET}|\\(?:approx|simeq|doteq)(?![a-zA-Z])")


def closing_bracket(text: str, start: int) -> int | None:
    """Return where the bracket at `start` is closed, by any closing bracket, as in the interval `[0,1)`."""
    depth = 0
    for bracket in re.compile(r"[\[({\])}]").finditer(text, start):
        depth += 1 if bracket.group() in "[({" else -1
        if depth == 0:
            return bracket.start()
    return None


def split_list(text: str) -> tuple[list[str], set[str]]:
    """Return the members of a list, and the set of separators between them (`","`, `"and"`, `"or"`)."""
    members, joints = _split(text, _JOINT)
    words = {joint["word"] or {"或": "or", "且": "and"}.get(joint.group(), ",") for joint in joints}
    return [member for member in members if member], words


def split_equation(text: str) -> list[str]:
    """Return the sides of an equation."""
    return _split(text, _EQUALS)[0]


def split_approximation(text: str) -> list[str]:
    r"""Split a text at `\approx`."""
    return _split(text, _APPROXIMATELY)[0]


def _split(text: str, joint: re.Pattern) -> tuple[list[str], list[re.Match]]:
    """Split a text where a pattern matches outside of all brackets."""
    parts, joints, depth, start = [], [], 0, 0
    for found in joint.finditer(text):
        if found["open"] or found["close"]:
            depth += 1 if found["open"] else -1
        elif depth == 0:
            parts.append(text[start : found.start()].strip())
            joints.append(found)
            start = found.end()
    return [*parts, text[start:].strip()], joints


# Formulas ------------------------------------------------------------------------------------------------------------

_REWRITES = [
    (re.compile(pattern), written)
    for pattern, written in (
        (r"[\[(]\s*\\begin\{array\}\{[^{}]*\}(.*?)\\end\{array\}\s*[\])]", r"\\begin{pmatrix}\1\\end{pmatrix}"),
        (r"\*\*", "^"),
        (r"\\backslash(?![a-zA-Z])|(?<=\\mathbb\{R\})\s*[-/](?=\s*\\\{)", r"\\setminus "),
        (r"(?:\{\s*\})?_\s*\{?(\w+)\}?\s*C\s*_\s*\{?(\w+)\}?", r"\\binom{\1}{\2}"),
        (r"<=|=<|\\leqslant(?![a-zA-Z])|\\leqq(?![a-zA-Z])", r"\\le "),
        (r">=|\\geqslant(?![a-zA-Z])|\\geqq(?![a-zA-Z])", r"\\ge "),
        (r"!=|<>|\\not\s*=", r"\\ne "),
        (r"\\l?dotsc?(?![a-zA-Z])", r"\\ldots "),
        (r"\\(?:varnothing|O)(?![a-zA-Z])|\\\{\s*\\\}|(?<![a-zA-Z_^])\{\s*\}", r"\\emptyset "),
        (r"\\mathbb\s+([A-Z])(?![a-zA-Z])|\\R(?![a-zA-Z])", lambda match: rf"\mathbb{{{match[1] or 'R'}}}"),
        (r"(?<=[\])])\s*U\s*(?=[\[(])", r" \\cup "),
        # numbers
        (r"(?<![\w.\\])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,6})(?![\w.^{])", r"\1 \\times 10^{\2}"),
        (r"(?<=\d)\s*[xX*]\s*10\s*(?=\^)", r" \\times 10"),
        (r"(?<![\d./}^_])(\d+)\s+(\d+)/(\d+)(?![\d/.])", r"\1\\frac{\2}{\3}"),
        # math-verify adds adjacent numbers: 2(3) would be 5
        (r"(?<![\w.^_{}\\])(\d+(?:\.\d+)?)\s*(?=\(\s*-?\d+(?:\.\d+)?\s*\))", r"\1 \\cdot "),
        (r"(?<![\w}])(\(\s*-?\d+(?:\.\d+)?\s*\))\s*(?=[\d(])", r"\1 \\cdot "),
        (r"(?<=\d)\.(?!\d)", ""),
        (r"(?<!\\)%", r"\\%"),
        # exponents and indices of several characters without braces
        (r"([\^_])\s*(-\d+|\d\d+)(?![\d.])", r"\1{\2}"),
        # words
        (r"(?<![a-zA-Z\\])(?:negative|minus)\s+(?=[\w\\(])", "-"),
        (r"(?<![a-zA-Z\\])(?:positive|plus)\s+(?=[\w\\(])", "+"),
        (r"(?<![a-zA-Z\\])(?:infinity|inf|oo)(?![a-zA-Z])", r"\\infty "),
        (rf"(?<![a-zA-Z\\])(?!mu|nu|xi)({GREEK})(?![a-zA-Z])", r"\\\1 "),  # xi may be x times i
        (r"(?<![a-zA-Z])log(10|2)(?=\s*\()", r"log_{\1}"),
        # double signs
        (r"\+\s*-|-\s*\+", "-"),
        (r"-\s*-", "+"),
        (r"(^|[(,=\[{])\s*\+(?=\s*[\w\\.(])", r"\1"),
        (r"(?<!\\)\*", r"\\cdot "),
    )
]
_FUNCTION = re.compile(
    rf"(?<![a-zA-Z\\])\\?({FUNCTION_NAMES})(?![a-zA-Z])|(?<![a-zA-Z\\])({TRIGONOMETRIC}|ln)(?=[a-z]\b)"
    rf"|(?<=[a-zA-Z])(?<![a-zA-Z\\]{{2}})({TRIGONOMETRIC}|ln|log|exp|sqrt)(?=\s*\()"
)
_RENAMED = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log_{10}"}
_DEGREES = re.compile(
    r"(\{[^{}]*\}|[\d.]+|\\[a-zA-Z]+|[a-zA-Z])\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degrees?(?![a-zA-Z])|\s?degrees?(?![a-zA-Z]))"
)


def to_latex(text: str) -> str:
    r"""
    Return a formula as LaTeX that math-verify parses correctly: `2e5*sqrt(x)` becomes `2 \times 10^{5}\cdot \sqrt{x}`.

    Args:
        text (`str`):
            Formula after [`clean`].
    """
    text = REPEATING_DECIMAL.sub(lambda match: _latex_fraction(repeating_value(match)), text)
    text = BASE_NUMERAL.sub(lambda match: match.group() if base_value(match) is None else str(base_value(match)), text)
    for pattern, written in _REWRITES:
        text = pattern.sub(written, text)
    text = _FUNCTION.sub(lambda match: f"\\{_RENAMED.get(match[match.lastindex], match[match.lastindex])} ", text)
    text = _brace_arguments(text)
    if re.search(rf"\\(?:{TRIGONOMETRIC})(?![a-zA-Z])", text):
        text = _DEGREES.sub(r"(\\frac{\\pi \1}{180})", text)
    else:
        text = _DEGREES.sub(r"\1", text)
    return re.sub(r"(?<=\{) | (?=\})", "", " ".join(text.split()))


_ARGUMENT = re.compile(
    r"\\(?P<name>sqrt|cbrt|exp|abs)(?![a-zA-Z])\s*(?P<index>\[[^\[\]]*\])?\s*"
    r"(?:(?=[({])|(?P<bare>\d+(?:\.\d+)?|[a-zA-Z]))|\^\s*(?=\()"
)


def _brace_arguments(text: str) -> str:
    r"""Put arguments in braces: `\sqrt(x+1)` becomes `\sqrt{x+1}`, `\exp(2)` becomes `e^{2}`, `x^(1/2)` becomes `x^{1/2}`."""
    position = 0
    while found := _ARGUMENT.search(text, position):
        position = found.end()
        argument, rest = found["bare"], text[found.end() :]
        if argument is None:
            end = closing_bracket(text, found.end())
            if end is None:
                continue
            argument, rest = text[found.end() + 1 : end], text[end + 1 :]
        before, after = {
            "exp": ("e^{", "}"),
            "abs": ("|", "|"),
            "cbrt": (r"\sqrt[3]{", "}"),
            "sqrt": (rf"\sqrt{found['index'] or ''}{{", "}"),
            None: ("^{", "}"),
        }[found["name"]]
        text = text[: found.start()] + before + argument + after + rest
        position = found.start() + len(before)
    return text
