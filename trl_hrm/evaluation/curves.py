"""
Accuracy as a function of N, with confidence intervals. [`make_curves`] takes scored and graded candidates,
[`plain_curves`] lists of scores and grades.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io import shown
from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.tree import make_id
from ..step_metrics import calibration_bins
from .intervals import mean_interval
from .reward_hacking import hacking_gap
from .selection import best_of_n, majority_vote, pass_at_n, weighted_vote


if TYPE_CHECKING:
    from ..data.candidates import ProblemCandidates  # imports `datasets`

PLAIN = "score"  # aggregate name in `plain_curves`
INTERVALS = {  # saved in `results.json`
    "confidence": 0.95,
    "accuracy": "Wilson score interval over problems",
    "hacking_gap": "Tango score interval of paired differences over problems",
}


@dataclass(frozen=True)
class ScoredProblem:
    """
    Scores and grades of M solutions to a problem: all that is needed to select among them.

    Args:
        problem_id (`str`):
            Id of the problem.
        classes (`list[int | None]`):
            Class of each answer. Equivalent answers have the same class. `None` for a missing answer.
        correct (`list[bool | None]`):
            Whether each solution is correct. Solutions without an answer are wrong, unless they came with a grade.
            `None` if the grader timed out or crashed.
        scores (`dict[str, list[float | None]]`):
            M scores for each aggregate, `None` for solutions that could not be scored.
        ranks (`list[int]`):
            Rank of each text in alphabetical order. Equal texts have the same rank.
    """

    problem_id: str
    classes: list[int | None]
    correct: list[bool | None]
    scores: dict[str, list[float | None]]
    ranks: list[int]


@dataclass
class Curves:
    """
    Accuracy of each selection method as a function of N.

    Args:
        curves (`dict[str, list[dict[str, float]]]`):
            For `best_of_n/` and `weighted_vote/` followed by the name of each aggregate, for `majority_vote` and for
            `pass_at_n`: a list with `n`, `accuracy`, and the bounds `low` and `high` of its 95 % interval.
        hacking_gap (`dict[str, dict[str, Any]]`):
            For each curve that uses the reward model:

            - `gap`: accuracy at `best_n`, the N with the highest accuracy, minus accuracy at `largest_n`.
            - `loss`: accuracy at `from_n`, the best N below the largest, minus accuracy at `largest_n`, with the
              bounds `low` and `high` of its 95 % interval. It is negative if accuracy is highest at the largest N, and
              otherwise equal to `gap`. `None` if there is only one N.
            - `undecided`: why the results do not show whether the reward model is hacked, or `None`.
        calibration (`dict[str, Any]`):
            `aggregate`, the name of the first aggregate, and `bins` of its scores with `low`, `high`, `count`,
            `mean_score` and `share_right`.
    """

    curves: dict[str, list[dict[str, float]]]
    hacking_gap: dict[str, dict[str, Any]]
    calibration: dict[str, Any]


def summarize(
    problem: "ProblemCandidates", classes: Sequence[int | None], aggregates: Sequence[Aggregate]
) -> ScoredProblem:
    """
    Return the scores and grades of a problem, without the texts.

    Args:
        problem ([`~data.candidates.ProblemCandidates`]):
            Problem with its M candidates.
        classes (`Sequence[int | None]`):
            Classes of their answers.
        aggregates (`Sequence[Aggregate]`):
            How step scores are aggregated to the score of a solution. See [`~scoring.aggregate.aggregate`].

    Raises:
        `ValueError`: If two aggregates have the same name.
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
    """Return the rank of each text in alphabetical order. Equal texts have the same rank."""
    places = {text: place for place, text in enumerate(sorted(set(texts)))}
    return [places[text] for text in texts]


def make_curves(
    problems: Sequence[ScoredProblem], n: Sequence[int], num_draws: int | None = None, seed: int = 42
) -> Curves:
    """
    Compute the accuracy of each selection method as a function of N.

    If the selected solution has no grade because the grader timed out or crashed, the problem is ignored.

    Args:
        problems (`Sequence[ScoredProblem]`):
            P problems.
        n (`Sequence[int]`):
            Numbers of solutions to select from.
        num_draws (`int`, *optional*):
            Average over this number of random orders of the solutions and select from the first N of each, which
            reduces the variance. By default, select from the first N solutions in the given order. The orders of a
            problem depend only on its id and the seed, and are the same for all N and all curves. `pass_at_n` is
            always estimated from all M solutions.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws.

    Returns:
        [`Curves`]: The intervals are [`mean_interval`] for an accuracy and
        [`~evaluation.intervals.difference_interval`] for a loss. `from_n` is selected on the same problems, which
        makes the loss look larger. The interval does not correct for this.

    Raises:
        `ValueError`: If for some N no selected solution could be graded.
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
            else:  # too few are graded: only known if any `size` solutions include a correct one
                solved["pass_at_n"][row, column] = 1.0 if len(problem.correct) - num_right < size else math.nan
            # with all solutions, every order gives the same set
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
    """Return the index in the draw of the solution that a method selects."""
    rule, _, name = way.partition("/")
    ranks = [problem.ranks[i] for i in draw]
    if rule == "best_of_n":
        return best_of_n([problem.scores[name][i] for i in draw], ranks)
    classes = [problem.classes[i] for i in draw]
    if rule == "majority_vote":
        return majority_vote(classes, ranks)
    return weighted_vote(classes, [problem.scores[name][i] for i in draw], ranks)


def _without_choice(problems: Sequence[ScoredProblem], name: str) -> str | None:
    """Return why the scores of an aggregate cannot change the accuracy, or `None` if they can."""
    if all(score is None for problem in problems for score in problem.scores[name]):
        return "no candidate has a score"
    if not any({True, False} <= set(problem.correct) for problem in problems):
        return "no problem has both correct and wrong candidates, so the choice makes no difference"
    return None


def curve_with_gap(name: str, values: np.ndarray, n: Sequence[int]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """
    Return a curve and its hacking gap. See [`Curves`].

    Args:
        name (`str`):
            Name of the curve, for error messages.
        values (`np.ndarray`):
            For each N, the share of draws in which each problem is solved (0 or 1 without draws), NaN if unknown.
            Shape `(len(n), P)`.
        n (`Sequence[int]`):
            Values of N, ascending.

    Raises:
        `ValueError`: If for some N all values are unknown.
    """
    points = []
    for size, solved in zip(n, values, strict=True):
        known = solved[~np.isnan(solved)]
        if not len(known):
            raise ValueError(
                f"{name}: the grader timed out or crashed on every selected solution at N={size}, so there is no accuracy. Increase "
                "--grader_timeout."
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
    Compute the accuracy of selecting solutions by their scores, as a function of N.

    Args:
        scores (`Sequence[Sequence[float | None]]`):
            For each of P problems, the scores of its M solutions in `[0, 1]`. Solutions without a score (`None`) are
            selected last.
        correct (`Sequence[Sequence[bool | None]]`):
            Whether each solution is correct. If it is `None` for the selected solution, the problem is ignored.
        texts (`Sequence[Sequence[str]]`):
            Texts of the solutions. Ties go to the smallest text, so the order of the solutions does not matter.
        n (`Sequence[int]`, *optional*):
            Numbers of solutions to select from. Defaults to the powers of two up to the smallest number of solutions
            of a problem, and that number.
        num_draws, seed:
            See [`make_curves`].

    Returns:
        [`Curves`]: The aggregate is called `"score"`, as in `best_of_n/score`. Ignore the curves of the votes, which
        need answers.

    Raises:
        `ValueError`: If there are no problems, the lists do not match, a score is not in `[0, 1]`, an N is larger than the
            number of solutions of a problem, or `num_draws` is below 1.
    """
    if not len(scores):
        raise ValueError("there are no problems, expected at least one.")
    problems = []
    for number, (values, grades, written) in enumerate(zip(scores, correct, texts, strict=True)):
        if not len(values) or not len(values) == len(grades) == len(written):
            raise ValueError(
                f"problem {number}: got {len(values)} scores, {len(grades)} grades and {len(written)} texts, expected one of each "
                "per solution, for at least one solution."
            )
        if not all(score is None or 0 <= score <= 1 for score in values):
            raise ValueError(
                f"problem {number}: the scores are {shown(list(values), 200)}, expected numbers from 0 to 1, or None."
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
            f"`n` is {list(n)}. Each number must be from 1 to {most}, the number of solutions of problem {fewest}. Add solutions to it, "
            "or use a smaller N."
        )
    if num_draws is not None and num_draws < 1:
        raise ValueError(f"`num_draws` is {num_draws}. It must be at least 1, or None to use the first N solutions.")
    return make_curves(problems, n, num_draws, seed)
