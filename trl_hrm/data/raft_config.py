"""Options of the choice among candidates by a reward model."""

from dataclasses import dataclass, field
from typing import ClassVar

from .build_config import BuildConfig
from .candidates_config import CandidatesConfig


AGGREGATES = ("min", "prod", "last", "mean", "max")


@dataclass(kw_only=True)
class RaftConfig(CandidatesConfig, BuildConfig):
    """
    Options of the choice among candidates by a reward model: `output_dir`, `test_size`, `seed`, `exclude` and `overwrite` of
    [`BuildConfig`], those of [`CandidatesConfig`], and those below.

    Args:
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
    strict: bool = field(default=False, init=False)

    aggregate: str = "min"
    num_candidates: int | None = None
    top_k: int = 1
    min_score: float = 0.0

    def __post_init__(self):
        BuildConfig.__post_init__(self)
        CandidatesConfig.__post_init__(self)
        if self.aggregate not in AGGREGATES:
            raise ValueError(f"aggregate is {self.aggregate!r}, expected one of {', '.join(AGGREGATES)}.")
        for name in ("num_candidates", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, expected a number from 0 to 1.")
