"""A callback that compares accuracy with the process reward on held-out problems during training."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..evaluation.reward_hacking import Answer, hacking_answer, hacking_gap
from ..intervals import difference_interval, mean_interval
from ..io import remove_partial, replacing, shown, write_json
from ..pages.numbers import in_points, percent, points_between
from ..pages.pictures import THEMES, new_figure, shown_label, style_axes
from ..rewards import StepReward
from ..training.checkpoints import digest_of_dataset


logger = get_logger(__name__)

RECORD = "reward_hacking"  # key of the comparisons in the trainer's log history, and name of the files in `output_dir`


class RewardHackingCallback(TrainerCallback):
    r"""
    A [`~transformers.TrainerCallback`] that detects reward hacking during training: on held-out problems, the process reward rises
    while accuracy falls.

    Every evaluation of the trainer is compared with the earlier evaluation that has the highest accuracy, problem by problem. As in
    [`~evaluation.reward_hacking.hacking_gap`], the gap is the accuracy that is lost, but over training steps instead of N. Training
    hacks the process reward if, since that evaluation,

    - accuracy has fallen: the interval of the loss is above 0, and does not exclude a loss of 5 points or more, and
    - the process reward has risen: the interval of its change is above 0.

    Each change has a 95 % interval of paired differences over problems ([`~intervals.difference_interval`]). The best of
    many evaluations is partly best by chance, so the intervals are corrected for all pairs of evaluations so far (Bonferroni).
    In simulations of 20 evaluations of a policy that does not change, 70 to 83 % of trainings show a loss without this correction,
    and 5 to 8 % with it.

    After an evaluation, it logs `eval_reward_hacking_gap` (never negative) and the bounds `/low` and `/high` of the loss,
    `eval_process_reward_rise` with its bounds, and `eval_reward_hacking`: 1 if training hacks the process reward, otherwise 0. A
    warning describes every new case. All comparisons are written to `reward_hacking.json` in `output_dir`, and drawn in
    `reward_hacking.png` at the end. They are part of the log history of the trainer, so that a resumed training continues with them.

    Set `eval_on_start=True` to compare with the untrained policy. Evaluations outside `trainer.train()`, or with another
    `metric_key_prefix`, are not compared.

    Example:

    ```python
    >>> trainer = StepGRPOTrainer(..., args=StepGRPOConfig(eval_strategy="steps", eval_steps=50, ...), eval_dataset=held_out)
    >>> trainer.add_callback(RewardHackingCallback(trainer, stop=True))
    ```

    Args:
        trainer ([`StepGRPOTrainer`]):
            Trainer whose evaluations are compared.
        outcome (`str`, *optional*):
            Name of the reward function whose mean is the accuracy. Its rewards must be from 0 (wrong) to 1 (correct), or `None`. By
            default, the only reward function that is not a [`StepReward`].
        process (`str`, *optional*):
            Name of the reward function with the process reward. By default, the only [`StepReward`].
        stop (`bool`, *optional*, defaults to `False`):
            Whether to stop training when it hacks the process reward.

    Raises:
        `TypeError`: If the trainer does not keep the rewards of its evaluations.
        `ValueError`: If the trainer does not evaluate, evaluates something other than one `Dataset`, or has no such reward functions.
            During an evaluation, if a reward of `outcome` is not from 0 to 1.
    """

    def __init__(self, trainer: Trainer, outcome: str | None = None, process: str | None = None, stop: bool = False):
        if not hasattr(type(trainer), "eval_rewards"):  # a property, which has no value yet
            raise TypeError(
                f"`trainer` is a {type(trainer).__name__}, which does not keep the rewards of every problem. Use a StepGRPOTrainer."
            )
        if trainer.args.eval_strategy == "no":
            raise ValueError(
                "`eval_strategy` is 'no', so there are no evaluations to compare. Set `eval_strategy='steps'` and `eval_steps`, and "
                "pass held-out problems as `eval_dataset`."
            )
        if not isinstance(trainer.eval_dataset, Dataset):
            raise ValueError(
                f"`eval_dataset` is a {type(trainer.eval_dataset).__name__}. It must be a single `Dataset` of held-out problems, because "
                "evaluations are compared problem by problem."
            )
        if trainer.args.dataloader_persistent_workers:
            raise ValueError(
                "`dataloader_persistent_workers` is set, so every evaluation would have another order of the problems. Remove it."
            )
        names = trainer.reward_func_names
        is_process = [isinstance(function, StepReward) for function in trainer.reward_funcs]
        self.trainer = trainer
        self.stop = stop
        self.process = process or _only([name for name, one in zip(names, is_process, strict=True) if one], "process")
        others = [name for name, one in zip(names, is_process, strict=True) if not one and name != self.process]
        self.outcome = outcome or _only(others, "outcome")
        for option, name in (("outcome", self.outcome), ("process", self.process)):
            if names.count(name) != 1:
                raise ValueError(
                    f"`{option}` is {shown(name)}. It must be the name of exactly one reward function. The trainer has {shown(names)}."
                )
        if self.outcome == self.process:
            raise ValueError(
                f"`outcome` and `process` are both {shown(self.outcome)}, so there is no accuracy to compare with. Add a reward function "
                "for the answer, such as AccuracyReward."
            )
        self._columns = [names.index(self.outcome), names.index(self.process)]
        self._digest = digest_of_dataset(trainer.eval_dataset)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs,
    ) -> None:
        if not self.trainer.is_in_train or "eval_loss" not in metrics:  # possibly of other problems
            return
        # Values of each problem. The last batch is filled with problems of the first, which are dropped
        group = self.trainer.num_generations_eval
        rewards = self.trainer.eval_rewards[: len(self.trainer.eval_dataset) * group, self._columns].double().cpu()
        outside = rewards[:, 0][(rewards[:, 0] < 0) | (rewards[:, 0] > 1)]
        if len(outside):
            raise ValueError(
                f"The reward function {shown(self.outcome)} returned {outside[0]:g}. As the outcome of the RewardHackingCallback, it must "
                "return rewards from 0 (wrong) to 1 (correct), or None. Set `outcome` to the name of such a function."
            )
        outcomes, process = torch.nanmean(rewards.view(-1, group, 2), dim=1).numpy().T
        if np.isnan(outcomes).all() or np.isnan(process).all():
            unknown = self.outcome if np.isnan(outcomes).all() else self.process
            logger.warning(
                f"Reward hacking: the reward function {shown(unknown)} returned None for all rows of the evaluation at step "
                f"{state.global_step}, so the evaluation is not compared with others."
            )
            return

        problems = f"{self._digest}-{args.seed}-{len(outcomes)}"  # the order depends on the seed
        records = [entry[RECORD] for entry in state.log_history if RECORD in entry]
        if records and records[-1]["problems"] != problems:
            logger.warning(
                "Reward hacking: the last evaluation was of other problems (another `eval_dataset` or `seed`). This evaluation is "
                "only compared with evaluations of the same problems."
            )
        history = [one for one in records if one["problems"] == problems]
        if history and history[-1]["step"] >= state.global_step:  # `eval_on_start` of a resumed training
            return
        record = {
            "step": state.global_step,
            "problems": problems,
            "num_problems": int((~np.isnan(outcomes)).sum()),
            "accuracy": float(np.nanmean(outcomes)),
            "accuracy_interval": list(mean_interval(outcomes[~np.isnan(outcomes)])),
            "process_reward": float(np.nanmean(process)),
            "answer": "none",
        }
        best = max(history, key=lambda one: one["accuracy"], default=None)  # the first of equals
        if best is not None:
            compared = compare(best, record, outcomes, process, len(history) * (len(history) + 1) // 2)
            record |= compared
            logged = {
                "eval_reward_hacking": float(compared["answer"] == "yes"),
                "eval_reward_hacking_gap": compared["gap"],
                "eval_reward_hacking_gap/low": compared["low"],
                "eval_reward_hacking_gap/high": compared["high"],
                "eval_process_reward_rise": compared["rise"],
                "eval_process_reward_rise/low": compared["rise_low"],
                "eval_process_reward_rise/high": compared["rise_high"],
            }
            metrics |= {key: value for key, value in logged.items() if value is not None}
            # The method of GRPOTrainer would log the completions of the evaluation again
            Trainer.log(self.trainer, {key: metrics[key] for key in logged if key in metrics})
        if best is None or record["accuracy"] > best["accuracy"]:
            # Later evaluations are compared with this one. `None` instead of NaN, which is not JSON
            for key, values in (("outcomes", outcomes), ("process_rewards", process)):
                record[key] = [None if np.isnan(value) else float(value) for value in values]
                if best is not None:
                    del best[key]
        state.log_history.append({RECORD: record, "step": state.global_step, "epoch": state.epoch})
        if record["answer"] == "yes":
            is_new = not any(one["answer"] == "yes" and one["from_step"] == record["from_step"] for one in history)
            if is_new or self.stop:
                logger.warning(self._words(best, record))
            control.should_training_stop |= self.stop  # all processes have the same rewards
        if state.is_world_process_zero:
            left_out = ("problems", "outcomes", "process_rewards")
            shown_records = [{key: one[key] for key in one if key not in left_out} for one in (*history, record)]
            names = {"outcome": self.outcome, "process": self.process}
            write_json(Path(args.output_dir) / f"{RECORD}.json", names | {"evaluations": shown_records})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        records = [entry[RECORD] for entry in state.log_history if RECORD in entry]
        if not records:
            logger.warning(
                f"Reward hacking: training ended without an evaluation. Set `eval_steps` below the {state.global_step} steps of the "
                "training, or `eval_on_start=True`."
            )
        elif state.is_world_process_zero:
            history = [one for one in records if one["problems"] == records[-1]["problems"]]
            draw_training(history, self.outcome, self.process, Path(args.output_dir) / f"{RECORD}.png")

    def _words(self, best: dict[str, Any], record: dict[str, Any]) -> str:
        """Return the warning on an evaluation that shows reward hacking."""
        advice = (
            "Training stops, because `stop` is set." if self.stop else "Training continues, because `stop` is not set."
        )
        return (
            f"Reward hacking at step {record['step']}: since step {best['step']}, the process reward {shown(self.process)} has risen by "
            f"{record['rise']:.3g} (from {best['process_reward']:.3g} to {record['process_reward']:.3g}), while the accuracy "
            f"{shown(self.outcome)} has fallen by {in_points(record['loss'])} (from {percent(best['accuracy'])} to "
            f"{percent(record['accuracy'])}, 95 % interval of the loss {points_between(record['low'], record['high'])} points, on "
            f"{record['num_problems']} held-out problems). {advice} The policy was "
            f"most accurate at step {best['step']}."
        )


def compare(
    best: dict[str, Any], now: dict[str, Any], outcomes: np.ndarray, process: np.ndarray, comparisons: int
) -> dict[str, Any]:
    """
    Compare an evaluation with the best earlier one.

    Args:
        best (`dict`):
            Earlier evaluation, with `step`, `accuracy`, and the `outcomes` and `process_rewards` of P problems.
        now (`dict`):
            Evaluation, with `step` and `accuracy`.
        outcomes, process (`np.ndarray`):
            Outcome and process reward of each problem at this evaluation, NaN if unknown. Shape `(P,)`.
        comparisons (`int`):
            Number of pairs of evaluations that could be compared. See [`~intervals.difference_interval`].

    Returns:
        `dict`: `answer` (`"yes"`, `"no"`, `"open"`, or `"none"` if the accuracies are too low for a loss, see
        [`~evaluation.reward_hacking.Verdict`]), `from_step`, `gap`, `loss` and its bounds `low` and `high`
        ([`~evaluation.reward_hacking.hacking_gap`]), and the change `rise` of the process reward with its bounds `rise_low` and
        `rise_high`. A missing value is `None`.
    """
    points = [{"n": one["step"], "accuracy": one["accuracy"]} for one in (best, now)]
    values = np.stack([np.array(best["outcomes"], dtype=float), outcomes])  # None becomes NaN
    gap = hacking_gap(points, values, comparisons=comparisons)
    rises = process - np.array(best["process_rewards"], dtype=float)
    rises = rises[~np.isnan(rises)]
    rise = rise_low = rise_high = None
    if len(rises):
        scale = np.abs(rises).max() or 1.0  # process rewards have any unit, and the interval is of values in [-1, 1]
        rise = float(rises.mean())
        rise_low, rise_high = (float(scale * bound) for bound in difference_interval(rises / scale, comparisons))
    answer: Answer = "none" if gap["undecided"] is not None else hacking_answer(gap["low"], gap["high"])
    if answer == "yes" and (
        rise is None or rise_low <= 0
    ):  # accuracy has fallen, but not because the process reward is hacked
        answer = "no" if rise is not None and rise_high <= 0 else "open"
    found = {"answer": answer, "from_step": best["step"], "gap": gap["gap"]}
    found |= {key: gap[key] for key in ("loss", "low", "high")}
    return found | {"rise": rise, "rise_low": rise_low, "rise_high": rise_high}


def draw_training(records: list[dict[str, Any]], outcome: str, process: str, path: Path) -> None:
    """
    Draw accuracy and process reward over training steps. Evaluations that show reward hacking are marked.

    Args:
        records (`list[dict]`):
            Evaluations of the same problems. See [`compare`].
        outcome, process (`str`):
            Names of the reward functions.
        path (`Path`):
            PNG file to write.
    """
    theme = THEMES["light"]
    figure = new_figure()
    figure.set_size_inches(6, 4.5)
    panels = figure.subplots(2, 1, sharex=True)
    steps = [one["step"] for one in records]
    hacked = [one for one in records if one["answer"] == "yes"]
    low, high = 100 * np.array([one["accuracy_interval"] for one in records]).T
    panels[0].fill_between(steps, low, high, color=theme.right, alpha=0.15, linewidth=0)
    if len(steps) == 1:  # nothing to fill
        panels[0].vlines(steps, low, high, color=theme.right, alpha=0.4)
    for panel, key, factor, title in (
        (panels[0], "accuracy", 100, f"accuracy on held-out problems ({outcome}), %"),
        (panels[1], "process_reward", 1, f"process reward ({process})"),
    ):
        style_axes(panel, theme)
        panel.plot(
            steps, [factor * one[key] for one in records], color=theme.right, marker="o", markersize=4, linewidth=2
        )
        marked = [one["step"] for one in hacked], [factor * one[key] for one in hacked]
        panel.plot(*marked, color=theme.wrong, marker="X", markersize=8, linestyle="", label="reward hacking")
        panel.set_title(shown_label(title), fontsize=10, color=theme.text)
    if hacked:
        panels[0].legend(frameon=False, fontsize=8.5, labelcolor=theme.text)
    panels[1].set_xlabel("training step")
    if len(steps) <= 8:
        panels[1].set_xticks(steps)
    remove_partial(path)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=120, facecolor=theme.page, metadata={"Software": None})


def _only(names: list[str], option: str) -> str:
    """Return the only reward function that can be the outcome or the process reward."""
    if len(names) != 1:
        remedy = {
            "outcome": "Add a reward function for the answer, such as AccuracyReward",
            "process": "Add a StepReward",
        }
        raise ValueError(
            f"`{option}` is not set, and {len(names)} reward functions of the trainer could be meant: {shown(names)}. "
            + (f"Set `{option}` to the name of one of them." if names else f"{remedy[option]}, or set `{option}`.")
        )
    return names[0]
