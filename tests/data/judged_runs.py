"""Runs with search trees and verdicts of a judge, written without a search."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from trl_hrm.io import write_json
from trl_hrm.search.nodes import write_nodes
from trl_hrm.search.tree import SearchTree


def write_run(folder: Path, trees: Sequence[SearchTree], search: str = "rollouts") -> Path:
    """Write the files of a finished run with these trees."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log-00000-of-00001.jsonl").write_text("{}\n")
    write_nodes(trees, folder / "nodes-00000-of-00001.parquet")
    summary = {"problems": {"done": len(trees)}, "failed_requests": 0, "solutions": {}, "log_bytes": 3}
    write_json(folder / "summary-00000-of-00001.json", summary)
    write_json(folder / "manifest.json", {"search": {"search": search}, "engine": {"model": "scripted"}})
    return folder


def write_verdicts(
    run: Path, verdicts: Mapping[tuple[str, tuple[str, ...]], Sequence[int | None]], name: str = "judge"
):
    """Write the votes of a judge by the id of the problem and the ids of the steps."""
    path = run / "judges" / name / "verdicts.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        for (problem_id, node_ids), votes in verdicts.items():
            row = {"prompt": "p", "completions": ["s"] * len(node_ids), "labels": [None] * len(node_ids)}
            row |= {"problem_id": problem_id, "node_ids": list(node_ids), "judge_votes": list(votes)}
            file.write(json.dumps(row) + "\n")
