"""Shared by the tests of implicit rewards: checkpoints, a trainer, and slow rewards from full logits in float64."""

import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel

from trl_hrm import ImplicitPRMConfig, ImplicitPRMTrainer, StepFormat, StepTree

from .helpers import HEADS, make_trainer, tiny_model, tiny_tokenizer
from .trainer.kl_training import moved


LM = HEADS["lm"]
BETA = 0.5  # large, so that differences show


def save_models(folder: Path) -> tuple[str, str]:
    """Save a policy and another model as its reference, each with a tokenizer."""
    for name, model in (("policy", moved(tiny_model(LM))), ("reference", tiny_model(LM))):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    return str(folder / "policy"), str(folder / "reference")


def implicit_trainer(output_dir: str | Path, train, model: str | PreTrainedModel, **args) -> ImplicitPRMTrainer:
    """Return a trainer on CPU in fp32. See [`make_trainer`]."""
    defaults = {"beta": BETA, "trainer_class": ImplicitPRMTrainer, "config_class": ImplicitPRMConfig}
    return make_trainer(output_dir, train, model, **(defaults | args))


def slow_ratios(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    step_format: StepFormat,
    tree: StepTree,
    step: int,
    tokenizer=None,
) -> list[torch.Tensor]:
    """
    Return the log-ratios of the tokens of each step on the path to a step: the path goes through both models alone, as a plain
    sequence, with all logits. For float64, pass models in float64.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    prompt_ids, step_ids = step_format.encode(tokenizer, tree.prompt, [tree.completions[i] for i in tree.path(step)])
    ids = torch.tensor([prompt_ids + [token for ids in step_ids for token in ids]])
    with torch.no_grad():
        ref_log_probs = reference(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    log_probs = policy(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    ratios = (log_probs - ref_log_probs)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    ratios = torch.cat([ratios.new_zeros(1), ratios])  # the first token is not predicted
    return list(ratios[len(prompt_ids) :].split([len(ids) for ids in step_ids]))


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    return copy.deepcopy(model).double()
