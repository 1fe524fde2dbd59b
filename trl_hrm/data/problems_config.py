"""The settings of the commands that read problems."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..config import Config
from .sources import parse_columns


if TYPE_CHECKING:
    from .problem_sets import ProblemSet


@dataclass(kw_only=True)
class ProblemsConfig(Config):
    """
    Problems with reference answers.

    Args:
        problems (`str`):
            JSON Lines or JSON file, or folder or Hub name of a dataset. Required, but for commands that have other inputs.
        problem_format (`str`, *optional*, defaults to `"auto"`):
            Columns of the problems: `"gsm8k"`, `"math"`, `"prm800k"`, `"plain"`, or `"auto"` to tell by the first row.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset.
        limit (`int`, *optional*):
            Largest number of problems. By default all.
        exclude (`list[str]`, *optional*):
            JSON files of test sets, whose problems are left out.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"problem": "Question"}`. On the command line `problem=Question`.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to stop at the first row with a fault instead of leaving such rows out and counting them.
    """

    problems: str | None = field(
        default=None,
        metadata={"help": "JSON Lines or JSON file, or folder or Hub name of a dataset, with problems and answers."},
    )
    problem_format: Literal["auto", "gsm8k", "math", "prm800k", "plain"] = field(
        default="auto", metadata={"help": "Columns of the problems; auto tells by the first row.", "advanced": True}
    )
    split: str = field(default="train", metadata={"help": "Split to read of a dataset; files have none."})
    limit: int | None = field(default=None, metadata={"help": "Largest number of problems (default: all)."})
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON files of test sets, whose problems are left out.", "metavar": "FILE"},
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Read COLUMN as NAME, for rows with other column names, as in problem=Question "
            "answer=reward_model.ground_truth.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop at the first row with a fault instead of leaving such rows out and counting them."},
    )

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()

    def read_problems(
        self, prefix_column: str | None = None, prefix_fault: Callable[[str], str | None] | None = None
    ) -> "ProblemSet":
        """
        The problems. See [`~data.problem_sets.read_problems`] for those with prefixes, and for what it raises.
        """
        from .problem_sets import read_problems
        from .problems import read_problem_keys

        return read_problems(
            self.problems,
            format=self.problem_format,
            split=self.split,
            limit=self.limit,
            exclude=read_problem_keys(self.exclude),
            columns=self.columns or {},
            strict=self.strict,
            prefix_column=prefix_column,
            prefix_fault=prefix_fault,
        )
