"""Exponential moving average of the weights (TRM, arXiv 2510.04871)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import TrainerCallback


class EMA(TrainerCallback):
    r"""
    Exponential moving average of the trained weights, in float32: \\(\bar p \leftarrow \delta \bar p + (1 - \delta) p\\) after each
    optimizer step. The average starts at the initial weights. Weights without gradients, such as the puzzle embedding, have none.

    Args:
        decay (`float`):
            Decay δ, at least 0 and less than 1. TRM uses 0.999.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, torch.Tensor] | None = None

    def start(self, model: torch.nn.Module) -> None:
        """Start at the current weights of a model."""
        self.average = {name: p.detach().float().clone() for name, p in _trained(model).items()}

    def update(self, model: torch.nn.Module) -> None:
        """Add the current weights of a model to the average."""
        weights = [p.detach().float() for p in _trained(model).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay)

    @contextmanager
    def swapped(self, model: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
        """
        Context manager in which the model has the averaged weights. It yields the trained weights, which the model gets back at the
        end.
        """
        trained = {name: p.detach().clone() for name, p in _trained(model).items()}
        self.copy_to(model)
        try:
            yield trained
        finally:
            copy_weights(trained, model)

    def copy_to(self, model: torch.nn.Module) -> None:
        """Replace the trained weights of a model by their average."""
        copy_weights(self.average, model)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self.average is None:  # not loaded from a checkpoint
            self.start(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.update(model)


@torch.no_grad()
def copy_weights(weights: dict[str, torch.Tensor], model: torch.nn.Module) -> None:
    """Copy weights into the trained parameters of a model, in place."""
    for name, parameter in _trained(model).items():
        parameter.copy_(weights[name])


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
