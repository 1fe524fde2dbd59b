"""
Train step reward models from SmolLM2-135M on a mixture of real labelled steps, and judge them on test sets that they have not seen.

```bash
python tests/tools/fetch_real_model.py smollm2 --folder outputs
python benchmarks/real_labels.py --model outputs/smollm2 --data data --output_dir outputs/real-labels --docs docs/evidence.md
```

`--data` is a folder with `prm800k/phase1_test.jsonl`, `prmbench/train_p1_*.jsonl`, `prmbench/subset400.jsonl`, `processbench/gsm8k.json`,
`processbench/olympiadbench.json` and `samples/bbm_*.jsonl` of BIG-Bench Mistake.

The training steps are a mixture with equal numbers of labelled steps of PRM800K (three quarters of its problems), PRMBench's training
classes and ProcessBench's olympiadbench. Problems of the test sets are excluded, which is checked and counted. All systems (ORM, PRM, HRM
with merged steps of 2 and of up to 3) train on equal numbers of tokens, with the same learning rate schedule, for each seed. They are
judged on the other problems of PRM800K, and on rows of ProcessBench gsm8k, PRMBench `subset400` and BIG-Bench Mistake.

Each training is a job in its own process, in the order of `make_jobs`. A job that is finished is not repeated, and an interrupted one
continues from its last checkpoint, so the command can be stopped at any time. The report has what is finished, and says what is missing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from real_model import randomize, save_section, versions
from tqdm import tqdm

from trl_hrm.data.benchmark_rows import ORIGINAL_PROMPT
from trl_hrm.data.problems import exclusion_key, problem_split
from trl_hrm.evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
from trl_hrm.evaluation.benchmarks.prm_bench import PRM_BENCH
from trl_hrm.evaluation.benchmarks.process_bench import PROCESS_BENCH
from trl_hrm.evaluation.benchmarks.suite import Solution, read_suites
from trl_hrm.intervals import T_QUANTILES
from trl_hrm.io import read_json, write_json


HEADING = "## Real labels and a real model"
SYSTEMS = {"orm": "ORM", "prm": "PRM", "hrm": "HRM", "hrm3": "HRM, up to 3 steps merged"}
MAX_MERGE = {"orm": 1, "prm": 1, "hrm": 2, "hrm3": 3}
ADAPTATIONS = {"lora": "LoRA", "full": "full"}
LEARNING_RATES = {"lora": 5e-4, "full": 4e-5}
SEPARATORS = {"newlines": "\n\n", "newline": "\n", "tag": " ки"}  # "ки" is the step tag of Math-Shepherd
SUITES = {"gsm8k": PROCESS_BENCH, "prmbench": PRM_BENCH, "bbm": BIG_BENCH_MISTAKE}
TESTS = {
    "prm800k": "PRM800K, held out",
    "gsm8k": "ProcessBench gsm8k",
    "prmbench": "PRMBench",
    "bbm": "BIG-Bench Mistake",
}
HELD_OUT = 0.25  # share of the problems of PRM800K
ROW = 2048  # tokens
MERGE_SEPARATOR = "\n"


@dataclass(frozen=True)
class Profile:
    """Size of a study. Each training has `rows` steps of one row of 2,048 tokens."""

    rows: int
    seeds: int
    prm800k: int | None  # problems of PRM800K that are tested. None: all that are held out
    gsm8k: int  # rows of ProcessBench gsm8k, and of the other two
    prmbench: int
    bbm: int


PROFILES = {
    "quick": Profile(rows=2, seeds=1, prm800k=2, gsm8k=4, prmbench=4, bbm=2),
    "short": Profile(rows=20, seeds=3, prm800k=13, gsm8k=90, prmbench=40, bbm=24),
    "full": Profile(rows=160, seeds=3, prm800k=None, gsm8k=400, prmbench=400, bbm=200),
}


@dataclass(frozen=True)
class Job:
    """One training: a system with a seed, and what differs from the default training."""

    system: str
    adaptation: str
    seed: int
    separator: str = "newlines"
    weighting: str = "unique"

    @property
    def name(self) -> str:
        parts = [self.system, self.adaptation, str(self.seed)]
        return "-".join(
            parts + [self.separator] * (self.separator != "newlines") + [self.weighting] * (self.weighting != "unique")
        )


def make_jobs(seeds: int) -> list[Job]:
    """Return all trainings, the most important ones first."""
    systems, numbers = ("prm", "hrm", "orm", "hrm3"), range(seeds)
    jobs = [Job(system, "lora", seed) for seed in numbers for system in systems]
    jobs += [Job(system, "full", seed) for seed in numbers for system in ("prm", "hrm")]
    jobs += [Job("prm", "lora", seed, separator=name) for name in list(SEPARATORS)[1:] for seed in numbers]
    jobs += [Job("prm", "lora", seed, weighting="occurrence") for seed in numbers]
    return jobs + [Job(system, "full", seed) for seed in numbers for system in ("orm", "hrm3")]


# Data


def prepare(args: argparse.Namespace, folder: Path, profile: Profile) -> dict[str, Any]:
    """Write the test sets and the mixture of training steps, unless they are there. Return the counts."""
    if (folder / "counts.json").exists():
        return read_json(folder / "counts.json")
    data = Path(args.data)
    trees = prm800k_trees(data / "prm800k" / "phase1_test.jsonl", folder / "prm800k")
    is_held_out = [problem_split(row["prompt"], HELD_OUT, args.seed) == "test" for row in trees]
    trained = [row for row, held_out in zip(trees, is_held_out, strict=True) if not held_out]
    held_out = [row for row, held_out in zip(trees, is_held_out, strict=True) if held_out]
    tests = make_tests(data, trained, held_out, profile, args.seed)
    write_json(folder / "tests.json", tests)
    write_rows(folder / "prm800k.jsonl", trained)
    problems = {row["prompt"] for row in held_out}
    problems |= {row[name] for rows in tests.values() for row in rows for name in ("prompt", "problem")}
    write_rows(folder / "excluded.jsonl", [{"problem": text} for text in sorted(problems)])
    counts = {"mixture": build_mixture(args, folder, data), "tests": {}}
    for name, rows in tests.items():
        labels = [label for row in rows for label in row["labels"] if label is not None]
        problems = {row["problem"] for row in rows}
        counts["tests"][name] = {
            "problems": len(problems),
            "steps": len(labels),
            "wrong": sum(label < 0.5 for label in labels),
        }
    counts["overlap"] = check_overlap(folder / "mixture", tests)
    write_json(folder / "counts.json", counts)
    return counts


def prm800k_trees(file: Path, folder: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    from trl_hrm import BuildPRM800KConfig, build_prm800k

    build_prm800k(BuildPRM800KConfig(inputs=[str(file)], test_size=0, output_dir=str(folder), overwrite=True))
    columns = ("prompt", "completions", "labels", "parents")
    rows = load_dataset(str(folder), split="train", cache_dir=str(folder.with_name("cache"))).to_list()
    return [{name: row[name] for name in columns} for row in rows]


def make_tests(
    data: Path, trained: list[dict[str, Any]], held_out: list[dict[str, Any]], profile: Profile, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """
    Return the trees and solutions of each test set: the problem, the steps, their labels and parents. The rows of PRMBench are drawn from
    those whose problem is not a training problem of PRM800K, which it was made from.
    """
    seen = {exclusion_key(row["prompt"]) for row in trained}
    generator = np.random.default_rng(seed)
    tests = {"prm800k": [row | {"problem": row["prompt"]} for row in held_out[: profile.prm800k]]}
    sources = {
        "gsm8k": ([data / "processbench" / "gsm8k.json"], profile.gsm8k),
        "prmbench": ([data / "prmbench" / "subset400.jsonl"], profile.prmbench),
        "bbm": (sorted((data / "samples").glob("bbm_*.jsonl")), profile.bbm),
    }
    for name, (files, number) in sources.items():
        suites = [SUITES[name]]
        solutions = read_suites(suites, [str(file) for file in files])[suites[0].name].solutions
        if name == "prmbench":
            solutions = [
                one for one in solutions if not {exclusion_key(one.problem), exclusion_key(one.origin)} & seen
            ]
        chosen = generator.permutation(len(solutions))[:number]
        tests[name] = [
            {
                "prompt": solution.problem,
                "problem": solution.origin,
                "completions": solution.steps,
                "labels": solution.labels,
                "parents": list(range(-1, len(solution.steps) - 1)),
                "subset": solution.subset,
            }
            for solution in (solutions[i] for i in sorted(chosen))
        ]
    return tests


def build_mixture(args: argparse.Namespace, folder: Path, data: Path) -> dict[str, Any]:
    """Build the mixture with one call of `build_stepwise`, with equal numbers of labelled steps of three sources."""
    from trl_hrm import BuildStepwiseConfig, build_stepwise

    prmbench = sorted((data / "prmbench").glob("train_p1_*.jsonl"))
    inputs = [folder / "prm800k.jsonl", *prmbench, data / "processbench" / "olympiadbench.json"]
    report = build_stepwise(
        BuildStepwiseConfig(
            inputs=list(map(str, inputs)),
            weights=[1.0, *[1 / len(prmbench)] * len(prmbench), 1.0],
            exclude=[str(folder / "excluded.jsonl")],
            test_size=0,
            seed=args.seed,
            output_dir=str(folder / "mixture"),
            overwrite=True,
        )
    )
    return {
        name: report[name] for name in ("records_in", "records_kept", "dropped", "rows", "labelled_steps", "sources")
    }


def check_overlap(mixture: Path, tests: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    """
    Check that no problem of a test set is in the mixture, as it is or as the original of a modified problem. Return the numbers of
    different problems that were compared.

    Raises:
        `RuntimeError`: If a problem is in both.
    """
    rows = load(mixture)
    trained = {exclusion_key(text) for row in rows for text in (row["prompt"], row.get(ORIGINAL_PROMPT)) if text}
    tested = {
        exclusion_key(row[name]): row[name]
        for rows in tests.values()
        for row in rows
        for name in ("prompt", "problem")
    }
    both = [text for key, text in tested.items() if key in trained]
    if both:
        raise RuntimeError(f"{len(both)} test problems are in the training mixture. The first: {both[0]!r}")
    return {"trained": len(trained), "tested": len(tested), "both": 0}


def load(folder: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return load_dataset(str(folder), split="train", cache_dir=str(folder.with_name("cache"))).to_list()


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Training and scoring of one job


def training_rows(mixture: Path, job: Job) -> Iterator[dict[str, Any]]:
    """Yield the rows that a system is trained on."""
    from trl_hrm import StepTree, hrm_view

    for row in load(mixture):
        tree = StepTree.from_row({name: row[name] for name in ("prompt", "completions", "labels", "parents")})
        if job.system == "orm":
            yield from outcome_rows(tree)
        elif (
            job.weighting == "occurrence"
        ):  # one row per path, so that a step of several paths is trained several times
            yield from (chain.to_row() for chain in tree.chains())
        else:
            yield (tree if job.system == "prm" else hrm_view(tree, MERGE_SEPARATOR, MAX_MERGE[job.system])).to_row()


def outcome_rows(tree) -> Iterator[dict[str, Any]]:
    """Yield one row per path that is known to be right or wrong: wrong if it has a wrong step, right if all steps are right."""
    for leaf in tree.leaves():
        path = tree.path(leaf)
        labels = [tree.labels[step] for step in path]
        is_wrong = any(label is not None and label < 0.5 for label in labels)
        if is_wrong or None not in labels:
            steps = [tree.completions[step] for step in path]
            yield {
                "prompt": tree.prompt,
                "completions": steps,
                "labels": [None] * (len(steps) - 1) + [float(not is_wrong)],
                "parents": list(range(-1, len(steps) - 1)),
            }


def run_job(args: argparse.Namespace, job: Job, folder: Path, profile: Profile) -> None:
    """Train and score one model, and write `scores.json`."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    torch.set_num_threads(1)
    out = folder / "jobs" / job.name
    rows = list(training_rows(folder / "mixture", job))
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lengths = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    rows = [
        row for row, length in zip(rows, lengths, strict=True) if length < ROW // 2
    ]  # the others leave little room for steps
    np.random.default_rng(job.seed).shuffle(rows)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    trainer = HRMRewardTrainer(
        model=args.model,
        args=HRMRewardConfig(
            output_dir=str(out / "training"),
            max_length=ROW,
            max_steps=profile.rows,
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATES[job.adaptation],
            lr_scheduler_type="constant_with_warmup",  # so that the checkpoints of a training are trainings with fewer tokens
            warmup_steps=2,
            step_separator=SEPARATORS[job.separator],
            label_weighting=job.weighting,
            model_init_kwargs={"dtype": "float32"},
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="steps",
            save_steps=max(1, profile.rows // 4),
            save_only_model=True,
            resume_from_checkpoint=False,
            logging_steps=1,
            report_to="none",
            seed=job.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=modules, task_type="TOKEN_CLS")
        if job.adaptation == "lora"
        else None,
    )
    began = time.process_time()
    trainer.train()
    result: dict[str, Any] = {
        "job": asdict(job),
        "rows_with_a_long_prompt": len(lengths) - len(rows),
        "cpu_seconds": time.process_time() - began,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens_per_row": float(np.mean([len(row) for row in trainer.train_dataset["input_ids"]])),
        "labels_per_row": float(np.mean([len(row) for row in trainer.train_dataset["labels"]])),
        "report": str(trainer.reports["train_dataset"]),
        "scores": {},
    }
    checkpoints = sorted((out / "training").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    chosen = (
        [checkpoints[0], checkpoints[-1]] if job.system == "prm" and job.separator == "newlines" else checkpoints[-1:]
    )
    tests = read_json(folder / "tests.json")
    for checkpoint in chosen:
        number = int(checkpoint.name.split("-")[1])
        result["scores"][str(number)] = score_tests(str(checkpoint), tests, MAX_MERGE[job.system])
    shutil.rmtree(out / "training")
    write_json(out / "scores.json", result)


def score_tests(
    model: str, tests: dict[str, list[dict[str, Any]]], max_merge: int
) -> dict[str, list[list[list[float]]]]:
    """
    Return the scores of each step of each row of each test set: of the step alone and, up to `max_merge`, of the merged steps that end
    with it.
    """
    from trl_hrm import StepScorer

    scorer = StepScorer.from_pretrained(model, batch_size=1, dtype="bfloat16")
    found = {}
    for name, rows in tests.items():
        merged = [with_merged_steps(row, max_merge) for row in rows]
        values = scorer.score_trees([tree for tree, _ in merged], progress=True)
        found[name] = [
            [[scores[i] for i in own] for own in owners] for scores, (_, owners) in zip(values, merged, strict=True)
        ]
    return found


def with_merged_steps(row: dict[str, Any], max_merge: int):
    """
    Return the tree of a row with all merged steps of up to `max_merge` steps, and for each step the indices of itself and of the merged
    steps that end with it. One call scores them all, where `spans` of the scorer would return only their maximum.
    """
    from trl_hrm import StepTree

    steps, parents = list(row["completions"]), list(row["parents"])
    tree = StepTree(row["prompt"], steps, [None] * len(steps), parents, [1] * len(steps))
    owners = [[step] for step in range(len(steps))]
    for step in range(len(steps)):
        path = tree.path(step)
        for count in range(2, min(max_merge, len(path)) + 1):
            owners[step].append(len(tree.completions))
            tree.completions.append(MERGE_SEPARATOR.join(steps[i] for i in path[-count:]))
            tree.parents.append(parents[path[-count]])
            tree.num_merged.append(count)
            tree.labels.append(None)
    return tree, owners


def run_untrained(args: argparse.Namespace, folder: Path) -> None:
    """Score the tests with a new head on the pretrained body, and on a body with random weights."""
    from datasets import Dataset

    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    randomize(args.model, folder / "random-body", args.seed)
    row = {"prompt": "1 + 1?", "completions": ["2"], "labels": [True]}
    for name, body in (("untrained", args.model), ("random", str(folder / "random-body"))):
        out = folder / "jobs" / name
        if (out / "scores.json").exists():
            continue
        options = {"bf16": False, "use_cpu": True, "report_to": "none", "seed": args.seed}
        trainer = HRMRewardTrainer(
            body, HRMRewardConfig(output_dir=str(out / "model"), **options), train_dataset=Dataset.from_list([row])
        )
        trainer.save_model()
        scores = score_tests(str(out / "model"), read_json(folder / "tests.json"), 1)
        shutil.rmtree(out / "model")
        write_json(out / "scores.json", {"scores": {"0": scores}})
    shutil.rmtree(folder / "random-body", ignore_errors=True)


# Measures


def step_scores(scores: list[list[list[float]]], spans: int) -> list[list[float]]:
    """Return one score per step: the maximum over merged steps of up to `spans` steps."""
    return [[max(values[:spans]) for values in row] for row in scores]


def flat(tests: list[dict[str, Any]], kept) -> tuple[list[tuple[int, int]], np.ndarray, np.ndarray]:
    """Return the (row, step) pairs of labelled steps that are kept, their labels, and the number of the problem of each."""
    numbers = {problem: i for i, problem in enumerate(dict.fromkeys(row["problem"] for row in tests))}
    pairs = [
        (i, step)
        for i, row in enumerate(tests)
        for step, label in enumerate(row["labels"])
        if label is not None and kept(row, step)
    ]
    labels = np.array([tests[i]["labels"][step] for i, step in pairs])
    return pairs, labels, np.array([numbers[tests[i]["problem"]] for i, _ in pairs])


def every_step(row: dict[str, Any], step: int) -> bool:
    return True


def after_an_error(row: dict[str, Any], step: int) -> bool:
    """Return whether the step before this one is wrong. A right step after it is a correction."""
    parent = row["parents"][step]
    return parent >= 0 and row["labels"][parent] is not None and row["labels"][parent] < 0.5


def first_error_f1(tests: list[dict[str, Any]], scores: list[list[float]], threshold: float, suite) -> float:
    """Return the main metric of a suite: F1 of ProcessBench, PRM-Score of PRMBench. BIG-Bench Mistake is measured like ProcessBench."""
    sums: Counter = Counter()
    for row, values in zip(tests, scores, strict=True):
        solution = Solution("", row["subset"], "", row["prompt"], row["completions"], row["labels"], row["problem"])
        sums.update(dict(enumerate(suite.tally(solution, values, threshold))))
    totals = np.array([sums[i] for i in range(4)], dtype=float)
    return float(
        suite.summarize({"all": totals} if suite is PROCESS_BENCH else {"circular": totals})["averages"][suite.main][
            suite.metric
        ]
    )


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean over seeds. Infinite for one seed."""
    half = T_QUANTILES[len(values) - 1] * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(np.mean(values) - half), float(np.mean(values) + half)


# Driver


def main(args: argparse.Namespace) -> None:
    folder, profile = Path(args.output_dir), PROFILES[args.profile]
    folder.mkdir(parents=True, exist_ok=True)
    if args.job:
        [job] = [job for job in make_jobs(profile.seeds) if job.name == args.job] or [None]
        run_untrained(args, folder) if job is None else run_job(args, job, folder, profile)
        return
    settings = {"profile": asdict(profile), "seed": args.seed}
    if (folder / "settings.json").exists():
        found = read_json(folder / "settings.json")
        if {name: found[name] for name in settings} != settings:
            raise ValueError(f"{folder} has the results of other settings: {found}. Choose another --output_dir.")
    else:
        write_json(folder / "settings.json", settings | {"versions": versions(), "date": str(date.today())})
    prepare(args, folder, profile)
    jobs = make_jobs(profile.seeds)
    if not args.only_report:
        names = ["untrained", *(job.name for job in jobs)]
        names = [name for name in names if not (folder / "jobs" / name / "scores.json").exists()]
        with ThreadPoolExecutor(args.processes) as pool, tqdm(total=len(names), desc="jobs", unit="job") as bar:
            for _ in pool.map(lambda name: start(name, folder), names):
                bar.update()
    finished = {
        job: read_json(folder / "jobs" / job.name / "scores.json") for job in jobs if is_finished(folder, job.name)
    }
    save_section(folder, report(args, folder, finished, len(jobs)), args.docs, HEADING)


def is_finished(folder: Path, name: str) -> bool:
    return (folder / "jobs" / name / "scores.json").exists()


def start(name: str, folder: Path) -> None:
    """Run a job in its own process, with its output in a log."""
    (folder / "jobs" / name).mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    with open(folder / "jobs" / name / "log.txt", "w") as log:
        command = [sys.executable, __file__, *sys.argv[1:], "--job", name]
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def report(args, folder, finished, number) -> str:
    return HEADING + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder of the language model to train from")
    parser.add_argument("--data", required=True, help="folder with the files of labelled steps")
    parser.add_argument("--output_dir", required=True, help="folder of all results")
    parser.add_argument("--profile", choices=PROFILES, default="full", help="size of the study (default: full)")
    parser.add_argument("--processes", type=int, default=2, help="jobs at the same time, one thread each (default: 2)")
    parser.add_argument(
        "--seed", type=int, default=42, help="seed of the split, the test rows and the intervals (default: 42)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument("--only_report", action="store_true", help="write the report of the jobs that are finished")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    main(parser.parse_args())
