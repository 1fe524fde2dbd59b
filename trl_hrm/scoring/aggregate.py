"""From the scores of its steps to the score of a solution."""

import math
from collections.abc import Callable, Sequence


AGGREGATES = ("min", "prod", "last", "mean", "max")

Aggregate = str | Callable[[Sequence[float]], float]


def aggregate(scores: Sequence[float], name: Aggregate) -> float:
    """
    Return the score of a solution.

    Args:
        scores (`Sequence[float]`):
            Scores of its S steps, in `[0, 1]`.
        name (`str` or `Callable[[Sequence[float]], float]`):
            `"min"`, the weakest step; `"prod"`, the probability that all are right if they are independent; `"last"`;
            `"mean"`; `"max"`. Or a function of your own.

    Returns:
        `float`: The score, in `[0, 1]` unless a function of your own gives another number.

    Raises:
        `ValueError`: If there are no scores, a score is NaN, the aggregate is unknown, or a function returns NaN.

    Example:

    ```python
    >>> aggregate([0.5, 0.25, 0.75], "min")
    0.25
    >>> aggregate([0.5, 0.25, 0.75], lambda scores: min(scores[1:]))
    0.25
    ```
    """
    if not callable(name) and name not in AGGREGATES:
        raise ValueError(f"aggregate is {name!r}, expected one of {', '.join(AGGREGATES)}, or a function.")
    if not len(scores):
        raise ValueError("aggregate: got no score, expected one for each step of a solution.")
    if any(map(math.isnan, scores)):  # compared with others it would be the least or not by its place
        raise ValueError(f"aggregate: the scores are {list(scores)}, expected numbers.")
    if callable(name):
        value = float(name(scores))
        if math.isnan(value):
            raise ValueError(f"aggregate: {aggregate_name(name)} gives no number for the scores {list(scores)}.")
        return value
    if name == "last":
        return float(scores[-1])
    if name == "mean":
        return math.fsum(scores) / len(scores)
    return float({"min": min, "max": max, "prod": math.prod}[name](scores))


def aggregate_name(name: Aggregate) -> str:
    """Return the name of an aggregate, as results have it."""
    return getattr(name, "__name__", type(name).__name__) if callable(name) else name
