"""Shared by the trainer push tests: compare the Hub's history with the weights on disk, and a slow Hub."""

import hashlib
import random
import threading
from pathlib import Path

import numpy as np
from transformers import TrainerCallback

from tests.helpers import HEADS, make_trainer, random_tree, tiny_model, tiny_tokenizer
from tests.hub.repository import Repository
from trl_hrm import HRMRewardTrainer, StepScorer


_rng = random.Random(0)
TREES = [random_tree(_rng, f"p{i}") for i in range(8)]
MODEL_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "step_format.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


def push_trainer(folder: Path, repo: str, trainer_class=HRMRewardTrainer, **args) -> HRMRewardTrainer:
    """Return a trainer that trains four steps, saves after each, and pushes."""
    defaults = {
        "push_to_hub": True,
        "hub_model_id": repo,
        "hub_strategy": "every_save",
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    return make_trainer(folder / "out", TREES, trainer_class=trainer_class, **(defaults | args))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def steps_on_disk(folder: Path, name: str = "model.safetensors") -> dict[str, int]:
    """Return the step of each saved weights file, by its hash."""
    found = {sha256(path): int(path.parent.name.split("-")[1]) for path in folder.glob(f"out/checkpoint-*/{name}")}
    assert len(found) > 1  # otherwise all weights are equal and the test compares nothing
    return found


def commits(hub, repo: str) -> list[tuple[str, dict[str, str]]]:
    """Return title and files (path: content hash) of each commit after the first, oldest first."""
    repository = Repository(hub.root, "model", repo)
    history = repository.history(repository.commit_id("main"))[-2::-1]
    return [
        (
            commit["title"],
            {
                entry["path"]: entry.get("lfs", entry)["oid"]
                for entry in repository.entries(commit["id"])
                if entry["type"] == "file" and entry["path"] != ".gitattributes"
            },
        )
        for commit in history
    ]


def steps_pushed(hub, repo: str, disk: dict[str, int], name: str = "model.safetensors") -> dict[str, int]:
    """Return the step whose weights each commit holds."""
    history = commits(hub, repo)
    steps = {title: disk[files[name]] for title, files in history}
    assert len(steps) == len(history)  # no commit twice
    return steps


class SlowHub(TrainerCallback):
    """Hold the first commit until training ends."""

    def __init__(self, hub):
        self.done = threading.Event()
        hub.fault("POST", "/commit/", 0, delay=lambda: self.done.wait(60))

    def on_train_end(self, *args, **kwargs):
        self.done.set()


def scores(source: str) -> np.ndarray:
    return np.concatenate(StepScorer.from_pretrained(source).score_trees(TREES))


def push_base(repo: str) -> str:
    """Push a base model to the Hub."""
    name = f"{repo}-base"
    tiny_model(HEADS["lm"]).push_to_hub(name)
    tiny_tokenizer().push_to_hub(name)
    return name
