"""A callback that shows, after each evaluation, which steps a reward model judges worst, and how well its scores are calibrated."""

import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from accelerate.logging import get_logger
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..io import replacing, shown, write_json
from ..pages.page import calibration_table, render
from ..pages.pictures import reliability_picture
from ..step_metrics import binned_calibration_error, calibration_bins
from ..terminal import one_line
from ..tracking import TrackedTable, log_to_trackers
from ..training.model_card import weights_step
from .step_table import MAX_CHARACTERS
from .step_trainer import PREPARED, EvaluatedSteps, StepTrainer


logger = get_logger(__name__)
FOLDER = (
    "_evaluations"  # names that begin with "_" are not pushed to the Hub: the page has problems of the evaluation set
)
KINDS = ("false positive", "false negative")
CALIBRATION_COLUMNS = ("low", "high", "count", "mean_score", "share_right")


class WorstStep(NamedTuple):
    """
    A step that the reward model judges wrongly. The fields are the columns of the logged table.

    Args:
        kind (`str`):
            `"false positive"` for a wrong step with a score of at least 0.5, `"false negative"` for a correct step with a score below 0.5.
        problem (`str`):
            Problem, as in the dataset.
        step (`str`):
            Text of the step.
        label (`float`):
            Probability in `[0, 1]` that the step is correct, from the dataset.
        score (`float`):
            Probability in `[0, 1]` that the step is correct, from the model.
        error (`float`):
            Distance between score and label.
        loss (`float`):
            Loss of the step, before weighting.
        num_merged (`int`):
            Number of original steps in the step: 1, or more for a merged step.
        row (`int`):
            Row of the evaluation dataset.
        step_index (`int`):
            Index of the step in `completions` of this row.
    """

    kind: Literal["false positive", "false negative"]
    problem: str
    step: str
    label: float
    score: float
    error: float
    loss: float
    num_merged: int
    row: int
    step_index: int


class StepTableCallback(TrainerCallback):
    """
    A [`~transformers.TrainerCallback`] that shows, after each evaluation of a step reward model, the steps that it judges worst, and how
    well its scores are calibrated.

    It uses the scores that the evaluation has computed, without another forward pass. As in the metrics, steps with a label or a score
    of at least 0.5 count as correct. A *false positive* is a wrong step that is scored as correct, a *false negative* a correct step that
    is scored as wrong. The `num_steps` of each kind with the largest error (distance between score and label) are shown, the
    largest error first, and in the order of the dataset if errors are equal.

    Each evaluation writes a page and the same data as JSON to `_evaluations/eval_XXXXX.html` and `.json` in `output_dir`. `XXXXX` is the
    training step, or the step of the loaded checkpoint after a training with `load_best_model_at_end`. `eval` is the `metric_key_prefix`,
    such as `eval_math` for a named evaluation dataset, and `eval_other` for a dataset that is not the trainer's. The page also shows the
    steps before each of these steps. The folder is not pushed to the Hub, because it contains problems of the evaluation dataset.

    If the trainer reports to trackio or Weights & Biases (`report_to`), it also logs to them, with the names

    - `eval/worst_steps`: a table with the fields of [`~trainer.step_table_callback.WorstStep`] as columns. Long texts are shortened,
    - `eval/calibration`: a table of the score in up to 10 bins, without empty ones, with `low`, `high`, `count`, `mean_score` and `share_right` (the mean label),
    - `eval/reliability`: a picture of this table.

    For a named evaluation dataset, the names are `eval/math_worst_steps` and so on. The expected calibration error is the metric `ece`
    of [`HRMRewardTrainer`]. With several processes, the steps of all processes are compared, and only the main process writes and logs.

    `HRMRewardConfig(log_worst_steps=20)` adds this callback to [`HRMRewardTrainer`] and [`ImplicitPRMTrainer`].

    Example:

    ```python
    >>> trainer = PRMTrainer(..., args=PRMConfig(eval_strategy="steps", eval_steps=50, report_to="trackio", ...), eval_dataset=held_out)
    >>> trainer.add_callback(StepTableCallback(trainer))
    ```

    Args:
        trainer ([`HRMRewardTrainer`], [`ImplicitPRMTrainer`] or [`~prm.PRMTrainer`]):
            Trainer whose evaluations are shown.
        num_steps (`int`, *optional*, defaults to `20`):
            Maximum number of steps of each kind.

    Raises:
        `TypeError`: If the trainer does not train a step reward model.
        `ValueError`: If `num_steps` is below 1, the evaluation does not keep the outputs (`prediction_loss_only`), it has another order than
            the dataset (`train_sampling_strategy`), or the evaluation dataset was prepared by the caller. In an evaluation, see [`~trainer.step_trainer.StepTrainer.evaluated_steps`].
    """

    def __init__(self, trainer: Trainer, num_steps: int = 20):
        if not isinstance(trainer, StepTrainer):
            raise TypeError(
                f"`trainer` is a {type(trainer).__name__}. It must train a step reward model: HRMRewardTrainer, ImplicitPRMTrainer or "
                "PRMTrainer."
            )
        if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"`num_steps` is {shown(num_steps)}. It must be a whole number of at least 1.")
        if trainer.args.prediction_loss_only:
            raise ValueError(
                "`prediction_loss_only` is set, so an evaluation does not keep the scores of the steps. Remove it."
            )
        if trainer.args.train_sampling_strategy != "random":
            raise ValueError(
                f"`train_sampling_strategy` is {shown(trainer.args.train_sampling_strategy)}, which also changes the order of the evaluation, so "
                "the texts of its steps would be unknown. Leave it at 'random'."
            )
        data = trainer.eval_dataset
        for one in data.values() if isinstance(data, dict) else [data]:
            if one is not None and trainer.sources_of(one) is None:
                raise ValueError(PREPARED)
        self.trainer = trainer
        self.num_steps = num_steps

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs,
    ) -> None:
        evaluated = self.trainer.evaluated
        if evaluated is not None and self.trainer.sources_of(evaluated) is None:
            logger.warning(  # rather than losing the metrics that were computed
                "This evaluation has no table of worst steps: its dataset was already prepared, so the texts of its steps are unknown. For a "
                "table of the training steps, pass the dataset that was given to the trainer as `train_dataset`."
            )
            return
        steps = self.trainer.evaluated_steps()  # on all processes, so that an error ends all of them
        if not state.is_world_process_zero:
            return
        training_step = weights_step(self.trainer)
        found = self._worst(steps)
        bins = calibration_bins(list(zip(steps.scores.tolist(), steps.labels.tolist(), strict=True)))
        picture = reliability_picture({"labelled steps": bins}, "steps")
        record = {
            "dataset": steps.name,
            "training_step": training_step,
            "num_labels": len(steps.labels),
            "num_false_positives": int(((steps.labels < 0.5) & (steps.scores >= 0.5)).sum()),
            "num_false_negatives": int(((steps.labels >= 0.5) & (steps.scores < 0.5)).sum()),
            "ece": binned_calibration_error(bins),
            "calibration": bins,
        }
        file_name = re.sub(
            r"[^\w.-]", lambda match: f"%{ord(match[0]):02X}", steps.name
        )  # a dataset may be called "a/b"
        path = Path(args.output_dir) / FOLDER / f"{file_name}_{training_step:05d}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            headings = ("Wrong steps scored as correct", "Correct steps scored as wrong")
            sections = [
                (heading, [(one, before) for one, before in found if one.kind == kind])
                for heading, kind in zip(headings, KINDS, strict=True)
            ]
            page = render(
                "evaluated_steps.html.jinja",
                title=f"{steps.name} at training step {training_step:,}",
                record=record,
                sections=sections,
                table_of_bins=calibration_table(bins, "steps"),
                picture=picture,
            )
            file.write(page)
        worst = [one._asdict() | {"steps_before": before} for one, before in found]
        write_json(path.with_suffix(".json"), record | {"worst_steps": worst})

        prefix = f"eval/{steps.name.removeprefix('eval_')}_" if steps.name.startswith("eval_") else f"{steps.name}/"
        rows = [
            one._replace(
                problem=one_line(one.problem, MAX_CHARACTERS),
                step=one_line(one.step, MAX_CHARACTERS),
            )
            for one, _ in found
        ]
        calibration = [[one[column] for column in CALIBRATION_COLUMNS] for one in bins]
        values = {
            f"{prefix}worst_steps": TrackedTable(WorstStep._fields, rows),
            f"{prefix}calibration": TrackedTable(CALIBRATION_COLUMNS, calibration),
            f"{prefix}reliability": picture,
            "train/global_step": training_step,
        }
        log_to_trackers(args.report_to, values)

    def _worst(self, steps: EvaluatedSteps) -> list[tuple[WorstStep, list[str]]]:
        """Return the false positives and then the false negatives with the largest errors, with the texts of the steps before them."""
        errors = np.abs(steps.scores - steps.labels)
        is_correct, is_accepted = steps.labels >= 0.5, steps.scores >= 0.5
        found = []
        for kind, is_wrong in zip(KINDS, (~is_correct & is_accepted, is_correct & ~is_accepted), strict=True):
            places = np.flatnonzero(is_wrong)
            order = np.argsort(-errors[places], kind="stable")[: self.num_steps]
            for i in places[order].tolist():
                prompt, path = self.trainer.source_path(steps.sources, i)
                one = WorstStep(
                    kind=kind,
                    problem=prompt,
                    step=path[-1],
                    label=float(steps.labels[i]),
                    score=float(steps.scores[i]),
                    error=float(errors[i]),
                    loss=float(steps.losses[i]),
                    num_merged=int(steps.num_merged[i]),
                    row=int(steps.sources.rows[i]),
                    step_index=int(steps.sources.steps[i]),
                )
                found.append((one, path[:-1]))
        return found
