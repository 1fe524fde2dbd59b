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
from .self_training import choose, distinct


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
    Unite siblings with the same text, and their subtrees, from the first step down. Rollouts are not steps.

    A step without text is left out with all that follows it. Where it only ends the solution (a policy that writes a blank
    line and then the end of the sequence), the solution ends with the step before it.

    Args:
        tree ([`SearchTree`]):
            The tree.
        notes (`Counter`):
            Counts nodes united and left out.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step.
        ends_apart (`bool`, *optional*, defaults to `False`):
            Keep a step that ends a solution apart from one of the same text that does not. A step that ends by blank nodes
            below it is made of these: their outcomes are its own, and what else follows it is not.
    """
    blank_ends = {
        i
        for i, node in enumerate(tree.nodes)
        if node.is_final and node.role != "rollout" and node.parent != ROOT and not tree.step_text(i)
    }
    goes_on = {node.parent for i, node in enumerate(tree.nodes) if i not in blank_ends}
    ended = {tree.nodes[i].parent for i in blank_ends} - goes_on if ends_apart else set()
    texts, parents, num_merged, members = [], [], [], []
    found: dict[tuple, int] = {}
    step_of = {ROOT: ROOT}
    for i, node in enumerate(tree.nodes):
        if node.role == "rollout" or i in ended:
            continue
        written = i
        if i in blank_ends:
            notes["blank_ends"] += 1
            if not ends_apart:
                continue
            written = node.parent
        parent = step_of.get(tree.nodes[written].parent)
        if parent is None:
            notes["steps_after_blank_ones"] += 1
            continue
        pieces = tree.step_pieces(written)
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


def label_steps(tree: SearchTree, config: ExportConfig, notes: Counter) -> tuple[StepTree, list[list[int]]]:
    """
    Label the steps of a search tree.

    The MC score of a step made of several nodes is the mean of their scores, weighted by `Node.weight`: each node is one draw. The
    number of leaves of a draw depends on its outcome, so leaves as weights would bias the mean. They are the weights only for
    `estimator="leaf_share"`, which pools them. With `config.view="orm"`, only steps that end a solution have labels.

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
    pooled = config.estimator == "leaf_share"
    weights = [evidence[i] or 1 if pooled else node.weight for i, node in enumerate(tree.nodes)]
    labels: list[float | None] = []
    for members in steps.members:
        known = [i for i in members if scores[i] is not None]
        score = scores[members[0]]
        if len(members) > 1:
            total = sum(weights[i] for i in known)
            score = sum(scores[i] * weights[i] for i in known) / total if known else None
        if config.view == "orm" and not any(tree.nodes[i].is_final for i in members):
            score = None
        rests_on_enough = sum(evidence[i] for i in members) >= config.min_leaves
        is_recorded = any(tree.nodes[i].value is not None for i in members)
        if score is not None and not (rests_on_enough or is_recorded):
            notes["labels_on_too_few_leaves"] += 1
            score = None
        labels.append(None if score is None else make_label(score, config.labels, config.eta))
    sums = {"mc_correct": correct, "mc_total": answered, "mc_unresolved": unresolved}
    columns = {
        name: [sum(map(counts.__getitem__, members)) for members in steps.members] for name, counts in sums.items()
    }
    columns["node_ids"] = [tree.nodes[members[0]].node_id for members in steps.members]
    num_merged = steps.num_merged if config.hnc else None
    return StepTree(tree.problem.prompt, steps.texts, labels, steps.parents, num_merged, columns), steps.members


def right_solutions(tree: SearchTree, config: ExportConfig, notes: Counter) -> list[StepTree]:
    """
    The right solutions of a search tree, one step each: the whole text as the policy wrote it, labelled with the lowest MC
    score of the judged steps on its path, and the leaves below the first step with that score. Equal solutions are one, that
    with the highest score. Those below `config.min_mc_score` are left out, and all but the `config.max_solutions` with the highest
    scores: of equal scores, those that rest on more leaves. They stay in their order in the tree.

    Raises:
        `ValueError`: If the solutions go on from a beginning that was given.
    """
    if any(node.role == "given" for node in tree.nodes):
        raise ValueError(
            f"problem {tree.problem.problem_id!r}: its solutions begin with steps that were given (--prefix_column), which are not the "
            "policy's. Export solutions of a run without them."
        )
    judged, members_of = label_steps(tree, config, notes)
    worst: list[int | None] = []  # the first step with the lowest score up to each step
    solutions, ends = [], []
    for step, members in enumerate(members_of):
        lowest = None if judged.parents[step] == ROOT else worst[judged.parents[step]]
        label = judged.labels[step]
        if label is not None and (lowest is None or label < judged.labels[lowest]):
            lowest = step
        worst.append(lowest)
        right = [i for i in members if tree.nodes[i].is_final and tree.nodes[i].correct]
        if right:
            notes["solutions_found"] += len(right)
            extra = {name: judged.step_columns[name][lowest] for name in ("mc_correct", "mc_total")}
            extra["node_id"] = tree.nodes[right[0]].node_id
            label = judged.labels[lowest]
            solutions.append(StepTree(tree.problem.prompt, [tree.text(right[0])], [label], [-1], extra=extra))
            ends.append(step)
    ranked = sorted(range(len(solutions)), key=lambda i: -solutions[i].labels[0])
    best = sorted(ranked[i] for i in distinct([solutions[i].completions[0] for i in ranked]))
    solutions, ends = [solutions[i] for i in best], [ends[i] for i in best]
    notes["duplicate_solutions"] += notes["solutions_found"] - len(solutions)
    choice = choose(
        [solution.labels[0] for solution in solutions],
        config.min_mc_score,
        config.max_solutions,
        [solution.extra["mc_total"] for solution in solutions],
    )
    notes["solutions_below_min_score"] += choice.num_below
    notes["solutions_beyond_top_k"] += choice.num_beyond
    notes["solutions_with_unjudged_steps"] += sum(
        any(judged.labels[step] is None for step in judged.path(ends[i])) for i in choice.kept
    )
    return [solutions[i] for i in sorted(choice.kept)]


def leave_out_copies(view: StepTree, tree: StepTree, notes: Counter) -> StepTree:
    """
    The paths of a compressed view that say something new: those with a merged step, and those with texts or labels that no
    path of the tree has. As flat rows the others would only double what the tree says.

    Args:
        view ([`StepTree`]):
            The judged view.
        tree ([`StepTree`]):
            The judged tree.
        notes (`Counter`):
            Counts the paths left out.
    """
    known = {_texts_and_labels(tree, tree.path(leaf)) for leaf in tree.leaves()}
    paths = [view.path(leaf) for leaf in view.leaves()]
    new = [
        path
        for path in paths
        if any(view.num_merged[i] > 1 for i in path) or _texts_and_labels(view, path) not in known
    ]
    notes["hnc_paths_as_in_the_tree"] += len(paths) - len(new)
    return view.keep(sorted({step for path in new for step in path}))


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
        if chance < 1:
            drawn = hashlib.blake2b(f"{seed}\n{tree.step_columns['node_ids'][step]}".encode(), digest_size=8).digest()
            if int.from_bytes(drawn, "big") / 2**64 >= chance:
                tree.labels[step] = label = None
        weights.append(0.0 if label is None else 1 / chance)
    tree.step_columns["label_weights"] = weights


def bin_of(label: float, num_bins: int) -> int:
    """The bin of a label among bins of equal width from 0 to 1; 1 is in the last one."""
    return min(int(label * num_bins), num_bins - 1)


def _texts_and_labels(tree: StepTree, path: list[int]) -> tuple[tuple[str, float | None], ...]:
    return tuple((tree.completions[i], tree.labels[i]) for i in path)
