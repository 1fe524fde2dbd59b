"""The grading rules, kind by kind: independent of notation, and in bounded time."""

import logging
import random
import time
from fractions import Fraction

import pytest

from trl_hrm.grading import (
    DEFAULT_EXTRACTORS,
    EXTRACTORS,
    AnswerGrader,
    Grade,
    comparison,
    extract_answer,
    grader,
    judge,
)
from trl_hrm.grading.exact_numbers import read_number
from trl_hrm.grading.normalization import clean, to_latex
from trl_hrm.grading.parsing import MAX_DEPTH, MAX_LENGTH, parse_answer
from trl_hrm.grading.units import read_unit
from trl_hrm.search.step_search import ending_extractors

from .grading_pairs import LISTED, RELATED, RELATED_STATED, STATED


def rows(*kinds: dict) -> list:
    return [
        pytest.param(*row, id=f"{kind}: {row[1]!r} against {row[0]!r}")
        for pairs in kinds
        for kind, found in pairs.items()
        for row in found
    ]


@pytest.mark.parametrize(("reference", "answer", "correct"), rows(LISTED, RELATED))
def test_pairs(reference, answer, correct):
    """A wrong grade is a false label for every step before the answer."""
    assert judge(answer, reference) == Grade(correct, "unparseable" if correct is None else "graded")


@pytest.mark.parametrize(("reference", "solution", "correct"), rows(STATED, RELATED_STATED))
def test_stated_answers(reference, solution, correct):
    """The default extractors find an answer that can be graded."""
    answer = extract_answer(solution)
    assert answer is not None and judge(answer, reference) == Grade(correct, "graded")


def test_pairs_are_enough():
    """Rows that no longer make sense may be removed, but not whole kinds, and not below the documented number."""
    listed = [row for pairs in (LISTED, STATED) for found in pairs.values() for row in found]
    related = [row for pairs in (RELATED, RELATED_STATED) for found in pairs.values() for row in found]
    assert len(listed) == 67 and LISTED.keys() <= RELATED.keys() and STATED.keys() <= RELATED_STATED.keys()
    assert len(set(related)) == len(related) >= 600
    assert sum(row[2] is False for row in related) >= 150


def spellings(value: Fraction, rng: random.Random) -> str:
    """Return the value in one of its spellings, chosen at random."""
    ways = [f"{value.numerator}/{value.denominator}", rf"\frac{{{value.numerator}}}{{{value.denominator}}}"]
    if value.denominator == 1:
        ways += [f"{value.numerator}", f"{value.numerator:,}", f"{value.numerator}.0", f"{value.numerator}e0"]
        ways += [f"{value.numerator:,}".replace(",", r"\,"), f"{value.numerator:,}".replace(",", " ")]
    if 100 % value.denominator == 0:
        ways += [f"{float(value):.2f}", f"{float(value):.2f}".replace("-", "−"), f"{float(100 * value):.0f}e-2"]
        ways += [f"{float(value):.2f}".replace("-", "negative ")]
    return rng.choice(ways)


def random_value(rng: random.Random) -> Fraction:
    return Fraction(rng.randint(-5000, 5000), rng.choice([1, 1, 2, 3, 4, 7, 25]))


def test_plain_values_are_compared_by_value_and_symmetrically():
    rng = random.Random(0)
    for _ in range(400):
        first = random_value(rng)
        second = rng.choice([first, -first, first + 1, first / 10, first + Fraction(1, 100)])
        answer, reference = spellings(first, rng), spellings(second, rng)
        grade = judge(answer, reference)
        assert grade == Grade(first == second, "graded"), (answer, reference)
        assert judge(reference, answer) == grade, (answer, reference)


MARKS = (
    " {} ", "{}.", "{},", "**{}**", "`{}`", "${}$", r"\({}\)", r"\[{}\]", "$${}$$", r"\boxed{{{}}}", "= {}", '"{}"', "{}</s>",
    "{}<|im_end|>", "The answer is {}.", "**Answer:** {}", r"$\boxed{{{}}}$.", "{}\n", "答案是{}。", r"{}\\", r"\text{{{}}}",
)  # fmt: skip


@pytest.mark.parametrize("mark", MARKS)
def test_marks_and_spaces_do_not_matter(mark):
    rng = random.Random(1)
    for _ in range(10):
        first, second = random_value(rng), random_value(rng)
        answer = spellings(first, rng)
        assert judge(mark.format(answer), spellings(first, rng)) == Grade(True, "graded"), answer
        assert judge(mark.format(answer), spellings(second, rng)) == Grade(first == second, "graded"), answer
        assert judge(spellings(first, rng), mark.format(answer)) == Grade(True, "graded"), answer


@pytest.mark.parametrize("form", ["{}", "${}$", "{}.", " {}"])
def test_a_reference_equals_itself_in_other_marks(form):
    references = sorted({row[0] for pairs in (LISTED, RELATED) for found in pairs.values() for row in found})
    assert [
        reference
        for reference in references
        if "$" not in reference
        and not reference.endswith(".")
        and not judge(form.format(reference), reference).correct
    ] == []


@pytest.mark.parametrize(
    ("answer", "equal"),
    [
        (r"60\%", True),
        ("60%", True),
        ("６０％", True),
        ("60 percent", True),
        ("60", True),
        ("0.6", True),
        ("3/5", True),
    ]
    + [("6", False), ("0.06", False), ("61%", False), ("-60%", False)],
)
def test_percentages_equal_their_number_and_their_value(answer, equal):
    """As in math-verify, for answers and references."""
    assert judge(answer, "60%").correct is equal
    assert judge("60%", answer).correct is equal


@pytest.mark.parametrize(
    ("text", "value", "rest"),
    [
        ("12 cm", 12, " cm"),
        ("-1,234.50 dollars", Fraction(-12345, 10), " dollars"),
        (r"3\frac{1}{2} cups", Fraction(7, 2), " cups"),
        ("two hundred and five sheep", 205, " sheep"),
        ("1e3", 1000, ""),
        ("204_5", 54, ""),
        ("1,23", 1, ",23"),
        ("一百零五个", 105, "个"),
    ],
)
def test_read_number(text, value, rest):
    number, found = read_number(text)
    assert (number.value, found) == (value, rest)


@pytest.mark.parametrize("text", ["x", "", "a circle", "one-to-one"[4:], "-", "1e99999"[1:], "half-life"[5:], "third"])
def test_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("m/s^2", {("m", 1), ("s", -2)}),
        ("meters per second squared", {("m", 1), ("s", -2)}),
        (r"m s^{-2}", {("m", 1), ("s", -2)}),
        ("square inches", {("in", 2)}),
        ("J/(kg K)", {("J", 1), ("kg", -1), ("K", -1)}),
        ("平方厘米", {("cm", 2)}),
        (r"\mu m", {("μm", 1)}),
        ("/hour", {("h", -1)}),
    ],
)
def test_units_have_one_name(text, unit):
    assert read_unit(text) == unit


@pytest.mark.parametrize("text", ["x", "apples", "xyz", "m + n", "", "2"])
def test_texts_that_are_not_units(text):
    assert read_unit(text) is None


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("2e5*sqrt(x)", r"2 \times 10^{5}\cdot \sqrt {x}"),
        ("x^12", "x^{12}"),
        ("2**(1/2)", "2^{1/2}"),
        ("exp(x+1)", "e^{x+1}"),
        ("sin(2x)", r"\sin (2x)"),
        ("sqrt((x+1)(x+2))", r"\sqrt{(x+1)(x+2)}"),
        ("5 - -3", "5 +3"),
    ],
)
def test_to_latex(text, latex):
    assert to_latex(clean(text)).replace(" ", "") == latex.replace(" ", "")


def test_thinking_is_never_an_answer():
    assert extract_answer("<think>\n\\boxed{1}\n#### 2\nThe answer is 3.") is None  # cut off
    assert extract_answer("\\boxed{5} <think>wait", ["boxed"]) is None
    assert extract_answer("<think>\\boxed{1}</think> I do not know.") is None
    assert extract_answer("<think>\\boxed{1}</think> \\boxed{2}") == "2"
    assert extract_answer("\\boxed{1}</think> 7 apples", ["last_number"]) == "7"


def test_extractors_that_end_a_solution():
    """`####` also begins headings, and "the answer is" may occur inside a step."""
    assert ending_extractors(DEFAULT_EXTRACTORS) == ("marker", "tag", "boxed")
    assert ending_extractors(["hash", "boxed"]) == ("boxed",)


CHUNKS = (
    "(", "[", "{", r"\{", "#", "# Answer: ", "answer is ", "answer to a ", r"\boxed{", r"\boxed{1}, ", r"\boxed{1} ", "<answer>",
    "</answer>", "<answer>1</answer>", "<think>", "</think>", " ", "\n", "*", "_", "a", "1", "1,", "1.", "10 000 ", "$", "$1$", r"\(",
    r"\frac{", "x=", "x=1,", "one ", "hundred ", "and ", "-", "e", "1e5", ".", "...", "0.3", "^", "²", "√", "(a)", "A. ", "cm", "m/",
    "%", ":", "1:", "=", "\\", r"\text{a}", r"\sqrt(", "sin(", "、", "答案是", "一", "where ", "<", "x<1 or ", r"\pm", "|", "'", '"', "&",
    "1_2", "ab ", ",", r"\dot{1}", "because ", "(1,",
)  # fmt: skip


@pytest.mark.parametrize("chunk", CHUNKS)
def test_long_texts_are_read_in_bounded_time(chunk):
    """Answers are extracted in the search process, where no timeout applies."""
    for text in (chunk * (20_000 // len(chunk)), "1" + chunk * (20_000 // len(chunk)) + "x"):
        begun = time.perf_counter()
        for name in EXTRACTORS:
            extract_answer(text, [name])
        parse_answer(text)
        assert time.perf_counter() - begun < 3
    begun = time.perf_counter()
    parse_answer(chunk * (MAX_LENGTH // len(chunk)))
    assert time.perf_counter() - begun < 3


@pytest.mark.parametrize(
    "answer",
    ["(1," * MAX_DEPTH * 2 + "1" + ")" * MAX_DEPTH * 2, "7" * (MAX_LENGTH + 1), "x" * 10**6],
    ids=["deep", "long", "huge"],
)
def test_answers_too_deep_or_long_are_unreadable(answer):
    assert judge(answer, "7") == Grade(None, "unparseable")
    assert judge("7", answer) == Grade(None, "ungradable")


@pytest.mark.parametrize(
    "answer",
    [
        "1e999999999",
        pytest.param(r"10^{999999999}", marks=pytest.mark.slow),  # takes the whole deadline
        "7" * 2999,
        "2^{99999}",
        "1/3^{9999}",
        "9" * 300 + "!",
    ],
)
def test_huge_numbers_end_before_the_deadline_or_at_it(answer):
    with AnswerGrader(timeout=3) as graders:
        begun = time.perf_counter()
        grade = graders.grade(answer, "7")
        assert grade.correct is not True and time.perf_counter() - begun < 10
        assert graders.grade("14/2", "7") == Grade(True, "graded")


def test_references_that_cannot_be_read_are_counted_and_shown(caplog):
    with AnswerGrader() as graders, caplog.at_level(logging.WARNING, logger=grader.__name__):
        for answer in ("1", "2"):
            graders.grade(answer, "???")
            graders.grade(answer, r"\frac{1}{")
            graders.grade(answer, "3")
        assert graders.unreadable_references() == ["???", r"\frac{1}{"]
        assert graders.counts()["num_ungradable"] == 4
        graders.close()
    assert "2 reference answers are unreadable" in caplog.text and r"'\\frac{1}{'" in caplog.text


def test_runs_record_the_grading_rules(monkeypatch):
    """A log of grades must not be continued under rules that could grade differently."""
    from trl_hrm.scripts.annotate import AnnotateConfig, make_manifest
    from trl_hrm.search.prompts import Prompt
    from trl_hrm.search.steps import RULES

    class Engine:
        def describe(self):
            return {"policy": "p"}

    monkeypatch.setattr(AnnotateConfig, "model_identity", lambda config: {})  # there is no checkpoint

    def manifest():
        config = AnnotateConfig(problems="p", policy="p", output_dir="run", extractors=["boxed"], seed=1)
        return make_manifest(
            config, Engine(), Prompt("mine", "{question}", "blank_line"), RULES["blank_line"], AnswerGrader(), 1
        )

    before = manifest()
    assert before["grader"]["rules"] == comparison.RULES_VERSION
    monkeypatch.setattr(grader, "RULES_VERSION", comparison.RULES_VERSION + 1)
    assert manifest()["grader"] != before["grader"]
    assert {name: value for name, value in manifest().items() if name != "grader"} == {
        name: value for name, value in before.items() if name != "grader"
    }
