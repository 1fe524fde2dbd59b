"""
Measure how well a step reward model finds wrong steps, on benchmarks with labelled steps.

```bash
trl-hrm benchmark subset400.jsonl --suite prmbench --reward_model outputs/tiny-hrm --output_dir runs/prmbench
trl-hrm benchmark gsm8k.json math.json olympiadbench.json omnimath.json --suite processbench --reward_model outputs/tiny-hrm
```
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..data.sources import parse_columns
from ..scoring.reward_model_config import RewardModelConfig


@dataclass(kw_only=True)
class BenchmarkConfig(RewardModelConfig):
    """
    Settings of [`benchmark`]: those of [`RewardModelConfig`], and

    Args:
        inputs (`list[str]`):
            JSON or JSON Lines files, or folders or Hub names of datasets, of whose splits all are read. The columns say which
            benchmark each belongs to.
        suite (`list[str]`):
            Benchmarks to run: `"processbench"`, `"prmbench"`, `"bigbenchmistake"`.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"problem": "Question"}`. On the command line `problem=Question`.
        first_step (`int`, *optional*, defaults to `0`):
            Number of the first step in the labels of first-error benchmarks: 0, or 1, where the label 0 is no error. Rows of MR-GSM8K
            are known to count from 1.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to stop at the first row with a fault instead of leaving such rows out and counting them.
        threshold (`float`, *optional*, defaults to `0.5`):
            A step is wrong if it scores below this.
        validation_size (`float`, *optional*, defaults to `0.2`):
            Share of problems on which the best threshold is looked for; what it gives on the others is reported beside the results.
            0 for none.
        seed (`int`, *optional*, defaults to `42`):
            Seed of that split and of the intervals.
        output_dir (`str`, *optional*):
            Folder for `results.json` and `scores.jsonl`, the scores of all steps. By default only a table is printed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace the results in the output folder.

    Raises:
        `ValueError`: If an option is out of range, or has no meaning beside another.
    """

    inputs: list[str] = field(
        metadata={
            "help": "JSON or JSON Lines files, or folders or Hub names of datasets, of whose splits all are read; the "
            "columns say which benchmark each belongs to.",
            "metavar": "SOURCE",
            "positional": True,
        }
    )
    suite: list[str] = field(
        metadata={"help": "Benchmarks to run.", "choices": ["processbench", "prmbench", "bigbenchmistake"]}
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Read COLUMN as NAME, for rows with other column names, as in problem=Question.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    first_step: Literal[0, 1] = field(
        default=0,
        metadata={
            "help": "Number of the first step in the labels of first-error benchmarks; with 1, the label 0 is no error. "
            "Rows of MR-GSM8K are known to count from 1."
        },
    )
    strict: bool = field(
        default=False,
        metadata={"help": "Stop at the first row with a fault instead of leaving such rows out and counting them."},
    )
    threshold: float = field(default=0.5, metadata={"help": "A step is wrong if it scores below this."})
    validation_size: float = field(
        default=0.2,
        metadata={
            "help": "Share of problems on which the best threshold is looked for; what it gives on the others is reported "
            "beside the results. 0 for none."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of that split and of the intervals."})
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for results.json and scores.jsonl, the scores of all steps (default: print a table only)."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results in the output folder."})

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()
        if self.output_dir is None and self.overwrite:
            raise ValueError("overwrite goes with output_dir, which is not given. Leave it out.")


@dataclass(frozen=True)
class BenchmarkResults:
    """
    What [`benchmark`] measured. Its `str()` is what the command prints.

    Args:
        suites (`dict[str, dict[str, Any]]`):
            Measures of each suite, with their intervals and counts.
        output_dir (`str`, *optional*):
            Folder with `results.json` and `scores.jsonl`.
    """

    suites: dict[str, dict[str, Any]]
    output_dir: str | None

    def __str__(self) -> str:
        from ..evaluation.benchmarks.measures import format_results

        lines = [f"\n{format_results(name, measures)}\n" for name, measures in self.suites.items()]
        if self.output_dir is not None:
            folder = self.output_dir
            lines.append(f"Results: {folder}/results.json; scores of all steps: {folder}/scores.jsonl")
        return "\n".join(lines)


def benchmark(config: BenchmarkConfig) -> BenchmarkResults:
    """
    Measure how well a step reward model finds wrong steps.

    Args:
        config ([`BenchmarkConfig`]):
            Data, benchmarks and reward model.

    Returns:
        [`BenchmarkResults`]: The measures of each benchmark.

    Raises:
        `FileExistsError`: If the folder has results already.
        `ValueError`: If the data has no rows of a benchmark, or a row is damaged and `strict` is set.
    """
    from ..evaluation.benchmarks import run as benchmarks
    from ..evaluation.benchmarks.measures import check_options
    from ..evaluation.benchmarks.suite import read_suites

    check_options(config.threshold, config.validation_size)
    if config.output_dir is not None:
        benchmarks.check_output(Path(config.output_dir), config.overwrite)
    suites = [benchmarks.SUITES[name] for name in dict.fromkeys(config.suite)]
    found = read_suites(suites, config.inputs, config.columns or {}, config.first_step, config.strict)
    scorer = config.load_scorer()
    results, rows = {}, []
    for suite in suites:
        data = found[suite.name]
        print(f"{suite.name}: {len(data.solutions):,} solutions")
        for warning in data.warnings():
            print(f"warning: {warning}")
        results[suite.name], scored = benchmarks.run_suite(
            suite, data, scorer, config, config.threshold, config.validation_size, config.seed
        )
        rows += scored
    if config.output_dir is not None:
        reward_model = {"model": config.reward_model, **config.describe_scoring()}
        settings = {"threshold": config.threshold, "validation_size": config.validation_size}
        if config.columns:
            settings["columns"] = [f"{name}={column}" for name, column in config.columns.items()]
        settings |= {name: getattr(config, name) for name in ("first_step", "strict") if getattr(config, name)}
        benchmarks.write_results(Path(config.output_dir), results, rows, reward_model, settings, config.seed)
    return BenchmarkResults(results, config.output_dir)
