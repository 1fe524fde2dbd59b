"""Views of a step tree: with merged steps (HRM), as flat rows (PRM), and with outcome labels only (ORM)."""

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from ..io import shown
from ..search.thinking import thought_length
from ..search.values import RELATIVE_LABELS, make_label
from ..step_tree import StepTree


MAX_MERGE = {"pairs": 2, "thoughts": 16}  # steps in a merged step


def hrm_view(
    tree: StepTree,
    merge_separator: str = "\n",
    max_merge: int | None = None,
    notes: Counter | None = None,
    merge: Literal["pairs", "thoughts"] = "pairs",
    thinking_marks: Sequence[str] | None = None,
) -> StepTree:
    r"""
    Add merged steps: D_HRM = D_PRM ∪ {(s_i + s_{i+1}, R(s_i + s_{i+1}))} ([HRM](https://huggingface.co/papers/2503.13551),
    section 3.1 and Table 2).

    For every labelled step with a step before it, a merged step is added. Its text is the two texts joined by `merge_separator`,
    its parent is the grandparent, and its label is the label of the second step (Table 2: a merged step is positive exactly when
    the current step is). The original steps do not change.

    In the thinking of a reasoning model, a correction often comes several steps after the error. With `merge="thoughts"`, a merged
    step is added only for a labelled step that begins with a mark such as "Wait". It joins this step with all steps of the thought
    before it (see [`~search.thinking.thought_length`]) and has the label of its last step. Steps that are already merged are not
    merged further.

    Labels that compare two MC scores (`label_kind` is `"progress"` or `"ratio"`) are computed for the whole merged step, from the
    MC score at its end and the MC score before its first step. A merged step whose label is undefined is not added.

    The result has no duplicates: a merged step is not added if the tree already has a step with the same parent, text, number of
    merged steps and label. Applying the function to its own result therefore changes nothing.

    Args:
        tree ([`StepTree`]):
            Step tree. Steps that are already merged, for example by node compression, are merged further up to `max_merge`.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step. It must match the `merge_separator` of the [`StepFormat`] that the model is
            trained with.
        max_merge (`int`, *optional*):
            Maximum number of original steps (`num_merged`) in a merged step. Defaults to 2 for `merge="pairs"`, as in the paper. Longer
            runs follow the same rule. Defaults to 16 for `merge="thoughts"`. Of a longer thought, only the last steps are merged.
        notes (`Counter`, *optional*):
            Counter of merged steps without a label, which are not added. It is updated in place.
        merge (`str`, *optional*, defaults to `"pairs"`):
            Which steps are merged: `"pairs"` or `"thoughts"`.
        thinking_marks (`Sequence[str]`, *optional*):
            Phrases that begin a thought, for `merge="thoughts"`. They must match the `thinking_marks` of the [`StepFormat`]. Defaults
            to [`~search.thinking.MARKS`].

    Returns:
        [`StepTree`]: The tree with the merged steps after the original ones, and `num_merged` set. In other per-step columns, a
        merged step has the value of its last step.

    Raises:
        `ValueError`: If `max_merge` is below 2, `merge` is unknown, or the labels compare MC scores and the tree does not have these
            scores.
    """
    if merge not in MAX_MERGE:
        raise ValueError(f"`merge` is {shown(merge)}. It must be one of {', '.join(MAX_MERGE)}.")
    max_merge = MAX_MERGE[merge] if max_merge is None else max_merge
    if max_merge < 2:
        raise ValueError(f"`max_merge` is {max_merge}. It must be at least 2 (pairs, as in the paper).")
    kind = tree.extra.get("label_kind")
    is_relative = kind in RELATIVE_LABELS
    if is_relative and not ("mc_scores" in tree.step_columns and "prompt_mc_score" in tree.extra):
        raise ValueError(
            f"The labels are of the kind {shown(kind)}, but `mc_scores` or `prompt_mc_score` is missing. The labels of merged "
            "steps need both. Keep these columns of `trl-hrm export`, or remove `label_kind` to give a merged step the label of its "
            "last step."
        )
    completions, labels, parents = list(tree.completions), list(tree.labels), list(tree.parents)
    num_merged = list(tree.num_merged) if tree.num_merged is not None else [1] * len(completions)
    known = labels
    # labels that were stored in single precision are equal to newly computed ones only in this precision
    if is_relative:
        known = [None if label is None else array("f", [label])[0] for label in labels]
    found = set(zip(parents, completions, num_merged, known, strict=True))
    last_steps = []
    for step, label in enumerate(tree.labels):
        runs = []  # text, number of original steps and parent of the merged steps that end with this step
        if merge == "thoughts" and label is not None:
            path = tree.path(step)
            run = path[-thought_length([completions[i] for i in path], thinking_marks, max_merge) :]
            if len(run) > 1 and all(num_merged[i] == 1 for i in run):
                runs.append((merge_separator.join(completions[i] for i in run), len(run), parents[run[0]]))
        elif label is not None:
            text, count, first = completions[step], num_merged[step], parents[step]
            while first != -1 and count + num_merged[first] <= max_merge:
                text, count, first = (
                    completions[first] + merge_separator + text,
                    count + num_merged[first],
                    parents[first],
                )
                runs.append((text, count, first))
        for text, count, first in runs:
            merged = label
            if is_relative:
                value = tree.step_columns["mc_scores"][step]
                before = tree.extra["prompt_mc_score"] if first == -1 else tree.step_columns["mc_scores"][first]
                merged = None if value is None else make_label(value, kind, before=before)
                if merged is None:
                    if notes is not None:
                        notes["merged_steps_without_label"] += 1
                    continue
            key = (first, text, count, array("f", [merged])[0] if is_relative else merged)
            if key not in found:
                found.add(key)
                completions.append(text)
                labels.append(merged)
                parents.append(first)
                num_merged.append(count)
                last_steps.append(step)
    columns = {name: column + [column[step] for step in last_steps] for name, column in tree.step_columns.items()}
    return StepTree(tree.prompt, completions, labels, parents, num_merged, columns, tree.extra)


def prm_view(tree: StepTree) -> list[StepTree]:
    """
    Return one flat row per root-to-leaf path, in TRL's stepwise supervision format, which other trainers can read.

    Paths without any label are dropped.
    """
    return [chain for chain in tree.chains() if any(label is not None for label in chain.labels)]


def orm_view(tree: StepTree, is_final: Callable[[str], bool] | None = None) -> list[StepTree]:
    """
    Return the complete trajectories, with a label on the last step only ([HRM](https://huggingface.co/papers/2503.13551),
    section 4.1).

    Args:
        tree ([`StepTree`]):
            Tree of single steps.
        is_final (`Callable[[str], bool]`, *optional*):
            Function that returns whether a trajectory is complete, given the text of its leaf. By default, every trajectory is.

    Returns:
        `list[StepTree]`: One single-path tree per complete trajectory with a labelled last step. Its other labels are `None`.
    """
    chains = []
    for chain in tree.chains():
        if chain.labels[-1] is not None and (is_final is None or is_final(chain.completions[-1])):
            chain.labels = [None] * (len(chain.labels) - 1) + chain.labels[-1:]
            chains.append(chain)
    return chains
