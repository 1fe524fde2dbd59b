"""
Select one of N solutions: pure functions of scores, classes of equivalent answers, and texts.

Ties go to the smallest text, so the result does not depend on the order of the solutions. Solutions with equal texts
each have a vote.
"""

import math
from collections.abc import Hashable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ..io import shown


def best_of_n(scores: Sequence[float | None], texts: Sequence[Any]) -> int:
    """
    Return the index of the solution with the highest score.

    Args:
        scores (`Sequence[float | None]`):
            N scores. Solutions without a score (`None`) come last.
        texts (`Sequence`):
            N texts, or their ranks. Among equal scores, the smallest text wins.

    Returns:
        `int`: Index of the solution.

    Raises:
        `ValueError`: If the lists are empty or have different lengths, or a score is NaN.

    Example:

    ```python
    >>> best_of_n([0.2, 0.9, 0.9], ["a", "c", "b"])
    2
    ```
    """
    return ranked(scores, texts)[0]


def ranked(scores: Sequence[float | None], texts: Sequence[Any]) -> list[int]:
    """
    Return the indices of all solutions in the order in which [`best_of_n`] prefers them.

    Args:
        scores, texts:
            See [`best_of_n`].

    Returns:
        `list[int]`: N indices, the best solution first.

    Raises:
        `ValueError`: If the lists are empty or have different lengths, or a score is NaN.

    Example:

    ```python
    >>> ranked([0.2, 0.9, 0.9, None], ["a", "c", "b", "d"])
    [2, 1, 0, 3]
    ```
    """
    _check(scores, texts)
    for score in scores:
        if score is not None and math.isnan(score):
            raise ValueError(
                f"the scores are {shown(list(scores), 200)}, expected numbers, or None for a missing score."
            )
    return sorted(range(len(scores)), key=lambda i: (scores[i] is None, -(scores[i] or 0.0), texts[i]))


def subset_weights(num_samples: int, n: Sequence[int]) -> np.ndarray:
    r"""
    Return how often each solution is the best of n, over all subsets of n of M solutions.

    The solution at rank i (from 1) is the best one of a subset if the other n - 1 solutions have higher ranks. It is
    therefore selected from \\(\binom{M-i}{n-1}\\) of the \\(\binom{M}{n}\\) subsets. The weights are divided by the weight
    of rank 1. They are computed as products of the ratios of neighbours, which are at most 1, so that large binomial
    coefficients do not overflow.

    Args:
        num_samples (`int`):
            Number of solutions M.
        n (`Sequence[int]`):
            K numbers of drawn solutions, from 1 to M.

    Returns:
        `np.ndarray`: Weight of each rank, from 1 down to 0. Shape `(K, M)`.

    Raises:
        `ValueError`: If a number is out of range.

    Example:

    ```python
    >>> subset_weights(3, [1, 2, 3]).tolist()
    [[1.0, 1.0, 1.0], [1.0, 0.5, 0.0], [1.0, 0.0, 0.0]]
    ```
    """
    if not len(n) or not 1 <= min(n) <= max(n) <= num_samples:
        raise ValueError(f"subset_weights: got n={list(n)}, expected numbers from 1 to {num_samples}.")
    ranks, drawn = np.arange(1, num_samples), np.array(n)[:, None]
    ratios = np.maximum(num_samples - ranks - drawn + 1, 0) / (num_samples - ranks)
    return np.cumprod(np.hstack([np.ones((len(drawn), 1)), ratios]), axis=1)


def majority_vote(classes: Sequence[Hashable | None], texts: Sequence[Any]) -> int:
    """
    Return the index of a solution with the most frequent answer.

    Args:
        classes (`Sequence[Hashable | None]`):
            Class of the answer of each of N solutions. Equivalent answers have the same class. Solutions without an
            answer (`None`) have no vote, and are only selected if no solution has an answer.
        texts (`Sequence`):
            See [`best_of_n`]. Among answers with equal votes, the answer of the smallest text wins.

    Returns:
        `int`: Index of the smallest text among the solutions with this answer.

    Raises:
        `ValueError`: If the lists are empty or have different lengths.

    Example:

    ```python
    >>> majority_vote([0, 1, 1, None], ["a", "c", "b", "d"])
    2
    ```
    """
    return weighted_vote(classes, [1.0] * len(classes), texts)


def weighted_vote(classes: Sequence[Hashable | None], scores: Sequence[float | None], texts: Sequence[Any]) -> int:
    """
    Return the index of the best solution with the answer that has the highest sum of scores.

    Args:
        classes (`Sequence[Hashable | None]`):
            See [`majority_vote`].
        scores (`Sequence[float | None]`):
            N weights of at least 0. Solutions without a score (`None`) have weight 0.
        texts (`Sequence`):
            See [`majority_vote`].

    Returns:
        `int`: Index of the [`best_of_n`] solution with this answer.

    Raises:
        `ValueError`: If the lists are empty or have different lengths, or a weight is negative or NaN.

    Example:

    ```python
    >>> weighted_vote([0, 1, 1], [0.9, 0.5, 0.6], ["a", "b", "c"])
    2
    ```
    """
    _check(scores, texts)
    _check(classes, texts)
    if not all(score is None or score >= 0 for score in scores):
        raise ValueError(
            f"the weights of the votes are {shown(list(scores), 200)}, expected numbers of at least 0, or None."
        )
    members: dict[Hashable | None, list[int]] = {}
    for i, group in enumerate(classes):
        members.setdefault(group, []).append(i)
    if len(members) > 1:
        members.pop(None, None)

    def rank(voters: list[int]) -> tuple[float, Any]:
        # exact sum, since rounding errors depend on the order
        return -math.fsum(scores[i] or 0.0 for i in voters), min(texts[i] for i in voters)

    elected = min(members.values(), key=rank)
    return elected[best_of_n([scores[i] for i in elected], [texts[i] for i in elected])]


def pass_at_n(num_samples: int, num_right: int, n: int) -> float:
    """
    Return the probability that at least one of n solutions, drawn from `num_samples` without replacement, is correct.

    This is the unbiased estimator 1 - C(num_samples - num_right, n) / C(num_samples, n) of
    [Chen et al.](https://huggingface.co/papers/2107.03374), computed with integers and rounded once.

    Args:
        num_samples (`int`):
            Number of sampled solutions.
        num_right (`int`):
            Number of correct solutions among them.
        n (`int`):
            Number of drawn solutions.

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
            f"pass_at_n: got num_samples={num_samples}, num_right={num_right} and n={n}, expected 0 <= num_right <= num_samples "
            "and 1 <= n <= num_samples. Sample more solutions, or use a smaller n."
        )
    return float(1 - Fraction(math.comb(num_samples - num_right, n), math.comb(num_samples, n)))


def _check(values: Sequence[Any], texts: Sequence[Any]) -> None:
    if not len(values) or len(values) != len(texts):
        raise ValueError(
            f"got {len(values)} values for {len(texts)} texts, expected one value per text and at least one text."
        )
