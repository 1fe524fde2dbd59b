"""Configs of candidate solutions: how they are read, and how a reward model chooses among them."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import Config
from ..search.steps import RULES, StepRule, regex_rule
from .build_config import BuildConfig, unescape
from .sources import parse_columns


Aggregate = Literal["min", "prod", "last", "mean", "max"]


@dataclass(kw_only=True)
class CandidatesConfig(Config):
    r"""
    Where candidate solutions are, and how their texts are cut into steps.

    Args:
        candidates (`str`):
            JSON Lines or JSON with `prompt` and `completion` (a text), `completions` (its steps) or `candidates` (a list of
            either), or outputs of search-and-learn; the folder of a dataset with these columns; or a folder of `trl-hrm annotate`.
        split (`str`, *optional*):
            Split of a dataset to read. Defaults to `"train"`.
        segmentation (`str`, *optional*):
            Name of the [`StepRule`] that cuts texts into steps, or `"regex"`. Defaults to `"step_header"`, and for a run to the
            steps of its search. Lists of steps are cut already.
        step_pattern (`str`, *optional*):
            Regular expression whose matches end steps, for `segmentation="regex"`.
        join_steps (`str`, *optional*):
            Text between the steps of a candidate that is given as a list. Defaults to `"\n\n"`.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"prompt": "question"}` or `["prompt=question"]`. See [`~data.sources.rename_columns`].
            Not for runs.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Treat the thinking of a reasoning model as the rest of its text. By default the text up to `</think>` is left out, and
            a candidate that only thinks has no steps.

    Raises:
        `ValueError`: If there is no such rule, or an option has no effect with the others.
    """

    candidates: str = field(
        metadata={
            "help": "JSON Lines or JSON with `prompt` and `completion` (a text), `completions` (its steps) or `candidates` (a list of "
            "either), or outputs of search-and-learn; the folder of a dataset with these columns; or a folder of `trl-hrm annotate`.",
            "metavar": "INPUT",
        }
    )
    split: str | None = field(
        default=None, metadata={"help": "Split of a dataset to read. Defaults to `train`.", "advanced": True}
    )
    segmentation: Literal["step_header", "blank_line", "sentence", "formula", "regex"] | None = field(
        default=None,
        metadata={
            "help": "Rule that cuts texts into steps. Defaults to `step_header`, and for a run to the steps of its search. Lists of "
            "steps are cut already."
        },
    )
    step_pattern: str | None = field(
        default=None,
        metadata={
            "help": "Regular expression whose matches end steps, for `--segmentation regex`.",
            "advanced": True,
        },
    )
    join_steps: str | None = field(
        default=None,
        metadata={
            "help": r"Text between the steps of a candidate that is given as a list. `\n` and `\t` are a newline and a tab. Defaults to "
            r"`\n\n`.",
            "parse": unescape,
            "metavar": "TEXT",
            "advanced": True,
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Read COLUMN as NAME, for rows with other column names: `prompt=question candidates=generations`.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    keep_thinking: bool = field(
        default=False,
        metadata={
            "help": "Treat the thinking of a reasoning model as the rest of its text, instead of leaving it out."
        },
    )

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        super().__post_init__()
        if (self.segmentation == "regex") != (self.step_pattern is not None):
            raise ValueError("segmentation='regex' and step_pattern go together, and one of them is missing.")
        self.step_rule()  # checks the pattern

    def step_rule(self) -> StepRule:
        """Return the rule that cuts texts into steps."""
        if self.step_pattern is not None:
            return regex_rule(self.step_pattern)
        return RULES[self.segmentation or "step_header"]


@dataclass(kw_only=True)
class RaftConfig(CandidatesConfig, BuildConfig):
    """
    Config of the choice among candidates by a reward model. It adds to [`CandidatesConfig`], and to `output_dir`, `test_size`,
    `seed`, `exclude` and `overwrite` of [`BuildConfig`]:

    Args:
        aggregate (`str`, *optional*, defaults to `"min"`):
            How the scores of its steps become the score of a candidate: `"min"`, `"prod"`, `"last"`, `"mean"` or `"max"`. See
            [`~scoring.aggregate.aggregate`].
        num_candidates (`int`, *optional*):
            Number of candidates per problem to choose from, the first ones. Defaults to all.
        max_kept (`int`, *optional*, defaults to `1`):
            Maximum number of candidates per problem to keep.
        min_score (`float`, *optional*, defaults to `0.0`):
            Minimum score of a candidate to keep.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the others.
    """

    aggregate: Aggregate = field(
        default="min", metadata={"help": "How the scores of its steps become the score of a candidate."}
    )
    num_candidates: int | None = field(
        default=None,
        metadata={
            "help": "Number of candidates per problem to choose from, the first ones. Defaults to all.",
            "metavar": "N",
        },
    )
    max_kept: int = field(default=1, metadata={"help": "Maximum number of candidates per problem to keep."})
    min_score: float = field(default=0.0, metadata={"help": "Minimum score of a candidate to keep."})

    # Fields of builders of judged steps alone
    view: Literal["raft"] = field(default="raft", init=False)
    merge_separator: str = field(default="\n", init=False)
    max_merge: int = field(default=2, init=False)
    num_proc: int | None = field(default=None, init=False)
    strict: bool = field(default=False, init=False)

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_candidates", "max_kept"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        if not 0 <= self.min_score <= 1:
            raise ValueError(f"min_score is {self.min_score}, expected a number from 0 to 1.")
