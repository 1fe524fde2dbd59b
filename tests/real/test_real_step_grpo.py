"""
Process rewards in RL with a real language model: SmolLM2-135M with LoRA as policy, and fine-tuned as reward model.

A training that is killed and resumed must compute the same as one that is not.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from safetensors.torch import load_file

from trl_hrm import HRMRewardConfig, HRMRewardTrainer


pytestmark = [pytest.mark.real_model, pytest.mark.slow]

PROGRAM = Path(__file__).with_name("step_grpo_program.py")
PROBLEMS = [
    ("Tom has 3 apples and buys 4 more. How many apples does Tom have now?", "7"),
    ("A box holds 6 eggs. How many eggs are in 5 boxes?", "30"),
    ("Lisa had 20 stickers and gave 8 to her brother. How many stickers does she have left?", "12"),
    ("A train has 4 cars with 12 seats each. How many seats are there?", "48"),
    ("Anna reads 15 pages a day. How many pages does she read in 4 days?", "60"),
    ("There are 24 cookies for 6 children. How many cookies does each child get?", "4"),
]
RIGHT = "Tom has 3 apples.", "He buys 4 more, so we add them.", "3 + 4 = 7."
WRONG = "Tom has 3 apples.", "He gives 4 away.", "3 - 4 = 12."
# What the training computes. Times and counts of tokens since the start differ
COMPARED = ("loss", "grad_norm", "reward", "rewards/step_reward/mean", "entropy", "completions/mean_length")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, real_folder):
    """A folder with problems and a reward model: SmolLM2 after a few steps on right and wrong solutions."""
    pytest.importorskip("trackio", reason="needs trackio; `make test-slow` installs it")
    folder = tmp_path_factory.mktemp("step-grpo")
    lines = [json.dumps({"problem": problem, "answer": answer}) + "\n" for problem, answer in PROBLEMS]
    (folder / "problems.jsonl").write_text("".join(lines), encoding="utf-8")
    solutions = [(RIGHT, [1.0, 1.0, 1.0]), (WRONG, [1.0, 0.0, 0.0])]
    trainer = HRMRewardTrainer(
        model=str(real_folder("smollm2")),
        args=HRMRewardConfig(
            str(folder / "hrm"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            prompt_style="chat",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list(
            [
                {"prompt": PROBLEMS[0][0], "completions": list(steps), "labels": labels, "parents": [-1, 0, 1]}
                for steps, labels in solutions * 4
            ]
        ),
    )
    trainer.train()
    trainer.save_model()
    return folder


@pytest.fixture(scope="module")
def run(folder, real_folder):
    """Return a function that trains in a process of its own and returns its exit code."""

    def run(name: str, *options: str) -> int:
        words = [str(real_folder("smollm2")), str(folder / "hrm"), str(folder / "problems.jsonl"), str(folder / name)]
        done = subprocess.run(
            [sys.executable, str(PROGRAM), *words, *options],
            env=os.environ | {"TRACKIO_DIR": str(folder / f"{name}-trackio"), "HF_HOME": str(folder / "home")},
            capture_output=True,
            text=True,
            timeout=900,
        )
        (folder / f"{name}{''.join(options)}.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        assert done.returncode in (0, -signal.SIGKILL), (done.stdout + done.stderr)[-4000:]
        return done.returncode

    return run


@pytest.fixture(scope="module")
def whole(folder, run):
    """A training of 5 steps."""
    assert run("whole") == 0
    return folder / "whole"


@pytest.fixture(scope="module")
def resumed(folder, run):
    """The same training, killed after its fourth step when three are saved, and resumed."""
    assert run("resumed", "--kill_at_step", "4") == -signal.SIGKILL
    assert not (folder / "resumed" / "log.json").exists()
    assert run("resumed", "--resume") == 0
    return folder / "resumed"


def logged(folder: Path) -> list[dict]:
    return [log for log in json.loads((folder / "log.json").read_text(encoding="utf-8")) if "loss" in log]


def test_five_steps(whole):
    logs = logged(whole)
    assert [log["step"] for log in logs] == [1, 2, 3, 4, 5]
    assert all(log["completions/mean_length"] > 4 and log["entropy"] < 4 for log in logs)  # it writes language
    assert all(0 < log["rewards/step_reward/mean"] < 1 for log in logs)
    assert max(log["rewards/step_reward/std"] for log in logs) > 0.01 and max(log["grad_norm"] for log in logs) > 0.01
    assert any(log["step_reward/num_steps"] > 1.5 for log in logs)  # it has steps to tell apart
    adapter = load_file(whole / "adapter_model.safetensors")
    assert max(weight.abs().max().item() for name, weight in adapter.items() if "lora_B" in name) > 1e-4


def test_resumed_after_a_kill(whole, resumed):
    """
    The checkpoint has the random numbers of the sampling, so the completions after it are the same. A resumed training that
    samples others still looks like a training.
    """
    expected, found = logged(whole), logged(resumed)
    assert [log["step"] for log in found] == [1, 2, 3, 4, 5]
    for key in COMPARED:
        assert [log[key] for log in found] == pytest.approx([log[key] for log in expected], rel=1e-4, abs=1e-6), key
    a, b = (load_file(one / "adapter_model.safetensors") for one in (whole, resumed))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6


def test_trackio(resumed):
    """One run in its local database, with the metrics of all steps and a table of completions, although it was killed."""
    script = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as storage; "
        "print(json.dumps([storage.get_runs('step-grpo'), storage.get_logs('step-grpo', 'run')], default=str))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"TRACKIO_DIR": f"{resumed}-trackio"},
        capture_output=True,
        text=True,
        check=True,
    )
    runs, logs = json.loads(done.stdout.strip().splitlines()[-1])
    assert runs == ["run"]
    steps = {log["train/global_step"]: log for log in logs if "train/loss" in log}
    assert list(steps) == [1, 2, 3, 4, 5]
    for step, log in zip(steps.values(), logged(resumed), strict=True):
        for key in ("loss", "reward", "step_reward/score/step_1", "step_reward/advantage_size/step_1"):
            assert step[f"train/{key}"] == pytest.approx(log[key], rel=1e-4)
    tables = [log["completions"]["_value"] for log in logs if "completions" in log]
    assert len(tables) >= 5 and all(len(table) == 4 for table in tables)
    assert all(row["step_reward/steps"][0] in "🟦⬜🟧⬛" for table in tables for row in table)
    assert sum("completion_steps" in log for log in logs) == len(tables)
