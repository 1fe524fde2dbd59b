"""Measurements of the demo with the checker: solutions of a policy, MC scores of a search, and scores of a reward model."""

import math
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from ..data.candidate_sources import read_run
from ..io import read_json
from ..schema import Amount, Count, Share, check_json
from ..scoring.tree_scorer import TreeScorer
from ..search.nodes import read_trees
from ..search.run_folder import node_files
from ..search.tree import SearchTree
from ..search.values import leaf_counts, mc_scores
from ..step_metrics import auroc
from ..step_tree import StepTree
from .policy import policy_rates
from .world import MODULUS, Problem, judge


KINDS = ("correction", "locally_right", "first_error", "right")


class PolicyMeasures(TypedDict):
    """Result of [`measure_policy`]."""

    num_right: Count
    num_solutions: Count
    accuracy: Share
    slip_rate: Share
    correction_rate: Share
    spurious_rate: Share
    sight: Amount | None


class KindMeasures(TypedDict):
    """Result of [`measure_kinds`], with the spans."""

    spans: list[int]
    correction: float
    locally_right: float
    new_error: float
    auroc: Share


class ModelMeasures(TypedDict):
    """Result of [`measure_scores`], with `kinds`, the results of [`measure_kinds`]."""

    auroc: Share
    first_error_auroc: Share
    kinds: list[KindMeasures]


class MeanValue(TypedDict):
    """Mean MC score of a kind of steps."""

    mean: Share | None
    count: Count


class ValueMeasures(TypedDict):
    """Result of [`measure_values`], with the maximum depth of the search."""

    cap: Count
    correction: MeanValue
    locally_right: MeanValue
    first_error: MeanValue
    right: MeanValue
    unfinished: Share
    num_problems: Count


class SmallNode(TypedDict):
    """Node of a [`SmallTree`]."""

    parent: int
    text: str
    kind: str
    count: Count
    correct: bool | None
    value: Share | None


class SmallTree(TypedDict):
    """Result of [`small_tree`]."""

    problem: str
    nodes: list[SmallNode]


class HeldOutPoint(TypedDict):
    """Measurement of [`~demo.held_out.HeldOut`]."""

    step: Count
    lm_loss: float
    kl: float
    log_kl: float
    kl_max: float


class HeldOutMeasures(TypedDict):
    """Curve of a training, saved with its settings."""

    curve: list[HeldOutPoint]


class NumProblems(TypedDict):
    """Number of problems that the policy was trained on."""

    num_problems: Count


def read_measures(path: Path, hint: type, more: bool = False) -> dict[str, Any]:
    """Read a file of measurements. With `more`, it may have other keys."""
    remedy = "Delete the file and the record of its job in `.done`, and run the same command again."
    found = read_json(path, remedy)
    check_json(found, hint, path, remedy, more)
    return found


def measure_policy(run: str | Path) -> dict[str, Any]:
    """Return the accuracy of the solutions of a run, and the rates of slips and corrections (see [`~demo.policy.PolicyRates`])."""
    solutions = [
        (Problem.parse(problem.problem), one.text, one.answer)
        for problem in read_run(node_files(Path(run)), ["marker"])
        for one in problem.candidates
    ]
    rates = policy_rates((problem, text) for problem, text, _ in solutions)
    right = sum(answer == str(problem.values()[-1]) for problem, _, answer in solutions)
    return {
        "num_right": right,
        "num_solutions": len(solutions),
        "accuracy": right / len(solutions),
        "slip_rate": rates.slip_rate,
        "correction_rate": rates.correction_rate,
        "spurious_rate": rates.spurious_rate,
        "sight": None if rates.sight == math.inf else rates.sight,
    }


def run_trees(run: str | Path) -> Iterator[SearchTree]:
    """Yield the search trees of a run."""
    for file in node_files(Path(run)):
        yield from read_trees(file, token_ids=False)


def node_kinds(tree: SearchTree) -> list[str]:
    """Return the kind of each node's step. See [`~demo.world.Judged`]."""
    problem = Problem.parse(tree.problem.prompt)
    texts = [tree.step_text(i) for i in range(len(tree.nodes))]
    return [judge(problem, [texts[j] for j in tree.path(i)])[-1].kind for i in range(len(tree.nodes))]


def measure_values(run: str | Path, problems: Collection[str]) -> dict[str, Any]:
    """
    Return the mean MC score of the sampled steps of some problems by kind, and the share of leaves without an answer.

    As in the HRM paper, solutions that are cut off at the maximum depth count as wrong.
    """
    values: dict[str, list[float]] = defaultdict(list)
    num_problems = leaves = unresolved = 0
    for tree in run_trees(run):
        if tree.problem.prompt not in problems:
            continue
        num_problems += 1
        counts = leaf_counts(tree)[-1]
        leaves += counts.answered + counts.unresolved
        unresolved += counts.unresolved
        for kind, value in zip(node_kinds(tree), mc_scores(tree, truncated="wrong"), strict=False):
            if value is not None:
                values[kind].append(value)
    means = {
        kind: {"mean": fmean(values[kind]) if values[kind] else None, "count": len(values[kind])} for kind in KINDS
    }
    return {**means, "unfinished": unresolved / leaves, "num_problems": num_problems}


def measure_scores(scorer: TreeScorer, trees: Sequence[StepTree]) -> dict[str, float]:
    """
    Return how well scores of single steps separate right from wrong steps.

    `auroc` is over all steps. `first_error_auroc` is over steps without an error before them, which is the choice that a search
    faces.
    """
    scores, on_track, first = [], [], []
    for tree, found in zip(trees, scorer.score_trees(trees), strict=True):
        problem = Problem.parse(tree.prompt)
        for step, score in enumerate(found):
            *before, judged = judge(problem, [tree.completions[i] for i in tree.path(step)])
            scores.append(score)
            on_track.append(judged.on_track)
            first.append(judged.kind in ("right", "first_error") and all(one.on_track for one in before))
    values, labels, kept = np.array(scores), np.array(on_track), np.array(first)
    return {"auroc": auroc(values, labels), "first_error_auroc": auroc(values[kept], labels[kept])}


def slipped(problem: Problem, rng: random.Random) -> list[str]:
    """Return the beginning of a solution that ends with its first slip, with at least one operation left."""
    place = rng.randrange(len(problem.operations) - 1)
    values = problem.values()
    wrong = rng.choice([value for value in range(MODULUS) if value != values[place]])
    return [problem.step(i, values[i]) for i in range(place)] + [problem.step(place, wrong)]


def next_steps(problem: Problem, steps: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Return possible steps after a slip: a correction, a step that continues correctly, and a step with another slip."""
    place = len(steps) - 1
    due, wrong = problem.values()[place], int(steps[-1][-1])
    right = problem.values()[place + 1]
    others = [value for value in range(MODULUS) if value not in (wrong, right)]
    return {
        "correction": problem.step(place, due, correction=True),
        "locally_right": problem.step(place + 1, wrong),
        "new_error": problem.step(place + 1, rng.choice(others)),
    }


def measure_kinds(
    scorer: TreeScorer, starts: Iterable[tuple[Problem, list[str]]], spans: Sequence[int], seed: int
) -> dict[str, float]:
    """Return the mean scores of the [`next_steps`] after slips, and the AUROC of corrections against the other two (`auroc`)."""
    rng = random.Random(seed)
    trees = []
    for problem, steps in starts:
        ends = list(next_steps(problem, steps, rng).values())
        parents = [*range(-1, len(steps) - 1), *[len(steps) - 1] * len(ends)]
        trees.append(StepTree(problem.text(), [*steps, *ends], [None] * len(parents), parents))
    names = ("correction", "locally_right", "new_error")
    scores = np.array([found[-len(names) :] for found in scorer.score_trees(trees, spans)])
    is_correction = np.zeros(scores.shape, bool)
    is_correction[:, 0] = True
    means = dict(zip(names, scores.mean(axis=0).tolist(), strict=True))
    return {**means, "auroc": auroc(scores.ravel(), is_correction.ravel())}


def small_tree(run: str | Path, most_nodes: int = 25) -> dict[str, Any]:
    """
    Return a part of a search tree for a picture: its most frequent paths, and a path with a correction if there is one.

    Nodes with equal text after the same steps are merged.
    """
    found = []
    for tree in run_trees(run):
        nodes = _distinct(tree)
        corrected = [i for i, node in enumerate(nodes) if node["kind"] == "correction" and node["value"] is not None]
        found.append((len(corrected), tree.problem.prompt, nodes, corrected))
    _, problem, nodes, corrected = max(found, key=lambda one: one[0])
    return {"problem": problem, "nodes": _frequent(nodes, corrected, most_nodes)}


def _distinct(tree: SearchTree) -> list[dict[str, Any]]:
    """Return the nodes of a tree with their mean value. Nodes with equal text after the same steps are merged."""
    place: dict[int, int] = {-1: -1}
    found: dict[tuple[int, str], int] = {}
    nodes: list[dict[str, Any]] = []
    values: list[list[float]] = []
    for i, (node, kind, value) in enumerate(zip(tree.nodes, node_kinds(tree), mc_scores(tree), strict=False)):
        text = tree.step_text(i)
        key = (place[node.parent], text)
        place[i] = found.setdefault(key, len(nodes))
        if place[i] == len(nodes):
            nodes.append({"parent": key[0], "text": text, "kind": kind, "count": 0, "correct": node.correct})
            values.append([])
        nodes[place[i]]["count"] += 1
        if value is not None:
            values[place[i]].append(value)
    for node, seen in zip(nodes, values, strict=True):
        node["value"] = fmean(seen) if seen else None
    return nodes


def _frequent(nodes: list[dict[str, Any]], corrected: list[int], most: int) -> list[dict[str, Any]]:
    """Return the most frequent correction with its ancestors and most frequent descendants, then the most frequent other nodes."""
    kept: set[int] = set()

    def keep(i: int) -> None:
        while i != -1 and i not in kept:
            kept.add(i)
            i = nodes[i]["parent"]

    below: dict[int, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        below[node["parent"]].append(i)
    i = max(corrected or below[-1], key=lambda i: nodes[i]["count"])
    keep(i)
    while below[i]:
        i = max(below[i], key=lambda i: nodes[i]["count"])
        keep(i)
    for i in sorted(range(len(nodes)), key=lambda i: (-nodes[i]["count"], i)):
        if len(kept) < most and (nodes[i]["parent"] == -1 or nodes[i]["parent"] in kept):
            kept.add(i)
    new = {-1: -1} | {old: number for number, old in enumerate(sorted(kept))}
    return [{**nodes[old], "parent": new[nodes[old]["parent"]]} for old in sorted(kept)]
