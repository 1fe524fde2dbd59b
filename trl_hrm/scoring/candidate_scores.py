"""
Score candidate solutions and step trees, and skip the ones that are too long for the model.

RAFT, best-of-N, benchmarks and step searches use these functions. A solution with more tokens than the model has positions gets
the score `None` instead of an error.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tqdm.auto import tqdm

from ..forest import TokenTrie
from ..io import shown
from ..step_tree import StepTree
from .aggregate import aggregate
from .generative_scorer import JUDGE_COUNTS, GenerativeScorer
from .scoring_config import ScoringConfig
from .tree_scorer import TreeScorer, check_scores, merged_runs


BLOCK = 64  # number of problems per call of the scorer, and per update of the progress bar


def score_steps(
    scorer: TreeScorer,
    problems: Sequence[str],
    candidates: Sequence[Sequence[Sequence[str]]],
    scoring: ScoringConfig,
    places: Sequence[Sequence[str]] | None = None,
    counts: Counter | None = None,
) -> list[list[list[float] | None]]:
    """
    Score the steps of candidate solutions in one call of the scorer.

    Args:
        scorer ([`TreeScorer`]):
            Reward model, or any object with the attributes `score`, `tokenizer`, `step_format` and `max_positions`.
        problems (`Sequence[str]`):
            B problems.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            N candidates for each problem, each a list of S step texts.
        scoring ([`ScoringConfig`]):
            How steps are scored.
        places (`Sequence[Sequence[str]]`, *optional*):
            Source of each candidate, for error messages.
        counts (`Counter`, *optional*):
            Counter to add `candidates_too_long`, `candidates_without_verdict`, `scorer_tokens`, `scorer_steps`, `scorer_calls` and
            `scorer_seconds` to. For a [`GenerativeScorer`], also what the call added to its `cost`,
            with the prefix `judge_`.

    Returns:
        `list[list[list[float] | None]]`: Scores of the S steps of each candidate, in `[0, 1]`, or `None` if it has more tokens
        than the model has positions, or a [`GenerativeScorer`] has no score for one of its steps.

    Raises:
        `ValueError`: If the number of scores is not the number of steps, or a score is not in `[0, 1]`, or if the tokenizer merges
        the separator with a step.
    """
    counts = Counter() if counts is None else counts
    scores: list[list[list[float] | None]] = [[None] * len(group) for group in candidates]
    fitting: list[tuple[int, list[int]]] = []
    for i, (problem, group) in enumerate(zip(problems, candidates, strict=True)):
        members = []
        for j, steps in enumerate(group):
            where = f"prompt {shown(problem)}" if places is None else places[i][j]
            try:
                ends, longest = path_lengths(scorer, problem, steps, range(-1, len(steps) - 1), scoring)
            except ValueError as error:  # the tokenizer merges a separator with a step
                raise ValueError(f"{where}: {error}") from error
            if scorer.max_positions is not None and max(longest.values()) > scorer.max_positions:
                counts["candidates_too_long"] += 1
                continue
            members.append(j)
            counts["scorer_tokens"] += ends[len(steps) - 1]
            counts["scorer_steps"] += len(steps)
        if members:
            fitting.append((i, members))
    if not fitting:
        return scores
    cost = dict(scorer.cost) if isinstance(scorer, GenerativeScorer) else {}
    began = time.perf_counter()
    found = scorer.score(
        [problems[i] for i, _ in fitting],
        [[candidates[i][j] for j in members] for i, members in fitting],
        spans=scoring.spans,
        combine=scoring.combine,
    )
    seconds = time.perf_counter() - began
    if isinstance(scorer, GenerativeScorer):
        spent = {name: value - cost[name] for name, value in scorer.cost.items()}
        seconds = spent.pop("seconds")  # also of earlier starts
        counts.update({f"judge_{name}": value for name, value in spent.items()})
    counts["scorer_seconds"] += seconds
    counts["scorer_calls"] += 1
    for (i, members), values in zip(fitting, found, strict=True):
        for j, step_scores in zip(members, values, strict=True):
            if isinstance(scorer, GenerativeScorer) and None in step_scores:
                counts["candidates_without_verdict"] += 1
                continue
            where = f"prompt {shown(problems[i])}" if places is None else places[i][j]
            check_scores(step_scores, len(candidates[i][j]), where)
            scores[i][j] = list(step_scores)
    return scores


def score_spans(
    scorer: TreeScorer, problem: str, steps: Sequence[str], scoring: ScoringConfig
) -> list[dict[int, float | None]]:
    """
    Score the steps of one solution without combining the scores of a step over several spans. [`~scoring.tree_scorer.combined`] gives
    the scores of [`TreeScorer.score`].

    Args:
        scorer ([`TreeScorer`]):
            Reward model.
        problem (`str`):
            The problem.
        steps (`Sequence[str]`):
            S step texts.
        scoring ([`ScoringConfig`]):
            How steps are scored.

    Returns:
        `list[dict[int, float | None]]`: For each of the S steps, its scores by the number of steps that are scored as one: 1 is the
        step alone, 2 is the step merged with the previous step. `None` if a judge gave no readable verdict.

    Raises:
        `ValueError`: See [`TreeScorer.score`].
    """
    parents = list(range(-1, len(steps) - 1))
    runs = []
    if scoring.merges:
        scorer.step_format.check_merged(scorer.tokenizer)
        runs = merged_runs(steps, parents, scoring, scorer.step_format)
    texts = [*steps, *(scorer.step_format.merge([steps[i] for i in run]) for run in runs)]
    tree = StepTree(problem, texts, [None] * len(texts), [*parents, *(parents[run[0]] for run in runs)])
    [scores] = scorer.score_trees([tree])
    found: list[dict[int, float | None]] = [{1: score} for score in scores[: len(steps)]]
    for run, score in zip(runs, scores[len(steps) :], strict=True):
        found[run[-1]][len(run)] = score
    return found


def scorer_cost(counts: Counter) -> dict[str, float]:
    """Return the cost of the scorer in the counts of [`score_steps`]. `num_tokens` are the tokens of the problems and the steps."""
    cost = {
        "seconds": counts["scorer_seconds"],
        "num_calls": counts["scorer_calls"],
        "num_steps": counts["scorer_steps"],
        "num_tokens": counts["scorer_tokens"],
    }
    if "judge_samples" in counts:
        cost |= {f"judge_{name}": counts[f"judge_{name}"] for name in JUDGE_COUNTS}  # sums of counters have no zeros
    return cost


def score_candidates(
    scorer: TreeScorer,
    problems: Sequence[str],
    candidates: Sequence[Sequence[Sequence[str]]],
    name: str,
    scoring: ScoringConfig,
    progress: bool = False,
) -> list[list[float | None]]:
    """
    Return one score for each candidate solution. Problems are scored in blocks, to bound memory.

    Args:
        scorer ([`TreeScorer`]):
            Reward model.
        problems (`Sequence[str]`):
            B problems.
        candidates (`Sequence[Sequence[Sequence[str]]]`):
            N candidates for each problem, each a list of S step texts.
        name (`str`):
            How to aggregate the scores of the steps. See [`aggregate`].
        scoring ([`ScoringConfig`]):
            How steps are scored.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[list[float | None]]`: Scores in `[0, 1]`, problems × candidates. `None` for a candidate with more tokens than
        the model has positions.
    """
    scores: list[list[float | None]] = []
    with tqdm(total=len(problems), desc="Scoring", unit="problem", disable=not progress) as bar:
        for start in range(0, len(problems), BLOCK):
            block = slice(start, start + BLOCK)
            for group in score_steps(scorer, problems[block], candidates[block], scoring):
                scores.append([None if steps is None else aggregate(steps, name) for steps in group])
            bar.update(len(problems[block]))
    return scores


def score_fitting(
    scorer: TreeScorer, trees: Sequence[StepTree], scoring: ScoringConfig, counts: Counter | None = None
) -> list[list[float | None]]:
    """
    Score every step of step trees in one call of the scorer, and skip the steps that are too long.

    Args:
        scorer ([`TreeScorer`]):
            Reward model, or any object with the attributes `score_trees`, `tokenizer`, `step_format` and `max_positions`.
        trees (`Sequence[StepTree]`):
            Step trees. A step that is too long must be a leaf.
        scoring ([`ScoringConfig`]):
            How steps are scored.
        counts (`Counter`, *optional*):
            Counter to add `num_tokens` to: the tokens of the problem and the steps, summed over the scored paths.

    Returns:
        `list[list[float | None]]`: Scores of each tree, in order of its steps. `None` for a step whose path, including merged
        steps, has more tokens than the model has positions.
    """
    limit = math.inf if scorer.max_positions is None else scorer.max_positions
    fitting, parts = [], []
    for tree in trees:
        ends, longest = path_lengths(scorer, tree.prompt, tree.completions, tree.parents, scoring)
        kept = [i for i in range(len(tree.completions)) if longest[i] <= limit]
        fitting.append(kept)
        if counts is not None:
            counts["num_tokens"] += sum(ends[i] for i in set(kept) - {tree.parents[i] for i in kept})
        if kept and len(kept) == len(tree.completions):
            parts.append(tree)
        elif kept:
            places = {-1: -1} | {i: place for place, i in enumerate(kept)}
            parts.append(
                replace(
                    tree,
                    completions=[tree.completions[i] for i in kept],
                    labels=[tree.labels[i] for i in kept],
                    parents=[places[tree.parents[i]] for i in kept],
                )
            )
    found = iter(scorer.score_trees(parts, scoring.spans, scoring.combine) if parts else ())
    scores: list[list[float | None]] = []
    for tree, kept in zip(trees, fitting, strict=True):
        known = dict(zip(kept, next(found), strict=True)) if kept else {}
        scores.append([known.get(i) for i in range(len(tree.completions))])
    return scores


def fits(
    scorer: TreeScorer, problem: str, steps: Sequence[str], parents: Sequence[int], scoring: ScoringConfig
) -> bool:
    """Return whether every step, including merged steps, fits into the positions of the model."""
    if scorer.max_positions is None:
        return True
    _, longest = path_lengths(scorer, problem, steps, parents, scoring)
    return max(longest.values()) <= scorer.max_positions


def path_lengths(
    scorer: TreeScorer, problem: str, steps: Sequence[str], parents: Sequence[int], scoring: ScoringConfig
) -> tuple[dict[int, int], dict[int, int]]:
    """
    Return the number of tokens from the start of the problem to the end of each step.

    Args:
        scorer ([`TreeScorer`]):
            Reward model.
        problem (`str`):
            The problem.
        steps (`Sequence[str]`):
            S step texts.
        parents (`Sequence[int]`):
            For each of the S steps, the index of the previous step, or `-1` for the problem.
        scoring ([`ScoringConfig`]):
            How steps are scored.

    Returns:
        `tuple[dict[int, int], dict[int, int]]`: For each step, and for the problem at `-1`: the tokens up to its end, and the
        tokens of the longest path that is scored for it, including merged steps.
    """
    if isinstance(scorer, GenerativeScorer):
        ends = scorer.path_lengths(problem, steps, parents)
        return ends, ends
    runs = merged_runs(steps, parents, scoring, scorer.step_format)
    merged = [scorer.step_format.merge([steps[i] for i in run]) for run in runs]
    trie = TokenTrie()
    all_parents = [*parents, *(parents[run[0]] for run in runs)]
    nodes = scorer.step_format.insert(trie, scorer.tokenizer, problem, [*steps, *merged], all_parents)
    lengths = {i: trie.path_length(node) for i, node in nodes.items()}
    ends = {i: lengths[i] for i in range(-1, len(steps))}
    longest = dict(ends)
    for number, run in enumerate(runs, start=len(steps)):
        longest[run[-1]] = max(longest[run[-1]], lengths[number])
    return ends, longest
