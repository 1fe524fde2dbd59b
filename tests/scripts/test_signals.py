"""
Commands that are stopped with SIGTERM, SIGKILL or Ctrl-C at planned moments: how they end, that no process and no half output is left, and
that the same command then gives the result of an undisturbed run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trl_hrm
from trl_hrm.cli import COMMANDS, main

from ..fakes import write_rows
from .test_python_api import files_of, settings_of, words_of, work  # noqa: F401  (a fixture)


pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")

TRIES = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]

# A program that runs a command and stops before a call of a function, which the first argument names: `module:function@3` is the third call
PAUSED = """
import asyncio, inspect, os, sys, time
from importlib import import_module
from pathlib import Path

from trl_hrm import cli
from trl_hrm.data import sources

sources.CHUNK_BYTES = 100
name, _, at = os.environ["PAUSE_AT"].partition("@")
owner, _, name = name.partition(":")
owner = import_module(owner)
for part in name.split(".")[:-1]:
    owner = getattr(owner, part)
name = name.split(".")[-1]
original, calls = getattr(owner, name), []

def is_time():
    calls.append(1)
    if len(calls) == int(at):
        Path(os.environ["PAUSED"]).write_text(f"{os.getpid()}\\n")
    return len(calls) >= int(at)

async def wait(*args, **options):
    await asyncio.sleep(600 * is_time())
    return await original(*args, **options)

def sleep(*args, **options):
    time.sleep(600 * is_time())
    return original(*args, **options)

setattr(owner, name, wait if inspect.iscoroutinefunction(original) else sleep)
if __name__ == "__main__":
    sys.exit(cli.main())
"""


class Command:
    """
    A command in its own session, as a shell starts it, with a folder for temporary files.

    Args:
        folder (`Path`):
            Folder for the script, the temporary files and the output.
        words (`list[str]`):
            Command line.
        pause_at (`str`):
            Where to pause, see `PAUSED`.
    """

    def __init__(self, folder: Path, words: list[str], pause_at: str = "os:replace@1000000", **env: str):
        self.reached = folder / "paused"
        self.reached.unlink(missing_ok=True)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        script = folder / "paused.py"
        script.write_text(PAUSED)
        self.mark = f"{folder}-{time.monotonic_ns()}"
        env = {
            "TMPDIR": str(self.temporary),
            "PAUSED": str(self.reached),
            "PAUSE_AT": pause_at,
            "MARK": self.mark,
            **env,
        }
        self.errors = open(folder / "errors.txt", "w+b")
        self.process = subprocess.Popen(
            [sys.executable, str(script), *words],
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
        )

    def pause(self) -> None:
        """Wait until the command has reached the planned moment."""
        self.wait_for(lambda: self.reached.exists() and self.reached.read_text().endswith("\n"))

    def wait_for(self, happens) -> None:
        deadline = time.monotonic() + 120
        while not happens():
            assert self.process.poll() is None, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.02)

    def stop(self, number: int, group: bool) -> None:
        """Send a signal, to all processes as a terminal does, or to one. Check the exit code, and that no process is left and no traceback."""
        (os.killpg if group else os.kill)(self.process.pid, number)
        self.check(-number if number == signal.SIGKILL else 128 + number)

    def check(self, exit_code: int) -> None:
        assert self.process.wait(timeout=60) == exit_code, self.printed()
        deadline = time.monotonic() + 5
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.processes() == []
        printed = self.printed()
        assert "Traceback" not in printed and "Exception ignored" not in printed
        if exit_code > 128:
            last = printed.splitlines()[-1]
            assert last.startswith("Stopped. Run the same command again to ") or last.startswith("Stopped. Add ")
            assert printed.count("Stopped.") == 1
            assert list(self.temporary.iterdir()) == []
        self.errors.close()

    def printed(self) -> str:
        self.errors.seek(0)
        return self.errors.read().decode()

    def processes(self) -> list[str]:
        """Return the command lines of the processes that this command has started and that are still running."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if f"MARK={self.mark}\0".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found


ROWS = [{"question": f"{i}+2?", "completions": ["so 3", "thus 3"], "labels": [True, False]} for i in range(40)]


def build_words(folder: Path) -> list[str]:
    rows = write_rows(folder / "rows.jsonl", ROWS)
    words = ["build-stepwise", rows, "--output_dir", str(folder / "out"), "--columns", "prompt=question"]
    return [*words, "--num_proc", "3", "--test_size", "0"]


def names_of(folder: Path) -> list[str]:
    return sorted(
        path.name for path in folder.iterdir() if path.name not in ("paused", "paused.py", "errors.txt", "tmp")
    )


@pytest.mark.parametrize(
    ("number", "group"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        (signal.SIGKILL, False),
        (signal.SIGINT, False),
        (signal.SIGINT, True),
        (signal.SIGHUP, True),
    ],
)
def test_build_stopped_while_its_workers_work(tmp_path, number, group):
    """The workers of a pool wait for work forever if their parent is gone, and print a traceback each on Ctrl-C."""
    words = build_words(tmp_path)
    command = Command(tmp_path, words, "trl_hrm.data.build:_Worker.keep@1")
    command.pause()
    assert len(command.processes()) >= 4
    command.stop(number, group)
    if number != signal.SIGKILL:
        assert names_of(tmp_path) == ["rows.jsonl"]
    assert main(words) == 0
    assert names_of(tmp_path) == ["out", "rows.jsonl"]
    assert json.loads((tmp_path / "out" / "build_report.json").read_text())["rows"] == {"train": 40}


def test_a_killed_worker_ends_the_build(tmp_path):
    """The kernel kills the process that uses the most memory. The build must neither wait for it nor write a dataset without its rows."""
    command = Command(tmp_path, build_words(tmp_path), "trl_hrm.data.build:_Worker.keep@1")
    command.pause()
    os.kill(int(command.reached.read_text()), signal.SIGKILL)
    assert command.process.wait(timeout=60) == 1
    lines = command.printed().splitlines()
    command.check(1)
    assert lines[-1].startswith("error: A worker process was killed") and "--num_proc" in lines[-1]
    assert names_of(tmp_path) == ["rows.jsonl"]


# Where each command is stopped, one try after the other: in a worker, in an event loop, in a thread, before a file is in place
MOMENTS = {
    "build-prm800k": ["trl_hrm.data.build:_Worker.keep@1", "trl_hrm.data.build:digest_of@1"],
    "build-math-shepherd": ["trl_hrm.data.build:_Worker.keep@1", "trl_hrm.data.build:digest_of@1"],
    "annotate": [
        "trl_hrm.search.engines.transformers:TransformersEngine.sample@2",
        "trl_hrm.search.engines.transformers:TransformersEngine._generate@1",
        "trl_hrm.search.log:EventLog.append@5",
        "os:replace@2",
    ],
    "export": ["trl_hrm.data.build:_Worker.keep@1", "trl_hrm.data.build:digest_of@1"],
    "inspect": ["os:replace@1"],
    "select-raft": ["trl_hrm.scoring.scorer:StepScorer.score@1", "trl_hrm.data.build:digest_of@1"],
    "push-dataset": ["trl_hrm.data.publish:tempfile.TemporaryDirectory@1"],
    "best-of-n": [
        "trl_hrm.search.engines.transformers:TransformersEngine.sample@2",
        "trl_hrm.grading.grader:_Worker.judge@3",
        "trl_hrm.scoring.scorer:StepScorer.score@1",
        "os:replace@3",
    ],
    "step-search": [
        "trl_hrm.search.engines.transformers:TransformersEngine.sample@2",
        "trl_hrm.scoring.scorer:StepScorer.score_trees@1",
        "os:replace@2",
    ],
    "benchmark": ["trl_hrm.scoring.scorer:StepScorer.score@1", "os:replace@1"],
    "report": ["os:replace@1"],
    "score": ["trl_hrm.scoring.scorer:StepScorer.score_trees@1", "os:replace@1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MOMENTS)
def test_stopped_at_every_moment(name, work, tmp_path, monkeypatch):  # noqa: F811
    """The next start must resume or start over, and end with the files of an undisturbed run."""
    monkeypatch.chdir(work)
    config = getattr(trl_hrm, COMMANDS[name].config)
    for folder in ("whole", "stopped"):
        if name in ("inspect", "report", "score"):  # these write files instead of folders
            (tmp_path / folder).mkdir()
    whole, stopped = (
        [name, *words_of(config, settings_of(name, str(tmp_path / way)))] for way in ("whole", "stopped")
    )
    assert main(whole) == 0
    tries = [
        (moment, number) for moment in MOMENTS[name] for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    ]
    for index, (moment, number) in enumerate(tries):
        command = Command(tmp_path, stopped, moment)
        command.pause()
        command.stop(number, group=index % 2 == 0)
    assert main(stopped) == 0
    assert files_of(tmp_path / "stopped", "stopped") == files_of(tmp_path / "whole", "whole")
    assert {"whole", "stopped"} >= set(names_of(tmp_path))
