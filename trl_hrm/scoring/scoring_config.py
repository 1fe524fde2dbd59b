"""Config for scoring steps with a reward model."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..config import COUNT, Config


@dataclass
class ScoringConfig(Config):
    """
    Configuration of how a reward model scores steps.

    Args:
        spans (`list[int]`, *optional*, defaults to `[1]`):
            Numbers of consecutive steps to score as one step. `[1]` scores each step separately, as the
            [HRM](https://huggingface.co/papers/2503.13551) paper does at inference (section 3.1). `[1, 2]` also scores each
            step merged with the previous step, so that a model trained on merged steps can give a correction a high score.
        combine (`str`, *optional*, defaults to `"max"`):
            How to combine the scores of a step over several spans: `"max"` or `"mean"`. The first steps of a solution have
            fewer spans.

    Raises:
        `ValueError`: If `spans` does not contain 1 or contains a number below 1, or `combine` is unknown.
    """

    spans: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "Numbers of consecutive steps to score as one step. 1 scores each step separately. 1 2 also scores "
            "each step merged with the previous step.",
            "range": COUNT,
        },
    )
    combine: Literal["max", "mean"] = field(
        default="max",
        metadata={
            "help": "How to combine the scores of a step over several spans.",
            "advanced": True,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if 1 not in self.spans or min(self.spans) < 1:
            raise ValueError(
                f"`spans` is {self.spans}. It must contain 1, since the first step has no previous step to merge with, and only "
                "positive numbers."
            )


def check_candidates(prompts: Sequence[str], candidates: Sequence[Sequence[Sequence[str]]]) -> None:
    """Raise `ValueError` if there is not one list of candidates per prompt."""
    if len(prompts) != len(candidates):
        raise ValueError(
            f"Got {len(prompts)} prompts and candidates for {len(candidates)} prompts. Pass one list of candidates per prompt."
        )
