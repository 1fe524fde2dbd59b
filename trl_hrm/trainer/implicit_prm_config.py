from dataclasses import dataclass, field
from typing import Literal

from ..io import shown
from ..step_format import StepFormat
from .hrm_reward_config import HRMRewardConfig


@dataclass
class ImplicitPRMConfig(HRMRewardConfig):
    r"""
    Configuration class for the [`ImplicitPRMTrainer`].

    This class includes only the parameters that are specific to implicit rewards. It also has the parameters of
    [`HRMRewardConfig`], but `head`, `regression_loss` and `label_tokens` cannot be changed.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the reward (saved in `step_format.json`)

        beta (`float`, *optional*, defaults to `0.05`):
            Factor β of the log-ratios: the reward of a span is β · Σ (ln π − ln π_ref) over its tokens.
        score_span (`str`, *optional*, defaults to `"step"`):
            Score of a step when the trained model is used. `"step"`: sigmoid of the reward of the step's own tokens. `"prefix"`:
            sigmoid of the reward of the solution up to the step's end. It does not affect training.
        head (`str`, *optional*, defaults to `"implicit"`):
            Head of the model, always `"implicit"`.
        regression_loss (`str`, *optional*, defaults to `"bce"`):
            Loss, always `"bce"`: cross-entropy between the label and the sigmoid of the reward of the solution.

        > Parameters that control the reference model

        ref_model (`str`, *optional*):
            Path or Hub id of the reference model. By default, it is the model that is trained, before training. With an adapter, it is
            the model with the adapter disabled.
        ref_model_revision (`str`, *optional*):
            Revision of `ref_model` on the Hub.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to compute the log-probabilities of the reference model once before training. The model is then not kept in
            memory. They are stored in `_ref_log_probs` in `output_dir`, one number per label.

        > Parameters that control the training

        learning_rate (`float`, *optional*, defaults to `5e-7`):
            Initial learning rate. All weights of a language model are trained, without a new head.
    """

    _TEXT_FORMAT = (*HRMRewardConfig._TEXT_FORMAT, "beta", "score_span")

    # Parameters that control the reward
    beta: float = field(
        default=0.05,
        metadata={
            "help": "Factor β of the log-ratios: the reward of a span is β · Σ (ln π − ln π_ref) over its tokens."
        },
    )
    score_span: Literal["step", "prefix"] = field(
        default="step",
        metadata={
            "help": "Score of a step when the trained model is used. `step`: sigmoid of the reward of the step's own tokens. "
            "`prefix`: sigmoid of the reward of the solution up to the step's end. It does not affect training."
        },
    )
    head: Literal["implicit"] = field(default="implicit", metadata={"help": "Head of the model, always `implicit`."})
    regression_loss: Literal["bce"] = field(
        default="bce",
        metadata={
            "help": "Loss, always `bce`: cross-entropy between the label and the sigmoid of the reward of the solution."
        },
    )

    # Parameters that control the reference model
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the reference model. By default, it is the model that is trained, before training. "
            "With an adapter, it is the model with the adapter disabled."
        },
    )
    ref_model_revision: str | None = field(default=None, metadata={"help": "Revision of `ref_model` on the Hub."})
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute the log-probabilities of the reference model once before training. The model is then "
            "not kept in memory. They are stored in `_ref_log_probs` in `output_dir`, one number per label."
        },
    )

    # Parameters whose default values are overridden from HRMRewardConfig
    learning_rate: float = field(default=5e-7, metadata={"help": "The initial learning rate for AdamW."})

    def __post_init__(self):
        super().__post_init__()
        if self.head != "implicit" or self.regression_loss != "bce" or list(self.label_tokens) != ["+", "-"]:
            raise ValueError(
                "`head`, `regression_loss` and `label_tokens` cannot be changed for implicit rewards. Remove them, or use "
                "HRMRewardTrainer (`trl-hrm reward`)."
            )
        if self.ref_model_revision is not None and self.ref_model is None:
            raise ValueError(
                f"`ref_model_revision` is {shown(self.ref_model_revision)}, but `ref_model` is not set. Set it, or remove "
                "`ref_model_revision`."
            )

    def make_step_format(self) -> StepFormat:
        """
        Return the [`StepFormat`] defined by these arguments.

        Raises:
            `FileNotFoundError`, `ValueError`: See [`HRMRewardConfig.make_step_format`], and if a file has another head.
        """
        step_format = super().make_step_format()
        if step_format.head != "implicit":
            raise ValueError(
                f"`step_format` is {shown(self.step_format)}, which has the head {step_format.head!r}. Use a format with the head "
                "'implicit', or HRMRewardTrainer (`trl-hrm reward`)."
            )
        return step_format
