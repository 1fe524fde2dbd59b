"""
Accuracy over N, with intervals: [`make_curves`] from a pool of scored and graded solutions, [`plain_curves`] from plain lists of scores.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.tree import make_id
from ..step_metrics import calibration_bins
from .intervals import mean_interval
from .reward_hacking import hacking_gap
from .selection import best_of_n, majority_vote, pass_at_n, weighted_vote


if TYPE_CHECKING:
    from ..data.candidates import ProblemCandidates  # reading pools takes `datasets`

PLAIN = "score"  # name of the scores of `plain_curves`
INTERVALS = {  # what `results.json` says of the intervals
    "confidence": 0.95,
    "accuracy": "Wilson score interval over problems",
    "hacking_gap": "Tango score interval of paired differences over problems",
}


@dataclass(frozen=True)
class ScoredProblem:
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


def summarize(
    problem: "ProblemCandidates", classes: Sequence[int | None], aggregates: Sequence[Aggregate]
) -> ScoredProblem:
    """
    Return what is kept in memory of a scored and graded problem.

    Args:
        problem ([`~data.candidates.ProblemCandidates`]):
            The problem with its M candidates.
        classes (`Sequence[int | None]`):
            Classes of their answers.
        aggregates (`Sequence[Aggregate]`):
            How the scores of the steps become the score of a solution. See [`~scoring.aggregate.aggregate`].

    Raises:
        `ValueError`: If two aggregates have one name.
    """
    names = list(map(aggregate_name, aggregates))
    if len(set(names)) < len(names):
        raise ValueError(f"the aggregates are {', '.join(names)}, expected different names.")
    candidates = problem.candidates
    return ScoredProblem(
        problem.problem_id,
        list(classes),
        [False if one.answer is None and not problem.graded else one.correct for one in candidates],
        {
            name: [None if candidate.scores is None else aggregate(candidate.scores, way) for candidate in candidates]
            for name, way in zip(names, aggregates, strict=True)
        },
        text_ranks([candidate.text for candidate in candidates]),
    )


def text_ranks(texts: Sequence[str]) -> list[int]:
    """Return the place of each text in alphabetical order. Equal texts have one place."""
    places = {text: place for place, text in enumerate(sorted(set(texts)))}
    return [places[text] for text in texts]


def make_curves(
    problems: Sequence[ScoredProblem], n: Sequence[int], num_draws: int | None = None, seed: int = 42
) -> Curves:
    """
    Return the accuracy over N of each way to choose.

    A solution that the grader gave up is neither right nor wrong: where it is chosen, the problem does not count.

    Args:
        problems (`Sequence[ScoredProblem]`):
            P problems.
        n (`Sequence[int]`):
            How many of its solutions are chosen from.
        num_draws (`int`, *optional*):
            Average over this number of random orders, and choose among the first N of each, for less variance. By default
            choose among the first N solutions as they come. All N and all curves share the orders of a problem, which depend
            only on its id and the seed. `pass_at_n` is always the estimate from all M solutions.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws.

    Returns:
        [`Curves`]: The interval of an accuracy is [`mean_interval`], the interval of a loss [`~evaluation.intervals.difference_interval`]. `from_n` is
        chosen on the same problems, which makes the loss look larger: its interval does not account for that.

    Raises:
        `ValueError`: If for some N no chosen solution could be graded.
    """
    n = sorted(set(n))
    names = list(problems[0].scores)
    ways = [f"{way}/{name}" for way in ("best_of_n", "weighted_vote") for name in names]
    solved = {way: np.empty((len(n), len(problems))) for way in (*ways, "majority_vote", "pass_at_n")}
    for column, problem in enumerate(problems):
        orders = [list(range(len(problem.ranks)))]
        if num_draws is not None:
            rng = random.Random(make_id("draws", seed, problem.problem_id))
            orders = [rng.sample(orders[0], len(orders[0])) for _ in range(num_draws)]
        num_right = sum(right is True for right in problem.correct)
        num_graded = sum(right is not None for right in problem.correct)
        for row, size in enumerate(n):
            if num_graded >= size:
                solved["pass_at_n"][row, column] = pass_at_n(num_graded, num_right, size)
            else:  # too few are graded: known only if any `size` solutions have a right one among them
                solved["pass_at_n"][row, column] = 1.0 if len(problem.correct) - num_right < size else math.nan
            # all orders of all solutions are one set
            draws = [order[:size] for order in (orders[:1] if size == len(orders[0]) else orders)]
            for way in (*ways, "majority_vote"):
                outcomes = [problem.correct[draw[_choose(way, problem, draw)]] for draw in draws]
                known = [right for right in outcomes if right is not None]
                solved[way][row, column] = sum(known) / len(known) if known else math.nan
    curves, gaps = {}, {}
    for way, values in solved.items():
        curves[way], gap = curve_with_gap(way, values, n)
        if "/" in way:
            gap["undecided"] = gap["undecided"] or _without_choice(problems, way.partition("/")[2])
            gaps[way] = gap
    scored = [
        (score, right)
        for problem in problems
        for score, right in zip(problem.scores[names[0]], problem.correct, strict=True)
        if score is not None and right is not None
    ]
    return Curves(curves, gaps, {"aggregate": names[0], "bins": calibration_bins(scored)})


def _choose(way: str, problem: ScoredProblem, draw: Sequence[int]) -> int:
    """Return which solution of a draw a way of choosing takes, as a place in the draw."""
    rule, _, name = way.partition("/")
    ranks = [problem.ranks[i] for i in draw]
    if rule == "best_of_n":
        return best_of_n([problem.scores[name][i] for i in draw], ranks)
    classes = [problem.classes[i] for i in draw]
    if rule == "majority_vote":
        return majority_vote(classes, ranks)
    return weighted_vote(classes, [problem.scores[name][i] for i in draw], ranks)


def _without_choice(problems: Sequence[ScoredProblem], name: str) -> str | None:
    """Return why the scores of an aggregate could not change any accuracy, `None` if they could."""
    if all(score is None for problem in problems for score in problem.scores[name]):
        return "no candidate has a score"
    if not any({True, False} <= set(problem.correct) for problem in problems):
        return "no problem has both right and wrong candidates, so the choice makes no difference"
    return None


def curve_with_gap(name: str, values: np.ndarray, n: Sequence[int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """
    Return a curve and its hacking gap, as [`Curves`] has them.

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
    return points, hacking_gap(points, values)


def plain_curves(
    scores: Sequence[Sequence[float | None]],
    correct: Sequence[Sequence[bool | None]],
    texts: Sequence[Sequence[str]],
    n: Sequence[int] | None = None,
    num_draws: int | None = None,
    seed: int = 42,
) -> Curves:
    """
    Return the curves of choosing among solutions by their scores.

    Args:
        scores (`Sequence[Sequence[float | None]]`):
            For each of P problems the scores of its M solutions, in `[0, 1]`. `None` for one that could not be scored, which is
            chosen last.
        correct (`Sequence[Sequence[bool | None]]`):
            Whether each is right. `None` for one that could not be graded: where it is chosen, the problem does not count.
        texts (`Sequence[Sequence[str]]`):
            What each says. Of equal scores the smallest text wins, so that the order does not matter.
        n (`Sequence[int]`, *optional*):
            How many solutions are chosen from. By default the powers of two up to the number that every problem has, and that.
        num_draws, seed:
            See [`make_curves`].

    Returns:
        [`Curves`]: With the name `"score"`: `best_of_n/score` and so on. The answers are unknown, so the votes mean nothing.

    Raises:
        `ValueError`: If there are no problems, the lists do not match, a score is not in `[0, 1]`, an N is larger than the
            number of solutions of a problem, or there are to be no draws.
    """
    if not len(scores):
        raise ValueError("there is no problem, expected one at least.")
    problems = []
    for number, (values, grades, written) in enumerate(zip(scores, correct, texts, strict=True)):
        if not len(values) or not len(values) == len(grades) == len(written):
            raise ValueError(
                f"problem {number}: got {len(values)} scores, {len(grades)} grades and {len(written)} texts, expected one of each "
                "for one solution at least."
            )
        if not all(score is None or 0 <= score <= 1 for score in values):
            raise ValueError(
                f"problem {number}: the scores are {list(values)}, expected numbers from 0 to 1, or None."
            )
        no_classes = [None] * len(values)
        problems.append(
            ScoredProblem(str(number), no_classes, list(grades), {PLAIN: list(values)}, text_ranks(written))
        )
    fewest = min(range(len(problems)), key=lambda i: len(scores[i]))
    most = len(scores[fewest])
    if n is None:
        n = sorted({most, *(2**k for k in range(most.bit_length()) if 2**k <= most)})
    if not n or min(n) < 1 or max(n) > most:
        raise ValueError(
            f"n is {list(n)}, expected numbers from 1 to {most}, the solutions of problem {fewest}. Give it more solutions, or "
            "ask for a smaller N."
        )
    if num_draws is not None and num_draws < 1:
        raise ValueError(f"num_draws is {num_draws}, expected 1 or more, or None for the first N solutions.")
    return make_curves(problems, n, num_draws, seed)
