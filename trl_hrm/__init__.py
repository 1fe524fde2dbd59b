"""Hierarchical Reward Models for TRL. Names load on first use, so that `import trl_hrm` runs nothing."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_NAMES = {
    "HRMRewardConfig": "trainer.hrm_reward_config",
    "HRMRewardTrainer": "trainer.hrm_reward_trainer",
    "StepFormat": "step_format",
    "StepScorer": "scoring.scorer",
    "StepTree": "step_tree",
    "hrm_view": "data.hierarchy",
    "orm_view": "data.hierarchy",
    "prm_view": "data.hierarchy",
}

__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from .data.hierarchy import hrm_view, orm_view, prm_view
    from .scoring.scorer import StepScorer
    from .step_format import StepFormat
    from .step_tree import StepTree
    from .trainer.hrm_reward_config import HRMRewardConfig
    from .trainer.hrm_reward_trainer import HRMRewardTrainer


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'trl_hrm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
