"""The folder of a run: a manifest, and for each shard its log, its nodes as Parquet, and a summary."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..io import write_json
from .log import EventLog, shard_name
from .manifest import MANIFEST
from .nodes import write_nodes
from .outcomes import NUM_SHOWN, count_outcomes, ordered, outcome_warnings, reference_warnings
from .step_search import STRATEGIES
from .tree import SearchTree


_LOG = re.compile(r"log-(\d{5})-of-(\d{5})\.jsonl")


def finish_shard(folder: Path, shard: int, num_shards: int) -> dict[str, Any]:
    """
    Write the nodes of a shard as Parquet, from its log, with the problems in their order and one of them in memory at a time.

    Problems whose search has not ended, or ended with failed requests, are left out and counted.

    Returns:
        `dict[str, Any]`: The summary of all starts so far: problems by status, `solutions` by outcome (see [`count_outcomes`]; not of
        searches that a reward model led), the first problems with `unreadable_references`, failed requests, and bytes of the log
        that it was made from.
    """
    search = read_manifest(folder).get("search", {}) if (folder / MANIFEST).is_file() else {}
    with EventLog(folder / shard_name("log", shard, num_shards, "jsonl")) as log:
        summary = {
            "problems": dict(sorted(Counter(problem.status for problem in log.problems.values()).items())),
            "solutions": Counter(),
            "unreadable_references": [],
            "failed_requests": sum(problem.num_errors for problem in log.problems.values()),
            "log_bytes": log.size,
        }
        nodes = folder / shard_name("nodes", shard, num_shards, "parquet")
        write_nodes(_ended_trees(log, search, summary), nodes)
        summary["solutions"] = ordered(summary["solutions"])
    write_json(folder / shard_name("summary", shard, num_shards, "json"), summary)
    return summary


def node_files(folder: str | Path) -> list[Path]:
    """
    The node files of a run, one per shard that was started, made anew from logs that have grown since.

    Raises:
        `FileNotFoundError`: If the folder holds no run.
    """
    folder = Path(folder)
    files = []
    for log in sorted(folder.glob("log-*.jsonl")):
        match = _LOG.fullmatch(log.name)
        if match is None:
            continue
        shard, num_shards = int(match[1]), int(match[2])
        nodes = folder / shard_name("nodes", shard, num_shards, "parquet")
        summary = folder / shard_name("summary", shard, num_shards, "json")
        if not (nodes.exists() and summary.exists() and _is_current(read_json(summary), log)):
            finish_shard(folder, shard, num_shards)
        files.append(nodes)
    if not files:
        raise FileNotFoundError(
            f"{folder}: found no log of a search (log-00000-of-00001.jsonl), expected the --output_dir of trl-hrm annotate."
        )
    return files


def read_summary(folder: str | Path) -> dict[str, Any]:
    """
    The summaries of all shards in one, with `shards_missing`, the number of those that are not in the folder.
    """
    folder = Path(folder)
    files = sorted(folder.glob("summary-*.json"))
    summaries = [read_json(file) for file in files]
    problems: Counter = Counter()
    solutions: Counter = Counter()
    for summary in summaries:
        problems.update(summary["problems"])
        solutions.update(summary.get("solutions", {}))
    num_shards = int(files[0].stem.rpartition("-of-")[2]) if files else 0
    return {
        "problems": dict(sorted(problems.items())),
        "solutions": ordered(solutions),
        "unreadable_references": [one for summary in summaries for one in summary.get("unreadable_references", ())][
            :NUM_SHOWN
        ],
        "failed_requests": sum(summary["failed_requests"] for summary in summaries),
        "shards_missing": num_shards - len(files),
    }


def summary_warnings(summary: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """
    Return warnings about problems with unreadable references, and about a run most of whose solutions are useless.

    Args:
        summary (`dict[str, Any]`):
            See [`finish_shard`] and [`read_summary`].
        manifest (`dict[str, Any]`):
            See [`read_manifest`].
    """
    number = summary["problems"].get("ungradable", 0)
    return [
        *reference_warnings(number, summary["unreadable_references"]),
        *outcome_warnings(summary["solutions"], manifest.get("search", {}), manifest),
    ]


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """
    What the run was started with.

    Raises:
        `FileNotFoundError`: If the folder holds no run.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected the --output_dir of trl-hrm annotate.")
    return read_json(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def _is_current(summary: dict[str, Any], log: Path) -> bool:
    """Whether a summary was made by this version, of the whole log."""
    return "solutions" in summary and summary["log_bytes"] == log.stat().st_size


def _ended_trees(log: EventLog, search: dict[str, Any], summary: dict[str, Any]) -> Iterator[SearchTree]:
    """The trees of problems whose search has ended, which are counted in `summary`."""
    places = sorted((problem.position, name) for name, problem in log.problems.items())
    for _, name in places:
        status = log.problems[name].status
        if status in ("open", "error"):
            continue
        opened = log.read(name)
        if search.get("search") not in STRATEGIES:
            summary["solutions"].update(count_outcomes(opened, search))
        if status == "ungradable" and len(summary["unreadable_references"]) < NUM_SHOWN:
            problem = opened.tree.problem
            summary["unreadable_references"].append({"problem_id": problem.problem_id, "answer": problem.answer})
        yield opened.tree.canonical()
