"""Divergence, incomplete checkpoints, nothing to train on, and everything that can change before a training is resumed."""

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.helpers import dataset_of, make_trainer, random_tree, tiny_model, tiny_tokenizer, weights_of
from tests.prm_training import make_prm_trainer, rows_of
from tests.trainer.kl_training import LM, make_kl_trainer, random_rows
from trl_hrm import HRMRewardConfig, ImplicitPRMConfig, KLSelfConfig, StepGRPOConfig, StepTree, hrm_view
from trl_hrm.prm import PRMConfig
from trl_hrm.training.checkpoints import (
    FREE_ARGUMENTS,
    LENGTH_ARGUMENTS,
    RECORD_NAME,
    digest_of_dataset,
    digest_of_weights,
    model_settings,
    newest_complete,
    why_incomplete,
)
from trl_hrm.training.safe_training import DivergedError


CONFIGS = (HRMRewardConfig, ImplicitPRMConfig, PRMConfig, KLSelfConfig, StepGRPOConfig)
SAVING = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    rng = random.Random(0)
    return [hrm_view(random_tree(rng, f"{i}")) for i in range(8)]


def make_hrm(folder, trees, **args):
    return make_trainer(folder, trees, **(SAVING | args))


def make_prm(folder, trees, **args):
    chains = [StepTree(tree.prompt, tree.completions[:1], tree.labels[:1], [-1]) for tree in trees]
    return make_prm_trainer(folder, rows_of(chains), **(SAVING | args))


def make_kl(folder, trees, **args):
    return make_kl_trainer(folder, random_rows(8), **(SAVING | args))


MAKERS = {"hrm": make_hrm, "prm": make_prm, "kl": make_kl}


class Plant(TrainerCallback):
    """Call a function at the beginning of a step (1, 2, ...) and, for `before="on_step_end"`, at its end."""

    def __init__(self, step: int, function, before: str = "on_step_begin"):
        self.step = step

        def call(args, state, control, **kwargs):
            if state.global_step + (before == "on_step_begin") == self.step:
                function()

        setattr(self, before, call)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


class TestDivergence:
    @pytest.mark.parametrize("name", MAKERS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_loss_that_is_not_finite(self, tmp_path, trees, name, value):
        """`Trainer` logs it as 0, saves the weights and ends with exit code 0."""
        trainer = MAKERS[name](tmp_path, trees, max_steps=4)
        compute = trainer.compute_loss

        def compute_loss(*args, **kwargs):
            loss = compute(*args, **kwargs)
            return loss * value if trainer.state.global_step == 2 else loss

        trainer.compute_loss = compute_loss
        with pytest.raises(
            DivergedError, match=f"the loss at step 3 is NaN.*at step 2.*{tmp_path}/checkpoint-2"
        ) as error:
            trainer.train()
        assert "`learning_rate` (now 0.1)" in str(error.value) and "`max_grad_norm` (now 0.0)" in str(error.value)
        assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
        assert all(
            weight.isfinite().all() for weight in load_file(tmp_path / "checkpoint-2/model.safetensors").values()
        )
        assert [log["step"] for log in trainer.state.log_history] == [1, 2]

    @pytest.mark.parametrize("options", [{"logging_strategy": "no", "save_strategy": "no"}, {"logging_steps": 100}])
    def test_is_noticed_without_logs(self, tmp_path, trees, options):
        trainer = make_hrm(tmp_path, trees, max_steps=3, learning_rate=1e30, **({"save_steps": 100} | options))
        with pytest.raises(DivergedError, match="at step 2"):
            trainer.train()
        assert checkpoints(tmp_path) == []

    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    def test_a_gradient_that_is_not_finite(self, tmp_path, trees, max_grad_norm):
        trainer = make_hrm(tmp_path, trees, max_steps=3, max_grad_norm=max_grad_norm)
        weight = next(trainer.model.parameters())
        trainer.add_callback(Plant(2, lambda: weight.register_hook(lambda gradient: gradient * float("inf"))))
        with pytest.raises(DivergedError, match="the gradient norm at step 2"):
            trainer.train()
        assert checkpoints(tmp_path) == ["checkpoint-1"]

    def test_fp16_skips_steps_that_overflow(self, tmp_path, trees, monkeypatch):
        trainer = make_hrm(tmp_path, trees, max_steps=1)
        monkeypatch.setattr(type(trainer.accelerator), "mixed_precision", property(lambda self: "fp16"))
        trainer.model.zero_grad()
        for weight in trainer.model.parameters():
            weight.grad = torch.full_like(weight, float("inf"))
        assert not torch.isfinite(trainer._get_grad_norm(trainer.model))
        trainer._stop_if_diverged()

    @pytest.mark.parametrize("save", ["checkpoint", "final"])
    def test_weights_that_are_not_finite_are_never_saved(self, tmp_path, trees, save):
        trainer = make_hrm(tmp_path, trees, max_steps=2)

        def spoil():
            with torch.no_grad():
                next(trainer.model.parameters()).view(-1)[0] = float("inf")

        if save == "checkpoint":
            trainer.add_callback(Plant(2, spoil, before="on_step_end"))
            with pytest.raises(DivergedError, match="weights at step 2"):
                trainer.train()
            assert checkpoints(tmp_path) == ["checkpoint-1"]
        else:
            trainer.train()
            spoil()
            with pytest.raises(DivergedError, match="weights at step 2"):
                trainer.save_model()
            assert not (tmp_path / "model.safetensors").exists()

    def test_a_batch_without_labels_is_not_a_divergence(self, tmp_path, trees):
        unlabelled = [dataclasses.replace(tree, labels=[None] * len(tree.labels)) for tree in trees[:1]]
        assert unlabelled[0].labels
        trainer = make_hrm(tmp_path, trees, max_steps=2)
        labels = trainer._step_labels

        def no_labels(inputs):
            found, weights, num_merged = labels(inputs)
            return torch.full_like(found, -1), torch.zeros_like(weights), num_merged

        trainer._step_labels = no_labels
        trainer.train()
        assert [log["loss"] for log in trainer.state.log_history if "loss" in log] == [0, 0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, trees) -> Path:
    """A training of 4 steps with a checkpoint after each one."""
    folder = tmp_path_factory.mktemp("trained")
    make_hrm(folder, trees).train()
    assert checkpoints(folder) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]
    return folder


@pytest.fixture
def copied(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def files_of(checkpoint: Path) -> list[Path]:
    """Return the files of a checkpoint in the order in which they were written."""
    return sorted(checkpoint.rglob("*"), key=lambda path: path.stat().st_mtime_ns)


class TestCompleteCheckpoints:
    def test_the_state_is_written_last_and_the_record_before(self, trained):
        names = [path.name for path in files_of(trained / "checkpoint-4")]
        assert names[-2:] == [RECORD_NAME, "trainer_state.json"] and len(names) == 12
        record = json.loads((trained / "checkpoint-4" / RECORD_NAME).read_text())
        assert record["files"].keys() == set(names) - {*names[-2:], "training_args.bin", "README.md"}

    def test_every_file_boundary(self, copied, trees, caplog):
        """A process that is killed while it saves leaves the first files, and a part of the next one."""
        files = files_of(copied / "checkpoint-4")
        contents = [path.read_bytes() for path in files]
        for kept in range(len(files)):
            for part in (0, len(contents[kept]) // 2):
                for path in files:
                    path.unlink(missing_ok=True)
                for path, content in zip(files[:kept], contents, strict=False):
                    path.write_bytes(content)
                if part:
                    files[kept].write_bytes(contents[kept][:part])
                found, skipped = newest_complete(copied)
                assert found == copied / "checkpoint-3" and skipped.keys() == {copied / "checkpoint-4"}, (kept, part)
        trainer = make_hrm(copied, trees)
        trainer.train(resume_from_checkpoint=True)
        assert f"{copied}/checkpoint-4 is skipped, because it is incomplete: trainer_state.json is" in caplog.text
        assert f"resumes from {copied}/checkpoint-3" in caplog.text
        assert why_incomplete(copied / "checkpoint-4") is None  # saved again

    @pytest.mark.parametrize(
        "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json"]
    )
    def test_files_that_are_lost_or_cut_later(self, copied, trees, name):
        path = copied / "checkpoint-4" / name
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        assert why_incomplete(path.parent) == f"{name} has {size - 1:,} bytes, and was saved with {size:,}"
        path.write_bytes(bytes(size))  # as after a power loss
        assert why_incomplete(path.parent) == f"{name} is damaged"
        path.unlink()
        with pytest.raises(ValueError, match=f"checkpoint-4 is not a complete checkpoint: {name} is missing"):
            make_hrm(copied, trees).train(resume_from_checkpoint=str(path.parent))
        assert newest_complete(copied)[0] == copied / "checkpoint-3"

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("trainer_state.json", "[]"),
            ("trainer_state.json", '{"global_step": "4"}'),
            ("trainer_state.json", "[" * 100_000),
            (RECORD_NAME, "{}"),
            (RECORD_NAME, '{"settings": {}, "accepted": [], "files": {"model.safetensors": "1"}}'),
            (RECORD_NAME, '{"settings": [], "accepted": [], "files": {}}'),
            (RECORD_NAME, "\0"),
        ],
    )
    def test_damaged_files(self, copied, name, text):
        (copied / "checkpoint-4" / name).write_text(text)
        assert name in why_incomplete(copied / "checkpoint-4")
        assert newest_complete(copied)[0] == copied / "checkpoint-3"

    def test_a_checkpoint_without_a_record(self, copied, trees, caplog):
        """As saved by an earlier version. Its files are not known, but it needs a state, weights and an optimizer."""
        folder = copied / "checkpoint-4"
        (folder / RECORD_NAME).unlink()
        assert why_incomplete(folder) is None
        make_hrm(copied, trees, num_train_epochs=2, seed=7).train(resume_from_checkpoint=str(folder))
        assert f"{folder} has no {RECORD_NAME}" in caplog.text
        for name, problem in (("optimizer.pt", "optimizer is missing"), ("model.safetensors", "weights are missing")):
            (folder / name).unlink()
            assert problem in why_incomplete(folder)

    def test_no_complete_checkpoint_starts_anew(self, copied, trees, caplog):
        for step in (1, 2, 3, 4):
            (copied / f"checkpoint-{step}" / "trainer_state.json").unlink()
        trainer = make_hrm(copied, trees)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4 and len(trainer.state.log_history) == 5
        assert "has no complete checkpoint to resume from. Training starts from the beginning" in caplog.text
        assert caplog.text.count("is skipped, because it is incomplete: trainer_state.json is missing") == 4

    def test_a_checkpoint_is_replaced_whole(self, copied, trees):
        """Overwritten in place and killed, it would have the sizes of the old files and look complete."""
        (copied / "checkpoint-1" / "old_shard.safetensors").write_bytes(b"old")
        trainer = make_hrm(copied, trees, max_steps=1)
        save, seen = trainer.save_model, []

        def save_model(*args, **kwargs):
            seen.append(why_incomplete(copied / "checkpoint-1"))
            save(*args, **kwargs)

        trainer.save_model = save_model
        trainer.train()
        assert seen == ["trainer_state.json is missing"]
        assert not (copied / "checkpoint-1" / "old_shard.safetensors").exists()

    def test_save_only_model(self, tmp_path, trees):
        make_hrm(tmp_path, trees, max_steps=1, save_only_model=True).train()
        with pytest.raises(ValueError, match="`save_only_model`"):
            make_hrm(tmp_path, trees).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))

    @pytest.mark.parametrize("path", ["run", "no/such/folder", "checkpoint-9"])
    def test_a_path_that_is_not_a_checkpoint(self, copied, trees, path):
        with pytest.raises(ValueError, match=f"{path} is not a complete checkpoint: .*(missing|not exist)"):
            make_hrm(copied, trees).train(resume_from_checkpoint=str(copied.parent / path))

    @pytest.mark.slow
    @pytest.mark.parametrize("files", range(1, 13))
    def test_killed_while_saving(self, tmp_path, trees, trained, files):
        """SIGKILL when the folder has this number of files. The training is resumed to the weights of an uninterrupted one."""
        child = multiprocessing.get_context("fork").Process(target=lambda: make_hrm(tmp_path, trees).train())
        child.start()
        folder = tmp_path / "checkpoint-3"
        while child.is_alive() and not (folder.exists() and len(os.listdir(folder)) >= files):
            time.sleep(0.0002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        found, _ = newest_complete(tmp_path)
        assert found is not None and found.name in ("checkpoint-2", "checkpoint-3", "checkpoint-4")
        trainer = make_hrm(tmp_path, trees)
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 4
        expected = load_file(trained / "checkpoint-4" / "model.safetensors")
        for name, weight in weights_of(trainer.model).items():
            assert torch.equal(weight, expected[name]), name


@pytest.mark.parametrize(
    ("value", "step"),
    [
        ("true", 4),
        ("True", 4),
        (True, 4),
        ("false", None),
        (False, None),
        (None, None),
        ("", None),
        ("checkpoint-2", 2),
    ],
)
def test_values_of_resume_from_checkpoint(copied, trees, value, step):
    """A command line gives strings, YAML and Python give booleans."""
    value = str(copied / value) if value == "checkpoint-2" else value
    checkpoint = make_hrm(copied, trees)._resolve(value)[0]
    assert checkpoint == (None if step is None else str(copied / f"checkpoint-{step}"))


@pytest.mark.parametrize("options", [{"max_steps": 4}, {"num_train_epochs": 1}])
def test_a_finished_training_has_nothing_left_to_train(copied, trees, caplog, options):
    """With `max_steps`, `Trainer` would train one step more each time."""
    trainer = make_hrm(copied, trees + trees[:0], **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert "at step 4, and training ends at step 4, so there was nothing left to train" in caplog.text


def test_max_steps_within_an_epoch(tmp_path, trees):
    make_hrm(tmp_path, trees, max_steps=2).train()
    trainer = make_hrm(tmp_path, trees, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


def test_a_metric_that_does_not_exist(tmp_path, trees):
    """The Trainer raises a `KeyError`, which the command line would report as a bug."""
    trainer = make_hrm(tmp_path, trees, metric_for_best_model="nonsense")
    with pytest.raises(ValueError, match="'eval_nonsense', which is not found .* are: ..eval_loss'"):
        trainer._determine_best_metric({"eval_loss": 1.0}, None)


@pytest.mark.parametrize("config", CONFIGS)
def test_bf16_without_a_gpu(config, tmp_path, monkeypatch):
    """The message of transformers does not name the options."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    with pytest.raises(ValueError, match="set `use_cpu=True` and `bf16=False`"):
        config(str(tmp_path), bf16=True)


class TestNothingToTrainOn:
    @pytest.mark.parametrize("name", MAKERS)
    def test_a_batch_larger_than_the_data(self, tmp_path, trees, name):
        trainer = MAKERS[name](tmp_path, trees, per_device_train_batch_size=9, dataloader_drop_last=True)
        with pytest.raises(ValueError, match="8 rows after preparation, fewer than one batch of 9 rows.*drop_last"):
            trainer.train()

    def test_packing_leaves_fewer_rows(self, tmp_path, trees):
        trainer = make_hrm(tmp_path, trees, packing=True, max_length=2048, dataloader_drop_last=True)
        with pytest.raises(ValueError, match="has 1 rows after preparation, fewer than one batch of 2 rows"):
            trainer.train()

    @pytest.mark.parametrize(
        ("option", "value"),
        [("max_steps", 0), ("num_train_epochs", 0), ("num_train_epochs", -1), ("num_train_epochs", np.inf)],
    )
    @pytest.mark.parametrize("name", MAKERS)
    def test_no_step(self, tmp_path, trees, name, option, value):
        with pytest.raises(ValueError, match=f"`{option}` is {value}. It must be"):
            MAKERS[name](tmp_path, trees, **{option: value}).train()

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize(
        "option", ["per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"]
    )
    def test_options(self, tmp_path, config, option):
        with pytest.raises(ValueError, match=f"`{option}` is 0. It must be at least 1"):
            config(str(tmp_path), bf16=False, use_cpu=True, **{option: 0})

    @pytest.mark.parametrize("config", CONFIGS)
    @pytest.mark.parametrize("option", ["learning_rate", "weight_decay", "max_grad_norm"])
    @pytest.mark.parametrize("value", [-1.0, np.nan, "1e-5"])  # without a dot, YAML reads a text
    def test_numbers(self, tmp_path, config, option, value):
        with pytest.raises(ValueError, match=f"`{option}` is {value!r}. It must be a number that is at least 0"):
            config(str(tmp_path), bf16=False, use_cpu=True, **{option: value})

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MAKERS)
    def test_torch_compile(self, tmp_path, trees, name):
        """It may only change results by rounding."""
        logs = []
        for options in ({}, {"torch_compile": True}):
            trainer = MAKERS[name](tmp_path, trees, max_steps=2, save_strategy="no", **options)
            trainer.train()
            logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert len(logs[0]) == 2 and logs[1] == pytest.approx(logs[0], abs=1e-4)

    def test_more_accumulation_than_batches_is_one_step_per_epoch(self, tmp_path, trees):
        trainer = make_hrm(tmp_path, trees, gradient_accumulation_steps=100, num_train_epochs=2)
        trainer.train()
        assert trainer.state.global_step == 2


# Everything that can change before a training is resumed: the change, and the names under which it is refused (none: accepted)
CHANGES = [
    ({"learning_rate": 0.2}, "learning_rate"),
    ({"seed": 7}, "seed"),
    ({"data_seed": 7}, "data_seed"),
    ({"optim": "adamw_torch"}, "optim"),
    ({"weight_decay": 0.1}, "weight_decay"),
    ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
    ({"warmup_steps": 2}, "warmup_steps"),
    ({"per_device_train_batch_size": 4}, "per_device_train_batch_size"),
    ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last"),
    ({"bf16": True}, "bf16"),
    ({"step_separator": ";;"}, "step_separator"),
    ({"merge_separator": " "}, "merge_separator"),
    ({"head": "regression"}, "head", "model"),
    ({"regression_loss": "bce"}, "regression_loss"),
    ({"chat_template_date": "2025-01-01"}, "chat_template_date"),
    ({"max_length": 100}, "max_length"),
    ({"packing": True}, "packing"),
    ({"shared_prefix": False}, "shared_prefix"),
    ({"label_weighting": "occurrence"}, "label_weighting"),
    ({"error_weight": 2.0}, "error_weight"),
    ({"disable_dropout": False}, "disable_dropout"),
    ({"sanitize_control_tokens": False}, "sanitize_control_tokens"),
    ({"peft_config": LoraConfig(target_modules=["q_proj"])}, "model", "peft_config"),
    ({"trees": "relabelled"}, "train_dataset"),
    ({"trees": "reordered"}, "train_dataset"),
    ({"trees": "fewer"}, "train_dataset"),
    ({"model": "wider"}, "model"),
    ({"tokenizer": "extended"}, "tokenizer"),
    ({"tokenizer": "template"}, "tokenizer"),
    # does not change what is learned
    ({"output_dir": "other"},),
    ({"logging_steps": 3},),
    ({"eval_strategy": "steps", "eval_steps": 2, "evaluation": True},),
    ({"save_steps": 3, "save_total_limit": 1},),
    ({"dataloader_num_workers": 1},),
    ({"dataset_num_proc": 1},),
    ({"gradient_checkpointing": True},),
    ({"per_device_eval_batch_size": 1},),
    ({"report_to": "none", "run_name": "again"},),
    ({"model": "reinitialized"},),  # the checkpoint replaces all weights
    # extends the training
    ({"num_train_epochs": 3},),
    ({"max_steps": 20},),
]
# arguments that are compared, or ignored, like `learning_rate` and `logging_steps` are: only in slow tests
ALIKE = {
    *(
        "data_seed",
        "optim",
        "weight_decay",
        "max_grad_norm",
        "lr_scheduler_type",
        "warmup_steps",
        "dataloader_drop_last",
    ),
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "merge_separator",
        "regression_loss",
        "error_weight",
    ),
    *("chat_template_date", "shared_prefix", "label_weighting", "disable_dropout", "sanitize_control_tokens"),
    *("save_steps", "dataloader_num_workers", "dataset_num_proc", "per_device_eval_batch_size", "report_to"),
}


def some_slow(rows: list[tuple], alike: set[str]) -> list:
    """Return the rows as parameters. Rows that change an argument in `alike` are slow."""
    changed = [{name for part in row if isinstance(part, dict) for name in part} for row in rows]
    return [
        pytest.param(*row, marks=pytest.mark.slow if names & alike else [])
        for row, names in zip(rows, changed, strict=True)
    ]


def changed_trainer(folder, trees, change):
    """Return a trainer with a change, or with a named change of the data, the model or the tokenizer."""
    change = dict(change)
    data, model, tokenizer = change.pop("trees", None), change.pop("model", None), change.pop("tokenizer", None)
    if data == "relabelled":
        first = dataclasses.replace(trees[0], labels=[1 - label for label in trees[0].labels])
        trees = [first, *trees[1:]]
    elif data is not None:
        trees = trees[::-1] if data == "reordered" else trees[1:]
    if model is not None:
        change["model"] = tiny_model(intermediate_size=128) if model == "wider" else tiny_model(seed=1)
    if tokenizer is not None:
        change["tokenizer"] = tiny_tokenizer()
        if tokenizer == "template":
            change["tokenizer"].chat_template = "{{ messages }}"
        else:
            change["tokenizer"].add_tokens(["zeta"])
            change["model"] = tiny_model()
    if change.pop("evaluation", False):
        change["evaluation"] = trees
    if change.get("output_dir") == "other":
        del change["output_dir"]
        folder = folder.parent / "other"
    return make_hrm(folder, trees, **change)


@pytest.mark.parametrize(
    ("change", "names"),
    some_slow([(row[0], row[1:]) for row in CHANGES], ALIKE),
    ids=lambda value: str(value)[:50],
)
def test_changes_of_a_resumed_training(trained, trees, change, names, caplog):
    """A training resumed with another dataset, base model, separator, learning rate or seed used to say nothing."""
    checkpoint = trained / "checkpoint-2"
    trainer = changed_trainer(trained, trees, change)
    if not names:
        assert trainer._resolve(str(checkpoint))[0] == str(checkpoint)
        return
    with pytest.raises(ValueError, match=f"{checkpoint} belongs to another training: ") as error:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 0
    lines = str(error.value).partition("training: ")[2].split("; ")
    assert {re.match(r"\w+", line)[0] for line in lines} == {*names}
    assert f"`accept_changes={sorted(names)}`" in str(error.value)
    trainer.args.accept_changes = list(names)
    caplog.clear()
    assert trainer._resolve(str(checkpoint))[2] == tuple(sorted(names))
    assert all(f"Accepted: {name}" in caplog.text for name in names)


# The options that the other trainers add
OTHER_CHANGES = [
    ("prm", {"step_separator": ";"}, "step_separator"),
    ("prm", {"max_length": 100}, "max_length"),
    ("prm", {"max_completion_length": 50}, "max_completion_length"),
    ("prm", {"train_on_last_step_only": True}, "train_on_last_step_only"),
    ("prm", {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ("kl", {"kl_coef": 0.1}, "kl_coef"),
    ("kl", {"kl_scaling": "none"}, "kl_scaling"),
    ("kl", {"kl_direction": "reverse"}, "kl_direction"),
    ("kl", {"kl_reduction": "token_mean"}, "kl_reduction"),
    ("kl", {"max_length": 100}, "max_length"),
    ("kl", {"packing": True}, "packing"),
    ("kl", {"completion_only_loss": False}, "completion_only_loss"),
    ("kl", {"train_sampling_strategy": "random"}, "train_sampling_strategy"),
    (
        "kl",
        {"precompute_ref_hidden": True},
        None,
    ),
]


@pytest.fixture(scope="module")
def others(tmp_path_factory, trees) -> dict[str, Path]:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("prm", "kl")}
    for name, folder in folders.items():
        MAKERS[name](folder, trees, max_steps=1).train()
    return folders


OTHERS_ALIKE = {  # compared like `kl_coef` and `step_separator`: only in slow tests
    *("max_completion_length", "train_on_last_step_only", "label_smoothing_factor", "kl_scaling", "kl_direction"),
    *("kl_reduction", "completion_only_loss", "train_sampling_strategy"),
}


@pytest.mark.parametrize(("trainer", "change", "name"), some_slow(OTHER_CHANGES, OTHERS_ALIKE))
def test_changes_of_other_trainers(others, trees, trainer, change, name):
    changed = MAKERS[trainer](others[trainer], trees, max_steps=1, **change)
    if name is None:
        assert changed._resolve(True)[0] is not None
        return
    with pytest.raises(ValueError, match=f"training: {name} was"):
        changed.train(resume_from_checkpoint=True)


def test_both_values_are_shown(trained, trees):
    with pytest.raises(ValueError, match="learning_rate was 0.1 and is 0.2; seed was 42 and is 7"):
        make_hrm(trained, trees, learning_rate=0.2, seed=7).train(resume_from_checkpoint=str(trained / "checkpoint-2"))


@pytest.mark.parametrize("config", CONFIGS)
def test_every_argument_is_classified(config, tmp_path):
    """A name in the lists that no config has would be a typo, and its argument would be compared."""
    names = {field.name for cls in CONFIGS for field in dataclasses.fields(cls)}
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # than the lowest version of transformers
    assert FREE_ARGUMENTS <= names | newer and set(LENGTH_ARGUMENTS) <= names - FREE_ARGUMENTS
    compared = {field.name for field in dataclasses.fields(config)} - FREE_ARGUMENTS
    length = "max_completion_length" if config is StepGRPOConfig else "max_length"
    assert {"learning_rate", "seed", "data_seed", length, "lr_scheduler_type", "bf16", "optim"} <= compared


def test_other_processes_and_sharding(trained, trees):
    settings = make_hrm(trained, trees)._training_settings()
    assert (settings["num_processes"], settings["sharding"], settings["trainer"]) == (1, None, "HRM Reward")


@pytest.mark.parametrize("name", MAKERS)
def test_the_same_training_is_resumed(tmp_path, trees, name):
    MAKERS[name](tmp_path, trees, max_steps=2).train()
    trainer = MAKERS[name](tmp_path, trees, max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3 and trainer.state.log_history[0]["step"] == 1
    trainer = MAKERS[name](tmp_path, trees, max_steps=3, seed=1)
    with pytest.raises(ValueError, match="seed was 42 and is 1"):
        trainer.train(resume_from_checkpoint=True)


class TestFiles:
    """Base models and reference models on disk are identified by content."""

    def test_base_model(self, tmp_path, trees):
        def save(seed: int) -> None:
            tiny_model(seed=seed).save_pretrained(tmp_path / "base")
            tiny_tokenizer().save_pretrained(tmp_path / "base")

        save(0)
        make_hrm(tmp_path / "run", trees, model=str(tmp_path / "base"), max_steps=1).train()
        (tmp_path / "base").rename(tmp_path / "moved")
        trainer = make_hrm(tmp_path / "run", trees, model=str(tmp_path / "moved"), max_steps=2)
        trainer.train(resume_from_checkpoint=True)  # the same content at another path
        save(1)
        with pytest.raises(ValueError, match="training: model.weights was"):
            make_hrm(tmp_path / "run", trees, model=str(tmp_path / "base")).train(resume_from_checkpoint=True)

    def test_base_model_of_an_adapter_in_memory(self, tmp_path, trees):
        def make(seed: int):
            model = tiny_model(seed=seed)
            return make_hrm(
                tmp_path, trees, model=model, peft_config=LoraConfig(target_modules=["q_proj"]), max_steps=2
            )

        make(0).train()
        make(0).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="training: model.weights was"):
            make(1).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize("kind", ["path", "memory"])
    def test_reference_model(self, tmp_path, trees, kind):
        def make(seed: int, **args):
            reference = tiny_model(LM, seed=seed)
            if kind == "path":
                reference.save_pretrained(tmp_path / "reference")
                tiny_tokenizer().save_pretrained(tmp_path / "reference")
                reference = str(tmp_path / "reference")
            return make_kl(tmp_path / "run", trees, ref_model=reference, max_steps=1, **args)

        make(1).train()
        make(1).train(resume_from_checkpoint=True)
        with pytest.raises(ValueError, match="training: reference.weights was"):
            make(2).train(resume_from_checkpoint=True)
        make(2, accept_changes=["reference"])._resolve(True)

    @pytest.mark.parametrize("is_named", [True, False])
    def test_revision_of_a_reference_on_the_hub(self, tmp_path, trees, monkeypatch, is_named):
        """The commit of `main` was recorded, whatever the revision, so another reference was not noticed."""
        repo = tmp_path / "hub" / "models--me--ref"
        for seed, revision in enumerate(("main", "v2"), 1):
            snapshot = repo / "snapshots" / (40 * str(seed))
            tiny_model(LM, seed=seed).save_pretrained(snapshot)
            tiny_tokenizer().save_pretrained(snapshot)
            (repo / "refs").mkdir(exist_ok=True)
            (repo / "refs" / revision).write_text(snapshot.name)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        named = {"ref_model": "me/ref"} if is_named else {"model": "me/ref"}

        def make(revision, **args):
            given = {"ref_model_init_kwargs": {"revision": revision}} if revision else {}
            return make_kl(tmp_path / "run", trees, max_steps=1, **named, **given, **args)

        make(None).train()
        with pytest.raises(ValueError, match="training: reference"):
            make("v2").train(resume_from_checkpoint=True)
        make("v2", accept_changes=["reference"])._resolve(True)
        if is_named:
            (repo / "refs" / "main").unlink()  # only v2 was downloaded
            assert make("v2")._content["reference"] == {"commit": "2" * 40}

    def test_the_policy_is_the_reference(self, tmp_path, trees):
        make_kl(tmp_path, trees, max_steps=1).train()
        with pytest.raises(ValueError, match="training: reference.weights was|reference was"):
            make_kl(tmp_path, trees, model=tiny_model(LM, seed=5)).train(resume_from_checkpoint=True)

    def test_evaluation_set_of_the_best_model(self, tmp_path, trees):
        args = {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
        make_hrm(tmp_path, trees, evaluation=trees[:4], **args).train()
        make_hrm(tmp_path, trees, evaluation=trees[:4], **args)._resolve(True)
        with pytest.raises(ValueError, match="training: eval_dataset was"):
            make_hrm(tmp_path, trees, evaluation=trees[:3], **args)._resolve(True)


def test_one_training_per_folder(tmp_path, trees):
    """Two trainings would replace each other's checkpoints."""
    first, second = make_hrm(tmp_path, trees), make_hrm(tmp_path, trees)

    def start_second():
        with pytest.raises(BlockingIOError, match=f"{tmp_path}: another process.*another `output_dir`"):
            second.train()

    first.add_callback(Plant(2, start_second))
    first.train()
    assert first.state.global_step == 4 and second.state.global_step == 0
    assert not list(tmp_path.glob("*.lock"))


def test_output_dir_is_tried_before_training(tmp_path, trees):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for name in ("file", "link", "file/below"):
        with pytest.raises(
            OSError, match=f"{name}.* another `output_dir`|{name} is a file. Choose a folder as `output_dir`"
        ):
            make_hrm(tmp_path / name, trees)


def test_an_infinite_setting_is_recorded(tmp_path, trees):
    """`max_grad_norm=inf` logs the norm without clipping. JSON has no infinity."""
    make_hrm(tmp_path, trees, max_steps=1, max_grad_norm=float("inf")).train()
    make_hrm(tmp_path, trees, max_steps=2, max_grad_norm=float("inf")).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match='max_grad_norm was "inf" and is 1.0'):
        make_hrm(tmp_path, trees, max_steps=3, max_grad_norm=1.0).train(resume_from_checkpoint=True)


class TestAcceptChanges:
    def test_the_checkpoint_remembers(self, copied, trees):
        """A job that is started again with the same options must not fail because the change was already accepted."""
        args = {"learning_rate": 0.2, "accept_changes": ["learning_rate"], "num_train_epochs": 2}
        make_hrm(copied, trees, **args).train(resume_from_checkpoint=True)
        assert checkpoints(copied)[-1] == "checkpoint-8"
        record = json.loads((copied / "checkpoint-8" / RECORD_NAME).read_text())
        assert record["settings"]["learning_rate"] == 0.2 and record["accepted"] == ["learning_rate"]
        again = make_hrm(copied, trees, **args)
        assert again._resolve(True)[::2] == (str(copied / "checkpoint-8"), ("learning_rate",))

    @pytest.mark.parametrize(
        ("names", "resume", "message"),
        [
            (["learning_rat"], True, "contains 'learning_rat', which is not a setting"),
            (["logging_steps"], True, "contains 'logging_steps', which is not a setting"),
            (["seed"], True, "contains 'seed', which has not changed"),
            (["seed"], None, r"is \['seed'\], but no checkpoint is resumed"),
        ],
    )
    def test_names_that_accept_nothing(self, trained, trees, names, resume, message):
        with pytest.raises(ValueError, match=message):
            make_hrm(trained, trees, accept_changes=names).train(resume_from_checkpoint=resume)

    def test_only_the_named_changes(self, trained, trees):
        trainer = make_hrm(trained, trees, learning_rate=0.2, seed=7, accept_changes="seed")
        with pytest.raises(ValueError, match=r"training: learning_rate was.*\['learning_rate', 'seed'\]") as error:
            trainer.train(resume_from_checkpoint=True)
        assert "seed was" not in str(error.value)

    def test_a_checkpoint_without_a_record_knows_its_step_format(self, copied, trees):
        (copied / "checkpoint-4" / RECORD_NAME).unlink()
        with pytest.raises(ValueError, match='step_separator was .* and is ";;"'):
            make_hrm(copied, trees, step_separator=";;").train(resume_from_checkpoint=True)
        trainer = make_hrm(copied, trees, step_separator=";;", accept_changes=["step_separator"])
        assert trainer._resolve(True)[0] == str(copied / "checkpoint-4")


@pytest.mark.parametrize(
    ("schedule", "warmup", "is_said"),
    [
        ("linear", 0, True),
        ("constant", 0, False),
        ("constant_with_warmup", 1, False),
        ("constant_with_warmup", 0.5, True),
    ],
)
def test_a_longer_training_is_logged(tmp_path, trees, caplog, schedule, warmup, is_said):
    """A warm-up of half of the steps lasts longer in a longer training, which lowers the learning rate again."""
    options = {"lr_scheduler_type": schedule, "warmup_steps": warmup}
    make_hrm(tmp_path, trees, **options).train()
    trainer = make_hrm(tmp_path, trees, num_train_epochs=2, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 8
    assert "num_train_epochs was 1 and is 2." in caplog.text
    assert (f"The `{schedule}` schedule now spans the new length." in caplog.text) == is_said


def test_digest_of_weights():
    """A scalar weight was an error. The digests of other models are in the records of checkpoints, and may not change."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Embedding(0, 2))
    expected = hashlib.blake2b(json.dumps(model_settings(model), sort_keys=True).encode(), digest_size=16)
    for name, weight in sorted(model.named_parameters()):
        expected.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        expected.update(weight.detach().numpy().tobytes())
    assert digest_of_weights(model) == expected.hexdigest()
    digests = set()
    for value in (1.0, 2.0):
        model.scale = torch.nn.Parameter(torch.tensor(value))
        digests.add(digest_of_weights(model))
    assert len(digests) == 2


class TestDigestOfDataset:
    ROWS = [
        {
            "prompt": f"p{i}",
            "completions": ["a", "é" * i],
            "labels": [True, None][: 1 + i % 2],
            "more": {"x": i / 3, "y": None},
        }
        for i in range(2500)
    ]

    def test_does_not_depend_on_storage(self, tmp_path):
        dataset = Dataset.from_list(self.ROWS)
        expected = digest_of_dataset(dataset)
        dataset.to_parquet(str(tmp_path / "rows.parquet"))
        parts = concatenate_datasets([dataset.select(range(700)), dataset.select(range(700, 2500))])
        order = list(range(2500))
        random.Random(0).shuffle(order)
        shuffled = dataset.select(order).select([order.index(i) for i in range(2500)])
        large = Dataset(
            pa.Table.from_pydict({"prompt": pa.array([row["prompt"] for row in self.ROWS], pa.large_string())})
        )
        columns = dataset.select_columns(["more", "labels", "prompt", "completions"])
        for other in (Dataset.from_parquet(str(tmp_path / "rows.parquet")), parts, shuffled, columns):
            assert digest_of_dataset(other) == expected
        assert digest_of_dataset(large) == digest_of_dataset(dataset.select_columns(["prompt"]))

    @pytest.mark.parametrize(
        "change",
        [
            lambda row: row | {"prompt": row["prompt"] + " "},
            lambda row: row | {"labels": [False, *row["labels"][1:]]},
            lambda row: row | {"labels": [None, *row["labels"][1:]]},
            lambda row: row | {"completions": ["", "a" + row["completions"][1]]},
            lambda row: row | {"completions": [*row["completions"], ""]},
            lambda row: row | {"more": {"x": row["more"]["x"] + 1e-9, "y": None}},
            lambda row: row | {"more": {"x": None, "y": None}},
        ],
    )
    def test_depends_on_every_value(self, change):
        rows = [*self.ROWS[:1500], change(self.ROWS[1500]), *self.ROWS[1501:]]
        assert digest_of_dataset(Dataset.from_list(rows)) != digest_of_dataset(Dataset.from_list(self.ROWS))

    def test_depends_on_order_and_length(self, trees):
        dataset = dataset_of(trees)
        digests = {
            digest_of_dataset(part) for part in (dataset, dataset.select(range(7)), dataset.select(range(7, -1, -1)))
        }
        assert len(digests) == 3
