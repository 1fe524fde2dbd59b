"""
Runs the jobs of the demo in parallel processes, with a progress bar. Finished jobs are not repeated. Interrupted jobs are resumed if they
support it, otherwise restarted.
"""

import contextlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypedDict

import yaml
from tqdm import tqdm

from ..config import Config
from ..io import read_json, write_json
from ..processes import Workers
from ..schema import Amount, check_json


DONE = ".done"
REMEDY = "Delete the file and run the same command again."
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")  # of tqdm's bars, which every job prints


class Stage(TypedDict):
    """Record of a finished stage."""

    name: str
    seconds: Amount
    did: str


class Mark(TypedDict):
    """Record of a finished job: its seconds, and the seconds since the beginning of the stage."""

    seconds: Amount
    since: Amount


def read_mark(path: Path) -> dict[str, float]:
    """Return the record of a finished job."""
    found = read_json(path, REMEDY)
    check_json(found, Mark, path, REMEDY)
    return found


class Runner:
    """
    Runs the stages of the demo one after another.

    Args:
        folder (`Path`):
            Folder of the demo. `.done/` records finished jobs, and `logs/` has their output.
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
        if not record.exists():
            seconds = self._run_jobs(stage, jobs)
            write_json(record, {"name": stage, "seconds": seconds, "did": describe()})
        done = read_json(record, REMEDY)
        check_json(done, Stage, record, REMEDY)
        self.stages.append(done)
        print(f"{stage:<16}{self.stages[-1]['seconds']:>6.0f} s  {self.stages[-1]['did']}", flush=True)

    def _run_jobs(self, stage: str, jobs: Mapping[str, partial]) -> float:
        """Run the unfinished jobs. Return the seconds of all runs of the stage, each counted up to its last finished job."""
        began = time.perf_counter()
        marks = {name: self.folder / DONE / stage / f"{name}.json" for name in jobs}
        logs = {name: self.folder / "logs" / stage / f"{name}.log" for name in jobs}
        for path in (*marks.values(), *logs.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        before = max((read_mark(mark)["since"] for mark in marks.values() if mark.exists()), default=0.0)
        running: dict[Future, str] = {
            self._pool.submit(_work, job, logs[name]): name for name, job in jobs.items() if not marks[name].exists()
        }
        failed = []
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
        with tqdm(
            total=len(jobs),
            initial=len(jobs) - len(running),
            desc=f"{stage:<16}",
            bar_format=bar_format,
            leave=False,
        ) as bar:
            while running:
                done, _ = wait(running, timeout=0.5)
                for future in done:
                    name = running.pop(future)
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):  # of all jobs
                        raise error
                    if error:
                        failed.append(f"{stage}, {name}: {type(error).__name__}: {error} See its log: {logs[name]}")
                    else:
                        since = before + time.perf_counter() - began
                        write_json(marks[name], {"seconds": future.result(), "since": since})
                bar.n = len(jobs) - len(running) + sum(share_done(logs[name]) for name in running.values())
                bar.set_postfix_str(f"{len(jobs) - len(running)} of {len(jobs)} jobs")
        if failed:
            raise ValueError("; ".join(failed))
        return before + time.perf_counter() - began


def share_done(log: Path) -> float:
    """Return the progress of a job from the last progress bar in its log. With several bars, progress restarts at each."""
    if not log.exists():
        return 0.0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = _PROGRESS.findall(file.read().decode(errors="replace"))
    return min(int(found[-1][0]) / max(int(found[-1][1]), 1), 0.99) if found else 0.0


def _work(job: partial, log: Path) -> float:
    """Run a job and write its output to its log. Return the seconds that it took."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    for settings in job.args:  # to run the job by hand: `trl-hrm COMMAND --config FILE`
        if isinstance(settings, Config | dict):
            settings = settings.settings() if isinstance(settings, Config) else settings
            log.with_suffix(".yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    with open(log, "w", encoding="utf-8") as file, _printed_to(file):
        given = [repr(value) for value in job.args] + [f"{name}={value!r}" for name, value in job.keywords.items()]
        print(f"{job.func.__name__}({', '.join(given)})", flush=True)
        try:
            job()
        except BaseException:
            traceback.print_exc()
            raise
    return time.perf_counter() - began


@contextlib.contextmanager
def _printed_to(file: TextIO) -> Iterator[None]:
    """Redirect all output of this process, including C code and child processes, to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
