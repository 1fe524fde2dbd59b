"""The runner of the demo: jobs run once in their own processes, resume after a kill, and never fail silently."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from trl_hrm import ScoreConfig, score
from trl_hrm.demo.runner import Runner, share_done
from trl_hrm.io import write_json


def jobs(folder: Path, number: int = 3) -> dict[str, partial]:
    return {f"job-{i}": partial(write_json, folder / f"out-{i}.json", i) for i in range(number)}


def run(runner: Runner, folder: Path) -> None:
    runner.run("stage", jobs(folder), lambda: f"{len(list(folder.glob('out-*')))} files")


def test_jobs_run_once(tmp_path, capsys):
    with Runner(tmp_path, num_workers=2) as runner:
        run(runner, tmp_path)
        (tmp_path / "out-1.json").unlink()
        run(runner, tmp_path)  # done: nothing runs again
    assert [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in (0, 2)] == [0, 2]
    assert not (tmp_path / "out-1.json").exists()
    assert capsys.readouterr().out.count("3 files") == 2
    assert [stage["did"] for stage in runner.stages] == ["3 files"] * 2 and runner.stages[0] == runner.stages[1]


def test_what_a_kill_left_is_done(tmp_path):
    """A mark means that a job is complete. Only the job without a mark runs again."""
    with Runner(tmp_path, num_workers=1) as runner:
        run(runner, tmp_path)
        (tmp_path / ".done" / "stage.json").unlink()
        (tmp_path / ".done" / "stage" / "job-1.json").unlink()
        for i in range(3):
            (tmp_path / f"out-{i}.json").unlink()
        run(runner, tmp_path)
    assert [path.name for path in tmp_path.glob("out-*")] == ["out-1.json"]
    assert runner.stages[1]["seconds"] > 0


def test_a_job_that_fails(tmp_path):
    """The other jobs of the stage finish, the stage is not done, and the message names the log."""
    config = ScoreConfig(input="none.jsonl", reward_model=str(tmp_path / "none"))
    with (
        Runner(tmp_path, num_workers=1) as runner,
        pytest.raises(ValueError, match="bad: .*bad.log"),
    ):
        runner.run("stage", {"bad": partial(score, config), **jobs(tmp_path, 2)}, lambda: "done")
    log = (tmp_path / "logs" / "stage" / "bad.log").read_text()
    assert log.startswith("score(ScoreConfig(") and "Traceback" in log
    assert len(list(tmp_path.glob("out-*"))) == 2 and not (tmp_path / ".done" / "stage.json").exists()
    # a settings file for each job, to run it again by hand
    settings = yaml.safe_load((tmp_path / "logs" / "stage" / "bad.yaml").read_text())
    assert ScoreConfig(**settings) == config


def test_how_far_a_job_is(tmp_path):
    log = tmp_path / "log"
    assert share_done(log) == 0
    log.write_text("start\n  0%|  | 0/40 [00:00<?]\r 25%|##  | 10/40 [00:01<00:03]")
    assert share_done(log) == 0.25
    log.write_text("x" * 9000 + "100%|##| 40/40 [00:01<00:00]\n")
    assert share_done(log) == 0.99  # it is still running


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="counts the processes in /proc")
def test_a_kill_leaves_no_process_behind(tmp_path):
    """A job that outlives its runner would write to the same files as the restarted job."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WAITING, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    worker = int(process.stdout.readline())
    assert Path(f"/proc/{worker}").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(worker)


_WAITING = """
import os, sys, time
from pathlib import Path
from trl_hrm.demo.runner import Runner
with Runner(Path(sys.argv[1]), 1) as runner:
    print(runner._pool.submit(os.getpid).result(), flush=True)
    runner._pool.submit(time.sleep, 600).result()
"""


def _runs(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
