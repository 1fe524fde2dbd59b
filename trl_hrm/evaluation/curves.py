"""From one pool of scored and graded solutions to accuracies over N, with their intervals."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.tree import make_id
from .selection import best_of_n, majority_vote, pass_at_n, weighted_vote


if TYPE_CHECKING:
    from .pool import PoolProblem  # reading pools takes `datasets`

NUM_RESAMPLES = 1000
NUM_BINS = 10


@dataclass(frozen=True)
class JudgedProblem:
    """
    What choices among M solutions of a problem need to know.

    Args:
        problem_id (`str`):
            Key of the problem.
        classes (`list[int | None]`):
            Equal numbers for equivalent answers, `None` for no answer.
        correct (`list[bool | None]`):
            Whether each solution is right: not so if it has no answer, unless its grade was given. `None` where the grader gave
            up.
        scores (`dict[str, list[float | None]]`):
            M scores for each aggregate, `None` for solutions that could not be scored.
        ranks (`list[int]`):
            Places of the texts in alphabetical order: they order and equal as the texts do.
    """

    problem_id: str
    classes: list[int | None]
    correct: list[bool | None]
    scores: dict[str, list[float | None]]
    ranks: list[int]


@dataclass
class Curves:
    """
    Results of choosing among solutions.

    Args:
        curves (`dict[str, list[dict[str, float]]]`):
            For `best_of_n/` and `weighted_vote/` with each aggregate, for `majority_vote` and for `pass_at_n`: for each N the
            `accuracy`, and `low` and `high` of its 95 % interval.
        hacking_gap (`dict[str, dict[str, float]]`):
            For each curve of the reward model: `gap`, the accuracy at `best_n`, the best N, minus that at `largest_n`, with
            `low` and `high` of its 95 % interval.
        calibration (`dict[str, Any]`):
            `aggregate`, the first one, and `bins` of its scores: `low`, `high`, `count`, `mean_score`, `share_right`.
    """

    curves: dict[str, list[dict[str, float]]]
    hacking_gap: dict[str, dict[str, float]]
    calibration: dict[str, Any]


def summarize(problem: "PoolProblem", classes: Sequence[int | None], aggregates: Sequence[Aggregate]) -> JudgedProblem:
    """
    What is kept in memory of a scored and graded problem.

    Args:
        problem ([`PoolProblem`]):
            The problem with its M candidates.
        classes (`Sequence[int | None]`):
            Classes of their answers.
        aggregates (`Sequence[Aggregate]`):
            How the scores of the steps become that of a solution. See [`~scoring.aggregate.aggregate`].

    Raises:
        `ValueError`: If two aggregates have one name.
    """
    names = list(map(aggregate_name, aggregates))
    if len(set(names)) < len(names):
        raise ValueError(f"the aggregates are {', '.join(names)}, expected different names.")
    candidates = problem.candidates
    places = {text: place for place, text in enumerate(sorted({candidate.text for candidate in candidates}))}
    return JudgedProblem(
        problem.problem_id,
        list(classes),
        [False if one.answer is None and not problem.graded else one.correct for one in candidates],
        {
            name: [_score(candidate.scores, way) for candidate in candidates]
            for name, way in zip(names, aggregates, strict=True)
        },
        [places[candidate.text] for candidate in candidates],
    )


def make_curves(
    problems: Sequence[JudgedProblem], n: Sequence[int], num_draws: int | None = None, seed: int = 42
) -> Curves:
    """
    Accuracy over N of each way to choose.

    A solution that the grader gave up is neither right nor wrong: where it is chosen, the problem does not count.

    Args:
        problems (`Sequence[JudgedProblem]`):
            P problems.
        n (`Sequence[int]`):
            How many of its solutions are chosen from.
        num_draws (`int`, *optional*):
            Choose among the first N solutions, or, with a number here, among so many random orders' first N each, for less
            variance. A problem's orders are those of all N and all curves, and depend on its id and the seed alone.
            `pass_at_n` is the estimate from all M solutions in any case.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws and the intervals.

    Returns:
        [`Curves`]: 95 % intervals are those of 1,000 bootstrap resamples of the problems, the same for all curves. That of a
        hacking gap keeps `best_n` as it was found, so that it may reach below 0; since it was found on the same problems, the gap
        itself is optimistic.

    Raises:
        `ValueError`: If for some N no chosen solution could be graded.
    """
    n = sorted(set(n))
    curves, gaps = {}, {}
    for name, values in _outcomes(problems, n, num_draws, seed).items():
        curves[name], gap = curve_with_gap(name, values, n, seed)
        if "/" in name:
            gaps[name] = gap
    return Curves(curves, gaps, _calibration(problems))


def curve_with_gap(
    name: str, values: np.ndarray, n: Sequence[int], seed: int = 42
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """
    A curve and its hacking gap, as [`Curves`] has them.

    Args:
        name (`str`):
            What is shown, for error messages.
        values (`np.ndarray`):
            For each N whether each problem is solved, or in which share of draws; NaN where that is not known. Shape
            `(len(n), P)`.
        n (`Sequence[int]`):
            The N, ascending.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the intervals.

    Raises:
        `ValueError`: If for some N nothing is known.
    """
    num_problems = values.shape[1]
    accuracies = _means(values, np.ones((1, num_problems)))[0]
    for size, accuracy in zip(n, accuracies, strict=True):
        if np.isnan(accuracy):
            raise ValueError(
                f"{name}: the grader gave up on every solution that is chosen at N={size}, so there is no accuracy. Give it "
                "more time (--grader_timeout)."
            )
    resampled = _means(values, _resamples(num_problems, seed))
    lows, highs = _interval(resampled)
    points = [
        {"n": size, "accuracy": float(accuracy), "low": float(low), "high": float(high)}
        for size, accuracy, low, high in zip(n, accuracies, lows, highs, strict=True)
    ]
    best = int(np.argmax(accuracies))
    low, high = _interval(resampled[:, best] - resampled[:, -1])
    gap = {
        "gap": float(accuracies[best] - accuracies[-1]),
        "best_n": n[best],
        "largest_n": n[-1],
        "low": float(low),
        "high": float(high),
    }
    return points, gap


def _score(scores: Sequence[float] | None, name: Aggregate) -> float | None:
    return None if scores is None else aggregate(scores, name)


def _outcomes(
    problems: Sequence[JudgedProblem], n: Sequence[int], num_draws: int | None, seed: int
) -> dict[str, np.ndarray]:
    """For each curve the share of draws in which each problem is solved, NaN if unknown, shape `(len(n), P)`."""
    names = list(problems[0].scores)
    choices: dict[str, Callable[[JudgedProblem, list[int]], int]] = {}
    for name in names:
        choices[f"best_of_n/{name}"] = _best(name)
    for name in names:
        choices[f"weighted_vote/{name}"] = _weighted(name)
    choices["majority_vote"] = lambda p, d: majority_vote([p.classes[i] for i in d], [p.ranks[i] for i in d])
    found = {name: np.empty((len(n), len(problems))) for name in (*choices, "pass_at_n")}
    for column, problem in enumerate(problems):
        orders = _orders(problem, num_draws, seed)
        for row, size in enumerate(n):
            found["pass_at_n"][row, column] = _pass_at_n(problem.correct, size)
            # all orders of all solutions are one set
            draws = [order[:size] for order in (orders[:1] if size == len(orders[0]) else orders)]
            for name, choose in choices.items():
                solved = [problem.correct[draw[choose(problem, draw)]] for draw in draws]
                known = [right for right in solved if right is not None]
                found[name][row, column] = sum(known) / len(known) if known else math.nan
    return found


def _best(name: str) -> Callable[[JudgedProblem, list[int]], int]:
    return lambda p, draw: best_of_n([p.scores[name][i] for i in draw], [p.ranks[i] for i in draw])


def _weighted(name: str) -> Callable[[JudgedProblem, list[int]], int]:
    return lambda p, draw: weighted_vote(
        [p.classes[i] for i in draw], [p.scores[name][i] for i in draw], [p.ranks[i] for i in draw]
    )


def _orders(problem: JudgedProblem, num_draws: int | None, seed: int) -> list[list[int]]:
    order = list(range(len(problem.ranks)))
    if num_draws is None:
        return [order]
    rng = random.Random(make_id("draws", seed, problem.problem_id))
    return [rng.sample(order, len(order)) for _ in range(num_draws)]


def _pass_at_n(correct: Sequence[bool | None], n: int) -> float:
    """[`pass_at_n`] of the graded solutions; where these are too few, 1 if no n solutions are without a right one."""
    num_right = sum(right is True for right in correct)
    num_graded = sum(right is not None for right in correct)
    if num_graded >= n:
        return pass_at_n(num_graded, num_right, n)
    return 1.0 if len(correct) - num_right < n else math.nan


def _resamples(num_problems: int, seed: int) -> np.ndarray:
    """How often each problem is drawn, shape `(NUM_RESAMPLES, P)`."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), size=NUM_RESAMPLES).astype(float)


def _means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted means over the problems with a known value: of `(len(n), P)` and `(R, P)` shape `(R, len(n))`."""
    known = ~np.isnan(values)
    totals = weights @ known.T.astype(float)
    sums = weights @ np.where(known, values, 0.0).T
    return np.divide(sums, totals, out=np.full_like(sums, np.nan), where=totals > 0)


def _interval(resampled: np.ndarray) -> np.ndarray:
    return np.nanquantile(resampled, [0.025, 0.975], axis=0)


def _calibration(problems: Sequence[JudgedProblem]) -> dict[str, Any]:
    """Scores beside shares of right solutions, in equal bins from 0 to 1; bins without a solution are left out."""
    name = next(iter(problems[0].scores))
    pairs = [
        (score, right)
        for problem in problems
        for score, right in zip(problem.scores[name], problem.correct, strict=True)
        if score is not None and right is not None
    ]
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for score, right in pairs:
        bins[min(int(min(max(score, 0.0), 1.0) * NUM_BINS), NUM_BINS - 1)].append((score, right))
    return {
        "aggregate": name,
        "bins": [
            {
                "low": place / NUM_BINS,
                "high": (place + 1) / NUM_BINS,
                "count": len(members),
                "mean_score": math.fsum(score for score, _ in members) / len(members),
                "share_right": sum(right for _, right in members) / len(members),
            }
            for place, members in enumerate(bins)
            if members
        ],
    }
