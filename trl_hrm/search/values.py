r"""
What a step is worth, estimated from the outcomes of the solutions below it: counts, MC scores and labels, all pure.

An *outcome* is what is known of a leaf, a node that nothing follows: answered (right or wrong), unresolved (no answer:
truncated by length, depth or budget, or none was found), or nothing at all (an answer that the grader could not tell, a node
that a budget left out at random, a step of a cut rollout that no rollout judges). An answer that the grader could not tell
counts nowhere, in any mode.
"""

import math
from typing import NamedTuple

from .tree import Node, SearchTree


ESTIMATORS = ("child_mean", "leaf_share")
TRUNCATED = ("drop", "wrong")
LABELS = ("soft", "hard", "entropy")


class LeafCounts(NamedTuple):
    """
    Leaves below a node.

    Args:
        correct (`int`):
            Leaves with the right answer.
        answered (`int`):
            Leaves with an answer that is right or wrong.
        unresolved (`int`):
            Leaves without an answer.
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

    The steps that a rollout was cut into (`role="segment"`) do not count for the node above them, because the rollout next to
    them does. So the counts of a node are the sums over its other children.

    Args:
        tree ([`SearchTree`]):
            Tree with N nodes.

    Returns:
        `list[LeafCounts]`: N + 1 counts, the last ones for the prompt.
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
    Return the estimated probability that a solution which continues from each node ends with the right answer.

    Args:
        tree ([`SearchTree`]):
            Tree with N nodes.
        estimator (`str`, *optional*, defaults to `"child_mean"`):
            `"child_mean"`: the mean of the children's scores, weighted by `Node.weight`, over the children that are draws
            of what follows (`Node.is_sample`) and have a score; unbiased also where branches differ in depth.
            `"leaf_share"`: right leaves among the leaves below, as in [HRM](https://huggingface.co/papers/2503.13551),
            section 3.2; leans to branches with many leaves.
        truncated (`str`, *optional*, defaults to `"drop"`):
            What an unresolved leaf is: `"drop"` for unknown, `"wrong"` for a wrong answer.

    Returns:
        `list[float | None]`: N + 1 scores, the last one for the prompt. A leaf's score is 1 or 0, and a value that the
        source recorded is the node's score. `None` where nothing is known.

    Raises:
        `ValueError`: If `estimator` or `truncated` is unknown.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}.")
    if truncated not in TRUNCATED:
        raise ValueError(f"truncated is {truncated!r}, expected one of {', '.join(TRUNCATED)}.")
    if estimator == "leaf_share":
        shares = [_share(counts, truncated) for counts in leaf_counts(tree)]
        recorded = [node.value for node in tree.nodes]
        return [share if value is None else value for share, value in zip(shares, [*recorded, None], strict=True)]
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
    scores[-1] = sums[-1] / weights[-1] if weights[-1] else None
    return scores


def entropy_label(p: float, eta: float) -> float:
    r"""
    Entropy-regularised label of a step whose completions are right with probability `p`
    ([ER-PRM](https://huggingface.co/papers/2412.11006), eq. 1, for rewards in {0, 1}):

    \\[\frac{1}{\eta} \ln E[e^{\eta r}] = \frac{1}{\eta} \ln(1 + p (e^\eta - 1))\\]

    Eq. 2, for completions of the optimal policy, is the same with \\(-\eta\\). The limits are `p` for \\(\eta \to 0\\), the
    hard label for \\(\eta \to \infty\\), and 1 only if all completions are right for \\(\eta \to -\infty\\).

    Args:
        p (`float`):
            Probability, in [0, 1].
        eta (`float`):
            Strength of the regularisation, of either sign and any size.

    Example:

    ```python
    >>> round(entropy_label(4 / 16, eta=1), 3)
    0.357
    ```
    """
    if p in (0, 1) or abs(eta) < 1e-12:
        return float(p)
    if eta < 0:  # an identity that keeps clear of the cancellation in 1 + p (e^eta - 1)
        return 1 - entropy_label(1 - p, -eta)
    if eta < 700:
        return math.log1p(p * math.expm1(eta)) / eta
    return 1 + math.log(p + (1 - p) * math.exp(-eta)) / eta  # e^eta overflows


def make_label(p: float, kind: str = "soft", eta: float | None = None) -> float:
    """
    Label of a step with the MC score `p`.

    Args:
        p (`float`):
            MC score, in [0, 1].
        kind (`str`, *optional*, defaults to `"soft"`):
            `"soft"` for `p`, `"hard"` for whether `p` is above 0, `"entropy"` for [`entropy_label`].
        eta (`float`, *optional*):
            For `"entropy"`.

    Raises:
        `ValueError`: If `kind` is unknown.
    """
    if kind == "soft":
        return p
    if kind == "hard":
        return float(p > 0)
    if kind == "entropy":
        return entropy_label(p, eta)
    raise ValueError(f"the kind of label is {kind!r}, expected one of {', '.join(LABELS)}.")


def _share(counts: LeafCounts, truncated: str) -> float | None:
    total = counts.answered if truncated == "drop" else counts.answered + counts.unresolved
    return counts.correct / total if total else None


def _outcomes(tree: SearchTree) -> list[LeafCounts | None]:
    """The outcome of each leaf as counts, `None` for nodes that something follows."""
    followed, thinned = [False] * (len(tree.nodes) + 1), [False] * (len(tree.nodes) + 1)
    for node in tree.nodes:
        followed[node.parent] = True
        if node.weight > 1:
            thinned[node.parent] = True
    return [
        None if followed[i] else _outcome(node, thinned[node.parent] and node.weight == 1)  # one of more was continued
        for i, node in enumerate(tree.nodes)
    ]


def _outcome(node: Node, thinned: bool) -> LeafCounts:
    if node.correct is not None:
        return _ANSWERED[node.correct]
    if node.answer is not None:
        return _NOTHING
    # Could have been continued, and siblings were: they stand for it. A node made by compression has no such siblings.
    if thinned and node.finish == "stop" and not node.is_final and node.is_sample and node.text.strip():
        return _NOTHING
    return _UNRESOLVED
