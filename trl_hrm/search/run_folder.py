"""
Output folder of a run: a manifest, and for each shard a log, the nodes as Parquet, and a summary.

A run may be split over machines and processes. Each process searches one shard, which is the problems whose ids hash to its
index, and writes its own files.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, Required

from typing_extensions import TypedDict

from ..grading import DEFAULT_EXTRACTORS
from ..identity import compare_runs, describe_changes, format_change
from ..io import claimed_folder, read_json, remove_partial, shown, write_json
from ..schema import Count, check_json, from_json
from .log import EventLog
from .outcomes import (
    NUM_SHOWN,
    OUTCOMES,
    count_outcomes,
    count_repeats,
    count_unsplit,
    ordered,
    outcome_warnings,
    reference_warnings,
    repeat_warnings,
    step_warnings,
)
from .prompts import OLD_DEFAULTS, Prompt, started_prompt
from .step_search import STRATEGIES
from .thinking import rule_type
from .tree import SearchTree, Status, make_id


MANIFEST = "manifest.json"
_LOG = re.compile(r"log-(\d{5})-of-(\d{5})\.jsonl")
_SUMMARY = re.compile(r"summary-\d{5}-of-(\d{5})\.json")

Outcome = Literal[tuple(OUTCOMES)]


class SearchSettings(TypedDict, total=False):
    """Settings of a search that are read from the manifest. It has others."""

    search: Required[str]
    root_filter: dict[str, Count] | None
    max_depth: Count
    max_step_tokens: Count
    max_solution_tokens: Count
    max_sequences: Count
    max_tokens: Count | None


class AcceptedChange(TypedDict):
    """A change that was accepted when a run was resumed. See [`check_manifests`]."""

    name: str
    before: Any
    now: Any
    date: str


class MoreFrom(TypedDict):
    """The run that a run continues with more rollouts, and how they were distributed. See [`~search.more_rollouts.FinishedRun`]."""

    digest: str
    problems: dict[Status, Count]
    samples: Count
    tokens: Count
    where: Literal["uncertain", "uniform"]
    more_samples: Count
    num_completions: Count


class Manifest(TypedDict, total=False):
    """Content of `manifest.json` that is read again. It has more, and an old one may have less."""

    identity: dict[str, dict[str, Any]]
    accepted_changes: list[AcceptedChange]
    engine: dict[str, Any]
    prompt: dict[str, Any]
    steps: dict[str, Any]
    extractors: list[str]
    grader: dict[str, Any]
    more_from: MoreFrom
    started_with: dict[str, Any]
    search: dict[str, Any]
    seed: int
    num_shards: Count
    versions: dict[str, str]


class Reference(TypedDict):
    """Problem with an unreadable reference answer."""

    problem_id: str
    answer: str


class Summary(TypedDict):
    """Content of `summary-*.json`. See [`finish_shard`]. An old one may have less."""

    problems: dict[Status, Count]
    failed_requests: Count
    solutions: NotRequired[dict[Outcome, Count]]
    repeats: NotRequired[dict[Literal["requests", "repeated"], Count]]
    unsplit: NotRequired[dict[Literal["long", "unsplit"], Count]]
    unreadable_references: NotRequired[list[Reference]]
    log_bytes: NotRequired[Count]


class Shard(NamedTuple):
    """
    One part of a run.

    Args:
        index (`int`):
            Index of the shard, from 0.
        count (`int`):
            Number of shards.
        local (`int`, *optional*):
            Local rank of this process on its machine. `None` if only one process was launched.
    """

    index: int
    count: int
    local: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """
        Return the shard with the name `I/N`, such as `3/16`.

        Raises:
            `ValueError`: If the text is something else, or I is not from 0 to N - 1.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not int(match[1]) < int(match[2]):
            raise ValueError(f"`shard` is {shown(text)}. It must be I/N with I from 0 to N - 1, such as 3/16.")
        return cls(int(match[1]), int(match[2]))


def problem_shard(problem_id: str, num_shards: int) -> int:
    """Return the shard index of a problem. It depends only on the id, so processes agree without communication."""
    return int(make_id("shard", problem_id), 16) % num_shards


def show_own_gpu(local: int) -> None:
    """
    Make only one GPU visible to the process with rank `local` on this machine, for engines that use the first visible GPU.

    Raises:
        `ValueError`: If `CUDA_VISIBLE_DEVICES` has too few GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local + 1)]
    if local >= len(devices):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {shown(visible)}, which has no GPU for the process with local rank {local}. Launch at most "
            f"{len(devices)} processes on this machine, or add GPUs."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]


def launched_shard(shard: str = "0/1") -> Shard:
    """
    Return the shard of this process. Processes started by `accelerate launch` or `torchrun` share the work of `shard`, which is I/N.

    The variables of the launcher are removed from the environment. Otherwise an engine would wait for the other processes, which
    do not communicate.
    """
    index, count, _ = Shard.parse(shard)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = os.environ.get("LOCAL_RANK")
    if size == 1:
        return Shard(index, count)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return Shard(index * size + rank, count * size, int(local) if local is not None else None)


def shard_name(kind: str, shard: int, num_shards: int, suffix: str) -> str:
    """Return the file name of a shard, such as `log-00002-of-00016.jsonl`."""
    return f"{kind}-{shard:05d}-of-{num_shards:05d}.{suffix}"


@contextmanager
def claimed_run(path: str | Path, shard: Shard, files: Iterable[str] = ()) -> Iterator[Path]:
    """
    Claim the folder of a run for one shard before any work is done. Other shards may write to the folder at the same time.

    Args:
        path (`str` or `Path`):
            Folder of the run, from the option `output_dir`.
        shard ([`Shard`]):
            Shard of this process.
        files (`Iterable[str]`, *optional*):
            Names of files that the run writes, in addition to those of its shard. See [`~io.claimed_folder`].
    """
    is_alone = shard.count == 1
    lock = ".lock" if is_alone else f".shard-{shard.index:05d}-of-{shard.count:05d}.lock"
    with claimed_folder(path, "output_dir", files if is_alone else (), lock) as folder:
        written = [("log", "jsonl"), ("nodes", "parquet"), ("summary", "json"), ("cost", "json")]
        names = [shard_name(kind, shard.index, shard.count, suffix) for kind, suffix in written]
        # of annotate, best-of-n, evaluate and step-search
        for inner in (folder, folder / "samples", folder / "greedy", *folder.glob("n-*")):
            for name in [*names, MANIFEST] if is_alone else names:
                remove_partial(inner / name)
        yield folder


# Sections of the settings that only affect what is sampled, scored and graded from now on. Changes can be accepted.
_MODELS = {
    "policy": "policies",
    "policy_server": "policies",
    "judge": "judges",
    "judge_server": "judges",
    "engine": "policies",
    "reward_model": "reward models",
    "reward_model_server": "reward models",
    "grader": "graders",
}
# Settings that a run does not share with the run that it continues
_OF_EACH_RUN = ("more_from", "search", "seed", "num_shards", "started_with", "versions")
_UNRECORDED = "not recorded"


def check_manifest(
    folder: Path,
    manifest: dict[str, Any],
    accept: Sequence[str] = (),
    source: Path | None = None,
    option: str = "output_dir",
) -> list[str]:
    """Write or check the manifest of one folder. See [`check_manifests`]."""
    return check_manifests({folder: manifest}, accept, source, option)


def check_manifests(
    manifests: Mapping[Path, dict[str, Any]],
    accept: Sequence[str] = (),
    source: Path | None = None,
    option: str = "output_dir",
) -> list[str]:
    """
    Write the manifests of new runs, or check that resumed runs have the same settings and models. See [`compare_runs`] for what
    is compared.

    Accepted changes are recorded in the manifest as `accepted_changes`, with the value before, the value now, and the date. They
    need not be accepted again.

    Args:
        manifests (`Mapping[Path, dict[str, Any]]`):
            Manifest of each folder.
        accept (`Sequence[str]`, *optional*):
            Names of the changes to accept, such as `policy.weights`.
        source (`Path`, *optional*):
            Folder of a run that new runs continue. Their settings and models must be the same as its own.
        option (`str`, *optional*, defaults to `"output_dir"`):
            Option that starts a new run, for error messages.

    Returns:
        `list[str]`: Notes for the user, for example about a checkpoint that was moved.

    Raises:
        `ValueError`: If a run was started with different settings that are not accepted, or a name in `accept` cannot be accepted
            or did not change. The message lists them. Nothing is written.
    """
    fixed = [name for name in accept if not _is_acceptable(name)]
    if fixed:
        raise ValueError(
            f"`accept_changes` contains {', '.join(fixed)}. Only changes of {', '.join(_MODELS)} can be accepted, and not their "
            f"`spans` and `combine`. Files of the run depend on all other settings. Use another `{option}` to start a new run."
        )
    resume = f"Use the same settings to resume it, or another --{option} to start a new run."
    notes: list[str] = []
    confirmed: set[str] = set()  # names in `accept` that changed, or whose change was accepted before
    updated: dict[Path, dict[str, Any]] = {}
    fresh: dict[Path, dict[str, Any]] = {}
    for folder, manifest in manifests.items():
        path, names = folder / MANIFEST, set()
        if path.exists():
            updated[folder], names = _resumed_manifest(path, read_manifest(folder), manifest, accept, notes, resume)
        elif source is None:
            fresh[folder] = manifest
        else:
            started = read_manifest(source)
            found = {name: value for name, value in started.items() if name in manifest or name == "accepted_changes"}
            found |= {name: manifest[name] for name in _OF_EACH_RUN if name in manifest}
            advice = "Use the settings of this run to add rollouts to it."
            fresh[folder], names = _resumed_manifest(source / MANIFEST, found, manifest, accept, notes, advice)
        confirmed |= names
    unchanged = [name for name in accept if name not in confirmed]
    if unchanged:
        raise ValueError(
            f"`accept_changes` contains {', '.join(unchanged)}, which did not change since this run was started. Remove it."
        )
    for folder, manifest in updated.items():
        if manifest != read_manifest(folder):
            write_json(folder / MANIFEST, manifest)
    for folder, manifest in fresh.items():
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f".{MANIFEST}.{os.getpid()}"
        write_json(written, manifest)
        try:
            os.link(written, folder / MANIFEST)  # if several shards start together, the first one wins
        except FileExistsError:
            _resumed_manifest(folder / MANIFEST, read_manifest(folder), manifests[folder], (), notes, resume)
        finally:
            written.unlink()
    return list(dict.fromkeys(notes))


def _resumed_manifest(
    path: Path,
    found: dict[str, Any],
    manifest: dict[str, Any],
    accept: Sequence[str],
    notes: list[str],
    advice: str,
) -> tuple[dict[str, Any], set[str]]:
    """
    Return the manifest of a resumed run, and the names in `accept` that changed or were accepted before.

    Raises:
        `ValueError`: If there are other changes.
    """
    asked = json.loads(json.dumps(manifest))
    prompts = [{"prompt": started_prompt(values)} if "prompt" in values else {} for values in (found, asked)]
    changes, more_notes, unrecorded = compare_runs(found | prompts[0], asked | prompts[1])
    refused = {name: values for name, values in changes.items() if name not in accept}
    if refused:
        fixed = [name for name in refused if not _is_acceptable(name)]
        raise ValueError(
            f"{path}: this run was started with different settings: {describe_changes(refused)} {advice} "
            + (
                f"A change of {', '.join(fixed)} cannot be accepted, because files of the run depend on it."
                if fixed
                else f"To mix both in this run, pass --accept_changes {' '.join(changes)}."
            )
        )
    notes += more_notes
    date = datetime.now(UTC).isoformat(timespec="seconds")
    accepted = [{"name": name, "before": before, "now": now, "date": date} for name, (before, now) in changes.items()]
    accepted += [
        {"name": part, "before": _UNRECORDED, "now": asked["identity"][part], "date": date} for part in unrecorded
    ]
    earlier = {one["name"] for one in found.get("accepted_changes", ())}
    if not accepted and not more_notes:
        return found, earlier
    updated = found | {name: asked[name] for name in ("engine", "reward_model", "grader") if name in asked}
    if "identity" in asked:
        updated["identity"] = found.get("identity", {}) | asked["identity"]
    if accepted:
        updated["accepted_changes"] = [*found.get("accepted_changes", ()), *accepted]
    return updated, earlier | changes.keys()


def _is_acceptable(name: str) -> bool:
    section, _, setting = name.partition(".")
    return section in _MODELS and setting not in ("spans", "combine")


def mixture_warnings(manifest: dict[str, Any]) -> list[str]:
    """Return a warning for each kind of model that a run mixes, because a change was accepted."""
    mixed: dict[str, list[str]] = {}
    for one in manifest.get("accepted_changes", ()):
        if one["before"] != _UNRECORDED:
            change = f"{format_change(one['name'], one['before'], one['now'])} since {one['date']}"
            mixed.setdefault(_MODELS.get(one["name"].partition(".")[0], "settings"), []).append(change)
    return [
        f"This run mixes different {kind}, which was accepted with --accept_changes: {'; '.join(changes)}."
        for kind, changes in mixed.items()
    ]


def resumed_prompt(prompt: Prompt, *folders: Path) -> Prompt:
    """
    Return the prompt to resume a run whose manifest was written by an older version and lacks some options.

    Args:
        prompt ([`Prompt`]):
            Prompt of a new run.
        folders (`Path`):
            Folders of the run. Folders without a manifest are new.
    """
    defaults = {name: value for name, value in OLD_DEFAULTS.items() if getattr(prompt, name) == getattr(Prompt, name)}
    for path in (folder / MANIFEST for folder in folders):
        if path.exists():
            started = read_manifest(path.parent).get("prompt", OLD_DEFAULTS)
            prompt = replace(prompt, **{name: value for name, value in defaults.items() if name not in started})
    return prompt


def finish_shard(folder: Path, shard: int, num_shards: int) -> dict[str, Any]:
    """
    Write the nodes and the summary of a shard from its log. Problems keep their order, and only one is in memory at a time.

    Problems with an unfinished search or with failed requests are skipped and counted.

    Returns:
        `dict[str, Any]`: Summary of the shard over all restarts: number of problems by status, `solutions` by outcome (see
        [`count_outcomes`]; empty for searches guided by a reward model), `repeats` (see [`count_repeats`]), `unsplit` (see
        [`count_unsplit`]; empty without a step rule in the manifest), the first problems with `unreadable_references`, number of failed requests, and size of the log in bytes.
    """
    from .nodes import write_nodes  # imports pyarrow, which would slow down the command line

    manifest = read_manifest(folder) if (folder / MANIFEST).is_file() else {}
    search, extractors = manifest.get("search", {}), manifest.get("extractors", DEFAULT_EXTRACTORS)
    with EventLog(folder / shard_name("log", shard, num_shards, "jsonl")) as log:
        summary = {
            "problems": dict(sorted(Counter(problem.status for problem in log.problems.values()).items())),
            "solutions": Counter(),
            "repeats": Counter(),
            "unsplit": Counter(),
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
                summary["repeats"].update(count_repeats(opened))
                if search.get("search") not in STRATEGIES:
                    summary["solutions"].update(count_outcomes(opened, search, extractors))
                if "steps" in manifest:
                    summary["unsplit"].update(count_unsplit(opened, manifest["steps"]["pattern"]))
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
    Return the node files of a run, one per started shard. Outdated files are rewritten.

    Raises:
        `FileNotFoundError`: If the folder contains no run.
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
        found = _read_summary(summary) if nodes.exists() and summary.exists() else {}
        # written by an older version, or from a part of the log
        if "solutions" not in found or found.get("log_bytes") != log.stat().st_size:
            finish_shard(folder, shard, num_shards)
        files.append(nodes)
    if not files:
        raise FileNotFoundError(
            f"{folder} contains no log of a search (log-00000-of-00001.jsonl). Pass the --output_dir of trl-hrm annotate."
        )
    return files


def unfinished_shards(folder: str | Path) -> list[int]:
    """
    Return the indices of the shards of a run that have not finished: they were not started, are running, or were stopped.

    Raises:
        `FileNotFoundError`: If the folder contains no run.
    """
    folder = Path(folder)
    num_shards = read_manifest(folder, ["num_shards"])["num_shards"]

    def is_finished(shard: int) -> bool:
        log, summary = (
            folder / shard_name(kind, shard, num_shards, suffix)
            for kind, suffix in (("log", "jsonl"), ("summary", "json"))
        )
        if not log.exists() or not summary.exists():
            return False
        found = _read_summary(summary)
        return found.get("log_bytes") == log.stat().st_size and not found["problems"].get("open")

    return [shard for shard in range(num_shards) if not is_finished(shard)]


def read_summary(folder: str | Path) -> dict[str, Any]:
    """
    Return the combined summary of all shards. `shards_missing` is the number of shards without a summary in the folder.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.glob("summary-*.json") if _SUMMARY.fullmatch(file.name))
    summaries = [_read_summary(file) for file in files]
    problems: Counter = Counter()
    solutions: Counter = Counter()
    repeats: Counter = Counter()
    unsplit: Counter = Counter()
    for summary in summaries:
        problems.update(summary["problems"])
        solutions.update(summary.get("solutions", {}))
        repeats.update(summary.get("repeats", {}))
        unsplit.update(summary.get("unsplit", {}))
    num_shards = int(_SUMMARY.fullmatch(files[0].name)[1]) if files else 0
    return {
        "problems": dict(sorted(problems.items())),
        "solutions": ordered(solutions),
        "repeats": dict(repeats),
        "unsplit": dict(unsplit),
        "unreadable_references": [one for summary in summaries for one in summary.get("unreadable_references", ())][
            :NUM_SHOWN
        ],
        "failed_requests": sum(summary["failed_requests"] for summary in summaries),
        "shards_missing": num_shards - len(files),
    }


def summary_warnings(summary: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """
    Return warnings about unreadable reference answers, repeated samples, solutions without a grade, with equal grades or without
    steps, and a run that mixes models.

    Args:
        summary (`dict[str, Any]`):
            See [`finish_shard`] and [`read_summary`].
        manifest (`dict[str, Any]`):
            See [`read_manifest`].
    """
    number = summary["problems"].get("ungradable", 0)
    return [
        *reference_warnings(number, summary["unreadable_references"]),
        *repeat_warnings(summary.get("repeats", {}), manifest.get("engine", {})),
        *outcome_warnings(summary["solutions"], manifest.get("search", {}), manifest),
        *step_warnings(summary.get("unsplit", {}), manifest),
        *mixture_warnings(manifest),
    ]


def _read_summary(path: Path) -> dict[str, Any]:
    remedy = "Delete the file. It is written again from the log when the folder is read."
    summary = read_json(path, remedy)
    check_json(summary, Summary, path, remedy)
    return summary


def read_manifest(folder: str | Path, needed: Collection[str] = ()) -> dict[str, Any]:
    """
    Return the manifest of a run.

    Args:
        folder (`str` or `Path`):
            Folder of the run.
        needed (`Collection[str]`, *optional*):
            Keys that the manifest must have.

    Raises:
        `FileNotFoundError`: If the folder contains no run.
        `ValueError`: If the manifest is damaged. The message names the file and the key.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist. Pass the --output_dir of trl-hrm annotate.")
    remedy = "Restore the file, or start the run again in another folder."
    manifest = read_json(path, remedy)
    check_json(manifest, Manifest, path, remedy, more=True)
    if "prompt" in manifest:
        from_json(Prompt, started_prompt(manifest), f"{path}: `prompt`", remedy)
    if "steps" in manifest:
        from_json(rule_type(manifest["steps"]), manifest["steps"], f"{path}: `steps`", remedy)
    if "search" in manifest:
        check_json(manifest["search"], SearchSettings, f"{path}: `search`", remedy, more=True)
    if missing := [key for key in needed if key not in manifest]:
        raise ValueError(f"{path} has no {' and no '.join(f'`{key}`' for key in missing)}. {remedy}")
    return manifest
