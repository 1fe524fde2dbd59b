from dataclasses import dataclass, field

from .._compat import BaseConfig
from ..training.resume_config import ResumeConfig


@dataclass
class PRMConfig(ResumeConfig, BaseConfig):
    r"""
    Configuration class for the [`PRMTrainer`], with the fields and defaults of TRL 1.13, and `accept_changes`.

    This class includes only the parameters that are specific to process reward models. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`].

    Parameters:
        max_length (`int` or `None`, *optional*, defaults to `1024`):
            Maximum number of tokens per row (prompt and steps). Longer rows are truncated. If `None`, rows are not
            truncated.
        max_completion_length (`int`, *optional*):
            Maximum number of tokens of the steps in a row, without the prompt. Longer rows are truncated.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model.
        step_separator (`str`, *optional*, defaults to `"\n"`):
            Text added after every step. The step is scored at the last token of this text.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Whether to train only on the last step of each row. Evaluation still covers every labelled step.
        dataset_num_proc (`int`, *optional*):
            Number of processes to use for processing the dataset.
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint in
            `output_dir`. Without one, training starts from the beginning.
        accept_changes (`list[str]`, *optional*, defaults to `[]`):
            Names of settings that may differ from those of the checkpoint. Other differences are an error.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `logging_steps`: Defaults to `10` instead of `500`.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`.
    > - `bf16`: Defaults to `True` if `fp16` is not set, instead of `False`.
    > - `learning_rate`: Defaults to `1e-5` instead of `5e-5`.
    """

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens per row (prompt and steps). Longer rows are truncated. If `None`, rows are "
            "not truncated."
        },
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of the steps in a row, without the prompt. Longer rows are truncated."
        },
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout in the model."})
    step_separator: str = field(
        default="\n",
        metadata={"help": "Text added after every step. The step is scored at the last token of this text."},
    )
    train_on_last_step_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to train only on the last step of each row. Evaluation still covers every labelled step."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes to use for processing the dataset."}
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("max_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:  # negative numbers would cut from the end
                raise ValueError(f"`{name}` is {value}. It must be at least 1, or `None` for no limit.")
        if not self.eval_do_concat_batches:
            raise ValueError(
                "`eval_do_concat_batches` is False, but metrics need the outputs of all batches. Leave it at `True`."
            )
