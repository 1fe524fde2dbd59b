import os
from collections import deque
from collections.abc import Callable
from copy import copy
from dataclasses import asdict
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from trl import GRPOTrainer

from .. import step_credit
from .._compat import get_config_model_id, trainer_utils
from ..loading import refuse_frozen_adapter
from ..rewards import StepReward
from ..scoring.aggregate import aggregate_name
from ..token_steps import token_steps
from ..training.checkpoints import plain, read_record
from ..training.hub_push import HubPushMixin
from ..training.safe_training import SafeTrainingMixin, identity_in_memory, model_identity
from .model_card import save_policy_card
from .reward_hacking_callback import RewardHackingCallback
from .step_grpo_config import StepGRPOConfig
from .step_table import coloured_steps, log_steps_page


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

logger = get_logger(__name__)

SHOWN_STEPS = 8  # positions of steps that have their own metrics


class StepGRPOTrainer(SafeTrainingMixin, HubPushMixin, GRPOTrainer):
    """
    Trainer for [GRPO](https://huggingface.co/papers/2402.03300) with process rewards: each token gets the advantage of its step.

    This class inherits from [`~trl.GRPOTrainer`] and changes only the advantages of its loss, from one number per completion,
    shape `(B,)`, to one number per token, shape `(B, T)`:

        advantage of a token = advantage of its completion, from `reward_funcs` (as in GRPO)
                             + step_reward_weight * advantage of its step, from `step_reward`

    `args.step_credit` chooses how the step rewards of a group become advantages. These functions center the advantages
    themselves. `scale_rewards` applies to the first term only. With `step_credit="outcome"`, the trainer is GRPO with one more
    reward function: the step rewards, aggregated, with the weight `step_reward_weight`.

    A completion that a guard of [`StepReward`] rejects has one reward for all of its tokens, the `guard_reward`. A completion
    whose problem is `None` (see `problem_column`) has no process reward and is left out of the baseline.

    Example:

    ```python
    from datasets import load_dataset
    from trl_hrm import AccuracyReward, StepGRPOConfig, StepGRPOTrainer, StepReward

    trainer = StepGRPOTrainer(
        model="Qwen/Qwen2.5-Math-1.5B-Instruct",
        reward_funcs=[AccuracyReward()],
        step_reward=StepReward("me/my-hrm", spans=(1, 2)),
        args=StepGRPOConfig(output_dir="outputs/grpo", step_credit="min_form", step_reward_weight=0.5),
        train_dataset=load_dataset("me/problems", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to be trained. An adapter must be passed as a [`~peft.PeftModel`], loaded with `is_trainable=True`.
        reward_funcs (`RewardFunc` or `list[RewardFunc]`, *optional*):
            Rewards of whole completions, as in [`~trl.GRPOTrainer`]. Without one, only the process reward trains the policy.
        step_reward ([`StepReward`]):
            The process reward.
        args ([`StepGRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        **kwargs:
            Other arguments of [`~trl.GRPOTrainer`], such as `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`,
            `peft_config` and `tools`.

    With `stop_on_reward_hacking=True`, a [`RewardHackingCallback`] compares the process reward with the first of the `reward_funcs`,
    whose rewards must be from 0 to 1, on the evaluation dataset.

    With `log_completions=True`, the table of completions has a column `step_reward/steps`, and `completions/steps_XXXXX.html` in `output_dir`
    shows the steps coloured by their reward.

    Attributes:
        eval_rewards (`torch.Tensor`):
            Rewards of the last evaluation, shape `(num_completions, num_reward_funcs)`, NaN for `None`, in the order of the rows. The
            process reward follows the `reward_funcs`. A `RuntimeError` before the first evaluation.

    Raises:
        `TypeError`: If `step_reward` is not a [`StepReward`], or `args` is not a [`StepGRPOConfig`].
        `ValueError`: If the number of `reward_weights` differs from the number of `reward_funcs`, or `model` is the name of an adapter.
    """

    _tag_names = ["trl", "trl-hrm", "grpo", "step-grpo"]
    _name = "Step GRPO"
    _save_card = save_policy_card
    _card_settings = ("step_credit", "step_reward_weight", "num_generations", "loss_type", "beta", "scale_rewards")
    # Of about 60 metrics of GRPO
    _card_metrics = (
        "rewards/",
        "reward_hacking",
        "process_reward_rise",
        "completions/mean_length",
        "completions/clipped_ratio",
    )

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: Callable | list[Callable] | None = None,
        step_reward: StepReward | None = None,
        args: StepGRPOConfig | None = None,
        **kwargs,
    ):
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = StepGRPOConfig(f"{model_name.split('/')[-1]}-StepGRPO")
        if not isinstance(args, StepGRPOConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be a `StepGRPOConfig`.")
        if not isinstance(step_reward, StepReward):
            raise TypeError(f"`step_reward` is a `{type(step_reward).__name__}`. It must be a `StepReward`.")
        if isinstance(model, str):
            refuse_frozen_adapter(model, (args.model_init_kwargs or {}).get("revision"))
        funcs = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        if step_reward in funcs:
            raise ValueError("`step_reward` is also one of the `reward_funcs`. Remove it from them.")
        weights = [1.0] * len(funcs) if args.reward_weights is None else args.reward_weights
        if len(weights) != len(funcs):
            raise ValueError(
                f"`reward_weights` has {len(weights)} weights for {len(funcs)} `reward_funcs`. Set one for each of them. The weight of "
                "`step_reward` is `step_reward_weight`."
            )
        self._train_data, self._eval_data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        # TRL calls and logs the process reward. In its sum of rewards, it has no weight if the steps have advantages
        args = copy(args)
        args.reward_weights = [*weights, args.step_reward_weight if args.step_credit == "outcome" else 0.0]
        if (classes := kwargs.get("reward_processing_classes")) is not None:
            kwargs["reward_processing_classes"] = [*(classes if isinstance(classes, list) else [classes]), None]
        self.step_reward = step_reward
        self._step_column = len(funcs)
        self._eval_batches: list[torch.Tensor] = []
        super().__init__(model=model, reward_funcs=[*funcs, step_reward], args=args, **kwargs)
        self._logs["steps"] = deque(maxlen=args.generation_batch_size)  # like the other columns of the table
        if args.stop_on_reward_hacking:
            outcomes = [name for i, name in enumerate(self.reward_func_names) if i != self._step_column]
            self.add_callback(RewardHackingCallback(self, outcome=next(iter(outcomes), None), stop=True))

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)

        def set_epoch(epoch: int) -> None:
            # Without this, a training that is resumed in a later epoch begins with the order of the first epoch
            if sampler.shuffle:
                sampler.generator.manual_seed(sampler.seed)
                for _ in range(epoch):
                    torch.randperm(sampler.num_samples, generator=sampler.generator)

        sampler.set_epoch = set_epoch
        return sampler

    def _prepare_inputs(self, generation_batch):
        if self.model.training and self._buffered_inputs is None and self.state.global_step:  # resumed
            # TRL would count from 0, and sample every later generation batch at another step than without the interruption
            self._step = self.state.global_step * self.args.gradient_accumulation_steps
            if self._step % (self.args.steps_per_generation * self.num_iterations):
                logger.warning(
                    f"Step {self.state.global_step} is within a generation batch, whose completions are not part of a checkpoint. They are "
                    "sampled again, so the weights will differ from an uninterrupted training. To avoid this, set `save_steps` to a multiple "
                    "of the optimizer steps per generation batch."
                )
        return super()._prepare_inputs(generation_batch)

    @property
    def eval_rewards(self) -> torch.Tensor:
        if not self._eval_batches:
            raise RuntimeError(
                "The trainer has not evaluated yet, so it has no `eval_rewards`. Call `evaluate()` first."
            )
        return torch.cat(self._eval_batches)

    def evaluation_loop(self, *args, **kwargs):
        self._eval_batches = []
        return super().evaluation_loop(*args, **kwargs)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode = "train" if self.model.training else "eval"
        if mode == "eval":
            self._eval_batches.append(rewards.clone())
        scored = self.step_reward.scored
        if self.args.step_credit == "outcome":
            advantages = [None] * len(scored)
        else:
            # Without this, a completion that has only a process reward would have the reward 0 in the baseline of the others
            self._process_rewards = rewards[:, self._step_column].clone()
            others = torch.arange(rewards.shape[1], device=rewards.device) != self._step_column
            if others.any():
                rewards[rewards[:, others].isnan().all(dim=1), self._step_column] = torch.nan
            num_generations = self.num_generations if mode == "train" else self.num_generations_eval
            all_rewards = gather_object([completion.step_rewards for completion in scored])
            start = self.accelerator.process_index * len(scored)
            advantages = self._step_advantages(all_rewards, num_generations)[start : start + len(scored)]
        name = self.step_reward.__name__
        for completion, values in zip(scored, advantages, strict=True):
            for j, score in enumerate((completion.scores or [])[:SHOWN_STEPS], 1):
                self._log_metric(f"{name}/score/step_{j}", score)
            # Their size, because their mean over a group is 0 at the first step with most credits
            for j, value in enumerate((values or [])[:SHOWN_STEPS], 1):
                self._log_metric(f"{name}/advantage_size/step_{j}", abs(value))
        self._scored_batch = list(zip(scored, completion_ids_list, advantages, strict=True))
        if self.log_completions:
            steps = list(zip(scored, advantages, strict=True))
            self._log_completion_extra(f"{name}/steps", [coloured_steps(*pair) for pair in steps])
            self._logs["steps"].extend(gather_object(steps))
        return rewards

    def _step_advantages(
        self, step_rewards: list[list[float] | None], num_generations: int
    ) -> list[list[float] | None]:
        """Return the advantages of the steps of all completions, `None` for completions without a process reward."""
        args = self.args
        given = {"temperature": args.min_form_temperature, "threshold": args.clip_threshold}
        credit = partial(
            getattr(step_credit, args.step_credit), **{name: v for name, v in given.items() if v is not None}
        )
        advantages: list[list[float] | None] = [None] * len(step_rewards)
        for start in range(0, len(step_rewards), num_generations):
            group = [i for i in range(start, start + num_generations) if step_rewards[i] is not None]
            for i, values in zip(group, credit([step_rewards[i] for i in group]), strict=True):
                advantages[i] = values
        return advantages

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.args.step_credit == "outcome":
            return output
        # TRL has not logged the process rewards of completions without another reward
        metrics, name = self._metrics["train" if self.model.training else "eval"], self.step_reward.__name__
        metrics[f"rewards/{name}/mean"][-1] = torch.nanmean(self._process_rewards).item()
        metrics[f"rewards/{name}/std"][-1] = trainer_utils.nanstd(self._process_rewards).item()
        logged, values = self._logs["rewards"][name], self._process_rewards.tolist()
        for i in range(1, min(len(logged), len(values)) + 1):
            logged[-i] = values[-i]
        # (B,) -> (B, T)
        advantages = output["advantages"].unsqueeze(1).repeat(1, output["completion_ids"].shape[1])
        for i, (completion, ids, values) in enumerate(self._scored_batch):
            if values is None or not output["completion_mask"][i].any():  # `mask_truncated_completions`
                continue
            tool_mask = output["tool_mask"][i, : len(ids)].tolist() if "tool_mask" in output else None
            steps = token_steps(self._tokenizer, ids, completion, tool_mask)
            of_tokens = advantages.new_tensor(values)[torch.tensor(steps, device=advantages.device)]
            advantages[i, : len(ids)] += self.args.step_reward_weight * of_tokens
        output["advantages"] = advantages
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if self.log_completions and self.accelerator.is_main_process:
            log_steps_page(self)

    def _accept(self, checkpoint, settings, accepts):
        record = read_record(checkpoint)
        if record is not None and isinstance(record["settings"].get("step_reward", {}).get("segmentation"), str):
            # Earlier versions recorded only the name of the rule
            reward = settings["step_reward"] | {"segmentation": self.step_reward.rule.name}
            settings = settings | {"step_reward": reward}
        return super()._accept(checkpoint, settings, accepts)

    @cached_property
    def _content(self) -> dict[str, Any]:
        reward, scorer = self.step_reward, self.step_reward.scorer
        if isinstance(model := getattr(scorer, "model", None), torch.nn.Module):
            identity = model_identity(model)
            if identity.keys() == {"config"} or is_peft_model(model):  # the first is without the adapter
                identity = identity_in_memory(model)
        else:  # a name on a server, or an engine
            identity = {"name": model or type(scorer).__name__}
        return super()._content | {
            "reward_funcs": self.reward_func_names[: self._step_column],
            "reward_model": identity,
            "step_reward": {
                "aggregate": aggregate_name(reward.aggregate),
                "segmentation": plain(asdict(reward.rule)),  # rules with the same name can have different patterns
                "guard_reward": reward.guard_reward,
                **{
                    guard: getattr(reward, guard)
                    for guard in ("min_steps", "max_steps", "max_repeated", "max_blank", "max_tokens")
                },
                "keep_thinking": reward.keep_thinking,
                "problem_column": reward.problem_column,
                **asdict(reward.scoring),
                **plain(asdict(scorer.step_format)),
            },
        }
