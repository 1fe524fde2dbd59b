r"""Parse numbers exactly in any notation: `2e5`, `-1\frac{2}{3}`, `0.\overline{09}`, `204_5`, `three`, `三十六`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


_MAX_DIGITS = 1000  # maximum length of a numeral, and largest power of ten. SymPy parses larger numbers, with the grader's timeout


@dataclass(frozen=True)
class Number:
    """
    A number.

    Args:
        value (`Fraction`):
            Value of the number. For a percentage, the number before the percent sign.
        rounded (`bool`, *optional*, defaults to `False`):
            Whether the number has a decimal point, so that it may be rounded.
        percent (`bool`, *optional*, defaults to `False`):
            Whether the number is a percentage.
        figure (`Fraction`, *optional*):
            Number before a scale or base, if any: 5 in `5 million`, 204 in `204_5`.
    """

    value: Fraction
    rounded: bool = False
    percent: bool = False
    figure: Fraction | None = None


def equal_numbers(first: Number, second: Number) -> bool | None:
    r"""
    Return whether two numbers are equal.

    Numbers with a decimal point are compared to six decimals, or to six significant digits if they are below 0.1. Other numbers
    are compared exactly. A percentage equals its value and, from 1% on, also the number before the sign: `60\%` equals 0.6 and 60,
    but `0.5\%` does not equal 0.5.

    Returns:
        `bool` or `None`: `None` if the numbers are only equal without a scale or base that one of them has.
    """
    same = close if first.rounded or second.rounded else Fraction.__eq__
    if same(first.value, second.value) and (first.percent == second.percent or not 0 < abs(first.value) < 1):
        return True
    if first.percent != second.percent:
        percentage, plain = (first, second) if first.percent else (second, first)
        if same(percentage.value / 100, plain.value):
            return True
    if (first.figure is None) != (second.figure is None):
        scaled, plain = (first, second) if second.figure is None else (second, first)
        if scaled.figure == plain.value:
            return None
    return False


def close(first: Fraction, second: Fraction) -> bool:
    """Return whether two values agree to six decimals, or to six significant digits if they are below 0.1."""
    largest = max(abs(first), abs(second))
    if first == second or not largest:
        return first == second
    zeros = len(str(-(-largest.denominator // largest.numerator) - 1)) - 1 if largest < 1 else 0
    return round(first, 6 + zeros) == round(second, 6 + zeros)


# Numerals ------------------------------------------------------------------------------------------------------------

_DECIMAL = r"(?:[1-9]\d{0,2}(?:,\d{3})+(?!\d)(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = (
    r"(?:\s*(?:\\times|\\cdot|[*xX])\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?\d+)\s*\}|([-+]?\d+))|[eE]([-+]?\d+)(?![\w.]))"
)
_BASES = dict(
    zip("two three four five six seven eight nine ten eleven twelve sixteen".split(), [*range(2, 13), 16], strict=True)
)
_BASE = rf"(?:\d{{1,2}}|{'|'.join(_BASES)})"

REPEATING_DECIMAL = re.compile(
    r"(?<![\d.])(?P<whole>\d{0,30})\.(?:(?P<fixed>\d{0,30})(?:\\(?:overline|bar)\s*(?:\{\s*(?P<line>\d{1,30})\s*\}|(?P<bar>\d))"
    r"|\((?P<round>\d{1,30})\)|(?P<dots>\\dot\s*\{?\d\}?(?:\d{0,30}\\dot\s*\{?\d\}?)?)|(?P<marked>(?:\d\u0305)+))"
    r"|(?=\d{2,40}\s*(?:\.{3}|\\[lc]?dots))(?P<head>\d{0,12}?)(?P<period>\d{1,6}?)(?P<again>(?P=period){1,20})\s*(?:\.{3,}|\\[lc]?dots(?![a-zA-Z])))"
)
BASE_NUMERAL = re.compile(
    rf"(?<![\w\\.}}^])(?:\((?P<inner>[0-9A-F]{{1,99}})\)|(?P<digits>\d[0-9A-Fa-f]{{0,99}}|[0-9A-F]{{1,99}}))"
    rf"(?:\s*_\s*(?:\{{\s*(?P<index>{_BASE})\s*\}}|(?P<bare>{_BASE}))|\s*\(?\s*(?:in\s+)?base[\s-]*(?P<named>{_BASE})\)?)(?!\w)"
    r"|(?<!\w)0(?:[xX](?P<hex>[0-9a-fA-F]{1,99})|[bB](?P<binary>[01]{1,99}))(?!\w)"
)
_FRACTION = re.compile(
    rf"\\[dtc]?frac\s*(?:\{{\s*([-+]?\s*{_DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*([-+]?\s*{_DECIMAL})\s*\}}|(\d))"
)
_SLASH = re.compile(rf"({_DECIMAL})\s*/\s*({_DECIMAL})(?![\d/^])")
_MIXED = re.compile(r"(\d+)\s*(?:(?:and|&)\s*)?(?=\\[dtc]?frac)|(\d+)\s+(?:and\s+)?(?=\d+\s*/\s*\d)")
_RATIO = re.compile(rf"({_DECIMAL})\s*(?::|\\colon|(?<=\d)\s+to\s+)\s*({_DECIMAL})(?![\d:.])")
_POWER = re.compile(r"(\d{1,9})\s*\^\s*(?:\{\s*(-?\d{1,4})\s*\}|(-?\d{1,4}))(?!\d)")
_DEGREES = re.compile(r"(\d+)\s*\^\s*\{?\s*\\circ\s*\}?\s*(\d+(?:\.\d+)?)\s*'(?:\s*(\d+(?:\.\d+)?)\s*'')?(?!')")
_SCIENTIFIC = re.compile(rf"({_DECIMAL}){_POWER_OF_TEN}")
_PLAIN = re.compile(rf"({_DECIMAL})(?:(?:st|nd|rd|th)\b)?")


def repeating_value(match: re.Match) -> Fraction:
    """Return the value of a match of `REPEATING_DECIMAL`."""
    fixed = match["fixed"] if match["fixed"] is not None else match["head"]
    if match["period"] is not None:
        period = match["period"]
    else:
        found = match["line"] or match["bar"] or match["round"] or match["dots"] or match["marked"]
        period = re.sub(r"\D", "", found)
    head = (match["whole"] or "0") + fixed
    return Fraction(int(head + period) - int(head), 10 ** len(fixed) * (10 ** len(period) - 1))


def base_value(match: re.Match) -> int | None:
    """
    Return the value of a match of `BASE_NUMERAL`, or `None` for a name such as `C_5`. Digits that are too large for the base, as in
    `29_5`, keep their value, so that the answer is wrong and not unparseable.
    """
    if match["hex"] or match["binary"]:
        return int(match["hex"] or match["binary"], 16 if match["hex"] else 2)
    digits, base = match["inner"] or match["digits"], match["index"] or match["bare"] or match["named"]
    base = _BASES.get(base) or int(base)
    if (
        not 2 <= base <= 16
        or not digits.isdigit()
        and (base <= 10 or digits.isalpha() and (base < 16 or len(digits) < 2))
    ):
        return None
    return sum(int(digit, 16) * base**i for i, digit in enumerate(reversed(digits)))


def _decimal(text: str) -> Number | None:
    text = text.replace(",", "").replace(" ", "")
    return (
        Number(Fraction(text if text[-1] != "." else text[:-1]), rounded="." in text[:-1])
        if len(text) <= _MAX_DIGITS
        else None
    )


def _quotient(above: str, below: str) -> Number | None:
    numerator, denominator = _decimal(above), _decimal(below)
    if not (numerator and denominator and denominator.value):
        return None
    return Number(numerator.value / denominator.value, numerator.rounded or denominator.rounded)


def _scientific(match: re.Match) -> Number | None:
    figure, exponent = _decimal(match[1]), next(filter(None, match.groups()[1:]))
    if not figure or len(exponent) > 5 or abs(int(exponent)) > _MAX_DIGITS:
        return None
    return Number(figure.value * Fraction(10) ** int(exponent), figure.rounded)


def _power(match: re.Match) -> Number | None:
    base, exponent = int(match[1]), int(match[2] or match[3])
    if abs(exponent) * base.bit_length() > 3 * _MAX_DIGITS or (base == 0 and exponent <= 0):
        return None
    return Number(Fraction(base) ** exponent)


def _in_base(match: re.Match) -> Number | None:
    value, digits = base_value(match), match["inner"] or match["digits"] or ""
    if value is None:
        return None
    return Number(Fraction(value), figure=Fraction(digits) if digits.isdigit() else Fraction(0))


# Ordered so that the first match is the longest.
_NUMERALS: tuple[tuple[re.Pattern, Callable[[re.Match], Number | None]], ...] = (
    (REPEATING_DECIMAL, lambda match: Number(repeating_value(match))),
    (_DEGREES, lambda match: Number(sum(Fraction(part) / 60**i for i, part in enumerate(match.groups("0"))))),
    (BASE_NUMERAL, _in_base),
    (_FRACTION, lambda match: _quotient(*filter(None, match.groups()))),
    (_SLASH, lambda match: _quotient(*match.groups())),
    (_RATIO, lambda match: _quotient(*match.groups())),
    (_SCIENTIFIC, _scientific),
    (_POWER, _power),
    (_PLAIN, lambda match: _decimal(match[1])),
)

# Words ---------------------------------------------------------------------------------------------------------------

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_SMALL = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * value for value, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halve": 2, "quarter": 4} | {
    word: value
    for value, word in enumerate("third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), 3)
}
_PARTS |= {"sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000}
_CHINESE_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8}
_CHINESE = re.compile(f"[{''.join(_CHINESE_DIGITS)}{''.join(_CHINESE_SCALES)}]+")
_WORD = re.compile(r"[\s-]*([a-z]+)", re.IGNORECASE)
_POINT = re.compile(rf"\s+point((?:\s+(?:{'|'.join(_ONES[:10])})\b)+)", re.IGNORECASE)
_ARTICLE = re.compile(rf"an?(?=[\s-]+(?:{'|'.join([*_SCALES, *_PARTS])})\b)", re.IGNORECASE)


def spelled_number(text: str) -> tuple[Fraction, int] | None:
    """Return the value of the number words at the start of a text, and the position of their end."""
    total, current, position = 0, None, 0
    article = _ARTICLE.match(text)  # a dozen, a third
    if article:
        current, position = 1, article.end()
    while word := _WORD.match(text, position):
        name = word[1].lower()
        if name == "and" and (total or (current or 0) >= 100):
            word = _WORD.match(text, word.end())
            name = word[1].lower() if word else ""
            if name not in _SMALL:
                break
        scale = _SCALES.get(name if current is None else name.removesuffix("s"))
        before = current or 0
        # "twenty one" and "hundred five", but not "one two"
        if name in _SMALL and (
            before % 100 == 0 or (before % 10 == 0 and before % 100 >= 20 and 0 < _SMALL[name] < 10)
        ):
            current = before + _SMALL[name]
        elif scale:
            current = (1 if current is None else current) * scale
            if scale >= 1000:
                total, current = total + current, None
        else:
            break
        position = word.end()
    whole = total + current if current is not None else total or None
    if whole is not None and (decimals := _POINT.match(text, position)):
        digits = "".join(str(_SMALL[word.lower()]) for word in re.findall("[a-zA-Z]+", decimals[1]))
        return whole + Fraction(int(digits), 10 ** len(digits)), decimals.end()
    part = _WORD.match(text, position)
    denominator = part and _PARTS.get(part[1].lower().removesuffix("s"))
    if denominator and (whole is not None or part[1].lower() == "half"):
        return Fraction(1 if whole is None else whole, denominator), part.end()
    return None if whole is None or position == (article and article.end()) else (Fraction(whole), position)


def chinese_number(text: str) -> Fraction | None:
    """Return the value of a numeral in Chinese characters, such as 三十六."""
    total, section, digit = 0, 0, None
    for character in text:
        if character in _CHINESE_DIGITS:
            if digit:
                return None
            digit = _CHINESE_DIGITS[character]
        elif (scale := _CHINESE_SCALES[character]) >= 10**4:
            total, section, digit = (total + section + (digit or 0)) * scale, 0, None
        else:
            section, digit = section + (1 if digit is None else digit) * scale, None
    return Fraction(total + section + (digit or 0))


# Whole numbers with sign, scale and percent --------------------------------------------------------------------------

_SIGN = re.compile(r"(?:(negative|minus)\s+|(positive|plus)\s+|([-+]))?\s*(负)?", re.IGNORECASE)
_PERCENT = re.compile(r"\s*(?:\\?%|(?:percent(?:age)?(?:\s+points?)?|per\s+cent|pct)\b)", re.IGNORECASE)
_SCALE = re.compile(rf"[\s-]*(?:({'|'.join(_SCALES)})s?(?![a-z])|([百千万亿]))", re.IGNORECASE)
_PART = re.compile(rf"[\s-]*({'|'.join(_PARTS)})s?(?![a-z])", re.IGNORECASE)
_AND_A_HALF = re.compile(r"\s+and\s+", re.IGNORECASE)
_BELOW_ZERO = re.compile(r"\s*\b(below|above)\s+(?:zero|0)\b", re.IGNORECASE)


def read_number(text: str) -> tuple[Number, str] | None:
    """
    Return the number at the start of a text, and the rest of the text.

    Args:
        text (`str`):
            Answer after [`~grading.normalization.clean`], without a leading currency.

    Returns:
        `tuple[Number, str]` or `None`: `None` if the text does not start with a number.
    """
    sign = _SIGN.match(text)
    found = _unsigned(text, sign.end())
    if found is None:
        return None
    number, end = found
    figure = number.figure
    while scale := _SCALE.match(text, end):
        figure = number.value if figure is None else figure
        by = _SCALES.get((scale[1] or "").lower()) or _CHINESE_SCALES[scale[2]]
        number, end = Number(number.value * by, number.rounded, figure=figure), scale.end()
    if (part := _PART.match(text, end)) and number.value.denominator == 1:
        number, end = Number(number.value / _PARTS[part[1].lower()]), part.end()
    elif (joint := _AND_A_HALF.match(text, end)) and (fraction := _unsigned(text, joint.end())):
        if fraction[0].value < 1 and number.value.denominator == 1:
            number, end = Number(number.value + fraction[0].value), fraction[1]
    percent = _PERCENT.match(text, end)
    rest = text[percent.end() if percent else end :]
    negative = bool(sign[1] or sign[3] == "-" or sign[4])
    if side := _BELOW_ZERO.search(rest):
        negative ^= side[1].lower() == "below"
        rest = rest[: side.start()] + rest[side.end() :]
    value = -number.value if negative else number.value
    figure = -number.figure if negative and number.figure is not None else number.figure
    return Number(value, number.rounded, bool(percent) or number.percent, figure), rest


def _unsigned(text: str, start: int) -> tuple[Number, int] | None:
    if mixed := _MIXED.match(text, start):  # mixed number
        fraction = _FRACTION.match(text, mixed.end()) or _SLASH.match(text, mixed.end())
        part = fraction and _quotient(*filter(None, fraction.groups()))
        whole = _decimal(next(filter(None, mixed.groups())))
        if part and whole and 0 <= part.value < 1 and not part.rounded:
            return Number(whole.value + part.value), fraction.end()
    for pattern, value in _NUMERALS:
        if (match := pattern.match(text, start)) and (number := value(match)):
            return number, match.end()
    if chinese := _CHINESE.match(text, start):
        first = chinese_number(chinese.group())
        if not text.startswith("分之", chinese.end()):
            return None if first is None else (Number(first), chinese.end())
        second = _unsigned(text, chinese.end() + 2)  # the denominator comes first
        if not first or second is None:
            return None
        if first == 100:
            return Number(second[0].value, second[0].rounded, percent=True), second[1]
        return Number(second[0].value / first), second[1]
    found = spelled_number(text[start:]) if text[start : start + 1].isalpha() else None
    return found and (Number(found[0]), start + found[1])
