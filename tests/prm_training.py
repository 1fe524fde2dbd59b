"""
Shared by the tests of `trl_hrm.prm`: a tokenizer with readable ids, chains of steps, a trainer on CPU, and a slow reference
of one optimizer step.
"""

import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_hrm import StepFormat, StepTree
from trl_hrm.prm import PRMConfig, PRMTrainer

from .helpers import WORDS, path_logits, tiny_model, tiny_tokenizer, weights_of


FORMAT = StepFormat(step_separator="\n")
LEARNING_RATE = 0.1
VOCABULARY = ["[PAD]", "[UNK]", "<s>", "\n", ";", "which", "is", "larger", "nine", "ten", "so", "eight"]


@cache
def word_tokenizer(bos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per word of `VOCABULARY`: its position there."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.Split(Regex("\n|;"), "isolated")]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def random_chain(rng: random.Random, prompt: str, labels: tuple[float | None, ...] = (0.0, 1.0)) -> StepTree:
    """Return a chain of one to six steps."""
    steps = [" ".join(rng.choices(WORDS, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6))]
    return StepTree(prompt, steps, [rng.choice(labels) for _ in steps], list(range(-1, len(steps) - 1)))


def rows_of(chains: list[StepTree]) -> Dataset:
    """Return rows in TRL's format, without `parents`. Labels become booleans if all are 0 or 1."""
    hard = all(label in (0, 1) for chain in chains for label in chain.labels)
    return Dataset.from_list(
        [
            {
                "prompt": chain.prompt,
                "completions": chain.completions,
                "labels": [bool(label) for label in chain.labels] if hard else chain.labels,
            }
            for chain in chains
        ]
    )


def prm_config(output_dir, **args) -> PRMConfig:
    """Return a config for CPU in fp32: plain SGD without clipping, logging every step, saving nothing."""
    defaults = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "optim": "sgd",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    return PRMConfig(str(output_dir), **(defaults | args))


def make_prm_trainer(
    output_dir,
    train: Dataset,
    model=None,
    evaluation=None,
    tokenizer=None,
    trainer_class: type[PRMTrainer] = PRMTrainer,
    given: dict | None = None,
    **args,
) -> PRMTrainer:
    """Return a trainer. `given` goes to the trainer, `args` to its config."""
    given = {"model": tiny_model(FORMAT) if model is None else model} | (given or {})
    return trainer_class(
        args=prm_config(output_dir, **args),
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=tokenizer or tiny_tokenizer(),
        **given,
    )


def chains_of(*labels: float) -> list[StepTree]:
    rng = random.Random(1)
    chains = [random_chain(rng, f"{name} 1+2?", labels) for name in "abcdefgh"]
    counts = [len(chain.labels) for chain in chains]
    assert min(counts) == 1 and max(counts) >= 5
    return chains


def slow_losses(model, chains: list[StepTree], smoothing: float = 0.0) -> torch.Tensor:
    """Return the cross entropy of each labelled step. Its prefix goes through the model alone, without padding."""
    losses = []
    for chain in chains:
        for step, logits in path_logits(model, FORMAT, chain).items():
            label = (1 - smoothing) * chain.labels[step] + smoothing / 2
            losses.append(F.cross_entropy(logits, torch.tensor([1 - label, label])))
    return torch.stack(losses)


def slow_step(chains: list[StepTree], **settings) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the weights after one step of SGD."""
    model = tiny_model(FORMAT)
    loss = slow_losses(model, chains, **settings).mean()
    loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight -= LEARNING_RATE * weight.grad
    return loss.item(), weights_of(model)


def assert_one_step(trainer, expected) -> None:
    trainer.train()
    loss, weights = expected
    assert trainer.state.global_step == 1
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, abs=1e-5)
    start = weights_of(tiny_model(FORMAT))
    for name, weight in weights_of(trainer.model).items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-2
