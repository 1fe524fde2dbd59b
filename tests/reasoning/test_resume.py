"""A resumed training computes the same bytes: weights, carried states, averages and drawn rows."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trl_hrm.training.checkpoints import newest_complete

from .grids import grid_model, grid_trainer, sudoku_rows


def ids_model():
    model = grid_model(num_puzzle_ids=4)
    model.puzzle_index = {f"task{i}": i + 1 for i in range(3)}
    return model


def make(folder: Path, **args):
    """Train 8 steps, with everything that draws or carries something: easier puzzles, exploration, an average, puzzle ids."""
    defaults = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "ema": 0.8,
        "easier_share": 0.5,
        "augment": True,
        "warmup_steps": 5,
    }
    return grid_trainer(folder, ids_model(), sudoku_rows(20, puzzle_ids=3), **(defaults | args))


def state_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return averaged weights, trained weights, slots and moments of a checkpoint."""
    found = {}
    for file in ("model.safetensors", "raw_weights.safetensors", "slots_0.safetensors"):
        found |= {f"{file}: {name}": value for name, value in load_file(folder / file).items()}
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return found | {f"{i}: {name}": torch.as_tensor(v) for i, one in moments.items() for name, v in one.items()}


def assert_equal(found: Path, expected: Path, but: tuple[str, ...] = ()) -> None:
    a, b = state_of(found), state_of(expected)
    assert a.keys() == b.keys() and len(a) > 20
    for name, value in b.items():
        if not name.endswith(but):
            assert torch.equal(a[name], value), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted training."""
    folder = tmp_path_factory.mktemp("whole")
    make(folder).train()
    return folder


def test_the_state_is_not_trivial(whole):
    """Otherwise the comparisons below prove nothing: slots have different numbers of segments and refills, and states differ."""
    state = load_file(whole / "checkpoint-6" / "slots_0.safetensors")
    assert len(state["steps"].unique()) > 1 and state["z_H"].std() > 0
    assert state["refills"].sum() > 16 and len(state["refills"].unique()) > 1
    raw, average = (load_file(whole / "checkpoint-6" / f"{name}.safetensors") for name in ("raw_weights", "model"))
    assert not torch.equal(raw["lm_head.weight"], average["lm_head.weight"])


@pytest.mark.parametrize("step", [2, 6])
def test_bitwise(tmp_path, whole, step):
    """The original saves only weights. Its carried states, moments and order of the rows start anew."""
    trainer = make(tmp_path)
    trainer.train(resume_from_checkpoint=str(whole / f"checkpoint-{step}"))
    assert trainer.state.global_step == 8
    assert_equal(tmp_path / "checkpoint-8", whole / "checkpoint-8")
    logs = [
        [
            {k: v for k, v in log.items() if k not in ("segments_per_second",)}
            for log in json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        ]
        for folder in (tmp_path, whole)
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (2, 4)])
def test_another_split(tmp_path, whole, batch, accumulation):
    """The slots are found by their number. A checkpoint of one split continues the same puzzles in another one."""
    trainer = make(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-4"))
    found = load_file(tmp_path / "checkpoint-8" / "slots_0.safetensors")
    expected = load_file(whole / "checkpoint-8" / "slots_0.safetensors")
    for name in ("index", "steps", "halted", "refills"):
        assert torch.equal(found[name], expected[name]), name
    weights, others = (load_file(folder / "checkpoint-8" / "model.safetensors") for folder in (tmp_path, whole))
    for name, value in others.items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-5)


def test_another_training_is_refused(tmp_path, whole):
    """Other slots, rows or settings would continue the states of other puzzles."""
    checkpoint = str(whole / "checkpoint-4")
    for options, message in [
        ({"per_device_train_batch_size": 8}, "`?num_slots"),
        ({"easier_share": 0.25}, "`?easier_share"),
        ({"halt_exploration_prob": 0.1}, "`?halt_exploration_prob"),
        ({"ema": None}, "`?ema"),
        ({"optim": "adamw"}, "`?optim"),
        ({"seed": 1}, "`?seed"),
    ]:
        with pytest.raises(ValueError, match=f"belongs to another training: .*{message}"):
            make(tmp_path, **options).train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="8 slots, but this training has 16"):
        make(tmp_path, per_device_train_batch_size=8, accept_changes=["num_slots"]).train(
            resume_from_checkpoint=checkpoint
        )
    rows = sudoku_rows(20, seed=9, puzzle_ids=3)
    other = grid_trainer(tmp_path, ids_model(), rows, ema=0.8, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="train_dataset"):
        other.train(resume_from_checkpoint=checkpoint)


def test_accepted_changes(tmp_path, whole):
    """Without `ema`, the trained weights must continue, and not the average that the checkpoint has as its model."""
    trainer = make(tmp_path, ema=None, accept_changes=["ema"])
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    found = load_file(tmp_path / "checkpoint-8" / "model.safetensors")
    for name, value in load_file(whole / "checkpoint-8" / "raw_weights.safetensors").items():
        assert torch.equal(found[name], value), name


def test_a_missing_file_is_refused(tmp_path, whole):
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "slots_0.safetensors").unlink()
    with pytest.raises(ValueError, match="slots_0.safetensors is missing"):
        make(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_longer_training(tmp_path, whole):
    """With a constant learning rate, more steps after a finished training are those of a longer one."""
    make(tmp_path / "long", max_steps=10).train()
    shutil.copytree(whole / "checkpoint-8", tmp_path / "more" / "checkpoint-8")
    make(tmp_path / "more", max_steps=10).train(resume_from_checkpoint=True)
    assert_equal(tmp_path / "more" / "checkpoint-10", tmp_path / "long" / "checkpoint-10")


@pytest.mark.parametrize("files", [3, 9])
def test_killed_while_saving(tmp_path, whole, files):
    """SIGKILL when the folder of the third checkpoint has this number of files."""
    child = multiprocessing.get_context("fork").Process(target=lambda: make(tmp_path).train())
    child.start()
    folder = tmp_path / "checkpoint-6"
    while child.is_alive() and not (folder.exists() and len(os.listdir(folder)) >= files):
        time.sleep(0.0002)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    found, _ = newest_complete(tmp_path)
    assert found is not None and found.name in ("checkpoint-4", "checkpoint-6", "checkpoint-8")
    make(tmp_path).train(resume_from_checkpoint=True)
    assert_equal(tmp_path / "checkpoint-8", whole / "checkpoint-8")
