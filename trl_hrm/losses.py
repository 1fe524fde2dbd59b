"""Loss and score of a step, as pure tensor functions shared by training, evaluation and scoring."""

import torch
import torch.nn.functional as F

from .step_format import StepFormat


def step_loss(logits: torch.Tensor, labels: torch.Tensor, step_format: StepFormat) -> torch.Tensor:
    r"""
    Compute the loss of each step, without reduction.

    | head | loss for label y |
    |---|---|
    | `classification`, `mlp`, `lm` | −y·ln p₁ − (1−y)·ln p₀, with p = softmax(logits) |
    | 1 output, `mse` | (z − y)² |
    | 1 output, `bce` (also `implicit`) | −y·ln σ(z) − (1−y)·ln(1 − σ(z)) |

    Hard labels are y ∈ {0, 1}. Soft labels are used directly, without rounding.

    Args:
        logits (`torch.Tensor`):
            Outputs at the step tokens, shape `(..., C)` with C = 2 (0 wrong, 1 correct), or C = 1 for regression. Any
            floating-point dtype. The loss is computed in at least float32.
        labels (`torch.Tensor`):
            Probability that each step is correct, shape `(...)`.
        step_format ([`StepFormat`]):
            Step format with the head and the regression loss.

    Returns:
        `torch.Tensor`: Losses in nats (squared errors for `mse`), shape `(...)`.
    """
    logits = _at_least_float32(logits)
    labels = labels.to(logits.dtype)
    if step_format.num_labels == 1:
        outputs = logits.squeeze(-1)
        if step_format.regression_loss == "mse":
            return (outputs - labels) ** 2
        return F.binary_cross_entropy_with_logits(outputs, labels, reduction="none")
    log_probs = F.log_softmax(logits, dim=-1)
    return -(labels * log_probs[..., 1] + (1 - labels) * log_probs[..., 0])


def step_score(logits: torch.Tensor, step_format: StepFormat) -> torch.Tensor:
    r"""
    Compute the score of each step: the probability that it is correct
    ([HRM](https://huggingface.co/papers/2503.13551), eq. 2).

    Args:
        logits (`torch.Tensor`):
            Outputs at the step tokens, shape `(..., C)`. See [`step_loss`].
        step_format ([`StepFormat`]):
            Step format with the head and the regression loss.

    Returns:
        `torch.Tensor`: Scores in `[0, 1]`, shape `(...)`.
    """
    logits = _at_least_float32(logits)
    if step_format.num_labels == 1:
        outputs = logits.squeeze(-1)
        return outputs.clamp(0, 1) if step_format.regression_loss == "mse" else outputs.sigmoid()
    return logits.softmax(dim=-1)[..., 1]


def _at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
