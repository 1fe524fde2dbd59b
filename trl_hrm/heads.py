"""The three heads of a step reward model: their model classes and outputs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PreTrainedModel

from .step_format import StepFormat


LABEL_NAMES = {0: "wrong", 1: "correct"}


def model_class(step_format: StepFormat):
    """Return the auto class for a model with this head."""
    return AutoModelForCausalLM if step_format.head == "lm" else AutoModelForTokenClassification


def num_labels(step_format: StepFormat) -> int:
    """Return the number of outputs of the classifier: 1 for regression, otherwise 2 (0 wrong, 1 correct)."""
    return 1 if step_format.head == "regression" else 2


def check_head(model: PreTrainedModel, step_format: StepFormat) -> None:
    """
    Check that the outputs of a model fit the head.

    Raises:
        `ValueError`: If a token classifier has the wrong number of labels, or if a causal language model has no output
        embeddings or a PEFT adapter on them.
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
                'A PEFT adapter on the output embeddings is not supported with `head="lm"`, which uses their weight directly '
                "to compute the two token logits. Remove them from `target_modules`, or add them to `modules_to_save`."
            )
    elif model.config.num_labels != num_labels(step_format):
        raise ValueError(
            f"The model has num_labels={model.config.num_labels}, but head {step_format.head!r} needs "
            f"{num_labels(step_format)}. Load it with `num_labels={num_labels(step_format)}`, or pass the model name as a "
            "string."
        )


@contextmanager
def step_outputs(model: nn.Module, label_token_ids: list[int] | None) -> Iterator[None]:
    """
    Context manager in which the `logits` of a model have the shape `(B, L, C)` of the head.

    Token classifiers are not changed. With `label_token_ids` (`head="lm"`), the output embeddings only compute the
    logits of the two label tokens instead of the whole vocabulary. Hooks of the module, which gather sharded weights,
    still run.

    Args:
        model (`nn.Module`):
            Model without wrappers of distributed training.
        label_token_ids (`list[int]`, *optional*):
            Ids of the wrong and the correct label token. `None` for token classifiers.
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
    """Return the outputs at the step tokens: logits `(B, L, C)` at flat positions `(...)` give `(..., C)`."""
    return logits.flatten(0, 1)[step_positions]
