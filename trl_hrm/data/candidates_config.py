"""Configurations for reading candidate solutions and selecting among them with a reward model."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ..config import COUNT
from ..search.segmentation_config import SegmentationConfig
from .build_config import BuildConfig, unescape
from .sources import parse_columns


Aggregate = Literal["min", "prod", "last", "mean", "max"]
KEEPS_THINKING = (
    "`keep_thinking` is False, but {}, which has steps in thinking. Remove `keep_thinking`, or use another segmentation, such as "
    "'blank_line'."
)


@dataclass(kw_only=True)
class CandidatesConfig(SegmentationConfig):
    r"""
    Configuration of candidate solutions: where to read them, and how to split them into steps. It also has the fields of
    [`SegmentationConfig`]. The segmentation is not applied to lists of steps. Its default is `"step_header"`, or the steps of the
    search for a folder of `trl-hrm annotate`.

    Args:
        candidates (`str`):
            Solutions to select from: a JSON Lines or JSON file, or a dataset folder, with the columns `prompt` and either `completion`
            (a text), `completions` (a list of steps) or `candidates` (a list of either); an output of search-and-learn; or a folder
            of `trl-hrm annotate`.
        split (`str`, *optional*):
            Dataset split to read. Defaults to `"train"`.
        join_steps (`str`, *optional*):
            Separator used to join the steps of a candidate that is given as a list. Defaults to `"\n\n"`.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"prompt": "question"}`, or `prompt=question` on the command line. See
            [`~data.sources.rename_columns`]. Not supported for a folder of `trl-hrm annotate`.
        keep_thinking (`bool`, *optional*):
            Whether to keep the thinking of a reasoning model. By default, it is removed before candidates are scored, and a
            candidate that contains only thinking has no steps. With `segmentation="thinking"`, thinking is always kept.

    Raises:
        `ValueError`: If `keep_thinking` is `False` with `segmentation="thinking"`. See also [`SegmentationConfig`].
    """

    candidates: str = field(
        metadata={
            "help": "Solutions to select from: a JSON Lines or JSON file, or a dataset folder, with the columns `prompt` and either "
            "`completion` (a text), `completions` (a list of steps) or `candidates` (a list of either); an output of "
            "search-and-learn; or a folder of `trl-hrm annotate`.",
            "metavar": "INPUT",
        }
    )
    split: str | None = field(
        default=None, metadata={"help": "Dataset split to read (default: train).", "advanced": True}
    )
    join_steps: str | None = field(
        default=None,
        metadata={
            "help": r"Separator used to join the steps of a candidate that is given as a list. \n and \t are read as a newline and a "
            r"tab (default: \n\n).",
            "parse": unescape,
            "may_be_empty": True,
            "metavar": "TEXT",
            "advanced": True,
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Column to read for each expected name, such as prompt=question candidates=generations.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    keep_thinking: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",  # `--keep_thinking` alone means true
            "const": True,
            "help": "Keep the thinking of a reasoning model. By default, it is removed before candidates are scored, except with "
            "--segmentation thinking, which always keeps it.",
        },
    )

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        super().__post_init__()
        if self.segmentation == "thinking" and self.keep_thinking is False:
            raise ValueError(KEEPS_THINKING.format("`segmentation` is 'thinking'"))


@dataclass(kw_only=True)
class RaftConfig(CandidatesConfig, BuildConfig):
    """
    Configuration of the selection of the best candidates. It also has the fields of [`CandidatesConfig`], and `output_dir`,
    `test_size`, `seed`, `exclude` and `overwrite` of [`BuildConfig`].

    Args:
        candidates (`list[str]`):
            Solutions to select from: one or more of the inputs of [`CandidatesConfig`]. A problem that is in several inputs has the
            candidates of all of them.
        aggregate (`str`, *optional*, defaults to `"min"`):
            How to aggregate the step scores into the score of a solution: `"min"`, `"prod"`, `"last"`, `"mean"` or `"max"`. See
            [`~scoring.aggregate.aggregate`].
        num_candidates (`int`, *optional*):
            Number of candidates per problem to select from, starting from the first. Defaults to all.
        max_kept (`int`, *optional*, defaults to `1`):
            Maximum number of candidates to keep per problem.
        min_score (`float`, *optional*, defaults to `0.0`):
            Minimum score for a candidate to be kept.

    Raises:
        `ValueError`: If an option is out of range.
    """

    candidates: list[str] = field(
        metadata={
            "help": "Solutions to select from: JSON Lines or JSON files, or dataset folders, with the columns `prompt` and either "
            "`completion` (a text), `completions` (a list of steps) or `candidates` (a list of either); outputs of "
            "search-and-learn; or folders of `trl-hrm annotate`.",
            "metavar": "INPUT",
        }
    )
    aggregate: Aggregate = field(
        default="min", metadata={"help": "How to aggregate the step scores into the score of a solution."}
    )
    num_candidates: int | None = field(
        default=None,
        metadata={
            "help": "Number of candidates per problem to select from, starting from the first (default: all).",
            "metavar": "N",
            "range": COUNT,
        },
    )
    max_kept: int = field(
        default=1, metadata={"help": "Maximum number of candidates to keep per problem.", "range": COUNT}
    )
    min_score: float = field(
        default=0.0, metadata={"help": "Minimum score for a candidate to be kept.", "range": "[0, 1]"}
    )

    # Fields of `BuildConfig` that only apply to labelled steps
    view: Literal["raft"] = field(default="raft", init=False)
    merge_separator: str = field(default="\n", init=False)
    max_merge: None = field(default=None, init=False)
    merge: Literal["pairs"] = field(default="pairs", init=False)
    num_proc: int | None = field(default=None, init=False)
    strict: bool = field(default=False, init=False)

    def sources(self) -> list[CandidatesConfig]:
        """Return a configuration for reading each of the inputs."""
        shared = {field.name: getattr(self, field.name) for field in fields(CandidatesConfig)}
        return [CandidatesConfig(**shared | {"candidates": source}) for source in self.candidates]
