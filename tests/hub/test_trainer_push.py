"""Check the commits of trainer pushes: the right step's weights, complete, with everything that scoring needs."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard, hf_hub_download, snapshot_download
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, TrainerCallback

from tests.helpers import HEADS, tiny_model, tiny_tokenizer, weights_of
from tests.hub.trainer_pushes import (
    MODEL_FILES,
    TREES,
    SlowHub,
    commits,
    push_base,
    push_trainer,
    scores,
    sha256,
    steps_on_disk,
    steps_pushed,
)
from tests.prm_training import make_prm_trainer, random_chain, rows_of
from tests.trainer.kl_training import make_kl_trainer, random_rows
from trl_hrm import StepScorer


STATE_FILES = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "trl_hrm_checkpoint.json"}
ALL_STEPS = {f"Training in progress, step {step}": step for step in (1, 2, 3, 4)}


def test_end_pushes_once(hub, repo, tmp_path, uses_xet):
    """With `hub_strategy="end"`, nothing may be pushed before the end."""
    start = len(hub.log)
    # unique weights, because clients do not send a file again that the Hub already has
    trainer = push_trainer(tmp_path, repo, hub_strategy="end", learning_rate=0.0123)
    trainer.train()
    assert commits(hub, repo) == []
    trainer.push_to_hub(dataset_name="alice/steps")
    [(title, files)] = commits(hub, repo)
    assert title == "End of training" and files.keys() == MODEL_FILES
    assert steps_on_disk(tmp_path)[files["model.safetensors"]] == 4
    assert (hub.count("POST", "/cas/v1/shards", start) > 0) == uses_xet
    assert (hub.count("PUT", "/_put/", start) > 0) == (not uses_xet)


def test_every_save(hub, repo, tmp_path):
    """The Trainer's own `hub_always_push` reads the output folder late, so step 1 gets the weights of step 4."""
    trainer = push_trainer(tmp_path, repo, hub_always_push=True)
    slow = SlowHub(hub)
    trainer.add_callback(slow)
    trainer.train()
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path)) == ALL_STEPS
    assert all(files.keys() == MODEL_FILES for _, files in commits(hub, repo))
    assert not list((tmp_path / "out").glob("_push*"))


def test_every_save_on_a_slow_hub_names_what_it_skips(hub, repo, tmp_path, caplog):
    """A user who looks for step 2 on the Hub must learn why it is missing."""
    trainer = push_trainer(tmp_path, repo)
    trainer.add_callback(SlowHub(hub))
    trainer.train()
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path)) == {"Training in progress, step 1": 1}
    [message] = [r.getMessage() for r in caplog.records if "Steps not pushed" in r.getMessage()]
    assert "2, 3, 4" in message and "hub_always_push" in message
    trainer.push_to_hub()
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path))["End of training"] == 4
    assert len([r for r in caplog.records if "Steps not pushed" in r.getMessage()]) == 1  # one warning


def test_checkpoint(hub, repo, tmp_path):
    """Weights of one step with the optimizer of another would silently resume another model."""
    trainer = push_trainer(tmp_path, repo, hub_strategy="checkpoint", hub_always_push=True)
    trainer.add_callback(SlowHub(hub))
    trainer.train()
    disk = steps_on_disk(tmp_path)
    optimizers = steps_on_disk(tmp_path, "trainer_state.json")
    history = commits(hub, repo)
    assert len(history) == 4
    for step, (title, files) in enumerate(history, start=1):
        assert title == f"Training in progress, step {step}"
        assert files.keys() == MODEL_FILES | {f"last-checkpoint/{name}" for name in MODEL_FILES | STATE_FILES}
        assert disk[files["model.safetensors"]] == disk[files["last-checkpoint/model.safetensors"]] == step
        at = HfApi().list_repo_commits(repo)[4 - step].commit_id
        state = hf_hub_download(repo, "last-checkpoint/trainer_state.json", revision=at, cache_dir=tmp_path / "c")
        assert optimizers[sha256(Path(state))] == step
    # resuming from it gives the same weights
    pushed = snapshot_download(repo, revision=HfApi().list_repo_commits(repo)[2].commit_id, cache_dir=tmp_path / "d")
    resumed = push_trainer(tmp_path / "resumed", repo, push_to_hub=False, hub_model_id=None)
    resumed.train(resume_from_checkpoint=f"{pushed}/last-checkpoint")
    for (name, found), expected in zip(
        weights_of(resumed.model).items(), weights_of(trainer.model).values(), strict=True
    ):
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.usefixtures("uses_xet")
def test_all_checkpoints(hub, repo, tmp_path, caplog):
    """On a slow Hub, the Trainer skips steps, and `save_total_limit` deletes checkpoints before they are sent."""
    everything = push_trainer(tmp_path / "reference", repo, push_to_hub=False, hub_model_id=None)
    everything.train()
    disk = steps_on_disk(tmp_path / "reference")
    trainer = push_trainer(tmp_path, repo, hub_strategy="all_checkpoints", save_total_limit=1)
    trainer.add_callback(SlowHub(hub))
    trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    history = commits(hub, repo)
    assert {title: disk[files["model.safetensors"]] for title, files in history} == ALL_STEPS
    _, files = history[-1]
    for step in (1, 2, 3, 4):
        assert disk[files[f"checkpoint-{step}/model.safetensors"]] == step
        assert {f"checkpoint-{step}/{name}" for name in MODEL_FILES | STATE_FILES} <= files.keys()
    assert not any("Steps not pushed" in record.getMessage() for record in caplog.records)
    assert not list((tmp_path / "out").glob("_push*"))


def test_a_resumed_run_pushes_its_own_steps(hub, repo, tmp_path, caplog):
    """The snapshot of a killed run must not stop the next run or be pushed under another step's name."""

    class Kill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    first = push_trainer(tmp_path, repo, hub_always_push=True)
    first.add_callback(Kill())
    first.train()
    for step in (2, 3):  # the state after a kill during a push
        left = tmp_path / "out" / f"_push-step-{step}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"old")
    second = push_trainer(tmp_path, repo, hub_always_push=True)
    [message] = [r.getMessage() for r in caplog.records if "An earlier run did not push" in r.getMessage()]
    assert "_push-step-2" in message and f"hf upload {repo}" in message
    second.train(resume_from_checkpoint=True)
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path)) == ALL_STEPS
    second.push_to_hub()
    assert not any(path.startswith("_") for path in commits(hub, repo)[-1][1])


def test_epochs_are_named(hub, repo, tmp_path):
    """For training that ends within an epoch, two commits would get the same name."""
    trainer = push_trainer(tmp_path, repo, save_strategy="epoch", max_steps=6, hub_always_push=True)
    trainer.train()
    held = steps_pushed(hub, repo, steps_on_disk(tmp_path))
    assert held == {"Training in progress, epoch 1": 4, "Training in progress, epoch 1.5": 6}


def test_the_best_are_pushed(hub, repo, tmp_path):
    """`save_strategy="best"` saves at its own steps."""
    trainer = push_trainer(
        tmp_path,
        repo,
        evaluation=TREES,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="loss",
        hub_always_push=True,
    )
    trainer.train()
    losses = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    best = [step for step in (1, 2, 3, 4) if losses[step - 1] == min(losses[:step])]
    assert 1 < len(best) < 4
    expected = {f"Training in progress, step {step}": step for step in best}
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path)) == expected


def test_push_to_another_branch(hub, repo, tmp_path):
    """A missing branch, as in a new repository, would fail only at the first push, days after the start."""
    trainer = push_trainer(tmp_path, repo, hub_revision="runs/1", hub_always_push=True)
    trainer.train()
    trainer.push_to_hub()
    again = push_trainer(tmp_path / "again", repo, hub_revision="runs/1", hub_strategy="end", learning_rate=0.02)
    again.train()
    again.push_to_hub(commit_message="again")
    assert commits(hub, repo) == []
    titles = [commit.title for commit in HfApi().list_repo_commits(repo, revision="runs/1")]
    # unchanged files are not pushed again
    assert titles[:-1] == ["again", *(f"Training in progress, step {step}" for step in (4, 3, 2, 1))]


class Break(TrainerCallback):
    """Raise an error in the middle of training, while pushes wait for the Hub."""

    def __init__(self, hub):
        self.done = threading.Event()
        hub.fault("POST", "/commit/", 0, delay=lambda: self.done.wait(60))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 3:
            threading.Timer(1, self.done.set).start()
            raise RuntimeError("out of memory")


def test_error_during_training(hub, repo, tmp_path, caplog):
    """
    Pushes that wait until the interpreter exits can no longer upload. Pushes that continue during the next
    training would read files while they are rewritten.
    """
    trainer = push_trainer(tmp_path, repo, hub_always_push=True)
    trainer.add_callback(Break(hub))
    hub.fault("POST", "/commit/", 403, skip=1)  # after the one that is waiting
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    disk = steps_on_disk(tmp_path)
    assert list(steps_pushed(hub, repo, disk).values()) == [1, 2]
    assert any("Step 3 was not pushed to the Hub" in record.getMessage() for record in caplog.records)
    assert not list((tmp_path / "out").glob("_push*"))


def test_a_push_without_a_save(hub, repo, tmp_path):
    """Push without a repository, a checkpoint or any training."""
    trainer = push_trainer(tmp_path, repo, push_to_hub=False, save_strategy="no")
    assert trainer.push_to_hub().repo_url.repo_id == repo
    assert commits(hub, repo)[0][1].keys() == MODEL_FILES
    live = np.concatenate(StepScorer(trainer.model, trainer.processing_class, trainer.step_format).score_trees(TREES))
    np.testing.assert_allclose(scores(repo), live, rtol=0, atol=1e-6)


def test_nonblocking_push_to_a_branch(hub, repo, tmp_path):
    """This `push_to_hub` replaces the Trainer's, so it must support `revision` and `blocking=False` too."""
    trainer = push_trainer(tmp_path, repo, hub_strategy="end")
    trainer.train()
    HfApi().create_branch(repo, branch="v1")
    commit = trainer.push_to_hub(commit_message="one", revision="v1", blocking=False, tags="mine").result(60)
    assert commits(hub, repo) == []  # main is untouched
    assert commit.commit_message == "one"
    card = hf_hub_download(repo, "README.md", revision="v1")
    with open(card, encoding="utf-8") as file:
        assert "mine" in yaml.safe_load(file.read().split("---\n")[1])["tags"]


@pytest.mark.usefixtures("uses_xet")
@pytest.mark.parametrize("head", HEADS)
def test_scores_are_the_same_from_the_hub(hub, repo, tmp_path, head):
    """A head that is not pushed would be initialised at random on loading, with only a warning."""
    args = {"head": HEADS[head].head, "regression_loss": HEADS[head].regression_loss, "learning_rate": 1e-3}
    trainer = push_trainer(tmp_path, repo, hub_strategy="end", **args)
    trainer.train()
    trainer.push_to_hub()
    live = np.concatenate(StepScorer(trainer.model, trainer.processing_class, trainer.step_format).score_trees(TREES))
    assert live.std() > 1e-3
    np.testing.assert_allclose(scores(repo), live, rtol=0, atol=1e-6)  # sums depend on the memory layout
    for name, weight in weights_of(StepScorer.from_pretrained(repo).model).items():
        assert torch.equal(weight, weights_of(trainer.model)[name]), name


@pytest.mark.parametrize("head", ["classification", "regression", "lm"])
def test_an_adapter_scores_the_same_from_the_hub(hub, repo, tmp_path, head):
    """The adapter must name its base model, and be pushed with its classifier and our card instead of PEFT's."""
    base = push_base(repo)
    trainer = push_trainer(
        tmp_path,
        repo,
        model=base,
        head=head,
        hub_always_push=True,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    held = steps_pushed(hub, repo, steps_on_disk(tmp_path, "adapter_model.safetensors"), "adapter_model.safetensors")
    assert held == ALL_STEPS
    trainer.push_to_hub()
    files = commits(hub, repo)[-1][1]
    assert files.keys() == MODEL_FILES - {"config.json", "model.safetensors"} | {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    with open(hf_hub_download(repo, "README.md"), encoding="utf-8") as file:
        card = file.read()
    facts = yaml.safe_load(card.split("---\n")[1])
    assert facts["base_model"] == base and facts["library_name"] == "peft"
    assert "AutoPeftModel" in card and "More Information Needed" not in card
    live = np.concatenate(StepScorer(trainer.model, trainer.processing_class, trainer.step_format).score_trees(TREES))
    np.testing.assert_allclose(scores(repo), live, rtol=0, atol=1e-6)


def test_a_full_model_replaces_an_adapter(hub, repo, tmp_path):
    """With the files of both, the adapter would be loaded instead of the model."""
    adapter = push_trainer(
        tmp_path / "adapter", repo, model=push_base(repo), peft_config=LoraConfig(r=4, target_modules=["q_proj"])
    )
    adapter.push_to_hub()
    api = HfApi()
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="adapter_notes.txt", repo_id=repo)
    api.upload_file(path_or_fileobj=b"{}", path_in_repo="other/adapter_config.json", repo_id=repo)
    trainer = push_trainer(tmp_path / "full", repo, model=tiny_model(seed=3))
    trainer.push_to_hub()
    assert commits(hub, repo)[-1][1].keys() == MODEL_FILES | {"adapter_notes.txt", "other/adapter_config.json"}
    np.testing.assert_allclose(scores(repo), scores(str(tmp_path / "full" / "out")), rtol=0, atol=1e-6)
    adapter.push_to_hub()
    assert commits(hub, repo)[-1][1].keys() > MODEL_FILES | {"adapter_config.json", "adapter_model.safetensors"}
    np.testing.assert_allclose(scores(repo), scores(str(tmp_path / "adapter" / "out")), rtol=0, atol=1e-6)


def test_an_adapter_in_a_subfolder_deletes_nothing(hub, repo, tmp_path):
    """PEFT saves adapters with a name there. The base model may be in the same repository."""
    trainer = push_trainer(tmp_path, repo, model=tiny_model(seed=3))
    trainer.push_to_hub()
    before = commits(hub, repo)[-1][1].keys()
    named = tmp_path / "named"
    (named / "reward").mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (named / "reward" / name).write_text("{}")
    trainer._push_folder(named, "An adapter", None, None)
    found = {"reward/adapter_config.json", "reward/adapter_model.safetensors"}
    assert commits(hub, repo)[-1][1].keys() == before | found


def test_an_adapter_remembers_the_revision_of_its_base(hub, repo, tmp_path):
    """An adapter on other base weights loads silently and scores at random."""
    base = push_base(repo)
    HfApi().create_branch(base, branch="v1")
    tiny_model(HEADS["lm"], seed=1).push_to_hub(base)  # main moves on
    trainer = push_trainer(
        tmp_path,
        repo,
        model=base,
        hub_strategy="end",
        model_init_kwargs={"revision": "v1"},
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    trainer.push_to_hub()
    live = np.concatenate(StepScorer(trainer.model, trainer.processing_class, trainer.step_format).score_trees(TREES))
    np.testing.assert_allclose(scores(repo), live, rtol=0, atol=1e-6)


def test_an_adapter_of_a_local_base_warns(hub, repo, tmp_path, caplog):
    """Other users cannot load it, and their error would name a folder that they never had."""
    base = tmp_path / "base"
    tiny_model(HEADS["lm"]).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    push_trainer(tmp_path, repo, model=str(base), peft_config=LoraConfig(r=4, target_modules=["q_proj"]))
    assert any("not on the Hub, so the adapter cannot be loaded" in r.getMessage() for r in caplog.records)


def test_the_prm_trainer(hub, repo, tmp_path):
    """The drop-in trainer overrides `_save`, and users of TRL push with `dataset_name`."""
    rows = rows_of([random_chain(random.Random(seed), f"p{seed} 1+2?") for seed in range(8)])
    trainer = make_prm_trainer(
        tmp_path / "out",
        rows,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_always_push=True,
    )
    trainer.train()
    assert steps_pushed(hub, repo, steps_on_disk(tmp_path)) == ALL_STEPS
    trainer.push_to_hub(dataset_name="alice/rows")
    assert commits(hub, repo)[-1][1].keys() == MODEL_FILES
    card = ModelCard.load(repo)
    assert card.data.datasets == "alice/rows" and "prm" in card.data.tags and "2211.14275" in card.text
    live = np.concatenate(StepScorer(trainer.model, trainer.processing_class, trainer.step_format).score_trees(TREES))
    assert live.std() > 1e-3 and trainer.step_format.step_separator == "\n"
    np.testing.assert_allclose(scores(repo), live, rtol=0, atol=1e-6)
    loaded = AutoModelForTokenClassification.from_pretrained(repo)
    for name, weight in weights_of(loaded).items():
        assert torch.equal(weight, weights_of(trainer.model)[name]), name


def test_the_prm_trainer_with_rows_of_unknown_format(hub, repo, tmp_path):
    """A guessed `step_format.json` would silently give wrong scores."""
    rows = Dataset.from_list([{"input_ids": [5, 6, 7, 8], "labels": [-100, 1, -100, 0]}] * 4)
    trainer = make_prm_trainer(tmp_path / "out", rows, push_to_hub=True, hub_model_id=repo)
    trainer.train()
    trainer.push_to_hub()
    assert commits(hub, repo)[-1][1].keys() == MODEL_FILES - {"step_format.json"}
    with pytest.raises(FileNotFoundError, match="step_format.json"):
        StepScorer.from_pretrained(repo)


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_the_policy(hub, repo, tmp_path, strategy):
    """KLSelfTrainer saves through SFTTrainer, which overrides `_save_checkpoint`."""
    trainer = make_kl_trainer(
        tmp_path / "out",
        random_rows(8),
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy=strategy,
        hub_always_push=True,
    )
    trainer.add_callback(SlowHub(hub)) if strategy == "every_save" else None
    trainer.train()
    disk = steps_on_disk(tmp_path)
    assert steps_pushed(hub, repo, disk) == (ALL_STEPS if strategy == "every_save" else {})
    trainer.push_to_hub(commit_message="last", tags=["mine"])
    title, files = commits(hub, repo)[-1]
    assert title == "last" and disk[files["model.safetensors"]] == 4
    assert files.keys() == MODEL_FILES - {"step_format.json"} | {"generation_config.json"}
    loaded, live = weights_of(AutoModelForCausalLM.from_pretrained(repo)), weights_of(trainer.model)
    assert loaded.keys() == live.keys() and all(torch.equal(loaded[name], live[name]) for name in live)
    reference = trainer.reference.model
    assert not all(torch.equal(weight, live[name]) for name, weight in weights_of(reference).items())


@pytest.mark.parametrize("precomputed", [False, True])
def test_an_adapter_of_a_policy(hub, repo, tmp_path, precomputed):
    """The output folder also holds hidden states of the reference, which are larger than the adapter."""
    base = push_base(repo)
    trainer = make_kl_trainer(
        tmp_path / "out",
        random_rows(8),
        base,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_strategy="checkpoint",
        hub_always_push=True,
        precompute_ref_hidden=precomputed,
        trainer_args={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    )
    trainer.train()
    disk = steps_on_disk(tmp_path, "adapter_model.safetensors")
    assert steps_pushed(hub, repo, disk, "adapter_model.safetensors") == ALL_STEPS
    trainer.push_to_hub()
    files = commits(hub, repo)[-1][1]
    model = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {path for path in files if not path.startswith("last-checkpoint/")} == model
    assert (tmp_path / "out" / "_ref_hidden").exists() == precomputed
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = AutoPeftModelForCausalLM.from_pretrained(repo)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=1e-5)
        with loaded.disable_adapter():
            assert (loaded(ids).logits - trainer.model(ids).logits).abs().max() > 1e-3
