import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import SFTConfig

from ..encoding import CHAT_TEMPLATE_DATE, check_chat_template_options
from ..io import shown
from ..kl import DIRECTIONS, REDUCTIONS, SCALINGS
from ..training.resume_config import ResumeConfig


@dataclass
class KLSelfConfig(ResumeConfig, SFTConfig):
    r"""
    Configuration class for the [`KLSelfTrainer`].

    This class includes only the parameters that are specific to the KL term. For a full list of training arguments, please
    refer to the [`~trl.SFTConfig`] and [`~transformers.TrainingArguments`] documentation.

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control the KL term

        kl_coef (`float`, *optional*, defaults to `0.5`):
            Weight λ of the KL term. With `0.0`, no reference model is used and training is the same as
            with [`~trl.SFTTrainer`].
        kl_scaling (`str`, *optional*, defaults to `"log1p"`):
            Scaling of the KL of each sequence: `"log1p"` for ln(1 + KL), `"none"` for the unscaled KL.
        kl_direction (`str`, *optional*, defaults to `"forward"`):
            Direction of the KL: `"forward"` for KL(ref ‖ policy), `"reverse"` for KL(policy ‖ ref).
        kl_reduction (`str`, *optional*, defaults to `"sum"`):
            Reduction of the KL over the trained tokens of a sequence: `"sum"` or `"token_mean"`.

        > Parameters that control the reference model

        ref_model (`str`, *optional*):
            Path or Hub id of the reference model. By default, it is a frozen copy of the policy or, if the policy has an
            adapter, the policy with the adapter disabled.
        ref_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the reference model. Defaults to `model_init_kwargs`.
        precompute_ref_hidden (`bool`, *optional*, defaults to `False`):
            Whether to compute the last hidden states of the reference model once before training and read them from disk.
            Only its LM head then stays in memory. The states take 2 bytes per trained token and hidden dimension.
        ref_hidden_dir (`str`, *optional*):
            Folder of the precomputed states. Defaults to `_ref_hidden` in `output_dir`, which is not pushed to the Hub.

        > Parameters that control the data preprocessing

        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date passed to chat templates that print today's date, as in `trl-hrm annotate`.

        > Parameters that control resuming

        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint in
            `output_dir`. Without one, training starts from the beginning.
        accept_changes (`list[str]`, *optional*, defaults to `[]`):
            Names of settings that may differ from those of the checkpoint. Other differences are an error.

    > [!NOTE]
    > The other parameters have the same default values as in [`~trl.SFTConfig`].
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["ref_model_init_kwargs"]

    # Parameters that control the KL term
    kl_coef: float = field(
        default=0.5,
        metadata={
            "help": "Weight λ of the KL term. With `0.0`, no reference model is used and training is the same as "
            "with `SFTTrainer`."
        },
    )
    kl_scaling: Literal["log1p", "none"] = field(
        default="log1p",
        metadata={"help": "Scaling of the KL of each sequence: `log1p` for ln(1 + KL), `none` for the unscaled KL."},
    )
    kl_direction: Literal["forward", "reverse"] = field(
        default="forward",
        metadata={"help": "Direction of the KL: `forward` for KL(ref ‖ policy), `reverse` for KL(policy ‖ ref)."},
    )
    kl_reduction: Literal["sum", "token_mean"] = field(
        default="sum",
        metadata={"help": "Reduction of the KL over the trained tokens of a sequence: `sum` or `token_mean`."},
    )

    # Parameters that control the reference model
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Path or Hub id of the reference model. By default, it is a frozen copy of the policy or, if the policy "
            "has an adapter, the policy with the adapter disabled."
        },
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for `from_pretrained` of the reference model. Defaults to `model_init_kwargs`."
        },
    )
    precompute_ref_hidden: bool = field(
        default=False,
        metadata={
            "help": "Whether to compute the last hidden states of the reference model once before training and read them "
            "from disk. Only its LM head then stays in memory. The states take 2 bytes per trained token and hidden "
            "dimension."
        },
    )
    ref_hidden_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the precomputed states. Defaults to `_ref_hidden` in `output_dir`, which is not pushed to the "
            "Hub."
        },
    )

    # Parameters that control the data preprocessing
    chat_template_date: str = field(
        default=CHAT_TEMPLATE_DATE,
        metadata={"help": "Date passed to chat templates that print today's date, as in `trl-hrm annotate`."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.chat_template_date is None:
            raise ValueError(f"`chat_template_date` is None. Set a date such as {CHAT_TEMPLATE_DATE!r}.")
        check_chat_template_options(None, self.chat_template_date)
        if not (math.isfinite(self.kl_coef) and self.kl_coef >= 0):
            raise ValueError(f"`kl_coef` is {self.kl_coef}. It must be 0 (no KL term) or greater.")
        for name, choices in (
            ("kl_scaling", SCALINGS),
            ("kl_direction", tuple(DIRECTIONS)),
            ("kl_reduction", REDUCTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {shown(getattr(self, name))}. It must be one of {', '.join(choices)}.")
        if self.ref_hidden_dir is not None and not self.precompute_ref_hidden:
            raise ValueError(
                f"`ref_hidden_dir` is {shown(self.ref_hidden_dir)}, but `precompute_ref_hidden` is `False`. Set "
                "`precompute_ref_hidden=True`, or remove `ref_hidden_dir`."
            )
        if self.kl_coef == 0:
            if self.ref_model is not None or self.precompute_ref_hidden:
                warnings.warn("`kl_coef` is 0, so the reference model is not used.")
            return
        if (self.packing or self.eval_packing) and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={shown(self.packing_strategy)}` cuts sequences, but the KL is defined for whole sequences. Use "
                "`packing_strategy='bfd'`."
            )
        if self.eval_packing and not (self.packing or self.padding_free):
            raise ValueError(
                "`eval_packing` requires `packing` or `padding_free`. Without them, a packed evaluation row is treated as a "
                "single sequence with one KL. Set one of them, or remove `eval_packing`."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is not supported with a KL term, because it needs the full logits. Set it to 0."
            )
