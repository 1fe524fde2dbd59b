"""The folder of a run: a manifest, and for each shard its log, its nodes as Parquet, and a summary."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .log import EventLog, shard_name, write_json
from .manifest import MANIFEST
from .nodes import write_nodes
from .tree import SearchTree


_LOG = re.compile(r"log-(\d{5})-of-(\d{5})\.jsonl")


def finish_shard(folder: Path, shard: int, num_shards: int) -> dict[str, Any]:
    """
    Write the nodes of a shard as Parquet, from its log, with the problems in their order and one of them in memory at a time.

    Problems whose search has not ended, or ended with failed requests, are left out and counted.

    Returns:
        `dict[str, Any]`: The summary: problems by status, failed requests, and bytes of the log that it was made from.
    """
    with EventLog(folder / shard_name("log", shard, num_shards, "jsonl")) as log:
        write_nodes(_ended_trees(log), folder / shard_name("nodes", shard, num_shards, "parquet"))
        summary = {
            "problems": dict(sorted(Counter(problem.status for problem in log.problems.values()).items())),
            "failed_requests": sum(problem.num_errors for problem in log.problems.values()),
            "log_bytes": log.size,
        }
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
        if not (nodes.exists() and summary.exists() and read_json(summary)["log_bytes"] == log.stat().st_size):
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
    for summary in summaries:
        problems.update(summary["problems"])
    num_shards = int(files[0].stem.rpartition("-of-")[2]) if files else 0
    return {
        "problems": dict(sorted(problems.items())),
        "failed_requests": sum(summary["failed_requests"] for summary in summaries),
        "shards_missing": num_shards - len(files),
    }


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


def _ended_trees(log: EventLog) -> Iterator[SearchTree]:
    places = sorted((problem.position, name) for name, problem in log.problems.items())
    for _, name in places:
        if log.problems[name].status not in ("open", "error"):
            yield log.read(name).tree.canonical()
