"""
Lines and outcomes of a search tree, for display in a terminal ([`~search.inspection_text.format_tree`]) or on an offline HTML page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from ..pages.latex import find_math, to_mathml
from ..pages.page import render
from ..terminal import printable
from .tree import ROOT, SearchTree
from .values import LeafCounts


CORRECT, WRONG, UNGRADED, TRUNCATED, NO_ANSWER, NOT_CONTINUED, DROPPED = OUTCOMES = (
    "correct",
    "wrong",
    "ungraded",
    "truncated",
    "no answer",
    "not continued",
    "dropped",
)


@dataclass
class Inspection:
    """
    A search tree with its scores and counts.

    Args:
        tree ([`SearchTree`]):
            Tree with N nodes.
        scores (`list[float | None]`):
            N + 1 MC scores in `[0, 1]`. The last is for the prompt. See [`mc_scores`].
        counts (`list[LeafCounts]`):
            N + 1 leaf counts. The last is for the prompt. See [`~search.values.leaf_counts`].
        totals (`dict[str, int]`):
            `num_nodes`, `num_tokens` (generated) and `num_cached` of the search. See [`~search.nodes.tree_totals`].
        run (`str`, *optional*, defaults to `""`):
            Source of the tree.
        basis (`str`, *optional*, defaults to `""`):
            How the scores are estimated.
    """

    tree: SearchTree
    scores: Sequence[float | None]
    counts: Sequence[LeafCounts]
    totals: Mapping[str, int]
    run: str = ""
    basis: str = ""

    def outcomes(self) -> list[str | None]:
        """
        Return the outcome of each of the N nodes, one of `OUTCOMES`. `None` for an inner node, and for a leaf with only a value
        recorded by its source.

        `"dropped"` is a leaf that was dropped at random because of the budget; its siblings represent it. `"not continued"` is a leaf
        at the maximum depth, or one that has not been continued yet.
        """
        followed = {node.parent for node in self.tree.nodes}
        found: list[str | None] = []
        for i, node in enumerate(self.tree.nodes):
            if node.correct is not None:
                found.append(CORRECT if node.correct else WRONG)
            elif node.answer is not None:
                found.append(UNGRADED)
            elif i in followed or node.value is not None:
                found.append(None)
            elif node.finish == "length":
                found.append(TRUNCATED)
            elif node.is_final or node.finish == "eos":
                found.append(NO_ANSWER)
            else:
                found.append(NOT_CONTINUED if self.counts[i].unresolved else DROPPED)
        return found


class Line(NamedTuple):
    """
    One line of a displayed tree.

    Args:
        nodes (`tuple[int, ...]`):
            Nodes on this line: `(ROOT,)`, one node, several equal leaves, or all rollouts from one node.
        above (`int`):
            Index of the parent line, `-1` for the first line.
        depth (`int`):
            Number of ancestor lines.
        kind (`str`):
            `"prompt"`, `"node"` or `"rollouts"` (followed by one line per rollout).
    """

    nodes: tuple[int, ...]
    above: int
    depth: int
    kind: str


def lines(tree: SearchTree) -> list[Line]:
    """
    Return the lines of a tree in depth-first order. Siblings are ordered by round and index. Several rollouts from one node are
    grouped under one line, before the steps. Leaves with equal texts and outcomes share a line.
    """
    children = tree.children()
    found: list[Line] = []
    pending = [Line((ROOT,), -1, 0, "prompt")]
    while pending:
        line = pending.pop()
        below: list[tuple[str, tuple[int, ...]]] = []
        if line.kind == "rollouts":
            steps: Sequence[int] = line.nodes
        else:
            steps = sorted(children[line.nodes[0]], key=lambda i: tree.nodes[i].sort_key)
            rollouts = tuple(i for i in steps if tree.nodes[i].role == "rollout")
            if len(rollouts) > 1:
                below.append(("rollouts", rollouts))
                steps = [i for i in steps if tree.nodes[i].role != "rollout"]
        equal: dict[Any, list[int]] = {}
        for i in steps:
            one = tree.nodes[i]
            shown = (one.text, one.role, one.finish, one.is_final, one.answer, one.correct, one.value, one.merged_from)
            equal.setdefault(i if children[i] else shown, []).append(i)
        below += [("node", tuple(group)) for group in equal.values()]
        pending.extend(Line(nodes, len(found), line.depth + 1, kind) for kind, nodes in reversed(below))
        found.append(line)
    return found


def render_tree(inspection: Inspection, links: Mapping[str, str] | None = None) -> str:
    """
    Render a tree as an HTML page with an overview of the whole tree, its steps, and the full text of each step.

    Args:
        inspection ([`Inspection`]):
            Tree with its scores and counts.
        links (`Mapping[str, str]`, *optional*):
            Relative URLs of the pages `"previous"` and `"next"`, for other problems, and `"index"`, for the list of all problems.

    Returns:
        `str`: HTML page. It is deterministic.
    """
    formulas: dict[Markup, int] = {}
    data = page_data(inspection, formulas)
    return render("tree.html.jinja", data=data | {"links": dict(links or {})}, formulas=formulas)


def page_data(inspection: Inspection, formulas: dict[Markup, int]) -> dict[str, Any]:
    """
    Return the data of the page: columns over N + 1 nodes, with the prompt last, and the lines of the tree.

    Formulas are added to `formulas`, with their position in it. `math` has the places of formulas in texts, by the index of the node:
    start and end, in characters of JavaScript, and the position of the formula. `answers` has the positions of the formulas of answers.
    """
    tree = inspection.tree
    problem, nodes = tree.problem, tree.nodes
    columns = {
        "parent": [node.parent for node in nodes] + [None],
        "text": [printable(tree.step_text(i)) for i in range(len(nodes))] + [printable(problem.prompt)],
        "score": list(inspection.scores),
        "correct": [counts.correct for counts in inspection.counts],
        "answered": [counts.answered for counts in inspection.counts],
        "unresolved": [counts.unresolved for counts in inspection.counts],
        "outcome": [*inspection.outcomes(), None],
        "num_tokens": [len(node.token_ids) for node in nodes] + [len(tree.prompt_ids)],
    }
    names = "node_id role answer finish stop_reason num_cached weight merged_from num_merged"
    for name in names.split():
        values = (getattr(node, name) for node in nodes)
        columns[name] = [printable(value) if isinstance(value, str) else value for value in values] + [None]
    correct = None if problem.answer is None else printable(problem.answer)
    places: dict[int, list[tuple[int, int, int]]] = {}
    for i, text in enumerate(columns["text"]):
        for start, end, markup in find_math(text):
            start, end = (len(text[:place].encode("utf-16-le", "surrogatepass")) // 2 for place in (start, end))
            places.setdefault(i, []).append((start, end, formulas.setdefault(markup, len(formulas))))
    answers = {}
    for answer in sorted({*columns["answer"], correct} - {None}):
        markup = to_mathml(answer) if "\\" in answer else None
        if markup is not None and "<mtable" not in markup:  # a table is higher than a row of the tree
            found = Markup('<span class="math" title="{}">{}</span>').format(answer, markup)
            answers[answer] = formulas.setdefault(found, len(formulas))
    columns["seed"] = [str(node.seed) for node in nodes] + [None]  # JavaScript numbers above 2**53 lose digits
    return {
        "problem": {
            "id": printable(problem.problem_id),
            "prompt": columns["text"][-1],
            "answer": correct,
            "status": tree.status,
        },
        "run": printable(inspection.run),
        "basis": inspection.basis,
        "totals": dict(inspection.totals),
        "outcomes": OUTCOMES,
        "nodes": columns,
        "math": places,
        "answers": answers,
        "lines": [(line.nodes, line.above, line.kind) for line in lines(tree)],
    }
