"""Losses of the Hierarchical Reasoning Model."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


def stablemax_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Return the cross-entropy of each cell with stablemax, s(x) = x + 1 for x >= 0 and 1 / (1 - x) otherwise, in place of the
    exponential function (HRM, arXiv 2506.21734).

    ln s(x) is sign(x) ln(1 + |x|), so that the loss is finite for all finite logits in float32.

    Args:
        logits (`torch.Tensor`):
            Logits of shape (..., V).
        labels (`torch.Tensor`):
            Ids of shape (...). Cells with label -100 have loss 0.

    Returns:
        `torch.Tensor`: Losses of shape (...), in float32, or in float64 for logits in float64.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # Two branches, because sign(x) ln(1 + |x|) has gradient 0 at x = 0 instead of 1.
    log_s = torch.where(logits >= 0, torch.log1p(logits.clamp(min=0)), -torch.log1p(-logits.clamp(max=0)))
    valid = labels != -100
    picked = log_s.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
    return torch.where(valid, log_s.logsumexp(-1) - picked, 0)


def softmax_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Return the usual cross-entropy of each cell, with the shapes of `stablemax_cross_entropy`.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), ignore_index=-100, reduction="none")
    return losses.view(labels.shape)


class ActLoss(NamedTuple):
    """
    Losses and counts of a batch after one segment. Each is a tensor of shape (B,): sum them and divide by the global batch.

    Rows without labels (padding rows) have loss 0 and are not `exact`.

    Args:
        loss (`torch.Tensor`):
            `lm_loss + (q_halt_loss + q_continue_loss) / 2`.
        lm_loss (`torch.Tensor`):
            Mean cross-entropy over the labelled cells.
        q_halt_loss (`torch.Tensor`):
            Binary cross-entropy of the halting logit against "all labelled cells are right".
        q_continue_loss (`torch.Tensor`):
            Binary cross-entropy of the logit for continuing against its target, or 0 without a target.
        exact (`torch.Tensor`):
            Whether all labelled cells are right.
        right_cells (`torch.Tensor`):
            Number of labelled cells that are right.
        labelled_cells (`torch.Tensor`):
            Number of labelled cells.
    """

    loss: torch.Tensor
    lm_loss: torch.Tensor
    q_halt_loss: torch.Tensor
    q_continue_loss: torch.Tensor
    exact: torch.Tensor
    right_cells: torch.Tensor
    labelled_cells: torch.Tensor


def act_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    q_halt_logits: torch.Tensor,
    q_continue_logits: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    loss_type: str = "stablemax",
) -> ActLoss:
    """
    Return the loss of each row after one segment (HRM, arXiv 2506.21734): the mean cross-entropy over the labelled cells plus half
    the sum of the losses of the two Q logits.

    Args:
        logits (`torch.Tensor`):
            Logits of the cells, of shape (B, L, V).
        labels (`torch.Tensor`):
            Ids of the solution, of shape (B, L). Cells with label -100 are ignored.
        q_halt_logits (`torch.Tensor`):
            Logits of halting, of shape (B,).
        q_continue_logits (`torch.Tensor`, *optional*):
            Logits of continuing, of shape (B,). Required with `target`.
        target (`torch.Tensor`, *optional*):
            Targets of continuing, of shape (B,), as returned by `halting.continue_target`. Without it, `q_continue_loss` is 0 (TRM,
            arXiv 2510.04871, and evaluation).
        loss_type (`str`, *optional*, defaults to `"stablemax"`):
            `"stablemax"` or `"softmax"`.

    Returns:
        [`ActLoss`]: Losses and counts per row.
    """
    cross_entropy = {"stablemax": stablemax_cross_entropy, "softmax": softmax_cross_entropy}[loss_type]
    valid = labels != -100
    labelled = valid.sum(-1)
    has_labels = labelled > 0
    right_cells = ((logits.detach().argmax(-1) == labels) & valid).sum(-1)
    exact = has_labels & (right_cells == labelled)
    lm_loss = cross_entropy(logits, labels).sum(-1) / labelled.clamp(min=1)
    halt_loss = F.binary_cross_entropy_with_logits(q_halt_logits, exact.to(q_halt_logits.dtype), reduction="none")
    halt_loss = torch.where(has_labels, halt_loss, 0)
    if target is None:
        continue_loss = torch.zeros_like(halt_loss)
    else:
        continue_loss = F.binary_cross_entropy_with_logits(q_continue_logits, target.detach(), reduction="none")
        continue_loss = torch.where(has_labels, continue_loss, 0)
    return ActLoss(
        lm_loss + (halt_loss + continue_loss) / 2, lm_loss, halt_loss, continue_loss, exact, right_cells, labelled
    )
