"""Config of the export of search trees."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ..search.compression import check_options
from .build_config import BuildConfig


@dataclass(kw_only=True)
class ExportConfig(BuildConfig):
    r"""
    Config of [`export`]. It adds to [`BuildConfig`]:

    Args:
        inputs (`list[str]`):
            Folders of `trl-hrm annotate`, or Parquet files of nodes from them. With `format="openr"`, JSON Lines files of openr.
        format (`str`, *optional*, defaults to `"run"`):
            What the inputs are: `"run"` or `"openr"`.
        view (`str`, *optional*, defaults to `"tree"`):
            A view of [`BuildConfig`], or `"sft"`: one row is a correct solution, as `prompt` and `completion` for supervised
            fine-tuning. Its `mc_score` is the lowest MC score of its judged steps, with `mc_correct` and `mc_total` of that step.
            The prompt is what the policy was asked, if the inputs tell it.

        > Parameters that control the labels

        labels (`str`, *optional*, defaults to `"soft"`):
            What a label is. `"soft"`: the MC score. `"hard"`: 1 if the MC score is above 0. `"entropy"`: ER-PRM's label.
        eta (`float`, *optional*):
            Strength of the entropy regularisation. Required for `labels="entropy"`. Negative for completions of the optimal policy
            (eq. 2 of ER-PRM).
        estimator (`str`, *optional*, defaults to `"child_mean"`):
            Estimator of the MC score. `"child_mean"`: mean over the children of a step, recursively. `"leaf_share"`: share of
            correct leaves below a step. See [`mc_scores`].
        truncated (`str`, *optional*, defaults to `"drop"`):
            How to count a solution without an answer: `"drop"` for unknown, or `"wrong"`.
        min_leaves (`int`, *optional*, defaults to `1`):
            Minimum number of leaves below a step with a label. Unresolved leaves count only with `truncated="wrong"`. Other steps
            become context. Values that the source recorded are not checked.

        > Parameters that control node compression (HNC)

        hnc (`bool`, *optional*, defaults to `False`):
            Add a row with node compression for every training problem. In the flat views, add rows for the paths that it changes.
            See [`compress`].
        hnc_probability (`float`, *optional*, defaults to `0.5`):
            Chance of a node to lose a child.
        hnc_min_children (`int`, *optional*, defaults to `4`):
            Minimum number of children of a node that loses one.
        hnc_passes (`int`, *optional*, defaults to `1`):
            Number of passes.
        hnc_seed (`int`, *optional*, defaults to `42`):
            Seed of the compression.

        > Parameters that control the balance of labels

        balance (`int`, *optional*):
            Number of bins of equal width in which the training labels are balanced. Labels of fuller bins become context at
            random until each bin holds about as many labels as the smallest one. The column `label_weights` holds the inverse of
            a label's chance to stay.

        > Parameters that control `view="sft"`

        min_mc_score (`float`, *optional*, defaults to `0.0`):
            Minimum `mc_score` of a solution.
        max_solutions (`int`, *optional*):
            Maximum number of solutions per problem, those with the highest `mc_score`. Defaults to all.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the others.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Folders of `trl-hrm annotate`, or Parquet files of nodes from them. With `--format openr`, JSON Lines files of "
            "openr.",
            "positional": True,
            "metavar": "RUN",
        }
    )
    format: Literal["run", "openr"] = field(default="run", metadata={"help": "What the inputs are."})
    view: Literal["tree", "hrm", "prm", "orm", "sft"] = field(
        default="tree",
        metadata={
            "help": "What a row is. `tree`: a problem with its judged steps as a tree. `hrm`: the tree with merged steps. `prm`: one "
            "root-to-leaf path. `orm`: one root-to-leaf path with a label on its last step only. `sft`: a correct solution for "
            "supervised fine-tuning."
        },
    )

    # Parameters that control the labels
    labels: Literal["soft", "hard", "entropy"] = field(
        default="soft",
        metadata={
            "help": "What a label is. `soft`: the MC score. `hard`: 1 if the MC score is above 0. `entropy`: ER-PRM's label."
        },
    )
    eta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the entropy regularisation. Required for `--labels entropy`. Negative for completions of the optimal "
            "policy."
        },
    )
    estimator: Literal["child_mean", "leaf_share"] = field(
        default="child_mean",
        metadata={
            "help": "Estimator of the MC score. `child_mean`: mean over the children of a step, recursively. `leaf_share`: share of "
            "correct leaves below a step."
        },
    )
    truncated: Literal["drop", "wrong"] = field(
        default="drop", metadata={"help": "How to count a solution without an answer: `drop` for unknown, or `wrong`."}
    )
    min_leaves: int = field(
        default=1,
        metadata={"help": "Minimum number of leaves below a step with a label. Other steps become context."},
    )

    # Parameters that control node compression (HNC)
    hnc: bool = field(
        default=False, metadata={"help": "Add a row with node compression (HNC) for every training problem."}
    )
    hnc_probability: float = field(
        default=0.5, metadata={"help": "Chance of a node to lose a child, for `--hnc`.", "advanced": True}
    )
    hnc_min_children: int = field(
        default=4,
        metadata={"help": "Minimum number of children of a node that loses one, for `--hnc`.", "advanced": True},
    )
    hnc_passes: int = field(default=1, metadata={"help": "Number of passes, for `--hnc`.", "advanced": True})
    hnc_seed: int = field(default=42, metadata={"help": "Seed of the compression, for `--hnc`.", "advanced": True})

    # Parameters that control the balance of labels
    balance: int | None = field(
        default=None,
        metadata={
            "help": "Number of bins of equal width in which the training labels are balanced. Labels of fuller bins become context at "
            "random. The column `label_weights` holds the inverse of a label's chance to stay.",
            "metavar": "BINS",
        },
    )

    # Parameters that control `view="sft"`
    min_mc_score: float = field(
        default=0.0,
        metadata={
            "help": "Minimum `mc_score` of a solution, the lowest MC score of its judged steps, for `--view sft`.",
            "aliases": ["--min_value"],
        },
    )
    max_solutions: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of solutions per problem, those with the highest `mc_score`, for `--view sft`. Defaults to all."
        },
    )

    strict: bool = field(default=False, init=False)  # faults of search trees are always errors

    def __post_init__(self):
        super().__post_init__()
        if self.labels == "entropy" and (self.eta is None or math.isnan(self.eta)):
            raise ValueError(f"labels='entropy' with eta={self.eta}, expected a number, as in eta=2.")
        if self.labels != "entropy" and self.eta is not None:
            raise ValueError(f"eta is {self.eta} with labels={self.labels!r}; it is for labels='entropy' alone.")
        if self.min_leaves < 1:
            raise ValueError(f"min_leaves is {self.min_leaves}, expected 1 or more.")
        if self.balance is not None and self.balance < 2:
            raise ValueError(f"balance is {self.balance}, expected 2 bins or more.")
        if not 0 <= self.min_mc_score <= 1:
            raise ValueError(f"min_mc_score is {self.min_mc_score}, expected a number from 0 to 1.")
        if self.max_solutions is not None and self.max_solutions < 1:
            raise ValueError(f"max_solutions is {self.max_solutions}, expected 1 or more.")
        check_options(self.hnc_probability, self.hnc_min_children, self.hnc_passes)
        # Options that would be ignored
        for name in ("hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"):
            if not self.hnc and getattr(self, name) != getattr(ExportConfig, name):
                raise ValueError(f"{name} is {getattr(self, name)} without hnc; ask for hnc too, or leave it out.")
        for name in ("min_mc_score", "max_solutions"):
            if self.view != "sft" and getattr(self, name):
                raise ValueError(
                    f"{name} is {getattr(self, name)} with view={self.view!r}; it is for view='sft' alone."
                )
        if self.view == "sft" and (self.labels != "soft" or self.hnc or self.balance or self.min_leaves > 1):
            raise ValueError(
                "view='sft' has solutions, not labels: labels, min_leaves, hnc and balance have no meaning for it. Leave them "
                "out; min_mc_score and max_solutions choose among the solutions."
            )
