"""A search tree as one HTML page that asks nothing of the network."""

import json
from importlib import resources
from typing import Any

from .inspection import OUTCOMES, Inspection, lines


SCRIPTS = ("model.js", "tree.js", "overview.js")  # one program, in this order


def html_page(inspection: Inspection) -> str:
    """
    A page with the tree, a picture of all of it, and the full text of each step.

    The data stand in the page as JSON without any `<`, and its script writes them as text only, so that no text of a policy
    becomes markup. A content security policy forbids every request.

    Args:
        inspection ([`Inspection`]):
            The tree with its scores and counts.

    Returns:
        `str`: The page. Same tree, same bytes.
    """
    folder = resources.files(__package__) / "page"
    style, page = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.html"))
    script = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    data = json.dumps(page_data(inspection), separators=(",", ":")).replace("<", "\\u003c")
    return page.replace("{{style}}", style).replace("{{script}}", script).replace("{{data}}", data)


def page_data(inspection: Inspection) -> dict[str, Any]:
    """What the page shows, as JSON: columns over N + 1 nodes, the prompt last, and the lines of the tree."""
    tree = inspection.tree
    problem, nodes = tree.problem, tree.nodes
    columns = {
        "parent": [node.parent for node in nodes] + [None],
        "text": [tree.step_text(i) for i in range(len(nodes))] + [problem.prompt],
        "score": list(inspection.scores),
        "correct": [counts.correct for counts in inspection.counts],
        "answered": [counts.answered for counts in inspection.counts],
        "unresolved": [counts.unresolved for counts in inspection.counts],
        "outcome": [*inspection.outcomes(), None],
        "num_tokens": [len(node.token_ids) for node in nodes] + [len(tree.prompt_ids)],
    }
    for name in (
        "node_id",
        "role",
        "answer",
        "finish",
        "stop_reason",
        "num_cached",
        "weight",
        "merged_from",
        "num_merged",
    ):
        columns[name] = [getattr(node, name) for node in nodes] + [None]
    columns["seed"] = [str(node.seed) for node in nodes] + [None]  # beyond 2**53 a number would lose digits
    return {
        "problem": {
            "id": problem.problem_id,
            "prompt": problem.prompt,
            "answer": problem.answer,
            "status": tree.status,
        },
        "run": inspection.run,
        "basis": inspection.basis,
        "totals": dict(inspection.totals),
        "outcomes": OUTCOMES,
        "nodes": columns,
        "lines": [(line.nodes, line.above, line.kind) for line in lines(tree)],
    }
