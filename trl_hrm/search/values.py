r"""
Leaf counts, MC scores and labels of the steps in a search tree. All functions are pure.

Each leaf of a tree has one of three *outcomes*:

- answered: its answer is right or wrong.
- unresolved: it has no answer, because it was truncated by length, depth or budget, or because no answer was found.
- unknown: the grader could not decide, the budget dropped the node at random, or it is a step of a split rollout without its own
  rollouts. These leaves are never counted.
"""

import math
from typing import NamedTuple

from ..io import shown
from .tree import Node, SearchTree


ESTIMATORS = ("child_mean", "leaf_share")
TRUNCATED = ("drop", "wrong")
LABELS = ("soft", "hard", "entropy", "progress", "ratio")
RELATIVE_LABELS = ("progress", "ratio")  # they compare the MC score of a step with the MC score before it


class LeafCounts(NamedTuple):
    """
    Leaves below a node.

    Args:
        correct (`int`):
            Number of leaves with the right answer.
        answered (`int`):
            Number of leaves with a right or wrong answer.
        unresolved (`int`):
            Number of leaves without an answer.
    """

    correct: int
    answered: int
    unresolved: int


_NOTHING = LeafCounts(0, 0, 0)
_UNRESOLVED = LeafCounts(0, 0, 1)
_ANSWERED = {True: LeafCounts(1, 1, 0), False: LeafCounts(0, 1, 0)}


def leaf_counts(tree: SearchTree) -> list[LeafCounts]:
    """
    Return the number of leaves below each node. A leaf counts itself.

    The counts of a node are the sums over its children, except for the steps of a split rollout (`role="segment"`). The rollout
    itself, which is a sibling of its first step, already counts.

    Args:
        tree ([`SearchTree`]):
            Tree with N nodes.

    Returns:
        `list[LeafCounts]`: N + 1 counts. The last is for the prompt.
    """
    size = len(tree.nodes) + 1
    correct, answered, unresolved = [0] * size, [0] * size, [0] * size
    outcomes = _outcomes(tree)
    for i in range(len(tree.nodes) - 1, -1, -1):
        if outcomes[i] is not None:
            correct[i], answered[i], unresolved[i] = outcomes[i]
        node = tree.nodes[i]
        if node.role != "segment":
            correct[node.parent] += correct[i]
            answered[node.parent] += answered[i]
            unresolved[node.parent] += unresolved[i]
    return list(map(LeafCounts, correct, answered, unresolved))


def mc_scores(tree: SearchTree, estimator: str = "child_mean", truncated: str = "drop") -> list[float | None]:
    """
    Return the MC score of each node: the estimated probability that a continuation of the node ends with the right answer.

    Args:
        tree ([`SearchTree`]):
            Tree with N nodes.
        estimator (`str`, *optional*, defaults to `"child_mean"`):
            `"child_mean"`: mean score of the sampled children (`Node.is_sample`) that have a score, weighted by `Node.weight`.
            Unbiased even if branches differ in depth.
            `"leaf_share"`: fraction of leaves below the node that are right, as in
            [HRM](https://huggingface.co/papers/2503.13551), section 3.2. Favours branches with many leaves.
        truncated (`str`, *optional*, defaults to `"drop"`):
            How to count unresolved leaves: `"drop"` ignores them, `"wrong"` counts them as wrong answers.

    Returns:
        `list[float | None]`: N + 1 scores. The last is for the prompt. The score of a leaf is 1 or 0. A value recorded by the
        source (`Node.value`, `SearchTree.value`) is used as the score of its node or of the prompt. `None` if nothing is known.

    Raises:
        `ValueError`: If `estimator` or `truncated` is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"`estimator` is {shown(estimator)}. It must be one of {', '.join(ESTIMATORS)}.")
    if truncated not in TRUNCATED:
        raise ValueError(f"`truncated` is {shown(truncated)}. It must be one of {', '.join(TRUNCATED)}.")
    if estimator == "leaf_share":
        shares = [_share(counts, truncated) for counts in leaf_counts(tree)]
        recorded = [*(node.value for node in tree.nodes), tree.value]
        return [share if value is None else value for share, value in zip(shares, recorded, strict=True)]
    sums, weights = [0.0] * (len(tree.nodes) + 1), [0.0] * (len(tree.nodes) + 1)
    scores: list[float | None] = [None] * (len(tree.nodes) + 1)
    outcomes = _outcomes(tree)
    for i in range(len(tree.nodes) - 1, -1, -1):
        node = tree.nodes[i]
        if node.value is not None:
            scores[i] = node.value
        elif outcomes[i] is not None:
            scores[i] = _share(outcomes[i], truncated)
        elif weights[i]:
            scores[i] = sums[i] / weights[i]
        if scores[i] is not None and node.is_sample:
            sums[node.parent] += node.weight * scores[i]
            weights[node.parent] += node.weight
    if tree.value is not None:
        scores[-1] = tree.value
    elif weights[-1]:
        scores[-1] = sums[-1] / weights[-1]
    return scores


def entropy_label(p: float, eta: float) -> float:
    r"""
    Return the entropy-regularised label of a step whose rollouts are right with probability `p`
    ([ER-PRM](https://huggingface.co/papers/2412.11006), eq. 1, for rewards in {0, 1}):

    \\[\frac{1}{\eta} \ln E[e^{\eta r}] = \frac{1}{\eta} \ln(1 + p (e^\eta - 1))\\]

    Eq. 2, for completions of the optimal policy, is the same formula with \\(-\eta\\). The label tends to `p` for
    \\(\eta \to 0\\) and to the hard label for \\(\eta \to \infty\\). For \\(\eta \to -\infty\\) it tends to 1 if all rollouts are
    right and to 0 otherwise.

    Args:
        p (`float`):
            Probability, in [0, 1].
        eta (`float`):
            Regularisation strength. Any positive or negative number.

    Example:

    ```python
    >>> round(entropy_label(4 / 16, eta=1), 3)
    0.357
    ```
    """
    if p in (0, 1) or abs(eta) < 1e-12:
        return float(p)
    if eta < 0:  # identity that avoids cancellation in 1 + p (e^eta - 1)
        return 1 - entropy_label(1 - p, -eta)
    if eta < 700:
        return math.log1p(p * math.expm1(eta)) / eta
    return 1 + math.log(p + (1 - p) * math.exp(-eta)) / eta  # e^eta overflows


def make_label(
    p: float, kind: str = "soft", eta: float | None = None, threshold: float = 0.0, before: float | None = None
) -> float | None:
    r"""
    Return the label of a step with the MC score `p`, in [0, 1].

    | kind | label |
    |---|---|
    | `"soft"` | \\(p\\) |
    | `"hard"` | 1 if \\(p\\) is above the threshold, otherwise 0 |
    | `"entropy"` | [`entropy_label`] |
    | `"progress"` | \\((1 + p - b) / 2\\), where \\(p - b\\) is the advantage of the step ([PAV](https://huggingface.co/papers/2410.08146), eq. 2). 0.5: no change |
    | `"ratio"` | \\(\min(1, p / b)\\), the relative progress of [GenPRM](https://huggingface.co/papers/2504.00891). 1: no loss |

    \\(b\\) is the MC score before the step, which is the score of the previous step or of the prompt. For a step that consists of
    several steps, it is the score before the first of them. Progress telescopes: the advantages of consecutive steps add up to
    the advantage of the merged step.

    Args:
        p (`float`):
            MC score, in [0, 1].
        kind (`str`, *optional*, defaults to `"soft"`):
            Kind of label.
        eta (`float`, *optional*):
            Regularisation strength. Required for `"entropy"`.
        threshold (`float`, *optional*, defaults to `0.0`):
            MC score above which a step is right, for `"hard"`.
        before (`float`, *optional*):
            MC score before the step, for `"progress"` and `"ratio"`.

    Returns:
        `float` or `None`: The label. `None` if it is undefined: for `"progress"` and `"ratio"` if `before` is unknown, and for
        `"ratio"` also if `before` is 0.

    Raises:
        `ValueError`: If `kind` is unknown.

    Example:

    ```python
    >>> make_label(0.75, "progress", before=0.25), make_label(0.25, "ratio", before=0.5)
    (0.75, 0.5)
    ```
    """
    if kind == "soft":
        return p
    if kind == "hard":
        return float(p > threshold)
    if kind == "entropy":
        return entropy_label(p, eta)
    if kind == "progress":
        return None if before is None else (1 + (p - before)) / 2  # exactly 0.5 if nothing changes
    if kind == "ratio":
        return min(1.0, p / before) if before else None
    raise ValueError(f"The kind of label is {shown(kind)}. It must be one of {', '.join(LABELS)}.")


def _share(counts: LeafCounts, truncated: str) -> float | None:
    total = counts.answered if truncated == "drop" else counts.answered + counts.unresolved
    return counts.correct / total if total else None


def _outcomes(tree: SearchTree) -> list[LeafCounts | None]:
    """Return the outcome of each leaf as counts, and `None` for inner nodes."""
    followed, thinned = [False] * (len(tree.nodes) + 1), [False] * (len(tree.nodes) + 1)
    for node in tree.nodes:
        followed[node.parent] = True
        if node.weight > 1:
            thinned[node.parent] = True
    return [
        None
        if followed[i]
        else _outcome(node, thinned[node.parent] and node.weight == 1)  # only some siblings were continued
        for i, node in enumerate(tree.nodes)
    ]


def _outcome(node: Node, thinned: bool) -> LeafCounts:
    if node.correct is not None:
        return _ANSWERED[node.correct]
    if node.answer is not None:
        return _NOTHING
    # the budget continued siblings instead of this node, and their weights include it; not so for nodes made by compression
    if thinned and node.finish == "stop" and not node.is_final and node.is_sample and node.text.strip():
        return _NOTHING
    return _UNRESOLVED
