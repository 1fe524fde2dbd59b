"""Group equivalent answers to a problem, and grade them."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # `int` has a limit of 4,300 digits


@dataclass(frozen=True)
class GradedAnswers:
    """
    Grades of N answers.

    Args:
        classes (`list[int | None]`):
            Class of each answer. Equivalent answers have the same class. `None` for a missing answer.
        correct (`list[bool | None]`):
            Whether each answer is correct. `None` if the answer is missing, or if the grader timed out or crashed.
        num_unreadable (`int`):
            Number of answers that the grader could not parse or compare with the reference. They count as wrong.
    """

    classes: list[int | None]
    correct: list[bool | None]
    num_unreadable: int


def grade_answers(answers: Sequence[str | None], reference: str, grader: Any) -> GradedAnswers | None:
    """
    Group equivalent answers, and grade them.

    Two answers are equivalent if their texts are equal, ignoring surrounding whitespace, or if the grader finds them
    equal. The reference is not used for grouping, because votes must not depend on it. Answers are compared in
    alphabetical order, each with the first answer of every class, so the result does not depend on their order.

    Args:
        answers (`Sequence[str | None]`):
            N answers, `None` for a solution without an answer.
        reference (`str`):
            The correct answer.
        grader ([`~grading.AnswerGrader`]):
            Grader that compares answers, or any object with the same `grade` method.

    Returns:
        [`GradedAnswers`] or `None`: `None` if the grader cannot parse the reference.
    """
    if not grader.grade(reference, reference).correct:
        return None
    stripped = [answer and answer.strip() or None for answer in answers]
    distinct = sorted({answer for answer in stripped if answer is not None})
    grades = {answer: grader.grade(answer, reference) for answer in distinct}
    classes = _classes({answer: grade.status for answer, grade in grades.items()}, grader)
    correct = {answer: False if grade.status == "unparseable" else grade.correct for answer, grade in grades.items()}
    return GradedAnswers(
        [None if answer is None else classes[answer] for answer in stripped],
        [None if answer is None else correct[answer] for answer in stripped],
        sum(answer is not None and grades[answer].status == "unparseable" for answer in stripped),
    )


def keep_grades(answers: Sequence[str | None], grades: Sequence[bool | None], grader: Any) -> GradedAnswers:
    """
    Group equivalent answers as [`grade_answers`] does, but keep existing grades.

    Args:
        answers (`Sequence[str | None]`):
            N answers, `None` for a solution without an answer.
        grades (`Sequence[bool | None]`):
            N grades.
        grader ([`~grading.AnswerGrader`]):
            Grader that compares answers.
    """
    stripped = [answer and answer.strip() or None for answer in answers]
    distinct = sorted({answer for answer in stripped if answer is not None})
    classes = _classes(
        {answer: grader.grade(answer, answer, is_reference=False).status for answer in distinct}, grader
    )
    return GradedAnswers([None if answer is None else classes[answer] for answer in stripped], list(grades), 0)


def grade_problems(
    answers: Sequence[Sequence[str | None]],
    references: Sequence[str | None],
    grader: Any,
    num_workers: int = 1,
    grades: Sequence[Sequence[bool | None] | None] | None = None,
) -> list[GradedAnswers | None]:
    """
    Apply [`grade_answers`], or [`keep_grades`] to problems that have grades already, to several problems in parallel.

    Args:
        answers (`Sequence[Sequence[str | None]]`):
            Answers to each of P problems.
        references (`Sequence[str | None]`):
            P correct answers. May be `None` for problems with grades.
        grader ([`~grading.AnswerGrader`]):
            Grader that compares answers.
        num_workers (`int`, *optional*, defaults to `1`):
            Number of threads. Use the number of the grader's processes.
        grades (`Sequence[Sequence[bool | None] | None]`, *optional*):
            Existing grades of each problem, `None` for problems to grade. By default all problems are graded.
    """

    def grade(one: Sequence[str | None], reference: str | None, given: Sequence[bool | None] | None):
        return grade_answers(one, reference, grader) if given is None else keep_grades(one, given, grader)

    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(grade, answers, references, grades or [None] * len(answers)))


def _classes(statuses: dict[str, str], grader: Any) -> dict[str, int]:
    """Return the class of each distinct answer. `statuses` are the statuses of the first grade of each answer."""
    firsts: list[str] = []
    classes: dict[str, int] = {}
    for answer, status in statuses.items():
        # each further comparison would run into the grader's time limit again
        if status in ("timeout", "died"):
            continue
        place = next((i for i, first in enumerate(firsts) if _equal(answer, first, grader)), len(firsts))
        if place == len(firsts):
            firsts.append(answer)
        classes[answer] = place
    for answer in statuses:
        classes.setdefault(answer, len(classes))
    return classes


def _equal(answer: str, other: str, grader: Any) -> bool:
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(other):  # the common case, without the grader
        return int(answer) == int(other)
    return grader.grade(answer, other, is_reference=False).correct is True
