"""
Stages of jobs, some at a time in processes of their own, each with a live bar. What is done is not done again; what a kill cut off is
begun again, or gone on with where the job's command does that.
"""

import contextlib
import importlib
import json
import os
import re
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..io import write_json
from .settings_file import add_config_argument, with_settings, words_of


DONE = ".done"
PROGRESS = re.compile(r"(\d+)/(\d+) \[")  # of tqdm's bars, by which every command shows where it is


@dataclass(frozen=True)
class Job:
    """
    One call in a process of its own.

    Args:
        name (`str`):
            Name in its stage.
        call (`Callable`):
            Function of a module, with `arguments`. What it prints goes to a log.
        arguments (`dict[str, Any]`):
            Keyword arguments, of types that JSON knows.
    """

    name: str
    call: Callable[..., None]
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """
    Jobs that do not need each other.

    Args:
        name (`str`):
            Name, also of the folder of its logs.
        jobs (`Sequence[Job]`):
            What is done.
        tell (`Callable[[Path], str]`):
            Says in one line what was done, from the folder of the demo.
    """

    name: str
    jobs: Sequence[Job]
    tell: Callable[[Path], str]


def command(name: str, config: str, **settings: Any) -> dict[str, Any]:
    """The arguments of [`run_command`] for `trl-hrm NAME --config FILE` with more settings."""
    return {"name": name, "config": config, "settings": settings}


def run_command(name: str, config: str, settings: dict[str, Any]) -> None:
    """What `trl-hrm NAME` does, in this process. `inputs` and `results` are the words that have no name."""
    import argparse

    module = importlib.import_module(f".{name.replace('-', '_')}", __package__)
    settings = dict(settings)
    free = [word for key in ("inputs", "results") for word in settings.pop(key, ())]
    words = [*free, "--config", config, *words_of(settings)]
    print(f"$ trl-hrm {shlex.join([name, *words])}", flush=True)
    parser = argparse.ArgumentParser(prog=f"trl-hrm {name}", allow_abbrev=False)
    add_config_argument(parser)
    module.add_arguments(parser)
    module.run(parser.parse_args(with_settings(parser, words)))


def run_recipe(name: str, config: str, settings: dict[str, Any], **more: Any) -> None:
    """What `recipes/NAME.py` does, in this process."""
    module = importlib.import_module(f".{name}", __package__)
    words = ["--config", config, *words_of(settings)]
    print(f"$ python recipes/{name}.py {shlex.join(words)}", flush=True)
    module.main(*module.make_parser().parse_args_and_config(words), **more)


@dataclass
class Runner:
    """
    Runs stages.

    Args:
        folder (`Path`):
            Folder of the demo: `.done/` has what is done, `logs/` what the jobs print.
        num_workers (`int`):
            Jobs at a time, each with one thread: for small models more are no faster, and much slower where something else runs.
    """

    folder: Path
    num_workers: int
    costs: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> "Runner":
        self._pool = ProcessPoolExecutor(
            self.num_workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(os.getpid(),)
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, stage: Stage) -> None:
        """
        Run what is not done of a stage, and print what it did.

        Raises:
            `ValueError`: If a job failed. The others of the stage come to their ends first.
        """
        record = self.folder / DONE / f"{stage.name}.json"
        if not record.exists():
            spent, did = self._run_jobs(stage), stage.tell(self.folder)
            write_json(record, {"name": stage.name, "seconds": spent, "did": did})
        found = json.loads(record.read_text(encoding="utf-8"))
        self.costs.append(found)
        print(f"{stage.name:<16}{found['seconds']:>6.0f} s  {found['did']}", flush=True)

    def _run_jobs(self, stage: Stage) -> float:
        """Run the jobs that are not done; returns the seconds that all starts of the stage took, but for those that were cut off."""
        began = time.perf_counter()
        marks = {job.name: self.folder / DONE / stage.name / f"{job.name}.json" for job in stage.jobs}
        (self.folder / DONE / stage.name).mkdir(parents=True, exist_ok=True)
        before = max((json.loads(m.read_text())["since"] for m in marks.values() if m.exists()), default=0.0)
        running: dict[Future, Job] = {
            self._pool.submit(_work, job.call, job.arguments, str(self._log(stage, job))): job
            for job in stage.jobs
            if not marks[job.name].exists()
        }
        failed = []
        with self._bar(stage, len(stage.jobs) - len(running)) as show:
            while running:
                done, _ = wait(running, timeout=0.5)
                for future in done:
                    job = running.pop(future)
                    if error := future.exception():
                        told = f"{stage.name}, {job.name}: {type(error).__name__}: {error}"
                        failed.append(f"{told} All that it printed: {self._log(stage, job)}")
                    else:
                        write_json(
                            marks[job.name],
                            {"seconds": future.result(), "since": before + time.perf_counter() - began},
                        )
                show([self._log(stage, job) for job in running.values()], len(stage.jobs) - len(running))
        if failed:
            raise ValueError("; ".join(failed))
        return before + time.perf_counter() - began

    def _log(self, stage: Stage, job: Job) -> Path:
        return self.folder / "logs" / stage.name / f"{job.name}.log"

    @contextlib.contextmanager
    def _bar(self, stage: Stage, num_done: int) -> Iterator[Callable[[list[Path], int], None]]:
        bar_format = "{desc} {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
        with tqdm(
            total=len(stage.jobs), initial=num_done, desc=f"{stage.name:<16}", bar_format=bar_format, leave=False
        ) as bar:

            def show(logs: list[Path], num_done: int) -> None:
                bar.n = num_done + sum(map(_share_done, logs))
                bar.set_postfix_str(f"{num_done} of {len(stage.jobs)} jobs")

            yield show


def _share_done(log: Path) -> float:
    """How far a job is, by the last bar in its log. A job with several bars starts anew with each."""
    if not log.exists():
        return 0.0
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        found = PROGRESS.findall(file.read().decode(errors="replace"))
    return min(int(found[-1][0]) / max(int(found[-1][1]), 1), 0.99) if found else 0.0


def _begin(parent: int) -> None:
    """Set up a process: it ends with the one that started it, also where that is killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(call: Callable[..., None], arguments: dict[str, Any], log: str) -> float:
    """Do a job with everything that it prints in its log; returns its seconds."""
    import torch

    torch.set_num_threads(1)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with open(log, "w", encoding="utf-8") as file, _printed_to(file):
        try:
            call(**arguments)
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
