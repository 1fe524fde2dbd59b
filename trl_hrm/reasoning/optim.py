"""Optimizers of the reasoning models: Adam-atan2, and sign descent on the rows of the puzzle embedding that a batch uses."""

from collections.abc import Callable
from typing import Any

import torch


BIAS_CORRECTIONS = ("outside", "inside")


def sign_step_(
    table: torch.Tensor,
    ids: torch.Tensor,
    gradients: torch.Tensor,
    lr: float,
    weight_decay: float = 0.0,
    frozen_id: int | None = None,
) -> None:
    r"""
    Update the rows of an embedding that a batch uses, in place (HRM, arXiv 2506.21734):

    $$ p_i \leftarrow p_i (1 - \eta \lambda) - \eta \operatorname{sign}\Big(\sum_{b: i_b = i} g_b\Big) $$

    Rows that are not in the batch do not change, not even by weight decay.

    Args:
        table (`torch.Tensor`):
            Embedding, shape `(rows, d)`.
        ids (`torch.Tensor`):
            Row of each entry of the batch, shape `(B,)`. Rows may occur more than once.
        gradients (`torch.Tensor`):
            Gradient with respect to each entry, shape `(B, d)`. The gradients of a row are summed before the sign is taken.
        lr (`float`):
            Learning rate η.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay λ.
        frozen_id (`int`, *optional*):
            Row that never changes: the blank id of puzzles without an id.
    """
    rows, places = ids.unique(return_inverse=True)
    sums = gradients.new_zeros(len(rows), table.shape[1], dtype=torch.float32)
    sums.index_add_(0, places, gradients.float())
    if frozen_id is not None:
        kept = rows != frozen_id
        rows, sums = rows[kept], sums[kept]
    table[rows] = (table[rows] * (1 - lr * weight_decay) - lr * sums.sign()).to(table.dtype)


class _WithSignRows:
    """
    Mixin for optimizers that also update embeddings by [`sign_step_`].

    A parameter group with `sign_rows=True` has one embedding, and optionally a `frozen_id`. The gradients of its rows are not in
    `table.grad`, which would be as large as the embedding. They are set with `set_row_gradients` before each step.
    """

    _rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def set_row_gradients(self, ids: torch.Tensor, gradients: torch.Tensor) -> None:
        """Set the rows `(B,)` that the next step updates, and the gradient of each, shape `(B, d)`."""
        self._rows = (ids, gradients)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        for group in self.param_groups:
            if group.get("sign_rows") and self._rows is not None:
                [table] = group["params"]
                sign_step_(table, *self._rows, group["lr"], group["weight_decay"], group.get("frozen_id"))
        self._rows = None
        return super().step(closure)


class _AdamAtan2(torch.optim.Optimizer):
    # Apart from `AdamAtan2`, so that the mixin can call this step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[torch.Tensor]] = {}  # parameters that got gradients equally often
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = 0
                    state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                    state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] += 1
                by_step.setdefault(state["step"], []).append(p)
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for step, params in by_step.items():
                grads = [p.grad for p in params]
                m = [self.state[p]["exp_avg"] for p in params]
                v = [self.state[p]["exp_avg_sq"] for p in params]
                torch._foreach_lerp_(m, grads, 1 - beta1)
                torch._foreach_mul_(v, beta2)
                torch._foreach_addcmul_(v, grads, grads, 1 - beta2)
                correction1, correction2 = 1 - beta1**step, (1 - beta2**step) ** 0.5
                size = lr * group["scale"]
                updates = torch._foreach_sqrt(v)
                if group["bias_correction"] == "outside":
                    torch._foreach_div_(updates, correction2)
                    size /= correction1
                else:  # atan2(m / c1, √v / c2) = atan2(m, √v · c1 / c2)
                    torch._foreach_mul_(updates, correction1 / correction2)
                for first, update in zip(m, updates, strict=True):
                    torch.atan2(first, update, out=update)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-size)
        return loss


class AdamAtan2(_WithSignRows, _AdamAtan2):
    r"""
    Adam with atan2 instead of a division, and decoupled weight decay (HRM, arXiv 2506.21734):

    $$ p \leftarrow p (1 - \eta \lambda) - \frac{s\,\eta}{1 - \beta_1^t} \operatorname{atan2}\left(m, \sqrt{v / (1 - \beta_2^t)}\right) $$

    It needs no epsilon, and the update does not depend on the scale of the gradients. HRM and TRM were trained with
    the CUDA kernel `adam-atan2`, which computes this formula. With `bias_correction="inside"`, the first moment is corrected inside of
    atan2. If `scale` is also 1.27, the updates are the same as in `adam-atan2-pytorch`, whose steps are 27 % longer.

    Args:
        params (`Iterable`):
            Parameters or parameter groups. A group with `sign_rows=True` has one embedding, whose rows are updated by
            [`sign_step_`] with the gradients of `set_row_gradients`.
        lr (`float`, *optional*, defaults to `1e-4`):
            Learning rate η.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.95)`):
            Decay rates of the moments.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Weight decay λ.
        bias_correction (`str`, *optional*, defaults to `"outside"`):
            Where the bias of the first moment is corrected: `"outside"` or `"inside"` of atan2.
        scale (`float`, *optional*, defaults to `1.0`):
            Factor s of the update.

    Raises:
        `ValueError`: If a value is out of range.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        bias_correction: str = "outside",
        scale: float = 1.0,
    ):
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` is {value}. It must be a number that is at least 0.")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"`betas` is {betas}. Both must be at least 0 and less than 1.")
        if bias_correction not in BIAS_CORRECTIONS:
            raise ValueError(f"`bias_correction` is {bias_correction!r}. It must be one of {BIAS_CORRECTIONS}.")
        if not 0 < scale < float("inf"):
            raise ValueError(f"`scale` is {scale}. It must be greater than 0.")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "scale": scale,
        }
        super().__init__(params, defaults)


class AdamW(_WithSignRows, torch.optim.AdamW):
    """`torch.optim.AdamW` whose groups with `sign_rows=True` are updated by [`sign_step_`], as in [`AdamAtan2`]."""
