"""Aggregate the scores of the steps of a solution into one score."""

import math
from collections.abc import Callable, Sequence

from ..io import shown


AGGREGATES = ("min", "prod", "last", "mean", "max")

Aggregate = str | Callable[[Sequence[float]], float]


def aggregate(scores: Sequence[float], name: Aggregate) -> float:
    """
    Return the score of a solution.

    Args:
        scores (`Sequence[float]`):
            Scores of the S steps of the solution, in `[0, 1]`.
        name (`str` or `Callable[[Sequence[float]], float]`):
            `"min"` (weakest step), `"prod"` (probability that all steps are correct, if they are independent), `"last"`,
            `"mean"`, `"max"`, or a custom function.

    Returns:
        `float`: The score, in `[0, 1]` unless a custom function returns another number.

    Raises:
        `ValueError`: If `scores` is empty or contains NaN, the aggregate is unknown, or a custom function returns NaN.

    Example:

    ```python
    >>> aggregate([0.5, 0.25, 0.75], "min")
    0.25
    >>> aggregate([0.5, 0.25, 0.75], lambda scores: min(scores[1:]))
    0.25
    ```
    """
    if not callable(name) and name not in AGGREGATES:
        raise ValueError(f"`aggregate` is {shown(name)}. It must be one of {', '.join(AGGREGATES)}, or a function.")
    if not len(scores):
        raise ValueError("aggregate: `scores` is empty. Each step of a solution must have a score.")
    if any(map(math.isnan, scores)):  # the result of `min` and `max` would depend on the position of the NaN
        raise ValueError(f"aggregate: the scores {shown(list(scores), 200)} contain NaN. They must be numbers.")
    if callable(name):
        value = float(name(scores))
        if math.isnan(value):
            raise ValueError(
                f"aggregate: {aggregate_name(name)} returned NaN for the scores {shown(list(scores), 200)}."
            )
        return value
    if name == "last":
        return float(scores[-1])
    if name == "mean":
        return math.fsum(scores) / len(scores)
    return float({"min": min, "max": max, "prod": math.prod}[name](scores))


def aggregate_name(name: Aggregate) -> str:
    """Return the name of an aggregate that is used in results."""
    return getattr(name, "__name__", type(name).__name__) if callable(name) else name
