"""
Which of N solutions to take: pure functions of scores, of classes of equivalent answers, and of texts.

Ties go to the smallest text, so that no choice depends on the order of the solutions. Each of several equal texts has a vote.
"""

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any


def best_of_n(scores: Sequence[float | None], texts: Sequence[Any]) -> int:
    """
    Return the solution with the highest score.

    Args:
        scores (`Sequence[float | None]`):
            N scores. One that could not be scored, `None`, comes after all others.
        texts (`Sequence`):
            N texts, or anything that orders and equals as they do. Of equal scores the smallest text wins.

    Returns:
        `int`: Index of the solution.

    Raises:
        `ValueError`: If no solutions are given, the lists do not match, or a score is not a number.

    Example:

    ```python
    >>> best_of_n([0.2, 0.9, 0.9], ["a", "c", "b"])
    2
    ```
    """
    _check(scores, texts)
    for score in scores:
        if score is not None and math.isnan(score):
            raise ValueError(f"the scores are {list(scores)}, expected numbers, or None where there is no score.")
    return min(range(len(scores)), key=lambda i: (scores[i] is None, -(scores[i] or 0.0), texts[i]))


def majority_vote(classes: Sequence[Hashable | None], texts: Sequence[Any]) -> int:
    """
    Return a solution with the answer that most solutions have.

    Args:
        classes (`Sequence[Hashable | None]`):
            For each of N solutions which answer it has: equivalent answers are one class. `None` for a solution without an
            answer, which has no vote and is taken only where no solution has one.
        texts (`Sequence`):
            See [`best_of_n`]. Of answers with equally many votes, the one whose solutions have the smallest text wins.

    Returns:
        `int`: Index of the elected answer's solution with the smallest text.

    Raises:
        `ValueError`: If no solutions are given, or the lists do not match.

    Example:

    ```python
    >>> majority_vote([0, 1, 1, None], ["a", "c", "b", "d"])
    2
    ```
    """
    return weighted_vote(classes, [1.0] * len(classes), texts)


def weighted_vote(classes: Sequence[Hashable | None], scores: Sequence[float | None], texts: Sequence[Any]) -> int:
    """
    Return a solution with the answer whose solutions have the highest sum of scores.

    Args:
        classes (`Sequence[Hashable | None]`):
            See [`majority_vote`].
        scores (`Sequence[float | None]`):
            N weights, 0 or more. A solution that could not be scored, `None`, has weight 0.
        texts (`Sequence`):
            See [`majority_vote`].

    Returns:
        `int`: Index of the elected answer's best solution: see [`best_of_n`].

    Raises:
        `ValueError`: If no solutions are given, the lists do not match, or a weight is below 0 or not a number.

    Example:

    ```python
    >>> weighted_vote([0, 1, 1], [0.9, 0.5, 0.6], ["a", "b", "c"])
    2
    ```
    """
    _check(scores, texts)
    _check(classes, texts)
    if not all(score is None or score >= 0 for score in scores):
        raise ValueError(f"the weights of the votes are {list(scores)}, expected numbers of 0 or more, or None.")
    members: dict[Hashable | None, list[int]] = {}
    for i, group in enumerate(classes):
        members.setdefault(group, []).append(i)
    if len(members) > 1:
        members.pop(None, None)

    def rank(voters: list[int]) -> tuple[float, Any]:
        # summed exactly: rounding would depend on the order
        return -math.fsum(scores[i] or 0.0 for i in voters), min(texts[i] for i in voters)

    elected = min(members.values(), key=rank)
    return elected[best_of_n([scores[i] for i in elected], [texts[i] for i in elected])]


def pass_at_n(num_samples: int, num_right: int, n: int) -> float:
    """
    Return the probability that at least one of n solutions, drawn from `num_samples` without replacement, is right: the unbiased
    estimator 1 - C(num_samples - num_right, n) / C(num_samples, n) of [Chen et al.](https://huggingface.co/papers/2107.03374),
    computed in whole numbers and rounded once.

    Args:
        num_samples (`int`):
            Number of solutions that were sampled.
        num_right (`int`):
            Number of right ones among them.
        n (`int`):
            Number of solutions that may be tried.

    Raises:
        `ValueError`: If a number is out of range.

    Example:

    ```python
    >>> pass_at_n(4, 1, 2)
    0.5
    ```
    """
    if not 0 <= num_right <= num_samples or not 1 <= n <= num_samples:
        raise ValueError(
            f"pass_at_n: {num_right} right of {num_samples} samples, n={n}; expected 0 <= num_right <= num_samples and "
            "1 <= n <= num_samples. Sample more solutions, or ask for a smaller n."
        )
    return float(1 - Fraction(math.comb(num_samples - num_right, n), math.comb(num_samples, n)))


def _check(values: Sequence[Any], texts: Sequence[Any]) -> None:
    if not len(values) or len(values) != len(texts):
        raise ValueError(
            f"got {len(values)} values for {len(texts)} texts, expected one each for at least one solution."
        )
