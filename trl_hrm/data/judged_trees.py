"""From a search tree to a step tree: equal siblings become one step, MC scores become labels, counts become columns."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from operator import add
from typing import NamedTuple

from ..search.tree import ROOT, SearchTree
from ..search.values import leaf_counts, make_label, mc_scores
from ..step_tree import StepTree
from .export_config import ExportConfig


class UnitedSteps(NamedTuple):
    """
    The steps of a search tree, equal siblings united.

    Args:
        texts (`list[str]`):
            S step texts.
        parents (`list[int]`):
            S indices of the step before, `-1` for the prompt.
        num_merged (`list[int]`):
            S counts of original steps in each text.
        members (`list[list[int]]`):
            For each step, the nodes that it is made of.
    """

    texts: list[str]
    parents: list[int]
    num_merged: list[int]
    members: list[list[int]]


def unite_steps(
    tree: SearchTree, notes: Counter, merge_separator: str = "\n", ends_apart: bool = False
) -> UnitedSteps:
    r"""
    Unite siblings with the same text, and what follows them, from the first step down. Rollouts are no steps.

    A step without text is left out with all that follows it.

    Args:
        tree ([`SearchTree`]):
            The tree.
        notes (`Counter`):
            Counts nodes united and left out.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step.
        ends_apart (`bool`, *optional*, defaults to `False`):
            Keep a step that ends a solution apart from one of the same text that does not.
    """
    texts, parents, num_merged, members = [], [], [], []
    found: dict[tuple, int] = {}
    step_of = {ROOT: ROOT}
    for i, node in enumerate(tree.nodes):
        if node.role == "rollout":
            continue
        parent = step_of.get(node.parent)
        if parent is None:
            notes["steps_after_blank_ones"] += 1
            continue
        pieces = tree.step_pieces(i)
        if not all(pieces):
            notes["blank_steps"] += 1
            continue
        text = merge_separator.join(pieces)
        step = found.setdefault((parent, text, len(pieces), ends_apart and node.is_final), len(texts))
        step_of[i] = step
        if step == len(texts):
            texts.append(text)
            parents.append(parent)
            num_merged.append(len(pieces))
            members.append([i])
        else:
            notes["equal_siblings_united"] += 1
            members[step].append(i)
    return UnitedSteps(texts, parents, num_merged, members)


def judge(tree: SearchTree, config: ExportConfig, notes: Counter) -> tuple[StepTree, list[list[int]]]:
    """
    Label the steps of a search tree.

    The MC score of a step made of several nodes is the mean of theirs, weighted by the leaves that each rests on. With
    `config.view="orm"`, only steps that end a solution have labels.

    Args:
        tree ([`SearchTree`]):
            A tree, or a view of one.
        config ([`ExportConfig`]):
            What a label is.
        notes (`Counter`):
            Counts of what was united or left out.

    Returns:
        `tuple[StepTree, list[list[int]]]`: The step tree, with counts of leaves and ids of nodes as columns, and the nodes
        that each of its steps is made of.
    """
    steps = unite_steps(tree, notes, config.merge_separator, ends_apart=config.view in ("orm", "sft"))
    scores = mc_scores(tree, config.estimator, config.truncated)
    correct, answered, unresolved = map(list, zip(*leaf_counts(tree), strict=True))
    evidence = answered if config.truncated == "drop" else list(map(add, answered, unresolved))
    labels: list[float | None] = []
    for members in steps.members:
        score = scores[members[0]] if len(members) == 1 else _pool([(scores[i], evidence[i]) for i in members])
        if config.view == "orm" and not any(tree.nodes[i].is_final for i in members):
            score = None
        if score is not None and not _rests_on(config.min_leaves, tree, members, evidence):
            notes["labels_on_too_few_leaves"] += 1
            score = None
        labels.append(None if score is None else make_label(score, config.labels, config.eta))
    columns = {
        "mc_correct": _sums(correct, steps.members),
        "mc_total": _sums(answered, steps.members),
        "mc_unresolved": _sums(unresolved, steps.members),
        "node_ids": [tree.nodes[members[0]].node_id for members in steps.members],
    }
    num_merged = steps.num_merged if config.hnc else None
    return StepTree(tree.problem.prompt, steps.texts, labels, steps.parents, num_merged, columns), steps.members


def right_solutions(tree: SearchTree, config: ExportConfig, notes: Counter) -> list[StepTree]:
    """
    The right solutions of a search tree, one step each: the whole text as the policy wrote it, labelled with the lowest MC
    score of the steps on its path. Solutions of equal steps are one. Those below `config.min_score` are left out.
    """
    judged, members_of = judge(tree, config, notes)
    lowest: list[float] = []
    solutions = []
    for step, members in enumerate(members_of):
        above = 1.0 if judged.parents[step] == ROOT else lowest[judged.parents[step]]
        label = judged.labels[step]
        lowest.append(above if label is None else min(above, label))
        right = [i for i in members if tree.nodes[i].is_final and tree.nodes[i].correct]
        if right and lowest[step] >= config.min_score:
            extra = {"node_id": tree.nodes[right[0]].node_id}
            solutions.append(StepTree(tree.problem.prompt, [tree.text(right[0])], [lowest[step]], [-1], extra=extra))
        elif right:
            notes["solutions_below_min_score"] += 1
    return solutions


def thin_labels(tree: StepTree, chances: Sequence[float], seed: int) -> None:
    """
    Make labels of full bins context at random, and add the column `label_weights`.

    A label stays with the chance of its bin and then has the inverse as its weight, so that weighted sums keep their
    expectation; a step without a label has weight 0. The same node has the same luck in every row.

    Args:
        tree ([`StepTree`]):
            Step tree with the column `node_ids`. It is changed.
        chances (`Sequence[float]`):
            Chance to stay, by bin. Without any, all labels stay.
        seed (`int`):
            Seed.
    """
    weights = []
    for step, label in enumerate(tree.labels):
        chance = 1.0 if label is None or not chances else chances[bin_of(label, len(chances))]
        if chance < 1 and _luck(seed, tree.step_columns["node_ids"][step]) >= chance:
            tree.labels[step] = label = None
        weights.append(0.0 if label is None else 1 / chance)
    tree.step_columns["label_weights"] = weights


def bin_of(label: float, num_bins: int) -> int:
    """The bin of a label among bins of equal width from 0 to 1; 1 is in the last one."""
    return min(int(label * num_bins), num_bins - 1)


def _sums(values: list[int], members_of: list[list[int]]) -> list[int]:
    """For each step, the sum of the values of its nodes."""
    return [values[members[0]] if len(members) == 1 else sum(values[i] for i in members) for members in members_of]


def _pool(known: list[tuple[float | None, int]]) -> float | None:
    """Mean of the scores given, weighted by the leaves behind them; the plain mean where there are no leaves."""
    known = [(score, leaves) for score, leaves in known if score is not None]
    if not known:
        return None
    total = sum(leaves for _, leaves in known)
    if total == 0:
        return sum(score for score, _ in known) / len(known)
    return sum(score * leaves for score, leaves in known) / total


def _rests_on(min_leaves: int, tree: SearchTree, members: list[int], evidence: list[int]) -> bool:
    """Whether a label rests on enough leaves. A recorded value is taken as it is."""
    if evidence[members[0]] >= min_leaves or tree.nodes[members[0]].value is not None:
        return True
    return sum(evidence[i] for i in members) >= min_leaves or any(tree.nodes[i].value is not None for i in members)


def _luck(seed: int, node_id: str) -> float:
    """A number from 0 to below 1 that depends on seed and node alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\n{node_id}".encode(), digest_size=8).digest(), "big") / 2**64
