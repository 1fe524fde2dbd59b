"""
Means over seeds with their intervals, and what an interval settles.

Two reward models of one recipe can differ by more than the error of the test set tells, so that a claim about a recipe is
settled by several seeds or not at all.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..pages.numbers import percent


MIN_SEEDS = 3  # with fewer, an interval is as wide as the scale, or does not exist
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Answer = Literal["held", "not held", "open"]


@dataclass(frozen=True)
class Spread:
    """
    A number over seeds.

    Args:
        values (`tuple[float, ...]`):
            One for each seed.
        mean (`float`):
            Their mean.
        low, high (`float`, *optional*):
            Its 95 % interval. `None` where the seeds are too few, or all equal: they then say nothing about how much seeds differ.
    """

    values: tuple[float, ...]
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the seeds have an interval."""
        return (
            len(self.values) >= MIN_SEEDS and self.low is not None and self.high is not None and self.low < self.high
        )


def spread(values: Sequence[float]) -> Spread:
    """
    Mean and t interval.

    Args:
        values (`Sequence[float]`):
            One value for each seed: for two reward models with the same seeds, their differences.

    Returns:
        [`Spread`]: Without an interval for fewer than three seeds, and for values that are all equal.

    Example:

    ```python
    >>> spread([1.0, 2.0, 3.0]).high
    4.484...
    ```
    """
    mean = statistics.fmean(values)
    if (
        len(values) < MIN_SEEDS or max(values) - min(values) < 1e-9
    ):  # differences of equal shares may differ by rounding
        return Spread(tuple(values), mean)
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return Spread(tuple(values), mean, mean - half, mean + half)


def paired(
    seeds: Sequence[int], values: Sequence[float], other_seeds: Sequence[int], others: Sequence[float]
) -> Spread:
    """
    Differences of two reward models, seed by seed.

    Raises:
        `ValueError`: If they have no seed in common.
    """
    theirs = dict(zip(other_seeds, others, strict=True))
    common = [value - theirs[seed] for seed, value in zip(seeds, values, strict=True) if seed in theirs]
    if not common:
        raise ValueError(
            f"Two models to compare have the seeds {list(seeds)} and {list(other_seeds)}, expected some in common: what is "
            "compared seed by seed shares its data. Train both with the same seeds."
        )
    return spread(common)


def judge(difference: Spread) -> Answer:
    """Whether a difference that is claimed to be above 0 is so, by its interval."""
    if not difference.is_settled:
        return "open"
    return "held" if difference.low > 0 else "not held" if difference.high < 0 else "open"


def judge_all(answers: Sequence[Answer]) -> Answer:
    """A claim of several parts is held if all are, and not held if one is not."""
    if "not held" in answers:
        return "not held"
    return "held" if all(answer == "held" for answer in answers) else "open"


def signed(value: float, digits: int = 1) -> str:
    """
    A number with its sign.

    Example:

    ```python
    >>> signed(-0.25)
    '−0.2'
    ```
    """
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def told(found: Spread, scale: float = 100, unit: str = " points", digits: int = 1, each: str = "seed") -> str:
    """
    A difference with what is known of it.

    Example:

    ```python
    >>> told(spread([0.1, 0.2, 0.3]))
    '+20.0 points (95 % interval over 3 seeds −4.8 to +44.8)'
    >>> told(spread([0.1]))
    '+10.0 points (1 seed)'
    ```
    """
    mean = f"{signed(scale * found.mean, digits)}{unit}"
    number = f"{len(found.values)} {each}{'s' * (len(found.values) != 1)}"
    if not found.is_settled:
        return f"{mean} ({number})"
    return f"{mean} (95 % interval over {number} {interval(found, scale, digits)})"


def interval(found: Spread, scale: float = 100, digits: int = 1) -> str:
    """The interval alone, a dash where there is none."""
    if not found.is_settled:
        return "–"
    return f"{signed(scale * found.low, digits)} to {signed(scale * found.high, digits)}"


def mean_share(values: Sequence[float]) -> str:
    """Mean of shares over seeds in percent, with the lowest and the highest where there are several."""
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def mean_number(values: Sequence[float | None], form: str = ".2f") -> str:
    """The same of numbers that are not shares, in a format. A dash where one was not measured."""
    if None in values or not values:
        return "–"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
