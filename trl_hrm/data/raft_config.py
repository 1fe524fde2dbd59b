"""Options of the choice among candidates by a reward model."""

from dataclasses import dataclass, field
from typing import ClassVar

from ..search.steps import RULES, StepRule, regex_rule
from .build_config import BuildConfig


AGGREGATES = ("min", "prod", "last", "mean", "max")


@dataclass(kw_only=True)
class RaftConfig(BuildConfig):
    r"""
    Options of the choice among candidates by a reward model: `output_dir`, `test_size`, `seed`, `exclude` and `overwrite` of
    [`BuildConfig`], and those below.

    Args:
        candidates (`str`):
            A JSON Lines file, the folder of a dataset, or that of a run of `trl-hrm annotate`.
        split (`str`, *optional*):
            Split of a dataset. By default `"train"`.
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that cuts texts into steps, or `"regex"`. By default `"step_header"`. Not for runs and
            lists of steps, which are cut already.
        step_pattern (`str`, *optional*):
            Regular expression whose matches end steps, for `segmentation="regex"`.
        join_steps (`str`, *optional*):
            Text between the steps of a candidate that is given as a list, in the completion. By default `"\n\n"`.
        aggregate (`str`, *optional*, defaults to `"min"`):
            How step scores become the score of a candidate. See [`~scoring.aggregate.aggregate`].
        num_candidates (`int`, *optional*):
            Use the first so many candidates of each problem. By default all.
        top_k (`int`, *optional*, defaults to `1`):
            Most candidates of a problem to keep.
        min_score (`float`, *optional*, defaults to `0.0`):
            Least score of a candidate to keep.

    Raises:
        `ValueError`: If an option is out of range, or has no meaning beside another.
    """

    views: ClassVar[tuple[str, ...]] = ("raft",)

    # of builders of judged steps alone
    view: str = field(default="raft", init=False)
    merge_separator: str = field(default="\n", init=False)
    max_merge: int = field(default=2, init=False)
    num_proc: int | None = field(default=None, init=False)

    candidates: str
    split: str | None = None
    segmentation: str | None = None
    step_pattern: str | None = None
    join_steps: str | None = None
    aggregate: str = "min"
    num_candidates: int | None = None
    top_k: int = 1
    min_score: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {self.aggregate!r}, expected one of {', '.join(AGGREGATES)}.")
        for name in ("num_candidates", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, expected a number from 0 to 1.")
        if self.segmentation not in (None, "regex", *RULES):
            raise ValueError(f"segmentation is {self.segmentation!r}, expected one of {', '.join(RULES)}, regex.")
        if (self.segmentation == "regex") != (self.step_pattern is not None):
            raise ValueError("segmentation='regex' and step_pattern go together, and one of them is missing.")
        self.step_rule()  # checks the pattern

    def step_rule(self) -> StepRule:
        """Tells where the steps of a text end."""
        return (
            regex_rule(self.step_pattern)
            if self.step_pattern is not None
            else RULES[self.segmentation or "step_header"]
        )
