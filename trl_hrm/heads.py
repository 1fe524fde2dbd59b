"""The heads of a step reward model: their model classes and outputs."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import TokenClassifierOutput

from .io import shown
from .step_format import StepFormat


LABEL_NAMES = {0: "wrong", 1: "correct"}


def model_class(step_format: StepFormat, config: PreTrainedConfig) -> type:
    """
    Return the class of a model with this head: an auto class, or a class for the heads `"mlp"` and `"value"`.

    Raises:
        `ValueError`: If the architecture does not support the head.
    """
    if step_format.is_causal_lm:
        return AutoModelForCausalLM
    if step_format.head not in ("mlp", "value"):
        return AutoModelForTokenClassification
    mapping, make = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, _value_head_class)
        if step_format.head == "value"
        else (MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING, _two_layer_class)
    )
    base = mapping.get(type(config), None)
    if base is None:
        raise ValueError(
            f"The architecture {shown(config.model_type)} does not support the head {step_format.head!r}. Use a decoder-only "
            "language model, or a different head."
        )
    return make(base)


@cache
def _two_layer_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    Return the class of token classifiers with a hidden layer in the head, as in
    [Qwen2.5-Math-PRM](https://huggingface.co/papers/2501.07301), with the same names of weights (`score.0`, `score.2`).
    """

    class ForProcessRewardModel(base):
        def __init__(self, config: PreTrainedConfig):
            super().__init__(_without_remote_code(config))
            if not isinstance(getattr(self, "score", None), nn.Linear):
                raise ValueError(
                    f"{base.__name__} has no linear layer `score`, so the head 'mlp' is not supported. Use a decoder-only "
                    "language model, or a different head."
                )
            size = self.score.in_features
            self.score = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, config.num_labels))
            self.post_init()

    return _named_after(base, ForProcessRewardModel)


@cache
def _value_head_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    Return the class of causal language models with a value head: one output per token, computed from the last hidden state,
    with the names of weights of TRL's former value-head models (`v_head.summary`). The output embeddings are kept, but not
    used.
    """

    class ForPrmModel(base):
        _keys_to_ignore_on_load_missing = ["lm_head.weight"]  # not used

        def __init__(self, config: PreTrainedConfig):
            super().__init__(_without_remote_code(config))
            self.v_head = nn.ModuleDict({"summary": nn.Linear(config.get_text_config().hidden_size, 1)})
            self.post_init()

        def forward(self, input_ids: torch.Tensor | None = None, **kwargs) -> TokenClassifierOutput:
            hidden = self.base_model(input_ids, **kwargs).last_hidden_state
            return TokenClassifierOutput(logits=self.v_head["summary"](hidden))

    return _named_after(base, ForPrmModel)


def _named_after(base: type[PreTrainedModel], own: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Give a class the name that published checkpoints have in `architectures`, such as `Qwen2ForProcessRewardModel`."""
    own.__name__ = base.__name__.removesuffix("ForTokenClassification").removesuffix("ForCausalLM") + own.__name__
    return own


def _without_remote_code(config: PreTrainedConfig) -> PreTrainedConfig:
    vars(config).pop("auto_map", None)  # names files of remote code, which are not saved with the model
    return config


def check_head(model: PreTrainedModel, step_format: StepFormat) -> None:
    """
    Check that the outputs of a model fit the head.

    Raises:
        `ValueError`: If the model has no such head or the wrong number of labels, or if a causal language model has no
        output embeddings or a PEFT adapter on them.
    """
    head = step_format.head
    if step_format.is_causal_lm:
        lm_head = model.get_output_embeddings()
        if lm_head is None:
            raise ValueError(
                f"{type(model).__name__} has no output embeddings, but `head={head!r}` reads its logits. "
                'Load it with `AutoModelForCausalLM`, or use `head="classification"`.'
            )
        if hasattr(lm_head, "base_layer"):
            raise ValueError(
                f"A PEFT adapter on the output embeddings is not supported with `head={head!r}`, which uses their weight directly "
                "to compute the step logits. Remove them from `target_modules`, or add them to `modules_to_save`."
            )
        return
    module, has_hidden_layer = getattr(model, "score", None), head == "mlp"
    if head == "value":
        fits = hasattr(model, "v_head")
    else:
        fits = isinstance(getattr(module, "original_module", module), nn.Sequential) == has_hidden_layer
        fits = fits and model.get_output_embeddings() is None  # a causal language model has no such head
    if not fits:
        raise ValueError(
            f"{type(model).__name__} does not have the head {head!r}. Pass the model name as a string, so that it is loaded "
            "with this head, or set `head` to the head of the model."
        )
    if head != "value" and model.config.num_labels != step_format.num_labels:
        raise ValueError(
            f"The model has num_labels={model.config.num_labels}, but head {head!r} needs "
            f"{step_format.num_labels}. Load it with `num_labels={step_format.num_labels}`, or pass the model name as a "
            "string."
        )


@contextmanager
def step_outputs(model: nn.Module, step_format: StepFormat, label_token_ids: list[int] | None) -> Iterator[None]:
    """
    Context manager in which the `logits` of a model have the shape `(B, L, C)` of the head.

    Only causal language models are changed: their output embeddings compute the logits of the two label tokens
    (`head="lm"`) or the mean of all logits (`"lm_mean"`) instead of the logits of the whole vocabulary. Hooks of the
    module, which gather sharded weights, still run.

    Args:
        model (`nn.Module`):
            Model without wrappers of distributed training.
        step_format ([`StepFormat`]):
            Step format with the head.
        label_token_ids (`list[int]`, *optional*):
            Ids of the wrong and the correct label token. Required with `head="lm"`.
    """
    if not step_format.is_causal_lm:
        yield
        return
    if step_format.head == "implicit":
        raise ValueError("The head 'implicit' has no output per token. Use `ImplicitPRMTrainer` or `StepScorer`.")
    lm_head = model.get_output_embeddings()

    def label_rows(values: torch.Tensor) -> torch.Tensor:
        return values.mean(0, keepdim=True) if step_format.head == "lm_mean" else values[label_token_ids]

    def few_rows(hidden: torch.Tensor) -> torch.Tensor:
        bias = getattr(lm_head, "bias", None)
        return F.linear(hidden, label_rows(lm_head.weight), None if bias is None else label_rows(bias))

    lm_head.forward = few_rows
    try:
        yield
    finally:
        del lm_head.forward


def gather_steps(logits: torch.Tensor, step_positions: torch.Tensor) -> torch.Tensor:
    """Return the outputs at the step tokens: logits `(B, L, C)` at flat positions `(...)` give `(..., C)`."""
    return logits.flatten(0, 1)[step_positions]
