"""
Hierarchical Node Compression (HNC): merges a node of a search tree into its parent and moves it up to the grandparent
([HRM](https://huggingface.co/papers/2503.13551), section 3.2). It needs no policy and no new rollouts.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from ..io import shown
from .tree import ROOT, SearchTree, make_id


RULES = ("per_parent", "per_child")


def compress(
    tree: SearchTree,
    seed: int,
    probability: float = 0.5,
    min_children: int = 4,
    num_passes: int = 1,
    rule: str = "per_parent",
) -> SearchTree:
    r"""
    Return a copy of `tree` in which some nodes are merged with their parent.

    Of each node with N >= `min_children` sampled next steps, `rule` selects at most one. The text of the selected child becomes
    parent + child, and the child moves to the grandparent together with its subtree. The child mean of the parent keeps its
    expectation over the samples of the policy, and its variance changes from \\(\sigma^2/N\\) to \\(\sigma^2/(N-1)\\). With
    `"per_parent"`, the average over all selections is also the child mean of the given tree. With `"per_child"`, it is not,
    because the first siblings move more often. The moved node keeps its score. It is not a sample of the grandparent's next step,
    so the child mean of the grandparent ignores it. The set of leaves below each node above the parent does not change.

    In a run continued with `more_from`, a node can also have M rollouts. They never move, so the variance changes from
    \\(\sigma^2/(N+M)\\) to \\(\sigma^2/(N+M-1)\\), and the average over all selections gives the rollouts more weight than the
    child mean of the given tree does.

    A node whose children have different weights (because the budget dropped some) is skipped. Removing one of them would change
    its expected mean. So is a node whose children are all blank, such as the ends after the last step of a solution, because
    merging one of them adds no step.

    Args:
        tree ([`SearchTree`]):
            Tree to compress. It is not modified.
        seed (`int`):
            Random seed. The draw of a node depends only on the seed and the node's id, not on the order of nodes.
        probability (`float`, *optional*, defaults to `0.5`):
            Probability of each draw.
        min_children (`int`, *optional*, defaults to `4`):
            Minimum number of sampled next steps, N. The authors' code uses 4.
        num_passes (`int`, *optional*, defaults to `1`):
            Number of passes. Moved nodes are not moved again, so more than two steps merge only if both a node and one of its
            children move. With `rule="per_child"`, this takes two passes.
        rule (`str`, *optional*, defaults to `"per_parent"`):
            How the child to move is selected. `"per_parent"`: with `probability`, one child, uniformly. `"per_child"`, the rule
            of the authors' code: one draw with `probability` per child, in the order of sampling, until one succeeds. A node with
            N children loses one with probability \\(1 - (1-p)^N\\), 0.97 for 5 children and p = 0.5. Children of a node that
            moves in the same pass stay with it.

    Returns:
        [`SearchTree`]: The compressed tree, with each node at its index in `tree`. Moved nodes and their descendants have new
        ids. The other nodes are shared with `tree`.

    Raises:
        `ValueError`: If an option is out of range.
    """
    check_options(probability, min_children, num_passes, rule)
    for number in range(num_passes):
        tree = move_up(tree, choose_moves(tree, (seed, number), probability, min_children, rule), (seed, number))
    return tree


def check_options(probability: float, min_children: int, num_passes: int, rule: str = "per_parent") -> None:
    """Raise `ValueError` if an option of [`compress`] is out of range."""
    if rule not in RULES:
        raise ValueError(f"The rule of node compression is {shown(rule)}. It must be one of {', '.join(RULES)}.")
    if not 0 <= probability <= 1:
        raise ValueError(f"The probability of node compression is {probability}. It must be in [0, 1].")
    if min_children < 2:
        raise ValueError(f"`min_children` is {min_children}. It must be at least 2, because a node must keep a child.")
    if num_passes < 1:
        raise ValueError(f"The number of passes of node compression is {num_passes}. It must be at least 1.")


def choose_moves(
    tree: SearchTree, key: tuple, probability: float, min_children: int, rule: str = "per_parent"
) -> list[int]:
    """
    Return the indices of the nodes to move up in one pass, at most one per parent, from the first steps down. `key` seeds the
    draws. See [`compress`] for the rules.
    """
    moves: dict[int, None] = {}
    for parent, children in enumerate(tree.children()[:-1]):
        steps = _movable(tree, parent, children)
        if len(steps) < min_children or not any(tree.step_text(i) for i in steps):
            continue
        if rule == "per_parent":
            draw, place = draws(key, tree.nodes[parent].node_id)
            chosen = steps[place * len(steps) >> 64] if draw < probability * 2**64 else None
        elif parent in moves:
            chosen = None
        else:
            steps.sort(key=lambda i: tree.nodes[i].sort_key)
            chosen = next((i for i in steps if draws(key, tree.nodes[i].node_id)[0] < probability * 2**64), None)
        if chosen is not None:
            moves[chosen] = None
    return list(moves)


def draws(key: tuple, node_id: str) -> tuple[int, int]:
    """Return two random numbers below 2^64 that depend only on the key and the id of a node."""
    digest = hashlib.blake2b("\n".join(map(str, (*key, node_id))).encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def move_up(tree: SearchTree, moves: Iterable[int], key: tuple = ()) -> SearchTree:
    """
    Return a copy of `tree` in which the nodes at `moves` are merged with their parents. If a node and its parent both move, their
    texts and the text of the grandparent are merged.

    Args:
        tree ([`SearchTree`]):
            Tree to compress. It is not modified.
        moves (`Iterable[int]`):
            Indices of the nodes to move.
        key (`tuple`, *optional*, defaults to `()`):
            Seed of the new ids, in addition to the old ids.

    Raises:
        `ValueError`: If a node cannot move, because it is a first step, was not sampled as a step, is an only child, or has
            siblings with a different weight.
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
                weight=1.0,  # it does not represent any of its new siblings
                merged_from=(tree.nodes[node.parent].node_id, node.node_id),
            )
            num_children[above.parent] += 1
        elif node.parent != ROOT and nodes[node.parent] is not tree.nodes[node.parent]:
            nodes[i] = replace(node, node_id=make_id("hnc", *key, node.node_id))
    return replace(tree, nodes=nodes)


def count_moves(view: SearchTree) -> int:
    """Return the number of nodes that node compression has merged."""
    return sum(node.merged_from is not None for node in view.nodes)


def _movable(tree: SearchTree, parent: int, children: list[int]) -> list[int]:
    """Return the sampled children of a step, or an empty list if their weights differ."""
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
                f"Node {i} cannot be merged with its parent. Both must be sampled steps, and the siblings of the node must have "
                "the same weight."
            )
        if len(set(steps) - moves) < 1:
            raise ValueError(
                f"Node {i} cannot move, because its parent, node {parent}, would lose all of its {len(steps)} sampled children."
            )
