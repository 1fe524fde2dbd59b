"""Parse units of measurement and currencies."""

import re
from collections import Counter


CURRENCY = r"US\$|[$€£¥₹]|(?:USD|EUR|GBP|RMB|Rs\.?)(?=\s|\d)"

DEGREES = frozenset([("°", 1)])

# Symbols are case-sensitive, words are not.
_SYMBOLS = {
    "m": "m", "g": "g gm gms", "s": "s sec secs", "min": "min mins", "h": "h hr hrs", "L": "L l lt", "in": "in", "ft": "ft",
    "yd": "yd yds", "mi": "mi", "oz": "oz", "lb": "lb lbs", "gal": "gal", "N": "N", "J": "J", "cal": "cal", "kcal": "kcal",
    "W": "W", "V": "V", "A": "A", "K": "K", "C": "C", "F": "F", "T": "T", "Hz": "Hz hz", "Nm": "Nm", "Wh": "Wh", "Pa": "Pa", "atm": "atm", "eV": "eV",
    "mol": "mol", "M": "M", "Ω": r"Ω \Omega \ohm", "rad": "rad rads", "°": r"° \circ", "pc": "pc", "AU": "AU", "Å": "Å",
    "erg": "erg ergs", "dyne": "dyn dyne dynes", "ly": "ly", "ha": "ha", "yr": "yr yrs", "mph": "mph", "km/h": "kmph kph kmh",
    "rpm": "rpm", "dB": "dB", "cc": "cc", "bit": "bit bits", "$": "$ USD US$", "€": "€ EUR", "£": "£ GBP", "¥": "¥ CNY RMB",
    "₹": "₹ INR Rs", "kg": "KG Kg", "qt": "qt qts", "pt": "pt", "fl": "fl", "week": "wk wks", "month": "mo mos", "kB": "kB KB", "MB": "MB", "GB": "GB",
    "TB": "TB", "px": "px", "hp": "hp HP", "kr": "kr",
}  # fmt: skip
# Units with another spelling as a product of units with their powers
_COMPOUND = {"mph": {"mi": 1, "h": -1}, "km/h": {"km": 1, "h": -1}, "cc": {"cm": 3}}
_PREFIXES = {"k": "k", "c": "c", "d": "d", "m": "m", "μ": r"μ u \mu", "n": "n", "p": "p", "M": "M", "G": "G"}
_PREFIXED = "m g s L N J W V A Hz Pa eV mol Ω pc C Wh".split()
_WORDS = {
    "m": "meter metre 米", "km": "kilometer kilometre 千米 公里", "cm": "centimeter centimetre 厘米", "dm": "decimeter 分米",
    "mm": "millimeter millimetre 毫米", "μm": "micron micrometer", "nm": "nanometer", "g": "gram 克", "kg": "kilogram kilo 千克 公斤",
    "mg": "milligram", "ton": "ton tonne 吨", "s": "second 秒 秒钟", "min": "minute 分钟", "h": "hour 小时 时", "day": "day 天 日",
    "week": "week 周 星期", "month": "month 月 个月", "yr": "year 年", "L": "liter litre 升", "mL": "milliliter millilitre 毫升",
    "in": "inch", "ft": "foot feet", "yd": "yard", "mi": "mile", "oz": "ounce", "lb": "pound", "gal": "gallon", "qt": "quart", "pt": "pint",
    "N": "newton", "J": "joule", "W": "watt", "V": "volt", "A": "amp ampere", "K": "kelvin", "C": "celsius coulomb",
    "F": "fahrenheit farad", "Hz": "hertz", "Pa": "pascal", "mol": "mole", "Ω": "ohm", "rad": "radian", "°": "degree deg 度",
    "acre": "acre", "ha": "hectare", "$": "dollar buck", "€": "euro", "¢": "cent", "¥": "yuan 元 块 块钱 人民币", "₹": "rupee",
    "unit": "unit",
}  # fmt: skip
_UNITS = {spelling: unit for unit, spellings in _SYMBOLS.items() for spelling in spellings.split()}
_UNITS |= {
    written + symbol: prefix + unit
    for prefix, spellings in _PREFIXES.items()
    for written in spellings.split()
    for unit in _PREFIXED
    for symbol in {"L": "Ll", "Ω": ("Ω", r"\Omega")}.get(unit, (unit,))
    if written + symbol not in _UNITS
}
_NAMES = {word: unit for unit, words in _WORDS.items() for word in words.split()}
_FRACTION = re.compile(r"^\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}\s*$")
_TOKEN = re.compile(
    r"\s*(?P<joint>/|\\cdot(?![a-zA-Z])|[*.-]|(?:per|an?|each|every)\b(?=\s*[a-zA-Z])|每)?\s*(?P<open>\()?\s*"
    r"(?:(?P<square>square|sq\b\.?|平方)|(?P<cubic>cubic|cu\b\.?|立方))?\s*\^?\s*\{?\s*"
    r"(?P<name>\\[a-zA-Z]+|[A-Za-zμΩÅ]+|[\u4e00-\u9fff]+|US\$|[$€£¥₹¢])\}?\.?"
    r"(?P<power>\s*(?:squared|cubed|\^\s*\{?\s*-?\d(?!\d)\s*\}?)|\d(?!\d))?(?P<close>\s*\))?"  # `cm2`, but not `feet 2`
)


def read_unit(text: str) -> frozenset[tuple[str, int]] | None:
    """
    Return the unit in a text, such as `{("m", 1), ("s", -2)}` for `m/s^2`.

    Args:
        text (`str`):
            Text after a number.

    Returns:
        `frozenset[tuple[str, int]]` or `None`: Units with their powers. `None` if a unit is unknown.
    """
    powers: Counter[str] = Counter()
    position, inverse = 0, False
    text = _FRACTION.sub(r"\1/\2", text)
    text = re.sub(r"\\mu\s*(?=[a-zA-Z])", "μ", text.strip())
    while position < len(text):
        token = _TOKEN.match(text, position)
        unit = token and _UNITS.get(token["name"])
        if token and not unit:
            word = token["name"].lower()
            unit = _NAMES.get(word) or _NAMES.get(word.removesuffix("s")) or _NAMES.get(word.removesuffix("es"))
        if not unit:
            return None
        divides = token["joint"] not in (None, *r"*.-", r"\cdot")
        power = {"squared": "2", "cubed": "3"}.get((token["power"] or "1").strip(), token["power"] or "1")
        power = int(re.sub(r"[^\d-]", "", power)) * (2 if token["square"] else 3 if token["cubic"] else 1)
        for base, by in _COMPOUND.get(unit, {unit: 1}).items():
            powers[base] += by * (-power if divides or inverse else power)
        inverse = (inverse or divides and bool(token["open"])) and not token["close"]
        position = token.end()
    return frozenset((unit, power) for unit, power in powers.items() if power) or None
