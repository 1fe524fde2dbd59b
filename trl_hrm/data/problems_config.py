"""Configuration of the commands that read problems."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..config import COUNT, Config
from .sources import parse_columns, parse_pairs


if TYPE_CHECKING:
    from .problem_sets import ProblemSet


@dataclass(kw_only=True)
class ProblemsConfig(Config):
    """
    Configuration of problems with reference answers.

    Args:
        problems (`str`):
            JSON Lines or JSON file, dataset folder or Hub id, with problems and answers, or `"math500"` or `"gsm8k"` for these
            datasets on the Hub. Optional only for commands that accept other inputs.
        problems_config (`str`, *optional*):
            Configuration of a dataset on the Hub, such as `"main"` for GSM8K.
        problem_format (`str`, *optional*, defaults to `"auto"`):
            Column format of the problems: `"gsm8k"`, `"math"`, `"prm800k"`, `"plain"`, or `"auto"`, which detects it from the first row.
        split (`str`, *optional*):
            Dataset split to read. Ignored for files. Defaults to `"test"` for `"math500"` and `"gsm8k"`, otherwise to `"train"`.
        limit (`int`, *optional*):
            Maximum number of problems. Defaults to all.
        exclude (`list[str]`, *optional*):
            JSON files of test sets whose problems are dropped.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"problem": "Question"}`, or `problem=Question` on the command line.
        where (`dict[str, str]`, *optional*):
            Keep only records with these values, such as `{"label.finish_reason": "solution"}`, or `label.finish_reason=solution` on the
            command line. Use dots for nested columns. Numbers, `true`, `false` and `null` are compared as in JSON.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to raise an error at the first invalid row. By default, invalid rows are dropped and counted.
    """

    problems: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines or JSON file, dataset folder or Hub id, with problems and answers, or math500 or gsm8k for these "
            "datasets on the Hub."
        },
    )
    problems_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of a dataset on the Hub, such as main for GSM8K.", "advanced": True},
    )
    problem_format: Literal["auto", "gsm8k", "math", "prm800k", "plain"] = field(
        default="auto",
        metadata={
            "help": "Column format of the problems. auto detects it from the first row.",
            "advanced": True,
        },
    )
    split: str | None = field(
        default=None,
        metadata={
            "help": "Dataset split to read. Ignored for files (default: test for math500 and gsm8k, otherwise train)."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Maximum number of problems (default: all).", "range": COUNT}
    )
    exclude: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON files of test sets whose problems are dropped.", "metavar": "FILE"},
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Column to read for each expected name, such as problem=Question answer=reward_model.ground_truth.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    where: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Keep only records with these values, such as label.finish_reason=solution. Use dots for nested columns. "
            "Numbers, true, false and null are compared as in JSON.",
            "nargs": "+",
            "metavar": "NAME=VALUE",
            "parse": str,
            "advanced": True,
        },
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Raise an error at the first invalid row. By default, invalid rows are dropped and counted."
        },
    )

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        if self.where is not None:
            self.where = parse_pairs(self.where, "where", "NAME=VALUE, such as label.finish_reason=solution")
            self.where = {
                name: value if isinstance(value, str) else json.dumps(value, default=str)
                for name, value in self.where.items()
            }
        super().__post_init__()

    def read_problems(
        self, prefix_column: str | None = None, prefix_fault: Callable[[str], str | None] | None = None
    ) -> "ProblemSet":
        """
        Read the problems. See [`~data.problem_sets.read_problems`] for the arguments and the errors raised.
        """
        from .problem_sets import read_problems
        from .problems import read_problem_keys

        return read_problems(
            self.problems,
            format=self.problem_format,
            split=self.split,
            config=self.problems_config,
            limit=self.limit,
            exclude=read_problem_keys(self.exclude),
            columns=self.columns or {},
            strict=self.strict,
            where=self.where,
            prefix_column=prefix_column,
            prefix_fault=prefix_fault,
        )
