r"""
Attention masks of forest rows for the attention implementations of transformers.

A query `q` attends to a key `k` if and only if `k <= q < subtree_end[k]` (see [`trl_hrm.forest`]). `"sdpa"` uses a
boolean mask, `"eager"` an additive mask, and `"flex_attention"` a block mask.

On a CPU, `"sdpa"` would compute all L × L scores of a row. [`tree_attention_forward`] computes the same output in
blocks. A block of queries `[a, b)` in depth-first order only needs the path above token `a` and the block itself,
because the subtree of every visible key before `a` includes `a`. A row of 4,096 tokens with paths of 500 tokens costs
as little as rows of 600 tokens, and no L × L mask is created. The tokens up to the first branch of a tree are one causal
sequence, which needs no mask. The masks of all blocks are made once for all layers, if they are small. For long
paths, their size and the copied keys would grow with the square of a path's length. There, each mask is only made when
it is needed, and blocks are computed again in the backward pass, so that the memory of a path of 32,000 tokens grows only
with its length.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .io import shown


TREE_SDPA = "tree_sdpa"
BLOCK_SIZE = 256
# Training recomputes the attention of the blocks of a row, so that their keys are not kept, if the row has more than LONG_ROW
# tokens and its blocks have more than KEPT_KEYS times as many keys
LONG_ROW = 2048
KEPT_KEYS = 4
KEPT_MASK_SIZE = (
    2**24
)  # number of elements of all masks of a forward pass (64 MiB in float32) up to which all layers share them


def visibility_mask(
    subtree_end: torch.Tensor, position_ids: torch.Tensor | None = None, window: int | None = None
) -> torch.Tensor:
    """
    Return which keys each query attends to: `k <= q < subtree_end[k]`, and within `window` positions if given.

    Args:
        subtree_end (`torch.Tensor`):
            Shape `(B, L)`.
        position_ids (`torch.Tensor`, *optional*):
            Shape `(B, L)`. Required with `window`.
        window (`int`, *optional*):
            Size of the sliding window along the path: a query attends to itself and the `window - 1` tokens above it.

    Returns:
        `torch.Tensor`: Boolean mask of queries and keys, shape `(B, 1, L, L)`.
    """
    index = torch.arange(subtree_end.shape[-1], device=subtree_end.device)
    query, key = index[:, None], index[None, :]
    mask = (key <= query) & (query < subtree_end[:, None, None, :])
    if window is not None:
        mask &= (position_ids[:, None, :, None] - position_ids[:, None, None, :]) < window
    return mask


def attention_mask(
    subtree_end: torch.Tensor,
    implementation: str,
    dtype: torch.dtype,
    position_ids: torch.Tensor | None = None,
    window: int | None = None,
):
    """
    Return the tree mask for an attention implementation of transformers.

    Args:
        subtree_end (`torch.Tensor`):
            Shape `(B, L)`.
        implementation (`str`):
            `"sdpa"` (boolean mask), `"eager"` (additive mask, because a boolean mask would be added as 0 and 1),
            `"flex_attention"` (block mask) or `"tree_sdpa"` (see [`tree_row_mask`]).
        dtype (`torch.dtype`):
            Dtype of the additive mask.
        position_ids (`torch.Tensor`, *optional*), window (`int`, *optional*):
            See [`visibility_mask`].

    Returns:
        `torch.Tensor` of shape `(B, 1, L, L)`, or [`~torch.nn.attention.flex_attention.BlockMask`].

    Raises:
        `ValueError`: If the implementation does not support tree masks.
    """
    check_attention(implementation)
    if implementation == "flex_attention":
        return _block_mask(subtree_end, position_ids, window)
    if implementation == TREE_SDPA:
        return tree_row_mask(subtree_end, position_ids, window)
    mask = visibility_mask(subtree_end, position_ids, window)
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def check_attention(implementation: str) -> None:
    """Raise `ValueError` for an attention implementation without custom masks, such as flash attention."""
    if implementation not in ("sdpa", "eager", "flex_attention", TREE_SDPA):
        raise ValueError(
            f"attn_implementation {shown(implementation)} does not support tree masks. Use 'flex_attention' (GPU) or 'sdpa', or "
            "train on one sequence per path with `shared_prefix=False`."
        )


def check_layer_types(config) -> set[str]:
    """
    Return the layer types of a model. Raise `ValueError` if one, such as a recurrent layer, ignores which tokens of a row belong to
    other branches or other sequences. A nested config of a multimodal model has the layer types in its text config.
    """
    text = config.get_text_config()
    # GPT-Neo has `attention_layers`. Its "local" layers count their window over the row, not over the path
    layer_types = set(getattr(text, "layer_types", None) or getattr(text, "attention_layers", None) or ())
    unknown = layer_types - {"full_attention", "sliding_attention", "global"}
    if unknown:
        raise ValueError(
            f"{type(config).__name__} has layers of type {sorted(unknown)}, in which the branches of a tree and the sequences of a packed "
            "row would change each other. Use a model whose layers are all full or sliding attention."
        )
    return layer_types


def check_model(model: PreTrainedModel) -> None:
    """
    Raise `ValueError` for a model in which the branches of a tree and the sequences of a packed row would change each other, or steps
    would be scored without the steps after them that they were trained with.

    The model must take `position_ids`, which ALiBi ignores, its attention must be causal, and see [`check_layer_types`].
    """
    config = model.config
    check_layer_types(config)
    inner = getattr(model, "_orig_mod", model)  # of a compiled model
    inner = inner.get_base_model() if is_peft_model(inner) else inner
    name, reason = type(inner).__name__, None
    # Classes of this package pass what they get on to the class that they extend
    forwards = [kind.forward for kind in type(inner).__mro__ if "forward" in vars(kind)]
    if not any("position_ids" in inspect.signature(forward).parameters for forward in forwards):
        reason = "takes no `position_ids`"
    elif getattr(config, "alibi", False):
        reason = "has ALiBi instead of `position_ids`"
    elif not is_causal(inner):
        reason = "is not causal, or does not say so: in encoders, each token attends to later ones"
    if reason:
        raise ValueError(
            f"{name} {reason}, so the branches of a tree and the sequences of a packed row would change each other. Use a causal model "
            "with position ids, such as Qwen2, or train on single sequences with PRMTrainer."
        )


def is_causal(model: torch.nn.Module) -> bool:
    """
    Return whether the model is causal, by the attribute `is_causal` of its layers. Many encoders, such as DeBERTa, do not set it, so a model
    without it counts as causal only if it can generate. In multimodal models, only the image encoders are not causal.
    """
    flags = [one.is_causal for one in model.modules() if isinstance(getattr(one, "is_causal", None), bool)]
    if not flags:
        return not isinstance(model, PreTrainedModel) or model.can_generate()
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return all(flags)
    return any(flags) and not config.is_encoder_decoder


def _block_mask(subtree_end: torch.Tensor, position_ids: torch.Tensor | None, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    def may_see(batch, head, query, key):
        mask = (key <= query) & (query < subtree_end[batch, key])
        if window is not None:
            mask = mask & (position_ids[batch, query] - position_ids[batch, key] < window)
        return mask

    batch_size, length = subtree_end.shape
    return create_block_mask(may_see, batch_size, None, length, length, device=subtree_end.device)


def model_inputs(
    input_ids: torch.Tensor, position_ids: torch.Tensor, subtree_end: torch.Tensor, config, dtype: torch.dtype
) -> dict:
    """
    Return the keyword arguments for a forward pass over forest rows, in training and scoring.

    Args:
        input_ids, position_ids, subtree_end (`torch.Tensor`):
            Shape `(B, L)` each.
        config ([`~transformers.PreTrainedConfig`]):
            Configuration of the model, with its attention implementation and sliding window.
        dtype (`torch.dtype`):
            Dtype of the model.

    Raises:
        `ValueError`: If the attention implementation or a layer type does not support trees.
    """
    implementation = config._attn_implementation
    layer_types, window = check_layer_types(config), getattr(config.get_text_config(), "sliding_window", None)
    if layer_types:
        windows = {kind: window if kind == "sliding_attention" else None for kind in sorted(layer_types)}
        masks = {
            kind: attention_mask(subtree_end, implementation, dtype, position_ids, size)
            for kind, size in windows.items()
        }
        # transformers uses a dict of masks unchanged, and a single mask for all layers
        mask = masks if len(masks) > 1 else next(iter(masks.values()))
    else:
        mask = attention_mask(subtree_end, implementation, dtype, position_ids, window)
    # The cache is never used, and would make transformers shift positions
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask, "use_cache": False}


def use_tree_attention(model: PreTrainedModel, device: torch.device) -> None:
    """
    Switch a model with `"sdpa"` attention on a CPU to [`tree_attention_forward`]. Other models are not changed.

    Inputs other than forest rows still use `"sdpa"` with the same masks. On a GPU, use `"flex_attention"`, which skips
    masked blocks in one kernel.
    """
    if model.config._attn_implementation == "sdpa" and device.type == "cpu":
        AttentionInterface.register(TREE_SDPA, tree_attention_forward)
        AttentionMaskInterface.register(TREE_SDPA, sdpa_mask)
        model.set_attn_implementation(TREE_SDPA)


def tree_row_mask(subtree_end: torch.Tensor, position_ids: torch.Tensor, window: int | None = None) -> torch.Tensor:
    """
    Return the mask for [`tree_attention_forward`]: both tensors of shape `(B, L)` and the window, stacked to shape
    `(B, 1, 3, L)`, int64. The window is part of the mask because some models (Qwen2-MoE, Phi-MoE) do not pass it to
    the attention function.
    """
    windows = torch.full_like(position_ids, torch.iinfo(torch.long).max if window is None else window)
    return torch.stack([subtree_end, position_ids, windows], dim=1)[:, None]


@dataclass(frozen=True)
class _Block:
    """
    Queries `[start, stop)` of a row and the keys that they attend to, ascending. `keys` is `None` if the block is the start of a
    tree up to its first branch, which only needs causal attention.
    """

    start: int
    stop: int
    keys: torch.Tensor | None


def _blocks(limits: torch.Tensor) -> Iterator[_Block]:
    """Yield the blocks of one row. `limits` is its mask, from [`tree_row_mask`]."""
    subtree_end, position_ids, windows = limits
    length = len(subtree_end)
    has_window = bool((windows < length).any())
    breaks = torch.nonzero(position_ids[1:] != position_ids[:-1] + 1).flatten() + 1  # another branch or tree starts
    ends = torch.cat([breaks, torch.tensor([length])])
    start = 0
    while start < length:
        stop = int(ends[torch.searchsorted(ends, start, right=True)])
        if position_ids[start] == 0 and stop - start > BLOCK_SIZE and not has_window:
            yield _Block(start, stop, None)
        else:
            stop = min(start + BLOCK_SIZE, length)
            path = torch.nonzero(subtree_end[:start] > start).flatten()
            yield _Block(start, stop, torch.cat([path, torch.arange(start, stop)]))
        start = stop


def _block_bias(block: _Block, limits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask of a block, shape `(1, 1, queries, keys)`: 0, or -inf where a query does not attend to a key."""
    subtree_end, position_ids, windows = limits
    queries = torch.arange(block.start, block.stop)[:, None]
    bias = torch.zeros(len(queries), len(block.keys), dtype=dtype)
    # All queries attend to the keys before the block whose subtree does not end in it, which are most of them
    ends = subtree_end[block.keys]
    some = torch.nonzero((block.keys >= block.start) | (ends < block.stop)).flatten()
    hidden = (block.keys[some] > queries) | (queries >= ends[some])
    bias[:, some] = bias[:, some].masked_fill_(hidden, -torch.inf)
    if (windows < len(windows)).any():
        distance = position_ids[block.start : block.stop, None] - position_ids[block.keys]
        bias.masked_fill_(distance >= windows[block.keys], -torch.inf)
    return bias[None, None]


def _blocks_and_biases(
    attention_mask: torch.Tensor, dtype: torch.dtype
) -> list[list[tuple[_Block, torch.Tensor | None]]]:
    """
    Return the blocks of each row and their additive masks, which are `None` for blocks without one and if they are large.

    They are kept on the mask, which all layers of a forward pass share.
    """
    found = getattr(attention_mask, "_blocks_and_biases", None)
    if found is not None and found[0] == dtype:
        return found[1]
    rows = [list(_blocks(limits)) for limits in attention_mask[:, 0]]
    size = sum((one.stop - one.start) * len(one.keys) for row in rows for one in row if one.keys is not None)
    is_kept = size <= KEPT_MASK_SIZE
    blocks = [
        [(one, _block_bias(one, limits, dtype) if is_kept and one.keys is not None else None) for one in row]
        for row, limits in zip(rows, attention_mask[:, 0], strict=True)
    ]
    attention_mask._blocks_and_biases = dtype, blocks
    return blocks


def tree_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention function for the attention interface of transformers.

    Args:
        module (`torch.nn.Module`):
            Attention layer.
        query, key, value (`torch.Tensor`):
            Shape `(B, heads, L, head_dim)`. Key and value may have fewer heads.
        attention_mask (`torch.Tensor`, *optional*):
            Mask from [`tree_row_mask`] for forest rows. With any other mask, or without one, `"sdpa"` is used.
        kwargs:
            Passed to the `"sdpa"` attention of transformers.

    Returns:
        `tuple[torch.Tensor, None]`: Output of shape `(B, L, heads, head_dim)`, and no weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.long:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length = query.shape[2]
    is_training = torch.is_grad_enabled() and query.requires_grad
    rows = []
    for row, blocks in enumerate(_blocks_and_biases(attention_mask, query.dtype)):
        one_row = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        num_keys = sum(len(block.keys) for block, _ in blocks if block.keys is not None)
        recompute = is_training and length > LONG_ROW and num_keys > KEPT_KEYS * length
        outputs = []
        for block, bias in blocks:
            if block.keys is None:
                trunk = [tensor[:, :, block.start : block.stop] for tensor in one_row]
                output, _ = sdpa_attention_forward(module, *trunk, None, **kwargs | {"is_causal": True})
            else:
                inputs = module, *one_row, block, bias, attention_mask[row, 0], kwargs
                output = checkpoint(_attend, *inputs, use_reentrant=False) if recompute else _attend(*inputs)
            outputs.append(output)
        rows.append(torch.cat(outputs, dim=1))
    return torch.cat(rows), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block: _Block,
    bias: torch.Tensor | None,
    limits: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Return the output of the queries of a block of one row. `limits` is the mask of the row."""
    if bias is None:
        bias = _block_bias(block, limits, query.dtype)
    first = int(block.keys[0])
    if len(block.keys) == block.stop - first:  # no other branch lies between the path and the block
        key, value = key[:, :, first : block.stop], value[:, :, first : block.stop]
    else:
        key, value = key.index_select(2, block.keys), value.index_select(2, block.keys)
    return sdpa_attention_forward(module, query[:, :, block.start : block.stop], key, value, bias, **kwargs)[0]
