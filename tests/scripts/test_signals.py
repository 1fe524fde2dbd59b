"""
Commands that are stopped with SIGTERM, SIGKILL or Ctrl-C at planned moments: how they end, that no process and no half output is left, and
that the same command then gives the result of an undisturbed run.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import trl_hrm
from trl_hrm.cli import COMMANDS, main
from trl_hrm.processes import STOP_SIGNALS

from ..distributed.launching import ROOT, Project, free_port
from ..fakes import write_rows
from .commands import files_of, settings_of, words_of


pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the processes in /proc")

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
        pause_at (`str`, *optional*, defaults to `"os:replace@1000000"`):
            Where to pause, see `PAUSED`.
        script (`str`, *optional*):
            Program that runs the command. Defaults to `PAUSED`.
    """

    def __init__(self, folder: Path, words: list[str], pause_at: str = "os:replace@1000000", script: str = PAUSED):
        self.reached = folder / "paused"
        self.reached.unlink(missing_ok=True)
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        (folder / "paused.py").write_text(script)
        self.mark = f"{folder}-{time.monotonic_ns()}"
        env = {"TMPDIR": str(self.temporary), "PAUSED": str(self.reached), "PAUSE_AT": pause_at, "MARK": self.mark}
        self.errors = open(folder / "errors.txt", "w+b")
        self.process = subprocess.Popen(
            [sys.executable, str(folder / "paused.py"), *words],
            env=os.environ | env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # `nohup pytest` ignores it
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
        self.last_line = printed.splitlines()[-1] if printed else ""
        assert "Traceback" not in printed and "Exception ignored" not in printed
        if exit_code > 128:
            assert re.search(
                r"Stopped\. (Run the same command again to|Add --resume_from_checkpoint true)", self.last_line
            )
            assert printed.count("Stopped.") == 1
            # torchrun keeps its folders, and so do training processes that it stops in a `Dataset.map`
            theirs = ("torchelastic_", "pymp-")
            assert [path for path in self.temporary.iterdir() if not path.name.startswith(theirs)] == []
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
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, True, marks=pytest.mark.slow),
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


@pytest.mark.slow
def test_a_killed_worker_ends_the_build(tmp_path):
    """The kernel kills the process that uses the most memory. The build must neither wait for it nor write a dataset without its rows."""
    command = Command(tmp_path, build_words(tmp_path), "trl_hrm.data.build:_Worker.keep@1")
    command.pause()
    os.kill(int(command.reached.read_text()), signal.SIGKILL)
    command.check(1)
    assert command.last_line.startswith("error: A worker process was killed") and "--num_proc" in command.last_line
    assert names_of(tmp_path) == ["rows.jsonl"]


BUSY = """
import os, sys, time
from pathlib import Path
from trl_hrm import cli

def never_end(name, argv):
    Path(os.environ["PAUSED"]).write_text(f"{os.getpid()}\\n")
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            pass  # as a library may do

cli.run = never_end
sys.exit(cli.main())
"""


@pytest.mark.parametrize("second", [None, signal.SIGINT])
def test_a_command_that_does_not_stop(tmp_path, second):
    """A thread in a long computation, or a library that catches everything, must not keep a stopped command alive."""
    command = Command(tmp_path, ["env"], script=BUSY)
    command.pause()
    if second is not None:
        os.kill(command.process.pid, signal.SIGTERM)
        time.sleep(0.5)
        os.kill(command.process.pid, second)
        command.check(143)
    else:
        command.stop(signal.SIGTERM, group=False)


FORKING = """
import os, signal, sys
from pathlib import Path
from trl_hrm import cli

def fork(name, argv):
    Path(os.environ["PAUSED"]).write_text(f"{os.getpid()}\\n")
    if os.fork() == 0:
        os._exit(0)
    while True:
        signal.pause()

os.register_at_fork(before=lambda: signal.raise_signal(signal.NUMBER))  # as the module `logging` does
cli.run = fork
sys.exit(cli.main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_a_fork(tmp_path, number):
    """Python would print and forget the exception of a signal that arrives while a data loader starts its workers."""
    Command(tmp_path, ["env"], script=FORKING.replace("signal.NUMBER", f"signal.{number.name}")).check(128 + number)


def test_nothing_is_changed_in_the_programs_of_users(tmp_path, monkeypatch):
    """The functions of the package, and `main` with arguments, must leave the signal handlers of a program or notebook alone."""
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.chdir(tmp_path)
    assert main(["env"]) == 0
    assert main(build_words(tmp_path)) == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


DEMO = """
import os, sys, time
from functools import partial
from pathlib import Path
from trl_hrm import cli
from trl_hrm.demo import pipeline

def job():
    Path(os.environ["PAUSED"]).write_text(f"{os.getpid()}\\n")
    time.sleep(600)

pipeline.run_stages = lambda runner, *args: runner.run("stage", {"one": partial(job), "two": partial(job)}, str)
if __name__ == "__main__":
    sys.exit(cli.main())
"""


@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    ],
)
def test_demo_stopped(tmp_path, number, group):
    command = Command(tmp_path, ["demo", "--output_dir", str(tmp_path / "demo"), "--num_workers", "2"], script=DEMO)
    command.pause()
    command.stop(number, group)
    if number != signal.SIGKILL:
        assert "Run the same command again to resume." in command.last_line


@pytest.mark.slow
def test_a_killed_job_ends_the_demo(tmp_path):
    command = Command(tmp_path, ["demo", "--output_dir", str(tmp_path / "demo"), "--num_workers", "2"], script=DEMO)
    command.pause()
    os.kill(int(command.reached.read_text()), signal.SIGKILL)
    command.check(1)
    assert command.last_line.startswith("error: A worker process was killed") and "--num_workers" in command.last_line


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_holds_the_interpreter_ends(tmp_path, number):
    """A grade may be one long computation in C, during which no thread of the worker runs."""
    command = Command(tmp_path, [], script=GRADING)
    command.pause()
    time.sleep(1)
    command.stop(number, group=False)


GRADING = """
import os, sys
from pathlib import Path
from trl_hrm import cli
from trl_hrm.grading import AnswerGrader

def grade(name, argv):
    with AnswerGrader(timeout=1000) as grader:
        Path(os.environ["PAUSED"]).write_text(f"{os.getpid()}\\n")
        grader.grade("9^{9^{9^9}}", "7")

cli.run = grade
if __name__ == "__main__":
    sys.argv.append("env")
    sys.exit(cli.main())
"""


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
    "judge": [
        "trl_hrm.search.engines.transformers:TransformersEngine.sample@2",
        "trl_hrm.io:AppendedLines.append@3",
        "os:replace@1",
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
def test_stopped_at_every_moment(name, work, tmp_path, monkeypatch):
    """The next start must resume or start over, and end with the files of an undisturbed run."""
    monkeypatch.chdir(work)
    config = getattr(trl_hrm, COMMANDS[name].config)
    outputs = [tmp_path / "output-1", tmp_path / "output-2"]
    for folder in outputs:
        if name in ("inspect", "report", "score"):  # these write files instead of folders
            folder.mkdir()
    undisturbed, stopped = ([name, *words_of(config, settings_of(name, str(folder)))] for folder in outputs)
    assert main(undisturbed) == 0
    others = itertools.cycle([(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)])
    for moment in MOMENTS[name]:
        for number, group in ((signal.SIGKILL, False), next(others)):
            command = Command(tmp_path, stopped, moment)
            command.pause()
            command.stop(number, group)
    assert main(stopped) == 0
    expected, found = map(without_dates, outputs)
    assert found.keys() == expected.keys()
    assert [file for file in found if found[file] != expected[file]] == []
    assert {folder.name for folder in outputs} >= set(names_of(tmp_path))


def without_dates(folder: Path) -> dict[str, object]:
    """Return the files of a folder without dates, and without the cost, which is unknown after an interrupted run."""
    files = files_of(folder, folder.name)
    for name, content in files.items():
        if name.endswith("results.json"):
            costs = r'"(scorer_num_\w+|policy_num_\w+)": [^,}\n]+'  # `files_of` leaves seconds out
            files[name] = {**json.loads(re.sub(costs, r'"\1": 0', content)), "cost": None, "date": None}
        elif isinstance(content, str):
            files[name] = re.sub(r"20\d\d-\d\d-\d\dT[\d:+]+", "DATE", content)
    return {name: content for name, content in files.items() if "cost-" not in name}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Project:
    return Project.make(tmp_path_factory.mktemp("training"))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_training_stopped(project, tmp_path, num_processes):
    """The launcher and all training processes must end. The training must then resume from its last checkpoint to the same weights."""
    words = ["reward", "--config", str(ROOT / "recipes" / "tiny" / "hrm_reward.yaml"), "--make_tiny_model", "false"]
    words += ["--dataset_name", str(project.folder / "data")]
    words += ["--model_name_or_path", str(project.folder / "classification")]
    words += ["--max_steps", "60", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no"]
    words += ["--dataset_num_proc", "2", "--dataloader_num_workers", "1"]
    if num_processes > 1:
        words += ["--num_processes", str(num_processes), "--main_process_port", str(free_port())]
    kinds = [(signal.SIGKILL, False), (signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
    output = tmp_path / "out"
    for count, (number, group) in enumerate(kinds, start=1):
        command = Command(tmp_path, [*words, "--output_dir", str(output), "--resume_from_checkpoint", "true"])
        command.wait_for(lambda least=4 * count: last_step(output) >= least)
        command.stop(number, group)
        assert not (output / "model.safetensors").exists()
    for folder in (output, tmp_path / "whole"):
        command = Command(tmp_path, [*words, "--output_dir", str(folder), "--resume_from_checkpoint", "true"])
        command.check(0)
    stopped, whole = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert stopped.keys() == whole.keys() and all(torch.equal(stopped[name], whole[name]) for name in whole)


def last_step(folder: Path) -> int:
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


@pytest.mark.slow
def test_a_killed_training_process(project, tmp_path):
    """The launcher must say why it ends, without the traceback of accelerate."""
    words = ["reward", "--config", str(ROOT / "recipes" / "tiny" / "hrm_reward.yaml"), "--make_tiny_model", "false"]
    words += [
        "--dataset_name",
        str(project.folder / "data"),
        "--model_name_or_path",
        str(project.folder / "classification"),
    ]
    command = Command(tmp_path, [*words, "--max_steps", "9999", "--output_dir", str(tmp_path / "out")])
    children = Path(f"/proc/{command.process.pid}/task/{command.process.pid}/children")
    command.wait_for(lambda: children.read_text().split())
    os.kill(int(children.read_text().split()[0]), signal.SIGKILL)
    command.check(1)
    assert command.last_line.startswith("error: A training process was ended by SIGKILL.")
