import math
from dataclasses import dataclass, field
from typing import Literal

from .._compat import BaseConfig
from ..io import shown
from ..training.resume_config import ResumeConfig


@dataclass
class HRMReasoningConfig(ResumeConfig, BaseConfig):
    r"""
    Configuration class for the [`HRMReasoningTrainer`].

    This class includes only the parameters that are specific to training reasoning models. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. The default values are the settings of HRM
    (arXiv 2506.21734) for Sudoku and mazes with 1,000 puzzles, except for the batch size.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the number of segments

        halt_exploration_prob (`float`, *optional*, defaults to `0.1`):
            Probability per puzzle and segment that a minimum number of segments, drawn from 2 to `halt_max_steps`, must be reached
            before the puzzle may halt.
        eval_segments (`int`, *optional*):
            Number of segments of an evaluation. Defaults to `halt_max_steps` of the model.

        > Parameters that control the data

        augment (`bool`, *optional*, defaults to `False`):
            Whether to train on random symmetric copies of the puzzles, drawn each time that a puzzle is used. Sudoku: relabelled
            digits, permuted rows and columns, transposed. Mazes: rotated and mirrored. ARC: moved to another place of the board.
        easier_share (`float`, *optional*, defaults to `0.0`):
            Share of the puzzles that are made easier: some of their blanks are filled in. For Sudoku only. Models that are only
            trained on hard puzzles fail on easy ones.

        > Parameters that control the optimizer

        optim (`str`, *optional*, defaults to `"adam_atan2"`):
            Optimizer: `"adam_atan2"` ([`~reasoning.AdamAtan2`]), or `"adamw"`.
        atan2_bias_correction (`str`, *optional*, defaults to `"outside"`):
            `bias_correction` of Adam-atan2: `"outside"` as in the CUDA kernel of the papers, or `"inside"`. An error with `"adamw"`.
        atan2_scale (`float`, *optional*, defaults to `1.0`):
            `scale` of Adam-atan2. An error with `"adamw"`.
        puzzle_learning_rate (`float`, *optional*):
            Learning rate of the puzzle embedding, which is updated by sign descent. Defaults to `learning_rate`. The papers use
            1e-2 for ARC.
        puzzle_weight_decay (`float`, *optional*):
            Weight decay of the puzzle embedding. Defaults to `weight_decay`.
        ema (`float`, *optional*):
            Decay of an exponential moving average of the weights, which is evaluated and saved instead of the trained weights. TRM
            uses 0.999. Without it, no average is computed.

        > Parameters whose default values are different from [`~transformers.TrainingArguments`]

        learning_rate (`float`, *optional*, defaults to `1e-4`):
            Learning rate.
        weight_decay (`float`, *optional*, defaults to `1.0`):
            Decoupled weight decay of all weights.
        adam_beta2 (`float`, *optional*, defaults to `0.95`):
            Decay rate of the second moment.
        lr_scheduler_type (`str`, *optional*, defaults to `"constant_with_warmup"`):
            Schedule of the learning rates.
        warmup_steps (`float`, *optional*, defaults to `2000`):
            Number of steps with a linearly rising learning rate, or their share of all steps if less than 1.
        max_grad_norm (`float`, *optional*, defaults to `0.0`):
            Maximum norm of the gradient. With 0, gradients are not clipped.
        num_train_epochs (`float`, *optional*, defaults to `3.0`):
            Length of the training in the unit of the papers, if `max_steps` is not set: the number of steps is `num_train_epochs` ×
            rows / global batch size, rounded down. A puzzle is trained for several steps, so each row is used less often.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether to use bfloat16 mixed precision.

    > [!NOTE]
    > Rows are drawn by the slots of the trainer, not by a data loader, so the parameters of data loaders have no effect, and
    > evaluating, saving and logging by epoch is an error.
    """

    # Parameters that control the number of segments
    halt_exploration_prob: float = field(
        default=0.1,
        metadata={
            "help": "Probability per puzzle and segment that a minimum number of segments, drawn from 2 to `halt_max_steps`, "
            "must be reached before the puzzle may halt."
        },
    )
    eval_segments: int | None = field(
        default=None,
        metadata={"help": "Number of segments of an evaluation. Defaults to `halt_max_steps` of the model."},
    )

    # Parameters that control the data
    augment: bool = field(
        default=False,
        metadata={
            "help": "Train on random symmetric copies of the puzzles, drawn each time that a puzzle is used. Sudoku: relabelled "
            "digits, permuted rows and columns, transposed. Mazes: rotated and mirrored. ARC: moved to another place "
            "of the board."
        },
    )
    easier_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of the puzzles that are made easier: some of their blanks are filled in. For Sudoku only. Models "
            "that are only trained on hard puzzles fail on easy ones."
        },
    )

    # Parameters that control the optimizer
    optim: Literal["adam_atan2", "adamw"] = field(
        default="adam_atan2", metadata={"help": "Optimizer: `adam_atan2`, or `adamw`."}
    )
    atan2_bias_correction: Literal["outside", "inside"] = field(
        default="outside",
        metadata={
            "help": "`bias_correction` of Adam-atan2: `outside` as in the CUDA kernel of the papers, or `inside`."
        },
    )
    atan2_scale: float = field(default=1.0, metadata={"help": "`scale` of Adam-atan2."})
    puzzle_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of the puzzle embedding, which is updated by sign descent. Defaults to `learning_rate`. The "
            "papers use 1e-2 for ARC."
        },
    )
    puzzle_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of the puzzle embedding. Defaults to `weight_decay`."}
    )
    ema: float | None = field(
        default=None,
        metadata={
            "help": "Decay of an exponential moving average of the weights, which is evaluated and saved instead of the "
            "trained weights. TRM uses 0.999. Without it, no average is computed."
        },
    )

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate."})
    weight_decay: float = field(default=1.0, metadata={"help": "Decoupled weight decay of all weights."})
    adam_beta2: float = field(default=0.95, metadata={"help": "Decay rate of the second moment."})
    lr_scheduler_type: str = field(
        default="constant_with_warmup", metadata={"help": "Schedule of the learning rates."}
    )
    warmup_steps: float = field(
        default=2000,
        metadata={
            "help": "Number of steps with a linearly rising learning rate, or their share of all steps if less than 1."
        },
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Maximum norm of the gradient. With 0, gradients are not clipped."}
    )
    num_train_epochs: float = field(
        default=3.0,
        metadata={
            "help": "Length of the training in the unit of the papers, if `max_steps` is not set: the number of steps is "
            "`num_train_epochs` x rows / global batch size, rounded down."
        },
    )
    bf16: bool | None = field(default=False, metadata={"help": "Whether to use bfloat16 mixed precision."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Not supported: the backward pass only covers the last calls of a segment."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Has no effect: the trainer reads the columns that it needs."}
    )
    ignore_data_skip: bool = field(
        default=True, metadata={"help": "Always `True`: the slots of a checkpoint know which rows come next."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Always `False`: a loss that is not finite stops the training."}
    )

    def __post_init__(self):
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "exact_accuracy"
        # TrainingArguments only accepts the optimizers of transformers
        optim, self.optim = self.optim, "adamw_torch"
        super().__post_init__()
        self.optim = optim
        # All weights get gradients in each segment, and no buffer changes
        for name in ("ddp_find_unused_parameters", "ddp_broadcast_buffers"):
            if getattr(self, name) is None:
                setattr(self, name, False)
        for name in ("halt_exploration_prob", "easier_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be from 0 to 1.")
        if self.data_seed is not None and self.data_seed < 0:
            raise ValueError(f"`data_seed` is {self.data_seed}. It must be at least 0.")
        if self.eval_segments is not None and self.eval_segments < 1:
            raise ValueError(f"`eval_segments` is {self.eval_segments}. It must be at least 1.")
        for name, choices in (("optim", ("adam_atan2", "adamw")), ("atan2_bias_correction", ("outside", "inside"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {shown(getattr(self, name))}. It must be one of {', '.join(choices)}.")
        if not 0 < self.atan2_scale < math.inf:
            raise ValueError(f"`atan2_scale` is {self.atan2_scale}. It must be greater than 0.")
        options = ("adam_epsilon",) if self.optim == "adam_atan2" else ("atan2_bias_correction", "atan2_scale")
        for name in options:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ValueError(f"`{name}` has no effect with `optim={self.optim}`. Remove it.")
        for name in ("puzzle_learning_rate", "puzzle_weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value}. It must be a number that is at least 0.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"`ema` is {self.ema}. It must be at least 0 and less than 1. Use None for no average.")
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                raise ValueError(
                    f"`{name}` is epoch, but the slots do not use all rows equally often, so an epoch has no end. Use steps, with "
                    f"`{name.removesuffix('_strategy')}_steps`."
                )
        if self.gradient_checkpointing:  # or `activation_checkpointing`, which has replaced it
            raise ValueError(
                "`gradient_checkpointing` is not supported, because the backward pass only covers the last calls of a segment. Remove it."
            )
        for name in ("label_smoothing_factor", "neftune_noise_alpha", "optim_args", "optim_target_modules"):
            if getattr(self, name):
                raise ValueError(f"`{name}` is not supported, so it would have no effect. Remove it.")
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` is not supported: an evaluation has the precision of the training. Remove it."
                )
        if self.fp16:
            raise ValueError("`fp16` is not supported. Use `bf16`, or float32.")
        if self.auto_find_batch_size:
            raise ValueError(
                "`auto_find_batch_size` is not supported, because the slots of a training have a fixed number. Remove it."
            )
        if not self.ignore_data_skip or self.logging_nan_inf_filter:
            raise ValueError("`ignore_data_skip` must be true and `logging_nan_inf_filter` false. Remove them.")
