r"""
Trees of openr's math-aps as search trees, with the values that they recorded.

A line is a problem and its OmegaPRM tree, whose root repeats the question:

```json
{"question": "1+2?", "final_answer": "3", "question_id": 0, "reasoning_steps": {"text": "1+2?", "mc_value": 0.5, "children":
    [{"text": "It is \\boxed{3}.", "mc_value": 1.0, "children": []}]}}
```
"""

from collections.abc import Iterator
from typing import Any

from ..grading.extraction import extract_answer
from ..search.tree import ROOT, Node, Problem, SearchTree, make_id
from .problems import problem_key
from .sources import Address, JsonLines


STEP_END = "\n\n"


class OpenrFiles(JsonLines):
    """Files of openr's trees. A record is a [`SearchTree`]."""

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, SearchTree]]:
        for where, address, record in super().read(chunk):
            yield where, address, parse_openr(record, where)


def parse_openr(record: dict[str, Any], where: str) -> SearchTree:
    r"""
    The search tree of one line. Its nodes are those below the root, in depth-first order.

    The file has the texts of steps without what stood between them; a blank line takes its place. A leaf with a `\boxed`
    answer is a complete solution, right or wrong as its value is 1 or 0. The problem's id is a hash of its text:
    `question_id` is not unique.

    Args:
        record (`dict[str, Any]`):
            The record.
        where (`str`):
            File and line, for error messages.

    Raises:
        `ValueError`: If a key is missing or holds something else than expected.
    """
    for name, kind in (("question", str), ("final_answer", str), ("reasoning_steps", dict)):
        if not isinstance(record.get(name), kind):
            raise ValueError(
                f"{where}: `{name}` is {repr(record.get(name))[:80]}, expected a {'string' if kind is str else 'tree'}. Is this a "
                "file of openr's math-aps trees?"
            )
    problem_id = problem_key(record["question"]).hex()
    tree = SearchTree(Problem(problem_id, record["question"], record["final_answer"]), status="done")
    _check(record["reasoning_steps"], where)
    pending = [(ROOT, i, below) for i, below in reversed(list(enumerate(record["reasoning_steps"]["children"])))]
    while pending:
        parent, place, found = pending.pop()
        _check(found, where)
        tree.nodes.append(_node(found, parent, place, tree))
        index = len(tree.nodes) - 1
        pending += [(index, i, below) for i, below in reversed(list(enumerate(found["children"])))]
    return tree


def _node(found: dict[str, Any], parent: int, place: int, tree: SearchTree) -> Node:
    above = tree.problem.problem_id if parent == ROOT else tree.nodes[parent].node_id
    answer = None if found["children"] else extract_answer(found["text"], ("boxed",))
    is_final = answer is not None
    return Node(
        node_id=make_id("openr", above, place),
        parent=parent,
        child_index=place,
        round=0,
        token_ids=[],
        text=found["text"] if is_final else found["text"] + STEP_END,
        finish="eos" if is_final else "stop",
        is_final=is_final,
        answer=answer,
        correct={1: True, 0: False}.get(found["mc_value"]) if is_final else None,
        value=float(found["mc_value"]),
    )


def _check(found: Any, where: str) -> None:
    if not isinstance(found, dict) or not {"text", "mc_value", "children"} <= found.keys():
        shown = sorted(found) if isinstance(found, dict) else repr(found)[:60]
        raise ValueError(f"{where}: a step holds {shown}, expected an object with `text`, `mc_value` and `children`.")
    value = found["mc_value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{where}: `mc_value` is {value!r}, expected a number from 0 to 1.")
    if not isinstance(found["text"], str) or not isinstance(found["children"], list):
        raise ValueError(f"{where}: `text` and `children` of a step are no string and list: {repr(found)[:60]}.")
