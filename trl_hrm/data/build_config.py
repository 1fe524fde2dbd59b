"""Configs of the dataset builders."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import Config
from .sources import parse_columns


NEUTRAL_LABELS = {"negative": 0.0, "positive": 1.0, "drop": None}


def unescape(text: str) -> str:
    r"""Return the text with `\n` and `\t`, as people type them in a shell, as newline and tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(kw_only=True)
class BuildConfig(Config):
    r"""
    Base class of the configs of dataset builders.

    Args:
        output_dir (`str`):
            Directory to create, with one Parquet file per split, a dataset card and `build_report.json`.
        view (`str`, *optional*, defaults to `"tree"`):
            What a row is. `"tree"`: a problem with its judged steps as a tree. `"hrm"`: the tree with merged steps. `"prm"`: one
            root-to-leaf path. `"orm"`: one root-to-leaf path with a label on its last step only.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step, for `view="hrm"`. On the command line `\n` and `\t` are a newline and a tab.
        max_merge (`int`, *optional*, defaults to `2`):
            Maximum number of steps in a merged step, for `view="hrm"`.
        test_size (`float`, *optional*, defaults to `0.1`):
            Share of problems in the test split, from 0 (no test split) to below 1.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the split.
        exclude (`list[str]`, *optional*, defaults to `[]`):
            JSON files of test sets, with the problem under `problem`, `question` or `prompt`. Their problems are dropped.
        num_proc (`int`, *optional*):
            Number of processes. Defaults to one per core, and at most one per chunk of 4 MB.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace `output_dir` if it is an earlier build.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"completions": "steps"}` or `["completions=steps"]`. See
            [`~data.sources.rename_columns`].
        strict (`bool`, *optional*, defaults to `False`):
            Stop at the first row with a fault, such as a blank step, instead of leaving out and counting such rows.

    Raises:
        `ValueError`: If an option is out of range.
    """

    output_dir: str = field(
        metadata={
            "help": "Directory to create, with one Parquet file per split, a dataset card and `build_report.json`."
        }
    )
    view: Literal["tree", "hrm", "prm", "orm"] = field(
        default="tree",
        metadata={
            "help": "What a row is. `tree`: a problem with its judged steps as a tree. `hrm`: the tree with merged steps. `prm`: one "
            "root-to-leaf path. `orm`: one root-to-leaf path with a label on its last step only."
        },
    )
    merge_separator: str = field(
        default="\n",
        metadata={
            "help": r"Text between the steps of a merged step, for `--view hrm`. `\n` and `\t` are a newline and a tab (default: \n).",
            "parse": unescape,
            "advanced": True,
        },
    )
    max_merge: int = field(
        default=2,
        metadata={"help": "Maximum number of steps in a merged step, for `--view hrm`.", "advanced": True},
    )
    test_size: float = field(
        default=0.1,
        metadata={"help": "Share of problems in the test split, from 0 (no test split) to below 1."},
    )
    seed: int = field(default=42, metadata={"help": "Seed of the split."})
    exclude: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON files of test sets, with the problem under `problem`, `question` or `prompt`. Their problems are dropped.",
            "metavar": "FILE",
        },
    )
    num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes. Defaults to one per core, and at most one per chunk of 4 MB.",
            "advanced": True,
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace `output_dir` if it is an earlier build."})
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Read COLUMN as NAME, for rows with other column names: `problem=Question answer=reward_model.ground_truth`.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Stop at the first row with a fault, such as a blank step, instead of leaving out and counting such rows."
        },
    )

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        super().__post_init__()
        if not self.merge_separator:
            raise ValueError("merge_separator is empty, expected a text that tells a merged step from a single one.")
        if self.max_merge < 2:
            raise ValueError(f"max_merge is {self.max_merge}, expected 2 (pairs, as in the paper) or more.")
        if not 0 <= self.test_size < 1:
            raise ValueError(f"test_size is {self.test_size}, expected a share from 0 (no test split) to below 1.")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"num_proc is {self.num_proc}, expected 1 or more.")


@dataclass(kw_only=True)
class BuildPRM800KConfig(BuildConfig):
    """
    Config of [`build_prm800k`]. It adds to [`BuildConfig`]:

    Args:
        inputs (`list[str]`):
            PRM800K files of phase 1 or 2, JSON Lines or JSON.
        neutral (`str` or `float`, *optional*, defaults to `"negative"`):
            Label of a step rated 0: `"negative"` (as in the HRM paper's Table 2), `"positive"`, `"drop"` for context only, or a
            probability from 0 to 1.
        drop_screening (`bool`, *optional*, defaults to `False`):
            Drop the records that served to screen annotators or to control their quality.
    """

    inputs: list[str] = field(
        metadata={
            "help": "PRM800K files of phase 1 or 2, JSON Lines or JSON.",
            "positional": True,
            "metavar": "FILE",
        }
    )
    neutral: str | float = field(
        default="negative",
        metadata={
            "help": "Label of a step rated 0: `negative`, `positive`, `drop` (context only), or a probability from 0 to 1.",
            "parse": str,
        },
    )
    drop_screening: bool = field(
        default=False,
        metadata={"help": "Drop the records that served to screen annotators or to control their quality."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.neutral_label  # noqa: B018  checks the range

    @property
    def neutral_label(self) -> float | None:
        """Label of a step rated 0. `None` for context only."""
        if self.neutral in NEUTRAL_LABELS:
            return NEUTRAL_LABELS[self.neutral]
        try:
            label = float(self.neutral)
        except ValueError:
            label = -1.0
        if not 0 <= label <= 1:
            raise ValueError(
                f"neutral is {self.neutral!r}, expected negative, positive, drop or a probability in [0, 1]."
            )
        return label


@dataclass(kw_only=True)
class BuildMathShepherdConfig(BuildConfig):
    """
    Config of [`build_math_shepherd`]. It adds to [`BuildConfig`]:

    Args:
        inputs (`list[str]`):
            Files of Math-Shepherd, ER-PRM or RLHFlow, JSON Lines or JSON.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Files of Math-Shepherd, ER-PRM or RLHFlow, JSON Lines or JSON.",
            "positional": True,
            "metavar": "FILE",
        }
    )


@dataclass(kw_only=True)
class BuildStepwiseConfig(BuildConfig):
    """
    Config of [`build_stepwise`]. It adds to [`BuildConfig`]:

    Args:
        inputs (`list[str]`):
            JSON Lines or JSON files, or one directory or Hub id of a dataset.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset to read. Not used for files.
    """

    inputs: list[str] = field(
        metadata={
            "help": "JSON Lines or JSON files, or one directory or Hub id of a dataset.",
            "positional": True,
            "metavar": "INPUT",
        }
    )
    split: str = field(default="train", metadata={"help": "Split of a dataset to read. Not used for files."})
