"""
Evaluate a step reward model on benchmarks with labelled steps: ProcessBench, PRMBench and BIG-Bench Mistake.

```bash
trl-hrm benchmark subset400.jsonl --suite prmbench --reward_model outputs/tiny-hrm --output_dir runs/prmbench
trl-hrm benchmark --reward_model Qwen/Qwen2.5-Math-PRM-7B me/my-hrm --suite processbench --data Qwen/ProcessBench --output_dir runs/compared
```
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import SEED
from ..data.sources import parse_columns
from ..io import claimed_folder, shown, write_or_keep
from ..scoring.reward_model_config import RewardModelConfig, RewardModelsConfig
from ..terminal import one_line, plain, say


if TYPE_CHECKING:
    from ..evaluation.benchmarks.suite import SuiteData


COMPARISON = "comparison.md"  # of several reward models


@dataclass(kw_only=True)
class BenchmarkConfig(RewardModelsConfig):
    """
    Configuration of [`benchmark`]. It also has the fields of [`RewardModelsConfig`].

    Args:
        data (`list[str]`):
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
            Folder for `results.json` and for the scores of all steps, `scores.jsonl`. With several reward models, it has one folder
            for each of them, and their comparison, `comparison.md`. By default, results are only printed.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace existing results in `output_dir`.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    data: list[str] = field(
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
            "help": "Folder for results.json and for the scores of all steps, scores.jsonl. With several reward models, it "
            "has one folder for each of them (default: only print the results)."
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
        if self.first_step and set(self.suite or ()) == {"prmbench"}:
            raise ValueError("`first_step` has no effect on prmbench, whose error steps count from 1. Remove it.")
        names = list(map(folder_name, self.reward_model))
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"`reward_model` has several models whose results would be saved in the folder {shown(name)}. Run the command "
                    "once for each of them."
                )


def folder_name(reward_model: str) -> str:
    """Return the name of the folder with the results of one of several reward models, such as `Qwen--Qwen2.5-Math-PRM-7B`."""
    return Path(reward_model).resolve().name if Path(reward_model).is_dir() else reward_model.replace("/", "--")


@dataclass(frozen=True)
class BenchmarkResults:
    """
    Result of [`benchmark`]. `str()` gives the text that the command prints.

    Args:
        suites (`dict[str, dict[str, dict[str, Any]]]`):
            For each reward model, the metrics of each suite, with confidence intervals and counts.
        output_dir (`str`, *optional*):
            Folder of the results.
    """

    suites: dict[str, dict[str, dict[str, Any]]]
    output_dir: str | None

    def __str__(self) -> str:
        from ..evaluation.benchmarks.measures import format_comparison, format_results

        lines = []
        for model, suites in self.suites.items():
            title = f"\n{plain(model)}" if len(self.suites) > 1 else ""
            lines += [f"{title}\n{format_results(name, measures)}\n" for name, measures in suites.items()]
        if len(self.suites) > 1:
            lines.append(f"{format_comparison(self.suites)}\n")
        if self.output_dir is not None:
            folder = plain(str(self.output_dir))
            each = "" if len(self.suites) == 1 else "*/"
            lines.append(f"Results: {folder}/{each}results.json; scores of all steps: {folder}/{each}scores.jsonl")
        return "\n".join(lines)


def benchmark(config: BenchmarkConfig) -> BenchmarkResults:
    """
    Evaluate step reward models on benchmarks with labelled steps.

    Args:
        config ([`BenchmarkConfig`]):
            Data, benchmarks and reward models.

    Returns:
        [`BenchmarkResults`]: The metrics of each benchmark for each reward model.

    Raises:
        `FileExistsError`: If `output_dir` already has results and `overwrite` is not set.
        `OSError`: If `output_dir` cannot be written. This is checked first. If the disk fills up later, the results are saved in the
            system's temporary folder.
        `ValueError`: If the data has no rows of a benchmark, or a row is invalid and `strict` is set. If a reward model does not
            fit, before any is scored.
    """
    from ..evaluation.benchmarks import run as benchmarks
    from ..evaluation.benchmarks.measures import format_comparison
    from ..evaluation.benchmarks.suite import read_suites

    models = config.scoring_configs()
    with ExitStack() as stack:
        folders: list[Path | None] = [None] * len(models)
        if config.output_dir is not None:
            root = Path(config.output_dir)
            folders = [root]
            if len(models) > 1:
                folders = [root / folder_name(one.reward_model) for one in models]
                stack.enter_context(claimed_folder(root, "output_dir", [COMPARISON]))
                if (root / COMPARISON).exists() and not config.overwrite:
                    raise FileExistsError(
                        f"{root / COMPARISON} exists. Choose another --output_dir, or pass --overwrite to replace it."
                    )
            for folder in folders:
                stack.enter_context(claimed_folder(str(folder), "output_dir", (benchmarks.RESULTS, benchmarks.SCORES)))
                benchmarks.check_output(folder, config.overwrite)
        if len(models) > 1:  # one that does not fit would be found only after the others are scored
            for one in models:
                one.check_reward_model()
        suites = [benchmarks.SUITES[name] for name in dict.fromkeys(config.suite)]
        found = read_suites(suites, config.data, config.columns or {}, config.first_step, config.strict)
        results = {
            one.reward_model: _benchmark(config, one, found, folder)
            for one, folder in zip(models, folders, strict=True)
        }
        if config.output_dir is not None and len(models) > 1:
            write_or_keep(root, {COMPARISON: format_comparison(results, markdown=True) + "\n"})
    return BenchmarkResults(results, config.output_dir)


def _benchmark(
    config: BenchmarkConfig, model: RewardModelConfig, found: "dict[str, SuiteData]", folder: Path | None
) -> dict[str, dict[str, Any]]:
    """Evaluate one reward model, and write its results to the folder."""
    from ..evaluation.benchmarks import run as benchmarks

    log = None if folder is None else folder / benchmarks.JUDGEMENTS
    scorer = model.load_scorer(log, config.overwrite)
    results, rows = {}, []
    for name, data in found.items():
        of_model = f" with {plain(model.reward_model)}" if len(config.reward_model) > 1 else ""
        say(f"{name}: {len(data.solutions):,} solutions{of_model}")
        for warning in data.warnings():
            say(f"warning: {one_line(warning)}")
        results[name], scored = benchmarks.run_suite(
            benchmarks.SUITES[name], data, scorer, model, config.threshold, config.validation_size, config.seed
        )
        rows += scored
    if folder is not None:
        reward_model = {"model": model.reward_model, **model.describe_scoring()}
        settings = {"threshold": config.threshold, "validation_size": config.validation_size}
        if config.columns:
            settings["columns"] = [f"{name}={column}" for name, column in config.columns.items()]
        settings |= {name: getattr(config, name) for name in ("first_step", "strict") if getattr(config, name)}
        benchmarks.write_results(folder, results, rows, reward_model, settings, config.seed)
    return results
