import math
from dataclasses import dataclass, field

from trl import GRPOConfig

from ..io import shown
from ..step_credit import CREDITS
from ..training.resume_config import ResumeConfig


@dataclass
class StepGRPOConfig(ResumeConfig, GRPOConfig):
    r"""
    Configuration class for the [`StepGRPOTrainer`].

    This class includes only the parameters that are specific to process rewards. For a full list of training arguments, please
    refer to the [`~trl.GRPOConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the process reward

        step_credit (`str`, *optional*, defaults to `"min_form"`):
            How step rewards become the advantages of tokens: `"min_form"` ([`~step_credit.min_form`]), `"step_sum"`
            ([`~step_credit.step_sum`]), `"progress"` ([`~step_credit.progress`]), `"clip_delta"` ([`~step_credit.clip_delta`]), or
            `"outcome"` for one reward per completion, as in [`~trl.GRPOTrainer`].
        step_reward_weight (`float`, *optional*, defaults to `1.0`):
            Weight of the process reward. With `"outcome"`, it is the weight of the aggregated step reward among the
            `reward_weights`. Otherwise, the advantages of the steps are multiplied by it and added to the advantages of the other
            rewards.
        min_form_temperature (`float`, *optional*):
            Temperature of the softmax over the steps. Only for `"min_form"`, where it defaults to 0.05.
        clip_threshold (`float`, *optional*):
            Step reward above which a step gets no bonus. Only for `"clip_delta"`, where it defaults to 0.5.

        > Parameters that control the monitor of reward hacking

        stop_on_reward_hacking (`bool`, *optional*, defaults to `False`):
            Whether to stop training if the process reward of the evaluation dataset has risen and its accuracy, the first of the
            `reward_funcs`, has fallen. See [`RewardHackingCallback`].

        > Parameters that control resuming

        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint in
            `output_dir`. Without one, training starts from the beginning.
        accept_changes (`list[str]`, *optional*, defaults to `[]`):
            Names of settings that may differ from those of the checkpoint. Other differences are an error.

    > [!NOTE]
    > The other parameters have the same default values as in [`~trl.GRPOConfig`]. `reward_weights` has one weight for each of the
    > `reward_funcs`, without the process reward.
    """

    # Parameters that control the process reward
    step_credit: str = field(
        default="min_form",
        metadata={
            "help": "How step rewards become the advantages of tokens.",
            "choices": CREDITS,
        },
    )
    step_reward_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of the process reward. With `outcome`, it is the weight of the aggregated step reward among the "
            "`reward_weights`. Otherwise, the advantages of the steps are multiplied by it and added to the advantages of the "
            "other rewards."
        },
    )
    min_form_temperature: float | None = field(
        default=None,
        metadata={
            "help": "Temperature of the softmax over the steps. Only for `min_form`, where it defaults to 0.05."
        },
    )
    clip_threshold: float | None = field(
        default=None,
        metadata={
            "help": "Step reward above which a step gets no bonus. Only for `clip_delta`, where it defaults to 0.5."
        },
    )

    # Parameters that control the monitor of reward hacking
    stop_on_reward_hacking: bool = field(
        default=False,
        metadata={
            "help": "Whether to stop training if the process reward of the evaluation dataset has risen and its accuracy, the "
            "first of the `reward_funcs`, has fallen."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.step_credit not in CREDITS:
            raise ValueError(f"`step_credit` is {shown(self.step_credit)}. It must be one of {', '.join(CREDITS)}.")
        if not (math.isfinite(self.step_reward_weight) and self.step_reward_weight >= 0):
            raise ValueError(
                f"`step_reward_weight` is {self.step_reward_weight}. It must be 0 (the process reward is only logged) or greater."
            )
        for name, credit in (("min_form_temperature", "min_form"), ("clip_threshold", "clip_delta")):
            if getattr(self, name) is not None and self.step_credit != credit:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but `step_credit` is {shown(self.step_credit)}, which does not use it. Remove "
                    f"it, or set `step_credit={credit!r}`."
                )
        if self.min_form_temperature is not None and not 0 < self.min_form_temperature < math.inf:
            raise ValueError(f"`min_form_temperature` is {self.min_form_temperature}. It must be greater than 0.")
        if self.clip_threshold is not None and not math.isfinite(self.clip_threshold):
            raise ValueError(f"`clip_threshold` is {self.clip_threshold}. It must be a finite number.")
        if self.stop_on_reward_hacking and self.eval_strategy == "no":
            raise ValueError(
                "`stop_on_reward_hacking` is `True`, but `eval_strategy` is `no`, so hacking cannot be noticed. Set `eval_strategy` "
                "to `steps`, and pass an evaluation dataset."
            )
