"""Compare an answer with a reference answer."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from .exact_numbers import close, equal_numbers, read_number
from .normalization import split_list, to_latex
from .parsing import ParsedAnswer, parse_answer
from .units import DEGREES


RULES_VERSION = 5  # increased whenever a rule change may change a grade


@dataclass(frozen=True)
class Grade:
    """
    Result of grading an answer.

    Args:
        correct (`bool`, *optional*):
            Whether the answer is right. `None` if `status` is not `"graded"`.
        status (`str`):
            `"graded"`; `"unparseable"` (the answer cannot be parsed or compared with the reference); `"ungradable"` (the reference
            cannot be parsed, so no answer to this problem can be graded); `"timeout"`; or `"died"` (the worker process died twice,
            for example because memory ran out).
    """

    correct: bool | None
    status: str


def judge(answer: str, reference: str) -> Grade:
    r"""
    Compare an answer with the reference answer, without a timeout. [`AnswerGrader`] adds one.

    Numbers are compared exactly, decimals to six decimal places or significant digits, and formulas with math-verify. Units and
    nouns may be missing on one side, but must not differ. Words are compared without case, articles and punctuation. An answer
    that cannot be compared (`May 5` with `June 5`, `not Evelyn` with `Evelyn`) is `"unparseable"`, not wrong.

    Args:
        answer (`str`):
            Extracted answer: LaTeX with or without `$`, a number, or words.
        reference (`str`):
            Reference answer. If it can be parsed, an identical answer is always correct.

    Returns:
        [`Grade`]
    """
    gold = parse_answer(reference)
    if not _is_readable(gold):
        return Grade(None, "ungradable")
    if answer.split() == reference.split():
        return Grade(True, "graded")
    found = parse_answer(answer)
    correct = _compare(gold, found) if found else None
    return Grade(correct, "unparseable" if correct is None else "graded")


def _is_readable(answer: ParsedAnswer) -> bool:
    """Return whether answers can be compared with this reference."""
    if answer.number or answer.words or answer.option or answer.time:
        return True
    if answer.pairs:
        return all(_is_readable(parse_answer(value)) for _, value in answer.pairs)
    if answer.formula and all(map(_parse, _both_signs(answer.formula))):
        return True
    if len(answer.relations) > 1:
        return all(map(_parse, answer.relations))
    return len(answer.members) > 1 and all(_is_readable(parse_answer(member)) for member in answer.members)


def _compare(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    """Return whether two answers are equal, or `None` if that cannot be decided."""
    if gold.alternatives and not gold.is_equation or found.alternatives and not found.is_equation:
        return _any(
            _compare(one, other)
            for one in (replace(gold, alternatives=()), *gold.alternatives)
            for other in (replace(found, alternatives=()), *found.alternatives)
        )
    if gold.option or found.option:
        return _compare_options(gold, found)
    if gold.time and found.time:  # am or pm may be missing on one side, and `4:30` may be a ratio
        if gold.time == found.time:
            return True
        if gold.number and found.number:
            return None if equal_numbers(gold.number, found.number) else False
        return gold.time[0] == found.time[0] and not (gold.time[1] and found.time[1])
    if (
        gold.is_equation or found.is_equation
    ):  # the reference decides whether the answer is the equation or its right side
        if gold.is_equation and not (found.is_equation or found.pairs):
            return False if _is_readable(found) and not found.is_prose else None
        if not (gold.is_equation or gold.pairs):
            return _compare(gold, found.alternatives[0])
        return _compare_formulas(gold, found)
    if gold.pairs or found.pairs:
        return _compare_pairs(gold, found)
    if gold.number and found.number:
        return _compare_quantities(gold, found)
    if gold.words and (found.words or not gold.number) or found.words and not found.number:
        return _compare_words(gold, found)
    if gold.unit and found.unit and gold.unit != found.unit:
        return None
    if (
        gold.number and not gold.number.value and found.is_prose
    ):  # "no solutions" in words, and the number of solutions
        return None
    if len(gold.relations) > 1 or len(found.relations) > 1:
        return _compare_solution_sets(gold, found)
    verdict = _compare_members(gold, found)
    if verdict is None:
        verdict = _compare_formulas(gold, found)
        if verdict and len(gold.members) != len(found.members) and all((gold.members, found.members)):
            return None  # "2, 2, 5" and "2, 5": three values, or a double root
    if verdict is False and gold.relations and found.relations:  # "|x| < 1" and "-1 < x < 1"
        names = [{match["letter"] for match in _LETTER.finditer(side.formula)} - {None} for side in (gold, found)]
        if names[0] == names[1] and len(names[0]) == 1:
            return _compare_solution_sets(gold, found)
    return verdict


def _any(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts) -> bool | None:
    verdicts = list(verdicts)
    return False if False in verdicts else None if None in verdicts else True


# Options, numbers and words ------------------------------------------------------------------------------------------


def _compare_options(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    """Compare multiple-choice options. A letter and the value next to it name the same answer and must not contradict each other."""
    if gold.option and found.option:
        same_value = gold.value and found.value and _compare(gold.value, found.value)
        if gold.option == found.option:
            return None if same_value is False else True
        return None if same_value else False
    option, other = (gold, found) if gold.option else (found, gold)
    if option.value:
        if re.fullmatch("[a-j]", other.formula):  # a lower-case option, or a variable
            return None
        return _compare(option.value, found) if option is gold else _compare(gold, option.value)
    if other.words and option is found:
        return False
    if other.words or other.number or other.time:
        return None  # unknown which option has that value
    return _compare_formulas(gold, found)


def _compare_quantities(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    equal = equal_numbers(gold.number, found.number)
    if gold.unit and found.unit and gold.unit != found.unit:
        return None  # units are not converted
    if gold.words and found.words and not _same_nouns(gold.words, found.words):
        return equal and None  # "May 5" and "June 5"
    if gold.words != found.words and _OTHER_VALUE.search(f"{gold.words} {found.words}"):
        return None
    if not equal and _SIGN_IN_WORDS.search(f"{gold.words} {found.words}"):
        opposite = replace(found.number, value=-found.number.value)
        return None if equal_numbers(gold.number, opposite) else equal
    if equal and gold.is_ambiguous and not found.unit:
        return None
    return equal


def _same_nouns(words: str, others: str) -> bool:
    """Return whether two phrases are the same, up to singular and plural."""
    pairs = list(zip_longest(words.split(), others.split(), fillvalue=""))
    return all(
        one == other or one in (f"{other}s", f"{other}es") or other in (f"{one}s", f"{one}es") for one, other in pairs
    )


# Words around a number that change its meaning: a negation, a bound or an operation.
_OTHER_VALUE = re.compile(
    r"\b(?:not|never|cannot|except|neither|nor|\w+n t|wrong|incorrect|impossible|squared|cubed|factorial)\b"
    r"|\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower) than|over|under|above|below|beyond|exceeds?|exceeding) \d"
    r"|\b(?:at (?:least|most)|(?:or|and) (?:more|less|fewer|greater|above|below|over|under|up|older|younger))\b"
)
_DENIAL = re.compile(r"\b(?:not|never|cannot|neither|\w+n t)\b")
# A loss of 5 may be -5.
_SIGN_IN_WORDS = re.compile(
    r"\b(?:loss|lost|lose|loses|decreased?|decreases|debt|below|drop|dropped|fell|fewer|less|deficit)\b"
)


def _compare_words(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    if not gold.words or gold.number or found.number and found.words:  # only one side is purely words
        return None
    if not found.words:
        return None if gold.is_prose or any(map(str.isdigit, gold.words)) else False
    if gold.words == found.words:
        return True
    if len(gold.members) > 1 and sorted(_member_words(gold)) == sorted(_member_words(found)):
        return True
    if gold.is_prose or found.is_prose or set(gold.words.split()) & set(found.words.split()):
        return None  # "the polygenic score" and "a polygenic risk score", or "not Evelyn" and "Evelyn"
    if _DENIAL.search(gold.words) or _DENIAL.search(found.words):
        return None  # "impossible" and "not possible"
    return False


def _member_words(answer: ParsedAnswer) -> list[str | None]:
    return [parse_answer(member).words or member.casefold() for member in answer.members]


# Assignments and lists -----------------------------------------------------------------------------------------------


def _compare_pairs(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    if gold.pairs and found.pairs:
        names = {name for name, _ in gold.pairs}
        if names == {name for name, _ in found.pairs}:
            return _all(_match(_values(gold, name), _values(found, name)) for name in names)
        if len(gold.pairs) == len(found.pairs) == 1:
            (name, value), (other_name, other_value) = gold.pairs[0], found.pairs[0]
            if name.casefold() == other_name.casefold():
                return _compare(parse_answer(value), parse_answer(other_value))
            if _compare_formulas(gold, found):
                return True
            if len(name) == len(other_name) == 1 or not _compare(parse_answer(value), parse_answer(other_value)):
                return False
            return None  # "A = 5" and "area = 5"
        return False if _match(_values(gold), _values(found)) is False else None
    named, other = (gold, found) if gold.pairs else (found, gold)
    values, members = _values(named), list(other.members)
    if len(values) == 1 and r"\pm" not in values[0]:
        return _compare(parse_answer(values[0]), other) if named is gold else _compare(other, parse_answer(values[0]))
    if len({name for name, _ in named.pairs}) == 1 or (other is gold and members and not other.brackets):
        return _match(values, members or [other.formula])
    # values without names are in the order of the names, as written or, in a tuple, alphabetically
    if len(members) != len(values):
        return False if _is_readable(other) and not other.words else None
    in_order = _all(map(_compare_texts, values, members))
    if other.brackets:
        by_name = _all(map(_compare_texts, [value for _, value in sorted(named.pairs)], members))
        return in_order if in_order == by_name else None
    return in_order


def _values(answer: ParsedAnswer, name: str | None = None) -> list[str]:
    return [value for given, value in answer.pairs if name in (None, given)]


def _compare_texts(first: str, second: str) -> bool | None:
    return _compare(parse_answer(first), parse_answer(second))


def _compare_members(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    """Compare lists and tuples by their members. `None` means that math-verify decides."""
    number, other = (gold.number, found) if gold.number else (found.number, gold)
    if number and number.rounded and re.fullmatch(r"-?\d+,\d+", other.formula):
        # `1,22` may be a decimal with a comma if the other side is a decimal
        if equal_numbers(number, read_number(other.formula.replace(",", "."))[0]):
            return True
    if not (gold.members and found.members):
        sides = [list(side.members) or _both_signs(side.formula) for side in (gold, found)]
        return _match(*sides) if all(len(side) > 1 for side in sides) else None
    if not (gold.brackets or found.brackets):
        return _match(gold.members, found.members)
    if gold.brackets and found.brackets and gold.brackets != found.brackets:
        return None
    if len(gold.members) != len(found.members):
        return None
    return _all(map(_compare_texts, gold.members, found.members))


def _match(gold: Sequence[str], found: Sequence[str]) -> bool | None:
    """Compare two lists in any order: each member must have an equal member on the other side."""
    gold = [value for member in gold for value in _both_signs(member)]
    found = [value for member in found for value in _both_signs(member)]
    if len(gold) * len(found) > 400:
        return None
    verdicts = [[_compare_texts(one, other) for other in found] for one in gold]
    verdict = _all([*map(_any, verdicts), *map(_any, zip(*verdicts, strict=True))])
    return None if verdict and len(gold) != len(found) else verdict


def _both_signs(text: str) -> list[str]:
    r"""Return the two values of `1 \pm x`, or a text without `\pm` as the only one."""
    if not _PLUS_MINUS.search(text) or len(split_list(text)[0]) > 1:
        return [text]
    return [_PLUS_MINUS.sub(plus, text).replace(r"\mp", minus) for plus, minus in (("+", "-"), ("-", "+"))]


_PLUS_MINUS = re.compile(r"\\pm(?![a-zA-Z])")


# Formulas ------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _parse(formula: str) -> tuple:
    """Return the SymPy object of a formula in a tuple. The tuple is empty if math-verify cannot parse the formula."""
    from math_verify import LatexExtractionConfig, parse

    if not formula:
        return ()
    try:
        found = parse(
            r"\boxed{" + to_latex(formula) + "}",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,
            raise_on_error=True,
        )
    except Exception:  # the parser may raise anything for a formula that it cannot parse
        return ()
    return tuple(found)


def _objects(answer: ParsedAnswer) -> tuple:
    """Return the SymPy object of an answer: an exact number, or a parsed formula."""
    if answer.number is None:
        return _parse(answer.formula)
    from sympy import Rational

    value = answer.number.value / (100 if answer.number.percent else 1)
    return (Rational(value.numerator, value.denominator),)


_LETTER = re.compile(r"\\(?:mathbb|operatorname|begin|end)\s*\{[^{}]*\}|\\[a-zA-Z]+|(?P<letter>[a-zA-Z])")


def _compare_formulas(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    """
    Compare two formulas. math-verify treats `R` and `r` as one variable. If both occur, the capital letter is renamed to an unused
    letter.
    """
    letters = [{match["letter"] for match in _LETTER.finditer(side.formula)} - {None} for side in (gold, found)]
    both = letters[0] | letters[1]
    capitals = [letter for letter in sorted(both) if letter.isupper() and letter.lower() in both]
    spare = [letter for letter in "wqzvuhktsyxpabcgmnr" if not {letter, letter.upper()} & both]
    if not capitals:
        return _compare_symbols(gold, found)
    if len(spare) < len(capitals):
        return None
    names = dict(zip(capitals, spare, strict=False))
    renamed = [
        replace(side, formula=_LETTER.sub(lambda match: names.get(match["letter"], match.group()), side.formula))
        for side in (gold, found)
    ]
    correct = _compare_symbols(*renamed)
    if correct is False and not any({letter, letter.lower()} <= side for side in letters for letter in capitals):
        return None if _compare_symbols(gold, found) else False  # `2x+3` and `2X+3`
    return correct


def _compare_symbols(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    first, second = _objects(gold), _objects(found)
    if not (first and second):
        return None
    rounded = any(side.number is not None and side.number.rounded for side in (gold, found))
    try:
        if _equal(first[0], second[0], rounded):
            return True
        degrees = [side.unit == DEGREES for side in (gold, found)]
        if degrees[0] != degrees[1] and not (gold.unit and found.unit):  # one angle in degrees, one in radians
            from sympy import pi

            first, second = (
                side[0] * pi / 180 if is_degree else side[0]
                for side, is_degree in zip((first, second), degrees, strict=True)
            )
            return _equal(first, second, rounded)
        return False
    except Exception:  # SymPy may raise anything; by default, math-verify would grade the answer as wrong
        return None


def _equal(gold: Any, found: Any, rounded: bool) -> bool:
    """Compare SymPy objects: constants by their value, everything else with math-verify."""
    from math_verify import verify
    from sympy import Expr, Interval, MatrixBase, Symbol

    if isinstance(gold, Interval) and isinstance(found, Interval):
        return (gold.left_open, gold.right_open) == (found.left_open, found.right_open) and all(
            _equal(one, other, rounded) for one, other in ((gold.start, found.start), (gold.end, found.end))
        )
    if isinstance(gold, MatrixBase) and isinstance(found, MatrixBase) and gold.shape == found.shape:
        return all(_equal(one, other, rounded) for one, other in zip(gold.flat(), found.flat(), strict=True))
    are_expressions = isinstance(gold, Expr) and isinstance(found, Expr)
    if are_expressions:
        symbols = gold.free_symbols | found.free_symbols
        if (
            len({symbol.is_real for symbol in symbols}) > 1
        ):  # `3i` makes all variables complex in math-verify, `3 i` does not
            names = {symbol: Symbol(symbol.name) for symbol in symbols}
            gold, found = gold.xreplace(names), found.xreplace(names)
        verdict = _equal_constants(gold, found, rounded)
        if verdict is not None:
            return verdict
    # allow_set_relation_comp: x > 2 equals (2, oo)
    equal = verify([gold], [found], timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    return bool(equal) and not (are_expressions and _differ_at_points(gold, found))


_DIGITS = 50  # precision of evaluated constants
_MAX_BITS = 100_000  # maximum size of a constant as a fraction
_EXACTLY = Fraction(1, 10**40)  # maximum relative difference of equal constants


def _equal_constants(gold: Any, found: Any, rounded: bool) -> bool | None:
    """
    Compare two expressions without variables. Return `None` if they have variables.

    math-verify only checks whether the difference is zero to 15 decimals, so it treats all smaller numbers as equal.
    """
    from sympy import Float

    first, second = _evaluate(gold), _evaluate(found)
    if first is None or second is None:
        return None
    if rounded or gold.has(Float) or found.has(Float):
        return all(map(close, first, second))
    largest = max(map(abs, (*first, *second)))
    return all(abs(one - other) <= _EXACTLY * largest for one, other in zip(first, second, strict=True))


def _evaluate(expression: Any) -> tuple[Fraction, Fraction] | None:
    """Return the real and imaginary part of a constant, or `None` if it has variables or cannot be evaluated."""
    from sympy import I, Integer, Rational

    variables = expression.free_symbols
    if {str(variable) for variable in variables} == {"i"}:  # math-verify parses `i` as a variable
        expression = expression.subs(dict.fromkeys(variables, I))
    elif variables:
        return None
    value = expression.doit()
    if not value.is_Rational:
        value = value.evalf(_DIGITS)
    parts = []
    for part in value.as_real_imag():
        if part.is_Float:
            _, mantissa, exponent, bits = part._mpf_
            if part._prec == 1 or not mantissa:  # no digit is certain, treat it as zero
                part = Integer(0)
            elif abs(exponent + bits) > _MAX_BITS:
                return None
        if not (part.is_Float or part.is_Rational):
            return None
        exact = Rational(part)
        parts.append(Fraction(int(exact.p), int(exact.q)))
    return parts[0], parts[1]


def _differ_at_points(gold: Any, found: Any) -> bool:
    """
    Return whether two expressions differ at one of two points. math-verify treats expressions as equal if they differ by, for
    example, 10^-20.
    """
    from sympy import Float, Rational

    if set(map(str, gold.free_symbols)) != set(map(str, found.free_symbols)):
        return False
    tolerance = Fraction(1, 10**5) if gold.has(Float) or found.has(Float) else _EXACTLY
    for shift in (3, 7):
        values = [
            _evaluate(
                side.subs(
                    {symbol: Rational(shift + sum(map(ord, str(symbol))) % 11, 5) for symbol in side.free_symbols}
                )
            )
            for side in (gold, found)
        ]
        if None in values:
            return False
        largest = max(map(abs, (*values[0], *values[1])))
        if any(abs(one - other) > largest * tolerance for one, other in zip(*values, strict=True)):
            return True
    return False


def _compare_solution_sets(gold: ParsedAnswer, found: ParsedAnswer) -> bool | None:
    """Compare inequalities with inequalities or with a solution set."""
    try:
        first, second = _solution_set(gold), _solution_set(found)
        if first is None or second is None:
            return _match(gold.relations, found.relations) if gold.relations and found.relations else None
        return first == second or bool(first.symmetric_difference(second).is_empty)
    except Exception:  # SymPy may raise anything for a set that it cannot compute
        return None


def _solution_set(answer: ParsedAnswer) -> Any:
    """Return the SymPy set of a set, or of inequalities in one variable."""
    from sympy import Intersection, Set, Union

    members = answer.relations or (answer.formula,)
    parsed = [_parse(member) for member in members]
    if not all(parsed) or answer.joints >= {"and", "or"}:
        return None
    sets = [found[0] if isinstance(found[0], Set) else found[0].as_set() for found in parsed]
    if "or" in answer.joints:
        return Union(*sets)
    both = Intersection(*sets)
    return Union(*sets) if both.is_empty and "and" not in answer.joints else both  # "x < 2, x > 3"
