"""
Jobs of the demo, some at a time in processes of their own, under a live bar. What is done is not done again; what a kill cut off is
begun again, or resumed where the job does that.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

import yaml
from tqdm import tqdm

from ..config import Config
from ..io import write_json


DONE = ".done"
_PROGRESS = re.compile(r"(\d+)/(\d+) \[")  # of tqdm's bars, by which every job shows where it is


class Runner:
    """
    Runs the jobs of one stage after another.

    Args:
        folder (`Path`):
            Folder of the demo: `.done/` records what is done, `logs/` what the jobs print.
        num_workers (`int`):
            Jobs at a time, each with one thread: for small models more are no faster, and much slower where something else runs.
    """

    def __init__(self, folder: Path, num_workers: int):
        self.folder = folder
        self.stages: list[dict[str, Any]] = []  # name, seconds and result of each
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
        )

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, stage: str, jobs: Mapping[str, partial], describe: Callable[[], str]) -> None:
        """
        Run what is not done of a stage, and print one line about it.

        Args:
            stage (`str`):
                Name of the stage, also of the folder of its logs.
            jobs (`Mapping[str, partial]`):
                Jobs that do not need each other, by name: calls of functions that another process can import.
            describe (`Callable[[], str]`):
                Says what was done, when it is done.

        Raises:
            `ValueError`: If a job failed. The others of the stage are finished first.
        """
        record = self.folder / DONE / f"{stage}.json"
        if not record.exists():
            seconds = self._run_jobs(stage, jobs)
            write_json(record, {"name": stage, "seconds": seconds, "did": describe()})
        self.stages.append(json.loads(record.read_text(encoding="utf-8")))
        print(f"{stage:<16}{self.stages[-1]['seconds']:>6.0f} s  {self.stages[-1]['did']}", flush=True)

    def _run_jobs(self, stage: str, jobs: Mapping[str, partial]) -> float:
        """Run the jobs that are not done; returns the seconds that all starts of the stage took, up to their last finished job."""
        began = time.perf_counter()
        marks = {name: self.folder / DONE / stage / f"{name}.json" for name in jobs}
        logs = {name: self.folder / "logs" / stage / f"{name}.log" for name in jobs}
        for path in (*marks.values(), *logs.values()):
            path.parent.mkdir(parents=True, exist_ok=True)
        before = max((json.loads(m.read_text())["since"] for m in marks.values() if m.exists()), default=0.0)
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
                    if error := future.exception():
                        failed.append(
                            f"{stage}, {name}: {type(error).__name__}: {error} All that it printed: {logs[name]}"
                        )
                    else:
                        since = before + time.perf_counter() - began
                        write_json(marks[name], {"seconds": future.result(), "since": since})
                bar.n = len(jobs) - len(running) + sum(share_done(logs[name]) for name in running.values())
                bar.set_postfix_str(f"{len(jobs) - len(running)} of {len(jobs)} jobs")
        if failed:
            raise ValueError("; ".join(failed))
        return before + time.perf_counter() - began


def share_done(log: Path) -> float:
    """How far a job is, by the last bar in its log. A job with several bars starts anew with each."""
    if not log.exists():
        return 0.0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = _PROGRESS.findall(file.read().decode(errors="replace"))
    return min(int(found[-1][0]) / max(int(found[-1][1]), 1), 0.99) if found else 0.0


def _end_with(parent: int) -> None:
    """Set up a process: it ends with the one that started it, also where that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: partial, log: Path) -> float:
    """Do a job with everything that it prints in its log; returns its seconds."""
    import torch

    torch.set_num_threads(1)
    began = time.perf_counter()
    for settings in job.args:  # so that it can be run again by hand: `trl-hrm COMMAND --config FILE`
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
    """Send all output of this process, also that of C code and of its children, to a file."""
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
