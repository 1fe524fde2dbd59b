r"""
Attention masks of forest rows for the attention implementations of transformers.

A query `q` attends to a key `k` if and only if `k <= q < subtree_end[k]` (see [`trl_hrm.forest`]). `"sdpa"` uses a
boolean mask, `"eager"` an additive mask, and `"flex_attention"` a block mask.

On a CPU, `"sdpa"` would compute all L × L scores of a row. [`tree_attention_forward`] computes the same output in
blocks. A block of queries `[a, b)` in depth-first order only needs the path above token `a` and the block itself,
because the subtree of every visible key before `a` includes `a`. A row of 4,096 tokens with paths of 500 tokens costs
as little as rows of 600 tokens, and no L × L mask is created. The tokens up to the first branch of a tree are one causal
sequence, which needs no mask. In training, the keys and masks of all blocks would need
memory that grows with the square of a path's length. The blocks of long rows are therefore computed again in the
backward pass, so that the memory of a path of 32,000 tokens grows only with its length.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .io import shown


TREE_SDPA = "tree_sdpa"
BLOCK_SIZE = 256
LONG_ROW = (
    2048  # above this number of tokens, training recomputes the attention of each block, so that no block is kept
)


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
    layer_types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    unknown = layer_types - {"full_attention", "sliding_attention"}
    if unknown:
        raise ValueError(
            f"{type(config).__name__} has layers of type {sorted(unknown)}, which are recurrent and do not support trees. Use a "
            "model with attention layers only."
        )
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
    recompute = length > LONG_ROW and torch.is_grad_enabled() and query.requires_grad
    rows = []
    for row, limits in enumerate(attention_mask[:, 0]):
        one_row = query[row : row + 1], key[row : row + 1], value[row : row + 1]
        has_window = bool((limits[2] < length).any())
        breaks = (
            torch.nonzero(limits[1, 1:] != limits[1, :-1] + 1).flatten() + 1
        )  # where another branch or tree starts
        ends = torch.cat([breaks, torch.tensor([length])])
        blocks, start = [], 0
        while start < length:
            end = int(ends[torch.searchsorted(ends, start, right=True)])
            if limits[1, start] == 0 and end - start > BLOCK_SIZE and not has_window:
                # From the first token of a tree to its first branch, every token attends to all tokens before it
                trunk = [tensor[:, :, start:end] for tensor in one_row]
                block, _ = sdpa_attention_forward(module, *trunk, None, **kwargs | {"is_causal": True})
            else:
                end = min(start + BLOCK_SIZE, length)
                inputs = module, *one_row, limits, start, end, kwargs
                block = checkpoint(_attend, *inputs, use_reentrant=False) if recompute else _attend(*inputs)
            blocks.append(block)
            start = end
        rows.append(torch.cat(blocks, dim=1))
    return torch.cat(rows), None


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    limits: torch.Tensor,
    start: int,
    stop: int,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    """Return the output of the queries `[start, stop)` of one row. `limits` is the mask of the row."""
    subtree_end, position_ids, windows = limits
    keys = torch.cat([torch.nonzero(subtree_end[:start] > start).flatten(), torch.arange(start, stop)])
    queries = torch.arange(start, stop)[:, None]
    mask = (keys <= queries) & (queries < subtree_end[keys])
    mask &= position_ids[start:stop, None] - position_ids[keys] < windows[keys]
    first = int(keys[0])
    if len(keys) == stop - first:  # no other branch lies between the path and the block
        key, value = key[:, :, first:stop], value[:, :, first:stop]
    else:
        key, value = key.index_select(2, keys), value.index_select(2, keys)
    return sdpa_attention_forward(module, query[:, :, start:stop], key, value, mask[None, None], **kwargs)[0]
