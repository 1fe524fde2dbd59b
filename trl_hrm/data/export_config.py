"""Configuration of [`export`], which builds datasets from search trees."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..config import COUNT, SEED
from ..io import shown
from ..search.values import RELATIVE_LABELS
from .build_config import BuildConfig


@dataclass(kw_only=True)
class ExportConfig(BuildConfig):
    r"""
    Configuration of [`export`]. It also has the fields of [`BuildConfig`].

    Args:
        inputs (`list[str]`):
            Folders of `trl-hrm annotate`, or Parquet files of nodes from them. With `format="openr"`, JSON Lines files of
            openr.
        format (`str`, *optional*, defaults to `"run"`):
            Format of the inputs: `"run"` or `"openr"`.
        view (`str`, *optional*, defaults to `"tree"`):
            One of the views of [`BuildConfig`], or `"sft"`: each row is a correct solution, as `prompt` and `completion` for
            supervised fine-tuning. Its `mc_score` is the lowest MC score of its labelled steps, with the `mc_correct` and `mc_total`
            of that step. `prompt` is the prompt that the policy was given, if the inputs record it. See also `prefixes`.

        > Parameters that control the labels

        labels (`str`, *optional*, defaults to `"soft"`):
            Type of label. `"soft"`: the MC score. `"hard"`: 1 if the MC score is above `threshold`, else 0. `"entropy"`: ER-PRM's
            label. `"progress"`: (1 + the MC score of the step − the MC score before it) / 2, where 0.5 means no change.
            `"ratio"`: the MC score of the step divided by the MC score before it, at most 1. A merged step is compared with the
            MC score before its first step. See [`make_label`]. All labels are in [0, 1], and every head of [`StepFormat`] can be
            trained on them. With `"progress"` and `"ratio"`, the rows also have `mc_scores` and `prompt_mc_score`.
        threshold (`float`, *optional*, defaults to `0.0`):
            MC score above which a step counts as right, for `labels="hard"` and for `consensus`.
        eta (`float`, *optional*):
            Strength of the entropy regularisation. Required for `labels="entropy"`. Use a negative value for completions sampled
            from the optimal policy (eq. 2 of ER-PRM).
        estimator (`str`, *optional*, defaults to `"child_mean"`):
            Estimator of the MC score. `"child_mean"`: mean over the children of a step, recursively. `"leaf_share"`: share of
            correct leaves below a step. See [`mc_scores`].
        truncated (`str`, *optional*, defaults to `"drop"`):
            How to count a solution without an answer: `"drop"` ignores it, `"wrong"` counts it as wrong.
        min_leaves (`int`, *optional*, defaults to `1`):
            Minimum number of leaves below a step for the step to get a label. Steps with fewer leaves are kept as context without a
            label. Unresolved leaves count only with `truncated="wrong"`. Not applied to values that the source recorded.

        > Parameters that control the consensus of Monte Carlo and a judge

        consensus (`bool`, *optional*, defaults to `False`):
            Whether to keep only the solutions in which the MC scores and the verdict of a judge name the same first wrong step, or
            both none ([Qwen](https://huggingface.co/papers/2501.07301)). The verdicts come from `trl-hrm judge`. A tree is
            reduced to its kept solutions. The labels are computed from the whole tree. See [`compare_solutions`].
        judge_name (`str`, *optional*, defaults to `"judge"`):
            Name of the judge.
        disagreement (`str`, *optional*, defaults to `"drop"`):
            What to do with a solution in which the judge names another step: `"drop"` it, or keep it and `"weight"` the labels.
            With `"weight"`, the column `label_weights` has the share of the readable votes that name the same first wrong step
            as the MC scores, and the mean over the solutions that share a step. Train with `label_weighting="column"`.
        after_first_error (`str`, *optional*, defaults to `"context"`):
            What to do with the steps after the first wrong step: `"context"` keeps them without a label, `"label"` keeps their
            labels. Does not apply to `view="orm"`, where the label is the outcome of the solution.

        > Parameters that control node compression (HNC)

        hnc (`bool`, *optional*, defaults to `False`):
            Whether to add a row with node compression for every training problem. In the views `"prm"` and `"orm"`, a row is added
            for each path that compression changes. In the view `"sft"`, each text has the higher of its scores in the tree and in
            the compressed tree. See [`compress`].
        hnc_rule (`str`, *optional*, defaults to `"per_parent"`):
            How the child that moves is drawn. `"per_parent"`: one draw per node and, if it succeeds, one child, uniformly.
            `"per_child"`, as in the authors' code: one draw per child, in order, until one succeeds.
        hnc_probability (`float`, *optional*, defaults to `0.5`):
            Probability that a draw succeeds.
        hnc_min_children (`int`, *optional*, defaults to `4`):
            Minimum number of children of a node for one of them to be merged.
        hnc_passes (`int`, *optional*, defaults to `1`):
            Number of compression passes.
        hnc_seed (`int`, *optional*, defaults to `42`):
            Random seed of the compression.

        > Parameters that control label balancing

        balance (`int`, *optional*):
            Number of equal-width bins for balancing the training labels. Labels are removed at random from the larger bins until
            each bin holds about as many labels as the smallest one; the steps are kept as context. The column `label_weights`
            holds the inverse of the probability that a label is kept.
        balance_by (`str`, *optional*, defaults to `"value"`):
            What is balanced. `"value"`: the bins of all labels. `"value_and_depth"`: the bins of the labels at each depth, the
            number of steps up to the end of the labelled one. Each label is then kept with a probability of at least 0.1.

        > Parameters that control `view="sft"`

        prefixes (`bool`, *optional*, defaults to `False`):
            Whether to write a row for every step whose own MC score is at least `min_mc_score`, with the text from the start to
            this step, instead of rows for correct solutions only. The column `is_complete` tells whether the solution ends there.
            [`KLSelfTrainer`] does not train on an end of sequence after the other rows. TRL's `SFTTrainer` does.
        min_mc_score (`float`, *optional*, defaults to `0.0`):
            Minimum `mc_score` of a row. Required with `prefixes`.
        max_solutions (`int`, *optional*):
            Maximum number of rows per problem. Those with the highest `mc_score` are kept. Defaults to all.

    Raises:
        `ValueError`: If an option is out of range, or would be ignored because of another option.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Folders of `trl-hrm annotate`, or Parquet files of nodes from them. With --format openr, JSON Lines "
            "files of openr.",
            "positional": True,
            "metavar": "RUN",
        }
    )
    format: Literal["run", "openr"] = field(default="run", metadata={"help": "Format of the inputs."})
    view: Literal["tree", "hrm", "prm", "orm", "sft"] = field(
        default="tree",
        metadata={
            "help": "Content of a row. tree: a problem with its labelled steps as a tree. hrm: the tree with merged steps. "
            "prm: one root-to-leaf path. orm: one root-to-leaf path with a label on its last step only. sft: a correct "
            "solution for supervised fine-tuning."
        },
    )

    # Parameters that control the labels
    labels: Literal["soft", "hard", "entropy", "progress", "ratio"] = field(
        default="soft",
        metadata={
            "help": "Type of label. soft: the MC score. hard: 1 if the MC score is above --threshold, else 0. entropy: ER-PRM's "
            "label. progress: (1 + the MC score of the step - the MC score before it) / 2. ratio: the MC score of the step "
            "divided by the MC score before it, at most 1."
        },
    )
    threshold: float = field(
        default=0.0,
        metadata={
            "help": "MC score above which a step counts as right, for --labels hard and for --consensus.",
            "range": "[0, 1)",
        },
    )
    eta: float | None = field(
        default=None,
        metadata={
            "help": "Strength of the entropy regularisation. Required for --labels entropy. Use a negative value for completions "
            "sampled from the optimal policy.",
            "range": "(-inf, inf)",
        },
    )
    estimator: Literal["child_mean", "leaf_share"] = field(
        default="child_mean",
        metadata={
            "help": "Estimator of the MC score. child_mean: mean over the children of a step, recursively. leaf_share: share of "
            "correct leaves below a step."
        },
    )
    truncated: Literal["drop", "wrong"] = field(
        default="drop",
        metadata={"help": "How to count a solution without an answer: drop ignores it, wrong counts it as wrong."},
    )
    min_leaves: int = field(
        default=1,
        metadata={
            "help": "Minimum number of leaves below a step for the step to get a label. Steps with fewer leaves are kept as context "
            "without a label.",
            "range": COUNT,
        },
    )

    # Parameters that control the consensus of Monte Carlo and a judge
    consensus: bool = field(
        default=False,
        metadata={
            "help": "Keep only the solutions in which the MC scores and the verdict of a judge (`trl-hrm judge`) name the same first "
            "wrong step, or both none."
        },
    )
    judge_name: str = field(
        default="judge", metadata={"help": "Name of the judge, for --consensus.", "advanced": True}
    )
    disagreement: Literal["drop", "weight"] = field(
        default="drop",
        metadata={
            "help": "What to do with a solution in which the judge names another step, for --consensus. drop: drop the solution. "
            "weight: keep it, with the share of the votes that agree in the column `label_weights`."
        },
    )
    after_first_error: Literal["context", "label"] = field(
        default="context",
        metadata={
            "help": "What to do with the steps after the first wrong step, for --consensus. context: keep them without a label. "
            "label: keep their labels."
        },
    )

    # Parameters that control node compression (HNC)
    hnc: bool = field(
        default=False, metadata={"help": "Add a row with node compression (HNC) for every training problem."}
    )
    hnc_rule: Literal["per_parent", "per_child"] = field(
        default="per_parent",
        metadata={
            "help": "How the child that moves is drawn, for --hnc. per_parent: one draw per node and, if it succeeds, one child, "
            "uniformly. per_child, as in the authors' code: one draw per child, in order, until one succeeds.",
        },
    )
    hnc_probability: float = field(
        default=0.5,
        metadata={
            "help": "Probability that a draw of --hnc_rule succeeds, for --hnc.",
            "advanced": True,
            "range": "[0, 1]",
        },
    )
    hnc_min_children: int = field(
        default=4,
        metadata={
            "help": "Minimum number of children of a node for one of them to be merged, for --hnc.",
            "advanced": True,
            "range": "[2, inf)",
        },
    )
    hnc_passes: int = field(
        default=1,
        metadata={"help": "Number of compression passes, for --hnc.", "advanced": True, "range": "[1, 1000]"},
    )
    hnc_seed: int = field(
        default=42, metadata={"help": "Random seed of the compression, for --hnc.", "advanced": True, "range": SEED}
    )

    # Parameters that control label balancing
    balance: int | None = field(
        default=None,
        metadata={
            "help": "Number of equal-width bins for balancing the training labels. Labels are removed at random from the larger bins. "
            "The column `label_weights` holds the inverse of the probability that a label is kept.",
            "metavar": "BINS",
            "range": "[2, 1000]",
        },
    )

    balance_by: Literal["value", "value_and_depth"] = field(
        default="value",
        metadata={
            "help": "What --balance balances. value: the bins of all labels. value_and_depth: the bins of the labels at each "
            "depth, the number of steps up to the end of the labelled one.",
        },
    )

    # Parameters that control `view="sft"`
    prefixes: bool = field(
        default=False,
        metadata={
            "help": "Write a row for every step whose own MC score is at least --min_mc_score, with the text from the start to "
            "this step, instead of rows for correct solutions only, for --view sft."
        },
    )
    min_mc_score: float = field(
        default=0.0,
        metadata={
            "help": "Minimum `mc_score` of a row, for --view sft: the lowest MC score of the labelled steps of a solution or, with "
            "--prefixes, the MC score of the step.",
            "aliases": ["--min_value"],
            "range": "[0, 1]",
        },
    )
    max_solutions: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of rows per problem, for --view sft. Those with the highest `mc_score` are kept "
            "(default: all).",
            "range": COUNT,
        },
    )

    strict: bool = field(default=False, init=False)  # an invalid search tree always raises

    def __post_init__(self):
        super().__post_init__()
        if self.labels == "entropy" and self.eta is None:
            raise ValueError(f"`eta` is {self.eta}. `labels='entropy'` requires a number, such as `eta=2`.")
        if self.labels != "entropy" and self.eta is not None:
            raise ValueError(
                f"`eta` is {self.eta}, but has no effect with `labels={self.labels!r}`. Use `labels='entropy'`, or remove `eta`."
            )
        if self.threshold and not (self.labels == "hard" or self.consensus):
            raise ValueError(
                f"`threshold` is {self.threshold}, but has no effect with `labels={self.labels!r}`. Use `labels='hard'` or "
                "`consensus`, or remove `threshold`."
            )
        if self.labels in RELATIVE_LABELS and self.view == "orm":
            raise ValueError(
                f"`labels={self.labels!r}` compares a step with the step before it, but `view='orm'` has labels of whole solutions. "
                "Use another view, or another kind of label."
            )
        if self.labels in RELATIVE_LABELS and self.balance and self.view == "hrm":
            raise ValueError(
                f"`balance` is {self.balance}, but with `labels={self.labels!r}` a merged step has another label than its last step, "
                "so it would be balanced by the wrong label. Use another view, or remove `balance`."
            )
        if self.consensus:
            name = self.judge_name
            if Path(name).name != name or name == "..":
                raise ValueError(f"`judge_name` is {shown(name)}. It must be the name of a folder, such as 'judge'.")
            for is_wrong, option, reason in (
                (
                    self.format == "openr",
                    "format='openr'",
                    "no judge has judged these files. Use a run of trl-hrm annotate",
                ),
                (self.view == "sft", "view='sft'", "solutions for fine-tuning have no step labels. Use another view"),
                (self.hnc, "hnc", "compression moves steps to other solutions than the judge has read. Remove `hnc`"),
                (
                    self.balance and self.disagreement == "weight",
                    "balance",
                    "with `disagreement='weight'`, both write `label_weights`. Use `disagreement='drop'`, or remove `balance`",
                ),
                (
                    self.after_first_error == "label" and self.view == "orm",
                    "after_first_error='label'",
                    "with `view='orm'`, only the last step has a label, which is always kept. Remove `after_first_error`",
                ),
            ):
                if is_wrong:
                    raise ValueError(f"`consensus` does not support `{option}`: {reason}.")
        # Options that would be ignored
        for name in ("hnc_rule", "hnc_probability", "hnc_min_children", "hnc_passes", "hnc_seed"):
            if not self.hnc and getattr(self, name) != getattr(ExportConfig, name):
                raise ValueError(
                    f"`{name}` is {shown(getattr(self, name))}, but has no effect without `hnc`. Set `hnc`, or remove `{name}`."
                )
        if self.balance_by != "value" and not self.balance:
            raise ValueError(
                f"`balance_by` is {shown(self.balance_by)}, but has no effect without `balance`. Set `balance` to the number of "
                "bins, or remove `balance_by`."
            )
        for name in ("judge_name", "disagreement", "after_first_error"):
            if not self.consensus and getattr(self, name) != getattr(ExportConfig, name):
                raise ValueError(
                    f"`{name}` is {shown(getattr(self, name))}, but has no effect without `consensus`. Set `consensus`, or remove `{name}`."
                )
        for name in ("prefixes", "min_mc_score", "max_solutions"):
            if self.view != "sft" and getattr(self, name):
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}, but has no effect with `view={self.view!r}`. Use `view='sft'`, or remove `{name}`."
                )
        if self.view == "sft" and (self.labels != "soft" or self.balance or self.min_leaves > 1):
            raise ValueError(
                "`view='sft'` writes solutions without step labels, so `labels`, `min_leaves` and `balance` have no effect. Remove "
                "them. To select solutions, use `min_mc_score` and `max_solutions`."
            )
        if self.prefixes and not self.min_mc_score:
            raise ValueError(
                "`prefixes` is set, but `min_mc_score` is 0, so every step would become a row, including wrong ones. Set "
                "`min_mc_score`, such as 0.95 as in HRM's code."
            )

    @property
    def merges_steps(self) -> bool:
        return self.view == "hrm" or (self.hnc and self.view != "sft")
