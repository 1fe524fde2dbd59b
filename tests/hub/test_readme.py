"""Run the README's commands that push and load as a newcomer would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from huggingface_hub import HfApi


ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = r"cat > solutions\.jsonl <<'EOF'\n.*?\nEOF\n"


def section(title: str) -> str:
    return re.search(
        rf"^## {title}\n(.*?)(?=^## )", (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )[1]


def blocks(text: str) -> list[str]:
    """Return the commands of a section, for the user of the test token."""
    return [
        block.replace("me/", "alice/") for block in re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


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
    """A newcomer would be the first to see a README command that fails."""
    shell(
        "python recipes/tiny/make_data.py --num_problems 12 --output world.jsonl\n"
        "trl-hrm build-stepwise world.jsonl --view hrm --output_dir data/prm800k-hrm\n"
        + re.search(SOLUTIONS, section("The real run"), re.DOTALL)[0]
    )
    commands, serving = blocks(section("The Hub, and serving"))
    login, *lines = commands.splitlines()
    assert login == "hf auth login" and len(lines) == 4  # the environment has the token
    assert serving.startswith("vllm serve alice/tiny-hrm --runner pooling")  # tests/hub/test_serving.py runs it
    printed = [shell(line) for line in lines]

    assert "Pushed hrm to alice/prm800k-hrm" in printed[0]
    assert HfApi().dataset_info("alice/prm800k-hrm").private and HfApi().model_info("alice/tiny-hrm").private
    files = {"README.md", "config.json", "model.safetensors", "step_format.json", "tokenizer.json"}
    assert files <= set(HfApi().list_repo_files("alice/tiny-hrm"))
    pushed = load_dataset("alice/prm800k-hrm", "hrm", cache_dir=str(tmp_path / "pushed"))
    built = load_dataset(str(tmp_path / "data/prm800k-hrm"), cache_dir=str(tmp_path / "built"))
    assert {split: pushed[split].to_list() for split in pushed} == {split: built[split].to_list() for split in built}
    for split in built:
        assert re.search(rf"{split}: Dataset\(.*?num_rows: {len(built[split])}\b", printed[2], re.DOTALL)
    assert len(re.findall(r"\b[01]\.\d{3,}", printed[3])) >= 6  # two solutions of three steps
