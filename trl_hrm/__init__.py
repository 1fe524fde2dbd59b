"""Hierarchical Reward Models for TRL. Names load on first use, so that `import trl_hrm` runs nothing."""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.1.0"

_NAMES = {
    "AnswerGrader": "grading.grader",
    "FullTree": "search.full_tree",
    "HRMRewardConfig": "trainer.hrm_reward_config",
    "HRMRewardTrainer": "trainer.hrm_reward_trainer",
    "KLSelfConfig": "trainer.kl_self_config",
    "KLSelfTrainer": "trainer.kl_self_trainer",
    "OpenAIEngine": "search.openai_engine",
    "PUCT": "search.puct",
    "Problem": "search.tree",
    "PushError": "hub",
    "Rollouts": "search.rollouts",
    "Scheduler": "search.scheduler",
    "SearchTree": "search.tree",
    "ServerScorer": "scoring.http_scorer",
    "StepFormat": "step_format",
    "StepReward": "trainer.step_reward",
    "StepScorer": "scoring.scorer",
    "StepTree": "step_tree",
    "TransformersEngine": "search.transformers_engine",
    "compress": "search.compression",
    "entropy_label": "search.values",
    "extract_answer": "grading.extraction",
    "hrm_view": "data.hierarchy",
    "mc_scores": "search.values",
    "orm_view": "data.hierarchy",
    "prm_view": "data.hierarchy",
    "push_dataset": "data.publish",
}

__all__ = ["__version__", *_NAMES]

if TYPE_CHECKING:
    from .data.hierarchy import hrm_view, orm_view, prm_view
    from .data.publish import push_dataset
    from .grading.extraction import extract_answer
    from .grading.grader import AnswerGrader
    from .hub import PushError
    from .scoring.http_scorer import ServerScorer
    from .scoring.scorer import StepScorer
    from .search.compression import compress
    from .search.full_tree import FullTree
    from .search.openai_engine import OpenAIEngine
    from .search.puct import PUCT
    from .search.rollouts import Rollouts
    from .search.scheduler import Scheduler
    from .search.transformers_engine import TransformersEngine
    from .search.tree import Problem, SearchTree
    from .search.values import entropy_label, mc_scores
    from .step_format import StepFormat
    from .step_tree import StepTree
    from .trainer.hrm_reward_config import HRMRewardConfig
    from .trainer.hrm_reward_trainer import HRMRewardTrainer
    from .trainer.kl_self_config import KLSelfConfig
    from .trainer.kl_self_trainer import KLSelfTrainer
    from .trainer.step_reward import StepReward


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'trl_hrm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
