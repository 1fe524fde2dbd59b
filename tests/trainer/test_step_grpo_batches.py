"""How completions are cut into batches must not matter, where it does not matter in TRL; and RLOO as a setting of the trainer."""

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_hrm import StepGRPOConfig, StepGRPOTrainer

from ..helpers import weights_of
from .step_grpo_planted import GROUP, WEIGHT, make_trainer


TRAINERS = {"GRPOTrainer": (GRPOTrainer, GRPOConfig), "StepGRPOTrainer": (StepGRPOTrainer, StepGRPOConfig)}
KINDS = [
    pytest.param("GRPOTrainer", marks=pytest.mark.slow),
    "StepGRPOTrainer",
]  # what holds for TRL is only the measure


def trained(tmp_path, kind: str, **args) -> dict[str, torch.Tensor]:
    trainer, _ = make_trainer(tmp_path, *TRAINERS[kind], max_steps=3, learning_rate=0.05, **args)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    assert difference(before, after) > 1e-3
    return after


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "bnpo"])
def test_accumulation(tmp_path, kind, loss_type):
    """
    Batches of 8, or 2 micro-batches of 4, or 4 of 2. `bnpo` divides by the tokens of each micro-batch, so there it matters, as in TRL.
    With one micro-batch, TRL needs no old log-probabilities, and with several it does.
    """
    whole, *parts = [
        trained(
            tmp_path,
            kind,
            loss_type=loss_type,
            per_device_train_batch_size=2 * GROUP // accumulation,
            gradient_accumulation_steps=accumulation,
            num_iterations=2,
        )
        for accumulation in (1, 2, 4)
    ]
    for part in parts:
        assert (difference(whole, part) < 1e-6) == (loss_type != "bnpo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_several_optimizer_steps_per_generation(tmp_path, kind, loss_type):
    """16 completions are sampled at once, for two optimizer steps."""
    whole, parts = [
        trained(
            tmp_path,
            kind,
            loss_type=loss_type,
            per_device_train_batch_size=2 * GROUP // accumulation,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=2 * accumulation,
        )
        for accumulation in (1, 2)
    ]
    assert difference(whole, parts) < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_outcome_credit_is_grpo_with_one_more_reward(tmp_path, beta):
    expected = trained(tmp_path, "GRPOTrainer", reward_weights=[1.0, WEIGHT], beta=beta, num_iterations=2)
    found = trained(tmp_path, "StepGRPOTrainer", step_credit="outcome", beta=beta, num_iterations=2)
    assert difference(found, expected) == 0


def gradient(tmp_path, trainer_class, config_class, **args) -> dict[str, torch.Tensor]:
    trainer, recorder = make_trainer(tmp_path, trainer_class, config_class, max_steps=1, beta=0.0, **args)
    trainer.train()
    return recorder.gradients[0]


RLOO = {"loss_type": "luspo", "scale_rewards": "none", "step_credit": "outcome"}


def test_rloo(tmp_path):
    """
    RLOO's baseline leaves the completion itself out, so its advantages are G / (G - 1) times the distance from the mean of the
    group, and its loss adds the tokens of a completion up.
    """
    expected = gradient(tmp_path, RLOOTrainer, RLOOConfig, reward_weights=[1.0, WEIGHT])
    found = gradient(tmp_path, StepGRPOTrainer, StepGRPOConfig, **RLOO)
    factor = GROUP / (GROUP - 1)
    weighted = {"reward_weights": [factor], "step_reward_weight": factor * WEIGHT}
    exact = gradient(tmp_path, StepGRPOTrainer, StepGRPOConfig, **RLOO, **weighted)
    largest = max(one.abs().max().item() for one in expected.values())
    assert largest > 1e-2
    for name in expected:
        torch.testing.assert_close(found[name] * factor, expected[name], rtol=0, atol=1e-6 * largest)
        torch.testing.assert_close(exact[name], expected[name], rtol=0, atol=1e-6 * largest)


@pytest.mark.parametrize("change", [{"loss_type": "dr_grpo"}, {"scale_rewards": "group"}, {"step_credit": "min_form"}])
def test_other_settings_are_not_rloo(tmp_path, change):
    """Otherwise the test above would show nothing."""
    expected = gradient(tmp_path, RLOOTrainer, RLOOConfig, reward_weights=[1.0, WEIGHT])
    found = gradient(tmp_path, StepGRPOTrainer, StepGRPOConfig, **(RLOO | change))
    assert max((found[name] - expected[name]).abs().max() for name in found) > 1e-2
