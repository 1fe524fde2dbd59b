"""The reference of `KLSelfTrainer` is frozen, in evaluation mode, and has no side effects on the policy."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import set_seed

from trl_hrm.trainer.reference import AdapterOff, FrozenReference

from ..helpers import HEADS, tiny_model, weights_of
from .kl_training import make_kl_trainer, random_rows


ROWS = random_rows(20)
DROPOUT = {"attention_dropout": 0.5}


def policy(adapter: bool | list[str], **config):
    """Return a language model, optionally with an adapter that already changes its output; a list names `modules_to_save`."""
    model = tiny_model(HEADS["lm"], **config)
    if adapter is False:
        return model
    set_seed(0)
    modules_to_save = adapter if isinstance(adapter, list) else None
    model = get_peft_model(model, lora(modules_to_save))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.05 * torch.randn(weight.shape))
    return model


def lora(modules_to_save: list[str] | None = None) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules="all-linear", lora_dropout=0.5, modules_to_save=modules_to_save, task_type="CAUSAL_LM"
    )


def states_of(trainer, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    states, head = trainer.reference(trainer.model, inputs, batch["labels"])
    assert not states.requires_grad
    return torch.cat([states, states @ head.weight.T], dim=1).detach()


@pytest.mark.parametrize("adapter", [False, True, ["lm_head"]])
def test_the_reference_has_no_dropout_and_the_policy_has(tmp_path, adapter):
    """
    Dropout makes the reference a different distribution at each step: the KL never reaches 0, and the policy is pulled
    towards noise. A policy left in evaluation mode or without its adapter after a call trains on without an error.
    """
    trainer = make_kl_trainer(tmp_path, ROWS, policy(adapter, **DROPOUT))
    assert isinstance(trainer.reference, AdapterOff if adapter else FrozenReference)
    trainer.model.train()
    flags = {name: weight.requires_grad for name, weight in trainer.model.named_parameters()}
    modes = {name: module.training for name, module in trainer.model.named_modules()}
    batch = next(iter(trainer.get_train_dataloader()))

    first, second = states_of(trainer, batch), states_of(trainer, batch)
    assert torch.equal(first, second)
    plain = tiny_model(HEADS["lm"]).eval()  # the same weights, without an adapter and without dropout
    hidden = plain.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    hidden = hidden[:, :-1][batch["labels"][:, 1:] != -100]
    torch.testing.assert_close(first, torch.cat([hidden, plain.lm_head(hidden)], dim=1), rtol=0, atol=1e-5)

    assert {name: weight.requires_grad for name, weight in trainer.model.named_parameters()} == flags
    assert {name: module.training for name, module in trainer.model.named_modules()} == modes and all(modes.values())
    outputs = [trainer.model(batch["input_ids"]).logits for _ in range(2)]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    trainer.model.eval()
    outputs = [trainer.model(batch["input_ids"]).logits, plain(batch["input_ids"]).logits]
    assert ((outputs[0] - outputs[1]).abs().max() > 1e-3) == bool(adapter)  # the adapter is on again


@pytest.mark.parametrize("adapter", [False, True, ["lm_head"]])
def test_the_reference_does_not_move(tmp_path, adapter):
    """The reference shares weights with the policy. Training them by mistake would show only as a smaller KL."""
    trainer = make_kl_trainer(tmp_path, ROWS, policy(adapter, **DROPOUT), per_device_train_batch_size=4)
    model = trainer.model if adapter else trainer.reference.model
    before = weights_of(model)
    frozen = {name: before[name] for name, weight in model.named_parameters() if not weight.requires_grad}
    assert len(frozen) == len(weights_of(tiny_model(HEADS["lm"])))
    flags = {name: weight.requires_grad for name, weight in trainer.model.named_parameters()}
    before = weights_of(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 5
    for name, weight in frozen.items():
        assert torch.equal(model.get_parameter(name), weight), name
        assert model.get_parameter(name).grad is None
    after = weights_of(trainer.model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        name for name, trained in flags.items() if trained
    }
    assert {name: weight.requires_grad for name, weight in trainer.model.named_parameters()} == flags
    assert all(module.training for module in trainer.model.modules())
    assert adapter or not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("modules_to_save", "options"),
    [
        (None, {}),
        (None, {"gradient_checkpointing": True}),
        (["lm_head"], {}),
        (["lm_head"], {"packing": True, "max_length": 64}),
    ],
)
def test_adapter_off_equals_a_frozen_copy(tmp_path, modules_to_save, options):
    """If the adapter or a trained module copy stayed on in one layer, the reference would partly follow the policy."""
    trained = []
    for swap in (False, True):
        trainer = make_kl_trainer(
            tmp_path,
            ROWS,
            policy(modules_to_save or True),
            per_device_train_batch_size=4,
            learning_rate=0.3,
            **options,
        )
        reference = FrozenReference(tiny_model(HEADS["lm"]), trainer.accelerator)
        if swap:
            trainer.reference = reference
        trainer.train()
        trained.append(trainer)
    logs = [[log["kl"] for log in trainer.state.log_history if "kl" in log] for trainer in trained]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5) and min(logs[0]) > 0.1
    weights = [weights_of(trainer.model) for trainer in trained]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6, msg=name)


def test_precomputed_states_of_an_adapter_have_the_head_without_it(tmp_path):
    """A pretrained adapter may have its own head. If the reference used that head, the KL would start at 0."""
    logs = []
    for precompute in (False, True):
        trainer = make_kl_trainer(
            tmp_path / str(precompute), ROWS, policy(["lm_head"]), precompute_ref_hidden=precompute
        )
        trainer.train()
        logs.append([log["kl"] for log in trainer.state.log_history if "kl" in log])
    assert logs[1] == pytest.approx(logs[0], rel=0.02) and min(logs[0]) > 0.1


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_uses_the_policy_mixed_precision(tmp_path, adapter):
    """
    With the policy under autocast, an fp32 reference is several times slower on a GPU, and the KL of a policy to itself
    becomes rounding error, which training then tries to undo. Before training, Trainer has not wrapped the policy yet.
    """
    model = tiny_model(HEADS["lm"])
    peft_config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None
    trainer = make_kl_trainer(
        tmp_path, ROWS, model, trainer_args={"peft_config": peft_config}, eval_rows=ROWS, bf16=True, learning_rate=0.0
    )
    with torch.no_grad():
        exact = trainer.model(torch.arange(9)[None]).logits
    assert trainer.evaluate()["eval_kl"] == 0
    trainer.train()
    assert [log["kl"] for log in trainer.state.log_history if "kl" in log] == [0, 0, 0]
    assert (trainer.model_wrapped(torch.arange(9)[None]).logits - exact).abs().max() > 1e-3  # it is mixed precision


@pytest.mark.parametrize("precompute", [False, True])
def test_frozen_weights_of_an_adapter_stay_frozen(tmp_path, precompute):
    """PEFT makes all weights of an adapter trainable when it is turned on again."""
    model = policy(True)
    frozen = {
        name
        for name, weight in model.named_parameters()
        if "lora_A" in name and not weight.requires_grad_(False).requires_grad
    }
    trainer = make_kl_trainer(tmp_path, ROWS, model, eval_rows=ROWS, precompute_ref_hidden=precompute)
    trainer.evaluate()
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert frozen and all(torch.equal(after[name], before[name]) for name in frozen)
    assert any(not torch.equal(after[name], before[name]) for name in after if "lora_B" in name)


def test_prompt_tuning(tmp_path):
    """Learned tokens precede the tokens of the row, so positions without an offset would give the KL of other tokens."""
    set_seed(0)
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    trainer = make_kl_trainer(tmp_path, ROWS, get_peft_model(tiny_model(HEADS["lm"]), config))
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["labels"]
    with torch.no_grad():
        trainer.model.train()
        trainer.compute_loss(trainer.model, dict(batch))
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        base = trainer.model.get_base_model()
        base.forward = type(base).forward.__get__(base)  # turns off the fused head
        reference = tiny_model(HEADS["lm"])(**inputs).logits[:, :-1][labels[:, 1:] != -100].double().log_softmax(-1)
        tuned = trainer.model(**inputs).logits[:, 4:][:, :-1][labels[:, 1:] != -100].double().log_softmax(-1)
    kl = (reference.exp() * (reference - tuned)).sum()
    assert kl > 0.1
    sums = trainer._kl_sums["train"]
    assert (sums[2] / sums[4]).item() == pytest.approx((kl / len(labels)).item(), rel=1e-4)
