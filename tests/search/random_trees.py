"""Random search trees with every kind of node, and slow reference implementations."""

import random

from trl_hrm.search.tree import ROOT, Node, Problem, SearchTree, make_id


FILLS = ["add", "sub", "so", "thus", "x = 3", "y = 7"]


def random_tree(rng: random.Random, name: str = "p", num_children: int = 5, max_depth: int = 4) -> SearchTree:
    """
    Return a tree of sampled steps: branches that end early, right, wrong and ungraded answers, truncated steps, equal
    siblings, and siblings that a budget continued only in part.
    """
    tree = empty_tree(name)
    open_nodes = [ROOT]
    for depth in range(1, max_depth + 1):
        reached = []
        for parent in open_nodes:
            family = []
            for place in range(rng.randint(1, num_children)):
                add_step(tree, rng, parent, place, depth)
                if tree.nodes[-1].finish == "stop":
                    family.append(len(tree.nodes) - 1)
            chosen = rng.sample(family, rng.randint(1, len(family))) if family and rng.random() < 0.3 else family
            if depth < max_depth:
                for i in chosen:
                    tree.nodes[i].weight = len(family) / len(chosen)
            reached += chosen
        open_nodes = reached
    return tree


def full_tree(rng: random.Random, name: str = "p", num_children: int = 3, depth: int = 3) -> SearchTree:
    """Return a tree in which every inner node has the same number of children and every leaf is right or wrong."""
    tree = empty_tree(name)
    level = [ROOT]
    for number in range(1, depth + 1):
        below = []
        for parent in level:
            for place in range(num_children):
                is_final = number == depth
                add_node(tree, parent, place, f"Step {len(tree.nodes)}", header=None if is_final else number + 1)
                if is_final:
                    end(tree.nodes[-1], rng.random() < 0.5)
                below.append(len(tree.nodes) - 1)
        level = below
    return tree


def rollout_tree(rng: random.Random, name: str = "p", num_solutions: int = 3, num_completions: int = 4) -> SearchTree:
    """Return a tree of whole solutions, each a chain of steps, most of them judged by their own rollouts."""
    tree = empty_tree(name)
    for place in range(num_solutions):
        add_rollout(tree, rng, ROOT, place)
        whole = tree.nodes[-1]
        above, num_steps = ROOT, rng.randint(1, 4)
        for number in range(1, num_steps + 1):
            header = None if number == num_steps else number + 1
            add_node(tree, above, place if number == 1 else 0, rng.choice(FILLS), header, role="segment")
            above = len(tree.nodes) - 1
            if number == num_steps:
                last = tree.nodes[-1]
                last.finish, last.is_final = whole.finish, whole.is_final
                last.answer, last.correct = whole.answer, whole.correct
            elif rng.random() < 0.8:
                for completion in range(num_completions):
                    add_rollout(tree, rng, above, completion)
    return tree


def empty_tree(name: str = "p") -> SearchTree:
    return SearchTree(Problem(name, f"What is {name}?", "7"), prompt_ids=[1, 2], status="done")


def add_step(tree: SearchTree, rng: random.Random, parent: int, place: int, depth: int) -> None:
    kind = rng.choices(["open", "right", "wrong", "ungraded", "no answer", "truncated"], [8, 2, 2, 1, 1, 1])[0]
    header = depth + 1 if kind == "open" else None
    add_node(tree, parent, place, f"{rng.choice(FILLS)} {rng.randrange(3)}", header)
    finish(tree.nodes[-1], kind)


def add_rollout(tree: SearchTree, rng: random.Random, parent: int, place: int) -> None:
    add_node(tree, parent, place, f"the rest {rng.randrange(9)}", role="rollout")
    finish(tree.nodes[-1], rng.choice(["right", "wrong", "ungraded", "no answer", "truncated"]))


def finish(node: Node, kind: str) -> None:
    if kind == "truncated":
        node.finish, node.stop_reason = "length", None
    elif kind != "open":
        end(node, {"right": True, "wrong": False}.get(kind), kind == "ungraded")


def end(node: Node, correct: bool | None, ungraded: bool = False) -> None:
    node.is_final, node.finish, node.stop_reason = True, "eos", None
    node.correct = correct
    node.answer = None if correct is None and not ungraded else "7" if correct else "8"


def add_node(
    tree: SearchTree, parent: int, place: int, text: str, header: int | None = None, role: str = "step"
) -> None:
    """Add a node. Its text ends with the header of the next step, if that has a number."""
    above = tree.problem.problem_id if parent == ROOT else tree.nodes[parent].node_id
    tail = "" if header is None else f"# Step {header}"
    text = f"\n{text}\n\n{tail}"
    node = Node(
        node_id=make_id(above, role, 0, place),
        parent=parent,
        child_index=place,
        round=0,
        token_ids=list(map(ord, text)),
        text=text,
        tail=len(tail),
        role=role,
        seed=len(tree.nodes) << 16,
        num_cached=place,
        stop_reason=tail or None,
    )
    tree.nodes.append(node)


def slow_outcome(tree: SearchTree, i: int) -> str:
    """Return the outcome of a leaf, from its definition."""
    node = tree.nodes[i]
    if node.correct is not None:
        return "right" if node.correct else "wrong"
    if node.answer is not None:
        return "ungraded"
    siblings = [other for other in tree.nodes if other.parent == node.parent]
    could_go_on = node.finish == "stop" and not node.is_final and node.merged_from is None and node.role != "segment"
    if could_go_on and node.text.strip() and any(sibling.weight > 1 for sibling in siblings):
        return "skipped"
    return "unresolved"


def slow_leaves(tree: SearchTree, i: int) -> list[str]:
    """Return the outcomes of the leaves below a node."""
    below = [j for j, node in enumerate(tree.nodes) if node.parent == i]
    if not below:
        return [] if i == ROOT else [slow_outcome(tree, i)]
    return [leaf for j in below if tree.nodes[j].role != "segment" for leaf in slow_leaves(tree, j)]


def slow_score(tree: SearchTree, i: int, estimator: str, truncated: str) -> float | None:
    """Return the MC score of a node, from its definition."""
    if i != ROOT and tree.nodes[i].value is not None:
        return tree.nodes[i].value
    below = [j for j, node in enumerate(tree.nodes) if node.parent == i]
    if estimator == "leaf_share" or not below:
        leaves = slow_leaves(tree, i)
        counted = [leaf for leaf in leaves if leaf in ("right", "wrong")]
        if truncated == "wrong":
            counted += [leaf for leaf in leaves if leaf == "unresolved"]
        return counted.count("right") / len(counted) if counted else None
    samples = [j for j in below if tree.nodes[j].role != "segment" and tree.nodes[j].merged_from is None]
    scored = [(tree.nodes[j].weight, slow_score(tree, j, estimator, truncated)) for j in samples]
    scored = [(weight, score) for weight, score in scored if score is not None]
    return sum(w * s for w, s in scored) / sum(w for w, _ in scored) if scored else None
