"""Answers of one problem: which of them are equivalent, and which are right."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


_INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # longer ones Python refuses to read


@dataclass(frozen=True)
class JudgedAnswers:
    """
    What is known of N answers.

    Args:
        classes (`list[int | None]`):
            Equal numbers for equivalent answers, `None` for no answer.
        correct (`list[bool | None]`):
            Whether each answer is right. `None` for no answer, and for one that the grader was not done with when its time
            ran out, or died of.
        num_unreadable (`int`):
            How many of them the grader could not read or compare with the reference. They count as wrong.
    """

    classes: list[int | None]
    correct: list[bool | None]
    num_unreadable: int


def judge_answers(answers: Sequence[str | None], reference: str, grader: Any) -> JudgedAnswers | None:
    """
    Put equivalent answers together, and tell the right ones.

    Equivalent are equal texts, up to space around them, and those that the grader finds equal. The reference has no part in it:
    votes must not know it. An answer joins the first class whose first answer equals it, in alphabetical order, so that the
    order of the answers does not matter.

    Args:
        answers (`Sequence[str | None]`):
            N answers, `None` for a solution that states none.
        reference (`str`):
            The right answer.
        grader ([`~grading.AnswerGrader`]):
            Compares answers. Anything with its `grade`.

    Returns:
        [`JudgedAnswers`] or `None`: `None` if the reference cannot be read, so that no answer can be judged.
    """
    if not grader.grade(reference, reference).correct:
        return None
    stripped = [answer and answer.strip() or None for answer in answers]
    distinct = sorted({answer for answer in stripped if answer is not None})
    grades = {answer: grader.grade(answer, reference) for answer in distinct}
    # one that the grader cannot cope with beside the reference would cost its deadline again beside each other answer
    comparable = [answer for answer in distinct if grades[answer].status not in ("timeout", "died")]
    classes = _classes(comparable, grader)
    for answer in distinct:
        classes.setdefault(answer, len(classes))
    correct = {answer: False if grade.status == "unparseable" else grade.correct for answer, grade in grades.items()}
    return JudgedAnswers(
        [None if answer is None else classes[answer] for answer in stripped],
        [None if answer is None else correct[answer] for answer in stripped],
        sum(answer is not None and grades[answer].status == "unparseable" for answer in stripped),
    )


def judge_problems(
    answers: Sequence[Sequence[str | None]], references: Sequence[str], grader: Any, num_workers: int = 1
) -> list[JudgedAnswers | None]:
    """
    [`judge_answers`] of many problems, `num_workers` of them at a time.

    Args:
        answers (`Sequence[Sequence[str | None]]`):
            Answers of P problems.
        references (`Sequence[str]`):
            P right answers.
        grader ([`~grading.AnswerGrader`]):
            Compares answers.
        num_workers (`int`, *optional*, defaults to `1`):
            Number of threads, as many as the grader has processes.
    """
    with ThreadPoolExecutor(num_workers) as threads:
        return list(threads.map(lambda pair: judge_answers(*pair, grader), zip(answers, references, strict=True)))


def _classes(answers: Sequence[str], grader: Any) -> dict[str, int]:
    """The class of each of several different answers."""
    firsts: list[str] = []
    classes: dict[str, int] = {}
    for answer in answers:
        place = next((i for i, first in enumerate(firsts) if _equal(answer, first, grader)), len(firsts))
        if place == len(firsts):
            firsts.append(answer)
        classes[answer] = place
    return classes


def _equal(answer: str, other: str, grader: Any) -> bool:
    if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(other):  # most answers: no need to ask
        return int(answer) == int(other)
    return grader.grade(answer, other).correct is True
