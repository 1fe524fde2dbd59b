"""RewardHackingCallback in trainings of StepGRPOTrainer, and that evaluations list the problems in the same order."""

import json
import signal
import subprocess
import sys

import pandas as pd
import pytest
import torch

from trl_hrm import RewardHackingCallback

from ..helpers import ROOT
from .hacked_training import make_trainer, many_even


def evaluations(folder):
    return json.loads((folder / "reward_hacking.json").read_text())["evaluations"]


def test_stop_on_reward_hacking(tmp_path, caplog):
    trainer = make_trainer(tmp_path, stop_on_reward_hacking=True)
    trainer.train()
    *before, last = evaluations(tmp_path)
    assert trainer.state.global_step == last["step"] < 8
    assert last["answer"] == "yes" and all(one["answer"] != "yes" for one in before)
    assert caplog.text.count("Reward hacking at step") == 1
    assert (tmp_path / "reward_hacking.png").stat().st_size > 5000
    # TRL's own means agree, and the hacked evaluation is in the logs
    means = [entry for entry in trainer.state.log_history if "eval_rewards/few_even/mean" in entry]
    for record, entry in zip((*before, last), means, strict=True):
        assert record["step"] == entry["step"]
        assert record["num_problems"] == 45
    hacked = [entry["eval_reward_hacking"] for entry in trainer.state.log_history if "eval_reward_hacking" in entry]
    assert hacked == [0.0] * (len(before) - 1) + [1.0]


@pytest.mark.slow
def test_a_reward_that_follows_the_accuracy_is_not_hacked(tmp_path, caplog):
    """The same training, with an accuracy that rises with the process reward."""
    trainer = make_trainer(tmp_path, right=many_even)
    trainer.add_callback(RewardHackingCallback(trainer, stop=True))
    trainer.train()
    records = evaluations(tmp_path)
    assert trainer.state.global_step == 8 and len(records) == 5
    assert records[-1]["rise_low"] > 0 and records[-1]["accuracy"] > records[0]["accuracy"] + 0.2
    assert all(one["answer"] != "yes" for one in records) and "Reward hacking at" not in caplog.text


def number(prompts, number, **columns):
    """A reward that shows which problem a row is."""
    return number


def test_order_of_the_problems(tmp_path):
    """The callback compares rows of the same place, so all evaluations must have the same order, whatever happens in between."""
    trainer = make_trainer(tmp_path, right=number, eval_strategy="no", max_steps=2)
    found = []
    for _ in range(2):
        trainer.evaluate()
        found.append(trainer.eval_rewards[:, 0])
        trainer.train()
    rows = found[0].view(45, 2)
    assert torch.equal(found[0], found[1]) and torch.equal(rows[:, 0], rows[:, 1])
    assert sorted(rows[:, 0].tolist()) == pytest.approx([i / 100 for i in range(32, 77)])
    resumed = make_trainer(tmp_path, right=number, eval_strategy="no", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    resumed.evaluate()
    assert torch.equal(resumed.eval_rewards[:, 0], found[0])


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_killed_and_resumed(tmp_path, step):
    """The evaluations before the kill are part of the checkpoint, and everything ends as without the kill."""
    whole = make_trainer(tmp_path / "whole")
    whole.add_callback(RewardHackingCallback(whole))
    whole.train()
    program = [sys.executable, "-m", "tests.trainer.hacked_training", str(tmp_path / "killed"), str(step)]
    killed = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (tmp_path / "killed" / "reward_hacking.json").unlink()
    resumed = make_trainer(tmp_path / "killed")
    resumed.add_callback(RewardHackingCallback(resumed))
    resumed.train(resume_from_checkpoint=True)
    assert evaluations(tmp_path / "killed") == evaluations(tmp_path / "whole")
    assert evaluations(tmp_path / "whole")[-1]["answer"] == "yes"


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    """Otherwise one of them would wait for the other forever. The last batch of 45 problems is filled up to 48."""
    program = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.trainer.hacked_training",
    ]
    ended = subprocess.run(
        [sys.executable, *program, str(tmp_path), "stop"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second and len(first["rewards"]) == 96
    record = evaluations(tmp_path)[-1]
    assert record["step"] == first["step"] < 16 and record["answer"] == "yes"
    # by a plain loop over the problems
    rows = first["rewards"][:90]
    assert record["accuracy"] == pytest.approx(sum(outcome for outcome, _ in rows) / 90)
    assert record["process_reward"] == pytest.approx(sum(process for _, process in rows) / 90)
    assert ended.stderr.count("Reward hacking at step") == 1


def test_table_and_page_of_completions(tmp_path):
    trainer = make_trainer(tmp_path, log_completions=True, eval_strategy="no", max_steps=2)
    trainer.train()
    table = pd.read_parquet(tmp_path / "completions" / "completions_00002.parquet")
    page = (tmp_path / "completions" / "steps_00002.html").read_text(encoding="utf-8")
    assert len(table) == 16 == page.count("<article")
    # one line per step, and before them a line with all squares if there are several
    num_steps = [max(1, cell.count("\n")) * (cell[0] in "🟦⬜🟧") for cell in table["step_reward/steps"]]
    assert sum(num_steps) == page.count('class="scored"') > 0
