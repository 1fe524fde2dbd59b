"""KL divergence between a policy and its reference: per token, per sequence, scaled. No `[T, V]` tensor is made."""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor
from transformers import PretrainedConfig, PreTrainedModel

from ._compat import ChunkedDivergenceFunction, chunked_divergence, trainer_utils, use_triton


# TRL's kernels work on tiles of 4,096 tokens x 32,768 logits. Triton folds them in place; elsewhere each comes with some ten
# temporaries of its size, 0.5 GB each. Narrow ones stay in the processor's cache: half the time, a tenth of the memory.
LOGITS_PER_TILE = 512

DIRECTIONS = {"forward": 0.0, "reverse": 1.0}  # as TRL's kernel calls KL(ref || policy) and KL(policy || ref)
SCALINGS = ("log1p", "none")
REDUCTIONS = ("sum", "token_mean")


class LMHead(NamedTuple):
    """
    What makes logits of last hidden states: `softcap(logit_scale * (hidden @ weight.T + bias))`.

    Args:
        weight (`torch.Tensor`):
            Shape `(V, H)`.
        bias (`torch.Tensor`, *optional*):
            Shape `(V,)`.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Multiplier of the logits.
        softcap (`float`, *optional*):
            If set, logits are `softcap * tanh(logits / softcap)`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "LMHead":
        """The head of a causal language model, gathered if FSDP2 has it in shards."""
        head = model.get_output_embeddings()
        weight, bias = (
            tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in (head.weight, head.bias)
        )
        config = model.config.get_text_config()
        return cls(weight, bias, _logit_scale(config), getattr(config, "final_logit_softcapping", None))


def _logit_scale(config: PretrainedConfig) -> float:
    """The multiplier of the logits, which each family of models calls by another name."""
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
    KL divergence of the next-token distributions of policy and reference, in nats. The gradient flows to the policy.

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
            Last hidden states of the reference at the same tokens, shape `(N, H_ref)`.
        ref_head ([`LMHead`]):
            Head of the reference.
        direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"` or `"reverse"`.

    Returns:
        `torch.Tensor`: Shape `(N,)`, float32.

    Raises:
        `ValueError`: If policy and reference have not the same number of tokens.
    """
    if len(ref_hidden) != len(hidden):
        raise ValueError(
            f"The reference has states of {len(ref_hidden)} tokens, the policy of {len(hidden)}. With precomputed states, a "
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
    """TRL's function with fewer logits in a tile."""

    @staticmethod
    def forward(ctx, *args):
        with patch.object(chunked_divergence, "VOCAB_CHUNK_SIZE", LOGITS_PER_TILE):
            return ChunkedDivergenceFunction.forward(ctx, *args)

    @staticmethod
    def backward(ctx, *grads):
        with patch.object(chunked_divergence, "VOCAB_CHUNK_SIZE", LOGITS_PER_TILE):
            return ChunkedDivergenceFunction.backward(ctx, *grads)


def narrow_lm_head(device: torch.device) -> AbstractContextManager:
    """While a model with TRL's fused LM head is called: the same tiles for its language-model loss."""
    if use_triton(device):
        return nullcontext()
    return patch.object(trainer_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", LOGITS_PER_TILE)


def trained_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Where the next token is trained on, shape `(B, L - 1)` for labels `(B, L)` that ignore tokens as -100."""
    return labels[:, 1:] != -100


def trained_sequences(labels: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
    """
    For each trained token, in row-major order, the number of its sequence. Sequences without a trained token have none.

    Args:
        labels (`torch.Tensor`):
            Labels, -100 where ignored, shape `(B, L)`.
        position_ids (`torch.Tensor`, *optional*):
            Positions, for rows that hold several sequences: each begins at position 0. Shape `(B, L)`. By default a row is a
            sequence.

    Returns:
        `torch.Tensor`: Numbers from 0 without gaps, shape `(N,)`.
    """
    if position_ids is None:
        numbers = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    else:
        numbers = (position_ids == 0).flatten().cumsum(0).view_as(labels)
    return numbers[:, 1:][trained_tokens(labels)].unique(return_inverse=True)[1]


def sequence_kl(kl: torch.Tensor, sequences: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
    """
    KL divergence of each sequence.

    Args:
        kl (`torch.Tensor`):
            Per token, shape `(N,)`.
        sequences (`torch.Tensor`):
            Sequence of each token, from 0 without gaps, shape `(N,)`. See [`trained_sequences`].
        reduction (`str`, *optional*, defaults to `"sum"`):
            `"sum"` over the tokens of the sequence, as in the HRM paper, or their mean: `"token_mean"`.

    Returns:
        `torch.Tensor`: Shape `(S,)`.
    """
    counts = sequences.bincount()
    sums = kl.new_zeros(len(counts)).index_add(0, sequences, kl)
    return sums if reduction == "sum" else sums / counts


def scaled_kl(kl: torch.Tensor, scaling: str = "log1p") -> torch.Tensor:
    r"""
    The term of the objective that a sequence's KL becomes: ln(1 + KL)
    ([HRM](https://huggingface.co/papers/2503.13551), section 3.3), or KL itself with `scaling="none"`. The logarithm scales
    the gradient of KL by 1 / (1 + KL).
    """
    return torch.log1p(kl) if scaling == "log1p" else kl
