r"""
Readers of search trees, from the Parquet files of a run and from openr's math-aps-tree file.

A line of an openr file has a problem and its OmegaPRM tree with recorded values. The root repeats the question:

```json
{"question": "1+2?", "final_answer": "3", "question_id": 0, "reasoning_steps": {"text": "1+2?", "mc_value": 0.5, "children":
    [{"text": "It is \\boxed{3}.", "mc_value": 1.0, "children": []}]}}
```
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..grading.extraction import extract_answer
from ..io import shown
from ..search.nodes import check_problems, open_nodes, read_group
from ..search.run_folder import summary_warnings
from ..search.tree import ROOT, Node, Problem, SearchTree, make_id
from .faults import other_command
from .problems import problem_key
from .sources import Address, JsonLines


OPENR_STEP_END = "\n\n"


class NodeFiles:
    """
    Reader of files written by [`~search.nodes.write_nodes`], with the `chunks` and `read` methods of [`JsonLines`]. A record is a
    [`SearchTree`] without token ids.

    Args:
        files (`Sequence[str]`):
            Paths of the files.

    Raises:
        `FileNotFoundError`: If a path is not a file.
        `ValueError`: If a file is not a file of search trees.
    """

    def __init__(self, files: Sequence[str]):
        self.files = [str(file) for file in files]
        for file in self.files:
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"{file}: file not found. Expected a folder of `trl-hrm annotate`, or a Parquet file of nodes from one."
                )
            check_problems(file)

    def chunks(self) -> list[dict[str, int]]:
        """Return one dict per row group, with the indices of the `file` and of the `group`."""
        chunks = []
        for number, name in enumerate(self.files):
            with open_nodes(name) as file:
                chunks += [{"file": number, "group": group} for group in range(file.num_row_groups)]
        return chunks

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, SearchTree]]:
        """Yield `(where, address, tree)` for each tree of the row group. `where` is the file and the problem."""
        name = self.files[chunk["file"]]
        with open_nodes(name) as file:
            for row, tree in enumerate(read_group(file, name, chunk["group"], token_ids=False)):
                where = f"{name}, problem {shown(tree.problem.problem_id)}"
                yield where, Address(chunk["file"], chunk["group"], row), tree


def run_warnings(runs: dict[str, dict[str, Any]]) -> list[str]:
    """
    Return warnings about problems that are missing from the node files of runs, and the [`summary_warnings`] of each run.

    Args:
        runs (`dict[str, dict[str, Any]]`):
            Combined manifest and summary of each run, by folder. See [`~search.run_folder.read_manifest`] and
            [`~search.run_folder.read_summary`].
    """
    warnings = []
    for name, run in runs.items():
        for status, words in (("error", "have failed requests"), ("open", "have an unfinished search")):
            if count := run["problems"].get(status):
                warnings.append(
                    f"{name}: {count} problems {words} and are dropped. Run trl-hrm annotate again to complete them."
                )
        if run["shards_missing"]:
            warnings.append(
                f"{name}: {run['shards_missing']} shards are missing from the folder, so their problems are not included."
            )
        warnings += [f"{name}: {warning}" for warning in summary_warnings(run, run)]
    return warnings


class OpenrFiles(JsonLines):
    """Reader of openr's tree files. A record is a [`SearchTree`]."""

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, SearchTree]]:
        for where, address, record in super().read(chunk):
            yield where, address, parse_openr(record, where)


def parse_openr(record: dict[str, Any], where: str) -> SearchTree:
    r"""
    Return the search tree of one line. Its nodes are the nodes below the root, in depth-first order.

    The step texts in the file have no separators, so a blank line is added after each step. A leaf with a `\boxed` answer is a
    complete solution, which is correct if its value is 1 and wrong if it is 0. The problem id is a hash of the problem's text,
    because `question_id` is not unique.

    Args:
        record (`dict[str, Any]`):
            Record of an openr file.
        where (`str`):
            File and line, for error messages.

    Raises:
        `ValueError`: If a key is missing or its value is invalid.
    """
    flat = other_command(record) if isinstance(record.get("reasoning_steps"), list) else ""
    for name, kind in (("question", str), ("final_answer", str), ("reasoning_steps", dict)):
        if not isinstance(record.get(name), kind):
            raise ValueError(
                f"{where}: `{name}` is {shown(record.get(name))}, expected a {'string' if kind is str else 'tree'}. "
                + (flat or "Is this openr's math-aps-tree file?")
            )
    problem_id = problem_key(record["question"]).hex()
    tree = SearchTree(Problem(problem_id, record["question"], record["final_answer"]), status="done")
    _check(record["reasoning_steps"], where)
    tree.value = float(record["reasoning_steps"]["mc_value"])
    pending = [(ROOT, i, below) for i, below in reversed(list(enumerate(record["reasoning_steps"]["children"])))]
    while pending:
        parent, place, found = pending.pop()
        _check(found, where)
        above = problem_id if parent == ROOT else tree.nodes[parent].node_id
        answer = None if found["children"] else extract_answer(found["text"], ("boxed",))
        is_final = answer is not None
        tree.nodes.append(
            Node(
                node_id=make_id("openr", above, place),
                parent=parent,
                child_index=place,
                round=0,
                token_ids=[],
                text=found["text"] if is_final else found["text"] + OPENR_STEP_END,
                finish="eos" if is_final else "stop",
                is_final=is_final,
                answer=answer,
                correct={1: True, 0: False}.get(found["mc_value"]) if is_final else None,
                value=float(found["mc_value"]),
            )
        )
        index = len(tree.nodes) - 1
        pending += [(index, i, below) for i, below in reversed(list(enumerate(found["children"])))]
    return tree


def _check(found: Any, where: str) -> None:
    if not isinstance(found, dict) or not {"text", "mc_value", "children"} <= found.keys():
        what = f"has the keys {shown(sorted(found), 200)}" if isinstance(found, dict) else f"is {shown(found, 60)}"
        raise ValueError(f"{where}: a step {what}, expected an object with `text`, `mc_value` and `children`.")
    value = found["mc_value"]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{where}: `mc_value` is {shown(value)}, expected a number from 0 to 1.")
    if not isinstance(found["text"], str) or not isinstance(found["children"], list):
        raise ValueError(
            f"{where}: a step is {shown(found, 60)}, expected an object with a string `text` and a list `children`."
        )
