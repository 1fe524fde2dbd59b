"""
Means and intervals over seeds, and the claims that they settle.

Two reward models trained with the same recipe can differ by more than the sampling error of the test set. So claims about a recipe need
several seeds.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ..intervals import T_QUANTILES
from ..pages.numbers import percent


MIN_SEEDS = 3  # with two seeds, the interval is too wide to be useful

Answer = Literal["held", "not held", "open"]


@dataclass(frozen=True)
class Spread:
    """
    A quantity measured with several seeds.

    Args:
        values (`tuple[float, ...]`):
            One value per seed.
        mean (`float`):
            Mean of the values.
        low, high (`float`, *optional*):
            95 % interval of the mean. `None` if there are too few seeds, or if all values are equal and give no estimate of the variance.
    """

    values: tuple[float, ...]
    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether there is an interval over seeds."""
        return (
            len(self.values) >= MIN_SEEDS and self.low is not None and self.high is not None and self.low < self.high
        )


def spread(values: Sequence[float]) -> Spread:
    """
    Return the mean and the t interval of values over seeds.

    Args:
        values (`Sequence[float]`):
            One value per seed. To compare two reward models, pass the differences per seed.

    Returns:
        [`Spread`]: Mean and interval. There is no interval for fewer than three seeds, or if all values are equal.

    Example:

    ```python
    >>> spread([1.0, 2.0, 3.0]).high
    4.484...
    ```
    """
    mean = statistics.fmean(values)
    if len(values) < MIN_SEEDS or max(values) - min(values) < 1e-9:  # equal values can differ by rounding
        return Spread(tuple(values), mean)
    quantile = T_QUANTILES[min(len(values) - 1, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return Spread(tuple(values), mean, mean - half, mean + half)


def paired(
    seeds: Sequence[int], values: Sequence[float], other_seeds: Sequence[int], others: Sequence[float]
) -> Spread:
    """
    Return the differences between two reward models with the same seeds.

    Raises:
        `ValueError`: If the models have no common seed.
    """
    theirs = dict(zip(other_seeds, others, strict=True))
    common = [value - theirs[seed] for seed, value in zip(seeds, values, strict=True) if seed in theirs]
    if not common:
        raise ValueError(
            f"The models to compare have the seeds {list(seeds)} and {list(other_seeds)}, without a common seed. Train both with the "
            "same seeds."
        )
    return spread(common)


def judge(difference: Spread) -> Answer:
    """Return whether the claim that a difference is above 0 holds, by its interval."""
    if not difference.is_settled:
        return "open"
    return "held" if difference.low > 0 else "not held" if difference.high < 0 else "open"


def judge_all(answers: Sequence[Answer]) -> Answer:
    """Combine the parts of a claim: `"held"` if all parts are, `"not held"` if one part is not, otherwise `"open"`."""
    if "not held" in answers:
        return "not held"
    return "held" if all(answer == "held" for answer in answers) else "open"


def signed(value: float, digits: int = 1) -> str:
    """
    Format a number with its sign.

    Example:

    ```python
    >>> signed(-0.25)
    '−0.2'
    ```
    """
    return f"{round(value, digits) + 0.0:+.{digits}f}".replace("-", "−")  # + 0.0: no negative zero


def told(found: Spread, scale: float = 100, unit: str = " points", digits: int = 1, each: str = "seed") -> str:
    """
    Format a difference with its interval, or with the number of seeds if there is no interval.

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
    """Format the interval, or return a dash if there is none."""
    if not found.is_settled:
        return "–"
    low, high = (f"{scale * end + 0.0:+.{digits}f}".replace("-", "−") for end in (found.low, found.high))
    return f"{low} to {high}"  # an end below 0 keeps its sign, so that an interval that excludes 0 looks like one


def mean_share(values: Sequence[float]) -> str:
    """Format the mean of shares over seeds in percent, with the lowest and the highest if there are several."""
    mean = percent(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def mean_number(values: Sequence[float | None], form: str = ".2f") -> str:
    """Format the mean of numbers over seeds, like [`mean_share`]. Return a dash if one was not measured."""
    if None in values or not values:
        return "–"
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"
