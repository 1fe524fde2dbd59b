"""KL divergence between a policy and its reference model, per token and per sequence, without a `[T, V]` tensor."""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

import torch
from accelerate.utils import is_peft_model
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from ._compat import (
    ChunkedDivergenceFunction,
    ChunkedLogProbFunction,
    chunked_divergence,
    maybe_gather_lm_head_ctx,
    trainer_utils,
    use_triton,
)


if TYPE_CHECKING:
    from peft import PeftModel


# TRL's kernels use tiles of 4,096 tokens x 32,768 logits. Without Triton, each tile needs about ten temporary tensors
# of 0.5 GB. Narrow tiles stay in the CPU cache, and take less time and about an eighth of the memory.
LOGITS_PER_TILE = 512

DIRECTIONS = {"forward": 0.0, "reverse": 1.0}  # `beta` of TRL's kernel for KL(ref || policy) and KL(policy || ref)
SCALINGS = ("log1p", "none")
REDUCTIONS = ("sum", "token_mean")


class LMHead(NamedTuple):
    """
    Parameters that map last hidden states to logits: `softcap(logit_scale * (hidden @ weight.T + bias))`.

    Args:
        weight (`torch.Tensor`):
            Shape `(V, H)`.
        bias (`torch.Tensor`, *optional*):
            Shape `(V,)`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap (`float`, *optional*):
            If set, logits are transformed to `softcap * tanh(logits / softcap)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        """Return the head of a causal language model. Weights sharded by FSDP2 are gathered."""
        head = model.get_output_embeddings()
        weight, bias = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (head.weight, head.bias)
        )
        config = model.config.get_text_config()
        return cls(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def causal_lm_of(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """Return the causal language model without its adapter, if it has one."""
    return model.get_base_model() if is_peft_model(model) else model


def _logit_scale(config: PretrainedConfig) -> float:
    """Return the multiplier of the logits, whose name depends on the model family."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)  # Granite and MiniCPM3 divide by it
    if scaling is None:
        return 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


def token_kl(
    hidden: torch.Tensor, head: LMHead, ref_hidden: torch.Tensor, ref_head: LMHead, direction: str = "forward"
) -> torch.Tensor:
    r"""
    Compute the KL divergence of the next-token distributions of policy and reference model, in nats. Only the policy
    gets gradients.

    | direction | value |
    |---|---|
    | `forward` | KL(ref ‖ policy) = Σᵥ r(v)·ln(r(v) / p(v)) |
    | `reverse` | KL(policy ‖ ref) = Σᵥ p(v)·ln(p(v) / r(v)) |

    Args:
        hidden (`torch.Tensor`):
            Last hidden states of the policy, shape `(N, H)`.
        head ([`LMHead`]):
            Head of the policy.
        ref_hidden (`torch.Tensor`):
            Last hidden states of the reference model at the same tokens, shape `(N, H_ref)`.
        ref_head ([`LMHead`]):
            Head of the reference model.
        direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"` or `"reverse"`.

    Returns:
        `torch.Tensor`: Shape `(N,)`, float32.

    Raises:
        `ValueError`: If policy and reference model have different numbers of tokens.
    """
    if len(ref_hidden) != len(hidden):
        raise ValueError(
            f"The reference model has states of {len(ref_hidden)} tokens, but the policy of {len(hidden)}. With precomputed states, the "
            "data collator must not change which tokens are trained on."
        )
    divergence = ChunkedDivergenceFunction if use_triton(hidden.device) else _DivergenceInNarrowTiles
    kl, _ = divergence.apply(
        hidden,
        head.weight,
        head.bias,
        ref_hidden,
        ref_head.weight,
        ref_head.bias,
        DIRECTIONS[direction],
        1.0,  # temperature
        head.logit_scale,
        head.softcap,
        ref_head.logit_scale,
        ref_head.softcap,
    )
    return kl


class _DivergenceInNarrowTiles(ChunkedDivergenceFunction):
    """TRL's function with fewer logits per tile."""

    @staticmethod
    def forward(ctx, *args):
        with patch.object(chunked_divergence, "VOCAB_CHUNK_SIZE", LOGITS_PER_TILE):
            return ChunkedDivergenceFunction.forward(ctx, *args)

    @staticmethod
    def backward(ctx, *grads):
        with patch.object(chunked_divergence, "VOCAB_CHUNK_SIZE", LOGITS_PER_TILE):
            return ChunkedDivergenceFunction.backward(ctx, *grads)


def narrow_lm_head(device: torch.device) -> AbstractContextManager:
    """Context manager that uses the same tiles for the language modeling loss of TRL's fused LM head."""
    if use_triton(device):
        return nullcontext()
    return patch.object(trainer_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", LOGITS_PER_TILE)


def token_log_probs(hidden: torch.Tensor, head: LMHead, targets: torch.Tensor) -> torch.Tensor:
    """
    Compute the log-probabilities of tokens.

    Args:
        hidden (`torch.Tensor`):
            Last hidden states that predict the tokens, shape `(N, H)`.
        head ([`LMHead`]):
            Head of the model.
        targets (`torch.Tensor`):
            Ids of the tokens, shape `(N,)`.

    Returns:
        `torch.Tensor`: Shape `(N,)`, float32, in nats.
    """
    width = trainer_utils._CHUNKED_LOGPROB_CHUNK_SIZE if use_triton(hidden.device) else LOGITS_PER_TILE
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        log_probs, *_ = ChunkedLogProbFunction.apply(
            hidden, head.weight, head.bias, targets, 1.0, width, head.softcap, head.logit_scale, ()
        )
    return log_probs


def trained_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return where the next token is trained on, shape `(B, L - 1)` for labels `(B, L)` with -100 for ignored tokens."""
    return labels[:, 1:] != -100


def trained_sequences(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    Return the sequence index of each trained token, in row-major order. Sequences without a trained token are not
    counted.

    Args:
        labels (`torch.Tensor`):
            Labels with -100 for ignored tokens, shape `(B, L)`.
        position_ids (`torch.Tensor`, *optional*):
            Positions, shape `(B, L)`, for rows with several packed sequences, which each start at position 0. By
            default, each row is one sequence.

    Returns:
        `torch.Tensor`: Indices from 0 without gaps, shape `(N,)`.
    """
    if position_ids is None:
        numbers = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    else:
        numbers = (position_ids == 0).flatten().cumsum(0).view_as(labels)
    return numbers[:, 1:][trained_tokens(labels)].unique(return_inverse=True)[1]


def sequence_kl(kl: torch.Tensor, sequences: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """
    Reduce token KL divergences to one value per sequence.

    Args:
        kl (`torch.Tensor`):
            KL divergence of each token, shape `(N,)`.
        sequences (`torch.Tensor`):
            Sequence index of each token, shape `(N,)`. See [`trained_sequences`].
        reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` over the tokens of the sequence, as in the HRM paper, or `"token_mean"`.

    Returns:
        `torch.Tensor`: Shape `(S,)`.
    """
    counts = sequences.bincount()
    sums = kl.new_zeros(len(counts)).index_add(0, sequences, kl)
    return sums if reduction == "sum" else sums / counts


def scaled_kl(kl: torch.Tensor, scaling: str = "log1p") -> torch.Tensor:
    r"""
    Return the KL term of the objective for each sequence: ln(1 + KL) with `scaling="log1p"`
    ([HRM](https://huggingface.co/papers/2503.13551), section 3.3), or KL with `scaling="none"`. The logarithm scales
    the gradient of KL by 1 / (1 + KL).
    """
    return torch.log1p(kl) if scaling == "log1p" else kl
