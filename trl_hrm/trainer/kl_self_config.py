import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from trl import SFTConfig

from ..encoding import CHAT_TEMPLATE_DATE, check_chat_template_options
from ..kl import DIRECTIONS, REDUCTIONS, SCALINGS


@dataclass
class KLSelfConfig(SFTConfig):
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
            λ, the weight of the KL term. With `0.0` there is no reference, and training is that of [`~trl.SFTTrainer`].
        kl_scaling (`str`, *optional*, defaults to `"log1p"`):
            `"log1p"` for ln(1 + KL) of each sequence, `"none"` for KL itself.
        kl_direction (`str`, *optional*, defaults to `"forward"`):
            `"forward"` for KL(ref ‖ policy), `"reverse"` for KL(policy ‖ ref).
        kl_reduction (`str`, *optional*, defaults to `"sum"`):
            KL of a sequence: `"sum"` over its trained tokens, or `"token_mean"`.

        > Parameters that control the reference

        ref_model (`str`, *optional*):
            Name or path of the reference model. By default the reference is the policy as it was given: with its adapter
            off under PEFT, else a frozen copy.
        ref_model_init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained` of the reference. By default `model_init_kwargs`.
        precompute_ref_hidden (`bool`, *optional*, defaults to `False`):
            Whether the last hidden states of the reference are computed once, before training, and read from disk. Then only
            the LM head of the reference is kept. They take 2 bytes per trained token and hidden dimension.
        ref_hidden_dir (`str`, *optional*):
            Folder of the precomputed states. By default `_ref_hidden` in `output_dir`, which is not pushed to the Hub.

        > Parameters that control the data preprocessing

        chat_template_date (`str`, *optional*, defaults to `"2024-07-26"`):
            Date for chat templates that print today's date, as in `trl-hrm annotate`.

    > [!NOTE]
    > Other defaults are those of [`~trl.SFTConfig`].
    """

    _VALID_DICT_FIELDS = SFTConfig._VALID_DICT_FIELDS + ["ref_model_init_kwargs"]

    # Parameters that control the KL term
    kl_coef: float = field(
        default=0.5,
        metadata={
            "help": "λ, the weight of the KL term. With `0.0` there is no reference, and training is that of `SFTTrainer`."
        },
    )
    kl_scaling: Literal["log1p", "none"] = field(
        default="log1p", metadata={"help": "`log1p` for ln(1 + KL) of each sequence, `none` for KL itself."}
    )
    kl_direction: Literal["forward", "reverse"] = field(
        default="forward", metadata={"help": "`forward` for KL(ref ‖ policy), `reverse` for KL(policy ‖ ref)."}
    )
    kl_reduction: Literal["sum", "token_mean"] = field(
        default="sum", metadata={"help": "KL of a sequence: `sum` over its trained tokens, or `token_mean`."}
    )

    # Parameters that control the reference
    ref_model: str | None = field(
        default=None,
        metadata={
            "help": "Name or path of the reference model. By default the reference is the policy as it was given: with its "
            "adapter off under PEFT, else a frozen copy."
        },
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments for `from_pretrained` of the reference. By default `model_init_kwargs`."},
    )
    precompute_ref_hidden: bool = field(
        default=False,
        metadata={
            "help": "Whether the last hidden states of the reference are computed once, before training, and read from "
            "disk. Then only the LM head of the reference is kept."
        },
    )
    ref_hidden_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the precomputed states. By default `_ref_hidden` in `output_dir`, which is not pushed to the Hub."
        },
    )

    # Parameters that control the data preprocessing
    chat_template_date: str = field(
        default=CHAT_TEMPLATE_DATE,
        metadata={"help": "Date for chat templates that print today's date."},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.chat_template_date is None:
            raise ValueError(f"`chat_template_date` is None, expected a date such as {CHAT_TEMPLATE_DATE!r}.")
        check_chat_template_options(None, self.chat_template_date)
        if not (math.isfinite(self.kl_coef) and self.kl_coef >= 0):
            raise ValueError(f"`kl_coef` is {self.kl_coef}, expected 0 (no KL term) or a number above.")
        for name, choices in (
            ("kl_scaling", SCALINGS),
            ("kl_direction", tuple(DIRECTIONS)),
            ("kl_reduction", REDUCTIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, expected one of {', '.join(choices)}.")
        if self.ref_hidden_dir is not None and not self.precompute_ref_hidden:
            raise ValueError(
                f"`ref_hidden_dir` is {self.ref_hidden_dir!r} without `precompute_ref_hidden`. Set "
                "`precompute_ref_hidden=True` to use it, or leave it out."
            )
        if self.kl_coef == 0:
            if self.ref_model is not None or self.precompute_ref_hidden:
                warnings.warn("`kl_coef` is 0: the reference model is not used.")
            return
        if (self.packing or self.eval_packing) and self.packing_strategy != "bfd":
            raise ValueError(
                f"`packing_strategy={self.packing_strategy!r}` cuts sequences into pieces, which have no KL of their own. Use "
                "`packing_strategy='bfd'`."
            )
        if self.eval_packing and not (self.packing or self.padding_free):
            raise ValueError(
                "`eval_packing` without `packing` or `padding_free` packs the evaluation data but tells the model nothing of "
                "it: a row would be one sequence, with one KL. Set one of them too, or leave `eval_packing` out."
            )
        if self.label_smoothing_factor:
            raise ValueError(
                "`label_smoothing_factor` is not supported with a KL term: it needs the full logits. Leave it at 0."
            )
