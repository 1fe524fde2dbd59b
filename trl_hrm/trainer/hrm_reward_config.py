import math
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from .._compat import BaseConfig
from ..encoding import CHAT_TEMPLATE_DATE
from ..io import shown
from ..step_format import StepFormat
from ..training.resume_config import ResumeConfig


@dataclass
class HRMRewardConfig(ResumeConfig, BaseConfig):
    r"""
    Configuration class for the [`HRMRewardTrainer`].

    This class includes only the parameters that are specific to step reward models. For a full list of training
    arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that default values in this
    class may differ from those in [`~transformers.TrainingArguments`].

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the model

        model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`, used when the `model` argument of the [`HRMRewardTrainer`] is
            provided as a string. The `revision` value is also used when loading the tokenizer.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to allow loading models and tokenizers that ship custom Python code from the Hub.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout in the model. Token classifiers in transformers apply a dropout of 0.1 before the
            head.

        > Parameters that control the text format (see [`StepFormat`]; saved as `step_format.json`). If all of them have their
        default values, a model with a known step format (an own checkpoint or a published model) that is passed by name keeps its
        format.

        step_format (`str`, *optional*):
            Name of a published step format, such as `"math-shepherd"` (see `docs/model_zoo.md`), or path to a
            `step_format.json`. Replaces the other parameters of the text format, which must have their default values.
        prompt_style (`str`, *optional*, defaults to `"plain"`):
            Whether to encode the prompt as plain text (`"plain"`) or with the chat template (`"chat"`).
        system_prompt (`str`, *optional*):
            System message. Only with `prompt_style="chat"`.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables for the chat template, such as `{"enable_thinking": False}`. Only with `prompt_style="chat"`.
        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date passed to chat templates that print today's date, so that token ids do not depend on the day.
        sanitize_control_tokens (`bool`, *optional*, defaults to `True`):
            Whether to encode control tokens in the problem and the steps, such as `<|im_end|>`, as plain text.
        step_separator (`str`, *optional*, defaults to `"\n\n"`):
            Text added after every step. The step is scored at the last token of this text.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step. Must be the separator that the dataset was built with.
        thinking_marks (`list[str]`, *optional*):
            Phrases that begin a thought, for `spans` with `thought`. Must be the marks that the dataset was built with. Defaults to
            [`~search.thinking.MARKS`].
        max_thought (`int`, *optional*, defaults to `16`):
            Maximum number of steps in a merged thought. Must be the `max_merge` that the dataset was built with.
        head (`str`, *optional*, defaults to `"classification"`):
            Head of the model. `"classification"`: token classification with 2 labels. `"mlp"`: the same with a hidden
            layer. `"regression"`: token classification with 1 label. `"value"`: value head with 1 output on a causal
            language model. `"lm"`: causal language model that is scored by two label tokens. `"lm_mean"`: causal language
            model that is scored by the mean of all logits.
        regression_loss (`str`, *optional*, defaults to `"mse"`):
            Loss of a head with 1 output (`"regression"`, `"value"`, `"lm_mean"`): `"mse"` or `"bce"`.
        label_tokens (`list[str]`, *optional*, defaults to `["+", "-"]`):
            Tokens for a correct and a wrong step. Only used with `head="lm"`.

        > Parameters that control the data preprocessing

        dataset_num_proc (`int`, *optional*):
            Number of processes to use for processing the dataset.
        max_length (`int` or `None`, *optional*, defaults to `2048`):
            Maximum number of tokens per path (prompt and steps) and per row of the batch. Steps with a longer path are
            dropped and reported. Longer trees are split without changing the loss. If `None`, nothing is dropped, split
            or packed.
        shared_prefix (`bool`, *optional*, defaults to `True`):
            Whether the branches of a tree share their prefix in one forward pass. Requires `attn_implementation`
            `"sdpa"`, `"eager"` or `"flex_attention"`. If `False`, every root-to-leaf path is a separate sequence in a
            padding-free batch. The loss is the same.
        packing (`bool`, *optional*, defaults to `True`):
            Whether to pack several trees into a row of up to `max_length` tokens. `per_device_train_batch_size` is the
            number of rows.
        label_weighting (`str`, *optional*, defaults to `"unique"`):
            Weight of a step that occurs in several rows of the dataset. `"unique"`: the step counts once.
            `"occurrence"`: it counts once per row, as if each row were a separate sequence. `"column"`: the step counts by the
            mean of its weights in the column `label_weights`, such as the agreement of a judge (`trl-hrm export --consensus
            --disagreement weight`). The loss is the sum of weight times loss divided by the sum of the weights. An evaluation
            dataset without the column counts every step once.
        train_on_last_step_only (`bool`, *optional*, defaults to `False`):
            Whether to train only on the last step of each trajectory (outcome reward model). Evaluation still covers
            every labelled step.
        pad_to_multiple_of (`int`, *optional*):
            If set, rows are padded to a multiple of this value. With flex attention, 128 avoids frequent recompilation.

        > Parameters that control the training

        error_weight (`float`, *optional*, defaults to `1.0`):
            Weight of a wrong step (label 0) relative to a correct step (label 1) in the mean loss. A soft label `y` has
            the weight `y + (1 - y) * error_weight`.

        > Parameters that control the logging

        log_worst_steps (`int`, *optional*, defaults to `0`):
            Maximum number of wrong steps scored as correct, and of correct steps scored as wrong, to show after each evaluation, with
            the calibration of the scores. See [`StepTableCallback`], which is added to the trainer. Requires an `eval_dataset`. With 0,
            nothing is shown.

        > Parameters that control resuming

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

    _VALID_DICT_FIELDS = BaseConfig._VALID_DICT_FIELDS + ["model_init_kwargs", "chat_template_kwargs"]
    # Arguments that are fields of the step format
    _TEXT_FORMAT = (
        "prompt_style",
        "system_prompt",
        "step_separator",
        "merge_separator",
        "thinking_marks",
        "max_thought",
        "head",
        "regression_loss",
        "label_tokens",
        "chat_template_kwargs",
        "chat_template_date",
        "sanitize_control_tokens",
    )

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate for AdamW."})

    # Parameters that control the model
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained`, used when the `model` argument of the `HRMRewardTrainer` "
            "is provided as a string. The `revision` value is also used when loading the tokenizer."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Whether to allow loading models and tokenizers that ship custom Python code from the Hub."},
    )
    disable_dropout: bool = field(
        default=True,
        metadata={
            "help": "Whether to disable dropout in the model. Token classifiers in transformers apply a dropout of 0.1 "
            "before the head."
        },
    )

    # Parameters that control the text format
    step_format: str | None = field(
        default=None,
        metadata={
            "help": "Name of a published step format, such as `math-shepherd` (see docs/model_zoo.md), or path to a "
            "`step_format.json`. Replaces the other parameters of the text format, which must have their default values."
        },
    )
    prompt_style: Literal["plain", "chat"] = field(
        default="plain",
        metadata={"help": "Whether to encode the prompt as plain text (`plain`) or with the chat template (`chat`)."},
    )
    system_prompt: str | None = field(
        default=None, metadata={"help": 'System message. Only with `prompt_style="chat"`.'}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Variables for the chat template, such as `{"enable_thinking": false}`. Only with `prompt_style="chat"`.'
        },
    )
    chat_template_date: str = field(
        default=CHAT_TEMPLATE_DATE,
        metadata={
            "help": "Date passed to chat templates that print today's date, so that token ids do not depend on the day."
        },
    )
    sanitize_control_tokens: bool = field(
        default=True,
        metadata={
            "help": "Whether to encode control tokens in the problem and the steps, such as `<|im_end|>`, as plain text."
        },
    )
    step_separator: str = field(
        default="\n\n",
        metadata={"help": "Text added after every step. The step is scored at the last token of this text."},
    )
    merge_separator: str = field(
        default="\n",
        metadata={
            "help": "Text between the steps of a merged step. Must be the separator that the dataset was built with."
        },
    )
    thinking_marks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Phrases that begin a thought, for `spans` with `thought`. Must be the marks that the dataset was built with."
        },
    )
    max_thought: int = field(
        default=16,
        metadata={
            "help": "Maximum number of steps in a merged thought. Must be the `max_merge` that the dataset was built with."
        },
    )
    head: Literal["classification", "mlp", "regression", "value", "lm", "lm_mean"] = field(
        default="classification",
        metadata={
            "help": "Head of the model. `classification`: token classification with 2 labels. `mlp`: the same with a hidden "
            "layer. `regression`: token classification with 1 label. `value`: value head with 1 output on a causal language "
            "model. `lm`: causal language model that is scored by two label tokens. `lm_mean`: causal language model that is "
            "scored by the mean of all logits."
        },
    )
    regression_loss: Literal["mse", "bce"] = field(
        default="mse",
        metadata={"help": "Loss of a head with 1 output (`regression`, `value`, `lm_mean`): `mse` or `bce`."},
    )
    label_tokens: list[str] = field(
        default_factory=lambda: ["+", "-"],
        metadata={"help": 'Tokens for a correct and a wrong step. Only used with `head="lm"`.'},
    )

    # Parameters that control the data preprocessing
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes to use for processing the dataset."}
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Maximum number of tokens per path (prompt and steps) and per row of the batch. Steps with a longer "
            "path are dropped and reported. Longer trees are split without changing the loss. If `None`, nothing is "
            "dropped, split or packed."
        },
    )
    shared_prefix: bool = field(
        default=True,
        metadata={
            "help": "Whether the branches of a tree share their prefix in one forward pass. Requires "
            "`attn_implementation` `sdpa`, `eager` or `flex_attention`. If `False`, every root-to-leaf path is a "
            "separate sequence in a padding-free batch. The loss is the same."
        },
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Whether to pack several trees into a row of up to `max_length` tokens. "
            "`per_device_train_batch_size` is the number of rows."
        },
    )
    label_weighting: Literal["unique", "occurrence", "column"] = field(
        default="unique",
        metadata={
            "help": "Weight of a step that occurs in several rows of the dataset. `unique`: the step counts once. "
            "`occurrence`: it counts once per row, as if each row were a separate sequence. `column`: it counts by the mean "
            "of its weights in the column `label_weights` of the dataset."
        },
    )
    train_on_last_step_only: bool = field(
        default=False,
        metadata={
            "help": "Whether to train only on the last step of each trajectory (outcome reward model). Evaluation "
            "still covers every labelled step."
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "If set, rows are padded to a multiple of this value. With flex attention, 128 avoids frequent "
            "recompilation."
        },
    )

    # Parameters that control the training
    error_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of a wrong step (label 0) relative to a correct step (label 1) in the mean loss. A soft "
            "label `y` has the weight `y + (1 - y) * error_weight`."
        },
    )

    # Parameters that control the logging
    log_worst_steps: int = field(
        default=0,
        metadata={
            "help": "Maximum number of wrong steps scored as correct, and of correct steps scored as wrong, to show after each "
            "evaluation, with the calibration of the scores: in `_evaluations` in `output_dir`, and in trackio or Weights & Biases."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.log_worst_steps < 0:
            raise ValueError(f"`log_worst_steps` is {self.log_worst_steps}. It must be at least 0.")
        if self.chat_template_date is None:
            raise ValueError(
                "`chat_template_date` is None. With a chat template that prints today's date, the token ids would change "
                f"from day to day. Set a date such as {CHAT_TEMPLATE_DATE!r}."
            )
        self.make_step_format()  # validate the format before anything is loaded
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(f"`pad_to_multiple_of` is {self.pad_to_multiple_of}. It must be at least 1.")
        if self.label_weighting not in ("unique", "occurrence", "column"):
            raise ValueError(
                f"`label_weighting` is {shown(self.label_weighting)}. It must be 'unique', 'occurrence' or 'column'."
            )
        if not 0 < self.error_weight < math.inf:
            raise ValueError(f"`error_weight` is {self.error_weight}. It must be a number greater than 0.")
        if self.batch_eval_metrics:
            raise ValueError(
                "`batch_eval_metrics` is not supported, because metrics of single batches cannot be combined. Leave it at "
                "`False`: an evaluation keeps only the outputs at step tokens, which need little memory."
            )
        if not self.eval_do_concat_batches:
            raise ValueError(
                "`eval_do_concat_batches` is False, but metrics need the outputs of all batches. Leave it at `True`."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is not supported. Smooth the `labels` of the dataset instead. They can be any "
                "probability."
            )

    def make_step_format(self) -> StepFormat:
        """
        Return the [`StepFormat`] defined by these arguments.

        Raises:
            `FileNotFoundError`, `ValueError`: See [`StepFormat`] and [`~step_format.StepFormat.named`].
        """
        if self.step_format is not None:
            if changed := self.changed_text_format():
                raise ValueError(
                    f"`step_format` is {shown(self.step_format)}, but {', '.join(f'`{name}`' for name in changed)} would change the "
                    "text format too. Remove either `step_format` or these arguments."
                )
            return StepFormat.named(self.step_format)
        return StepFormat(**{name: getattr(self, name) for name in self._TEXT_FORMAT})

    def changed_text_format(self) -> list[str]:
        """Return the names of the arguments of the text format that do not have their default values."""
        defaults = {field.name: field for field in fields(self)}
        return [name for name in self._TEXT_FORMAT if getattr(self, name) != _default(defaults[name])]


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
