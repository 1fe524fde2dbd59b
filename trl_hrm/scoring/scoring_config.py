"""How the scores of steps are taken from a reward model."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class ScoringConfig:
    """
    How the scores of steps are taken from a reward model.

    Args:
        spans (`list[int]`, *optional*, defaults to `[1]`):
            How many steps are judged as one. `[1, 2]` also judges each step merged with the one before it, as a hierarchical
            reward model has learned to.
        combine (`str`, *optional*, defaults to `"max"`):
            How the scores of several spans become one: `"max"` or `"mean"`.
    """

    spans: list[int] = field(
        default_factory=lambda: [1],
        metadata={
            "help": "How many steps are judged as one. `1 2` also judges each step merged with the one before it."
        },
    )
    combine: Literal["max", "mean"] = field(
        default="max", metadata={"help": "How the scores of several spans become one."}
    )
