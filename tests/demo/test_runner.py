"""The runner of the demo: jobs run once in their own processes, resume after a kill, and never fail silently."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml

from trl_hrm import ScoreConfig, score
from trl_hrm.demo import runner
from trl_hrm.demo.jobs import _keep
from trl_hrm.demo.runner import Runner
from trl_hrm.io import write_json
from trl_hrm.processes import Workers, share_done
from trl_hrm.search.run_folder import shard_name


@pytest.fixture
def forked(monkeypatch):
    """Fork the workers, which have then imported torch already. What forked workers print goes to pytest, so the test of logs spawns them."""
    import torch  # noqa: F401

    monkeypatch.setattr(runner, "Workers", lambda number, method, remedy: Workers(number, "fork", remedy))


def jobs(folder: Path, number: int = 3, offset: int = 0) -> dict[str, partial]:
    return {f"job-{i}": partial(_keep, str(folder / f"out-{i}.json"), i + offset) for i in range(number)}


def copy_folder(model: str, output: str) -> None:
    shutil.copytree(model, output)


def make_shard(settings: dict) -> None:
    folder, (shard, num_shards) = Path(settings["output_dir"]), map(int, settings["shard"].split("/"))
    folder.mkdir(exist_ok=True)
    write_json(folder / "manifest.json", {"num_shards": num_shards})
    write_json(folder / shard_name("log", shard, num_shards, "jsonl"), {"shard": shard})


def run(runner: Runner, folder: Path, **options) -> None:
    runner.run("stage", jobs(folder, **options), lambda: f"{len(list(folder.glob('out-*')))} files")


def written(folder: Path) -> dict[str, int]:
    """Return the time of each output, which shows whether its job was repeated."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("out-*")}


def test_jobs_run_once(tmp_path, capsys):
    with Runner(tmp_path, num_workers=2) as runner:
        run(runner, tmp_path)
        before = written(tmp_path)
        run(runner, tmp_path)  # done: nothing runs again
    assert written(tmp_path) == before
    assert [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(3)] == [0, 1, 2]
    assert capsys.readouterr().out.count("3 files") == 2
    assert [stage["did"] for stage in runner.stages] == ["3 files"] * 2 and runner.stages[0] == runner.stages[1]


def test_a_missing_or_changed_output_is_made_again(forked, tmp_path, capsys):
    """The summary of a demo would recommend files that do not exist, and later stages would use files of another origin."""
    with Runner(tmp_path, num_workers=1) as runner:
        run(runner, tmp_path)
        before = written(tmp_path)
        for is_stage_done in (True, False):
            (tmp_path / "out-1.json").unlink()
            (tmp_path / "out-2.json").write_text("7\n")  # as many bytes
            if not is_stage_done:
                (tmp_path / ".done" / "stage.json").unlink()
            run(runner, tmp_path)
            assert [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(3)] == [0, 1, 2]
            assert written(tmp_path)["out-0.json"] == before["out-0.json"]
            printed = capsys.readouterr().out
            for i in (1, 2):
                assert f"stage, job-{i}: out-{i}.json changed since the job was finished. It is repeated." in printed


def test_changed_settings_and_inputs_are_used(forked, tmp_path, capsys):
    """A search of another policy must not stay when the policy is trained again."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("a")

    def copy(runner):
        runner.run("copy", {"copy": partial(copy_folder, str(tmp_path / "model"), str(tmp_path / "copy"))}, lambda: "")

    with Runner(tmp_path, num_workers=1) as runner:
        run(runner, tmp_path)
        copy(runner)
        run(runner, tmp_path, offset=5)
        (tmp_path / "model" / "trainer_state.json").write_text("times")
        copy(runner)
        printed = capsys.readouterr().out
        assert "stage, job-0: the settings changed" in printed and "copy, copy" not in printed
        (tmp_path / "model" / "weights").write_text("b")
        copy(runner)
    assert [json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(3)] == [5, 6, 7]
    assert (tmp_path / "copy" / "weights").read_text() == "b"
    assert "copy, copy: model changed" in capsys.readouterr().out


def test_shards_of_a_search_share_a_folder(forked, tmp_path):
    """The files of one shard are made again, and those of the other shard are kept."""
    settings = [{"output_dir": str(tmp_path / "run"), "shard": f"{i}/2"} for i in range(2)]
    jobs = {one["shard"][0]: partial(make_shard, one) for one in settings}
    with Runner(tmp_path, num_workers=1) as runner:
        runner.run("search", jobs, lambda: "")
        before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
        (tmp_path / "run" / "log-00000-of-00002.jsonl").unlink()
        runner.run("search", jobs, lambda: "")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    assert before.keys() == after.keys() and len(after) == 3
    assert after["log-00001-of-00002.jsonl"] == before["log-00001-of-00002.jsonl"]


def test_a_job_of_an_older_version_is_kept(forked, tmp_path):
    """Its record has no digests. It is kept if it has an output."""
    with Runner(tmp_path, num_workers=1) as runner:
        run(runner, tmp_path)
        for mark in (tmp_path / ".done" / "stage").iterdir():
            write_json(mark, {"seconds": 1.0, "since": 1.0})
        before = written(tmp_path)
        (tmp_path / "out-1.json").unlink()
        run(runner, tmp_path)
    assert before.keys() == written(tmp_path).keys() and written(tmp_path)["out-0.json"] == before["out-0.json"]


def test_what_a_kill_left_is_done(forked, tmp_path):
    """A mark means that a job is complete. Only the job without a mark runs again."""
    with Runner(tmp_path, num_workers=1) as runner:
        run(runner, tmp_path)
        (tmp_path / ".done" / "stage.json").unlink()
        (tmp_path / ".done" / "stage" / "job-1.json").unlink()
        before = written(tmp_path)
        run(runner, tmp_path)
    assert [name for name, time in sorted(written(tmp_path).items()) if time != before[name]] == ["out-1.json"]
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
