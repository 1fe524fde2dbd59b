"""Hierarchical Reward Models for TRL. Names are imported on first use, so `import trl_hrm` is fast."""

import importlib
import sys
from typing import TYPE_CHECKING

from .renamed import MovedModules


__version__ = "0.2.0"

_NAMES = {
    "AccuracyReward": "accuracy_reward",
    "annotate": "scripts.annotate",
    "AnnotateConfig": "scripts.annotate",
    "AnswerGrader": "grading.grader",
    "app": "scripts.app",
    "AppConfig": "scripts.app",
    "benchmark": "scripts.benchmark",
    "BenchmarkConfig": "scripts.benchmark",
    "best_of_n": "scripts.best_of_n",
    "BestOfNConfig": "scripts.best_of_n",
    "build_grid": "scripts.build_grid",
    "BuildGridConfig": "scripts.build_grid",
    "build_math_shepherd": "data.math_shepherd",
    "build_prm800k": "data.prm800k",
    "build_stepwise": "data.stepwise",
    "BuildMathShepherdConfig": "data.build_config",
    "BuildPRM800KConfig": "data.build_config",
    "BuildStepwiseConfig": "data.build_config",
    "compress": "search.compression",
    "DemoConfig": "demo.pipeline",
    "entropy_label": "search.values",
    "EnvConfig": "scripts.env",
    "evaluate": "scripts.evaluate",
    "EvaluateConfig": "scripts.evaluate",
    "export": "data.export",
    "ExportConfig": "data.export_config",
    "extract_answer": "grading.extraction",
    "FullTree": "search.policies",
    "GenerativeScorer": "scoring.generative_scorer",
    "HRMReasoningConfig": "reasoning.reasoning_config",
    "HRMReasoningTrainer": "reasoning.reasoning_trainer",
    "hrm_view": "data.hierarchy",
    "HRMRewardConfig": "trainer.hrm_reward_config",
    "HRMRewardTrainer": "trainer.hrm_reward_trainer",
    "ImplicitPRMConfig": "trainer.implicit_prm_config",
    "ImplicitPRMTrainer": "trainer.implicit_prm_trainer",
    "inspect_tree": "scripts.inspect",
    "InspectConfig": "scripts.inspect",
    "judge": "scripts.judge",
    "JudgeConfig": "scripts.judge",
    "JudgeTemplate": "scoring.judge_templates",
    "KLSelfConfig": "trainer.kl_self_config",
    "KLSelfTrainer": "trainer.kl_self_trainer",
    "mc_scores": "search.values",
    "OpenAIEngine": "search.engines.openai",
    "orm_view": "data.hierarchy",
    "print_env": "scripts.env",
    "plan_training": "trainer.plan",
    "prm_view": "data.hierarchy",
    "Problem": "search.tree",
    "PUCT": "search.policies",
    "push_dataset": "data.publish",
    "PushDatasetConfig": "data.publish_config",
    "PushError": "hub",
    "quickstart": "scripts.quickstart",
    "QuickstartConfig": "scripts.quickstart",
    "reason": "scripts.reason",
    "ReasonConfig": "scripts.reason",
    "report": "scripts.report",
    "ReportConfig": "scripts.report",
    "RewardHackingCallback": "trainer.reward_hacking_callback",
    "Rollouts": "search.policies",
    "run_demo": "demo.pipeline",
    "Scheduler": "search.scheduler",
    "score": "scripts.score",
    "ScoreConfig": "scripts.score",
    "ScoredCompletion": "rewards",
    "SearchTree": "search.tree",
    "select_raft": "scripts.select_raft",
    "SelectRaftConfig": "scripts.select_raft",
    "ServerScorer": "scoring.http_scorer",
    "solve": "scripts.solve",
    "SolveConfig": "scripts.solve",
    "step_search": "scripts.step_search",
    "StepFormat": "step_format",
    "StepGRPOConfig": "trainer.step_grpo_config",
    "StepGRPOTrainer": "trainer.step_grpo_trainer",
    "StepReward": "rewards",
    "StepScorer": "scoring.scorer",
    "StepSearchConfig": "scripts.step_search",
    "StepTableCallback": "trainer.step_table_callback",
    "StepTree": "step_tree",
    "table": "scripts.table",
    "TableConfig": "scripts.table",
    "ThinkingRule": "search.thinking",
    "TrainingPlan": "trainer.plan",
    "TransformersEngine": "search.engines.transformers",
}

__all__ = ["__version__", *_NAMES]

sys.meta_path.append(MovedModules())  # asked last, so only for modules that do not exist

if TYPE_CHECKING:
    from .accuracy_reward import AccuracyReward
    from .data.build_config import BuildMathShepherdConfig, BuildPRM800KConfig, BuildStepwiseConfig
    from .data.export import export
    from .data.export_config import ExportConfig
    from .data.hierarchy import hrm_view, orm_view, prm_view
    from .data.math_shepherd import build_math_shepherd
    from .data.prm800k import build_prm800k
    from .data.publish import push_dataset
    from .data.publish_config import PushDatasetConfig
    from .data.stepwise import build_stepwise
    from .demo.pipeline import DemoConfig, run_demo
    from .grading.extraction import extract_answer
    from .grading.grader import AnswerGrader
    from .hub import PushError
    from .reasoning.reasoning_config import HRMReasoningConfig
    from .reasoning.reasoning_trainer import HRMReasoningTrainer
    from .rewards import ScoredCompletion, StepReward
    from .scoring.generative_scorer import GenerativeScorer
    from .scoring.http_scorer import ServerScorer
    from .scoring.judge_templates import JudgeTemplate
    from .scoring.scorer import StepScorer
    from .scripts.annotate import AnnotateConfig, annotate
    from .scripts.app import AppConfig, app
    from .scripts.benchmark import BenchmarkConfig, benchmark
    from .scripts.best_of_n import BestOfNConfig, best_of_n
    from .scripts.build_grid import BuildGridConfig, build_grid
    from .scripts.env import EnvConfig, print_env
    from .scripts.evaluate import EvaluateConfig, evaluate
    from .scripts.inspect import InspectConfig, inspect_tree
    from .scripts.judge import JudgeConfig, judge
    from .scripts.quickstart import QuickstartConfig, quickstart
    from .scripts.reason import ReasonConfig, reason
    from .scripts.report import ReportConfig, report
    from .scripts.score import ScoreConfig, score
    from .scripts.select_raft import SelectRaftConfig, select_raft
    from .scripts.solve import SolveConfig, solve
    from .scripts.step_search import StepSearchConfig, step_search
    from .scripts.table import TableConfig, table
    from .search.compression import compress
    from .search.engines.openai import OpenAIEngine
    from .search.engines.transformers import TransformersEngine
    from .search.policies import PUCT, FullTree, Rollouts
    from .search.scheduler import Scheduler
    from .search.thinking import ThinkingRule
    from .search.tree import Problem, SearchTree
    from .search.values import entropy_label, mc_scores
    from .step_format import StepFormat
    from .step_tree import StepTree
    from .trainer.hrm_reward_config import HRMRewardConfig
    from .trainer.hrm_reward_trainer import HRMRewardTrainer
    from .trainer.implicit_prm_config import ImplicitPRMConfig
    from .trainer.implicit_prm_trainer import ImplicitPRMTrainer
    from .trainer.kl_self_config import KLSelfConfig
    from .trainer.kl_self_trainer import KLSelfTrainer
    from .trainer.plan import TrainingPlan, plan_training
    from .trainer.reward_hacking_callback import RewardHackingCallback
    from .trainer.step_grpo_config import StepGRPOConfig
    from .trainer.step_grpo_trainer import StepGRPOTrainer
    from .trainer.step_table_callback import StepTableCallback


def __getattr__(name: str):
    if name not in _NAMES:
        raise AttributeError(f"module 'trl_hrm' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
