"""How the scores of steps are taken from a reward model."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import Config


@dataclass
class ScoringConfig(Config):
    """
    How the scores of steps are taken from a reward model.

    Args:
        spans (`list[int]`, *optional*, defaults to `[1]`):
            How many steps are judged as one. `[1]` judges each step alone, the inference of the
            [HRM](https://huggingface.co/papers/2503.13551) paper (section 3.1). `[1, 2]` also judges each step merged with the
            one before it, where a model trained on merged steps can approve a correction.
        combine (`str`, *optional*, defaults to `"max"`):
            How the scores of a step over the spans that exist for it become one: `"max"` or `"mean"`.

    Raises:
        `ValueError`: If `spans` does not contain 1 or contains a number below 1, or `combine` is unknown.
    """

    spans: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "How many steps are judged as one. `1 2` also judges each step merged with the one before it."
        },
    )
    combine: Literal["max", "mean"] = field(
        default="max", metadata={"help": "How the scores of several spans become one.", "advanced": True}
    )

    def __post_init__(self):
        super().__post_init__()
        if 1 not in self.spans or min(self.spans) < 1:
            raise ValueError(
                f"spans is {self.spans}, expected positive numbers, 1 among them: a first step has no step to be merged with."
            )
