from dataclasses import dataclass, field


@dataclass
class ResumeConfig:
    """
    Base class of the training configs, for the arguments of a resumed training.

    Parameters:
        resume_from_checkpoint (`str` or `bool`, *optional*):
            Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint in
            `output_dir`. If there is none, training starts from the beginning.
        accept_changes (`list[str]`, *optional*, defaults to `[]`):
            Names of settings that may differ from those of the checkpoint. A resumed training with other changes is refused.
    """

    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Checkpoint to resume from, for the training commands: a path, or `true` for the newest complete checkpoint "
            "in `output_dir`. If there is none, training starts from the beginning."
        },
    )
    accept_changes: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Names of settings that may differ from those of the checkpoint. A resumed training with other changes is "
            "refused."
        },
    )

    def __post_init__(self):
        if isinstance(self.accept_changes, str):
            self.accept_changes = [self.accept_changes]
        super().__post_init__()
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least 1.")
