"""Run the commands of the Hub page that push and load, as a user would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import HfApi


ROOT = Path(__file__).resolve().parents[2]


def commands(title: str) -> list[str]:
    """Return the commands of a section's first shell block, for the user of the test token."""
    page = (ROOT / "docs" / "hub.md").read_text("utf-8")
    block = re.search(rf"^## {title}\n.*?^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[1]
    return block.replace("me/", "alice/").splitlines()


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Run commands in a folder that looks like a clone, with this environment's programs and an empty cache."""
    for name in ("recipes", "accelerate_configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(tmp_path / "hf_home"),
        "OMP_NUM_THREADS": "1",
    }

    def run(commands: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_push_and_load_lines(hub, shell, tmp_path):
    """A user would be the first to see a documented command that fails."""
    shell(
        "python recipes/tiny/make_data.py --num_problems 12 --output world.jsonl\n"
        "trl-hrm build-stepwise world.jsonl --view hrm --output_dir data/prm800k-hrm\n"
        "head -n 2 world.jsonl > solutions.jsonl"
    )
    login, dry_run, push = commands("Datasets")
    assert login == "hf auth login"  # the environment has the token
    assert "train-00000-of-00001.parquet" in shell(dry_run)
    assert "Pushed hrm to alice/prm800k" in shell(push)
    assert HfApi().dataset_info("alice/prm800k").private
    pushed = load_dataset("alice/prm800k", "hrm", cache_dir=str(tmp_path / "pushed"))
    built = load_dataset(str(tmp_path / "data/prm800k-hrm"), cache_dir=str(tmp_path / "built"))
    assert {split: pushed[split].to_list() for split in pushed} == {split: built[split].to_list() for split in built}

    train, score = commands("Models")
    settings = yaml.safe_load((ROOT / "recipes" / "tiny" / "hrm_reward.yaml").read_text("utf-8"))
    settings |= {"dataset_name": "alice/prm800k", "dataset_config": "hrm", "hub_private_repo": True}
    (tmp_path / "hrm_reward.yaml").write_text(yaml.safe_dump(settings), "utf-8")
    shell(train)
    assert HfApi().model_info("alice/qwen-hrm").private
    files = {"README.md", "config.json", "model.safetensors", "step_format.json", "tokenizer.json"}
    assert files <= set(HfApi().list_repo_files("alice/qwen-hrm"))
    assert len(re.findall(r"^  [01]\.\d{3}  ", shell(score), re.MULTILINE)) > 6  # a line per step
