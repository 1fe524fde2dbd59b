"""Tiny puzzles, models and trainers, shared by the tests of the training."""

from typing import Any

import numpy as np
import torch
from datasets import Dataset

from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving, HRMReasoningConfig, HRMReasoningTrainer, sudoku_vocab


GRID = np.array([[1, 2, 3, 4], [3, 4, 1, 2], [2, 1, 4, 3], [4, 3, 2, 1]])


def sudoku_rows(num: int, seed: int = 0, blanks: int = 8, puzzle_ids: int = 0) -> Dataset:
    """Return different 4x4 Sudoku puzzles with a number of blanks, and optionally a number of puzzle ids in turn."""
    rng, rows = np.random.default_rng(seed), {}
    while len(rows) < num:
        solution = (rng.permutation(4) + 2)[GRID - 1]
        solution = solution.T if rng.random() < 0.5 else solution
        puzzle = solution.flatten()
        puzzle[rng.choice(16, blanks, replace=False)] = 1
        rows[puzzle.tobytes()] = {
            "puzzle": puzzle.tolist(),
            "solution": solution.flatten().tolist(),
            "height": 4,
            "width": 4,
            "family": "sudoku",
            "puzzle_id": f"task{len(rows) % puzzle_ids}" if puzzle_ids else "",
        }
    return Dataset.from_list(list(rows.values()))


def grid_config(system: str = "hrm", **overrides: Any) -> HrmGridConfig:
    defaults = {
        "vocab": sudoku_vocab(4),
        "height": 4,
        "width": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "H_layers": 1,
        "L_layers": 1,
        "halt_max_steps": 3,
        "num_prefix_tokens": 1,
    }
    return HrmGridConfig.preset(system, **(defaults | overrides))


def grid_model(system: str = "hrm", seed: int = 4, **overrides: Any) -> HrmGridForSolving:
    """Return a model whose halting logits are random, so that puzzles halt after different numbers of segments from the first step on."""
    torch.manual_seed(seed)
    model = HrmGridForSolving(grid_config(system, **overrides))
    torch.nn.init.normal_(model.q_head.weight)
    torch.nn.init.zeros_(model.q_head.bias)
    return model


def grid_trainer(
    folder: Any, model: Any = None, rows: Dataset | None = None, eval_rows: Any = None, **args: Any
) -> HRMReasoningTrainer:
    """Return a trainer of a tiny model on CPU: 8 slots, a constant learning rate, no logs, no checkpoints."""
    defaults = {
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 3e-3,
        "weight_decay": 0.1,
        "warmup_steps": 0,
        "halt_exploration_prob": 0.5,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return HRMReasoningTrainer(
        grid_config() if model is None else model,
        HRMReasoningConfig(str(folder), **(defaults | args)),
        train_dataset=sudoku_rows(20) if rows is None else rows,
        eval_dataset=eval_rows,
    )


def save_grid_model(folder: Any) -> None:
    """Save a tiny model of 4x4 Sudokus with random weights."""
    grid_model().save_pretrained(folder)
