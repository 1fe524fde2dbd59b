"""KLSelfTrainer: its objective against full logits in float64, and settings that must not change it."""

import copy
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from tests.helpers import assert_gradients_equal, gradients, tiny_model, tiny_tokenizer, weights_of
from tests.trainer.kl_training import (
    LM,
    METRICS,
    assert_logs_equal,
    assert_trained,
    assert_weights_equal,
    logs_of,
    make_kl_trainer,
    moved,
    plain_objective,
    random_rows,
)
from trl_hrm._compat import trainer_utils
from trl_hrm.kl import LOGITS_PER_TILE
from trl_hrm.trainer.reference import AdapterOff, FrozenReference


# The objective


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("scaling", "reduction"), [("log1p", "sum"), ("none", "sum"), ("log1p", "token_mean")])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_equal_full_logits_in_float64(tmp_path, direction, scaling, reduction, packing):
    """A KL that crosses sequence borders, or is averaged before its logarithm, gives plausible numbers."""
    rows = random_rows(9)
    policy = tiny_model(LM)
    reference = moved(policy)
    trainer = make_kl_trainer(
        tmp_path,
        rows,
        model=tiny_model(LM),
        ref_model=moved(policy),
        kl_coef=0.7,
        kl_direction=direction,
        kl_scaling=scaling,
        kl_reduction=reduction,
        packing=packing,
        max_length=64 if packing else None,
        per_device_train_batch_size=9,
        shuffle_dataset=False,
    )
    if packing:
        assert len(trainer.train_dataset) < 9 and max(map(len, trainer.train_dataset["seq_lengths"])) > 1
    prepared = make_kl_trainer(tmp_path, rows, kl_coef=0.0, max_length=None).train_dataset
    batch = trainer.data_collator(list(trainer.train_dataset))
    found_loss = trainer.compute_loss(trainer.model.train(), batch)
    found = gradients(trainer.model, found_loss)

    lm_loss, kl_loss = plain_objective(
        policy.double(), reference.double(), list(prepared), direction, scaling, reduction
    )
    expected = gradients(policy, lm_loss + 0.7 * kl_loss)
    assert found_loss.item() == pytest.approx((lm_loss + 0.7 * kl_loss).item(), rel=1e-5)
    assert 0.7 * kl_loss.item() > 0.05 * lm_loss.item()  # the KL term has a visible share of the loss
    assert_gradients_equal(found, {name: gradient.float() for name, gradient in expected.items()})


def test_the_logarithm_is_taken_per_sequence(tmp_path):
    """ln(1 + mean KL) of a batch is a different loss. It differs only when the KLs of the sequences differ."""
    rows = random_rows(6, most_words=20)
    trainer = make_kl_trainer(tmp_path, rows, ref_model=moved(tiny_model(LM), 0.1), max_length=None)
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["log_kl"] < math.log1p(log["kl"]) - 0.01
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["log_kl"], rel=1e-5)
    assert log["kl_max"] > log["kl"] > log["kl_per_token"] > 0


def test_a_policy_that_is_its_reference_has_no_kl(tmp_path):
    """Exactly 0: the two models compute the same thing in different ways, and any other value is an error in one."""
    trainer = make_kl_trainer(tmp_path, random_rows(8))
    trainer.train()
    assert logs_of(trainer)[0] | {"loss": 0, "lm_loss": 0} == dict.fromkeys(METRICS, 0.0)


def test_without_kl_it_is_sft_to_the_bit(tmp_path):
    """λ = 0 is the baseline of every study, so it must neither compute a reference nor change the order of sums."""
    rows = random_rows(20)
    trainer = make_kl_trainer(tmp_path / "kl", rows, kl_coef=0.0, per_device_train_batch_size=4, num_train_epochs=2)
    assert trainer.reference is None
    trainer.train()
    settings = {field.name: getattr(trainer.args, field.name) for field in fields(SFTConfig) if field.init}
    plain = SFTTrainer(
        tiny_model(LM),
        SFTConfig(**settings | {"output_dir": str(tmp_path / "sft")}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )
    plain.train()
    for name, weight in weights_of(plain.model).items():
        assert torch.equal(weight, weights_of(trainer.model)[name]), name
    timings = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
    for ours, theirs in zip(trainer.state.log_history, plain.state.log_history, strict=True):
        assert {k: v for k, v in ours.items() if k not in timings} == {
            k: v for k, v in theirs.items() if k not in timings
        }


# Settings that must not change it


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_accumulation_does_not_change_training(tmp_path, reduction):
    """8x1 = 4x2 = 1x8 on ragged rows: a mean per micro-batch would give short batches too much weight."""
    rows = random_rows(16, most_words=25)
    trainers = []
    for size in (8, 4, 1):
        trainer = make_kl_trainer(
            tmp_path,
            rows,
            kl_reduction=reduction,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            num_train_epochs=3,
            learning_rate=0.1,
        )
        trainer.train()
        trainers.append(trainer)
    assert_trained(trainers[0])
    for trainer in trainers[1:]:
        assert_logs_equal(trainer, trainers[0])
        assert_weights_equal(trainer.model, trainers[0].model)


@pytest.mark.parametrize(
    "options",
    [
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 200, "per_device_train_batch_size": 1},
        {"pad_to_multiple_of": 16},
        {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16},
    ],
    ids=["padding-free", "packed", "padded to 16", "padding-free, padded to 16"],
)
def test_the_layout_of_a_batch_does_not_change_training(tmp_path, options):
    """One logarithm for all sequences of a packed row, or counting padding as a sequence, changes the loss slightly."""
    rows = random_rows(8)
    expected = make_kl_trainer(tmp_path / "a", rows, num_train_epochs=4, learning_rate=0.1, max_length=None)
    expected.train()
    found = make_kl_trainer(tmp_path / "b", rows, num_train_epochs=4, learning_rate=0.1, **options)
    assert options.get("packing", False) == ("seq_lengths" in found.train_dataset.column_names)
    found.train()
    assert_trained(expected)
    assert_logs_equal(found, expected)
    assert_weights_equal(found.model, expected.model)


def test_gradient_checkpointing_does_not_change_training(tmp_path):
    """The hidden states are caught by a hook, and checkpointing runs layers twice."""
    rows = random_rows(8)
    trainers = []
    for checkpointing in (False, True):
        trainer = make_kl_trainer(
            tmp_path, rows, gradient_checkpointing=checkpointing, num_train_epochs=3, learning_rate=0.1
        )
        trainer.train()
        trainers.append(trainer)
    assert_trained(trainers[0])
    assert_logs_equal(*trainers)
    assert_weights_equal(trainers[0].model, trainers[1].model, atol=1e-6)


def test_rows_without_a_trained_token_count_for_nothing(tmp_path):
    """A row that has only a prompt is not counted in the mean, and a micro-batch of such rows gives no NaN."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("sum x = 3 so y = 7 then add").input_ids
    trained = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    blank = {"input_ids": ids, "labels": [-100] * len(ids)}
    options = {"num_train_epochs": 3, "learning_rate": 0.1, "trainer_args": {}}
    skip = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    expected = make_kl_trainer(tmp_path, [trained, trained], per_device_train_batch_size=2, **options, **skip)
    expected.train()
    found = make_kl_trainer(
        tmp_path,
        [trained, blank, blank, trained],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        **options,
        **skip,
    )
    found.train()
    assert_trained(expected)
    assert_logs_equal(found, expected)
    assert_weights_equal(found.model, expected.model)


# The reference


def test_the_default_reference_is_the_policy_as_it_was_given(tmp_path):
    """A copy made after TRL wraps the model, or a reload by name, would lose changes that the user made to the weights."""
    model = moved(tiny_model(LM))
    before = weights_of(model)
    trainer = make_kl_trainer(tmp_path, random_rows(8), model=model, learning_rate=0.1, num_train_epochs=3)
    assert isinstance(trainer.reference, FrozenReference)
    trainer.train()
    assert_trained(trainer)
    reference = trainer.reference.model
    for name, weight in weights_of(reference).items():
        assert torch.equal(weight, before[name]), name
    assert not reference.training and not any(weight.requires_grad for weight in reference.parameters())
    assert not torch.equal(weights_of(trainer.model)["lm_head.weight"], before["lm_head.weight"])


def test_policy_and_reference_by_path(tmp_path, paths):
    """If a named reference were ignored, the KL would be 0 at the first step."""
    policy, other = paths
    first_kl = {}
    for name, given in (
        ("own", {}),
        ("argument", {"ref_model": other}),
        ("config", {"config_ref_model": other}),
        ("model", {"ref_model": moved(tiny_model(LM))}),
    ):
        trainer = make_kl_trainer(tmp_path / name, random_rows(8), model=policy, **given)
        trainer.train()
        first_kl[name] = logs_of(trainer)[0]["kl"]
    assert first_kl["own"] == 0
    assert first_kl["argument"] > 0.1
    assert first_kl["config"] == first_kl["argument"] == first_kl["model"]


def test_init_kwargs_reach_the_reference(tmp_path, paths):
    """The reference uses the policy's arguments by default, and its own if given."""
    policy, other = paths
    bfloat16, float32 = {"dtype": "bfloat16"}, {"dtype": "float32"}
    options = {"model": policy, "config_ref_model": other}
    trainer = make_kl_trainer(tmp_path, random_rows(2), model_init_kwargs=float32, **options)
    assert trainer.reference.model.dtype == torch.float32
    trainer = make_kl_trainer(
        tmp_path, random_rows(2), model_init_kwargs=float32, ref_model_init_kwargs=bfloat16, **options
    )
    assert (trainer.model.dtype, trainer.reference.model.dtype) == (torch.float32, torch.bfloat16)


def test_adapter_off_equals_full_logits(tmp_path):
    """An adapter that stays on for the reference, or off afterwards, trains a different objective without an error."""
    peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    rows = random_rows(6)
    trainer = make_kl_trainer(
        tmp_path, rows, trainer_args={"peft_config": peft_config}, max_length=None, per_device_train_batch_size=6
    )
    assert isinstance(trainer.reference, AdapterOff)
    policy, reference = copy.deepcopy(trainer.model).double(), tiny_model(LM).double()
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model.train(), batch)
    found = gradients(trainer.model, loss)

    forward = policy.get_base_model()
    forward.forward = type(forward).forward.__get__(forward)  # turns off the fused head
    lm_loss, kl_loss = plain_objective(policy, reference, list(trainer.train_dataset))
    expected = gradients(policy, lm_loss + 0.5 * kl_loss)
    assert loss.item() == pytest.approx((lm_loss + 0.5 * kl_loss).item(), rel=1e-5)
    assert kl_loss > 0.1
    assert set(found) == {name for name, weight in trainer.model.named_parameters() if "lora" in name}
    assert_gradients_equal(found, {name: gradient.float() for name, gradient in expected.items()})


def test_tiles_of_the_language_model_loss(tmp_path, monkeypatch):
    """TRL's own tiles take gigabytes, ten times as much as the KL term. SFTTrainer's own must not change."""
    seen = []
    apply = trainer_utils._ChunkedLogProbFunction.apply
    function = SimpleNamespace(apply=lambda *args: (seen.append(args[5]), apply(*args))[1])
    monkeypatch.setattr(trainer_utils, "_ChunkedLogProbFunction", function)
    for kl_coef in (0.5, 0.0):
        make_kl_trainer(tmp_path, random_rows(2), kl_coef=kl_coef).train()
    assert seen == [LOGITS_PER_TILE, trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE]


def test_a_streamed_dataset_trains_like_a_dataset(tmp_path):
    """A stream has no length, so the sequences of the global batch are counted from its batches."""
    rows = random_rows(8)
    options = {"max_steps": 4, "learning_rate": 0.1, "num_train_epochs": 4}
    expected = make_kl_trainer(tmp_path, rows, **options)
    expected.train()
    found = make_kl_trainer(tmp_path, IterableDataset.from_generator(lambda: iter(rows)), **options)
    found.train()
    assert_trained(expected)
    assert_logs_equal(found, expected)


# Evaluation, logs


def test_evaluation_reports_the_kl(tmp_path):
    """Evaluation logs the KL under its own names and does not disturb the sums of preceding training steps."""
    rows, eval_rows = random_rows(8), random_rows(5, seed=7)
    options = {"num_train_epochs": 4, "learning_rate": 0.1, "logging_steps": 2}
    with_eval = make_kl_trainer(
        tmp_path, rows, eval_rows=eval_rows, eval_strategy="epoch", per_device_eval_batch_size=5, **options
    )
    with_eval.train()
    plain = make_kl_trainer(tmp_path, rows, **options)
    plain.train()
    assert_logs_equal(with_eval, plain)
    last = with_eval.evaluate()
    policy = with_eval.accelerator.unwrap_model(with_eval.model)
    policy.forward = type(policy).forward.__get__(policy)
    with torch.no_grad():
        lm_loss, log_kl = plain_objective(
            policy.double(), with_eval.reference.model.double(), list(with_eval.eval_dataset)
        )
    assert last["eval_lm_loss"] == pytest.approx(lm_loss.item(), rel=1e-4)
    assert last["eval_log_kl"] == pytest.approx(log_kl.item(), rel=1e-4)
    assert last["eval_loss"] == pytest.approx((lm_loss + 0.5 * log_kl).item(), rel=1e-4)
    assert log_kl > 0.1


def test_a_prediction_does_not_change_the_next_evaluation(tmp_path):
    """A prediction logs nothing, so its sums could leak into the means of the next evaluation."""
    trainer = make_kl_trainer(tmp_path, random_rows(4), ref_model=moved(tiny_model(LM)), eval_rows=random_rows(5))
    expected = trainer.evaluate()["eval_kl"]
    trainer.predict(make_kl_trainer(tmp_path, random_rows(9, seed=3)).train_dataset)
    assert trainer.evaluate()["eval_kl"] == expected > 0


def test_each_of_several_evaluation_sets_has_its_own_kl(tmp_path):
    """Under a shared name, the last set would overwrite the others and decide which model is best."""
    parts = {name: random_rows(4, seed=seed) for name, seed in (("a", 1), ("b", 2))}
    reference = moved(tiny_model(LM))
    alone = [
        make_kl_trainer(tmp_path, random_rows(4), ref_model=copy.deepcopy(reference), eval_rows=rows).evaluate()
        for rows in parts.values()
    ]
    eval_rows = {name: Dataset.from_list(rows) for name, rows in parts.items()}
    trainer = make_kl_trainer(tmp_path, random_rows(4), ref_model=reference, eval_rows=eval_rows)
    found = trainer.evaluate()
    for name, expected in zip(parts, alone, strict=True):
        assert found[f"eval_{name}_kl"] == pytest.approx(expected["eval_kl"])
    assert found["eval_a_kl"] != found["eval_b_kl"]


def test_the_model_card_names_trainer_and_paper(tmp_path):
    """Anyone who finds the model on the Hub must see what it was trained for."""
    trainer = make_kl_trainer(tmp_path, random_rows(4), save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2503.13551" in card and "KL self-training" in card
