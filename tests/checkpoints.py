"""Create checkpoints on disk and change their weights."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from trl_hrm import StepFormat

from .helpers import HEADS, tiny_tokenizer


def save(folder: Path, model, step_format: StepFormat = HEADS["classification"]) -> Path:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    step_format.save(folder)
    return folder


def edit(folder: Path, change, file: str = "model.safetensors") -> None:
    """Change the weights of a checkpoint. `change` gets them as a dict by name."""
    weights = load_file(folder / file)
    change(weights)
    save_file(weights, folder / file, metadata={"format": "pt"})


def two_layer_head(weights: dict) -> None:
    """Change the head to the layout of Qwen2.5-Math-PRM: `score` is Linear, ReLU, Linear."""
    del weights["score.weight"], weights["score.bias"]
    for layer, outputs in ((0, 64), (2, 2)):
        weights |= {f"score.{layer}.weight": torch.randn(outputs, 64), f"score.{layer}.bias": torch.randn(outputs)}


def value_head(weights: dict) -> None:
    """Change the head to the layout of Skywork's reward models."""
    weights |= {"v_head.summary.weight": torch.randn(1, 64), "v_head.summary.bias": torch.randn(1)}


def drop(*names: str):
    return lambda weights: [weights.pop(name) for name in names]
