"""Training of implicit process reward models against full logits in float64, for every way to split the batch."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from trl_hrm import ImplicitPRMConfig, StepFormat, StepScorer, StepTree
from trl_hrm.trainer import hrm_reward_trainer, implicit_prm_trainer
from trl_hrm.trainer.reference import AdapterOff, FrozenReference
from trl_hrm.training.hub_push import HubPushMixin

from ..helpers import dataset_of, make_trainer, random_tree, save_checkpoint, tiny_model, tiny_tokenizer, weights_of
from ..implicit_models import BETA, LM, implicit_trainer, in_float64, save_models, slow_ratios
from ..trainer.kl_training import moved


LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def trees() -> list[StepTree]:
    """Eight trees with labels on some inner steps too, and soft labels."""
    rng = random.Random(1)
    trees = [random_tree(rng, name, max_steps=6) for name in "abcdefgh"]
    for tree in trees:
        leaves = set(tree.leaves())
        tree.labels = [label if i in leaves or rng.random() < 0.3 else None for i, label in enumerate(tree.labels)]
    trees[0].labels[-1] = 0.9
    assert any(tree.labels[i] is not None for tree in trees for i in set(range(len(tree.labels))) - set(tree.leaves()))
    return trees


@pytest.fixture(scope="module")
def expected(trees, models) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and weights after one step of SGD, in float64 from full logits, one sequence per label."""
    policy, reference = (in_float64(AutoModelForCausalLM.from_pretrained(path)) for path in models)
    losses = []
    for tree in trees:
        for step, label in enumerate(tree.labels):
            if label is not None:
                reward = BETA * torch.cat(slow_ratios(policy, reference, LM, tree, step)).sum()
                losses.append(F.binary_cross_entropy_with_logits(reward, reward.new_tensor(label)))
    loss = torch.stack(losses).mean()
    loss.backward()
    with torch.no_grad():
        for weight in policy.parameters():
            weight -= LEARNING_RATE * weight.grad
    return loss.item(), weights_of(policy)


def assert_one_step(trainer, expected) -> None:
    start = weights_of(trainer.model)
    trainer.train()
    loss, weights = expected
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    moved = 0.0
    for name, weight in weights_of(trainer.model).items():
        difference = weight.double() - weights[name]
        assert difference.abs().max() < 2e-5, name
        moved = max(moved, (weight - start[name]).abs().max().item())
    assert moved > 1e-3  # the comparison above accepts 2e-5


@pytest.mark.parametrize("batch_size", [8, 4, 1])
def test_loss_and_gradient_equal_full_logits(tmp_path, trees, models, expected, batch_size):
    trainer = implicit_trainer(
        tmp_path,
        trees,
        models[0],
        ref_model=models[1],
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=8 // batch_size,
    )
    assert isinstance(trainer.reference, FrozenReference)
    assert_one_step(trainer, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "packing": True,
            "max_length": 40,
            "per_device_train_batch_size": 64,
        },  # trees are split: parts repeat their prefix
        {"shared_prefix": False, "per_device_train_batch_size": 64},
        {"packing": True, "max_length": 60, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 64},
        {"pad_to_multiple_of": 64},
        {"gradient_checkpointing": True},
        {"remove_unused_columns": False},
        {"precompute_ref_log_probs": True},
        {
            "precompute_ref_log_probs": True,
            "per_device_eval_batch_size": 3,
            "max_length": 40,
            "per_device_train_batch_size": 64,
        },
    ],
    ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()),
)
def test_settings_that_change_no_result(tmp_path, trees, models, expected, settings):
    trainer = implicit_trainer(
        tmp_path, trees, models[0], ref_model=models[1], **({"per_device_train_batch_size": 8} | settings)
    )
    assert (trainer.reference is None) == ("precompute_ref_log_probs" in settings)
    if settings.get("max_length") == 40:
        assert trainer.reports["train_dataset"].tokens_in_rows > trainer.reports["train_dataset"].tokens
    assert_one_step(trainer, expected)


def test_a_trained_prompt_does_not_count(tmp_path, models):
    """The problem is given. If its tokens counted, a policy could raise its reward by predicting the problem."""
    trainer = implicit_trainer(
        tmp_path, [StepTree("add x y", ["so = 3"], [1.0], [-1])], models[0], ref_model=models[1]
    )
    batch = next(iter(trainer.get_train_dataloader()))
    hidden = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *args: hidden.append(args[2]))
    trainer.model.get_input_embeddings().weight.requires_grad_(True)
    steps = trainer._step_tokens(batch)
    prompt = len(StepFormat().encode_prompt(tiny_tokenizer(), "add x y"))
    assert steps.tokens.tolist() == list(range(prompt, len(batch["input_ids"][0])))
    assert steps.parents.tolist() == [token - 1 for token in steps.tokens.tolist()]


def lora(**settings) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", **settings)


def test_adapter_off_equals_the_frozen_base(tmp_path, trees, models):
    """The reference of an adapter is its base model. A second model would only cost memory."""
    logs = []
    for frozen in (False, True):
        trainer = implicit_trainer(
            tmp_path, trees, models[1], peft_config=lora(), per_device_train_batch_size=2, learning_rate=1.0
        )
        assert isinstance(trainer.reference, AdapterOff)
        if frozen:
            trainer.reference = FrozenReference(AutoModelForCausalLM.from_pretrained(models[1]), trainer.accelerator)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)
    assert abs(logs[0][0] - logs[0][-1]) > 0.01


def test_evaluation_metrics_are_of_the_outcomes(tmp_path, trees, models):
    trainer = implicit_trainer(tmp_path, trees, models[0], evaluation=trees, ref_model=models[1])
    metrics = trainer.evaluate()
    rewards, labels = [], []
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in models)
    for tree in trees:
        for step, label in enumerate(tree.labels):
            if label is not None:
                with torch.no_grad():
                    rewards.append(BETA * torch.cat(slow_ratios(policy, reference, LM, tree, step)).sum().item())
                labels.append(label)
    hits = [(reward >= 0) == (label >= 0.5) for reward, label in zip(rewards, labels, strict=True)]
    assert metrics["eval_num_steps"] == len(labels)
    assert metrics["eval_accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert {"eval_auroc", "eval_ece"} <= metrics.keys()


def test_outcomes_in_the_unpaired_preference_format(tmp_path, models):
    """A completion gets the same ids as the steps of a solution, because scoring encodes steps."""
    rows = [
        {"prompt": "add x", "completion": "so = 3\n\nthus y", "label": True},
        {"prompt": "add x", "completion": "so = 3\n\nthen 7\n\nsum", "label": False},
    ]
    chat = [
        {
            "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in rows
    ]
    tree = StepTree("add x", ["so = 3", "thus y", "then 7", "sum"], [None, 1.0, None, 0.0], [-1, 0, 0, 2])
    found = [
        implicit_trainer(tmp_path, data, models[0]).train_dataset.to_list()
        for data in (Dataset.from_list(rows), Dataset.from_list(chat), [tree])
    ]
    assert found[0] == found[1] == found[2]
    for column, value, message in (
        ("completion", " ", "at least one step"),
        ("prompt", [{"role": "assistant", "content": "x"}], "one user message"),
        ("prompt", [3], "one user message"),
        ("completion", [{"role": "assistant"}], "one assistant message"),
        ("label", 3, "true"),
    ):
        with pytest.raises(ValueError, match=f"row 0.*{message}"):
            implicit_trainer(tmp_path, Dataset.from_list([rows[0] | {column: value}]), models[0])


def test_thinking_in_a_completion_is_left_out_with_a_warning(tmp_path, models, caplog):
    rows = [
        {"prompt": "add x", "completion": f"{thinking}so = 3\n\nthus y", "label": True}
        for thinking in ("", "<think>\nsum\n\n7\n</think>\n\n")
    ]
    found = [
        implicit_trainer(tmp_path, Dataset.from_list(data), models[0]).train_dataset.to_list()
        for data in (rows[:1], rows)
    ]
    assert found[0] == found[1]
    [warning] = [record.message for record in caplog.records if "left out" in record.message]
    assert "train_dataset: the thinking in 1 of 2 completions is left out. To train on it, split" in warning


def test_another_version_splits_completions_again(tmp_path, models, monkeypatch):
    """`datasets` finds cached rows by the arguments of a function, even if its code has changed."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "add x", "completion": "so = 3\n\nthus y", "label": True}))
    rows = Dataset.from_json(str(file), cache_dir=str(tmp_path / "cache"))
    kept = []
    for version in ("1", "2"):
        monkeypatch.setattr(hrm_reward_trainer, "__version__", version)
        monkeypatch.setattr(hrm_reward_trainer, "cut_text", lambda text, rule, version=version: [version])
        kept.append(implicit_trainer(tmp_path, rows, models[0]).train_dataset[0]["input_ids"])
    assert kept[0] != kept[1]


def trained(tmp_path, trees, model, **settings) -> str:
    """Train and save a checkpoint, and return its folder."""
    trainer = implicit_trainer(tmp_path / "out", trees, model, per_device_train_batch_size=2, **settings)
    trainer.train()
    trainer.save_model()
    return str(tmp_path / "out")


def test_a_checkpoint_names_its_reference(tmp_path, trees, models):
    folder = trained(tmp_path, trees, models[0], ref_model=models[1], score_span="prefix")
    step_format = StepFormat.from_pretrained(folder)
    assert (step_format.head, step_format.beta, step_format.score_span) == ("implicit", BETA, "prefix")
    assert step_format.reference_model == models[1] and len(step_format.reference_weights) == 16
    assert "beta" not in json.loads(StepFormat().to_json())  # files of other heads are as before


def test_a_push_warns_of_a_local_reference(tmp_path, trees, models, monkeypatch, caplog):
    pushed = []
    monkeypatch.setattr(HubPushMixin, "push_to_hub", lambda self, *args, **kwargs: pushed.append((args, kwargs)))
    implicit_trainer(tmp_path, trees, models[0]).push_to_hub("message", revision="next")
    assert pushed == [(("message",), {"revision": "next"})]
    assert f"The reference model is the local folder {models[0]}" in caplog.text


def test_the_reference_is_not_replaced(tmp_path, trees, models):
    """After the training, the folder would have other weights, and no score could be computed."""
    for model, settings in ((models[0], {}), (models[0], {"ref_model": models[1]})):
        with pytest.raises(FileExistsError, match="folder of the reference model"):
            implicit_trainer(settings.get("ref_model", model), trees, model, **settings)


def test_a_folder_with_an_earlier_adapter_has_the_model(tmp_path, trees, models):
    """A folder with the configuration of an adapter is loaded as this adapter."""
    trained(tmp_path, trees, models[0], peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))
    folder = trained(tmp_path, trees, models[0])
    scores = [
        StepScorer.from_pretrained(path).score_trees(trees)
        for path in (folder, trained(tmp_path / "alone", trees, models[0]))
    ]
    assert scores[0] == scores[1]


def test_the_commit_of_a_reference_on_the_hub_is_saved(tmp_path, trees, models, monkeypatch):
    """A branch such as `main` may get other weights, which scoring would refuse."""

    def load(name, **kwargs):
        model = AutoModelForCausalLM.from_pretrained(name)
        model.config._commit_hash = "c" * 40
        return model

    monkeypatch.setattr(implicit_prm_trainer, "load_policy", load)
    step_format = implicit_trainer(tmp_path, trees, models[0]).step_format
    assert (step_format.reference_model, step_format.reference_revision) == (models[0], "c" * 40)


def test_training_further_keeps_the_reference(tmp_path, trees, models):
    """With the checkpoint itself as its reference, the rewards learned before would be lost."""
    folder = trained(tmp_path, trees, models[0], ref_model=models[1])
    trainer = implicit_trainer(tmp_path / "more", trees, folder, evaluation=trees)
    assert trainer.step_format == StepFormat.from_pretrained(folder)
    assert trainer.evaluate()["eval_loss"] != pytest.approx(0.6931, abs=0.01)
    with pytest.raises(ValueError, match="ImplicitPRMTrainer"):
        make_trainer(tmp_path / "hrm", trees, folder)
    with pytest.raises(ValueError, match="without an adapter, or train an adapter of"):
        implicit_trainer(tmp_path / "more", trees, folder, peft_config=LoraConfig(r=2, task_type="CAUSAL_LM"))


def test_resume_is_exact_and_refuses_another_reference(tmp_path, trees, models):
    settings = {"per_device_train_batch_size": 2, "ref_model": models[1], "save_strategy": "steps", "save_steps": 2}
    whole = implicit_trainer(tmp_path / "whole", trees, models[0], **settings)
    whole.train()
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    for precompute in (False, True):
        resumed = implicit_trainer(
            tmp_path / f"resumed{precompute}", trees, models[0], **settings, precompute_ref_log_probs=precompute
        )
        resumed.train(resume_from_checkpoint=checkpoint)
        for name, weight in weights_of(resumed.model).items():
            torch.testing.assert_close(weight, weights_of(whole.model)[name], rtol=0, atol=1e-6, msg=name)
    with pytest.raises(ValueError, match="reference_weights"):
        other = implicit_trainer(tmp_path / "other", trees, models[0], **(settings | {"ref_model": models[0]}))
        other.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(ValueError, match="beta"):
        implicit_trainer(tmp_path / "beta", trees, models[0], **settings, beta=0.1).train(
            resume_from_checkpoint=checkpoint
        )


def test_precomputed_values_are_computed_once(tmp_path, trees, models, monkeypatch):
    settings = {"ref_model": models[1], "precompute_ref_log_probs": True, "evaluation": trees[:2]}
    first = implicit_trainer(tmp_path, trees, models[0], **settings)
    files = sorted((tmp_path / "_ref_log_probs").iterdir())
    assert len(files) == 2
    monkeypatch.setattr(FrozenReference, "run", None)
    second = implicit_trainer(tmp_path, trees, models[0], **settings)
    assert second.train_dataset.to_list() == first.train_dataset.to_list()
    assert first.evaluate()["eval_loss"] == second.evaluate()["eval_loss"]
    with pytest.raises(ValueError, match="precompute_ref_log_probs=False"):
        second.evaluate(dataset_of(trees[2:4]))
    files[0].write_bytes(b"short")
    files[1].write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged"):
        implicit_trainer(tmp_path, trees, models[0], **settings)


class TestRefusals:
    def test_a_model_without_a_name(self, tmp_path, trees):
        with pytest.raises(ValueError, match="no name to load the reference"):
            implicit_trainer(tmp_path, trees, tiny_model(LM))

    def test_a_model_object_with_a_reference(self, tmp_path, trees, models):
        trainer = implicit_trainer(tmp_path, trees, moved(tiny_model(LM)), ref_model=models[1])
        assert trainer.step_format.reference_model == models[1]

    def test_a_missing_reference(self, tmp_path, trees, models):
        with pytest.raises(OSError, match="nowhere"):
            implicit_trainer(tmp_path, trees, models[0], ref_model=str(tmp_path / "nowhere"))

    def test_another_vocabulary(self, tmp_path, trees, models):
        tiny_model(LM, vocab_size=400).save_pretrained(tmp_path / "large")
        with pytest.raises(ValueError, match="vocabulary of 400"):
            implicit_trainer(tmp_path, trees, models[0], ref_model=str(tmp_path / "large"))

    def test_other_tokens(self, tmp_path, trees, models):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["kilogram"])
        tiny_model(LM).save_pretrained(tmp_path / "other")
        tokenizer.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="kilogram"):
            implicit_trainer(tmp_path, trees, models[0], ref_model=str(tmp_path / "other"))

    def test_a_reward_model(self, tmp_path, trees):
        with pytest.raises(ValueError, match="head 'classification'"):
            implicit_trainer(tmp_path / "out", trees, save_checkpoint(tmp_path / "hrm"), beta=0.05)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"head": "lm"}, "head"),
            ({"label_tokens": ["a", "b"]}, "label_tokens"),
            ({"beta": 0.0}, "beta"),
            ({"beta": float("nan")}, "beta"),
            ({"score_span": "word"}, "score_span"),
            ({"ref_model_revision": "main"}, "ref_model"),
            ({"step_format": "math-shepherd"}, "head 'lm'"),
        ],
    )
    def test_arguments(self, tmp_path, settings, message):
        with pytest.raises(ValueError, match=message):
            ImplicitPRMConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)

    def test_an_adapter_with_a_reference_or_biases(self, tmp_path, trees, models):
        with pytest.raises(ValueError, match="adapter disabled"):
            implicit_trainer(tmp_path, trees, models[0], ref_model=models[1], peft_config=lora())
        with pytest.raises(ValueError, match="bias='none'"):
            implicit_trainer(tmp_path, trees, models[0], peft_config=lora(bias="all"))
        with pytest.raises(ValueError, match="merged model"):
            get_peft_model(AutoModelForCausalLM.from_pretrained(models[1]), lora()).save_pretrained(tmp_path / "lora")
            implicit_trainer(tmp_path, trees, models[0], ref_model=str(tmp_path / "lora"))

    def test_merged_steps(self, tmp_path, models):
        tree = StepTree("add x", ["so = 3", "so = 3\nthus y"], [1.0, 0.0], [-1, -1], [1, 2])
        with pytest.raises(ValueError, match="merged steps"):
            implicit_trainer(tmp_path, [tree], models[0])


def planted(rng: random.Random, number: int) -> list[StepTree]:
    """Solutions of four steps. A solution is right unless one of its steps says "sub", which happens at most once."""
    trees = []
    for i in range(number):
        is_wrong = rng.random() < 0.5
        words = [rng.choice(["add", "sum", "then"]) for _ in range(4)]
        if is_wrong:
            words[rng.randrange(4)] = "sub"
        steps = [f"{word} {rng.choice('xy')} {rng.choice(['= 3', '= 7'])}" for word in words]
        trees.append(StepTree(f"p{i} 1+2?", steps, [None, None, None, float(not is_wrong)], [-1, 0, 1, 2]))
    return trees


def test_outcomes_alone_find_the_wrong_step(tmp_path):
    """Which step decides is in no label. The reward of the step with the wrong word must become the lowest."""
    save_models(tmp_path)
    trainer = implicit_trainer(
        tmp_path / "out",
        planted(random.Random(0), 160),
        str(tmp_path / "reference"),
        optim="adamw_torch",
        learning_rate=1e-3,
        num_train_epochs=4,
        per_device_train_batch_size=16,
        max_grad_norm=1.0,
        beta=0.05,
    )
    trainer.train()
    trainer.save_model()
    scorer = StepScorer.from_pretrained(str(tmp_path / "out"))
    held_out = [tree for tree in planted(random.Random(1), 80) if tree.labels[-1] == 0]
    found = []
    for tree, scores in zip(held_out, scorer.score_trees(held_out), strict=True):
        [bad] = [i for i, step in enumerate(tree.completions) if step.startswith("sub")]
        found.append(scores.index(min(scores)) == bad)
    assert len(found) > 30 and sum(found) / len(found) > 0.9
