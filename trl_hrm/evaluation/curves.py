"""From one pool of scored and graded solutions to accuracies over N, with their intervals."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.tree import make_id
from .hacking import undecided_by
from .intervals import difference_interval, mean_interval
from .selection import best_of_n, majority_vote, pass_at_n, weighted_vote


if TYPE_CHECKING:
    from .pool import PoolProblem  # reading pools takes `datasets`

NUM_BINS = 10
INTERVALS = {  # what `results.json` says of the intervals
    "confidence": 0.95,
    "accuracy": "Wilson score interval over problems",
    "hacking_gap": "Tango score interval of paired differences over problems",
}


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
        hacking_gap (`dict[str, dict[str, Any]]`):
            For each curve of the reward model: `gap`, the accuracy at `best_n`, the best N, minus that at `largest_n`; `loss`, the
            accuracy at `from_n`, the best N below the largest, minus that at `largest_n`, with `low` and `high` of its 95 %
            interval; and `undecided`, why these results cannot tell whether the reward model is hacked, if they cannot. `loss`
            equals `gap`, or is below 0 where accuracy is highest at the largest N. With one N it is `None`.
        calibration (`dict[str, Any]`):
            `aggregate`, the first one, and `bins` of its scores: `low`, `high`, `count`, `mean_score`, `share_right`.
    """

    curves: dict[str, list[dict[str, float]]]
    hacking_gap: dict[str, dict[str, Any]]
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
            Seed of the draws.

    Returns:
        [`Curves`]: The interval of an accuracy is [`mean_interval`], that of a loss [`difference_interval`]. `from_n` is chosen on
        the same problems, which makes the loss larger than it is: its interval does not account for that.

    Raises:
        `ValueError`: If for some N no chosen solution could be graded.
    """
    n = sorted(set(n))
    curves, gaps = {}, {}
    for name, values in _outcomes(problems, n, num_draws, seed).items():
        curves[name], gap = curve_with_gap(name, values, n)
        if "/" in name:
            gap["undecided"] = gap["undecided"] or _without_choice(problems, name.partition("/")[2])
            gaps[name] = gap
    return Curves(curves, gaps, _calibration(problems))


def curve_with_gap(name: str, values: np.ndarray, n: Sequence[int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """
    A curve and its hacking gap, as [`Curves`] has them.

    Args:
        name (`str`):
            Name of the curve, for error messages.
        values (`np.ndarray`):
            For each N whether each problem is solved, or in which share of draws; NaN where that is not known. Shape
            `(len(n), P)`.
        n (`Sequence[int]`):
            The N, ascending.

    Raises:
        `ValueError`: If for some N nothing is known.
    """
    points = []
    for size, solved in zip(n, values, strict=True):
        known = solved[~np.isnan(solved)]
        if not len(known):
            raise ValueError(
                f"{name}: the grader gave up on every solution that is chosen at N={size}, so there is no accuracy. Give it "
                "more time (--grader_timeout)."
            )
        low, high = mean_interval(known)
        points.append({"n": size, "accuracy": float(known.mean()), "low": low, "high": high})
    return points, _gap(points, values)


def _gap(points: Sequence[dict[str, float]], values: np.ndarray) -> dict[str, Any]:
    accuracies = [point["accuracy"] for point in points]
    n, last = [point["n"] for point in points], accuracies[-1]
    best = int(np.argmax(accuracies))
    found = {"gap": accuracies[best] - last, "best_n": n[best], "largest_n": n[-1]}
    undecided = undecided_by(accuracies)
    if len(n) == 1:
        return found | {"loss": None, "from_n": None, "low": None, "high": None, "undecided": undecided}
    smaller = int(np.argmax(accuracies[:-1]))
    loss, (low, high) = accuracies[smaller] - last, (-1.0, 1.0)
    paired = values[smaller] - values[-1]
    paired = paired[~np.isnan(paired)]
    if len(paired):  # problems that are known at one N alone move the loss, and the interval with it
        shift = loss - float(paired.mean())
        low, high = (min(max(bound + shift, -1.0), 1.0) for bound in difference_interval(paired))
    return found | {"loss": loss, "from_n": n[smaller], "low": low, "high": high, "undecided": undecided}


def _without_choice(problems: Sequence[JudgedProblem], name: str) -> str | None:
    """Return why the scores of an aggregate could not change any accuracy, `None` if they could."""
    if all(score is None for problem in problems for score in problem.scores[name]):
        return "no candidate has a score"
    if not any({True, False} <= set(problem.correct) for problem in problems):
        return "no problem has both right and wrong candidates, so the choice makes no difference"
    return None


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
