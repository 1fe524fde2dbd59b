"""
Measure how well a step reward model finds wrong steps, on benchmarks of judging.

```bash
trl-hrm benchmark --reward_model outputs/tiny-hrm --suite prmbench --data subset400.jsonl --output_dir runs/prmbench
trl-hrm benchmark --reward_model outputs/tiny-hrm --suite processbench --data gsm8k.json math.json olympiadbench.json omnimath.json
```
"""

import argparse
from datetime import UTC

from .build_options import add_columns_argument, add_strict_argument
from .score_options import add_score_arguments, describe_scoring, load_scorer


SUITES = ("processbench", "prmbench", "bigbenchmistake")
RESULTS = "results.json"
SCORES = "scores.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reward_model", required=True, help="folder or Hub id of the reward model (required)")
    parser.add_argument("--suite", required=True, nargs="+", choices=SUITES, help="benchmarks to run (required)")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="JSON or JSON Lines files, or folders or Hub names of datasets, of whose splits all are read; the columns tell "
        "which benchmark each belongs to (required)",
    )
    add_columns_argument(parser)
    parser.add_argument(
        "--first_step",
        type=int,
        choices=[0, 1],
        default=0,
        help="number of the first step in the labels of first-error benchmarks; with 1, the label 0 is no error. Rows of "
        "MR-GSM8K are known to count from 1",
    )
    add_strict_argument(parser)
    parser.add_argument("--threshold", type=float, default=0.5, help="a step is judged wrong if it scores below this")
    parser.add_argument(
        "--validation_size",
        type=float,
        default=0.2,
        help="share of problems on which the best threshold is looked for; what it gives on the others is reported "
        "beside the results; 0 for none",
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of that split and of the intervals")
    add_score_arguments(parser.add_argument_group("scores"))
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        help=f"folder for {RESULTS} and {SCORES}, the scores of all steps (default: print a table only)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace the results in the output folder")


def run(args: argparse.Namespace) -> None:
    import time
    from datetime import datetime

    from ..data.sources import parse_columns
    from ..evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
    from ..evaluation.benchmarks.judging import score_solutions
    from ..evaluation.benchmarks.measuring import INTERVALS, check_options, format_results, measure
    from ..evaluation.benchmarks.prm_bench import PRM_BENCH
    from ..evaluation.benchmarks.process_bench import PROCESS_BENCH
    from ..evaluation.benchmarks.reading import read_suites

    check_options(args.threshold, args.validation_size)
    _check_output(args)
    known = {suite.name: suite for suite in (PROCESS_BENCH, PRM_BENCH, BIG_BENCH_MISTAKE)}
    suites = [known[name] for name in dict.fromkeys(args.suite)]
    readings = read_suites(suites, args.data, parse_columns(args.columns), args.first_step, args.strict)
    scorer = load_scorer(args.reward_model, args)
    results, rows = {}, []
    for suite in suites:
        reading, began = readings[suite.name], time.perf_counter()
        print(f"{suite.name}: {len(reading.solutions):,} solutions")
        for warning in reading.warnings():
            print(f"warning: {warning}")
        scores = score_solutions(scorer, reading.solutions, args.spans, args.combine, progress=True)
        seconds = time.perf_counter() - began
        found = measure(suite, reading.solutions, scores, args.threshold, args.validation_size, args.seed)
        found["counts"] |= reading.counts()
        rows_with_faults = {"left_out": reading.faults.left_out, "kept": reading.faults.kept}
        results[suite.name] = {"sources": reading.sources, **found, "faults": rows_with_faults, "seconds": seconds}
        rows += _score_rows(suite.name, reading.solutions, scores)
        print(f"\n{format_results(suite.name, found)}\n")
    if args.output_dir is not None:
        report = {
            "kind": "benchmark",
            "reward_model": {"model": args.reward_model, **describe_scoring(args)},
            "settings": _settings(args),
            "suites": results,
            "intervals": INTERVALS,
            "seed": args.seed,
            "versions": _versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        _write(args.output_dir, report, rows)
        print(f"Results: {args.output_dir}/{RESULTS}; scores of all steps: {args.output_dir}/{SCORES}")


def _check_output(args: argparse.Namespace) -> None:
    from pathlib import Path

    if args.output_dir is None:
        if args.overwrite:
            raise ValueError("--overwrite goes with --output_dir, which is not given. Leave it out.")
        return
    path = Path(args.output_dir, RESULTS)
    if path.exists() and not args.overwrite:
        raise FileExistsError(f"{path} exists. Choose another --output_dir, or pass --overwrite to replace it.")


def _score_rows(suite: str, solutions: list, scores: list) -> list[dict]:
    """One row per solution: `scores` is null where it was too long, and in `labels` null stands for a step without one."""
    return [
        {
            "suite": suite,
            "subset": solution.subset,
            "id": solution.id,
            "where": solution.where,
            "labels": solution.labels,
            "scores": values,
        }
        for solution, values in zip(solutions, scores, strict=True)
    ]


def _settings(args: argparse.Namespace) -> dict:
    settings = {
        name: getattr(args, name) for name in ("threshold", "validation_size", "columns", "first_step", "strict")
    }
    return {name: value for name, value in settings.items() if name in ("threshold", "validation_size") or value}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from .. import __version__

    return {"trl_hrm": __version__} | {name: version(name) for name in ("numpy", "torch", "transformers")}


def _write(output_dir: str, report: dict, rows: list[dict]) -> None:
    import json
    import os
    from pathlib import Path

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        SCORES: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        RESULTS: json.dumps(report, indent=2, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, folder / name)
