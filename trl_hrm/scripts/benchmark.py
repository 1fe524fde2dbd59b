"""
Evaluate a step reward model on benchmarks with labelled steps: ProcessBench, PRMBench and BIG-Bench Mistake.

```bash
trl-hrm benchmark subset400.jsonl --suite prmbench --reward_model outputs/tiny-hrm --output_dir runs/prmbench
trl-hrm benchmark gsm8k.json math.json olympiadbench.json omnimath.json --suite processbench --reward_model outputs/tiny-hrm
```
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import SEED
from ..data.sources import parse_columns
from ..io import claimed_folder
from ..scoring.reward_model_config import RewardModelConfig
from ..terminal import one_line, plain, say


@dataclass(kw_only=True)
class BenchmarkConfig(RewardModelConfig):
    """
    Configuration of [`benchmark`]. It also has the fields of [`RewardModelConfig`].

    Args:
        inputs (`list[str]`):
            JSON or JSON Lines files, dataset folders or Hub ids. All splits of a dataset are read. Each input is assigned to a
            benchmark by its columns.
        suite (`list[str]`):
            Benchmarks to run: `"processbench"`, `"prmbench"`, `"bigbenchmistake"`.
        columns (`dict[str, str]`, *optional*):
            Column to read for each expected name, such as `{"problem": "Question"}`, or `problem=Question` on the command line.
        first_step (`int`, *optional*, defaults to `0`):
            Number of the first step in the labels of first-error benchmarks, 0 or 1. With 1, the label 0 means no error. Rows of
            MR-GSM8K are always read with 1.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to raise an error at the first invalid row. By default, invalid rows are dropped and counted.
        threshold (`float`, *optional*, defaults to `0.5`):
            Steps with a score below this threshold are predicted to be wrong.
        validation_size (`float`, *optional*, defaults to `0.2`):
            Fraction of the problems used to tune the threshold. The results on the other problems are also reported with the
            tuned threshold. 0 disables tuning.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the validation split and of the confidence intervals.
        output_dir (`str`, *optional*):
            Folder for `results.json` and for the scores of all steps, `scores.jsonl`. By default, results are only printed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace existing results in `output_dir`.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    inputs: list[str] = field(
        metadata={
            "help": "JSON or JSON Lines files, dataset folders or Hub ids. All splits of a dataset are read. Each input is "
            "assigned to a benchmark by its columns.",
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
            "help": "Column to read for each expected name, such as problem=Question.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
        },
    )
    first_step: Literal[0, 1] = field(
        default=0,
        metadata={
            "help": "Number of the first step in the labels of first-error benchmarks. With 1, the label 0 means no error. "
            "Rows of MR-GSM8K are always read with 1."
        },
    )
    strict: bool = field(
        default=False,
        metadata={
            "help": "Raise an error at the first invalid row. By default, invalid rows are dropped and counted."
        },
    )
    threshold: float = field(
        default=0.5,
        metadata={"help": "Steps with a score below this threshold are predicted to be wrong.", "range": "[0, 1]"},
    )
    validation_size: float = field(
        default=0.2,
        metadata={
            "help": "Fraction of the problems used to tune the threshold. The results on the other problems are also "
            "reported with the tuned threshold. 0 disables tuning.",
            "range": "[0, 1)",
        },
    )
    seed: int = field(
        default=42,
        metadata={"help": "Random seed of the validation split and of the confidence intervals.", "range": SEED},
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for results.json and for the scores of all steps, scores.jsonl (default: only print the "
            "results)."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace existing results in --output_dir."})

    def __post_init__(self):
        if self.columns is not None:
            self.columns = parse_columns(self.columns)
        super().__post_init__()
        if self.output_dir is None and self.overwrite:
            raise ValueError(
                "`overwrite` has no effect without `output_dir`. Set `output_dir`, or remove `overwrite`."
            )


@dataclass(frozen=True)
class BenchmarkResults:
    """
    Result of [`benchmark`]. `str()` gives the text that the command prints.

    Args:
        suites (`dict[str, dict[str, Any]]`):
            Metrics of each suite, with confidence intervals and counts.
        output_dir (`str`, *optional*):
            Folder with `results.json` and `scores.jsonl`.
    """

    suites: dict[str, dict[str, Any]]
    output_dir: str | None

    def __str__(self) -> str:
        from ..evaluation.benchmarks.measures import format_results

        lines = [f"\n{format_results(name, measures)}\n" for name, measures in self.suites.items()]
        if self.output_dir is not None:
            folder = plain(str(self.output_dir))
            lines.append(f"Results: {folder}/results.json; scores of all steps: {folder}/scores.jsonl")
        return "\n".join(lines)


def benchmark(config: BenchmarkConfig) -> BenchmarkResults:
    """
    Evaluate a step reward model on benchmarks with labelled steps.

    Args:
        config ([`BenchmarkConfig`]):
            Data, benchmarks and reward model.

    Returns:
        [`BenchmarkResults`]: The metrics of each benchmark.

    Raises:
        `FileExistsError`: If `output_dir` already has results and `overwrite` is not set.
        `OSError`: If `output_dir` cannot be written. This is checked first. If the disk fills up later, the results are saved in the
            system's temporary folder.
        `ValueError`: If the data has no rows of a benchmark, or a row is invalid and `strict` is set.
    """
    from ..evaluation.benchmarks import run as benchmarks

    if config.output_dir is None:
        return _benchmark(config, None)
    with claimed_folder(config.output_dir, "output_dir", (benchmarks.RESULTS, benchmarks.SCORES)) as folder:
        benchmarks.check_output(folder, config.overwrite)
        return _benchmark(config, folder)


def _benchmark(config: BenchmarkConfig, folder: Path | None) -> BenchmarkResults:
    from ..evaluation.benchmarks import run as benchmarks
    from ..evaluation.benchmarks.suite import read_suites

    suites = [benchmarks.SUITES[name] for name in dict.fromkeys(config.suite)]
    found = read_suites(suites, config.inputs, config.columns or {}, config.first_step, config.strict)
    log = None if folder is None else folder / benchmarks.JUDGEMENTS
    scorer = config.load_scorer(log, config.overwrite)
    results, rows = {}, []
    for suite in suites:
        data = found[suite.name]
        say(f"{suite.name}: {len(data.solutions):,} solutions")
        for warning in data.warnings():
            say(f"warning: {one_line(warning)}")
        results[suite.name], scored = benchmarks.run_suite(
            suite, data, scorer, config, config.threshold, config.validation_size, config.seed
        )
        rows += scored
    if folder is not None:
        reward_model = {"model": config.reward_model, **config.describe_scoring()}
        settings = {"threshold": config.threshold, "validation_size": config.validation_size}
        if config.columns:
            settings["columns"] = [f"{name}={column}" for name, column in config.columns.items()]
        settings |= {name: getattr(config, name) for name in ("first_step", "strict") if getattr(config, name)}
        benchmarks.write_results(folder, results, rows, reward_model, settings, config.seed)
    return BenchmarkResults(results, config.output_dir)
