"""
Both rules of node compression against each other, against no compression and against more data, on the problems of the demo.

```bash
python benchmarks/hnc_rules.py --output_dir outputs/hnc-rules --docs docs/evidence.md
```

One policy searches the training problems twice. Four datasets are made from the trees: without compression, with `--hnc_rule per_parent`, with
`--hnc_rule per_child`, and without compression from both searches (the control, which has as many rows as the datasets with compression). One
reward model per dataset and seed is trained for the same number of steps, and measured on held-out steps, by best-of-N and by step search.
Differences are paired by seed.

If the study is interrupted, the same command resumes it. The results are printed and saved as `results.md` and `results.json`; `--docs` replaces
their section of a page.
"""

import argparse
import os
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from common import save_section, version_words, versions

from trl_hrm.demo.jobs import make_policy, make_world, measure_model
from trl_hrm.demo.over_seeds import interval, signed, spread
from trl_hrm.demo.pipeline import (
    FULL_TREE,
    WHOLE_SOLUTIONS,
    describe_search,
    export_job,
    reward_job,
    search_jobs,
    step_search_job,
)
from trl_hrm.demo.profiles import RewardModel
from trl_hrm.demo.runner import Runner
from trl_hrm.evaluation.results import load_results
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table
from trl_hrm.scripts.best_of_n import BestOfNConfig, best_of_n


HEADING = "## Rules of node compression"
NUM_TRAIN, NUM_TEST, NUM_HELD_OUT = 100, 80, 200
POLICY_STEPS, REWARD_STEPS, MAX_DEPTH = 900, 150, 7
N = 64  # whole solutions for best-of-N
STEP_N = 16  # next steps for step search
HNC = {"hnc": True, "hnc_min_children": 2}  # the demo's trees have 3 children
DATASETS = {  # name: title, searches, options of the export
    "hrm": ("HRM", ["search"], {}),
    "per_parent": ("HRM + HNC, per_parent", ["search"], {**HNC, "hnc_rule": "per_parent"}),
    "per_child": ("HRM + HNC, per_child", ["search"], {**HNC, "hnc_rule": "per_child"}),
    "control": ("HRM, two searches", ["search", "search-again"], {}),
}
PAIRS = (
    ("per_child", "per_parent"),
    ("per_parent", "hrm"),
    ("per_child", "hrm"),
    ("per_parent", "control"),
    ("per_child", "control"),
)
MEASURES = {
    "auroc": "AUROC of first errors",
    "best_of_n": f"best of {N} solutions",
    "step_search": f"step search, N = {STEP_N}",
}


def main(args: argparse.Namespace) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with Runner(folder, args.num_workers) as runner:
        run_stages(runner, folder, args.seed, args.seeds)
    results = collect(folder, args.seeds) | {
        "seed": args.seed,
        "date": str(date.today()),
        "minutes": sum(stage["seconds"] for stage in runner.stages) / 60,
        "num_workers": args.num_workers,
        "versions": versions(),
    }
    write_json(folder / "results.json", results)
    save_section(folder, report(results), args.docs, HEADING)


def run_stages(runner: Runner, folder: Path, seed: int, seeds: list[int]) -> None:
    """Run the stages of the study in order."""

    def at(path: str) -> str:
        return str(folder / path)

    sizes = {"num_train": NUM_TRAIN, "num_test": NUM_TEST, "num_starts": 20, "num_judged": NUM_HELD_OUT}
    runner.run("world", {"world": partial(make_world, at("world"), **sizes, seed=seed)}, lambda: "problems")
    policy = partial(make_policy, at("world"), at("policy"), steps=POLICY_STEPS, seed=seed)
    runner.run("policy", {"policy": policy}, lambda: f"{POLICY_STEPS} steps")
    jobs = search_jobs(folder, "solutions", "test", **WHOLE_SOLUTIONS, num_solutions=N, max_sequences=N)
    for name, search_seed in (("search", 42), ("search-again", 142)):
        jobs |= search_jobs(folder, name, "train", **FULL_TREE, max_depth=MAX_DEPTH, seed=search_seed)
    runner.run("search", jobs, lambda: describe_search(folder / "runs" / "search"))
    jobs = {
        name: export_job(folder, name, *runs, view="hrm", **options) for name, (_, runs, options) in DATASETS.items()
    }
    runner.run("datasets", jobs, lambda: ", ".join(jobs))

    models = [
        RewardModel(name, title, "soft", name, tuple(seeds), REWARD_STEPS, is_merged=True)
        for name, (title, *_) in DATASETS.items()
    ]
    runs = [(model, f"{model.name}-{its_seed}", its_seed) for its_seed in seeds for model in models]
    jobs = {name: reward_job(folder, model, name, its_seed) for model, name, its_seed in runs}
    runner.run("reward-models", jobs, lambda: f"{len(jobs)} reward models, {REWARD_STEPS} steps")
    measured, searched = {}, {}
    for _, name, _ in runs:
        output = at(f"measures/models/{name}.json")
        measured[name] = partial(measure_model, at(f"models/{name}"), at("world"), [[1]], seed, output)
        searched[name] = step_search_job(folder, f"step-search/{name}", name, "test", (STEP_N,))
    ranked = {
        name: partial(
            best_of_n,
            BestOfNConfig(
                candidates=at("runs/solutions"),
                reward_model=at(f"models/{name}"),
                reward_model_batch_size=16,
                extractors=["marker"],
                aggregate=["min"],
                n=[N],
                output_dir=at(f"results/best-of-n/{name}"),
                overwrite=True,
            ),
        )
        for name in measured
    }
    runner.run("measures", measured, lambda: MEASURES["auroc"])
    runner.run("best-of-n", ranked, lambda: MEASURES["best_of_n"])
    runner.run("step-search", searched, lambda: MEASURES["step_search"])


def collect(folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Return the sizes of the datasets, and the three measures of every reward model, one entry per seed."""
    found = {"seeds": seeds, "datasets": {}, "models": {}}
    for name in DATASETS:
        built = read_json(folder / "datasets" / name / "build_report.json")
        moved = built["notes"].get("hnc_moved_nodes", 0)
        found["datasets"][name] = {"rows": built["rows"]["train"], "labels": built["labelled_steps"], "moved": moved}
        models = [f"{name}-{seed}" for seed in seeds]
        results = {
            kind: [load_results(folder / "results" / kind / model) for model in models]
            for kind in ("best-of-n", "step-search")
        }
        found["models"][name] = {
            "auroc": [
                read_json(folder / "measures" / "models" / f"{model}.json")["first_error_auroc"] for model in models
            ],
            "best_of_n": [one.curves["best_of_n/min"][-1]["accuracy"] for one in results["best-of-n"]],
            "step_search": [one.curves["step_search"][-1]["accuracy"] for one in results["step-search"]],
        }
    return found


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""
    seeds, models, sizes = results["seeds"], results["models"], results["datasets"]
    versions = version_words(results["versions"])
    rows = []
    for name, (title, *_) in DATASETS.items():
        size, cells = sizes[name], []
        for values in models[name].values():
            cells.append(f"{100 * spread(values).mean:.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})")
        rows.append([title, f"{size['rows']:,}", f"{size['labels']:,}", f"{size['moved']:,}", *cells])
    compared, settled = [], []
    for a, b in PAIRS:
        name, cells = f"{DATASETS[a][0]} − {DATASETS[b][0]}", []
        for measure, title in MEASURES.items():
            found = spread([x - y for x, y in zip(models[a][measure], models[b][measure], strict=True)])
            cells.append(f"{signed(100 * found.mean)} ({interval(found)})")
            if found.is_settled and not found.low <= 0 <= found.high:
                settled.append(((a, b), f"{name}, {title}: {'above' if found.low > 0 else 'below'} 0"))
        compared.append([name, *cells])
    number = len(PAIRS) * len(MEASURES)
    verdict = f"{len(settled)} of the {number} intervals do not contain 0; about {number / 20:.1f} are expected to miss it by chance."
    if not any(pair == PAIRS[0] for pair, _ in settled):
        verdict += " None of them separates the two rules."
    verdict = "\n".join([verdict, "", *(f"- {words}" for _, words in settled)]).strip()
    parts = [
        HEADING,
        "Both rules of [node compression](search.md#node-compression-hnc), by `benchmarks/hnc_rules.py`, which has the command. It is a "
        f"study of its own with the demo's problems, policy and commands: {NUM_TRAIN} training problems, {NUM_TEST} test problems, "
        f"{len(seeds)} reward models per dataset, {REWARD_STEPS} training steps each. Trees have 3 children per node, and "
        "`--hnc_min_children` is 2, so a node that can lose a child loses one with probability 0.50 (`per_parent`) or 0.875 "
        "(`per_child`, unless it moves itself).",
        f"{results['date']}, {results['minutes']:.0f} minutes in {results['num_workers']} "
        f"process{'es' * (results['num_workers'] != 1)} on a shared machine, {versions}. Seed {results['seed']} of problems and policy, "
        f"seeds {min(seeds)} to {max(seeds)} of the reward models.",
        "Mean over seeds, in percent (lowest to highest):",
        Table(["trained on", "rows", "labels", "moved nodes", *MEASURES.values()], rows).markdown(),
        f"Differences in points, paired by seed, with 95 % t intervals over {len(seeds)} seeds:",
        Table(["", *MEASURES.values()], compared).markdown(),
        verdict,
        "The seeds are seeds of training. There is one policy, one search (two for the control) and one draw of the compression, so the "
        "intervals do not cover the choice of problems or of moved nodes.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument(
        "--output_dir", default="outputs/hnc-rules", help="folder of all results (default: outputs/hnc-rules)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems and the policy (default: 42)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="seeds of the reward models (default: 0 to 5)"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="number of parallel jobs (default: 1)")
    main(parser.parse_args())
