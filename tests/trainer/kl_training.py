"""Shared by the tests of KLSelfTrainer: rows, a trainer, and a slow objective from full logits in float64."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel

from tests.helpers import HEADS, WORDS, tiny_model, tiny_tokenizer, weights_of
from trl_hrm import KLSelfConfig, KLSelfTrainer


LM = HEADS["lm"]


def random_rows(number: int, seed: int = 0, most_words: int = 9) -> list[dict[str, str]]:
    """Return prompts and completions of different lengths."""
    rng = random.Random(seed)
    return [
        {
            "prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 4))),
            "completion": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, most_words))),
        }
        for _ in range(number)
    ]


def moved(model: PreTrainedModel, scale: float = 0.05, seed: int = 1) -> PreTrainedModel:
    """Return a copy with noise on every weight, so that the reference differs from the policy from the first step."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=generator))
    return model


def make_kl_trainer(
    output_dir: str | Path,
    rows: list[dict[str, Any]] | Dataset | IterableDataset,
    model: PreTrainedModel | str | None = None,
    ref_model: PreTrainedModel | str | None = None,
    trainer_class: type[KLSelfTrainer] = KLSelfTrainer,
    eval_rows: list[dict[str, Any]] | dict[str, Dataset] | None = None,
    config_ref_model: str | None = None,
    trainer_args: dict[str, Any] | None = None,
    **args,
) -> KLSelfTrainer:
    """Return a trainer on CPU in fp32: plain SGD without clipping or shuffling, logging every step, saving nothing."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return trainer_class(
        model=tiny_model(LM) if model is None else model,
        args=KLSelfConfig(**(defaults | args), ref_model=config_ref_model),
        ref_model=ref_model,
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=Dataset.from_list(eval_rows) if isinstance(eval_rows, list) else eval_rows,
        **({"processing_class": tiny_tokenizer()} | (trainer_args or {})),
    )


def plain_objective(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    direction: str = "forward",
    scaling: str = "log1p",
    reduction: str = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the LM loss and the mean scaled KL: each sequence alone, without padding, from all logits.

    Rows have `input_ids` and `labels`.
    """
    losses, terms = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            ref_log_probs = reference(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        log_probs = policy(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        kl = torch.zeros((), dtype=log_probs.dtype)
        count = 0
        for i in range(1, len(labels)):
            if labels[i] == -100:
                continue
            p, r = log_probs[i - 1], ref_log_probs[i - 1]
            kl = kl + ((r.exp() * (r - p)).sum() if direction == "forward" else (p.exp() * (p - r)).sum())
            losses.append(-p[labels[i]])
            count += 1
        if count:
            kl = kl / count if reduction == "token_mean" else kl
            terms.append(torch.log(1 + kl) if scaling == "log1p" else kl)
    return torch.stack(losses).mean(), torch.stack(terms).mean()


METRICS = ("loss", "lm_loss", "kl", "kl_per_token", "log_kl", "kl_max")


def logs_of(trainer: KLSelfTrainer) -> list[dict[str, float]]:
    """Return the `METRICS` of each logged step."""
    return [{name: log[name] for name in METRICS} for log in trainer.state.log_history if "lm_loss" in log]


def assert_logs_equal(found: KLSelfTrainer, expected: KLSelfTrainer, rel: float = 1e-5) -> None:
    assert len(logs_of(found)) == len(logs_of(expected)) > 0
    for one, other in zip(logs_of(found), logs_of(expected), strict=True):
        assert one == pytest.approx(other, rel=rel, abs=1e-6)


def assert_weights_equal(found: torch.nn.Module, expected: torch.nn.Module, atol: float = 1e-5) -> None:
    for (name, one), other in zip(weights_of(found).items(), weights_of(expected).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def assert_trained(trainer: KLSelfTrainer) -> None:
    """Check that training changed the weights. Without this, comparing equal weights would prove nothing."""
    assert max(log["kl"] for log in logs_of(trainer)) > 0.1
