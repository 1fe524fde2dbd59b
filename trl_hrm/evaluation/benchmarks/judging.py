"""The one way in which the solutions of all benchmarks are scored: each once, those of a problem together."""

import math
from collections.abc import Sequence
from typing import Literal

from tqdm.auto import tqdm

from ...data.grouping import group_equal
from ...scoring.candidate_scores import fits
from ...scoring.paths import TreeScorer
from .reading import Solution


BLOCK = 32  # problems that are encoded at a time


def score_solutions(
    scorer: TreeScorer,
    solutions: Sequence[Solution],
    spans: Sequence[int] = (1,),
    combine: Literal["max", "mean"] = "max",
    progress: bool = False,
) -> list[list[float] | None]:
    """
    Score the steps of solutions.

    Args:
        scorer ([`TreeScorer`]):
            The reward model.
        solutions (`Sequence[Solution]`):
            The solutions. Those with one problem are scored together, so that a scorer may share what they begin with.
        spans, combine:
            How steps are scored. See [`TreeScorer.score`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[list[float] | None]`: For each solution the scores of its S steps in `[0, 1]`; `None` for one that has more
        tokens than the model has positions.

    Raises:
        `ValueError`: If a score is not a number, or there is not one for each step.
    """
    scores: list[list[float] | None] = [None] * len(solutions)
    problems = group_equal(solution.problem for solution in solutions)
    with tqdm(total=len(solutions), desc="Scoring", unit="solution", disable=not progress) as bar:
        for start in range(0, len(problems), BLOCK):
            block = problems[start : start + BLOCK]
            fitting = [
                [i for i in members if fits(scorer, solutions[i].problem, solutions[i].steps, spans)]
                for members in block
            ]
            asked = [members for members in fitting if members]
            found = scorer.score(
                [solutions[members[0]].problem for members in asked],
                [[solutions[i].steps for i in members] for members in asked],
                spans=spans,
                combine=combine,
            )
            for members, values in zip(asked, found, strict=True):
                for i, steps in zip(members, values, strict=True):
                    scores[i] = _checked(solutions[i], steps)
            bar.update(sum(map(len, block)))
    return scores


def _checked(solution: Solution, scores: Sequence[float]) -> list[float]:
    if len(scores) != len(solution.steps) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{solution.where}: the reward model returned {list(scores)} for {len(solution.steps)} steps, expected one number "
            "for each. Check the model."
        )
    return list(scores)
