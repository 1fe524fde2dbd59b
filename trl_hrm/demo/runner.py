"""
Runs the jobs of the demo in parallel processes, with a progress bar. Finished jobs are not repeated, unless their settings, inputs or
outputs changed. Interrupted jobs are resumed if they support it, otherwise restarted.
"""

import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NotRequired

import yaml
from typing_extensions import TypedDict

from ..config import Config
from ..identity import digest_of_files, setting_changes
from ..io import read_json, write_json
from ..processes import Workers, run_logged
from ..schema import Amount, check_json
from ..search.run_folder import MANIFEST, Shard, shard_name


DONE = ".done"
REMEDY = "Delete the file and run the same command again."
_OUTPUTS = ("output_dir", "output", "folder")  # names of the arguments and settings with the output of a job


class Stage(TypedDict):
    """Record of a finished stage."""

    name: str
    seconds: Amount
    did: str


class Mark(TypedDict):
    """
    Record of a finished job: its seconds, the seconds since the beginning of the stage, its call, and digests of its inputs and outputs
    by path. Records of older versions have no call and no digests.
    """

    seconds: Amount
    since: Amount
    call: NotRequired[str]
    inputs: NotRequired[dict[str, str]]
    outputs: NotRequired[dict[str, str]]


def read_mark(path: Path) -> dict[str, Any]:
    """Return the record of a finished job."""
    found = read_json(path, REMEDY)
    check_json(found, Mark, path, REMEDY)
    return found


class Runner:
    """
    Runs the stages of the demo one after another.

    Args:
        folder (`Path`):
            Folder of the demo. `.done/` records finished jobs with digests of their inputs and outputs, and `logs/` has what they print.
        num_workers (`int`):
            Number of parallel jobs, each with one thread. More threads are not faster for small models, and much slower if the machine
            is busy.
    """

    def __init__(self, folder: Path, num_workers: int):
        self.folder = folder
        self.stages: list[dict[str, Any]] = []  # name, seconds and result of each
        self._pool = Workers(num_workers, "spawn", "Lower --num_workers. Run the same command again to resume.")

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.__exit__(*error)

    def run(self, stage: str, jobs: Mapping[str, partial], describe: Callable[[], str]) -> None:
        """
        Run the unfinished jobs of a stage, and print a line with its time and result.

        A finished job is repeated if its settings or inputs changed, or if one of its outputs is missing or changed. Its outputs are
        deleted first. The inputs and outputs of a job are the paths in its arguments and settings.

        Args:
            stage (`str`):
                Name of the stage and of its log folder.
            jobs (`Mapping[str, partial]`):
                Independent jobs by name: calls of functions that another process can import.
            describe (`Callable[[], str]`):
                Returns a description of the result, called at the end of the stage.

        Raises:
            `ValueError`: If a job failed. The other jobs of the stage are finished first.
        """
        record = self.folder / DONE / f"{stage}.json"
        marks = {name: self.folder / DONE / stage / f"{name}.json" for name in jobs}
        changed = {name: what for name, job in jobs.items() if (what := self._changed(marks[name], job))}
        for name, what in changed.items():
            print(f"{stage}, {name}: {what} changed since the job was finished. It is repeated.", flush=True)
            self._remove_outputs(jobs[name])
            marks[name].unlink()
        if not record.exists() or not all(mark.exists() for mark in marks.values()):
            seconds = self._run_jobs(stage, jobs)
            write_json(record, {"name": stage, "seconds": seconds, "did": describe()})
        done = read_json(record, REMEDY)
        check_json(done, Stage, record, REMEDY)
        self.stages.append(done)
        print(f"{stage:<16}{self.stages[-1]['seconds']:>6.0f} s  {self.stages[-1]['did']}", flush=True)

    def _changed(self, mark: Path, job: partial) -> str:
        """Return what changed since a job was finished, or an empty string if nothing changed or the job is not finished."""
        if not mark.exists():
            return ""
        found = read_mark(mark)
        now = self._given(job) | self._written(job)
        if "outputs" not in found:  # finished by an older version
            return "" if now["outputs"] else "the output"
        for part in ("call", "inputs", "outputs"):
            if changes := setting_changes({part: found.get(part)}, {part: now[part]}):
                names = [name.partition(".")[2] for name in changes if "." in name]
                return (
                    ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "the settings"
                )
        return ""

    def _given(self, job: partial) -> dict[str, Any]:
        """Return the call of a job, and digests of its inputs."""
        inputs = [path for name, path in self._paths(job) if name not in _OUTPUTS]
        digests = {self._name(path): digest_of_files(files) for path in inputs if (files := _files(path))}
        return {"call": _format_call(job), "inputs": digests}

    def _written(self, job: partial) -> dict[str, Any]:
        """Return digests of the outputs of a job."""
        return {"outputs": {self._name(path): digest_of_files([path]) for path in self._outputs(job)}}

    def _paths(self, job: partial) -> Iterator[tuple[str, Path]]:
        """Yield the paths in the folder of the demo that a job is given, with the names of the arguments or settings."""
        for name, value in _settings_of(job):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str | Path) and self.folder in Path(one).parents:
                    yield name, Path(one)

    def _outputs(self, job: partial) -> list[Path]:
        """Return the files that a job has written. A shard of a search shares the folder with other shards."""
        files = [file for name, path in self._paths(job) if name in _OUTPUTS for file in _files(path)]
        shard = dict(_settings_of(job)).get("shard")
        if shard is None:
            return files
        index, count, _ = Shard.parse(shard)
        own = shard_name("", index, count, "")
        return [file for file in files if own in file.name or file.name == MANIFEST]

    def _remove_outputs(self, job: partial) -> None:
        for file in self._outputs(job):
            file.unlink()
        for name, path in self._paths(job):  # only hidden files are left, except for other shards
            if name in _OUTPUTS and path.is_dir() and not _files(path):
                shutil.rmtree(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _run_jobs(self, stage: str, jobs: Mapping[str, partial]) -> float:
        """Run the unfinished jobs. Return the seconds of all runs of the stage, each counted up to its last finished job."""
        began = time.perf_counter()
        marks = {name: self.folder / DONE / stage / f"{name}.json" for name in jobs}
        for mark in marks.values():
            mark.parent.mkdir(parents=True, exist_ok=True)
        before = max((read_mark(mark)["since"] for mark in marks.values() if mark.exists()), default=0.0)
        given = {name: self._given(job) for name, job in jobs.items() if not marks[name].exists()}

        def finish(name: str, seconds: float) -> None:
            times = {"seconds": seconds, "since": before + time.perf_counter() - began}
            write_json(marks[name], times | given[name] | self._written(jobs[name]))

        logs = self.folder / "logs" / stage
        timed = {name: partial(_run_timed, jobs[name], logs / f"{name}.yaml") for name in given}
        failed = run_logged(self._pool, stage, timed, self.folder, len(jobs) - len(given), finish)
        if failed:
            raise ValueError(
                "; ".join(
                    f"{stage}, {name}: {type(error).__name__}: {error} See its log: {logs / f'{name}.log'}"
                    for name, error in failed.items()
                )
            )
        return before + time.perf_counter() - began


def _format_call(job: partial) -> str:
    given = [repr(value) for value in job.args] + [f"{name}={value!r}" for name, value in job.keywords.items()]
    return f"{job.func.__name__}({', '.join(given)})"


def _settings_of(job: partial) -> Iterator[tuple[str, Any]]:
    """Yield the name and value of each argument of a job, with configs and dictionaries expanded."""
    for name, value in inspect.signature(job.func).bind(*job.args, **job.keywords).arguments.items():
        value = value.settings() if isinstance(value, Config) else value
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def _files(path: Path) -> list[Path]:
    """
    Return the file, or all files in the folder. Hidden files, such as locks, are ignored, and the logs of a training, which contain times: a
    model that is trained again with the same weights has not changed.
    """
    if path.is_file():
        return [path]
    found = (one for one in sorted(path.rglob("*")) if one.is_file() and one.name != "trainer_state.json")
    return [one for one in found if not any(part.startswith(".") for part in one.relative_to(path).parts)]


def _run_timed(job: partial, file: Path) -> float:
    """Run a job, and write its settings to a file. Return the seconds that it took."""
    began = time.perf_counter()
    for settings in job.args:  # to run the job by hand: `trl-hrm COMMAND --config FILE`
        if isinstance(settings, Config | dict):
            settings = settings.settings() if isinstance(settings, Config) else settings
            file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    print(_format_call(job), flush=True)
    job()
    return time.perf_counter() - began
