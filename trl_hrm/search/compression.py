"""
Hierarchical Node Compression: in a search tree, one child of a node is merged into it and moves up to the node before
([HRM](https://huggingface.co/papers/2503.13551), section 3.2). A pure view: no policy, no rollouts.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from .tree import ROOT, SearchTree, make_id


def compress(
    tree: SearchTree, seed: int, probability: float = 0.5, min_children: int = 4, num_passes: int = 1
) -> SearchTree:
    r"""
    A view of `tree` in which some nodes are merged with their parent.

    Each node with at least `min_children` sampled steps below it loses one of them with `probability`, any of the N with the
    same chance. That child, its text now parent + child, goes to the grandparent, and its subtree with it. The parent's child
    mean keeps its expectation, and its variance goes from \\(\sigma^2/N\\) to \\(\sigma^2/(N-1)\\). The moved node keeps its
    score, and is no sample of what follows the grandparent: it does not enter its child mean. The leaves below every node
    above the parent stay the same.

    A node whose children have different weights (a budget left some of them out) is left alone: without one of them, taken
    at random, its mean would be another.

    Args:
        tree ([`SearchTree`]):
            Tree to look at. It is left as it is.
        seed (`int`):
            Seed. What happens to a node depends on the seed and its id alone, not on the order of nodes.
        probability (`float`, *optional*, defaults to `0.5`):
            Chance of a node to lose a child.
        min_children (`int`, *optional*, defaults to `4`):
            Least N. The authors' code asks for 4.
        num_passes (`int`, *optional*, defaults to `1`):
            How often this is done. A node that moved is not moved again, so that steps merge in longer runs only where both
            a node and one of its children move.

    Returns:
        [`SearchTree`]: The view, each node at its index in `tree`. Moved nodes and all below them have new ids; the others
        are shared with `tree`.

    Raises:
        `ValueError`: If an option is out of range.
    """
    check_options(probability, min_children, num_passes)
    for number in range(num_passes):
        tree = move_up(tree, choose_moves(tree, (seed, number), probability, min_children), (seed, number))
    return tree


def check_options(probability: float, min_children: int, num_passes: int) -> None:
    """Raise `ValueError` if an option of [`compress`] is out of range."""
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability of node compression is {probability}, expected a number from 0 to 1.")
    if min_children < 2:
        raise ValueError(f"min_children is {min_children}, expected 2 or more: a node must keep one child at least.")
    if num_passes < 1:
        raise ValueError(f"the number of passes of node compression is {num_passes}, expected 1 or more.")


def choose_moves(tree: SearchTree, key: tuple, probability: float, min_children: int) -> list[int]:
    """Indices of the nodes that move up in one pass, at most one of each parent. `key` seeds the choice."""
    moves = []
    for parent, children in enumerate(tree.children()[:-1]):
        steps = _movable(tree, parent, children)
        if len(steps) < min_children:
            continue
        # two numbers below 2**64 that depend on the key and the id alone
        name = "\n".join(map(str, (*key, tree.nodes[parent].node_id)))
        digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
        coin, choice = (int.from_bytes(half, "big") for half in (digest[:8], digest[8:]))
        if coin < probability * 2**64:
            moves.append(steps[choice * len(steps) >> 64])
    return moves


def move_up(tree: SearchTree, moves: Iterable[int], key: tuple = ()) -> SearchTree:
    """
    A view of `tree` in which the nodes at `moves` are merged with their parents. If a node and its parent both move, the
    three steps become one.

    Args:
        tree ([`SearchTree`]):
            Tree to look at.
        moves (`Iterable[int]`):
            Indices of nodes.
        key (`tuple`, *optional*, defaults to `()`):
            Seed of the new ids, next to the old ids.

    Raises:
        `ValueError`: If a node cannot move: a first step, a node that was not sampled as a step, an only child, or one with
            siblings of another weight.
    """
    moves = set(moves)
    _check_moves(tree, moves)
    last_round, num_children = [0] * (len(tree.nodes) + 1), [0] * (len(tree.nodes) + 1)
    for node in tree.nodes:
        last_round[node.parent] = max(last_round[node.parent], node.round)
        num_children[node.parent] = max(num_children[node.parent], node.child_index + 1)
    nodes = list(tree.nodes)
    for i, node in enumerate(tree.nodes):
        if i in moves:
            above = nodes[node.parent]
            before = len(above.text)
            nodes[i] = replace(
                node,
                node_id=make_id("hnc", *key, node.node_id),
                parent=above.parent,
                child_index=num_children[above.parent],
                round=last_round[above.parent],
                token_ids=above.token_ids + node.token_ids,
                text=above.text + node.text,
                cuts=(*above.cuts, before - above.tail, *(before + cut for cut in node.cuts)),
                weight=1.0,  # it stands for none of its new siblings
                merged_from=(tree.nodes[node.parent].node_id, node.node_id),
            )
            num_children[above.parent] += 1
        elif node.parent != ROOT and nodes[node.parent] is not tree.nodes[node.parent]:
            nodes[i] = replace(node, node_id=make_id("hnc", *key, node.node_id))
    return SearchTree(tree.problem, nodes, tree.prompt_ids, tree.status)


def count_moves(view: SearchTree) -> int:
    """Number of nodes that node compression made."""
    return sum(node.merged_from is not None for node in view.nodes)


def _movable(tree: SearchTree, parent: int, children: list[int]) -> list[int]:
    """The sampled steps below a step, none if their weights differ."""
    if tree.nodes[parent].role != "step":
        return []
    steps = [i for i in children if tree.nodes[i].role == "step" and tree.nodes[i].is_sample]
    return steps if len({tree.nodes[i].weight for i in steps}) < 2 else []


def _check_moves(tree: SearchTree, moves: set[int]) -> None:
    children = tree.children()
    for i in moves:
        parent = tree.nodes[i].parent
        steps = [] if parent == ROOT else _movable(tree, parent, children[parent])
        if i not in steps:
            raise ValueError(
                f"node {i} cannot be merged with what is before it, expected a sampled step after another, with siblings of "
                "the same weight."
            )
        if len(set(steps) - moves) < 1:
            raise ValueError(
                f"node {i} cannot move: its parent, node {parent}, has {len(steps)} sampled steps below it."
            )
