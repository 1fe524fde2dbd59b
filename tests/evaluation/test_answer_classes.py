"""Classes of equivalent answers, with the real grader and with scripted graders."""

import logging
import random
from itertools import permutations

import pytest

from trl_hrm.evaluation.answer_classes import grade_answers, grade_problems
from trl_hrm.grading import AnswerGrader, Grade


@pytest.fixture(scope="module")
def grader():
    with AnswerGrader(timeout=5.0) as grader:
        yield grader


class Scripted:
    """Answers with the same letters are equal, and some time out. Records the comparisons."""

    def __init__(self, statuses: dict[str, str] | None = None):
        self.statuses = statuses or {}
        self.asked: list[tuple[str, str]] = []

    def grade(self, answer: str, reference: str, is_reference: bool = True) -> Grade:
        self.asked.append((answer, reference))
        for text in (answer, reference):
            if text in self.statuses:
                return Grade(None, self.statuses[text])
        return Grade(sorted(answer) == sorted(reference), "graded")


def groups(answers: list, classes: list) -> set[frozenset]:
    found: dict = {}
    for answer, group in zip(answers, classes, strict=True):
        found.setdefault(group, set()).add(answer)
    return {frozenset(members) for group, members in found.items() if group is not None}


def test_equivalent_answers(grader):
    answers = ["0.5", r"\frac{1}{2}", "1/2", " 0.5 ", "2", "2.0", None, "3", r"\sqrt{4}"]
    found = grade_answers(answers, r"\frac12", grader)
    assert groups(answers, found.classes) == {
        frozenset({"0.5", " 0.5 ", r"\frac{1}{2}", "1/2"}),
        frozenset({"2", "2.0", r"\sqrt{4}"}),
        frozenset({"3"}),
    }
    assert found.correct == [True, True, True, True, False, False, None, False, False]
    assert found.classes[6] is None and found.num_unreadable == 0


def test_the_order_does_not_matter(grader):
    answers = ["0.5", r"\frac{1}{2}", "x+1", "1+x", None, "7"]
    found = {
        frozenset(zip(order, zip(judged.classes, judged.correct, strict=True), strict=True))
        for order in permutations(answers)
        for judged in [grade_answers(order, "7", grader)]
    }
    assert len(found) == 1


def test_the_order_does_not_matter_if_equality_is_not_transitive():
    """A grader may find a = b and b = c, but not a = c. The class of b must not depend on which came first."""

    class Near(Scripted):
        def grade(self, answer, reference, is_reference=True):
            return Grade(abs(float(answer) - float(reference)) <= 1, "graded")

    rng = random.Random(0)
    for _ in range(50):
        answers = [f"{rng.randrange(8)}.0" for _ in range(6)]
        results = set()
        for _ in range(10):
            rng.shuffle(answers)
            judged = grade_answers(answers, "3.0", Near())
            results.add(frozenset(zip(answers, judged.classes, strict=True)))
        assert len(results) == 1


def test_votes_do_not_use_the_reference():
    """Answers that equal the reference but not each other stay apart. Joining them would leak the reference into the vote."""

    class Odd(Scripted):
        def grade(self, answer, reference, is_reference=True):
            return Grade(answer == reference or reference == "ref", "graded")

    found = grade_answers(["p", "q"], "ref", Odd())
    assert found.correct == [True, True] and found.classes[0] != found.classes[1]


def test_integers_are_compared_without_the_grader():
    grader = Scripted()
    found = grade_answers(["12", "+12", "012", "21", "-12"], "12", grader)
    assert groups(["12", "+12", "012", "21", "-12"], found.classes) == {
        frozenset({"12", "+12", "012"}),
        frozenset({"21"}),
        frozenset({"-12"}),
    }
    assert {reference for _, reference in grader.asked} == {"12"}
    long = ["9" * 5000, "9" * 5000 + "x"]  # Python cannot parse an integer this long
    assert grade_answers(long, "9", grader).classes == [0, 1]


def test_timeouts_are_not_wrong_and_are_not_asked_again():
    """Every further comparison with an answer that times out would cost the full timeout again."""
    grader = Scripted({"hang": "timeout", "kill": "died", "blur": "unparseable"})
    answers = ["hang", "kill", "ab", "ba", "blur", "hang", None]
    found = grade_answers(answers, "ab", grader)
    assert found.correct == [None, None, True, True, False, None, None]
    assert found.num_unreadable == 1
    assert found.classes[0] == found.classes[5] != found.classes[1]
    assert found.classes[2] == found.classes[3] and len({group for group in found.classes if group is not None}) == 4
    assert [pair for pair in grader.asked if "hang" in pair] == [("hang", "ab")]
    assert [pair for pair in grader.asked if "kill" in pair] == [("kill", "ab")]


def test_real_timeout():
    with AnswerGrader(timeout=1.0) as grader:
        found = grade_answers(["9^{9^{9^{9^9}}}", "5"], "5", grader)
    assert found.correct[1] is True
    assert found.correct[0] is not True and found.classes[0] != found.classes[1]


def test_reference_that_cannot_be_read():
    assert grade_answers(["a"], "b", Scripted({"b": "ungradable"})) is None
    assert grade_answers(["a"], "b", Scripted({"b": "timeout"})) is None


def test_given_grades_are_kept():
    """Grading again with another extractor could change the grades. Votes still need the classes."""
    grader = Scripted()
    answers, grades = ["ab", "ba", "c", None, "c"], [True, False, None, True, False]
    (judged,) = grade_problems([answers], [None], grader, grades=[grades])
    assert judged.correct == grades and judged.num_unreadable == 0
    assert groups(answers, judged.classes) == {frozenset({"ab", "ba"}), frozenset({"c"})}
    assert judged.classes[3] is None
    graded, kept = grade_problems([["a"], ["a"]], ["a", "b"], grader, grades=[None, [False]])
    assert (graded.correct, kept.correct) == ([True], [False])


def test_many_problems_keep_their_order():
    answers = [[f"{i}", f"{i + 1}", None] for i in range(40)]
    found = grade_problems(answers, [str(i) for i in range(40)], Scripted(), num_workers=4)
    assert all(judged.correct == [True, False, None] for judged in found)
    found = grade_problems([["a"], ["b"]], ["x", "b"], Scripted({"x": "ungradable"}))
    assert found[0] is None and found[1].correct == [True]


def test_answers_are_not_reported_as_references(caplog):
    """Candidates that cannot be read were listed as unreadable references, and the user was asked to rewrite them."""
    with AnswerGrader() as grader, caplog.at_level(logging.WARNING, logger="trl_hrm"):
        grade_problems([["???", r"\frac{1}{", "3"]] * 2, ["3", None], grader, grades=[None, [False, False, True]])
        assert grader.unreadable_references() == []
        grader.close()
    assert not caplog.text
