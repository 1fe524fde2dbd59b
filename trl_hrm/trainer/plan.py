"""Plan a training: compute its optimizer steps, evaluations and checkpoints before it starts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from datasets import Dataset
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from trl import GRPOConfig, RLOOConfig

from ..training.safe_training import check_length
from .forest_dataset import STEP_COLUMNS, flat_column


FEW_STEPS = 100


@dataclass(frozen=True)
class TrainingPlan:
    """
    The optimizer steps, evaluations and checkpoints of a training, as [`plan_training`] computes them. `str(plan)` is the
    text that the training commands print.

    Args:
        num_rows (`int`): Number of rows of the prepared training dataset.
        num_processes (`int`): Number of processes that train.
        batch_size (`int`): Number of rows per process and forward pass.
        gradient_accumulation_steps (`int`): Number of forward passes per optimizer step.
        rows_per_step (`int`): Number of rows per optimizer step, over all processes. For GRPO and RLOO, number of completions.
        dropped_rows (`int`): Number of rows that `dataloader_drop_last`, or an incomplete generation batch of GRPO and RLOO, leaves
            out of each epoch.
        steps_per_epoch (`int`): Number of optimizer steps per epoch.
        max_steps (`int`): Number of optimizer steps in total.
        num_epochs (`float`): Number of epochs in total.
        warmup_steps (`int`): Number of optimizer steps with a rising learning rate.
        evaluation_steps (`tuple[int]`): Optimizer steps after which the model is evaluated, 0 for the start.
        checkpoint_steps (`tuple[int]` or `None`): Optimizer steps after which a checkpoint is saved. `None` with
            `save_strategy="best"`, where they depend on the evaluations.
        best_metric (`str`, *optional*): Metric whose best checkpoint is loaded at the end.
        num_generations (`int`, *optional*): Number of completions per prompt, for GRPO and RLOO.
        num_prompts (`int`, *optional*): Number of prompts per generation batch, for GRPO and RLOO.
        num_iterations (`int`): Number of times that a generation batch is trained on.
        num_labels (`int`, *optional*): Number of labelled steps in the rows.
        num_correct, num_wrong (`int`): Number of labels of 1 and of 0. The other labels are soft.
        mean_label (`float`, *optional*): Mean of the labels.
        warnings (`tuple[str]`): What is probably a mistake, and which options change it.
    """

    num_rows: int
    num_processes: int
    batch_size: int
    gradient_accumulation_steps: int
    rows_per_step: int
    dropped_rows: int
    steps_per_epoch: int
    max_steps: int
    num_epochs: float
    warmup_steps: int
    evaluation_steps: tuple[int, ...]
    checkpoint_steps: tuple[int, ...] | None
    best_metric: str | None = None
    num_generations: int | None = None
    num_prompts: int | None = None
    num_iterations: int = 1
    num_labels: int | None = None
    num_correct: int = 0
    num_wrong: int = 0
    mean_label: float | None = None
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = {"rows": f"{self.num_rows:,}"}
        if self.dropped_rows and self.num_prompts is None:
            lines["rows"] += f" ({self.dropped_rows:,} are dropped in each epoch by dataloader_drop_last)"
        elif self.dropped_rows:
            lines["rows"] += f" ({self.dropped_rows:,} are left out of each epoch, less than a generation batch)"
        if self.num_labels is not None:
            kinds = f"mean {self.mean_label:.3f}"
            if self.num_correct + self.num_wrong == self.num_labels:
                kinds = f"{self.num_correct:,} correct, {self.num_wrong:,} wrong"
            lines["labels"] = f"{self.num_labels:,} ({kinds})"
        rows = "rows"
        if self.num_prompts is not None:
            rows = "completions"
            again = f", trained on {self.num_iterations:,} times" if self.num_iterations > 1 else ""
            lines["generation batch"] = (
                f"{self.num_prompts * self.num_generations:,} completions ({self.num_prompts:,} prompts x "
                f"{self.num_generations:,} generations){again}"
            )
        lines[f"{rows} per optimizer step"] = (
            f"{self.rows_per_step:,} (batch size {self.batch_size} x accumulation {self.gradient_accumulation_steps} x "
            f"processes {self.num_processes})"
        )
        lines["optimizer steps per epoch"] = f"{self.steps_per_epoch:,}"
        lines["optimizer steps"] = f"{self.max_steps:,} ({self.num_epochs:.4g} epoch{'s' * (self.num_epochs != 1)})"
        lines["warmup steps"] = f"{self.warmup_steps:,}"
        lines["evaluations"] = _describe_steps(self.evaluation_steps)
        lines["checkpoints"] = (
            "after each evaluation that is the best so far"
            if self.checkpoint_steps is None
            else _describe_steps(self.checkpoint_steps)
        )
        if self.best_metric is not None:
            lines["checkpoints"] += f". The best one by {self.best_metric} is loaded at the end"
        width = max(26, *map(len, lines))
        text = ["training plan", *(f"  {name:<{width}} {value}" for name, value in lines.items())]
        return "\n".join([*text, *(f"warning: {warning}" for warning in self.warnings)])


def plan_training(args: TrainingArguments, rows: Dataset | int, num_processes: int | None = None) -> TrainingPlan:
    """
    Compute the optimizer steps, evaluations and checkpoints of a training from its arguments.

    Args:
        args ([`~transformers.TrainingArguments`]):
            Arguments of the training, such as a [`HRMRewardConfig`] or a [`KLSelfConfig`].
        rows ([`~datasets.Dataset`] or `int`):
            Prepared training dataset (`trainer.train_dataset`), or its number of rows. Packing, `max_length` and empty
            completions change the number of rows when a dataset is prepared.
        num_processes (`int`, *optional*):
            Number of processes that train, with one device each. Defaults to the number of processes of this launch.

    Returns:
        [`TrainingPlan`]: The plan, with the same numbers as `transformers.Trainer`.

    Raises:
        `ValueError`: If there is nothing to train on: no row, less than a batch with `dataloader_drop_last`, or no step.

    Example:

    ```python
    >>> from trl_hrm import HRMRewardConfig, plan_training

    >>> args = HRMRewardConfig("out", per_device_train_batch_size=2, num_train_epochs=40, use_cpu=True, bf16=False)
    >>> plan = plan_training(args, 690, num_processes=8)
    >>> plan.steps_per_epoch, plan.max_steps
    (44, 1760)
    ```
    """
    check_length(args)
    num_rows = rows if isinstance(rows, int) else len(rows)
    batch_size = args.train_batch_size if num_processes is None else args.per_device_train_batch_size
    num_processes = args.world_size if num_processes is None else num_processes
    # Accelerate cuts the rows into batches and gives each process one batch at a time, or a part of each batch
    splits = args.accelerator_config.split_batches
    rows_per_pass = batch_size if splits else batch_size * num_processes
    generation, dropped = {}, 0
    if isinstance(args, GRPOConfig | RLOOConfig):
        # TRL's sampler repeats the prompts of a generation batch, and leaves out an incomplete one. An optimizer step trains on
        # `gradient_accumulation_steps` of the `steps_per_generation` parts of a generation batch
        size = rows_per_pass * args.steps_per_generation
        if splits or size % args.num_generations:
            raise ValueError(
                f"A generation batch has {size:,} completions (batch size {batch_size} x processes {num_processes} x "
                f"`steps_per_generation` {args.steps_per_generation}). It must be a multiple of `num_generations` "
                f"{args.num_generations}, without `split_batches`."
            )
        num_prompts = size // args.num_generations
        generation = {
            "num_generations": args.num_generations,
            "num_prompts": num_prompts,
            "num_iterations": args.num_iterations,
        }
        passes = num_rows // num_prompts * args.num_iterations * args.steps_per_generation
        dropped = num_rows % num_prompts
        if not passes:
            raise ValueError(
                f"There is nothing to train on: the dataset has {num_rows:,} rows, and a generation batch has {num_prompts:,} prompts "
                f"({size:,} completions). Use more rows, a higher `num_generations`, or a smaller batch or `steps_per_generation`."
            )
    elif args.dataloader_drop_last:
        passes = num_rows // rows_per_pass
        dropped = num_rows - passes * rows_per_pass
    else:
        passes = math.ceil(math.ceil(num_rows / batch_size) / (1 if splits else num_processes))
    if not passes:
        raise ValueError(
            f"There is nothing to train on: the dataset has {num_rows:,} rows, and a batch has {rows_per_pass:,} rows over "
            f"{num_processes} processes. Use more rows or a smaller batch, or `dataloader_drop_last=False`."
        )
    accumulation = args.gradient_accumulation_steps
    steps_per_epoch = math.ceil(passes / accumulation)
    max_steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    evaluations, checkpoints = _schedule(args, max_steps, passes, accumulation)
    plan = TrainingPlan(
        num_rows=num_rows,
        num_processes=num_processes,
        batch_size=batch_size // num_processes if splits else batch_size,
        gradient_accumulation_steps=accumulation,
        rows_per_step=min(rows_per_pass * accumulation, rows_per_pass * passes if generation else num_rows),
        dropped_rows=dropped,
        steps_per_epoch=steps_per_epoch,
        max_steps=max_steps,
        num_epochs=max_steps / steps_per_epoch,
        warmup_steps=args.get_warmup_steps(max_steps),
        evaluation_steps=evaluations,
        checkpoint_steps=checkpoints,
        best_metric=args.metric_for_best_model if args.load_best_model_at_end else None,
        **generation,
        **({} if isinstance(rows, int) else _count_labels(rows)),
    )
    return replace(plan, warnings=tuple(_warnings(args, plan)))


def _schedule(
    args: TrainingArguments, max_steps: int, passes: int, accumulation: int
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Return the steps with an evaluation and with a checkpoint, by asking the callback of Trainer that decides on them."""
    flow, state = DefaultFlowCallback(), TrainerState(max_steps=max_steps)
    state.compute_steps(args, max_steps)
    evaluations, checkpoints = {0} if args.eval_on_start else set(), set()
    steps_per_epoch = math.ceil(passes / accumulation)
    for step in range(1, max_steps + 1):
        epoch, step_in_epoch = divmod(step - 1, steps_per_epoch)
        state.global_step = step
        state.epoch = epoch + min((step_in_epoch + 1) * accumulation, passes) / passes
        control = flow.on_step_end(args, state, TrainerControl())
        if step_in_epoch + 1 == steps_per_epoch or step == max_steps:
            control = flow.on_epoch_end(args, state, control)
        evaluations |= {step} if control.should_evaluate else set()
        checkpoints |= {step} if control.should_save else set()
    is_best = args.save_strategy == SaveStrategy.BEST
    return tuple(sorted(evaluations)), None if is_best else tuple(sorted(checkpoints))


def _warnings(args: TrainingArguments, plan: TrainingPlan) -> list[str]:
    found = []
    if plan.max_steps < FEW_STEPS:
        more = "`max_steps`" if args.max_steps > 0 else "`num_train_epochs`"
        packing = ", or set `packing=False`" if getattr(args, "packing", False) else ""
        found.append(
            f"The training has only {plan.max_steps:,} optimizer step{'s' * (plan.max_steps != 1)}, and a model hardly learns in fewer "
            f"than {FEW_STEPS}. Raise {more}, lower "
            f"`per_device_train_batch_size` or `gradient_accumulation_steps`{packing}, or use more data."
        )
    for name, strategy in (("eval_steps", args.eval_strategy), ("save_steps", args.save_strategy)):
        steps = getattr(args, name)
        if strategy == IntervalStrategy.STEPS and steps and steps > plan.max_steps:
            found.append(
                f"`{name}` {steps:,.4g} is never reached, because the training has {plan.max_steps:,} optimizer "
                f"step{'s' * (plan.max_steps != 1)}{', so only the last one is saved' * (name == 'save_steps')}. Lower it, or use "
                f"`{name.replace('steps', 'strategy')}` epoch."
            )
    if args.auto_find_batch_size:
        found.append(
            "`auto_find_batch_size` may lower the batch size, and the training then has more optimizer steps."
        )
    if args.load_best_model_at_end and not plan.evaluation_steps:
        found.append(
            "`load_best_model_at_end` has no effect, because the model is never evaluated. Set `eval_strategy` and `save_strategy` "
            "to epoch."
        )
    return found


def _count_labels(rows: Dataset) -> dict[str, float | int]:
    """Count the labels of forest rows that are trained, which are those with a weight above 0."""
    if not set(STEP_COLUMNS) <= set(rows.column_names):
        return {}
    labels = flat_column(rows, "labels")[flat_column(rows, "label_weights") > 0]
    return {
        "num_labels": len(labels),
        "num_correct": int((labels == 1).sum()),
        "num_wrong": int((labels == 0).sum()),
        "mean_label": float(labels.mean()),
    }


def _describe_steps(steps: Sequence[int]) -> str:
    """Describe `(200, 400, 600, 690)` as "4 (every 200 steps, and after step 690)"."""
    if not steps:
        return "none"
    after = [step for step in steps if step > 0]
    interval = after[0] if after else 0
    last = [] if not interval or after[-1] % interval == 0 else [after.pop()]
    if after != [interval * (i + 1) for i in range(len(after))]:
        more = ", ..." if len(steps) > 3 else ""
        return f"{len(steps):,} (after steps {', '.join(f'{step:,}' for step in steps[:3])}{more})"
    text = [f"every {interval:,} steps"] if len(after) > 1 else [f"after step {step:,}" for step in after]
    text += [f"after step {step:,}" for step in last]
    text = ["before the first step"] * (0 in steps) + text
    return f"{len(steps):,} ({', and '.join(text)})"
