"""The recipes push what they train, from one or two processes, and the commands load it from the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi, hf_hub_download

from tests.helpers import HEADS, dataset_of, tiny_model, tiny_tokenizer
from tests.hub.trainer_pushes import MODEL_FILES, TREES, commits, sha256
from tests.trainer.kl_training import random_rows


ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "output_dir": "out",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "gradient_checkpointing": False,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 1e-3,
    "push_to_hub": True,
    "hub_strategy": "all_checkpoints",
}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def launch(folder: Path, recipe: str, launcher: list[str] | None = None, **settings) -> subprocess.CompletedProcess:
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | settings), encoding="utf-8")
    return run(folder, *(launcher or [sys.executable]), str(ROOT / "recipes" / recipe), "--config", "settings.yaml")


@pytest.fixture
def base(tmp_path) -> str:
    tiny_model(HEADS["lm"]).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def check_reward_model(hub, repo: str, folder: Path) -> None:
    disk = {sha256(folder / f"out/checkpoint-{step}/model.safetensors"): step for step in (1, 2)}
    assert len(disk) == 2
    history = commits(hub, repo)
    held = {title: disk[files["model.safetensors"]] for title, files in history}
    assert held == {"Training in progress, step 1": 1, "Training in progress, step 2": 2, "End of training": 2}
    results = {"eval_results.json", "all_results.json"}
    assert {path for path in history[-1][1] if "/" not in path} == MODEL_FILES | results
    for commit in HfApi().list_repo_commits(repo)[-2::-1]:
        with open(hf_hub_download(repo, "README.md", revision=commit.commit_id), encoding="utf-8") as file:
            card = file.read()
        facts = yaml.safe_load(card.split("---\n")[1])
        assert facts["datasets"] == f"{repo}-steps" and "base_model" not in facts, commit.title
    [result] = facts["model-index"][0]["results"]
    with open(hf_hub_download(repo, "eval_results.json"), encoding="utf-8") as file:
        metrics = json.load(file)
    found = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert found["accuracy"] == metrics["eval_accuracy"] and found["loss"] == metrics["eval_loss"]
    assert result["dataset"] == {"name": f"{repo}-steps", "type": f"{repo}-steps"}
    assert str(folder) not in card and "None" not in card


def test_a_reward_model_from_training_to_scoring(hub, repo, tmp_path, base):
    """Every piece may work alone while the repository or the card does not fit."""
    DatasetDict(train=dataset_of(TREES[:6]), test=dataset_of(TREES[6:])).push_to_hub(f"{repo}-steps")
    arguments = {"model_name_or_path": base, "dataset_name": f"{repo}-steps", "hub_model_id": repo}
    done = launch(tmp_path, "hrm_reward.py", **arguments)
    assert done.returncode == 0, done.stderr
    assert f"Pushed to {repo}." in done.stdout
    check_reward_model(hub, repo, tmp_path)
    solutions = [{"prompt": tree.prompt, "completions": tree.completions} for tree in TREES[:3]]
    (tmp_path / "solutions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in solutions), encoding="utf-8")
    scores = []
    for model in (repo, "out"):
        program = "import sys; from trl_hrm.cli import main; sys.exit(main())"
        done = run(
            tmp_path, sys.executable, "-c", program, "score", "solutions.jsonl", "--reward_model", model,
            "--output", f"{len(scores)}.jsonl",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines = (tmp_path / f"{len(scores)}.jsonl").read_text(encoding="utf-8").splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    assert len(scores[0]) == 3
    for found, expected in zip(*scores, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_policy(hub, repo, tmp_path, base):
    """The end of this recipe is shared with the other one, but it saves other files."""
    rows = DatasetDict(train=Dataset.from_list(random_rows(8)), test=Dataset.from_list(random_rows(2, seed=1)))
    rows.push_to_hub(f"{repo}-sft")
    done = launch(
        tmp_path, "kl_self.py", model_name_or_path=base, dataset_name=f"{repo}-sft", hub_model_id=repo, kl_coef=0.1
    )
    assert done.returncode == 0, done.stderr
    title, files = commits(hub, repo)[-1]
    assert title == "End of training"
    assert files["model.safetensors"] == sha256(tmp_path / "out" / "checkpoint-2" / "model.safetensors")


@pytest.mark.slow
def test_a_final_push_that_fails_fails_the_script(hub, repo, tmp_path, base):
    """A job that exits with 0 counts as finished, and its disk may be wiped."""
    DatasetDict(train=dataset_of(TREES[:6]), test=dataset_of(TREES[6:])).push_to_hub(f"{repo}-steps")
    hub.fault("POST", f"/models/{repo}/commit/", 403, times=9)
    arguments = {"model_name_or_path": base, "dataset_name": f"{repo}-steps", "hub_model_id": repo}
    done = launch(tmp_path, "hrm_reward.py", **arguments)
    assert done.returncode != 0 and "PushError" in done.stderr
    assert "Step 1 was not pushed to the Hub" in done.stderr and "Step 2 was not pushed to the Hub" in done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "eval_results.json").exists()


@pytest.mark.slow
def test_two_processes_push_once(hub, repo, tmp_path, base):
    """Pushes by each process would race, and an early snapshot would lack the other process's files."""
    DatasetDict(train=dataset_of(TREES[:6]), test=dataset_of(TREES[6:])).push_to_hub(f"{repo}-steps")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    done = launch(
        tmp_path,
        "hrm_reward.py",
        [*launcher, str(ROOT / "accelerate_configs" / "cpu_2proc.yaml")],
        model_name_or_path=base,
        dataset_name=f"{repo}-steps",
        hub_model_id=repo,
        per_device_train_batch_size=1,
        ddp_find_unused_parameters=False,
    )
    assert done.returncode == 0, done.stderr
    check_reward_model(hub, repo, tmp_path)
    files = commits(hub, repo)[-1][1]
    assert {f"checkpoint-{step}/rng_state_{rank}.pth" for step in (1, 2) for rank in (0, 1)} <= files.keys()
