"""Pushes of a reasoning model: what a commit contains, and loading it where trl_hrm is not installed."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, snapshot_download

from tests.hub.trainer_pushes import commits, steps_on_disk, steps_pushed
from tests.reasoning.grids import grid_model, grid_trainer, sudoku_rows
from trl_hrm.reasoning import HrmGridForSolving


MODEL_FILES = {
    "README.md",
    "config.json",
    "model.safetensors",
    "puzzle_ids.json",
    *(
        f"{name}.py"
        for name in ("configuration_hrm_grid", "grid_solving", "halting", "losses", "modeling_hrm_grid", "vocab")
    ),
}
RESUME_FILES = {"optimizer.pt", "raw_weights.safetensors", "rng_state.pth", "scheduler.pt", "slots_0.safetensors"}
RESUME_FILES |= {"trainer_state.json", "trl_hrm_checkpoint.json"}


def push_trainer(folder, repo: str, **args):
    model = grid_model(num_puzzle_ids=4)
    model.puzzle_index = {f"task{i}": i + 1 for i in range(3)}
    rows = sudoku_rows(12, puzzle_ids=3)
    defaults = {
        "push_to_hub": True,
        "hub_model_id": repo,
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 3,
        "ema": 0.5,
    }
    return grid_trainer(
        folder, model, rows, rows.select(range(4)), eval_strategy="steps", eval_steps=3, **(defaults | args)
    )


def test_every_save_and_remote_code(hub, repo, tmp_path):
    """A commit without the code or the ids does not load, and one with carried states wastes space. Weights are the averages of its step."""
    trainer = push_trainer(tmp_path / "out", repo, hub_strategy="every_save", hub_always_push=True)
    trainer.dataset_name = "alice/sudoku"
    trainer.train()
    trainer.push_to_hub()
    history = commits(hub, repo)
    assert all(files.keys() == MODEL_FILES for _, files in history)
    # the final push changes nothing after the checkpoint of step 3
    disk = steps_on_disk(tmp_path)
    assert [disk[files["model.safetensors"]] for _, files in history] == [1, 2, 3]
    card = ModelCard.load(repo)
    assert card.data.datasets == "alice/sudoku" and "Known failures" in card.text
    assert {result.metric_type for result in card.data.eval_results} >= {"exact_accuracy", "cell_accuracy"}

    folder = snapshot_download(repo, cache_dir=tmp_path / "cache")
    loaded = HrmGridForSolving.from_pretrained(folder)
    assert loaded.puzzle_index == {"task0": 1, "task1": 2, "task2": 3}
    rows = sudoku_rows(4, seed=3)
    expected = loaded(torch.tensor(rows["puzzle"][:]), torch.tensor([1, 2, 3, 1])).logits
    torch.save(expected, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "class Hidden:\n"
        "    def find_spec(self, name, *args):\n"
        "        if name.split('.')[0] == 'trl_hrm': raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Hidden())\n"
        "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)\n"
        f"logits = model(torch.tensor({rows['puzzle'][:]!r}), torch.tensor([1, 2, 3, 1])).logits\n"
        f"assert torch.equal(logits, torch.load({str(tmp_path / 'expected.pt')!r}, weights_only=True))\n"
        "assert len(model.solve('1..4\\n..1.\\n.3..\\n4..1', puzzle_id='task1').answer) == 4\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.usefixtures("uses_xet")
def test_resume_from_the_hub(hub, repo, tmp_path):
    """`hub_strategy="checkpoint"` pushes everything that a resumed training needs, on another machine too."""
    trainer = push_trainer(tmp_path / "out", repo, hub_strategy="checkpoint", hub_always_push=True)
    trainer.train()
    title, files = commits(hub, repo)[1]
    assert title == "Training in progress, step 2"
    assert files.keys() == MODEL_FILES | {f"last-checkpoint/{name}" for name in MODEL_FILES | RESUME_FILES}
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path))[title] == 2
    revision = HfApi().list_repo_commits(repo)[1].commit_id
    pushed = snapshot_download(repo, revision=revision, cache_dir=tmp_path / "cache")
    resumed = push_trainer(tmp_path / "resumed", repo, push_to_hub=False, hub_model_id=None)
    resumed.train(resume_from_checkpoint=f"{pushed}/last-checkpoint")
    losses = [[log["loss"] for log in one.state.log_history if "loss" in log] for one in (resumed, trainer)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    for (name, found), expected in zip(resumed.model.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(found, expected), name
