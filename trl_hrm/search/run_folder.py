"""
The folder of a run: a manifest, and for each shard its log, its nodes as Parquet, and a summary.

A run may be split over machines and processes. Each one searches a shard, the problems whose ids hash to its number, and writes
files of its own.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..io import changed_settings, write_json
from .log import EventLog
from .outcomes import NUM_SHOWN, count_outcomes, ordered, outcome_warnings, reference_warnings
from .prompts import OLD_DEFAULTS, Prompt, started_prompt
from .step_search import STRATEGIES
from .tree import SearchTree, make_id


MANIFEST = "manifest.json"
_LOG = re.compile(r"log-(\d{5})-of-(\d{5})\.jsonl")


class Shard(NamedTuple):
    """
    One part of a run.

    Args:
        index (`int`):
            Number of the shard, from 0.
        count (`int`):
            Number of shards.
        local (`int`, *optional*):
            Number of this process among the processes of this machine. `None` if it was not launched with others.
    """

    index: int
    count: int
    local: int | None = None


def problem_shard(problem_id: str, num_shards: int) -> int:
    """The shard of a problem. It depends on its id alone, so that machines agree without communication."""
    return int(make_id("shard", problem_id), 16) % num_shards


def show_own_gpu(local: int) -> None:
    """
    Show only one GPU to process number `local` of this machine, for engines that take the first GPU they see.

    Raises:
        `ValueError`: If `CUDA_VISIBLE_DEVICES` has no GPU left for it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local + 1)]
    if local >= len(devices):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which has no GPU for process {local} (from 0) of this machine; expected "
            "one for each. Launch fewer processes, or name more GPUs."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]


def launched_shard(index: int = 0, count: int = 1) -> Shard:
    """
    The shard of this process. Each process that `accelerate launch` or `torchrun` starts takes a part of shard `index`.

    The launcher's variables are removed from the environment. The processes do not communicate, and an engine that saw the
    variables would wait for the others.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = os.environ.get("LOCAL_RANK")
    if size == 1:
        return Shard(index, count)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return Shard(index * size + rank, count * size, int(local) if local is not None else None)


def shard_name(kind: str, shard: int, num_shards: int, suffix: str) -> str:
    """Name of a shard's file, as in `log-00002-of-00016.jsonl`."""
    return f"{kind}-{shard:05d}-of-{num_shards:05d}.{suffix}"


def check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """
    Write the manifest of a new run, or check that a run which is resumed has the same settings.

    `versions` and `started_with` may differ: a library may be upgraded, and a run may be given more problems.

    Raises:
        `ValueError`: If the run in `folder` was started with other settings. The message names them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MANIFEST
    if not path.exists():
        fresh = path.with_name(f".{MANIFEST}.{os.getpid()}")
        write_json(fresh, manifest)
        try:
            os.link(fresh, path)  # of several shards that start at once, the first one wins
        except FileExistsError:
            pass
        finally:
            fresh.unlink()
    found = json.loads(path.read_text(encoding="utf-8"))
    asked = json.loads(json.dumps(manifest))
    for values in (found, asked):
        if "prompt" in values:
            values["prompt"] = started_prompt(values)
    changed = changed_settings(found, asked, ignored=("versions", "started_with"))
    if changed:
        raise ValueError(
            f"{path}: this run was started with other settings: {'; '.join(changed)}. Start with the same settings to "
            "resume, or in another --output_dir."
        )


def resumed_prompt(prompt: Prompt, *folders: Path) -> Prompt:
    """
    Return the prompt with which a run can be resumed that was started before manifests had all of its options.

    Args:
        prompt ([`Prompt`]):
            The prompt of a new run.
        folders (`Path`):
            Folders of the run. Those without a manifest are new.
    """
    defaults = {name: value for name, value in OLD_DEFAULTS.items() if getattr(prompt, name) == getattr(Prompt, name)}
    for path in (folder / MANIFEST for folder in folders):
        if path.exists():
            started = json.loads(path.read_text(encoding="utf-8")).get("prompt", OLD_DEFAULTS)
            prompt = replace(prompt, **{name: value for name, value in defaults.items() if name not in started})
    return prompt


def finish_shard(folder: Path, shard: int, num_shards: int) -> dict[str, Any]:
    """
    Write the nodes of a shard as Parquet, from its log, with the problems in their order and one of them in memory at a time.

    Problems whose search has not ended, or ended with failed requests, are left out and counted.

    Returns:
        `dict[str, Any]`: The summary of all starts so far: problems by status, `solutions` by outcome (see [`count_outcomes`]; not of
        searches that a reward model led), the first problems with `unreadable_references`, failed requests, and bytes of the log
        that it was made from.
    """
    from .nodes import write_nodes  # imports pyarrow, which the command line must not wait for

    search = read_manifest(folder).get("search", {}) if (folder / MANIFEST).is_file() else {}
    with EventLog(folder / shard_name("log", shard, num_shards, "jsonl")) as log:
        summary = {
            "problems": dict(sorted(Counter(problem.status for problem in log.problems.values()).items())),
            "solutions": Counter(),
            "unreadable_references": [],
            "failed_requests": sum(problem.num_errors for problem in log.problems.values()),
            "log_bytes": log.size,
        }

        def ended_trees() -> Iterator[SearchTree]:
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
                    summary["unreadable_references"].append(
                        {"problem_id": problem.problem_id, "answer": problem.answer}
                    )
                yield opened.tree.canonical()

        write_nodes(ended_trees(), folder / shard_name("nodes", shard, num_shards, "parquet"))
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
        found = read_json(summary) if nodes.exists() and summary.exists() else {}
        # made by this version, and of the whole log
        if "solutions" not in found or found["log_bytes"] != log.stat().st_size:
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
