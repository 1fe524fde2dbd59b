"""Parse an answer: a number with its unit, words, an option, a time, assignments, a list or a formula."""

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

from .exact_numbers import Number, read_number
from .extraction import BOX, NUMBER, last_box
from .normalization import (
    FUNCTION_NAMES,
    GREEK,
    TRIGONOMETRIC,
    clean,
    closing_bracket,
    split_approximation,
    split_equation,
    split_list,
)
from .units import CURRENCY, DEGREES, read_unit


@dataclass(frozen=True)
class ParsedAnswer:
    """
    A parsed answer. Parts that the answer does not have are `None` or empty.

    Args:
        formula (`str`, *optional*, defaults to `""`):
            The answer as a formula, without its unit.
        number (`Number`, *optional*):
            The answer as an exact number, without its unit.
        unit (`frozenset[tuple[str, int]]`, *optional*):
            Unit of the number or formula. See [`~grading.units.read_unit`].
        words (`str`, *optional*):
            The words of the answer, or the words around its number, in lower case and without articles and punctuation.
        option (`str`, *optional*):
            Letter of a multiple-choice option.
        value (`ParsedAnswer`, *optional*):
            Answer next to the letter of an option.
        time (`tuple[int, str]`, *optional*):
            Time of day: minutes since midnight or noon with `"am"` or `"pm"`, or minutes as written with `""`.
        pairs (`tuple[tuple[str, str], ...]`):
            Names with their values, as in `x=1, y=2`.
        relations (`tuple[str, ...]`):
            Inequalities, as in `x<2 or x>3`.
        members (`tuple[str, ...]`):
            Members of a list, set, tuple or interval.
        brackets (`str`):
            Brackets of a tuple or interval, such as `"[)"`. Empty for lists and sets, which are unordered.
        joints (`frozenset[str]`):
            Separators of the members or relations (`","`, `"and"`, `"or"`).
        alternatives (`tuple[ParsedAnswer, ...]`):
            Other forms of the value that the answer states, as in `1/3 = 0.333`.
        is_equation (`bool`, *optional*, defaults to `False`):
            Whether it is an equation that is not an assignment, as in `x + y = 5`.
        is_ambiguous (`bool`, *optional*, defaults to `False`):
            Whether the unit may be a variable, as in `5m`.
        is_prose (`bool`, *optional*, defaults to `False`):
            Whether it mixes words and formulas, so that the same answer can be worded in many ways.
    """

    formula: str = ""
    number: Number | None = None
    unit: frozenset[tuple[str, int]] | None = None
    words: str | None = None
    option: str | None = None
    value: "ParsedAnswer | None" = None
    time: tuple[int, str] | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    relations: tuple[str, ...] = ()
    members: tuple[str, ...] = ()
    brackets: str = ""
    joints: frozenset[str] = frozenset()
    alternatives: "tuple[ParsedAnswer, ...]" = ()
    is_equation: bool = False
    is_ambiguous: bool = False
    is_prose: bool = False

    def __bool__(self) -> bool:
        """Return whether the answer has anything to compare."""
        return self != ParsedAnswer()


# Longer or deeper texts are not answers, and would take long to parse.
MAX_LENGTH = 3000
MAX_DEPTH = 50
# "1 4" and "(1) 4" may be a list, a numbered item or a product. math-verify would add the numbers.
_SIDE_BY_SIDE = re.compile(r"(?:[-+]?\d+(?:\.\d+)?|\(\d+\))(?:\s+\d+(?:\.\d+)?)+")


# A unit, a remark or the approximate value in brackets behind a formula, such as "2\pi (radians)" or "1/2 (0.5)".
_REMARK = re.compile(
    r"(?<=[\w})])\s+\(\s*(?:(?:\\approx|≈|=|or|about|approx\.?|approximately)?\s*(?P<value>-?\d*\.\d+)|(?P<words>[a-zA-Z ]{2,}?))\s*\)$"
)


@lru_cache(maxsize=4096)
def parse_answer(text: str) -> ParsedAnswer:
    """Parse an answer."""
    text = " ".join(text.split())
    if _PLAIN_NUMBER.fullmatch(text):
        return ParsedAnswer(number=Number(Fraction(text), rounded="." in text), formula=text)
    depths = accumulate((character in "([{") - (character in ")]}") for character in text)
    if len(text) > MAX_LENGTH or max(depths, default=0) > MAX_DEPTH:
        return ParsedAnswer()
    # `clean` turns the full-width sign into a currency sign, after the delimiters `$` have been removed
    text = clean(_open(text.replace(r"\$", "＄")))
    if not re.search(r"[^\W_]|\{\s*\\?\}", text):
        return ParsedAnswer()
    if _REMARK.search(text) and not _quantity(text):
        text = _REMARK.sub(_reading_of_remark, text)
    if _NUMBER_AND_FRACTION.fullmatch(text):  # "3 and 1/2" may be 3.5, or two numbers
        return replace(_quantity(text), alternatives=(_formula(text),))
    for reader in (_verdict, _time, _option, _quantity, _special, _pairs, _relations, _alternatives, _words):
        if parsed := reader(text):
            return parsed
    if _SIDE_BY_SIDE.fullmatch(text):
        return ParsedAnswer()
    return _formula(text)


def _reading_of_remark(remark: re.Match) -> str:
    if remark["value"]:
        return rf" \approx {remark['value']}"
    is_product = len(remark["words"]) < 4 and not read_unit(remark["words"])  # "2 (abc)"
    return remark.group() if is_product else ""


# Delimiters ----------------------------------------------------------------------------------------------------------

# "$48 and $24" are two prices, not a formula.
_IN_MATH = re.compile(
    r"\$\$([^$]+)\$\$|\$(\S|\S[^$]*\S|\s[^$]*\s)\$(?!\d)|\\\(((?:(?!\\[()]).)*)\\\)|\\\[((?:(?!\\[\[\]]).)*)\\\]",
    re.DOTALL,
)
_INTRODUCTION = re.compile(
    r"(?:.*\b(?:is|are|be|equals?|get|have|obtain|so|thus|therefore|hence|answer)\b|.*[=:])?[\s*:,]*", re.I | re.S
)
_NEGATION = re.compile(r"\b(?:not|never|no|cannot|except|neither)\b|n't\b", re.IGNORECASE)


def _open(text: str) -> str:
    """Return the answer without boxes, formula delimiters, and sentences before a single box or formula."""
    if len(BOX.findall(text)) == 1 and (content := last_box(text)):
        return _open(content)
    while (box := BOX.search(text)) and (end := closing_bracket(text, box.end() - 1)):
        text = f"{text[: box.start()]} {text[box.end() : end]} {text[end + 1 :]}"
    formulas = list(_IN_MATH.finditer(text))
    if len(formulas) == 1:
        before, after = text[: formulas[0].start()], text[formulas[0].end() :]
        if not after.strip("*.,;: \t\r\n") and _INTRODUCTION.fullmatch(before) and not _NEGATION.search(before):
            return next(filter(None, formulas[0].groups()), "")
    return _IN_MATH.sub(lambda match: f" {next(filter(None, match.groups()), '')} ", text)


# Words, times and options --------------------------------------------------------------------------------------------

_VERDICT = re.compile(
    r"(yes|no|true|false|是的?|否|不是|对|正确|错误?)(?![\w'-]|\.\s*\d)(?:\s*[,.;:!-].*)?", re.IGNORECASE | re.DOTALL
)
_VERDICTS = {
    "是": "yes",
    "是的": "yes",
    "否": "no",
    "不是": "no",
    "对": "yes",
    "正确": "yes",
    "错": "no",
    "错误": "no",
    "true": "yes",
    "false": "no",
}
_TIME = re.compile(
    r"(?:at\s+)?(\d{1,2})(?:\s*[:.]\s*(\d\d))?(?::\d\d)?\s*(?:([ap])\.?\s?m|o'?\s?clock(?:\s*([ap])\.?\s?m)?)",
    re.IGNORECASE,
)
_CLOCK = re.compile(r"(\d{1,2}):(\d\d)(?::\d\d)?")
_NAMED_TIMES = {"noon": "pm", "12 noon": "pm", "midday": "pm", "midnight": "am", "12 midnight": "am"}
_OPTION = re.compile(
    r"(?:(?:option|choice)\s*)?(?:\(\s*(?P<round>[A-Ja-j])\s*\)\s*[.:]?|(?P<marked>[A-J])\s*[).:]|(?P<bare>[A-J])$)\s*(?P<value>.*)",
    re.DOTALL,
)
_NAMED_OPTION = re.compile(r"(?:option|choice)\s*\(?([A-Ja-j])\)?", re.IGNORECASE)
_SECOND_OPTION = re.compile(r"\(\s*[A-Ja-j]\s*\)|(?<![\w(])[A-J][).:](?=\s)")

# Words have at least three letters. `abc` is a word; in `2abc` or `abc + 1` it is a product.
_WORD = re.compile(
    rf"(?<![^\s(,\"'-])(?!(?:and|inf|infinity|union|{FUNCTION_NAMES}|{GREEK})(?![a-z])|[a-zA-Z](?:{FUNCTION_NAMES})\s*[(^])(?:[^\W\d_]{{3,}}|[\u4e00-\u9fff]+|(?i:no|is|if)\b)"
)
_APPLIED = re.compile(rf"(?<![a-zA-Z])(?:{FUNCTION_NAMES})\s*[(\d]")
_FORMULA_SIGN = re.compile(r"[=+*^_\\{}<>|]|(?<![a-zA-Z]{3})/(?![a-zA-Z]{3})")
_PROSE = re.compile(
    r"(?<![a-zA-Z\\])(?:where|when|for|all|any|some|with|such|that|the|real|then|otherwise|not|from|between|each|every|"
    r"except|does|is|are|if|only|there|exists?|has|have|integers?|than|about)(?![a-zA-Z])"
)
_NONEXISTENT = re.compile(r"(?:(?:the )?limit )?(?:dne|d\.n\.e|does not exist|doesn't exist)", re.IGNORECASE)


def _verdict(text: str) -> ParsedAnswer | None:
    """Parse yes or no, optionally followed by a reason."""
    match = _VERDICT.fullmatch(text)
    return match and ParsedAnswer(words=_VERDICTS.get(match[1].lower(), match[1].lower()))


def _time(text: str) -> ParsedAnswer | None:
    if half := _NAMED_TIMES.get(text.lower()):
        return ParsedAnswer(time=(0, half))
    match = _TIME.fullmatch(text) or _CLOCK.fullmatch(text)
    if not match or not int(match[1]) <= 24 or int(match[2] or 0) >= 60:
        return None
    hour, minute = int(match[1]), int(match[2] or 0)
    half = next((letter.lower() + "m" for letter in match.groups()[2:] if letter), "")
    if half or match.re is _TIME:
        return ParsedAnswer(time=(hour % 12 * 60 + minute, half)) if hour <= 12 else None
    if hour in (0, 24) or hour > 12:  # 24-hour clock
        half = "pm" if hour > 12 and hour < 24 else "am"
        hour %= 12
    return ParsedAnswer(time=(hour % 12 * 60 + minute, half), formula=text, number=_number(text))


def _option(text: str) -> ParsedAnswer | None:
    match = _NAMED_OPTION.fullmatch(text) or _OPTION.fullmatch(text)
    if not match:
        return None
    letter = next(filter(None, match.groups()))
    value = match["value"].strip() if match.re is _OPTION else ""
    # several answers, or a product with a letter in brackets
    if _SECOND_OPTION.search(value) or re.match(r"[+*/^_=<>]" if letter.isupper() else r"[-+*/^_=<>(]", value):
        return None
    return ParsedAnswer(option=letter.upper(), value=parse_answer(value) if value else None, formula=letter)


def _words(text: str) -> ParsedAnswer | None:
    plain = re.sub(
        r"(?<=[a-zA-Z]{3})\s*/\s*(?=[a-zA-Z])|(?<=[a-zA-Z])\s*/\s*(?=[a-zA-Z]{3})",
        " per ",
        text.replace("%", " percent "),
    )
    if not _WORD.search(plain) or _APPLIED.search(plain):
        return None
    is_formula = _FORMULA_SIGN.search(NUMBER.sub("0", plain))
    if is_formula and not _PROSE.search(plain):
        return None
    if _NONEXISTENT.fullmatch(plain):
        plain = "does not exist"
    words = words_of(plain)
    numbers = NUMBER.findall(plain)
    if is_formula or len(numbers) != 1 or _NUMERALS.search(plain):
        return ParsedAnswer(words=words, is_prose=bool(is_formula), members=tuple(split_list(text)[0]))
    return ParsedAnswer(words=words, number=_number(numbers[0] + ("%" if "percent" in plain else "")))


def words_of(text: str) -> str:
    """Return a text in lower case, without articles and punctuation."""
    found = re.findall(rf"{NUMBER.pattern}|\w+", text)
    return " ".join(
        word.casefold()
        for i, word in enumerate(found)
        if word not in _ARTICLES and (i or word not in ("A", "An", "The") or len(found) == 1)
    )


_ARTICLES = ("a", "an", "the", "and")
# Digits next to one of these words are only a part of the number.
_NUMERALS = re.compile(r"\b(?:half|third|quarter|hundred|thousand|[mb]illion|trillion|dozen)s?\b", re.IGNORECASE)

# Numbers -------------------------------------------------------------------------------------------------------------

_PLAIN_NUMBER = re.compile(r"-?\d{1,300}(?:\.\d{1,300})?")
_NUMBER_AND_FRACTION = re.compile(r"\d+ and (?:\d+/\d+|\\[dt]?frac\s*\{?\d+\}?\s*\{?\d+\}?)")
_CURRENCY = re.compile(rf"((?:negative\s|minus\s|[-+])?)\s*({CURRENCY})\s*")
_NOUN = re.compile(
    r"(?:\s+|(?=[\u4e00-\u9fff]))[^\W\d_](?:[^\d=+*^_\\{}<>|]*[^\W\d_])?(?:\s*\([^()\d]*\))?", re.DOTALL
)
_ATTACHED_LETTER = re.compile(r"[a-zA-Z](?:\s*\^.*|\d)?")


def _number(text: str) -> Number | None:
    found = read_number(text)
    return found[0] if found and not found[1].strip() else None


def _quantity(text: str) -> ParsedAnswer | None:
    """Parse a number, optionally followed by a unit or noun."""
    if text[:1] == "(" and "," not in text and closing_bracket(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    currency = _CURRENCY.match(text)
    found = read_number(currency[1] + text[currency.end() :] if currency else text)
    if found is None:
        return None
    number, rest = found
    unit = read_unit(currency[2] if currency else "")
    if not rest.strip():
        return ParsedAnswer(number=number, unit=unit, formula=text)
    written = read_unit(rest)
    if written:
        both = frozenset([*(unit or ()), *written])
        return ParsedAnswer(
            number=number, unit=both, formula=text, is_ambiguous=bool(_ATTACHED_LETTER.fullmatch(rest))
        )
    if _NOUN.fullmatch(rest) and _WORD.search(f" {rest.strip()}") and not re.match(r"\s*(?:and|or|to|per)\b", rest):
        if not re.search(r"\b(?:or|and)\s*$", rest) and not _NUMERALS.search(rest):
            return ParsedAnswer(number=number, unit=unit, words=words_of(rest), formula=text)
    return None


# Sets, equations and lists -------------------------------------------------------------------------------------------

_NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) )?no (?:real |such )?(?:solutions?|roots?|numbers?|values?(?: of \w)?)(?: exists?)?"
    r"|(?:the )?(?:empty|null) set|无解|空集",
    re.IGNORECASE,
)
_ALL_REALS = re.compile(
    r"(?:x (?:is|can be) )?(?:the )?(?:set of )?(?:all|any) (?:the )?reals?(?: numbers?)?(?: x)?"
    r"(?:,? (?:except|other than|but)(?: for)? (?:x ?(?:=|\\ne) ?)?(?P<without>[^=a-z]+(?:and[^=a-z]+|or[^=a-z]+)?))?|全体实数",
    re.IGNORECASE,
)
_SET_BUILDER = re.compile(
    r"(?:\\?\{)?\s*\(?(?P<name>[a-zA-Z])\)?\s*(?:\\in\s*(?:\\mathbb\s*\{?)?\s*R\s*\}?)?\s*(?:\\mid|\\vert|\\colon|\||:)(?![a-zA-Z])(?P<condition>[^|]*?)(?:\\?\})?"
)
_ELEMENT = re.compile(r"[a-zA-Z]\s*(?:\\in|\bin\b)\s*(?=[\[({\\])")
_RELATION = re.compile(
    r"[<>]|\\[lg](?:e|eq|t|eqslant)(?![a-zA-Z])|\\(?:ne|neq)(?![a-zA-Z])|!=|\\not\s*=|\\in\s*\\mathbb"
)
_UNEQUAL = re.compile(r"[a-zA-Z]\s*\\neq?\s")
_RATIO = re.compile(r"\d{1,9}(?:\s*:\s*\d{1,9}){2,}")
_RESIDUE = re.compile(
    r"(?:[a-zA-Z]\s*\\equiv\s*(?P<value>-?\d{1,30})\s*\(?|(?P<bare>-?\d{1,30})\s*(?:\(|(?=\\pmod)))"
    r"\s*\\?[bp]?mod\s*\{?\s*(?P<modulus>[1-9]\d{0,30})\s*\}?\s*\)?"
)
_ARGUMENTS = r"\(\s*-?[\w.]+(?:\s*,\s*-?[\w.]+)*\s*\)"
_DIFFERENTIAL = r"\{?\s*(?:d|\\partial)\s*\w?\s*\}?"
# Names that may be on the left of `=`, with their value on the right. With `x + y` or `xy`, it is an equation.
_NAME = "(?:{})".format(
    "|".join(
        (
            # x, x_1, x', f^{-1}, f(x), \theta, \vec{a}
            rf"(?:[A-Za-z]|\\(?:{GREEK})|\\(?:vec|hat|bar|overline|widehat|mathcal)\s*\{{?\w+\}}?)\s*(?:_\s*(?:\w|\{{[^{{}}]*\}}))?"
            rf"(?:'|\^\s*\{{?\s*(?:-\s*1|\\prime)\s*\}}?)*(?:\s*{_ARGUMENTS})?",
            r"[|\[]?\s*[A-Z]{2,4}\s*[|\]]?",  # the length AB, the area [ABC]
            r"(?:m\s*)?\\(?:angle|triangle|nabla)\s*[\w ]+",
            r"\\?\|+\s*(?:\\vec)?\s*\{?\w+\}?\s*\\?\|+",
            r"P\s*\([^()=]*\)",
            rf"\\[dt]?frac\s*{_DIFFERENTIAL}\s*{_DIFFERENTIAL}|d[a-z]/d[a-z]",
            r"\\(?:lim|int|sum|prod|max|min|det|gcd)(?![a-zA-Z]).*",
            rf"\\?(?:{TRIGONOMETRIC})\s*(?:\(\s*\\?\w+\s*\)|\\?\w+)",
            r"(?:the\s+)?(?:sum|max|min|gcd|lcm|det|age|[A-Za-z][a-z]{3,})(?:\s+[A-Za-z]+)*",  # area of ABC
        )
    )
)
_VARIABLE = re.compile(rf"(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z]{{2}})|\\(?:{GREEK})(?![a-zA-Z])")
_ONE_NAME = re.compile(rf"\s*{_NAME}\s*")
_NAMES = re.compile(rf"\s*\(\s*{_NAME}(?:\s*,\s*{_NAME})+\s*\)\s*")


def _special(text: str) -> ParsedAnswer | None:
    """Parse ratios of several numbers, sets in words, and sets with a condition on one variable, such as `{x | x > 3}`."""
    if _RATIO.fullmatch(text):
        first, *others = (int(part) for part in text.split(":"))
        return ParsedAnswer(members=tuple(f"{part}/{first or 1}" for part in (first, *others)), brackets="()")
    if residue := _RESIDUE.fullmatch(text):  # x \\equiv 3 \\pmod 5
        value = int(residue["value"] or residue["bare"]) % int(residue["modulus"])
        return ParsedAnswer(
            number=Number(Fraction(value)), unit=frozenset([("mod", int(residue["modulus"]))]), formula=str(value)
        )
    if _NO_SOLUTION.fullmatch(text):
        return ParsedAnswer(formula=r"\emptyset", is_prose="set" not in text.lower())
    if reals := _ALL_REALS.fullmatch(text):
        without = reals["without"]
        members = without and ", ".join(split_list(without)[0])
        return ParsedAnswer(formula=rf"\mathbb{{R}}\setminus\{{{members}\}}" if members else r"\mathbb{R}")
    parts = [_SET_BUILDER.fullmatch(part.strip()) for part in text.split(r"\cup")]
    if len(parts) > 1 and all(parts):
        return ParsedAnswer(relations=tuple(part["condition"].strip() for part in parts), joints=frozenset(["or"]))
    if (builder := _SET_BUILDER.fullmatch(text)) and re.search(r"[<>=\\]", builder["condition"]):
        return parse_answer(builder["condition"])
    element = _ELEMENT.match(text)
    return element and len(split_list(text)[0]) == 1 and parse_answer(text[element.end() :]) or None


def _pairs(text: str) -> ParsedAnswer | None:
    """Parse names and their values."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        text = text[2:-2]
    text = re.sub(
        r"\\begin\{(?:cases|aligned|array)\}(?:\{[^{}]*\})?(.*)\\end\{(?:cases|aligned|array)\}", r"\1", text
    )
    text = re.sub(r"\s*\\\\\s*", ", ", text.replace("&", " ")) if "matrix" not in text else text
    first, *rest = split_approximation(text)
    if "=" not in first and rest and is_name(first):
        text = f"{first} = {rest[-1]}"
    if "=" not in text:
        return None
    members, joints = split_list(text)
    pairs: list[tuple[str, str]] = []
    names: list[str] = []
    for member in members:
        *left, right = split_equation(member)
        if left and not is_name(left[0]) and len(left) == 1 and is_name(right):
            left, right = [right], left[0]  # 5 = x
        if left and not is_name(left[0]):
            if len(members) > 1 or not _VARIABLE.search(text.replace(r"\pi", "")):
                return None  # a calculation
            *_, right = split_equation(text)
            return ParsedAnswer(formula=text, is_equation=True, alternatives=(parse_answer(right),))
        if left:
            names = [name.replace(" ", "") for name in left if is_name(name)]
            right = " = ".join([*(side for side in left if not is_name(side)), right])
        if not names or not right or (_RELATION.search(right) and len(members) > 1):
            return None
        pairs += [pair for name in names for pair in _pair(name, right)]
    systems: list[dict[str, str]] = [{}]
    for name, value in pairs:
        if name in systems[-1]:
            systems.append({})
        systems[-1][name] = value
    if len(systems) > 1 and len(systems[0]) > 1:
        return ParsedAnswer(members=tuple(", ".join(map(" = ".join, system.items())) for system in systems))
    return ParsedAnswer(pairs=tuple(pairs), joints=frozenset(joints), formula=text)


def is_name(text: str) -> bool:
    return bool(_ONE_NAME.fullmatch(text) or _NAMES.fullmatch(text))


def _pair(name: str, value: str) -> list[tuple[str, str]]:
    """Return names with their values: `(p,q)=(3,2)` gives `p=3` and `q=2`."""
    if _NAMES.fullmatch(name) and value[:1] == "(" and closing_bracket(value, 0) == len(value) - 1:
        names, values = split_list(name[1:-1])[0], split_list(value[1:-1])[0]
        if len(names) == len(values):
            return list(zip(names, values, strict=True))
    return [(name, value)]


def _relations(text: str) -> ParsedAnswer | None:
    """Parse one or several inequalities."""
    members, joints = split_list(text)
    if unequal := _UNEQUAL.match(members[0]) if members else None:  # x is neither 2 nor 3
        members = [member if _RELATION.search(member) else unequal[0] + member for member in members]
    if not members or not all(map(_RELATION.search, members)) or _PROSE.search(text):
        return None
    members = [f"x {member}" if _RELATION.match(member) else member for member in members]
    if len(members) == 1 and re.search(r"\\neq?\s*\\pm", members[0]):
        return ParsedAnswer(
            relations=(members[0].replace(r"\pm", ""), members[0].replace(r"\pm", "-")), joints=frozenset(["and"])
        )
    return ParsedAnswer(
        formula=members[0] if len(members) == 1 else text, relations=tuple(members), joints=frozenset(joints)
    )


def _alternatives(text: str) -> ParsedAnswer | None:
    r"""Parse a calculation, such as `3 + 4 = 7`, or a value with its approximation, such as `1/3 \approx 0.33` or `1/3 = 0.33`."""
    if len(split_list(text)[0]) > 1:
        return None
    sides = [split_equation(part) for part in split_approximation(text)]
    if sum(map(len, sides)) < 2 or not all(map(all, sides)):
        return None
    last = parse_answer(sides[-1][-1])
    values = [parse_answer(part[-1]) for part in sides[:-1]]
    if len(sides) == 1 and last.number and last.number.rounded:
        values = [parse_answer(sides[0][-2])]
    return replace(last, alternatives=(*last.alternatives, *values))


# Formulas ------------------------------------------------------------------------------------------------------------

_UNIT_BEHIND = re.compile(
    r"(?:(?<=[\d}\])])\s*|(?<=\w)\s+)(\^?\s*\{?\s*\\(?:circ|Omega|mu)\b.*|[a-zA-Z$€£/][^\d+=<>,;|&\\(]*(?:\^?\s*\{?\s*-?\d\s*\}?[^\d+=<>,;|&\\]*)*)$"
)
_BRACKETS = ("()", "[]", "(]", "[)")


def _formula(text: str) -> ParsedAnswer:
    unit = None
    if (behind := _UNIT_BEHIND.search(text)) and behind.start():
        written = behind[1].strip()
        if len(re.sub(r"\W.*", "", written)) != 1:  # one letter is a variable
            unit = read_unit(written)
            if unit == DEGREES and re.search(rf"\\?(?:{TRIGONOMETRIC})(?![a-zA-Z])", text):
                return ParsedAnswer(formula=text)  # degrees belong to the argument
        if unit or (behind.group()[0].isspace() and _WORD.fullmatch(written) and not _FORMULA_SIGN.search(written)):
            text = text[: behind.start()].strip()
    members, joints = split_list(text)
    brackets = ""
    if len(members) == 1:
        if text.startswith(r"\{") and text.endswith(r"\}"):
            members, joints = split_list(text[2:-2])
        elif text[:1] == "{" and closing_bracket(text, 0) == len(text) - 1:
            members, joints = split_list(text[1:-1])
        elif text[:1] + text[-1:] in _BRACKETS and closing_bracket(text, 0) == len(text) - 1:
            members, joints = split_list(text[1:-1])
            brackets = text[0] + text[-1]
    if len(members) < 2:
        return ParsedAnswer(formula=text, unit=unit)
    return ParsedAnswer(formula=text, unit=unit, members=tuple(members), brackets=brackets, joints=frozenset(joints))
