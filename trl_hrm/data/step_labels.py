"""Convert search trees to step trees: merge identical siblings, and compute labels from MC scores."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..io import shown
from ..search.compression import compress
from ..search.tree import ROOT, SearchTree
from ..search.values import RELATIVE_LABELS, LeafCounts, leaf_counts, make_label, mc_scores
from ..step_tree import StepTree
from .export_config import ExportConfig
from .self_training import choose, distinct


Cell = tuple[int, ...]
MIN_CHANCE = 0.1  # minimum probability of keeping a label when balancing by depth, as in HRM's code


class UnitedSteps(NamedTuple):
    """
    The steps of a search tree after identical siblings were united.

    Args:
        texts (`list[str]`):
            S step texts.
        parents (`list[int]`):
            S indices of the step before each step, `-1` for the prompt.
        num_merged (`list[int]`):
            S counts of original steps in each text.
        members (`list[list[int]]`):
            S lists of the nodes that form the step.
    """

    texts: list[str]
    parents: list[int]
    num_merged: list[int]
    members: list[list[int]]

    def path(self, step: int) -> list[int]:
        """Return the indices of the steps from the first step to `step`, inclusive."""
        path = []
        while step != ROOT:
            path.append(step)
            step = self.parents[step]
        return path[::-1]


def unite_steps(
    tree: SearchTree, notes: Counter, merge_separator: str = "\n", ends_apart: bool = False
) -> UnitedSteps:
    r"""
    Unite siblings with the same text, and their subtrees, from the first step down. Rollouts are not steps.

    A step without text is dropped, with all steps after it. If it only ends the solution, because the policy wrote a blank line
    and then the end of the sequence, the solution ends with the step before it.

    Args:
        tree ([`SearchTree`]):
            Search tree.
        notes (`Counter`):
            Counter of united and dropped nodes. It is updated in place.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step.
        ends_apart (`bool`, *optional*, defaults to `False`):
            Do not unite a step that ends a solution with a step of the same text that does not. If a step ends a solution only
            through blank nodes below it, the ending step consists of these blank nodes and has only their outcomes.
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


def compressed(tree: SearchTree, config: ExportConfig) -> SearchTree:
    """Return the compressed view of a search tree. `config` can be any config with the `hnc` options."""
    return compress(
        tree, config.hnc_seed, config.hnc_probability, config.hnc_min_children, config.hnc_passes, config.hnc_rule
    )


def solution_ends(tree: SearchTree, steps: UnitedSteps) -> dict[int, list[int]]:
    """
    Return the united steps that end a solution, each with the nodes that end it: its own final nodes, and the blank nodes below it
    that only end the solution. The path to such a step is a complete solution.

    Args:
        tree ([`SearchTree`]):
            Search tree.
        steps ([`UnitedSteps`]):
            Its united steps, with `ends_apart=False`.
    """
    step_of = {i: step for step, members in enumerate(steps.members) for i in members}
    ends = defaultdict(list)
    for i, node in enumerate(tree.nodes):
        if node.is_final and node.role != "rollout":
            step = step_of.get(i, step_of.get(node.parent))
            if step is not None:
                ends[step].append(i)
    return dict(sorted(ends.items()))


def score_steps(
    tree: SearchTree, members: list[list[int]], counts: list[LeafCounts], config: ExportConfig
) -> tuple[list[float | None], list[bool]]:
    """
    Return the MC score of each united step, and whether it is estimated from at least `config.min_leaves` leaves or recorded by
    the source. The last entries are for the prompt.

    The MC score of a step that consists of several nodes is the mean of their scores, weighted by `Node.weight`, since each node
    is one sample. Weighting by the number of leaves would bias the mean, because this number depends on the outcome of the
    sample. It is used only for `estimator="leaf_share"`, which pools the leaves.

    Args:
        tree ([`SearchTree`]):
            Search tree with N nodes.
        members (`list[list[int]]`):
            For each of the S steps, the nodes that form it.
        counts (`list[LeafCounts]`):
            N + 1 leaf counts, from [`leaf_counts`].
        config ([`ExportConfig`]):
            Options of the labels.
    """
    scores = mc_scores(tree, config.estimator, config.truncated)
    evidence = [count.answered + (count.unresolved if config.truncated == "wrong" else 0) for count in counts]
    pooled = config.estimator == "leaf_share"
    weights = [evidence[i] or 1 if pooled else node.weight for i, node in enumerate(tree.nodes)]
    is_recorded = [*(node.value is not None for node in tree.nodes), tree.value is not None]
    values, are_enough = [], []
    for group in [*members, [ROOT]]:
        value = scores[group[0]]
        if len(group) > 1:
            known = [i for i in group if scores[i] is not None]
            total = sum(weights[i] for i in known)
            value = sum(scores[i] * weights[i] for i in known) / total if known else None
        values.append(value)
        are_enough.append(sum(evidence[i] for i in group) >= config.min_leaves or any(is_recorded[i] for i in group))
    return values, are_enough


def label_steps(tree: SearchTree, config: ExportConfig, notes: Counter) -> tuple[StepTree, list[list[int]]]:
    """
    Label the steps of a search tree by their MC scores. See [`score_steps`] and [`make_label`].

    With `config.view="orm"`, only steps that end a solution have labels. Labels that compare two MC scores (`"progress"`,
    `"ratio"`) come with the scores of the steps in the column `mc_scores` and the score of the prompt in `prompt_mc_score`, from
    which [`hrm_view`] computes the labels of merged steps.

    Args:
        tree ([`SearchTree`]):
            Search tree, or a compressed view of one.
        config ([`ExportConfig`]):
            Options of the labels.
        notes (`Counter`):
            Counter of united and dropped nodes, and of labels that are missing. It is updated in place.

    Returns:
        `tuple[StepTree, list[list[int]]]`: The step tree, with leaf counts and node ids as columns, and for each of its steps the
        nodes that form it.
    """
    steps = unite_steps(tree, notes, config.merge_separator, ends_apart=config.view in ("orm", "sft"))
    counts = leaf_counts(tree)
    scores, are_enough = score_steps(tree, steps.members, counts, config)
    is_relative = config.labels in RELATIVE_LABELS
    # the last value is for the prompt, which has the index -1 as a parent
    values = [score if enough else None for score, enough in zip(scores, are_enough, strict=True)]
    labels: list[float | None] = []
    for step, members in enumerate(steps.members):
        value = values[step]
        if config.view == "orm" and not any(tree.nodes[i].is_final for i in members):
            labels.append(None)
            continue
        if value is None:
            if scores[step] is not None:
                notes["labels_on_too_few_leaves"] += 1
            labels.append(None)
            continue
        before = values[steps.parents[step]] if is_relative else None
        labels.append(make_label(value, config.labels, config.eta, config.threshold, before))
        if labels[-1] is None:
            notes["labels_without_mc_score_before" if before is None else "labels_after_mc_score_0"] += 1
    columns = {
        name: [sum(getattr(counts[i], field) for i in members) for members in steps.members]
        for name, field in (("mc_correct", "correct"), ("mc_total", "answered"), ("mc_unresolved", "unresolved"))
    }
    columns["node_ids"] = [tree.nodes[members[0]].node_id for members in steps.members]
    extra = {}
    if is_relative:
        *columns["mc_scores"], extra["prompt_mc_score"] = values
    num_merged = steps.num_merged if config.hnc else None
    labelled = StepTree(tree.problem.prompt, steps.texts, labels, steps.parents, num_merged, columns, extra)
    return labelled, steps.members


def sft_rows(tree: SearchTree, config: ExportConfig, notes: Counter, view: SearchTree | None = None) -> list[StepTree]:
    """
    Return the rows of a search tree for supervised fine-tuning, in tree order, each as a step tree with a single step.

    Each row is a correct solution, as written by the policy. Its label is the lowest MC score of the labelled steps on its path,
    and its leaf counts are from the first step with this score. With `config.prefixes`, each row is the text up to a step with
    an MC score, and has the score and the leaf counts of this step. `extra["is_complete"]` tells whether the solution ends there.

    Of identical texts, the one with the highest score is kept, and of these a complete one. Texts below `config.min_mc_score` are
    dropped, as are all but the `config.max_solutions` with the highest scores. Ties are broken by the number of leaves.

    Args:
        tree ([`SearchTree`]):
            Search tree.
        config ([`ExportConfig`]):
            Options of the export.
        notes (`Counter`):
            Counter of found and dropped texts. It is updated in place.
        view ([`SearchTree`], *optional*):
            Compressed view of the tree. It has the same texts, so it adds no row that the tree cannot have, but some scores differ.
            Each text has the higher of its two scores.

    Raises:
        `ValueError`: If the solutions continue from a given prefix.
    """
    if any(node.role == "given" for node in tree.nodes):
        raise ValueError(
            f"problem {shown(tree.problem.problem_id)}: its solutions begin with a given prefix (--prefix_column), which the policy did not "
            "write. Export solutions from a run without prefixes."
        )
    kind = sft_kind(config)
    rows, is_partly_labelled = [], []
    for source, searched in {"tree": tree, "hnc": view}.items():
        if searched is None:
            continue
        labelled, members_of = label_steps(searched, config, notes if source == "tree" else Counter())
        worst: list[int | None] = []  # the first step with the lowest score up to each step
        for step, members in enumerate(members_of):
            lowest = None if labelled.parents[step] == ROOT else worst[labelled.parents[step]]
            label = labelled.labels[step]
            if label is not None and (lowest is None or label < labelled.labels[lowest]):
                lowest = step
            worst.append(lowest)
            if config.prefixes:
                scored, written = step, members if label is not None else []
            else:
                scored, written = lowest, [i for i in members if tree.nodes[i].is_final and tree.nodes[i].correct]
            if not written:
                continue
            if source == "tree":
                notes[f"{kind}_found"] += len(written)
            extra = {name: labelled.step_columns[name][scored] for name in ("mc_correct", "mc_total")}
            extra["node_id"] = tree.nodes[written[0]].node_id  # the view has a new id for a moved node
            if config.prefixes:
                extra["is_complete"] = tree.nodes[written[0]].is_final
            if config.hnc:
                extra["source"] = source
            rows.append(
                StepTree(tree.problem.prompt, [tree.text(written[0])], [labelled.labels[scored]], [-1], extra=extra)
            )
            is_partly_labelled.append(
                not config.prefixes and any(labelled.labels[i] is None for i in labelled.path(step))
            )
    ranked = sorted(range(len(rows)), key=lambda i: (-rows[i].labels[0], not rows[i].extra.get("is_complete", True)))
    best = sorted(ranked[i] for i in distinct([rows[i].completions[0] for i in ranked]))
    notes[f"duplicate_{kind}"] += notes[f"{kind}_found"] - len(best)
    choice = choose(
        [rows[i].labels[0] for i in best],
        config.min_mc_score,
        config.max_solutions,
        [rows[i].extra["mc_total"] for i in best],
    )
    notes[f"{kind}_below_min_score"] += choice.num_below
    notes[f"{kind}_beyond_top_k"] += choice.num_beyond
    kept = [best[i] for i in sorted(choice.kept)]
    notes["solutions_with_unlabelled_steps"] += sum(is_partly_labelled[i] for i in kept)
    notes["hnc_raised_scores"] += sum(rows[i].extra.get("source") == "hnc" for i in kept)
    notes["complete_solutions"] += sum(rows[i].extra.get("is_complete", False) for i in kept)
    return [rows[i] for i in kept]


def sft_kind(config: ExportConfig) -> str:
    """Return the word for the rows of [`sft_rows`] in the names of their counts."""
    return "prefixes" if config.prefixes else "solutions"


def leave_out_copies(view: StepTree, tree: StepTree, notes: Counter) -> StepTree:
    """
    Return the paths of a compressed view that have a merged step, or texts or labels that no path of the tree has. The other paths
    would only duplicate flat rows of the tree.

    Args:
        view ([`StepTree`]):
            Labelled compressed view.
        tree ([`StepTree`]):
            Labelled tree.
        notes (`Counter`):
            Counter of the dropped paths. It is updated in place.
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


def thin_labels(tree: StepTree, cells: Sequence[Cell | None], chances: Mapping[Cell, float], seed: int) -> None:
    """
    Remove labels at random to balance the cells, and add the column `label_weights`.

    A label is kept with the probability of its cell, and its weight is the inverse of this probability, so weighted sums keep
    their expectation. A step without a label has weight 0. The draw depends only on the seed and the node, so the label of a node
    is kept in all rows or in none.

    Args:
        tree ([`StepTree`]):
            Step tree of S steps, with the column `node_ids`. It is modified in place.
        cells (`Sequence[Cell | None]`):
            Cell of each step. See [`label_cells`].
        chances (`Mapping[Cell, float]`):
            Probability of keeping a label, per cell. Labels of other cells are kept.
        seed (`int`):
            Random seed.
    """
    weights = []
    for step, (label, cell) in enumerate(zip(tree.labels, cells, strict=True)):
        chance = chances.get(cell, 1.0)
        if chance < 1:
            drawn = hashlib.blake2b(f"{seed}\n{tree.step_columns['node_ids'][step]}".encode(), digest_size=8).digest()
            if int.from_bytes(drawn, "big") / 2**64 >= chance:
                tree.labels[step] = label = None
        weights.append(0.0 if label is None else 1 / chance)
    tree.step_columns["label_weights"] = weights


def label_cells(tree: StepTree, num_bins: int, by: str = "value") -> list[Cell | None]:
    """
    Return the cell of each label for balancing: the index of its bin, and with `by="value_and_depth"` its depth before it. `None`
    for steps without a label.

    The bins of [0, 1] have equal width, and the last one includes 1. The depth of a step is the number of original steps up to
    its end, so it is the same for a step alone, merged with the previous step, and after node compression.
    """
    depths = []
    for step, parent in enumerate(tree.parents):
        depths.append((tree.num_merged[step] if tree.num_merged else 1) + (0 if parent == ROOT else depths[parent]))
    bins = [None if label is None else min(int(label * num_bins), num_bins - 1) for label in tree.labels]
    if by == "value":
        return [None if number is None else (number,) for number in bins]
    return [None if number is None else (depth, number) for depth, number in zip(depths, bins, strict=True)]


def keep_chances(counts: Mapping[Cell, int]) -> dict[Cell, float]:
    """
    Return the probability of keeping a label per cell, from the number of labels per cell.

    The smallest bin keeps all of its labels, and the other bins keep as many on average. With depths, this holds within each
    depth, and each label is kept with a probability of at least 0.1, as in HRM's code: a bin of a single label would otherwise
    remove nearly all labels of its depth.
    """
    least: dict[Cell, int] = {}
    for (*depth, _), count in counts.items():
        least[tuple(depth)] = min(count, least.get(tuple(depth), count))
    return {
        cell: max(least[cell[:-1]] / count, MIN_CHANCE if len(cell) > 1 else 0.0) for cell, count in counts.items()
    }


def _texts_and_labels(tree: StepTree, path: list[int]) -> tuple[tuple[str, float | None], ...]:
    return tuple((tree.completions[i], tree.labels[i]) for i in path)
