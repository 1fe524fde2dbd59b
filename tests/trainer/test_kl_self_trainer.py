"""KLSelfTrainer: its objective against full logits in float64, and what must not change it."""

import copy
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from tests.helpers import assert_gradients_equal, gradients, tiny_model, tiny_tokenizer, weights_of
from tests.trainer.kl_training import LM, make_kl_trainer, moved, plain_objective, random_rows
from trl_hrm import KLSelfConfig, KLSelfTrainer
from trl_hrm._compat import trainer_utils
from trl_hrm.demo.tiny_model import make_tokenizer
from trl_hrm.kl import LOGITS_PER_TILE
from trl_hrm.trainer import ref_hidden
from trl_hrm.trainer.ref_hidden import REF_STATES, PrecomputedReference
from trl_hrm.trainer.reference import AdapterOff, FrozenReference


METRICS = ("loss", "lm_loss", "kl", "kl_per_token", "log_kl", "kl_max")


def logs_of(trainer: KLSelfTrainer) -> list[dict[str, float]]:
    return [{name: log[name] for name in METRICS} for log in trainer.state.log_history if "lm_loss" in log]


def assert_logs_equal(found: KLSelfTrainer, expected: KLSelfTrainer, rel: float = 1e-5) -> None:
    assert len(logs_of(found)) == len(logs_of(expected)) > 0
    for one, other in zip(logs_of(found), logs_of(expected), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6)


def assert_weights_equal(found: torch.nn.Module, expected: torch.nn.Module, atol: float = 1e-5) -> None:
    for (name, one), other in zip(weights_of(found).items(), weights_of(expected).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_trained(trainer: KLSelfTrainer) -> None:
    """Else equal weights would say nothing."""
    assert max(log["kl"] for log in logs_of(trainer)) > 0.1


# The objective


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize(("scaling", "reduction"), [("log1p", "sum"), ("none", "sum"), ("log1p", "token_mean")])
@pytest.mark.parametrize("packing", [False, True])
def test_loss_and_gradients_equal_full_logits_in_float64(tmp_path, direction, scaling, reduction, packing):
    """Ragged lengths, ignored prompts, packed rows: a KL that leaks over a border, or is averaged before its logarithm, looks sane."""
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
    assert 0.7 * kl_loss.item() > 0.05 * lm_loss.item()  # the term matters
    assert_gradients_equal(found, {name: gradient.float() for name, gradient in expected.items()})


def test_the_logarithm_is_taken_per_sequence(tmp_path):
    """The authors' batches have one sequence; ln(1 + mean KL) of a larger one is another loss, and differs only when KLs do."""
    rows = random_rows(6, most_words=20)
    trainer = make_kl_trainer(tmp_path, rows, ref_model=moved(tiny_model(LM), 0.1), max_length=None)
    trainer.train()
    (log,) = logs_of(trainer)
    assert log["log_kl"] < math.log1p(log["kl"]) - 0.01
    assert log["loss"] == pytest.approx(log["lm_loss"] + 0.5 * log["log_kl"], rel=1e-5)
    assert log["kl_max"] > log["kl"] > log["kl_per_token"] > 0


def test_a_policy_that_is_its_reference_has_no_kl(tmp_path):
    """To the bit: it goes through two models by different ways, and anything but 0 would be a leak of one of them."""
    trainer = make_kl_trainer(tmp_path, random_rows(8))
    trainer.train()
    assert logs_of(trainer)[0] | {"loss": 0, "lm_loss": 0} == dict.fromkeys(METRICS, 0.0)


def test_without_kl_it_is_sft_to_the_bit(tmp_path):
    """λ = 0 is the baseline of every study: a reference that only costs time, or a changed sum, would blur it."""
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


# What must not change it


@pytest.mark.parametrize("reduction", ["sum", "token_mean"])
def test_accumulation_does_not_change_training(tmp_path, reduction):
    """8x1 = 4x2 = 1x8, on ragged rows: a mean per micro-batch gives every short batch too much weight."""
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
            learning_rate=0.5,
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
    """Sequences of a packed row that share one logarithm, or padding that counts as a sequence, change the loss by a little."""
    rows = random_rows(8)
    expected = make_kl_trainer(tmp_path / "a", rows, num_train_epochs=4, learning_rate=0.5, max_length=None)
    expected.train()
    found = make_kl_trainer(tmp_path / "b", rows, num_train_epochs=4, learning_rate=0.5, **options)
    assert options.get("packing", False) == ("seq_lengths" in found.train_dataset.column_names)
    found.train()
    assert_trained(expected)
    assert_logs_equal(found, expected)
    assert_weights_equal(found.model, expected.model)


def test_gradient_checkpointing_does_not_change_training(tmp_path):
    """The hidden states are caught by a hook, and checkpointing runs layers a second time."""
    rows = random_rows(8)
    trainers = []
    for checkpointing in (False, True):
        trainer = make_kl_trainer(
            tmp_path, rows, gradient_checkpointing=checkpointing, num_train_epochs=3, learning_rate=0.5
        )
        trainer.train()
        trainers.append(trainer)
    assert_trained(trainers[0])
    assert_logs_equal(*trainers)
    assert_weights_equal(trainers[0].model, trainers[1].model, atol=1e-6)


def test_rows_without_a_trained_token_count_for_nothing(tmp_path):
    """A sequence that has only a prompt is no sequence of the mean, and a micro-batch of such rows gives no NaN."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("sum x = 3 so y = 7 then add").input_ids
    trained = {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}
    blank = {"input_ids": ids, "labels": [-100] * len(ids)}
    options = {"num_train_epochs": 3, "learning_rate": 0.5, "trainer_args": {}}
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
    """A copy made after TRL has wrapped the model, or a reload of its name, is another model once its weights were changed."""
    model = moved(tiny_model(LM))
    before = weights_of(model)
    trainer = make_kl_trainer(tmp_path, random_rows(8), model=model, learning_rate=0.5, num_train_epochs=3)
    assert isinstance(trainer.reference, FrozenReference)
    trainer.train()
    assert_trained(trainer)
    reference = trainer.reference.model
    for name, weight in weights_of(reference).items():
        assert torch.equal(weight, before[name]), name
    assert not reference.training and not any(weight.requires_grad for weight in reference.parameters())
    assert not torch.equal(weights_of(trainer.model)["lm_head.weight"], before["lm_head.weight"])


@pytest.fixture
def paths(tmp_path):
    """A policy and another model with its tokenizer, on disk."""
    for name, model in (("policy", tiny_model(LM)), ("other", moved(tiny_model(LM)))):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / "policy"), str(tmp_path / "other")


def test_policy_and_reference_by_path(tmp_path, paths):
    """A reference that is named and not used gives the KL of another one: 0 at the first step."""
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
    """By default those of the policy; its own replace them."""
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
    """An adapter that is not off, or stays off, trains something else without an error."""
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
    forward.forward = type(forward).forward.__get__(forward)  # not the fused head
    lm_loss, kl_loss = plain_objective(policy, reference, list(trainer.train_dataset))
    expected = gradients(policy, lm_loss + 0.5 * kl_loss)
    assert loss.item() == pytest.approx((lm_loss + 0.5 * kl_loss).item(), rel=1e-5)
    assert kl_loss > 0.1
    assert set(found) == {name for name, weight in trainer.model.named_parameters() if "lora" in name}
    assert_gradients_equal(found, {name: gradient.float() for name, gradient in expected.items()})


# Precomputed states


class InBfloat16:
    """A reference whose states are rounded as those on disk are."""

    def __init__(self, reference: FrozenReference):
        self.reference = reference

    def __call__(self, *args):
        states, head = self.reference(*args)
        return states.bfloat16().to(states.dtype), head


def test_precomputed_states_train_as_the_frozen_copy(tmp_path):
    """States of the wrong sequence, or in another order, are states too: in packed, padded and shuffled batches."""
    rows = random_rows(16)
    for number, options in enumerate(({}, {"packing": True, "max_length": 64, "per_device_train_batch_size": 2})):
        options |= {"num_train_epochs": 2, "learning_rate": 0.5, "train_sampling_strategy": "random"}
        expected = make_kl_trainer(tmp_path / "copy", rows, ref_model=moved(tiny_model(LM)), **options)
        expected.reference = InBfloat16(expected.reference)
        expected.train()
        found = make_kl_trainer(
            tmp_path / f"states{number}", rows, ref_model=moved(tiny_model(LM)), precompute_ref_hidden=True, **options
        )
        found.train()
        assert isinstance(found.reference, PrecomputedReference)
        assert_trained(expected)
        assert_logs_equal(found, expected, rel=1e-3)
        assert_weights_equal(found.model, expected.model, atol=1e-3)


def test_precomputed_states_are_those_of_the_reference_in_bfloat16(tmp_path):
    """Positions that are off by one would be read without an error."""
    reference = moved(tiny_model(LM))
    trainer = make_kl_trainer(
        tmp_path, random_rows(5), ref_model=copy.deepcopy(reference), precompute_ref_hidden=True, max_length=None
    )
    example = trainer.train_dataset[3]
    batch = trainer.data_collator([trainer.train_dataset[1], example])
    start = example["labels"].index(next(label for label in example["labels"] if label != -100))
    with torch.no_grad():
        states = reference.base_model(input_ids=torch.tensor([example["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(
        batch[REF_STATES][-(len(states) - start) :].float(), states[start - 1 : -1], rtol=8e-3, atol=1e-2
    )
    assert batch[REF_STATES].dtype == torch.bfloat16
    assert len(batch[REF_STATES]) == (batch["labels"] != -100).sum()


def test_precomputing_goes_on_where_it_was(tmp_path, monkeypatch):
    """Work that is lost to a kill costs hours at the size of a real model; a half file must not be taken for states."""
    rows = random_rows(12)
    options = {"precompute_ref_hidden": True, "per_device_eval_batch_size": 2, "max_length": None}
    whole = make_kl_trainer(tmp_path / "whole", rows, **options)
    monkeypatch.setattr(ref_hidden, "SHARD_BYTES", 0)  # a file per batch
    written = []
    write = ref_hidden.RefHiddenStore.write

    def write_three(store, states):
        if len(written) == 3:
            (store.folder / ".states-half.safetensors.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(set(states))
        write(store, states)

    monkeypatch.setattr(ref_hidden.RefHiddenStore, "write", write_three)
    with pytest.raises(KeyboardInterrupt):
        make_kl_trainer(tmp_path / "cut", rows, **options)
    assert len(list((tmp_path / "cut" / "ref_hidden").glob("states-*.safetensors"))) == 3

    again = []
    monkeypatch.setattr(
        ref_hidden.RefHiddenStore, "write", lambda store, states: (again.append(set(states)), write(store, states))
    )
    trainer = make_kl_trainer(tmp_path / "cut", rows, **options)
    assert not set.union(*written) & set.union(*again)
    batches = [made.data_collator(list(made.train_dataset)) for made in (whole, trainer)]
    torch.testing.assert_close(batches[0][REF_STATES], batches[1][REF_STATES])


def test_tiles_of_the_language_model_loss(tmp_path, monkeypatch):
    """TRL's own tiles take gigabytes beside a KL term that takes a tenth of it. SFTTrainer's must stay as they are."""
    seen = []
    apply = trainer_utils._ChunkedLogProbFunction.apply
    function = SimpleNamespace(apply=lambda *args: (seen.append(args[5]), apply(*args))[1])
    monkeypatch.setattr(trainer_utils, "_ChunkedLogProbFunction", function)
    for kl_coef in (0.5, 0.0):
        make_kl_trainer(tmp_path, random_rows(2), kl_coef=kl_coef).train()
    assert seen == [LOGITS_PER_TILE, trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE]


def test_states_of_another_reference_or_of_other_data_are_refused(tmp_path):
    """They have the right shape, and would train towards another model."""
    rows = random_rows(6)
    options = {"precompute_ref_hidden": True, "ref_hidden_dir": str(tmp_path / "states")}
    make_kl_trainer(tmp_path, rows, **options)
    with pytest.raises(ValueError, match="states are of another reference model.*Remove the folder"):
        make_kl_trainer(tmp_path, rows, ref_model=moved(tiny_model(LM), 1e-4), **options)
    with pytest.raises(ValueError, match="states are of another data or tokenizer.*Remove the folder"):
        make_kl_trainer(tmp_path, [*rows[:-1], {"prompt": "x", "completion": " y"}], **options)
    with pytest.raises(ValueError, match="states are of another data or tokenizer"):
        make_kl_trainer(tmp_path, rows, completion_only_loss=False, **options)
    trainer = make_kl_trainer(tmp_path, rows, **options)
    with pytest.raises(ValueError, match="no hidden states of the reference for a sequence of"):
        trainer.evaluate(Dataset.from_list(random_rows(3, seed=5)))
    (tmp_path / "states" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="not empty and has no manifest.json"):
        make_kl_trainer(tmp_path, rows, **options)


def test_an_adapter_is_no_part_of_the_reference_that_states_are_of(tmp_path):
    """A restart makes the adapter anew with other weights: the states must still be those of its base model."""
    rows = random_rows(6)
    options = {"precompute_ref_hidden": True, "ref_hidden_dir": str(tmp_path / "states"), "max_length": None}
    for seed in (0, 1):
        peft_config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        trainer = make_kl_trainer(tmp_path, rows, seed=seed, trainer_args={"peft_config": peft_config}, **options)
    plain = make_kl_trainer(tmp_path, rows, precompute_ref_hidden=True, ref_hidden_dir=str(tmp_path / "p"))
    states = [made.data_collator(list(made.train_dataset))[REF_STATES] for made in (trainer, plain)]
    assert torch.equal(*states)


# Evaluation, logs


def test_evaluation_reports_the_kl(tmp_path):
    """Under its own names, and without disturbing the sums of the training steps before it."""
    rows, eval_rows = random_rows(8), random_rows(5, seed=7)
    options = {"num_train_epochs": 4, "learning_rate": 0.5, "logging_steps": 2}
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


def test_the_model_card_names_trainer_and_paper(tmp_path):
    trainer = make_kl_trainer(tmp_path, random_rows(4), save_strategy="epoch")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "2503.13551" in card and "KL self-training" in card


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coef": -0.1}, "`kl_coef` is -0.1, expected 0"),
        ({"kl_coef": float("nan")}, "`kl_coef` is nan"),
        ({"kl_coef": float("inf")}, "`kl_coef` is inf"),
        ({"kl_direction": "backward"}, "`kl_direction` is 'backward', expected one of forward, reverse"),
        ({"kl_scaling": "log"}, "`kl_scaling` is 'log', expected one of log1p, none"),
        ({"kl_reduction": "mean"}, "`kl_reduction` is 'mean', expected one of sum, token_mean"),
        ({"ref_hidden_dir": "states"}, "without `precompute_ref_hidden`"),
        ({"packing": True, "packing_strategy": "wrapped"}, "Use `packing_strategy='bfd'`"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor` is not supported"),
    ],
)
def test_options_that_are_refused(tmp_path, options, message):
    """An option that is out of range or would be ignored says so before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_a_reference_that_is_not_used_is_a_likely_mistake(tmp_path):
    with pytest.warns(UserWarning, match="`kl_coef` is 0: the reference model is not used"):
        KLSelfConfig(str(tmp_path), use_cpu=True, bf16=False, kl_coef=0.0, ref_model="other")


def test_references_that_are_refused(tmp_path, paths):
    """Each trains without an error towards something that means nothing, or is ignored."""
    rows = random_rows(4)
    with pytest.raises(
        ValueError, match="a vocabulary of 270 tokens, the policy one of .* Use a reference of the same"
    ):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM, vocab_size=270))
    with pytest.raises(ValueError, match="Give it once"):
        make_kl_trainer(tmp_path, rows, ref_model=paths[1], config_ref_model=paths[1])
    with pytest.raises(ValueError, match="the same object"):
        model = tiny_model(LM)
        make_kl_trainer(tmp_path, rows, model=model, ref_model=model)
    with pytest.raises(ValueError, match="already instantiated"):
        make_kl_trainer(tmp_path, rows, ref_model=tiny_model(LM), ref_model_init_kwargs={"dtype": "float32"})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="with the adapter off, the policy is the reference"):
        make_kl_trainer(tmp_path, rows, config_ref_model=paths[1], trainer_args={"peft_config": lora})
    with pytest.raises(ValueError, match="with the adapter off, the policy is the reference"):
        make_kl_trainer(tmp_path, rows, model=get_peft_model(tiny_model(LM), lora), ref_model=tiny_model(LM))


def test_a_reference_with_another_tokenizer_is_refused(tmp_path, paths):
    """As many tokens, other words: the KL of distributions over different things."""
    other = make_tokenizer(["zebra quokka llama 0123456789 plus minus\n\n"] * 3, vocab_size=300)
    assert other.get_vocab() != tiny_tokenizer().get_vocab()
    other.save_pretrained(paths[1])
    with pytest.raises(ValueError, match="another tokenizer than the policy: token .* is .* there and .* here"):
        make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1])
    make_kl_trainer(tmp_path, random_rows(4), ref_model=paths[1], kl_coef=0.0)


def test_what_a_kl_term_cannot_do_is_refused(tmp_path):
    """TRL would go on without the term, or without its gradient."""
    rows = random_rows(4)
    with pytest.raises(ValueError, match="`compute_loss_func` is not supported"):
        make_kl_trainer(tmp_path, rows, trainer_args={"compute_loss_func": lambda *args, **kwargs: 0})
    with pytest.raises(TypeError, match="expected a `KLSelfConfig`"):
        KLSelfTrainer(tiny_model(LM), SFTConfig(str(tmp_path), use_cpu=True, bf16=False))
    with pytest.raises(TypeError, match="needs a `datasets.Dataset`, found a `IterableDataset`"):
        stream = IterableDataset.from_generator(lambda: iter(rows))
        make_kl_trainer(tmp_path, stream, precompute_ref_hidden=True, max_steps=1)


def test_a_stream_of_rows_trains_as_a_dataset_does(tmp_path):
    """Sequences of the global batch are counted in the batches, not in a dataset whose length is known."""
    rows = random_rows(8)
    options = {"max_steps": 4, "learning_rate": 0.5, "num_train_epochs": 4}
    expected = make_kl_trainer(tmp_path, rows, **options)
    expected.train()
    found = make_kl_trainer(tmp_path, IterableDataset.from_generator(lambda: iter(rows)), **options)
    found.train()
    assert_trained(expected)
    assert_logs_equal(found, expected)
