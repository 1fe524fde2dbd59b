"""Trainer pushes that fail: a visible error, nothing lost, and no token written anywhere."""

import logging
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from transformers import TrainerCallback

from tests.hub.trainer_pushes import (
    SlowHub,
    commits,
    push_base,
    push_trainer,
    sha256,
    steps_on_disk,
    steps_pushed,
)
from trl_hrm.hub import PushError


def errors(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]


def test_failed_background_push_is_reported_at_the_end(hub, repo, tmp_path, caplog):
    """The Trainer's own push fails silently. Users find out months later that step 2 is not on the Hub."""
    hub.fault("POST", "/commit/", 403, skip=1)
    trainer = push_trainer(tmp_path, repo, hub_always_push=True)
    trainer.train()
    at_once, at_the_end = errors(caplog)
    assert "Not pushed: " in at_once and "step-2" in at_once
    assert f"Step 2 was not pushed to the Hub ({repo})" in at_the_end and "403" in at_the_end
    assert f"Its weights are in {tmp_path}/out/checkpoint-2." in at_the_end and "`push_to_hub()`" in at_the_end
    disk = steps_on_disk(tmp_path)
    assert list(steps_pushed(hub, repo, disk).values()) == [1, 3, 4]
    caplog.clear()
    trainer.push_to_hub(tags=["final"])
    assert steps_pushed(hub, repo, disk)["End of training"] == 4 and not errors(caplog)
    assert not list((tmp_path / "out").glob("_push*"))


def test_a_deleted_checkpoint_that_was_not_pushed(hub, repo, tmp_path, caplog):
    """The message must not send the user to a deleted folder."""
    hub.fault("POST", "/commit/", 403)
    trainer = push_trainer(tmp_path, repo, hub_always_push=True, save_total_limit=1)
    trainer.train()
    assert "Its checkpoint was deleted because of `save_total_limit`." in errors(caplog)[-1]


def test_checkpoint_is_kept_until_it_is_pushed(hub, repo, tmp_path, caplog):
    """With `save_total_limit`, deleting a checkpoint before it arrives on the Hub would lose the weights."""
    hub.fault("POST", "/commit/", 403, skip=1)
    trainer = push_trainer(tmp_path, repo, hub_strategy="all_checkpoints", save_total_limit=1)
    trainer.add_callback(SlowHub(hub))
    trainer.train()
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    trainer.push_to_hub()
    [command] = re.findall("`(hf upload .*?)`", errors(caplog)[-1])
    left = tmp_path / "out" / "_push-step-2" / "checkpoint-2"
    assert command == f"hf upload {repo} {left} checkpoint-2"
    before = commits(hub, repo)[-1][1]
    HfApi().upload_folder(repo_id=repo, folder_path=left, path_in_repo="checkpoint-2")  # as the command does
    files = commits(hub, repo)[-1][1]
    assert files["checkpoint-2/model.safetensors"] == sha256(left / "model.safetensors") != files["model.safetensors"]
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3, 4)} <= files.keys()
    assert {path: files[path] for path in before} == before  # the final model is unchanged too


@pytest.mark.usefixtures("uses_xet")
def test_the_final_push_fails(hub, repo, tmp_path):
    """A script that continues and exits with 0 would look as if it had pushed."""
    trainer = push_trainer(tmp_path, repo, hub_strategy="end")
    trainer.train()
    hub.fault("POST", "/commit/", 403)
    with pytest.raises(PushError, match=f"{repo}.*403"):
        trainer.push_to_hub()
    assert steps_on_disk(tmp_path)[sha256(tmp_path / "out" / "model.safetensors")] == 4
    trainer.push_to_hub()
    assert [title for title, _ in commits(hub, repo)] == ["End of training"]


@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 504, "after": True}, {"drop": True}])
def test_transient_fault(hub, repo, tmp_path, caplog, fault):
    """After a lost answer the commit exists, so the retry must not make a second one."""
    hub.fault("POST", "/commit/", **fault, skip=1)
    trainer = push_trainer(tmp_path, repo, hub_always_push=True)
    trainer.train()
    disk = steps_on_disk(tmp_path)
    assert [disk[files["model.safetensors"]] for _, files in commits(hub, repo)] == [1, 2, 3, 4]
    assert any("Retrying in" in record.getMessage() for record in caplog.records) and not errors(caplog)


def test_a_private_model_never_goes_to_a_public_repository(hub, repo, tmp_path):
    """The Hub ignores `private` for an existing repository, so the weights would silently be public."""
    HfApi().create_repo(repo, private=False)
    start = len(hub.log)
    with pytest.raises(ValueError, match=f"{repo} .*is public"):
        push_trainer(tmp_path, repo, hub_private_repo=True)
    assert hub.count("POST", "preupload|commit", start) == 0
    trainer = push_trainer(tmp_path, f"{repo}-new", hub_private_repo=True)
    trainer.train()
    trainer.push_to_hub()
    assert HfApi().model_info(f"{repo}-new").private


@pytest.mark.parametrize("created", ["by the trainer", "before"])
def test_private_push(hub, repo, tmp_path, created):
    """`private=True` may come after a public repository was created, or repeat an earlier call as in a notebook."""
    if created == "before":
        HfApi().create_repo(repo, private=False)
    trainer = push_trainer(tmp_path, repo, save_strategy="no", push_to_hub=created == "by the trainer")
    start = len(hub.log)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{repo} .*is public"):
            trainer.push_to_hub(private=True)
    assert hub.count("POST", "preupload|commit", start) == 0


@pytest.mark.parametrize(
    "token, words",
    [("hf_ro", "read-only"), ("hf_bob", "belongs to bob"), ("hf_nobody", "not valid")],
    ids=["read-only", "other-user", "unknown"],
)
def test_token_without_write_access_fails_before_training(hub, repo, tmp_path, token, words):
    """At the end of training, days later, the error would come too late."""
    with pytest.raises(PushError, match=words) as caught:
        push_trainer(tmp_path, repo, hub_token=token)
    assert token not in str(caught.value)


PLANTED = "hf_PlantedTokenOfCarol0123456789abcd"


def files_with(text: str, *folders: Path) -> list[Path]:
    return [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and text.encode() in path.read_bytes()
    ]


class Logged(TrainerCallback):
    """Log the arguments, as TensorBoard, W&B and others do."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.arguments = args.to_json_string() + str(args.to_dict()) + str(args) + repr(vars(args))


@pytest.mark.usefixtures("uses_xet")
def test_token_is_not_written_anywhere(hub, repo, tmp_path, caplog, capfd):
    """The Trainer pickles its arguments into `training_args.bin`, and pushes it. Callbacks log them."""
    caplog.set_level(logging.DEBUG)
    base = push_base(repo)
    hub.tokens[PLANTED] = ("carol", "write")  # no other token may write there, so this one is used
    repo = repo.replace("alice/", "carol/")
    (tmp_path / "canary").mkdir()
    torch.save({"hub_token": PLANTED}, tmp_path / "canary" / "args.bin")
    assert len(files_with(PLANTED, tmp_path)) == 1  # the search finds what torch pickles
    start = len(hub.log)
    trainer = push_trainer(
        tmp_path,
        repo,
        model=base,
        model_init_kwargs={"token": PLANTED, "revision": "main"},
        hub_token=PLANTED,
        hub_strategy="all_checkpoints",
    )
    logged = Logged()
    trainer.add_callback(logged)
    hub.fault("POST", "/commit/", 403, skip=1)
    hub.fault("POST", "/commit/", 503, skip=1)
    trainer.train()
    hub.fault("POST", "/commit/", 401)
    with pytest.raises(PushError) as caught:
        trainer.push_to_hub(tags=["final"])
    trainer.push_to_hub(tags=["final"])
    assert len(commits(hub, repo)) == 4 and PLANTED not in logged.arguments
    assert {request["user"] for request in hub.log[start:] if request["route"] == "commit"} <= {"carol", None}
    for name in ("out/training_args.bin", "out/checkpoint-4/training_args.bin"):
        saved = torch.load(tmp_path / name, weights_only=False)
        assert saved.hub_token is None and saved.hub_model_id == repo
        assert saved.model_init_kwargs == {"revision": "main"}
    assert files_with(PLANTED, tmp_path / "out", hub.root, Path(os.environ["HF_HOME"])) == []
    assert not any("training_args.bin" in path for _, files in commits(hub, repo) for path in files)
    error = caught.value
    while error is not None:
        assert PLANTED not in str(error) + repr(error)
        error = error.__cause__ or error.__context__
    output = capfd.readouterr()
    assert PLANTED not in caplog.text + output.out + output.err
    assert any("Step 2 was not pushed to the Hub" in message for message in errors(caplog))
