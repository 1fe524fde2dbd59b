"""Pushes of a trainer, as far as they need no Hub: saved files, contents of a snapshot, and errors."""

import os
import pickle
import random
from pathlib import Path

import pytest

from tests.helpers import make_trainer, random_tree
from trl_hrm import KLSelfConfig
from trl_hrm.training import hub_push
from trl_hrm.training.hub_push import NEVER_PUSHED, TRAINING_STATE, _without_tokens


@pytest.fixture
def trainer(tmp_path):
    rng = random.Random(0)
    trees = [random_tree(rng, f"p{i}") for i in range(4)]
    return make_trainer(tmp_path / "out", trees, hub_token="hf_secret", save_strategy="epoch")


def test_no_saved_file_holds_the_token(trainer, tmp_path):
    """`training_args.bin` is a pickle that users share without inspecting it."""
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files if path.name == "training_args.bin"} == {"checkpoint-1", "elsewhere"}
    assert not [path for path in files if b"hf_secret" in path.read_bytes()]


def test_arguments_keep_their_token(tmp_path):
    """The arguments belong to the user. Without the token, the next trainer could not load its model or push to the Hub."""
    given = {"token": "hf_secret", "dtype": "float32"}
    args = KLSelfConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        hub_token="hf_secret",
        model_init_kwargs=given,
        ref_model_init_kwargs=given,
    )
    without = _without_tokens(args)
    assert args.hub_token == "hf_secret" and args.model_init_kwargs == given and args.ref_model_init_kwargs == given
    assert without.hub_token is None
    assert without.model_init_kwargs == without.ref_model_init_kwargs == {"dtype": "float32"}
    assert "hf_secret" not in repr(vars(without)) and _without_tokens(without) is without


def test_a_trainer_can_be_sent_to_other_processes(trainer):
    """A hyperparameter search with Ray pickles the trainer, and a thread pool cannot be pickled."""
    ours = {name: value for name, value in vars(trainer).items() if "push" in name}
    assert "_pushes" in ours and pickle.loads(pickle.dumps(ours)) == ours


def test_a_failed_training_reports_failed_pushes(trainer, monkeypatch):
    """If training fails, an error of a background push would otherwise be lost."""

    def stop(*args, **kwargs):
        trainer._skipped_pushes.append(7)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "training_step", stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer._skipped_pushes == []


def test_every_saved_folder_has_a_model_card(trainer, tmp_path):
    """Anyone who copies a checkpoint must find how to score with it."""
    trainer.train()
    trainer.save_model(str(tmp_path / "elsewhere"))
    for folder in (tmp_path / "out" / "checkpoint-1", tmp_path / "elsewhere"):
        assert "StepScorer" in (folder / "README.md").read_text(encoding="utf-8")
        assert (folder / "step_format.json").exists()


class TestSnapshot:
    @pytest.fixture
    def checkpoint(self, tmp_path) -> Path:
        state = ["optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_1.pth"]
        state += ["trainer_state.json", "training_args.bin", "latest", "zero_to_fp32.py"]
        model = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "README.md", "merges.txt"]
        for name in [*state, *model, "optimizer_0/__0_0.distcp", "global_step4/mp_rank_00_model_states.pt"]:
            path = tmp_path / "checkpoint-4" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        for name in ("pytorch_model_fsdp_0/__0_0.distcp", "additional_chat_templates/tool.jinja"):
            path = tmp_path / "checkpoint-4" / name
            path.parent.mkdir()
            path.write_text(name)
        return tmp_path / "checkpoint-4"

    def files(self, folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def test_the_model_alone(self, checkpoint, tmp_path):
        """Optimizer states are twice the size of the model and useless for scoring."""
        hub_push._link_tree(checkpoint, tmp_path / "snapshot", *TRAINING_STATE, *NEVER_PUSHED)
        assert self.files(tmp_path / "snapshot") == {
            "README.md",
            "additional_chat_templates/tool.jinja",
            "merges.txt",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
        }

    def test_the_whole_checkpoint(self, checkpoint, tmp_path):
        hub_push._link_tree(checkpoint, tmp_path / "snapshot", *NEVER_PUSHED)
        assert self.files(tmp_path / "snapshot") == self.files(checkpoint) - {"training_args.bin"}

    @pytest.mark.parametrize("links", [True, False])
    def test_outlives_its_checkpoint(self, checkpoint, tmp_path, monkeypatch, links):
        """`save_total_limit` may delete a checkpoint that is waiting to be pushed. Not every file system has hard links."""

        def refuse(source, target):
            raise PermissionError("no hard links here")

        if not links:
            monkeypatch.setattr(os, "link", refuse)
        snapshot = tmp_path / "snapshot"
        hub_push._link_tree(checkpoint, snapshot, *TRAINING_STATE)
        same = (snapshot / "merges.txt").samefile(checkpoint / "merges.txt")
        assert same == links  # links take no disk space
        for path in checkpoint.rglob("*"):
            if path.is_file():
                path.unlink()
        assert (snapshot / "merges.txt").read_text() == "merges.txt"


def test_a_folder_without_weights_is_not_pushed(trainer, tmp_path):
    """With a sharded state dict, the pushed repository would hold a tokenizer and a card, but no weights to load."""
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="FULL_STATE_DICT.*zero3_save_16bit_model"):
        trainer._push_folder(tmp_path / "sharded", "message", None, None)
