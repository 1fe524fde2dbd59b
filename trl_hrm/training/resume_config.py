import math
import warnings
from dataclasses import dataclass, field
from numbers import Real

from ..io import resolved_output, shown


LOWER_IS_BETTER = ("ece", "kl", "kl_max", "kl_per_token")  # ends of the names of metrics


@dataclass
class ResumeConfig:
    """
    Base class of the training configs, for the arguments of a resumed training.

    Parameters:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint in
            `output_dir`. Without one, training starts from the beginning.
        accept_changes (`list[str]`, *optional*, defaults to `[]`):
            Names of settings that may differ from those of the checkpoint. Other differences are an error.
    """

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint "
            "in `output_dir`. Without one, training starts from the beginning."
        },
    )
    accept_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of settings that may differ from those of the checkpoint. Other differences are an error."
        },
    )

    def __post_init__(self):
        if isinstance(self.accept_changes, str):
            self.accept_changes = [self.accept_changes]
        # transformers takes the largest value as the best one, except for metrics that end with "loss"
        if self.greater_is_better is None and (self.metric_for_best_model or "").endswith(LOWER_IS_BETTER):
            self.greater_is_better = False
        try:
            with warnings.catch_warnings():  # of a default of TRL
                warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
                super().__post_init__()
        except ValueError as error:
            if "bf16/gpu" not in str(error):
                raise
            raise ValueError(
                "No GPU with support for bf16 was found. To train on the CPU, set `use_cpu=True` and `bf16=False`."
            ) from error
        if resolved_output(
            self.output_dir, "output_dir"
        ).is_file():  # `Trainer` would notice it after preparing the data
            raise NotADirectoryError(f"{self.output_dir} is a file. Choose a folder as `output_dir`.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least 1.")
        for name in ("learning_rate", "weight_decay", "max_grad_norm"):
            # `max_grad_norm` may be infinite, to log the norm without clipping
            value, is_finite = getattr(self, name), name != "max_grad_norm"
            if not isinstance(value, Real) or not value >= 0 or (is_finite and math.isinf(value)):
                raise ValueError(  # YAML reads 1e-5, without a dot, as a text
                    f"`{name}` is {shown(value)}. It must be a number that is at least 0."
                )
