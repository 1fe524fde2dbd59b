"""Search trees for the tests that display them."""

import random

from trl_hrm.search.inspection import Inspection
from trl_hrm.search.nodes import tree_totals
from trl_hrm.search.tree import ROOT, Node, Problem, SearchTree, make_id
from trl_hrm.search.values import leaf_counts, mc_scores


def tree_of(*rows: tuple, prompt: str = "What is 1 + 2?", answer: str = "3", name: str = "p1") -> SearchTree:
    """Build a tree of `(parent, text, fields)`. A `correct` or an `answer` ends a solution at that node."""
    tree = SearchTree(Problem(name, prompt, answer), status="done")
    for i, (parent, text, fields) in enumerate(rows):
        if "answer" in fields:
            fields = {"finish": "eos", "is_final": True} | fields
        tree.nodes.append(Node(f"{i:016x}", parent, i, 0, [1, 2, 3], text, **fields))
    return tree


def inspection_of(tree: SearchTree, **options: str) -> Inspection:
    return Inspection(tree, mc_scores(tree), leaf_counts(tree), tree_totals(tree), **options)


def random_search_tree(seed: int, num_nodes: int = 120) -> SearchTree:
    """Return a random tree with steps, rollouts, equal leaves and every outcome."""
    rng = random.Random(seed)
    tree = SearchTree(Problem(f"p{seed}", "What is 1 + 2?", "3"), status="done")
    steps = [ROOT]
    for i in range(num_nodes):
        node = Node(make_id(seed, i), rng.choice(steps), i, 0, [i], rng.choice(("One.", "Two.", f"Step {i}.")))
        kind = rng.random()
        if kind < 0.4:
            steps.append(i)
        elif kind < 0.9:
            node.role = rng.choice(("step", "rollout"))
            node.finish, node.is_final, node.answer = "eos", True, rng.choice(("3", "4", None))
            node.correct = rng.choice((node.answer == "3", None)) if node.answer else None
        else:
            node.finish = "length"
        tree.nodes.append(node)
    return tree


def full_tree(num_children: int, depth: int, seed: int = 0) -> SearchTree:
    """Return a tree whose nodes all have the same number of children, and whose solutions all have an answer."""
    rng = random.Random(seed)
    tree = SearchTree(Problem("full", "What is 1 + 2?", "3"), status="done")
    level = [ROOT]
    for below in range(1, depth + 1):
        above, level = level, []
        for parent in above:
            for i in range(num_children):
                level.append(len(tree.nodes))
                node = Node(
                    make_id(seed, len(tree.nodes)), parent, i, 0, [1], f"Step {below} is {len(tree.nodes)}.\n\n"
                )
                if below == depth:
                    node.finish, node.is_final, node.correct = "eos", True, rng.random() < 0.5
                    node.answer = "3" if node.correct else "4"
                tree.nodes.append(node)
    return tree
