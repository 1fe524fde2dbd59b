"""The reference model of a KL term: a frozen copy, or the policy with its adapter off."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .._compat import ForwardRedirection, create_model_from_path, get_config_model_id, prepare_deepspeed, prepare_fsdp
from ..kl import LMHead, trained_tokens
from .kl_self_config import KLSelfConfig


if TYPE_CHECKING:
    from peft import PeftModel


def causal_lm_of(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The causal language model in an adapter, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def _last_hidden_states(model: "PreTrainedModel | PeftModel", inputs: dict[str, Any]) -> torch.Tensor:
    return causal_lm_of(model).base_model(**inputs, use_cache=False).last_hidden_state


@contextmanager
def without_adapter(model: "PeftModel") -> Iterator[None]:
    """The model with its adapter off, in evaluation mode. After it, all modules and weights are in the modes they were in."""
    training = [module for module in model.modules() if module.training]
    trained = {weight: weight.requires_grad for weight in model.parameters()}
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True
        for weight, flag in trained.items():  # PEFT sets those of the adapter
            weight.requires_grad_(flag)


class FrozenReference:
    """
    A reference model of its own, in evaluation mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        accelerator ([`~accelerate.Accelerator`]):
            Places it, and shards it where ZeRO-3 or FSDP shard the policy.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(model, accelerator)
        else:
            # Not `prepare_model`: once the accelerator has a model, Trainer takes the policy of an evaluation before
            # training for prepared, and that one has no mixed precision then
            self.model = model if accelerator.verify_device_map(model) else model.to(accelerator.device)
        self._accelerator = accelerator

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """
        Hidden states of the reference at the trained tokens, and its head.

        Args:
            policy (`torch.nn.Module`):
                The policy as it is wrapped for training. Not used here.
            inputs (`dict[str, Any]`):
                Inputs of the model, without labels.
            labels (`torch.Tensor`):
                Labels, shape `(B, L)`.

        Returns:
            `tuple[torch.Tensor, LMHead]`: States of shape `(N, H)`, in row-major order, and the head.
        """
        model = self._accelerator.unwrap_model(self.model)
        with self._accelerator.autocast():  # as the policy's forward, which accelerate wraps
            states = ForwardRedirection()(self.model, model, _last_hidden_states, model, inputs)
        return states[:, :-1][trained_tokens(labels)], LMHead.of(model)


class AdapterOff:
    """The policy with its adapter off: what it was before training, without a second model in memory."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """See [`FrozenReference`]."""
        model = self._accelerator.unwrap_model(policy)
        with without_adapter(model), self._accelerator.autocast():
            states = ForwardRedirection()(policy, model, _last_hidden_states, model, inputs)
            return states[:, :-1][trained_tokens(labels)], LMHead.of(causal_lm_of(model))


def copy_of(model: str | PreTrainedModel, args: KLSelfConfig) -> PreTrainedModel:
    """
    The model once more, as it was given to the trainer.

    Raises:
        `ValueError`: If the model is sharded by ZeRO-3 already and has no name to load it by, or if there are arguments for
            loading and nothing is loaded.
    """
    if isinstance(model, str):
        return load_reference(model, args, is_policy=True)
    if not any(hasattr(weight, "ds_id") for weight in model.parameters()):
        if args.ref_model_init_kwargs is not None:
            raise ValueError(
                "`ref_model_init_kwargs` was given, and the reference is a copy of the model that was passed. Pass a "
                "`ref_model` by name, or remove `ref_model_init_kwargs`."
            )
        return copy.deepcopy(model)
    name = get_config_model_id(model.config)
    if not name:
        raise ValueError(
            "The model is sharded by ZeRO-3 already and has no name to load a reference from. Pass the model's name or "
            "path as a string, or a `ref_model`."
        )
    return load_reference(name, args, is_policy=True)


def load_reference(name: str, args: KLSelfConfig, is_policy: bool = False) -> PreTrainedModel:
    """The causal language model of that name or path, with `args.ref_model_init_kwargs`, else with those of the policy."""
    kwargs = {"trust_remote_code": args.trust_remote_code}
    if args.ref_model_init_kwargs is not None:
        kwargs |= args.ref_model_init_kwargs
    else:
        kwargs |= args.model_init_kwargs or {}
        if not is_policy:
            kwargs.pop("revision", None)  # which another model does not have
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None
    return create_model_from_path(name, **kwargs)


def check_vocabulary(reference: PreTrainedModel, policy: PreTrainedModel) -> None:
    """
    Refuse a reference whose distributions have another number of tokens than those of the policy.

    Raises:
        `ValueError`: If the vocabularies differ in size.
    """
    found, expected = (model.config.get_text_config().vocab_size for model in (reference, policy))
    if found != expected:
        name = get_config_model_id(reference.config) or "the reference model"
        raise ValueError(
            f"{name}: the reference has a vocabulary of {found} tokens, the policy one of {expected}. Their distributions "
            "have no divergence. Use a reference of the same family; if the policy was resized (`chat_template_path` adds "
            "tokens), resize the reference in the same way and pass it as `ref_model`."
        )


def check_tokenizer(reference: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: KLSelfConfig) -> None:
    """
    Refuse a reference whose tokens are others than those of the policy, where its tokenizer lies beside it: in the folder or
    repository of a name, or in the folder that a model was loaded from.

    Raises:
        `ValueError`: If the tokenizers have other tokens.
    """
    name = reference if isinstance(reference, str) else get_config_model_id(reference.config)
    if not isinstance(reference, str) and not (name and Path(name).is_dir()):
        return  # nothing to look at, or on the Hub, which was not asked for anything
    revision = (args.ref_model_init_kwargs or {}).get("revision")
    place = cached_file(name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if place is None:
        return
    beside = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    known, expected = beside.get_vocab(), tokenizer.get_vocab()
    for token in sorted(known.keys() | expected.keys()):
        if known.get(token) != expected.get(token):
            raise ValueError(
                f"{name}: the reference has another tokenizer than the policy: token {token!r} is {known.get(token)} there "
                f"and {expected.get(token)} here. Use a reference that was trained with the policy's tokenizer."
            )
