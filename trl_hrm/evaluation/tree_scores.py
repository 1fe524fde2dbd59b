"""Scores of step trees, without the steps that a reward model has no room for."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ..scoring.paths import TreeScorer
from ..step_tree import StepTree


def score_fitting(
    scorer: TreeScorer,
    trees: Sequence[StepTree],
    spans: Sequence[int] = (1,),
    combine: Literal["max", "mean"] = "max",
    counts: Counter | None = None,
) -> list[list[float | None]]:
    """
    Score every step of step trees in one call of the scorer.

    Args:
        scorer ([`~scoring.paths.TreeScorer`]):
            The reward model.
        trees (`Sequence[StepTree]`):
            Trees; a step that is too long has no steps after it.
        spans, combine:
            How steps are scored. See [`~scoring.paths.TreeScorer.score`].
        counts (`Counter`, *optional*):
            Counts `num_tokens`: for each path to an end of a tree that is scored, its tokens and those of the problem.

    Returns:
        `list[list[float | None]]`: Scores of each tree, in order of its steps. `None` for a step whose path has more tokens than
        the model has positions, also where it is judged merged with those before it.
    """
    lengths = [_lengths(scorer, tree, spans) for tree in trees]
    limit = math.inf if scorer.max_positions is None else scorer.max_positions
    fitting = [[i for i, longest in enumerate(found) if longest <= limit] for _, found in lengths]
    kept = [_part(tree, steps) for tree, steps in zip(trees, fitting, strict=True) if steps]
    if counts is not None:
        for tree, steps, (ends, _) in zip(trees, fitting, lengths, strict=True):
            counts["num_tokens"] += sum(ends[i] for i in set(steps) - {tree.parents[i] for i in steps})
    found = iter(scorer.score_trees(kept, spans, combine) if kept else ())
    scores: list[list[float | None]] = []
    for tree, steps in zip(trees, fitting, strict=True):
        known = dict(zip(steps, next(found), strict=True)) if steps else {}
        scores.append([known.get(i) for i in range(len(tree.completions))])
    return scores


def _part(tree: StepTree, steps: list[int]) -> StepTree:
    """The tree with some of its steps alone."""
    if len(steps) == len(tree.completions):
        return tree
    places = {-1: -1} | {i: place for place, i in enumerate(steps)}
    return replace(
        tree,
        completions=[tree.completions[i] for i in steps],
        labels=[tree.labels[i] for i in steps],
        parents=[places[tree.parents[i]] for i in steps],
    )


def _lengths(scorer: TreeScorer, tree: StepTree, spans: Sequence[int]) -> tuple[list[int], list[int]]:
    """For each step the tokens to its end, and those of the longest path by which it is judged, merged steps included."""
    paths = [tree.path(i) for i in range(len(tree.completions))]
    runs = [path[-span:] for path in paths for span in spans if 1 < span <= len(path)]
    merged = [scorer.step_format.merge([tree.completions[i] for i in run]) for run in runs]
    prompt_ids, step_ids = scorer.step_format.encode(scorer.tokenizer, tree.prompt, [*tree.completions, *merged])
    ends = {-1: len(prompt_ids)}
    for i, parent in enumerate(tree.parents):
        ends[i] = ends[parent] + len(step_ids[i])
    longest = dict(ends)
    for run, ids in zip(runs, step_ids[len(paths) :], strict=True):
        longest[run[-1]] = max(longest[run[-1]], ends[tree.parents[run[0]]] + len(ids))
    return [ends[i] for i in range(len(paths))], [longest[i] for i in range(len(paths))]
