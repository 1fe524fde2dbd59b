"""
Accuracy as a function of N, with confidence intervals. [`make_curves`] takes scored and graded candidates,
[`plain_curves`] lists of scores and grades.

All accuracies are means over subsets of N of the M candidates of a problem, as in pass@N. They are unbiased, and at
N = 1 all methods have the accuracy of a single candidate, pass@1.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from ..intervals import mean_interval
from ..io import shown
from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..search.tree import make_id
from ..step_metrics import calibration_bins
from .reward_hacking import hacking_gap
from .selection import pass_at_n, ranked, subset_weights


if TYPE_CHECKING:
    from ..data.candidates import ProblemCandidates  # imports `datasets`

PLAIN = "score"  # aggregate name in `plain_curves`
NUM_DRAWS = 200  # they add a standard error of at most 0.4 points to the mean over 100 problems
BLOCK = 2**20  # number of entries of a block of subsets, to limit memory
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
            `None` if it is unknown, because the grader timed out or crashed, or because the given grade is null.
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
            `pass_at_n`: a list with `n`, `accuracy`, and the bounds `low` and `high` of its 95 % interval. Votes
            are missing if no candidate has an answer.
        hacking_gap (`dict[str, dict[str, Any]]`):
            For each curve that uses the reward model:

            - `gap`: accuracy at `best_n`, the N with the highest accuracy, minus accuracy at `largest_n`.
            - `loss`: accuracy at `from_n`, the best N below the largest, minus accuracy at `largest_n`, with the
              bounds `low` and `high` of its 95 % interval. It is negative if accuracy is highest at the largest N, and
              otherwise equal to `gap`.
            - `undecided`: why the results cannot show whether the reward model is hacked, or `None`. If there is a
              reason, all values but `largest_n` are `None`.
        calibration (`dict[str, Any]`):
            `aggregate`, the name of the first aggregate, and `bins` of its scores with `low`, `high`, `count`,
            `mean_score` and `share_right`. Empty without scores.
        estimate (`dict[str, Any]`):
            How the accuracies were estimated: `method`, which is `"subsets"`; `min_candidates` and `max_candidates`,
            the smallest and largest number of candidates of a problem; if grades are missing, `min_graded`, the smallest
            number of graded candidates of a problem; and, with votes, `num_draws`, the number of their random subsets.
    """

    curves: dict[str, list[dict[str, float]]]
    hacking_gap: dict[str, dict[str, Any]]
    calibration: dict[str, Any]
    estimate: dict[str, Any]


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
    problems: Sequence[ScoredProblem], n: Sequence[int], num_draws: int = NUM_DRAWS, seed: int = 42
) -> Curves:
    r"""
    Compute the accuracy of each selection method as a function of N.

    The accuracy of a problem is the probability that the solution selected from N of its M candidates is correct, where
    the N candidates are drawn without replacement. Best-of-N is computed exactly: ranked by score, the candidate at
    rank i is selected with probability \\(\binom{M-i}{N-1} / \binom{M}{N}\\). See
    [`~evaluation.selection.subset_weights`]. The winner of a vote has no such formula. Votes are computed over all
    subsets if N is 1 or if there are at most `num_draws` subsets, and otherwise over `num_draws` random subsets. All
    votes of a problem use the same subsets, and a larger N adds candidates to the subsets of a smaller N.

    Subsets whose selected solution has no grade are ignored. At N = 1 the accuracy is therefore the share of correct
    candidates among the graded ones. A problem in which no selected solution has a grade is ignored.
    `pass_at_n` is [`~evaluation.selection.pass_at_n`] of the graded candidates of a problem. If fewer than N are graded,
    it is 1 if one of them is correct, and otherwise 0, which is a lower bound: ignoring the problem instead would drop
    unsolved problems only.

    Candidates with the same text and score (and for votes, the same answer) are interchangeable. If they have different
    grades, each of them counts as partly correct.

    Args:
        problems (`Sequence[ScoredProblem]`):
            P problems. They can have different numbers of candidates.
        n (`Sequence[int]`):
            Numbers of solutions to select from, at most the smallest number of candidates of a problem.
        num_draws (`int`, *optional*, defaults to `200`):
            Number of random subsets of each problem and N for votes.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the draws. The draws of a problem depend only on the seed and its id.

    Returns:
        [`Curves`]: The intervals are [`mean_interval`] for an accuracy and
        [`~intervals.difference_interval`] for a loss. `from_n` is selected on the same problems, which
        makes the loss look larger. The interval does not correct for this.

    Raises:
        `ValueError`: If an N is below 1 or larger than the number of candidates of a problem, if `num_draws` is below 1,
            or if for some N no selected solution has a grade.
    """
    n = sorted(set(n))
    if num_draws < 1:
        raise ValueError(f"`num_draws` is {num_draws}. It must be at least 1.")
    smallest = min(problems, key=lambda problem: len(problem.ranks))
    if not n or n[0] < 1 or n[-1] > len(smallest.ranks):
        raise ValueError(
            f"`n` is {n}. Each number must be from 1 to {len(smallest.ranks)}, the number of candidates of problem "
            f"{shown(smallest.problem_id)}. Add candidates to it, or use a smaller N."
        )
    names = list(problems[0].scores)
    has_answers = any(one is not None for problem in problems for one in problem.classes)
    ways = [f"best_of_n/{name}" for name in names]
    if has_answers:
        ways += [*(f"weighted_vote/{name}" for name in names), "majority_vote"]
    sizes = [len(problem.ranks) for problem in problems]
    graded = [len(problem.ranks) - problem.correct.count(None) for problem in problems]
    solved = {way: np.empty((len(n), len(problems))) for way in (*ways, "pass_at_n")}
    lowest = 0.0  # accuracy at the largest N of a model that selects a wrong solution if there is one
    for column, (problem, size, num_graded) in enumerate(zip(problems, sizes, graded, strict=True)):
        num_right = sum(right is True for right in problem.correct)
        lowest += (1 - pass_at_n(size, size - num_right, n[-1])) / len(problems)
        solved["pass_at_n"][:, column] = (
            [pass_at_n(num_graded, num_right, min(number, num_graded)) for number in n] if num_graded else math.nan
        )
        for name in names:
            solved[f"best_of_n/{name}"][:, column] = _best_of_n(problem, name, n)
        if has_answers:
            for way, values in _votes(problem, n, num_draws, seed).items():
                solved[way][:, column] = values
    curves, gaps = {}, {}
    for way, values in solved.items():
        _, has_scores, name = way.partition("/")
        unranked = _without_choice(problems, name) if has_scores else None
        curves[way], gap = curve_with_gap(way, values, n, unranked, lowest)
        if has_scores:
            gaps[way] = gap
    calibration = {}
    if names:
        scored = [
            (score, right)
            for problem in problems
            for score, right in zip(problem.scores[names[0]], problem.correct, strict=True)
            if score is not None and right is not None
        ]
        calibration = {"aggregate": names[0], "bins": calibration_bins(scored)}
    estimate = {"method": "subsets", "min_candidates": min(sizes), "max_candidates": max(sizes)}
    if graded != sizes:
        estimate["min_graded"] = min(graded)
    if has_answers:
        estimate["num_draws"] = num_draws
    return Curves(curves, gaps, calibration, estimate)


def _outcomes(problem: ScoredProblem, keys: Sequence[Hashable]) -> np.ndarray:
    """
    Return for each candidate whether it is correct and whether it is graded, as means over the candidates with the same
    key. Shape `(2, M)`.
    """
    places: dict[Hashable, int] = {}
    groups = np.array([places.setdefault(key, len(places)) for key in keys])
    sums = [np.bincount(groups, [right is expected for right in problem.correct]) for expected in (True, None)]
    counts = np.bincount(groups)
    return np.array([sums[0] / counts, (counts - sums[1]) / counts])[:, groups]


def _best_of_n(problem: ScoredProblem, name: str, n: Sequence[int]) -> np.ndarray:
    """Return the accuracy at each N over all subsets, NaN if no candidate that can be selected is graded. Shape `(len(n),)`."""
    scores, ranks = problem.scores[name], problem.ranks
    right, graded = _outcomes(problem, list(zip(scores, ranks, strict=True)))[:, ranked(scores, ranks)]
    weights = subset_weights(len(ranks), n)
    return _share(weights @ right, weights @ graded)


def _share(right: np.ndarray, graded: np.ndarray) -> np.ndarray:
    """Return the share of correct selections among the graded ones, NaN without graded ones."""
    return np.divide(right, graded, out=np.full(right.shape, math.nan), where=graded > 0)


def _votes(problem: ScoredProblem, n: Sequence[int], num_draws: int, seed: int) -> dict[str, np.ndarray]:
    """Return the accuracy of each vote at each N, NaN if no selected solution is graded. Shape `(len(n),)` each."""
    classes, ranks = problem.classes, problem.ranks
    # Candidates with the same answer are adjacent, and those without an answer are last. Text and scores decide among them, because
    # random subsets are drawn from these columns, and must not depend on the order of the candidates.
    scored = list(zip(*problem.scores.values(), strict=True)) or [()] * len(ranks)
    keys = [
        (one is None, one or 0, rank, [(score is None, score or 0.0) for score in values])
        for one, rank, values in zip(classes, ranks, scored, strict=True)
    ]
    columns = np.array(sorted(range(len(ranks)), key=keys.__getitem__))
    ordered = [classes[i] for i in columns]
    starts = np.array([i for i, one in enumerate(ordered) if i == 0 or one != ordered[i - 1]])
    weights = {f"weighted_vote/{name}": scores for name, scores in problem.scores.items()}
    ways, outcomes, sums = {}, {}, {}
    for way, scores in {**weights, "majority_vote": [1.0] * len(ranks)}.items():
        if not all(score is None or score >= 0 for score in scores):
            raise ValueError(
                f"problem {shown(problem.problem_id)}: the weights of the votes are {shown(list(scores), 200)}, expected numbers of at "
                "least 0, or None."
            )
        order = ranked(scores, ranks)
        places = np.empty(len(ranks), int)
        places[order] = np.arange(len(ranks))
        ways[way] = np.array([scores[i] or 0.0 for i in columns]), places[columns]
        outcomes[way] = _outcomes(problem, list(zip(classes, scores, ranks, strict=True)))[:, order]
        sums[way] = np.zeros((2, len(n)))
        sums[way][:, [number == 1 for number in n]] = outcomes[way].sum(axis=1, keepdims=True)
    texts, has_missing = np.array(ranks)[columns], ordered[-1] is None
    rng = np.random.default_rng(int(make_id("draws", seed, problem.problem_id), 16))
    for row, subsets in _subsets(len(ranks), n, num_draws, rng):
        present = np.logical_or.reduceat(subsets, starts, axis=1)
        first = np.minimum.reduceat(np.where(subsets, texts, len(ranks)), starts, axis=1)
        for way, (votes, places) in ways.items():
            elected = _elect(subsets, present, first, starts, has_missing, votes)
            best = np.minimum.reduceat(np.where(subsets, places, len(ranks)), starts, axis=1)
            selected = best[np.arange(len(subsets)), elected]
            sums[way][:, row] += outcomes[way][:, selected].sum(axis=1)
    return {way: _share(*values) for way, values in sums.items()}


def _subsets(
    size: int, n: Sequence[int], num_draws: int, rng: np.random.Generator
) -> Iterator[tuple[int, np.ndarray]]:
    """
    Yield the index of each N above 1 with a block of its subsets: all subsets if there are at most `num_draws`, otherwise
    random ones. Subsets are rows of booleans, shape `(block, size)`.
    """
    drawn, block = [], max(BLOCK // size, 1)
    for row, number in enumerate(n):
        if number > 1 and math.comb(size, number) > num_draws:
            drawn.append((row, number))
        elif number > 1:
            remaining = combinations(range(size), number)
            while chosen := list(islice(remaining, block)):
                subsets = np.zeros((len(chosen), size), bool)
                np.put_along_axis(subsets, np.array(chosen), True, axis=1)
                yield row, subsets
    for start in range(0, num_draws if drawn else 0, block):
        orders = rng.permuted(np.tile(np.arange(size), (min(block, num_draws - start), 1)), axis=1)
        for row, number in drawn:
            yield row, orders < number


def _elect(
    subsets: np.ndarray,
    present: np.ndarray,
    first: np.ndarray,
    starts: np.ndarray,
    has_missing: bool,
    votes: np.ndarray,
) -> np.ndarray:
    """
    Return the answer that [`~evaluation.selection.weighted_vote`] elects in each of S subsets of M candidates, which are
    sorted by answer.

    Args:
        subsets (`np.ndarray`):
            Whether each candidate is in the subset, shape `(S, M)`.
        present, first (`np.ndarray`):
            Whether each of C answers is in the subset, and the lowest rank of the texts with this answer. Shape `(S, C)`.
        starts (`np.ndarray`):
            Index of the first candidate with each answer, shape `(C,)`.
        has_missing (`bool`):
            Whether the last answer is a missing answer.
        votes (`np.ndarray`):
            Weight of each candidate, shape `(M,)`.

    Returns:
        `np.ndarray`: Index of the answer that wins, shape `(S,)`.
    """
    sums = np.where(present, np.add.reduceat(np.where(subsets, votes, 0.0), starts, axis=1), -2.0)
    if has_missing:  # wins only if all other answers are absent
        sums[:, -1] = np.where(present[:, -1], -1.0, -2.0)
    highest = sums.max(axis=1, keepdims=True)
    tied = sums >= highest - 1e-11 * np.abs(highest)
    if votes.max() > 2.0**10 or (votes * 2.0**30 % 1).any():  # otherwise all sums are exact
        ends = [*starts[1:], len(votes)]
        for row in np.flatnonzero((tied.sum(axis=1) > 1) & (highest[:, 0] > 0)):
            exact = {
                i: math.fsum(votes[starts[i] : ends[i]][subsets[row, starts[i] : ends[i]]])
                for i in np.flatnonzero(tied[row])
            }
            tied[row] = [exact.get(i) == max(exact.values()) for i in range(len(starts))]
    return np.where(tied, first, len(votes)).argmin(axis=1)


def _without_choice(problems: Sequence[ScoredProblem], name: str) -> str | None:
    """Return why the scores of an aggregate cannot change the accuracy, or `None` if they can."""
    if all(score is None for problem in problems for score in problem.scores[name]):
        return "no candidate has a score"
    if not any({True, False} <= set(problem.correct) for problem in problems):
        return "no problem has both correct and wrong candidates, so the choice makes no difference"
    for problem in problems:
        scored: dict[bool | None, set[float]] = {True: set(), False: set(), None: set()}
        for score, right in zip(problem.scores[name], problem.correct, strict=True):
            if score is not None:
                scored[right].add(score)
        if scored[True] and scored[False] and len(scored[True] | scored[False]) > 1:
            return None
    return "in no problem do a correct and a wrong candidate have different scores, so the scores rank nothing"


def curve_with_gap(
    name: str, values: np.ndarray, n: Sequence[int], unranked: str | None = None, lowest: float = 0.0
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """
    Return a curve and its hacking gap. See [`Curves`].

    Args:
        name (`str`):
            Name of the curve, for error messages.
        values (`np.ndarray`):
            For each N, the share of subsets in which each problem is solved (0 or 1 for a single outcome), NaN if
            unknown. Shape `(len(n), P)`.
        n (`Sequence[int]`):
            Values of N, ascending.
        unranked, lowest:
            See [`~evaluation.reward_hacking.undecided_by`].

    Raises:
        `ValueError`: If for some N all values are unknown.
    """
    points = []
    for size, solved in zip(n, values, strict=True):
        known = solved[~np.isnan(solved)]
        if not len(known):
            raise ValueError(
                f"{name}: no selected solution has a grade at N={size}, so the accuracy is unknown. If the given grades are null, complete "
                "them, or leave out this N. If the grader timed out or crashed, increase --grader_timeout."
            )
        low, high = mean_interval(known)
        points.append({"n": size, "accuracy": float(known.mean()), "low": low, "high": high})
    return points, hacking_gap(points, values, unranked, lowest)


def plain_curves(
    scores: Sequence[Sequence[float | None]],
    correct: Sequence[Sequence[bool | None]],
    texts: Sequence[Sequence[str]],
    n: int | Sequence[int] | None = None,
) -> Curves:
    """
    Compute the accuracy of selecting solutions by their scores, as a function of N.

    Args:
        scores (`Sequence[Sequence[float | None]]`):
            For each of P problems, the scores of its M solutions in `[0, 1]`. Solutions without a score (`None`) are
            selected last.
        correct (`Sequence[Sequence[bool | None]]`):
            Whether each solution is correct: booleans, 0 or 1, or `None` if unknown. Subsets whose selected solution has
            no grade are ignored.
        texts (`Sequence[Sequence[str]]`):
            Texts of the solutions. Ties go to the smallest text, so the order of the solutions does not matter.
        n (`int` or `Sequence[int]`, *optional*):
            Numbers of solutions to select from. Defaults to the powers of two up to the smallest number of solutions
            of a problem, and that number.

    Returns:
        [`Curves`]: The curves `best_of_n/score` and `pass_at_n`. All accuracies are exact means over all subsets of N
        solutions. See [`make_curves`].

    Raises:
        `ValueError`: If the lists are empty or do not match, a score is not in `[0, 1]`, a grade is not a boolean, 0, 1 or
            `None`, or an N is larger than the number of solutions of a problem.
    """
    if not len(scores):
        raise ValueError("`scores` is empty. It must contain at least one problem.")
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
        if not all(grade is None or grade in (0, 1) for grade in grades):
            raise ValueError(
                f"problem {number}: the grades are {shown(list(grades), 200)}, expected True or False (or 1 or 0), or None if unknown."
            )
        # Python's types, because the curves compare grades with `is True`
        known = [None if grade is None else bool(grade) for grade in grades]
        numbers = [None if score is None else float(score) for score in values]
        no_classes = [None] * len(values)
        problems.append(ScoredProblem(str(number), no_classes, known, {PLAIN: numbers}, text_ranks(written)))
    if n is None:
        most = min(map(len, scores))
        n = [most, *(2**k for k in range(most.bit_length()) if 2**k <= most)]
    return make_curves(problems, np.atleast_1d(n).tolist())
