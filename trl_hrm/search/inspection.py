"""What a person is shown of a search tree, whether in a terminal or on a page: its lines, and how solutions ended."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .tree import ROOT, Node, SearchTree
from .values import LeafCounts


CORRECT, WRONG, UNGRADED, TRUNCATED, NO_ANSWER, NOT_CONTINUED, LEFT_OUT = OUTCOMES = (
    "correct",
    "wrong",
    "ungraded",
    "truncated",
    "no answer",
    "not continued",
    "left out",
)


@dataclass
class Inspection:
    """
    A search tree with what was computed from it.

    Args:
        tree ([`SearchTree`]):
            The tree, with N nodes.
        scores (`list[float | None]`):
            N + 1 MC scores in `[0, 1]`, the last one that of the prompt. See [`mc_scores`].
        counts (`list[LeafCounts]`):
            N + 1 counts of the leaves below, the last ones those of the prompt. See [`leaf_counts`].
        totals (`dict[str, int]`):
            `num_nodes`, `num_tokens` (generated) and `num_cached` of the search. See [`tree_totals`].
        run (`str`, *optional*, defaults to `""`):
            Where the tree comes from.
        basis (`str`, *optional*, defaults to `""`):
            What the scores are, in words.
    """

    tree: SearchTree
    scores: Sequence[float | None]
    counts: Sequence[LeafCounts]
    totals: Mapping[str, int]
    run: str = ""
    basis: str = ""

    def outcomes(self) -> list[str | None]:
        """
        How the solution that ends at each of the N nodes ended, one of `OUTCOMES`. `None` for a node that is followed by
        others, and for a leaf of which its source tells a value only.

        `"left out"` is a leaf that a budget left out at random, so that nothing is missing; `"not continued"` one that ended
        at the greatest depth or has yet to be continued.
        """
        followed = {node.parent for node in self.tree.nodes}
        return [
            _outcome(node, i not in followed, self.counts[i].unresolved > 0) for i, node in enumerate(self.tree.nodes)
        ]


def _outcome(node: Node, is_leaf: bool, unresolved: bool) -> str | None:
    if node.correct is not None:
        return CORRECT if node.correct else WRONG
    if node.answer is not None:
        return UNGRADED
    if not is_leaf or node.value is not None:
        return None
    if node.finish == "length":
        return TRUNCATED
    if node.is_final or node.finish == "eos":
        return NO_ANSWER
    return NOT_CONTINUED if unresolved else LEFT_OUT


class Line(NamedTuple):
    """
    One line of the picture.

    Args:
        nodes (`tuple[int, ...]`):
            What it stands for: `(ROOT,)`, one node, several equal leaves, or all rollouts from one node.
        above (`int`):
            Index of the line it hangs under, `-1` for the first.
        depth (`int`):
            Number of lines above it.
        kind (`str`):
            `"prompt"`, `"node"`, `"rollouts"` (the rollouts follow below it, one line each).
    """

    nodes: tuple[int, ...]
    above: int
    depth: int
    kind: str


def lines(tree: SearchTree) -> list[Line]:
    """
    The lines of a tree, depth first. Siblings stand by round and place. Several rollouts from one node hang under a line
    of their own, before the steps; leaves with equal texts and outcomes are one line.
    """
    children = tree.children()
    found: list[Line] = []
    pending = [Line((ROOT,), -1, 0, "prompt")]
    while pending:
        line = pending.pop()
        index = len(found)
        found.append(line)
        if line.kind == "rollouts":
            below = [("node", equal) for equal in _equal_leaves(tree, children, line.nodes)]
        else:
            below = _below(tree, children, children[line.nodes[0]])
        pending.extend(Line(nodes, index, line.depth + 1, kind) for kind, nodes in reversed(below))
    return found


def _below(tree: SearchTree, children: list[list[int]], indices: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    ordered = sorted(indices, key=lambda i: tree.nodes[i].sort_key)
    rollouts = [i for i in ordered if tree.nodes[i].role == "rollout"]
    if len(rollouts) < 2:
        return [("node", equal) for equal in _equal_leaves(tree, children, ordered)]
    others = [i for i in ordered if tree.nodes[i].role != "rollout"]
    return [("rollouts", tuple(rollouts)), *(("node", equal) for equal in _equal_leaves(tree, children, others))]


def _equal_leaves(tree: SearchTree, children: list[list[int]], indices: Sequence[int]) -> list[tuple[int, ...]]:
    groups: dict[Any, list[int]] = {}
    for i in indices:
        node = tree.nodes[i]
        what = (
            node.text,
            node.role,
            node.finish,
            node.is_final,
            node.answer,
            node.correct,
            node.value,
            node.merged_from,
        )
        groups.setdefault(i if children[i] else what, []).append(i)
    return [tuple(group) for group in groups.values()]
