"""
95 % confidence intervals over problems, for accuracies, for differences of two accuracies on the same problems, and
for the metrics of benchmarks.

A plain bootstrap cannot draw outcomes that were never observed: if no problem or every problem is solved, all
resamples have the same mean and the interval has zero width. Intervals of accuracies therefore invert a score test,
and the bootstrap for benchmarks has a prior. Both have a positive width at 0 of n and n of n.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np


Z = NormalDist().inv_cdf(0.975)  # of 95 % intervals
NUM_DRAWS = 1000  # number of bootstrap draws
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom
T_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def wilson_interval(successes: float, total: float) -> tuple[float, float]:
    """
    Return Wilson's score interval of a proportion ([Wilson, 1927](https://doi.org/10.1080/01621459.1927.10502953)).

    Args:
        successes (`float`):
            Number of successes. May be fractional.
        total (`float`):
            Number of trials, above 0.

    Returns:
        `tuple[float, float]`: Lower and upper bound of the 95 % interval.

    Example:

    ```python
    >>> wilson_interval(0, 10)
    (0.0, 0.2775...)
    ```
    """
    p, z2 = successes / total, Z * Z
    center = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total * total)) / (1 + z2 / total)
    # at 0 and 1, rounding errors could exclude the estimate itself
    return 0.0 if p == 0 else max(center - half, 0.0), 1.0 if p == 1 else min(center + half, 1.0)


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """
    Return the interval of the mean of values in `[0, 1]`, one per problem.

    For values of 0 and 1 this is [`wilson_interval`]. Shares of subsets vary less than single outcomes and count as
    more trials. See [`effective_size`]. The interval covers the variance between problems and the variance of the
    candidates of each problem, since both affect the values.

    Args:
        values (`np.ndarray`):
            Share of subsets in which each problem is solved (0 or 1 for a single outcome).

    Example:

    ```python
    >>> mean_interval(np.array([0.0, 1.0, 1.0, 1.0]))
    (0.3006..., 0.9544...)
    ```
    """
    size = effective_size(values)
    return wilson_interval(float(values.mean()) * size, size)


def difference_interval(values: np.ndarray, comparisons: int = 1) -> tuple[float, float]:
    """
    Return the interval of the mean of paired differences in `[-1, 1]`, one per problem.

    For differences of single outcomes (-1, 0 and 1) this is Tango's score interval (Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design, Statistics in Medicine 17, 1998). If all
    differences are 0, its bounds are plus and minus the upper bound of Wilson's interval at 0 of n. Differences of
    shares count as more pairs. See [`effective_size`].

    Args:
        values (`np.ndarray`):
            Difference of each problem.
        comparisons (`int`, *optional*, defaults to `1`):
            Number of intervals that must hold together with 95 % confidence. Each of them gets wider (Bonferroni correction).

    Example:

    ```python
    >>> difference_interval(np.zeros(10))
    (-0.2775..., 0.2775...)
    ```
    """
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    size = effective_size(values, lowest=-1, z=z)
    more, less = np.maximum(values, 0).mean() * size, np.maximum(-values, 0).mean() * size

    def statistic(difference: float) -> float:
        """Return the observed minus the hypothetical difference, in standard errors under the hypothesis."""
        b = (2 * size - more + less) * difference - more - less
        c = -less * difference * (1 - difference)
        one_sided = (math.sqrt(max(b * b - 8 * size * c, 0.0)) - b) / (4 * size)  # restricted maximum likelihood
        variance = size * (2 * one_sided + difference * (1 - difference))
        distance = more - less - size * difference
        return distance / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, distance)

    mean = float(values.mean())
    low = -1.0 if mean == -1 else _root(lambda x: statistic(x) - z, -1.0, mean)
    high = 1.0 if mean == 1 else _root(lambda x: statistic(x) + z, mean, 1.0)
    return low, high


def effective_size(values: np.ndarray, lowest: float = 0, z: float = Z) -> float:
    r"""
    Return the number of single outcomes whose mean has the same variance as the mean of the values.

    This is \\(n v / s^2\\), where \\(s^2\\) is the variance of the values and \\(v\\) the variance of single outcomes
    with the same mean. Few or similar values do not show how much the values of other problems can vary. Both
    variances are therefore computed with \\(z^2\\) additional outcomes, one half of them 1 and the other half
    `lowest`. \\(z^2\\) is the number of trials that Wilson's interval adds.

    Args:
        values (`np.ndarray`):
            n values from `lowest` to 1.
        lowest (`float`, *optional*, defaults to `0`):
            Lowest possible outcome: 0, or -1 for differences.
        z (`float`, *optional*, defaults to `1.96`):
            Quantile of the normal distribution that the interval uses.

    Returns:
        `float`: n if all values are -1, 0 or 1, otherwise more.
    """
    added, total = z * z / 2, len(values) + z * z
    mean = (values.sum() + added * (1 + lowest)) / total
    single = (np.abs(values).sum() + added * (1 + abs(lowest))) / total - mean * mean
    variance = ((values * values).sum() + added * (1 + lowest * lowest)) / total - mean * mean
    return float(len(values) * single / variance)


def bootstrap_sums(
    tallies: dict[str, np.ndarray], outcomes: Sequence, seed: int, shared: bool = False
) -> dict[str, np.ndarray]:
    """
    Draw sums of tallies by a Bayesian bootstrap over problems ([Rubin, 1981](https://doi.org/10.1214/aos/1176345338)).

    The weight of each problem is drawn from an exponential distribution. This alone has no variance if all solutions
    of a kind, or none, are classified correctly. Each kind in each subset therefore gets one additional correct and
    one additional incorrect prediction, with weights drawn from Gamma(1/2). This is Jeffreys' prior: with one solution
    per problem, the accuracy is drawn from Beta(k + 1/2, n - k + 1/2).

    Args:
        tallies (`dict[str, np.ndarray]`):
            For each subset, the tallies of its solutions, summed per problem. Shape `(problems, 4)`.
        outcomes (`Sequence`):
            See [`~evaluation.benchmarks.suite.Suite`].
        seed (`int`):
            Seed of the draws.
        shared (`bool`, *optional*, defaults to `False`):
            Whether the subsets share one prior, for metrics over all of them. With a prior for each, such a metric would be drawn as if
            many more problems were judged wrongly.

    Returns:
        `dict[str, np.ndarray]`: Sums for each subset. Shape `(draws, 4)`.
    """
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(NUM_DRAWS, len(next(iter(tallies.values())))))
    basis = np.array(outcomes, dtype=float)  # (kinds, correct or incorrect, 4)
    # number of predictions per problem and kind
    to_kinds = np.linalg.inv(basis.reshape(4, 4))
    judged = {name: (values @ to_kinds).reshape(-1, 2, 2).sum(axis=2) for name, values in tallies.items()}
    parts = sum(counts.any(axis=0) for counts in judged.values()) if shared else np.ones(2)
    sums = {}
    for name, values in tallies.items():
        sums[name] = weights @ values
        for kind, counts in enumerate(judged[name].T):
            if counts.any():  # metrics of a kind that is missing in the subset stay undefined
                prior = rng.gamma(0.5 / parts[kind], size=(NUM_DRAWS, 2)) * counts[counts > 0].mean()
                sums[name] += prior @ basis[kind]
    return sums


def percentile_interval(value: float, drawn: np.ndarray) -> tuple[float | None, float | None]:
    """Return the 2.5 and 97.5 percentiles of the draws, widened to contain the value, or `None` if the value is NaN."""
    if math.isnan(value):
        return None, None
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(min(low, value)), float(max(high, value))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Find the zero of a decreasing function by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
