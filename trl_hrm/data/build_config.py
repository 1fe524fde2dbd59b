"""Configurations of the dataset builders."""

from dataclasses import dataclass, field
from typing import Literal

from ..config import PROCESSES, SEED, OutputConfig
from ..io import shown
from .hierarchy import MAX_MERGE
from .sources import parse_columns


NEUTRAL_LABELS = {"negative": 0.0, "positive": 1.0, "drop": None}


def unescape(text: str) -> str:
    r"""Replace the two characters `\n` and `\t`, as typed in a shell, with a newline and a tab."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


@dataclass(kw_only=True)
class BuildConfig(OutputConfig):
    r"""
    Base class of the configurations of the builders of labelled steps. It also has the fields of [`OutputConfig`].

    Args:
        view (`str`, *optional*, defaults to `"tree"`):
            Content of a row. `"tree"`: a problem with its labelled steps as a tree. `"hrm"`: the tree with merged steps. `"prm"`:
            one root-to-leaf path. `"orm"`: one root-to-leaf path with a label on its last step only.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step, for `view="hrm"`. On the command line, `\n` and `\t` are read as a newline and a
            tab.
        merge (`str`, *optional*, defaults to `"pairs"`):
            Which steps are merged, for `view="hrm"`. `"pairs"`: each step with the previous one. `"thoughts"`: each step that begins
            with a mark such as "Wait" with all steps of the thought before it. See [`hrm_view`].
        max_merge (`int`, *optional*):
            Maximum number of steps in a merged step, for `view="hrm"`. Defaults to 2, and to 16 for `merge="thoughts"`.
        thinking_marks (`list[str]`, *optional*):
            Phrases that begin a thought, for `merge="thoughts"`. Train with the same `thinking_marks`. Defaults to
            [`~search.thinking.MARKS`].
        test_size (`float`, *optional*, defaults to `0.1`):
            Fraction of the problems that go to the test split, in [0, 1). 0 creates no test split.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the train/test split.
        exclude (`list[str]`, *optional*, defaults to `[]`):
            JSON files of test sets whose problems are dropped. They hold the problem under `problem`, `question` or `prompt`.
        num_proc (`int`, *optional*):
            Number of processes. Defaults to one per CPU core, but at most one per 4 MB of input.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"completions": "steps"}`, or `completions=steps` on the command line.
            See [`~data.sources.rename_columns`].
        strict (`bool`, *optional*, defaults to `False`):
            Whether to raise an error at the first invalid row, such as one with a blank step. By default, invalid rows are dropped and
            counted.

    Raises:
        `ValueError`: If an option is out of range.
    """

    view: Literal["tree", "hrm", "prm", "orm"] = field(
        default="tree",
        metadata={
            "help": "Content of a row. tree: a problem with its labelled steps as a tree. hrm: the tree with merged steps. "
            "prm: one root-to-leaf path. orm: one root-to-leaf path with a label on its last step only."
        },
    )
    merge_separator: str = field(
        default="\n",
        metadata={
            "help": r"Text between the steps of a merged step, for --view hrm. \n and \t are read as a newline and a tab (default: \n).",
            "parse": unescape,
            "advanced": True,
        },
    )
    merge: Literal["pairs", "thoughts"] = field(
        default="pairs",
        metadata={
            "help": "Which steps are merged, for --view hrm. pairs: each step with the previous one. thoughts: each step that begins with "
            "a mark such as Wait with all steps of the thought before it.",
            "advanced": True,
        },
    )
    max_merge: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of steps in a merged step, for --view hrm (default: 2, and 16 for --merge thoughts).",
            "advanced": True,
            "range": "[2, 1000]",
        },
    )
    thinking_marks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Phrases that begin a thought, for --merge thoughts. Train with the same marks (default: Wait, Alternatively, Let me "
            "check and others, also in other languages).",
            "metavar": "PHRASE",
            "advanced": True,
        },
    )
    test_size: float = field(
        default=0.1,
        metadata={
            "help": "Fraction of the problems that go to the test split, in [0, 1). 0 creates no test split.",
            "range": "[0, 1)",
        },
    )
    seed: int = field(default=42, metadata={"help": "Random seed of the train/test split.", "range": SEED})
    exclude: list[str] = field(
        default_factory=list,
        metadata={
            "help": "JSON files of test sets whose problems are dropped. They hold the problem under `problem`, `question` or `prompt`.",
            "metavar": "FILE",
        },
    )
    num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes (default: one per CPU core, but at most one per 4 MB of input).",
            "advanced": True,
            "range": PROCESSES,
        },
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Column to read for each expected name, such as prompt=problem completions=steps.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Raise an error at the first invalid row, such as one with a blank step. By default, invalid rows are dropped and "
            "counted."
        },
    )

    def __post_init__(self):
        self.columns = parse_columns(self.columns)
        super().__post_init__()
        if self.merge != "pairs" and self.view != "hrm":
            raise ValueError(
                f"`merge` is {shown(self.merge)}, but has no effect with `view={self.view!r}`. Use `view='hrm'`, or remove `merge`."
            )
        if self.view == "raft":  # without merged steps. Its `thinking_marks` split candidates into steps
            return
        if self.thinking_marks is not None and self.merge != "thoughts":
            raise ValueError(
                f"`thinking_marks` is {shown(self.thinking_marks, 200)}, but has no effect with `merge={self.merge!r}`. Use "
                "`merge='thoughts'`, or remove `thinking_marks`."
            )
        if self.max_merge is not None and self.view != "hrm":
            raise ValueError(
                f"`max_merge` is {self.max_merge}, but has no effect with `view={self.view!r}`. Use `view='hrm'`, or remove `max_merge`."
            )
        if self.merge_separator != BuildConfig.merge_separator and not self.merges_steps:
            raise ValueError(
                f"`merge_separator` is {shown(self.merge_separator)}, but has no effect with `view={self.view!r}`, because no steps are "
                "merged. Remove `merge_separator`, or use `view='hrm'`."
            )
        if self.max_merge is None and self.view == "hrm":
            self.max_merge = MAX_MERGE[self.merge]

    @property
    def merges_steps(self) -> bool:
        """Whether the rows can have merged steps."""
        return self.view == "hrm"


@dataclass(kw_only=True)
class BuildPRM800KConfig(BuildConfig):
    """
    Configuration of [`build_prm800k`]. It also has the fields of [`BuildConfig`].

    Args:
        inputs (`list[str]`):
            PRM800K files of phase 1 or 2, in JSON Lines or JSON format.
        neutral (`str` or `float`, *optional*, defaults to `"negative"`):
            Label of a step rated 0: `"negative"` (as in the HRM paper's Table 2), `"positive"`, a probability in [0, 1], or `"drop"`
            to keep the step as context without a label.
        drop_screening (`bool`, *optional*, defaults to `False`):
            Whether to drop the records that were used for annotator screening or quality control.
    """

    inputs: list[str] = field(
        metadata={
            "help": "PRM800K files of phase 1 or 2, in JSON Lines or JSON format.",
            "positional": True,
            "metavar": "FILE",
        }
    )
    neutral: str | float = field(
        default="negative",
        metadata={
            "help": "Label of a step rated 0: negative, positive, a probability in [0, 1], or drop to keep the step as context "
            "without a label.",
            "parse": str,
        },
    )
    drop_screening: bool = field(
        default=False,
        metadata={"help": "Drop the records that were used for annotator screening or quality control."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.neutral_label  # noqa: B018  raises if `neutral` is invalid

    @property
    def neutral_label(self) -> float | None:
        """Label of a step rated 0. `None` keeps the step as context without a label."""
        if self.neutral in NEUTRAL_LABELS:
            return NEUTRAL_LABELS[self.neutral]
        try:
            label = float(self.neutral)
        except ValueError:
            label = -1.0
        if not 0 <= label <= 1:
            raise ValueError(
                f"`neutral` is {shown(self.neutral)}. It must be 'negative', 'positive', 'drop' or a probability in [0, 1]."
            )
        return label


@dataclass(kw_only=True)
class BuildMathShepherdConfig(BuildConfig):
    """
    Configuration of [`build_math_shepherd`]. It also has the fields of [`BuildConfig`].

    Args:
        inputs (`list[str]`):
            Math-Shepherd, ER-PRM or RLHFlow files, in JSON Lines or JSON format.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Math-Shepherd, ER-PRM or RLHFlow files, in JSON Lines or JSON format.",
            "positional": True,
            "metavar": "FILE",
        }
    )


@dataclass(kw_only=True)
class BuildStepwiseConfig(BuildConfig):
    """
    Configuration of [`build_stepwise`]. It also has the fields of [`BuildConfig`].

    Args:
        inputs (`list[str]`):
            JSON Lines or JSON files, dataset folders and Hub ids.
        weights (`list[float]`, *optional*):
            Relative number of labelled steps of each input in the train split, such as `[1, 1, 2]`. The input that runs out first is
            used whole, the others are sampled by problem, and no row is repeated. By default, all rows are used.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of each dataset. Ignored for files.

    Raises:
        `ValueError`: If the number of `weights` is not the number of `inputs`, or there is only one input.
    """

    inputs: list[str] = field(
        metadata={
            "help": "JSON Lines or JSON files, dataset folders and Hub ids.",
            "positional": True,
            "metavar": "INPUT",
        }
    )
    weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Relative number of labelled steps of each input in the train split, such as 1 1 2. The input that runs out first is "
            "used whole, the others are sampled by problem, and no row is repeated (default: all rows are used).",
            "metavar": "WEIGHT",
            "range": "(0, inf)",
        },
    )
    split: str = field(default="train", metadata={"help": "Split to read of each dataset. Ignored for files."})

    def __post_init__(self):
        super().__post_init__()
        if self.weights is None:
            return
        if len(self.inputs) == 1:
            raise ValueError("`weights` has no effect with one input. Remove it, or give the inputs to mix.")
        if len(self.weights) != len(self.inputs):
            raise ValueError(
                f"`weights` has {len(self.weights)} values for {len(self.inputs)} inputs. Give one weight per input, in the order of the "
                "inputs."
            )
