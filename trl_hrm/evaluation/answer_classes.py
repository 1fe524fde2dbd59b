"""Answers of one problem: which of them are equivalent, and which are right."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # longer ones Python refuses to read


@dataclass(frozen=True)
class GradedAnswers:
    """
    Grades of N answers.

    Args:
        classes (`list[int | None]`):
            Equal numbers for equivalent answers, `None` for no answer.
        correct (`list[bool | None]`):
            Whether each answer is right. `None` for no answer, and for one that the grader was not done with when its time
            ran out, or died of.
        num_unreadable (`int`):
            Number of answers that the grader could not read or compare with the reference. They count as wrong.
    """

    classes: list[int | None]
    correct: list[bool | None]
    num_unreadable: int


def grade_answers(answers: Sequence[str | None], reference: str, grader: Any) -> GradedAnswers | None:
    """
    Group equivalent answers, and grade them.

    Answers are equivalent if their texts are equal, up to surrounding space, or the grader finds them equal. The reference plays no
    part in this: votes must not know it. An answer joins the first class whose first answer equals it, in alphabetical order, so that the
    order of the answers does not matter.

    Args:
        answers (`Sequence[str | None]`):
            N answers, `None` for a solution that states none.
        reference (`str`):
            The right answer.
        grader ([`~grading.AnswerGrader`]):
            Compares answers. Anything with its `grade`.

    Returns:
        [`GradedAnswers`] or `None`: `None` if the reference cannot be read, so that no answer can be graded.
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
    Group equivalent answers as [`grade_answers`] does, and keep the grades that their solutions came with.

    Args:
        answers (`Sequence[str | None]`):
            N answers, `None` for a solution that states none.
        grades (`Sequence[bool | None]`):
            N grades.
        grader ([`~grading.AnswerGrader`]):
            Compares answers.
    """
    stripped = [answer and answer.strip() or None for answer in answers]
    distinct = sorted({answer for answer in stripped if answer is not None})
    classes = _classes({answer: grader.grade(answer, answer).status for answer in distinct}, grader)
    return GradedAnswers([None if answer is None else classes[answer] for answer in stripped], list(grades), 0)


def grade_problems(
    answers: Sequence[Sequence[str | None]],
    references: Sequence[str | None],
    grader: Any,
    num_workers: int = 1,
    grades: Sequence[Sequence[bool | None] | None] | None = None,
) -> list[GradedAnswers | None]:
    """
    [`grade_answers`] of many problems, `num_workers` of them at a time, or [`keep_grades`] of those that have grades.

    Args:
        answers (`Sequence[Sequence[str | None]]`):
            Answers of P problems.
        references (`Sequence[str | None]`):
            P right answers. `None` only where there are grades.
        grader ([`~grading.AnswerGrader`]):
            Compares answers.
        num_workers (`int`, *optional*, defaults to `1`):
            Number of threads, as many as the grader has processes.
        grades (`Sequence[Sequence[bool | None] | None]`, *optional*):
            Grades of the solutions of each problem, `None` where they are to be made. By default all are.
    """

    def grade(one: Sequence[str | None], reference: str | None, given: Sequence[bool | None] | None):
        return grade_answers(one, reference, grader) if given is None else keep_grades(one, given, grader)

    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(grade, answers, references, grades or [None] * len(answers)))


def _classes(statuses: dict[str, str], grader: Any) -> dict[str, int]:
    """The class of each of several different answers, given how far the grader came when it compared each for the first time."""
    firsts: list[str] = []
    classes: dict[str, int] = {}
    for answer, status in statuses.items():
        # one that the grader cannot cope with would cost its deadline again with each other answer
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
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(other):  # most answers: no need to ask
        return int(answer) == int(other)
    return grader.grade(answer, other).correct is True
