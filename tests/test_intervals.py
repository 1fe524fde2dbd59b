"""Intervals of accuracies and their differences: exact values, slow references, coverage, and no zero width."""

import math
from statistics import NormalDist

import numpy as np
import pytest

from trl_hrm.evaluation.curves import ScoredProblem, curve_with_gap, make_curves
from trl_hrm.evaluation.selection import subset_weights
from trl_hrm.intervals import Z, difference_interval, effective_size, mean_interval, wilson_interval


def ones(k: int, n: int) -> np.ndarray:
    return np.array([1.0] * k + [0.0] * (n - k))


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (0, 1, 0.0, 0.7935),
        (5, 10, 0.2366, 0.7634),
        (1, 29, 0.0061, 0.1718),  # Newcombe, 1998, table I
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
    ],
)
def test_wilson_by_published_values(k, n, low, high):
    """Also, the mean of 0/1 outcomes in any order gives the same interval as the proportion."""
    assert wilson_interval(k, n) == pytest.approx((low, high), abs=6e-5)
    assert mean_interval(np.random.default_rng(0).permutation(ones(k, n))) == pytest.approx(wilson_interval(k, n))


def restricted_likelihood(b: int, c: int, n: int, difference: float) -> float:
    """Maximise the likelihood of discordant pairs under p12 - p21 = difference by exhaustive search, and return q21."""
    low, high = max(0.0, -difference), (1 - difference) / 2
    tried = np.linspace(low, high, 400_001)[1:-1]
    with np.errstate(divide="ignore"):
        likelihood = (n - b - c) * np.log1p(-(2 * tried + difference)) if n > b + c else np.zeros_like(tried)
        likelihood = likelihood + (b * np.log(tried + difference) if b else 0) + (c * np.log(tried) if c else 0)
    return float(tried[np.argmax(likelihood)])


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 44), (9, 0, 30), (0, 4, 12), (3, 3, 50), (1, 0, 2)])
def test_tango_inverts_its_test(b, c, n):
    """At both bounds the observed difference is 1.96 standard errors away, with the likelihood maximised numerically."""
    values = np.array([1.0] * b + [-1.0] * c + [0.0] * (n - b - c))
    low, high = difference_interval(values)
    for bound, distance in ((low, Z), (high, -Z)):
        q = restricted_likelihood(b, c, n, bound)
        deviation = math.sqrt(n * (2 * q + bound * (1 - bound)))
        assert (b - c - n * bound) / deviation == pytest.approx(distance, abs=2e-3)


def test_tango_for_shares_and_several_comparisons():
    """The same with shares, which count as more pairs, and with the quantile of 10 comparisons."""
    values, z = np.repeat([0.5, -0.25, 0.0], [20, 4, 16]), NormalDist().inv_cdf(1 - 0.025 / 10)
    low, high = difference_interval(values, 10)
    n = effective_size(values, lowest=-1, z=z)
    b, c = n * 10 / 40, n * 1 / 40
    for bound, distance in ((low, z), (high, -z)):
        q = restricted_likelihood(b, c, n, bound)
        deviation = math.sqrt(n * (2 * q + bound * (1 - bound)))
        assert (b - c - n * bound) / deviation == pytest.approx(distance, abs=2e-3)


@pytest.mark.parametrize("n", [1, 2, 10, 500])
def test_equal_pairs_have_a_width(n):
    """Each side has Wilson's width at 0 of n. A bootstrap would claim that the two N can never differ."""
    high = wilson_interval(0, n)[1]
    assert difference_interval(np.zeros(n)) == pytest.approx((-high, high))


@pytest.mark.parametrize("comparisons", [1, 2, 10, 190])
def test_several_comparisons(comparisons):
    """Without differences, the bounds are z^2 / (n + z^2), with the quantile of 0.05 / comparisons."""
    z = NormalDist().inv_cdf(1 - 0.025 / comparisons)
    high = z * z / (40 + z * z)
    assert difference_interval(np.zeros(40), comparisons) == pytest.approx((-high, high))


@pytest.mark.parametrize("comparisons", [1, 5, pytest.param(20, marks=pytest.mark.slow)])
def test_several_differences_are_covered_together(comparisons):
    """All intervals hold in at least 95 % of draws, up to the error of 400 draws. Without the correction, in far fewer."""
    rng = np.random.default_rng(comparisons)
    together = apart = 0
    for _ in range(400):
        draws = [rng.choice([1.0, 0.0, -1.0], 60, p=[0.2, 0.7, 0.1]) for _ in range(comparisons)]
        together += all(low <= 0.1 <= high for low, high in (difference_interval(one, comparisons) for one in draws))
        apart += all(low <= 0.1 <= high for low, high in map(difference_interval, draws))
    assert together >= 400 * 0.92
    assert comparisons == 1 or apart < 400 * 0.9


def test_differences_change_their_sign():
    rng = np.random.default_rng(0)
    for _ in range(20):
        values = rng.choice([-1.0, 0.0, 1.0, 0.25], size=30)
        low, high = difference_interval(values)
        assert difference_interval(-values) == pytest.approx((-high, -low), abs=1e-9)
        assert -1 <= low < values.mean() < high <= 1


@pytest.mark.parametrize("value", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 3, 40])
def test_no_interval_has_zero_width(value, n):
    """Also for shares that are all equal, and for a single problem."""
    low, high = mean_interval(np.full(n, value))
    assert low <= value <= high and high - low > 0.3 / n
    low, high = difference_interval(np.full(n, value))
    assert low <= value <= high and high - low > 0.3 / n


def test_shares_count_as_more_than_outcomes():
    """Averages over subsets vary less, but equal averages are not certain."""
    rng = np.random.default_rng(0)
    outcomes, shares = (rng.random(200) < 0.5).astype(float), rng.beta(20, 20, 200)
    assert effective_size(outcomes) == pytest.approx(200)
    assert 2000 < effective_size(shares) < 200 * 40
    assert effective_size(np.full(10, 0.5)) == pytest.approx(10 * (10 + Z * Z) / (Z * Z))
    assert effective_size(np.array([1.0, -1.0, 0.0, 0.0]), lowest=-1) == pytest.approx(4)
    wide, narrow = (np.subtract(*mean_interval(values)[::-1]) for values in (outcomes, shares))
    assert narrow < wide / 3


@pytest.mark.parametrize("n", [10, 40, 200])
def test_means_are_covered(n):
    """95 % of intervals hold the true mean: for outcomes, and for shares that vary much or little between problems."""
    rng = np.random.default_rng(n)
    sources = {
        "rare": (lambda: (rng.random(n) < 0.1).astype(float), 0.1),
        "even": (lambda: (rng.random(n) < 0.5).astype(float), 0.5),
        "hard to easy": (lambda: rng.beta(1, 2, n), 1 / 3),
        "mostly solved": (lambda: rng.beta(8, 0.5, n), 8 / 8.5),
        "narrow": (lambda: rng.beta(50, 50, n), 0.5),
    }
    for name, (draw, mean) in sources.items():
        intervals = [mean_interval(draw()) for _ in range(400)]
        assert sum(low <= mean <= high for low, high in intervals) >= 400 * 0.91, name


def test_one_small_share_does_not_make_the_rest_certain():
    """
    Nothing is solved but one of 64 samples of one of 40 problems. Other problems may still be easy, so the interval is nearly as wide as
    at 0 of 40. With the variance of these values alone it would end at 1.1 %.
    """
    values = np.zeros(40)
    values[3] = 1 / 64
    for interval, exact in (
        (mean_interval, wilson_interval(0, 40)),
        (difference_interval, difference_interval(np.zeros(40))),
    ):
        low, high = interval(values)
        assert low <= 1 / 64 / 40 and high == pytest.approx(exact[1], rel=0.03)


@pytest.mark.parametrize("n", [40, 100])
def test_few_different_problems_are_covered(n):
    """3 % of the problems are solved by every sample, and the others by one of 1,000. Most sets of 40 problems have an easy one, not all."""
    rng, truth = np.random.default_rng(n), 0.03 + 0.97 * 0.001
    means = differences = 0
    for _ in range(400):
        values = rng.binomial(64, np.where(rng.random(n) < 0.03, 1.0, 0.001)) / 64
        low, high = mean_interval(values)
        means += low <= truth <= high
        low, high = difference_interval(-values)
        differences += low <= -truth <= high
    assert min(means, differences) >= 400 * 0.92


def test_problems_and_candidates_are_covered():
    """
    40 problems with different success rates p, and 8 samples of each, and the best of 4 is selected. The interval holds the accuracy
    of new problems with new samples. A wrong sample is a trap with the highest score in 6 % of cases.
    """
    rng, grid = np.random.default_rng(0), (np.arange(2000) + 0.5) / 2000
    # 1 - p has the density 2q for p from Beta(1, 2)
    truth = np.mean(2 * grid * ((1 - 0.06 * grid) ** 4 - (0.94 * grid) ** 4))
    covered, weights = 0, subset_weights(8, [4])[0] / 2
    for _ in range(400):
        right = rng.random((40, 8)) < rng.beta(1, 2, (40, 1))
        scores = np.where(right, rng.uniform(0.5, 0.9, right.shape), rng.uniform(0.0, 0.5, right.shape))
        scores = np.where(~right & (rng.random(right.shape) < 0.06), rng.uniform(0.95, 1.0, right.shape), scores)
        low, high = mean_interval(np.take_along_axis(right, np.argsort(-scores), axis=1) @ weights)
        covered += low <= truth <= high
    assert covered >= 400 * 0.93


@pytest.mark.parametrize("n", [10, 40])
def test_differences_are_covered(n):
    rng = np.random.default_rng(n)
    for more, less in ((0.05, 0.05), (0.2, 0.05), (0.02, 0.0), (0.3, 0.3)):
        intervals = [
            difference_interval(rng.choice([1.0, -1.0, 0.0], n, p=[more, less, 1 - more - less])) for _ in range(400)
        ]
        assert sum(low <= more - less <= high for low, high in intervals) >= 400 * 0.91


class TestCurves:
    def test_zero_and_all_of_ten(self):
        """The bounds of every curve, not only best-of-N's."""
        for right, bounds in ((False, (0.0, 0.2775)), (True, (0.7225, 1.0))):
            pool = [ScoredProblem(f"p{i}", [0, 0], [right, right], {"min": [0.5, 0.6]}, [0, 1]) for i in range(10)]
            for points in make_curves(pool, [1, 2]).curves.values():
                for point in points:
                    assert (point["low"], point["high"]) == pytest.approx(bounds, abs=6e-5)

    def test_unknown_problems_are_excluded(self):
        values = np.array([[1.0, 0.0, np.nan, 1.0], [1.0, np.nan, 0.0, 0.0]])
        points, gap = curve_with_gap("x", values, [1, 2])
        assert (points[0]["low"], points[0]["high"]) == pytest.approx(wilson_interval(2, 3))
        # of the two problems that are known at both N one is lost; the interval is centred on the reported difference
        low, high = difference_interval(np.array([0.0, 1.0]))
        assert gap["loss"] == pytest.approx(1 / 3)
        assert (gap["low"], gap["high"]) == pytest.approx((low - 1 / 6, high - 1 / 6))

    def test_no_problem_is_known_at_both(self):
        _, gap = curve_with_gap("x", np.array([[1.0, np.nan], [np.nan, 0.0]]), [1, 2])
        assert (gap["loss"], gap["low"], gap["high"]) == (1.0, -1.0, 1.0)
