"""The three heads of a step reward model: which model class carries them, and how its outputs are read."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from .step_format import StepFormat


LABEL_NAMES = {0: "wrong", 1: "correct"}


def model_class(step_format: StepFormat):
    """The auto class that loads a model with this head."""
    return AutoModelForCausalLM if step_format.head == "lm" else AutoModelForTokenClassification


def num_labels(step_format: StepFormat) -> int:
    """Outputs of the classifier: 1 for regression, else 2 (0 wrong, 1 correct)."""
    return 1 if step_format.head == "regression" else 2


def check_head(model: PreTrainedModel, step_format: StepFormat) -> None:
    """
    Refuse a model whose outputs do not fit the head.

    Raises:
        `ValueError`: If a token classifier has another number of labels, or if a causal language model has no output
        embeddings, or if a LoRA adapter sits on them.
    """
    if step_format.head == "lm":
        lm_head = model.get_output_embeddings()
        if lm_head is None:
            raise ValueError(
                f'{type(model).__name__} has no output embeddings, but `head="lm"` reads the logits of two tokens. '
                'Load it with `AutoModelForCausalLM`, or use `head="classification"`.'
            )
        if hasattr(lm_head, "base_layer"):
            raise ValueError(
                'A PEFT adapter on the output embeddings is not supported with `head="lm"`: the two token logits are '
                "computed from its weight directly. Remove it from `target_modules`, or put it in `modules_to_save`."
            )
    elif model.config.num_labels != num_labels(step_format):
        raise ValueError(
            f"The model has num_labels={model.config.num_labels}, but head {step_format.head!r} needs "
            f"{num_labels(step_format)}. Load it with `num_labels={num_labels(step_format)}`, or pass its name as a "
            "string to have it done."
        )


@contextmanager
def step_outputs(model: nn.Module, label_token_ids: list[int] | None) -> Iterator[None]:
    """
    Within this context a model's `logits` have the shape `(B, L, C)` of the head.

    A token classifier does so by itself. With `label_token_ids` (`head="lm"`) the output embeddings compute those two
    rows only, so that no logits over the vocabulary are built. The module is still called as a module, so that hooks
    that gather sharded weights around it run.

    Args:
        model (`nn.Module`):
            The model without wrappers of distributed training.
        label_token_ids (`list[int]`, *optional*):
            Ids of the wrong and the correct label token; `None` for token classifiers.
    """
    if label_token_ids is None:
        yield
        return
    lm_head = model.get_output_embeddings()

    def two_rows(hidden: torch.Tensor) -> torch.Tensor:
        bias = None if getattr(lm_head, "bias", None) is None else lm_head.bias[label_token_ids]
        return F.linear(hidden, lm_head.weight[label_token_ids], bias)

    lm_head.forward = two_rows
    try:
        yield
    finally:
        del lm_head.forward


def gather_steps(logits: torch.Tensor, step_positions: torch.Tensor) -> torch.Tensor:
    """Outputs at the step tokens: `(B, L, C)` and flat positions of shape `(...)` to `(..., C)`."""
    return logits.flatten(0, 1)[step_positions]
