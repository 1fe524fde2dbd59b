"""Options of an export of search trees."""

import math
from dataclasses import dataclass
from typing import ClassVar

from ..search.compression import check_options
from ..search.values import ESTIMATORS, LABELS, TRUNCATED
from .build_config import VIEWS, BuildConfig


@dataclass
class ExportConfig(BuildConfig):
    r"""
    Options of an export of search trees: those of [`BuildConfig`], with one more view, and what a label is.

    Args:
        view (`str`, *optional*, defaults to `"tree"`):
            Besides the views of [`BuildConfig`], `"sft"`: one row is a right solution, as `prompt` and `completion` for
            supervised fine-tuning, with the lowest MC score of its judged steps as `mc_score`, and the leaves below that step as
            `mc_correct` and `mc_total`. The prompt is what the policy was asked, where the inputs tell it.
        labels (`str`, *optional*, defaults to `"soft"`):
            `"soft"` for the MC score, `"hard"` for whether it is above 0, `"entropy"` for ER-PRM's label.
        eta (`float`, *optional*):
            Strength of the entropy regularisation, for `labels="entropy"` alone. Negative for completions of the optimal
            policy (eq. 2 of ER-PRM).
        estimator (`str`, *optional*, defaults to `"child_mean"`):
            Estimator of the MC score. See [`mc_scores`].
        truncated (`str`, *optional*, defaults to `"drop"`):
            What a solution without an answer is: `"drop"` for unknown, `"wrong"`.
        min_leaves (`int`, *optional*, defaults to `1`):
            Least number of leaves that a label rests on: answered ones and, with `truncated="wrong"`, unresolved ones. The
            other steps are context. Not asked of values that the source recorded.
        hnc (`bool`, *optional*, defaults to `False`):
            Add a row with node compression for every training problem; in the flat views, rows for the paths that it
            changes. See [`compress`].
        hnc_probability (`float`, *optional*, defaults to `0.5`):
            Chance of a node to lose a child.
        hnc_min_children (`int`, *optional*, defaults to `4`):
            Least number of children of such a node.
        hnc_passes (`int`, *optional*, defaults to `1`):
            Number of passes.
        hnc_seed (`int`, *optional*, defaults to `42`):
            Seed of the compression.
        balance (`int`, *optional*):
            Number of bins of equal width in which the training labels are balanced: labels of fuller bins become context at
            random, until all bins hold about as many as the smallest one that holds any. `label_weights` has what undoes
            it: the inverse of a label's chance to stay.
        min_score (`float`, *optional*, defaults to `0.0`):
            Least `mc_score` of a solution, for `view="sft"`.
        top_k (`int`, *optional*):
            Most solutions of a problem, those with the highest `mc_score`, for `view="sft"`. By default all.

    Raises:
        `ValueError`: If an option is out of range, or has no meaning beside another.
    """

    views: ClassVar[tuple[str, ...]] = (*VIEWS, "sft")

    labels: str = "soft"
    eta: float | None = None
    estimator: str = "child_mean"
    truncated: str = "drop"
    min_leaves: int = 1
    hnc: bool = False
    hnc_probability: float = 0.5
    hnc_min_children: int = 4
    hnc_passes: int = 1
    hnc_seed: int = 42
    balance: int | None = None
    min_score: float = 0.0
    top_k: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, values in (("labels", LABELS), ("estimator", ESTIMATORS), ("truncated", TRUNCATED)):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(values)}.")
        if self.labels == "entropy" and (self.eta is None or math.isnan(self.eta)):
            raise ValueError(f"labels='entropy' with eta={self.eta}, expected a number, as in eta=2.")
        if self.labels != "entropy" and self.eta is not None:
            raise ValueError(f"eta is {self.eta} with labels={self.labels!r}; it is for labels='entropy' alone.")
        if self.min_leaves < 1:
            raise ValueError(f"min_leaves is {self.min_leaves}, expected 1 or more.")
        if self.balance is not None and self.balance < 2:
            raise ValueError(f"balance is {self.balance}, expected 2 bins or more.")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, expected a number from 0 to 1.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, expected 1 or more.")
        check_options(self.hnc_probability, self.hnc_min_children, self.hnc_passes)
        self._check_view()

    def _check_view(self) -> None:
        """Refuse options that would be ignored."""
        for name in ("hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"):
            if not self.hnc and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name} is {getattr(self, name)} without hnc; ask for hnc too, or leave it out.")
        for name in ("min_score", "top_k"):
            if self.view != "sft" and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} with view={self.view!r}; it is for view='sft' alone."
                )
        if self.view == "sft" and (self.labels != "soft" or self.hnc or self.balance or self.min_leaves > 1):
            raise ValueError(
                "view='sft' has solutions, not labels: labels, min_leaves, hnc and balance have no meaning for it. Leave them "
                "out; min_score and top_k choose among the solutions."
            )
