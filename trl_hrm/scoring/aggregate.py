"""From the scores of its steps to the score of a solution."""

import math
from collections.abc import Sequence

from ..data.raft_config import AGGREGATES


def aggregate(scores: Sequence[float], name: str) -> float:
    """
    The score of a solution.

    Args:
        scores (`Sequence[float]`):
            Scores of its S steps, in `[0, 1]`.
        name (`str`):
            `"min"`, the weakest step; `"prod"`, the probability that all are right if they are independent; `"last"`;
            `"mean"`; `"max"`.

    Returns:
        `float`: The score, in `[0, 1]`.

    Raises:
        `ValueError`: If there is no score, or no such aggregate.

    Example:

    ```python
    >>> aggregate([0.5, 0.25, 0.75], "min")
    0.25
    ```
    """
    if name not in AGGREGATES:
        raise ValueError(f"aggregate is {name!r}, expected one of {', '.join(AGGREGATES)}.")
    if not len(scores):
        raise ValueError("aggregate: got no score, expected one for each step of a solution.")
    if name == "last":
        return float(scores[-1])
    if name == "mean":
        return math.fsum(scores) / len(scores)
    return float({"min": min, "max": max, "prod": math.prod}[name](scores))
