"""
The Hierarchical Reasoning Model (HRM, arXiv 2506.21734) and the Tiny Recursive Model (TRM, arXiv 2510.04871) for grid puzzles.

It shares its name with the Hierarchical Reward Model of the rest of the package, and nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import AutoConfig, AutoModel

from .configuration_hrm_grid import HrmGridConfig
from .grid_solving import GridSolution
from .modeling_hrm_grid import HrmGridForSolving, HrmGridOutput
from .vocab import ARC_VOCAB, MAZE_VOCAB, GridVocab, box_shape, sudoku_vocab


if TYPE_CHECKING:
    from .convert import convert_original
    from .evaluate import GridPredictions, predict
    from .optim import AdamAtan2
    from .reasoning_config import HRMReasoningConfig
    from .reasoning_trainer import HRMReasoningTrainer


AutoConfig.register("hrm_grid", HrmGridConfig, exist_ok=True)
AutoModel.register(HrmGridConfig, HrmGridForSolving, exist_ok=True)
HrmGridConfig.register_for_auto_class()
HrmGridForSolving.register_for_auto_class("AutoModel")

# Names that are imported when they are first used, because they need the trainer or datasets.
_LAZY = {
    "AdamAtan2": "optim",
    "GridPredictions": "evaluate",
    "HRMReasoningConfig": "reasoning_config",
    "HRMReasoningTrainer": "reasoning_trainer",
    "convert_original": "convert",
    "predict": "evaluate",
}

__all__ = [
    "ARC_VOCAB",
    "MAZE_VOCAB",
    "AdamAtan2",
    "GridPredictions",
    "GridSolution",
    "GridVocab",
    "HRMReasoningConfig",
    "HRMReasoningTrainer",
    "HrmGridConfig",
    "HrmGridForSolving",
    "HrmGridOutput",
    "box_shape",
    "convert_original",
    "predict",
    "sudoku_vocab",
]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
