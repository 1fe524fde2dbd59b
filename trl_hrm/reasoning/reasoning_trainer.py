"""Trainer of the Hierarchical Reasoning Model, of TRM and of their controls."""

import copy
import math
import os
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import PredictionOutput, speed_metrics

from .._compat import BaseTrainer
from ..io import shown
from ..training.hub_push import HubPushMixin
from ..training.safe_training import SafeTrainingMixin
from .carry import Slots
from .configuration_hrm_grid import HrmGridConfig
from .ema import EMA, copy_weights
from .evaluate import cell_accuracy, choose_by_q, exact, fixed, predict
from .halting import continue_target, exploration_minimum, halt
from .losses import act_loss
from .model_card import save_grid_model_card
from .modeling_hrm_grid import HrmGridForSolving
from .optim import AdamAtan2, AdamW
from .reasoning_config import HRMReasoningConfig


if TYPE_CHECKING:
    from collections.abc import Iterator

logger = get_logger(__name__)

COLUMNS = ("puzzle", "solution", "height", "width", "family", "puzzle_id")
SLOTS_NAME = "slots_{}.safetensors"  # states of the slots of one process
WEIGHTS_NAME = "raw_weights.safetensors"  # trained weights, if the model of a checkpoint has their average
BLANKS = {"sudoku": 1, "maze": 2}  # id of a cell that the solution fills or keeps


@dataclass(frozen=True)
class GridRows:
    """
    Rows of a dataset as arrays.

    Args:
        puzzles, solutions (`np.ndarray`):
            Ids of the vocabulary, `uint8`, shape `(N, L)`.
        puzzle_ids (`np.ndarray`):
            Index of the puzzle id of each row, `int64`, shape `(N,)`.
        family (`str`):
            Family of the puzzles.
    """

    puzzles: np.ndarray
    solutions: np.ndarray
    puzzle_ids: np.ndarray
    family: str

    @classmethod
    def read(cls, dataset: Dataset, config: HrmGridConfig, puzzle_index: dict[str, int], name: str) -> "GridRows":
        """
        Read and check the rows of a dataset.

        Args:
            dataset (`Dataset`):
                Dataset with the columns `puzzle`, `solution`, `height`, `width`, `family` and `puzzle_id`.
            config ([`HrmGridConfig`]):
                Config of the model.
            puzzle_index (`dict[str, int]`):
                Index of each puzzle id, if the model has more than one.
            name (`str`):
                Name of the dataset in error messages.

        Raises:
            `TypeError`: If `dataset` is not a `Dataset`.
            `ValueError`: If there are no rows, a column is missing, the puzzle ids are not texts, a row does not fit the model, or two rows
                contradict each other.
        """
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`{name}` is a `{type(dataset).__name__}`. It must be a `datasets.Dataset` with all rows."
            )
        if not len(dataset):
            raise ValueError(f"`{name}` has no rows. It must have at least one.")
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise ValueError(
                f"`{name}` has no column {shown(missing[0])}. It needs {', '.join(COLUMNS)}. Build it with `trl-hrm build-grid`."
            )
        _check_puzzle_ids(dataset, name)
        families = dataset.unique("family")
        family = families[0] if config.vocab is None else config.grid_vocab.name
        if families != [family]:
            found = next(one for one in families if one != family)
            expected = (
                f"the vocabulary of the model is for {shown(family)}"
                if config.vocab
                else f"others are {shown(family)}"
            )
            raise ValueError(
                f"`{name}`, row {dataset['family'][:].index(found)}: found a puzzle of the family {shown(found)}, but {expected}. A model is "
                "for one family of puzzles."
            )
        sizes = np.stack([_column(dataset, "height"), _column(dataset, "width")], axis=1)
        wrong = np.flatnonzero((sizes != (config.height, config.width)).any(1))
        if len(wrong):
            height, width = sizes[wrong[0]]
            raise ValueError(
                f"`{name}`, row {wrong[0]}: found a board of {height} x {width} cells. The model solves boards of {config.height} x "
                f"{config.width} cells. Use another model, or other puzzles."
            )
        boards = {column: _boards(dataset, column, config, name) for column in ("puzzle", "solution")}
        puzzles, solutions = boards["puzzle"], boards["solution"]
        empty = np.flatnonzero(~solutions.any(1))
        if len(empty):
            raise ValueError(
                f"`{name}`, row {empty[0]}: the solution has only padding cells, so there is nothing to learn."
            )
        if family in BLANKS:
            givens = (puzzles != BLANKS[family]) & (puzzles != 0)
            faults = [("contradicts the given", givens & (puzzles != solutions))]
            if family == "sudoku":
                faults.append(("leaves a blank at the", solutions == BLANKS[family]))
            for fault, cells in faults:
                wrong, places = cells.nonzero()
                if len(wrong):
                    row, column = divmod(int(places[0]), config.width)
                    raise ValueError(
                        f"`{name}`, row {wrong[0]}: the solution {fault} cell in row {row + 1}, column {column + 1} of the board. Correct "
                        "or remove the row."
                    )
        names = [puzzle_id or "" for puzzle_id in dataset["puzzle_id"][:]]
        if config.num_puzzle_ids > 1:
            known = {"": 0, **puzzle_index}
            unknown = [one for one in dict.fromkeys(names) if one not in known]
            if unknown:
                raise ValueError(
                    f"`{name}` has {len(unknown):,} puzzle ids that the model does not know, such as {shown(unknown[0])}. A model can only "
                    "be trained and evaluated on the ids that it was created with."
                )
            ids = np.array([known[one] for one in names])
        else:
            ids = np.zeros(len(names), np.int64)
        cls._refuse_conflicts(puzzles, solutions, names, name)
        return cls(puzzles, solutions, ids, family)

    def num_in(self, other: "GridRows") -> int:
        """Return the number of different puzzles that other rows have, too, with the same solution."""
        mine, others = (zip(rows.puzzles, rows.solutions, strict=True) for rows in (self, other))
        found = {puzzle.tobytes() + solution.tobytes() for puzzle, solution in mine}
        return len(found.intersection(puzzle.tobytes() + solution.tobytes() for puzzle, solution in others))

    @staticmethod
    def _refuse_conflicts(puzzles: np.ndarray, solutions: np.ndarray, names: list[str], name: str) -> None:
        """Raise if a puzzle occurs twice with the same id and different solutions."""
        pairs = zip(names, puzzles, strict=True)
        hashes = np.fromiter(
            (hash((puzzle_id, puzzle.tobytes())) for puzzle_id, puzzle in pairs), np.int64, len(names)
        )
        order = np.argsort(hashes, kind="stable")
        equal = np.diff(hashes[order]) == 0
        for first, second in zip(order[:-1][equal], order[1:][equal], strict=True):
            is_same = names[first] == names[second] and np.array_equal(puzzles[first], puzzles[second])
            if is_same and not np.array_equal(solutions[first], solutions[second]):
                raise ValueError(
                    f"`{name}`, rows {first} and {second}: found the same puzzle with different solutions. Remove one of them."
                )


def _check_puzzle_ids(dataset: Dataset, name: str) -> None:
    """Raise if the puzzle ids are not texts. Numbers would become texts when the model is saved, so it would know none of its ids."""
    kind = dataset.features.arrow_schema.field("puzzle_id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(
            f'`{name}`: `puzzle_id` has the type {kind}. Expected texts, "" for rows without id. Use '
            '`dataset.cast_column("puzzle_id", Value("string"))`.'
        )


def _column(dataset: Dataset, name: str) -> np.ndarray:
    return np.asarray(dataset.with_format("numpy")[name][:])


def _boards(dataset: Dataset, column: str, config: HrmGridConfig, name: str) -> np.ndarray:
    """Return a column of boards, shape `(N, L)`, without converting it to Python objects."""
    parts = []
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        values = table[column].combine_chunks()
        is_list = pa.types.is_list(values.type) or pa.types.is_large_list(values.type)
        # Other numbers and missing cells would become other ids when they are converted to bytes. Nested lists are refused by their length
        wrong_type = not is_list or not (
            pa.types.is_integer(values.type.value_type) or pa.types.is_list(values.type.value_type)
        )
        if wrong_type or values.null_count or values.flatten().null_count:
            raise ValueError(
                f"`{name}` has missing values in the column `{column}`, or it has the type {values.type} instead of a list of integers. It must "
                "have a list of ids per row."
            )
        lengths = np.diff(values.offsets.to_numpy())
        wrong = np.flatnonzero(lengths != config.seq_len)
        if len(wrong):
            row = sum(map(len, parts)) + wrong[0]
            raise ValueError(
                f"`{name}`, row {row}: found {lengths[wrong[0]]} cells in `{column}`, expected {config.seq_len} ({config.height} x {config.width})."
            )
        cells = values.flatten().to_numpy(zero_copy_only=False).reshape(-1, config.seq_len)
        if cells.min() < 0 or cells.max() >= config.vocab_size:
            row = ((cells < 0) | (cells >= config.vocab_size)).any(1).argmax()
            raise ValueError(
                f"`{name}`, row {sum(map(len, parts)) + row}: found an id from {cells[row].min()} to {cells[row].max()} in `{column}`. The "
                f"vocabulary of the model has the ids 0 to {config.vocab_size - 1}. Use a model for these puzzles."
            )
        parts.append(cells.astype(np.uint8))
    return np.concatenate(parts)


class HRMReasoningTrainer(SafeTrainingMixin, HubPushMixin, BaseTrainer):
    """
    Trainer of models that solve grid puzzles: HRM (arXiv 2506.21734), TRM (arXiv 2510.04871) and their controls.

    Each optimizer step trains one segment of all slots. A slot keeps its puzzle, and the state of the model, until the puzzle halts, and
    then takes the next puzzle (see [`~reasoning.carry.RowStreams`]). All rows are used, and the result does not depend on how the slots
    are divided into batches, gradient accumulation steps and processes, up to rounding. A checkpoint holds the states of all slots, so
    a resumed training computes the same weights as one that was not interrupted.

    Args:
        model (`HrmGridForSolving`, `HrmGridConfig`, `str` or `PathLike`):
            Model, its path or Hub id, or the config of a new model, which is initialized with `args.seed`. If the rows have puzzle ids,
            a new model gets an embedding for each id of `train_dataset`, unless `puzzle_emb_dim` is 0.
        args ([`HRMReasoningConfig`], *optional*):
            Configuration for this trainer.
        train_dataset (`Dataset`):
            Rows with the columns `puzzle`, `solution`, `height`, `width`, `family` and `puzzle_id`, such as `trl-hrm build-grid`
            writes. Cells with id 0 in a solution are not trained on. Puzzle ids are texts, `""` or `None` for rows without id.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*):
            Rows to evaluate on. The metrics are `eval_exact_accuracy` (share of puzzles in which every cell is right after the last
            segment), `eval_cell_accuracy`, and `eval_exact_accuracy_choose_by_q` (after the segment with the highest halting logit).
        callbacks (`list[TrainerCallback]`, *optional*):
            Callbacks.

    Raises:
        `TypeError`: If an argument has the wrong type.
        `ValueError`: If rows do not fit the model or contradict each other, or the way of distributing the training is not supported.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_hrm.reasoning import HrmGridConfig, HRMReasoningConfig, HRMReasoningTrainer
    >>> from trl_hrm.reasoning.vocab import sudoku_vocab

    >>> rows = load_dataset("data/sudoku")
    >>> trainer = HRMReasoningTrainer(
    ...     HrmGridConfig(vocab=sudoku_vocab(9), height=9, width=9),
    ...     HRMReasoningConfig("outputs/sudoku", max_steps=10_000, per_device_train_batch_size=384, augment=True),
    ...     train_dataset=rows["train"],
    ...     eval_dataset=rows["validation"],
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "trl-hrm", "hierarchical-reasoning-model", "reasoning", "puzzles"]
    _name = "HRM Reasoning"
    _paper = {
        "title": "Hierarchical Reasoning Model",
        "id": "2506.21734",
        "citation": "@article{wang2025hierarchical,\n"
        "  title   = {Hierarchical Reasoning Model},\n"
        "  author  = {Wang, Guan and Li, Jin and Sun, Yuhao and Chen, Xing and Liu, Changling and Wu, Yue and Lu, Meng and "
        "Song, Sen and Abbasi Yadkori, Yasin},\n"
        "  journal = {arXiv preprint arXiv:2506.21734},\n"
        "  year    = {2025}\n"
        "}",
    }
    _card_settings = (
        "adam_beta1",
        "adam_beta2",
        "warmup_steps",
        "puzzle_learning_rate",
        "puzzle_weight_decay",
        "ema",
        "halt_exploration_prob",
        "augment",
        "easier_share",
    )
    _save_card = save_grid_model_card
    # compute_loss already divides by the number of slots of all processes
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: HrmGridForSolving | HrmGridConfig | str | os.PathLike,
        args: HRMReasoningConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        args = HRMReasoningConfig("hrm-reasoning") if args is None else args
        if not isinstance(args, HRMReasoningConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be an `HRMReasoningConfig`.")
        self._train_data, self._eval_data = train_dataset, eval_dataset
        model = self._load_model(model, args, train_dataset)
        config, index = model.config, getattr(model, "puzzle_index", None) or {}
        self.rows = GridRows.read(train_dataset, config, index, "train_dataset")
        if config.num_puzzle_ids == 1 and any(train_dataset.unique("puzzle_id")):
            logger.warning(
                "`train_dataset` has puzzle ids, but the model has no embedding for them, so they are not used."
            )
        if args.easier_share and self.rows.family != "sudoku":
            raise ValueError(
                f"`easier_share` is {args.easier_share}, but only Sudoku puzzles can be made easier. Set it to 0."
            )
        self._table = model.puzzle_emb.weight if config.puzzle_emb_dim else None
        if self._table is not None:
            model.puzzle_emb.register_forward_hook(self._keep_rows)
        for name in ("puzzle_learning_rate", "puzzle_weight_decay"):
            if self._table is None and getattr(args, name) is not None:
                raise ValueError(
                    f"`{name}` is {getattr(args, name)}, but the model has no puzzle embedding, because `puzzle_emb_dim` is 0. Remove it."
                )
        self._leaves: list[tuple[torch.Tensor, torch.Tensor]] | None = None
        self.slots: Slots | None = None
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, callbacks=callbacks
        )
        for name, rows in self._named(eval_dataset):
            shown_as = f"eval_dataset[{shown(name)}]" if name else "eval_dataset"
            num_shared = GridRows.read(rows, config, index, shown_as).num_in(self.rows)
            if num_shared:
                logger.warning(
                    f"`{shown_as}` has {num_shared:,} puzzles that are also in `train_dataset`, so its accuracy overestimates the accuracy on new puzzles."
                )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which `Trainer` uses when several GPUs are visible to a "
                "single process. Launch the script with `accelerate launch` or `torchrun`, or make a single GPU visible with "
                "`CUDA_VISIBLE_DEVICES`."
            )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"{type(self).__name__} does not support {kind.value}. The models are small, so use distributed data parallelism: an "
                "accelerate config without FSDP and DeepSpeed."
            )
        self._ema: EMA | None = None
        self._start_counting()
        self.model.add_model_tags(self._tag_names)

    @staticmethod
    def _load_model(model: Any, args: HRMReasoningConfig, train_dataset: Dataset) -> HrmGridForSolving:
        if isinstance(model, str | os.PathLike):
            model = HrmGridForSolving.from_pretrained(os.fspath(model))
        elif isinstance(model, HrmGridConfig):
            names = []
            if isinstance(train_dataset, Dataset) and "puzzle_id" in train_dataset.column_names:
                _check_puzzle_ids(train_dataset, "train_dataset")
                names = sorted({*train_dataset.unique("puzzle_id")} - {"", None})
            with_ids = names and model.num_puzzle_ids == 1 and model.puzzle_emb_dim
            if with_ids:
                model = copy.deepcopy(model)  # a dictionary would lose settings such as `attn_implementation`
                model.num_puzzle_ids = len(names) + 1
            set_seed(args.seed)
            model = HrmGridForSolving(model)
            if with_ids:
                model.puzzle_index = {name: i for i, name in enumerate(names, start=1)}
        elif not isinstance(model, HrmGridForSolving):
            raise TypeError(
                f"`model` is a `{type(model).__name__}`. It must be an `HrmGridForSolving`, its path or Hub id, or an `HrmGridConfig`."
            )
        other = next((name for name, p in model.named_parameters() if p.dtype != torch.float32), None)
        if other is not None:
            raise ValueError(
                f"The weight {other} of the model is not in float32. Load it with `dtype=torch.float32`, and set `bf16=True` for mixed precision."
            )
        return model

    @staticmethod
    def _named(data: Any) -> list[tuple[str, Any]]:
        return list(data.items()) if isinstance(data, dict) else [("", data)] if data is not None else []

    # Length: the slots draw the rows, so the data loader has nothing to do

    @property
    def num_slots(self) -> int:
        """Number of slots of all processes: the global batch size."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(range(1))

    @property
    def num_steps(self) -> int:
        """
        Number of optimizer steps of the training.

        Raises:
            `ValueError`: If there are none.
        """
        if self.args.max_steps > 0:
            return self.args.max_steps
        num_rows = len(self.rows.puzzles)
        steps = math.floor(self.args.num_train_epochs * num_rows / self.num_slots)
        if not steps:
            raise ValueError(
                f"`num_train_epochs` is {self.args.num_train_epochs:g}, which is less than one step of {self.num_slots:,} slots with "
                f"{num_rows:,} rows. Set `max_steps`, or more epochs."
            )
        return steps

    def plan(self) -> str:
        """Return the length of the training and the size of the model as text."""
        args, config = self.args, self.model.config
        table = 0 if self._table is None else self._table.numel()
        weights = sum(p.numel() for p in self.model.parameters()) - table
        size = f"{args.per_device_train_batch_size} × {args.gradient_accumulation_steps} × {self.accelerator.num_processes}"
        lines = {
            "rows": f"{len(self.rows.puzzles):,}",
            "model": f"{weights:,} weights, {table:,} in the puzzle embedding, up to {config.halt_max_steps} segments per puzzle",
            "slots": f"{self.num_slots:,} (batch {size}: per_device_train_batch_size × gradient_accumulation_steps × processes)",
            "steps": f"{self.num_steps:,}, one segment of each slot per step",
        }
        if args.warmup_steps:
            lines["warm-up"] = f"{args.get_warmup_steps(self.num_steps):,} steps"
        return "\n".join(f"{name + ':':<9}{text}" for name, text in lines.items())

    def set_initial_training_values(self, args, dataloader):
        steps = self.num_steps
        if args.get_warmup_steps(steps) >= steps > 1:
            logger.warning(
                f"The warm-up of {args.get_warmup_steps(steps):,} steps is not shorter than the training of {steps:,} steps, so the learning "
                "rate never reaches `learning_rate`. Lower `warmup_steps`."
            )
        return (
            *(1, steps, len(self.rows.puzzles), steps * self.num_slots, self.num_slots),
            *(steps * args.gradient_accumulation_steps, steps),
        )

    def get_batch_samples(self, epoch_iterator: "Iterator", num_batches: int, device: torch.device):
        self._leaves = []
        if self._counting_since is None:
            self._counting_since = time.perf_counter()
        return [{"part": part} for part in range(num_batches)], None

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # a batch has no tokens to count

    # Optimizer

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            # The table only requires a gradient outside of `train`
            params = [p for p in self.model.parameters() if p.requires_grad and p is not self._table]
            groups: list[dict[str, Any]] = [{"params": params}]
            if self._table is not None:
                lr, decay = args.puzzle_learning_rate, args.puzzle_weight_decay
                groups.append(
                    {
                        "params": [self._table],
                        "lr": args.learning_rate if lr is None else lr,
                        "weight_decay": args.weight_decay if decay is None else decay,
                        "sign_rows": True,
                        "frozen_id": 0 if self.model.config.num_puzzle_ids > 1 else None,
                    }
                )
            options = {
                "lr": args.learning_rate,
                "betas": (args.adam_beta1, args.adam_beta2),
                "weight_decay": args.weight_decay,
            }
            if args.optim == "adamw":
                self.optimizer = AdamW(groups, eps=args.adam_epsilon, **options)
            else:
                self.optimizer = AdamAtan2(
                    groups, bias_correction=args.atan2_bias_correction, scale=args.atan2_scale, **options
                )
        return self.optimizer

    @torch.compiler.disable
    def _keep_rows(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the puzzle embedding: make its output a leaf, which gets the gradient of the rows in the batch."""
        if self._leaves is None or not torch.is_grad_enabled():
            return None
        leaf = output.detach().requires_grad_()
        self._leaves.append((inputs[0], leaf))
        return leaf

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        if self._leaves:
            # The sign of the sum over all processes is taken, so each needs the rows of all of them
            ids = torch.cat([ids.flatten() for ids, _ in self._leaves])
            gradients = torch.cat([leaf.grad.flatten(0, -2) for _, leaf in self._leaves])
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            optimizer.set_row_gradients(self.accelerator.gather(ids), self.accelerator.gather(gradients))
        self._leaves = None
        return norm

    # Loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Train one segment of the slots of a part, and return the sum of their losses, divided by the number of slots of all processes.

        Since gradients are averaged over processes, the loss is multiplied by their number.
        """
        config, args = self.model.config, self.args
        batch = self.slots.begin(inputs["part"])
        out = model(input_ids=batch.puzzle, puzzle_ids=batch.puzzle_ids, z_H=batch.z_H, z_L=batch.z_L)
        minimum = exploration_minimum(
            args.seed, batch.index, self.state.global_step, args.halt_exploration_prob, config.halt_max_steps
        )
        q_halt, q_continue = out.q_halt_logits, out.q_continue_logits if config.continue_head else None
        halted = halt(
            batch.steps,
            q_halt.detach(),
            None if q_continue is None else q_continue.detach(),
            config.halt_max_steps,
            minimum,
        )
        target = None
        if q_continue is not None:
            with torch.no_grad():
                after = model(input_ids=batch.puzzle, puzzle_ids=batch.puzzle_ids, z_H=out.z_H, z_L=out.z_L)
            target = continue_target(batch.steps, after.q_halt_logits, after.q_continue_logits, config.halt_max_steps)
        losses = act_loss(out.logits, batch.labels, q_halt, q_continue, target, config.loss_type)
        self.slots.end(inputs["part"], out.z_H, out.z_L, halted)
        with torch.no_grad():
            self._counts += torch.stack(
                [
                    losses.lm_loss.sum(),
                    losses.q_halt_loss.sum(),
                    losses.q_continue_loss.sum(),
                    halted.sum(),
                    (halted & losses.exact).sum(),
                    (halted * losses.right_cells / losses.labelled_cells.clamp(min=1)).sum(),
                    (halted * batch.steps).sum(),
                ]
            ).to(self._counts)
            self._segments += len(halted)
        loss = losses.loss.sum() * (self.accelerator.num_processes / self.num_slots)
        return (loss, out) if return_outputs else loss

    # Logs

    def _start_counting(self) -> None:
        # sums over the segments, and over the puzzles that halted, of this process since the last log
        self._counts = torch.zeros(7, device=self.args.device)
        self._segments = 0
        self._counting_since: float | None = None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counting_since is not None:
            refills = sum(number for batch in self.slots.parts for number in batch.refills)
            mine = [*self._counts.tolist(), self._segments, refills]
            lm, q_halt, q_continue, halted, right, cells, steps, segments, rows = np.sum(
                gather_object([mine]), axis=0
            ).tolist()
            logs["lm_loss"] = lm / segments
            logs["q_halt_loss"] = q_halt / segments
            if self.model.config.continue_head:
                logs["q_continue_loss"] = q_continue / segments
            if halted:
                logs["exact_accuracy"] = right / halted
                logs["cell_accuracy"] = cells / halted
                logs["mean_segments"] = steps / halted
            logs["num_puzzles"] = int(rows)
            logs["segments_per_second"] = segments / (time.perf_counter() - self._counting_since)
            self._start_counting()
        super().log(logs, start_time)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        self.state.epoch = self.state.global_step * self.num_slots / len(self.rows.puzzles)
        super()._maybe_log_save_evaluate(*args, **kwargs)

    # Evaluation

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """
        Evaluate the model, with the averaged weights if `ema` is set, and log the metrics.

        Args:
            eval_dataset (`Dataset`, `dict[str, Dataset]` or `str`, *optional*):
                Rows, or the name of one of several evaluation datasets. Defaults to the evaluation dataset of the trainer.
            ignore_keys (`list[str]`, *optional*):
                Ignored, as it is for outputs that are not returned.
            metric_key_prefix (`str`, *optional*, defaults to `"eval"`):
                Prefix of the names of the metrics.

        Returns:
            `dict[str, float]`: Metrics.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            named = dict(self._named(self.eval_dataset))
            if data not in named:
                raise ValueError(
                    f"{shown(data)} is not the name of an evaluation dataset. The names are {', '.join(map(shown, named)) or 'empty'}."
                )
            data = named[data]
        if data is None:
            raise ValueError("The trainer has no evaluation dataset. Pass `eval_dataset`.")
        if isinstance(data, dict):
            metrics: dict[str, float] = {}
            for name, rows in data.items():
                metrics |= self.evaluate(rows, metric_key_prefix=f"{metric_key_prefix}_{name}")
            return metrics
        start, clock = time.time(), time.perf_counter()
        _, _, found = self._answer(data)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(data))
        with self._marking_others(eval_dataset):
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self._counting_since is not None:  # training is timed without evaluations
            self._counting_since += time.perf_counter() - clock
        return metrics

    def predict(
        self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """
        Return the answers after the last segment, shape `(N, L)`, the solutions, and the metrics of [`HRMReasoningTrainer.evaluate`].
        [`~reasoning.predict`] returns the answers of all segments.
        """
        answers, solutions, found = self._answer(test_dataset)
        return PredictionOutput(
            answers, solutions, {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        )

    def _answer(self, data: Dataset) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """Return answers, solutions and metrics. Each process answers a share of the rows."""
        model, accelerator = self.model, self.accelerator
        index = getattr(model, "puzzle_index", None) or {}
        solutions = GridRows.read(data, model.config, index, "eval_dataset").solutions
        answers, chosen = np.zeros_like(solutions), np.zeros_like(solutions)
        mine = range(accelerator.process_index, len(data), accelerator.num_processes)
        found = None
        if mine:
            with ExitStack() as stack:
                if self._ema is not None:
                    stack.enter_context(self._ema.swapped(model))
                stack.enter_context(self.compute_loss_context_manager())
                predictions = predict(
                    model,
                    data.select_columns(["puzzle", "puzzle_id"]).select(mine),
                    segments=self.args.eval_segments,
                    batch_size=self.args.per_device_eval_batch_size,
                    puzzle_index={"": 0, None: 0, **index},
                )
            found = fixed(predictions)[0], choose_by_q(predictions)[0]
        for rank, share in enumerate(gather_object([found])):
            if share is not None:
                places = slice(rank, None, accelerator.num_processes)
                answers[places], chosen[places] = share
        metrics = {
            "exact_accuracy": exact(answers, solutions),
            "cell_accuracy": cell_accuracy(answers, solutions),
            "exact_accuracy_choose_by_q": exact(chosen, solutions),
        }
        return answers, solutions, {name: float(values.mean()) for name, values in metrics.items()}

    # Training, checkpoints

    def train(self, *args, **kwargs):
        self._start_counting()
        if self.args.ema is not None:
            self._ema = EMA(self.args.ema)
            self.add_callback(self._ema)
        if self._table is not None:
            # A gradient of the whole table would be as large as the table. `_keep_rows` computes it for the rows in the batch
            self._table.requires_grad_(False)
        try:
            return super().train(*args, **kwargs)
        finally:
            self._leaves = None
            if self._table is not None:
                self._table.requires_grad_(True)
            if self._ema is not None:  # after an error
                self.remove_callback(self._ema)
                self._ema = None

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        args, rank, size = self.args, self.accelerator.process_index, self.args.per_device_train_batch_size
        starts = [
            (part * self.accelerator.num_processes + rank) * size for part in range(args.gradient_accumulation_steps)
        ]
        self.slots = Slots(
            self.rows.puzzles,
            self.rows.solutions,
            self.rows.puzzle_ids,
            [range(start, start + size) for start in starts],
            self.num_slots,
            self.model.initial_state,
            seed=args.seed if args.data_seed is None else args.data_seed,
            transform=self._transform if args.augment or args.easier_share else None,
            device=args.device,
        )
        if resume_from_checkpoint is not None:
            self._load_slots(Path(resume_from_checkpoint))
            weights = Path(resume_from_checkpoint, WEIGHTS_NAME)
            if weights.exists():  # the model has their average
                if self._ema is not None:
                    self._ema.start(self.model)
                copy_weights(load_file(weights), self.model)
        return prepared

    def _transform(
        self, puzzle: np.ndarray, solution: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.args.augment:
            from .data.symmetry import augment

            config = self.model.config
            puzzle, solution = augment(self.rows.family, puzzle, solution, config.height, config.width, rng)
        if self.args.easier_share and rng.random() < self.args.easier_share:
            blanks = np.flatnonzero(puzzle == BLANKS["sudoku"])
            if len(blanks) > 1:  # at least one stays
                filled = rng.choice(blanks, rng.integers(1, len(blanks)), replace=False)
                puzzle = puzzle.copy()
                puzzle[filled] = solution[filled]
        return puzzle, solution

    def _load_slots(self, checkpoint: Path) -> None:
        files = sorted(checkpoint.glob(SLOTS_NAME.format("*")))
        if not files:
            raise ValueError(
                f"{checkpoint} has no {SLOTS_NAME.format(0)}, so the states of the puzzles in training are missing. It was saved by another "
                "trainer. Pass it as `model` to start a new training from its weights."
            )
        self.slots.load_state_dict([load_file(file) for file in files])

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(self.slots.state_dict(), Path(output_dir, SLOTS_NAME.format(self.accelerator.process_index)))
        super()._save_rng_state(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._ema is not None and self.args.should_save:
            weights = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
            save_file(weights, Path(output_dir, WEIGHTS_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with ExitStack() as stack:
            if self._ema is not None:
                stack.enter_context(self._ema.swapped(self.model))
            super().save_model(output_dir, _internal_call)

    def _finalize_training(self, *args, **kwargs):
        if self._ema is not None:  # before the best checkpoint is loaded
            self._ema.copy_to(self.model)
            self.remove_callback(self._ema)
            self._ema = None
        return super()._finalize_training(*args, **kwargs)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The Trainer only warns, and would train with the weights that are missing in the checkpoint
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"The weights of the checkpoint do not fit the model. Missing: {shown(sorted(load_result.missing_keys)[:3])}, unexpected: "
                f"{shown(sorted(load_result.unexpected_keys)[:3])}. Resume with the model of the checkpoint."
            )

    def _training_settings(self) -> dict[str, Any]:
        settings = super()._training_settings()
        # The slots do not depend on how they are divided
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes"):
            del settings[name]
        if self.args.metric_for_best_model is None:  # otherwise checkpoints are compared with it
            del settings["eval_segments"]
        return settings | {"num_slots": self.num_slots}
