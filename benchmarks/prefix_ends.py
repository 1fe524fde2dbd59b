"""
Fine-tuning on prefixes of solutions, with and without the end of sequence after them, on the problems of the demo.

```bash
python benchmarks/hnc_rules.py --output_dir outputs/hnc-rules
python benchmarks/prefix_ends.py --study outputs/hnc-rules --output_dir outputs/prefix-ends --docs docs/evidence.md
```

Uses the policy and the search of `benchmarks/hnc_rules.py`. The policy is fine-tuned without a KL term on three datasets of the same search: whole
correct solutions, prefixes as `trl-hrm export --prefixes` writes them, and the same prefixes without the column `is_complete`, so that an end of
sequence follows each of them. Every policy then samples solutions of the test problems.

If the study is interrupted, the same command resumes it. The results are printed and saved as `results.md` and `results.json`; `--docs` replaces
their section of a page.
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from common import save_section, version_words, versions
from datasets import load_dataset
from hnc_rules import HNC, N

from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.demo.jobs import train
from trl_hrm.demo.measures import measure_policy
from trl_hrm.demo.pipeline import KL_SELF, WHOLE_SOLUTIONS, search_jobs
from trl_hrm.demo.runner import Runner
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table
from trl_hrm.search.run_folder import read_summary


HEADING = "## The end of a prefix"
STEPS, NUM_SAMPLES = 60, 8
MEASURES = {"correct": "correct", "without_answer": "end without an answer"}
DATASETS = {"solutions": "whole solutions", "prefixes": "prefixes", "ended": "prefixes without `is_complete`"}


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, study = Path(args.output_dir), Path(args.study)
    (folder / "world").mkdir(parents=True, exist_ok=True)
    shutil.copy(study / "world" / "test.jsonl", folder / "world" / "test.jsonl")
    with Runner(folder, args.num_workers) as runner:
        run_stages(runner, folder, study, args.seeds)
    results = collect(folder, study, args.seeds)
    results |= {"date": str(date.today()), "versions": versions(), "seeds": args.seeds}
    write_json(folder / "results.json", results)
    save_section(folder, report(results), args.docs, HEADING)


def run_stages(runner: Runner, folder: Path, study: Path, seeds: Sequence[int]) -> None:
    """Run the stages of the study in order."""
    shared = {"inputs": [str(study / "runs" / "search")], "view": "sft", "min_mc_score": 0.95, **HNC}
    shared |= {"hnc_rule": "per_child", "test_size": 0.1, "num_proc": 1, "overwrite": True}
    jobs = {
        name: partial(export, ExportConfig(output_dir=str(folder / "datasets" / name), prefixes=prefixes, **shared))
        for name, prefixes in (("solutions", False), ("prefixes", True))
    }
    runner.run("datasets", jobs, lambda: ", ".join(jobs))
    job = partial(without_column, str(folder / "datasets" / "prefixes"), output=str(folder / "datasets" / "ended"))
    runner.run("ended", {"ended": job}, lambda: "the same rows without `is_complete`")
    trained, sampled = {}, {}
    for name in DATASETS:
        for seed in seeds:
            model = f"models/{name}-{seed}"
            settings = {
                "model_name_or_path": str(study / "policy"),
                "dataset_name": str(folder / "datasets" / name),
                "output_dir": str(folder / model),
                "max_steps": STEPS,
                "kl_coef": 0.0,
                "seed": seed,
            }
            trained[f"{name}-{seed}"] = partial(train, "kl_self", {**KL_SELF, **settings})
            options = WHOLE_SOLUTIONS | {"num_solutions": NUM_SAMPLES, "max_sequences": NUM_SAMPLES}
            sampled |= search_jobs(folder, f"{name}-{seed}", "test", policy=model, shards=1, **options)
    runner.run("policies", trained, lambda: f"{len(trained)} policies, {STEPS} steps")
    runner.run("solutions", sampled, lambda: f"{NUM_SAMPLES} solutions per problem and policy")


def without_column(dataset: str, output: str) -> None:
    """Copy a dataset without the column `is_complete`."""
    Path(output).mkdir(parents=True, exist_ok=True)
    for split, rows in load_dataset(dataset).items():
        rows.remove_columns("is_complete").to_parquet(str(Path(output, f"{split}.parquet")))


def collect(folder: Path, study: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return the rows of each dataset, and the outcomes of each policy's solutions, one entry per seed."""
    reports = {name: read_json(folder / "datasets" / name / "build_report.json") for name in ("solutions", "prefixes")}
    reports["ended"] = reports["prefixes"]
    found = {"before": outcomes(study / "runs" / "solutions"), "datasets": {}, "policies": {}}
    for name, built in reports.items():
        rows = sum(built["rows"].values())
        found["datasets"][name] = {"rows": rows, "complete": built["notes"].get("complete_solutions", rows)}
        found["policies"][name] = [outcomes(folder / "runs" / f"{name}-{seed}") for seed in seeds]
    return found


def outcomes(run: Path) -> dict[str, float]:
    """Return the shares of the solutions of a run that are correct, and that end without an answer."""
    solutions = read_summary(run)["solutions"]
    total = sum(solutions.values())
    measured = measure_policy(run)
    return {"correct": measured["accuracy"], "without_answer": solutions.get("without_answer", 0) / total}


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""

    def shares(found: list[dict[str, float]], name: str) -> str:
        values = [100 * one[name] for one in found]
        mean = f"{sum(values) / len(values):.1f}"
        return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"

    rows = [
        [f"nothing ({N} solutions per problem)", "", "", *(shares([results["before"]], name) for name in MEASURES)]
    ]
    for name, title in DATASETS.items():
        size, found = results["datasets"][name], results["policies"][name]
        cells = (shares(found, measure) for measure in MEASURES)
        rows.append([title, f"{size['rows']:,}", f"{size['complete']:,}", *cells])
    versions = version_words(results["versions"])
    parts = [
        HEADING,
        "Fine-tuning of the demo's policy on [prefixes of solutions](dataset_formats.md#prefixes-of-solutions), by "
        f"`benchmarks/prefix_ends.py`, which has the command. All rows have an MC score of at least 0.95. {STEPS} steps without a KL "
        f"term, seeds {', '.join(map(str, results['seeds']))} of training, {NUM_SAMPLES} solutions per test problem and policy.",
        f"{results['date']}, {versions}.",
        "Solutions of the test problems in percent, mean over seeds (lowest to highest):",
        Table(["trained on", "rows", "whole solutions", *MEASURES.values()], rows).markdown(),
        "Without `is_complete`, the policy learns to stop in the middle of a solution. A whole solution is a row only if each of its "
        "steps has the score, a prefix if its last step has it. Prefixes therefore include errors that a later step corrects, and the "
        "policy learns to write them. A tenth of the problems is held out of training.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--study", default="outputs/hnc-rules", help="folder of hnc_rules.py (default: outputs/hnc-rules)"
    )
    parser.add_argument(
        "--output_dir", default="outputs/prefix-ends", help="folder of all results (default: outputs/prefix-ends)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training (default: 0 to 2)")
    parser.add_argument("--num_workers", type=int, default=1, help="number of parallel jobs (default: 1)")
    main(parser.parse_args())
