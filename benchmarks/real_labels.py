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

Each training is a job in its own process, in the order of `make_jobs`. A job that is finished is not repeated and an interrupted one
starts over, so the command can be stopped at any time. The report has what is finished, and says what is missing.
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
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from real_model import auroc_draws, randomize, save_section, versions
from tqdm import tqdm

from trl_hrm.data.benchmark_rows import ORIGINAL_PROMPT
from trl_hrm.data.problems import exclusion_key, problem_split
from trl_hrm.evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
from trl_hrm.evaluation.benchmarks.prm_bench import PRM_BENCH
from trl_hrm.evaluation.benchmarks.process_bench import PROCESS_BENCH
from trl_hrm.evaluation.benchmarks.suite import Solution, read_suites
from trl_hrm.intervals import T_QUANTILES, percentile_interval
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import MARKERS, THEMES, new_figure, style_axes
from trl_hrm.step_tree import StepTree


HEADING = "## Real labels and a real model"
PICTURE = "images/evidence/real-labels.png"
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
QUARTER, TRIPLE = 0.25, 3.0  # shares of the tokens, to see how results move with data
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
    "short": Profile(rows=80, seeds=3, prm800k=16, gsm8k=120, prmbench=60, bbm=40),
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
    times: float = 1.0  # of the tokens of the other trainings

    @property
    def kind(self) -> tuple[str, str, str, str, float]:
        """All that is equal for the seeds of a training."""
        return self.system, self.adaptation, self.separator, self.weighting, self.times

    @property
    def name(self) -> str:
        parts = [self.system, self.adaptation, str(self.seed)]
        return "-".join(
            parts
            + [self.separator] * (self.separator != "newlines")
            + [self.weighting] * (self.weighting != "unique")
            + [f"x{self.times:g}"] * (self.times != 1)
        )


def make_jobs(seeds: int) -> list[Job]:
    """Return all trainings, the most important ones first."""
    numbers = range(seeds)
    jobs = [Job(system, "full", seed) for seed in numbers for system in ("prm", "hrm")]
    jobs += [Job("prm", "full", seed, times=QUARTER) for seed in numbers]
    jobs += [Job("prm", "full", 0, times=TRIPLE)]
    jobs += [Job("orm", "full", seed) for seed in numbers]
    jobs += [Job(system, "lora", seed) for seed in numbers for system in ("prm", "hrm")]
    jobs += [Job("hrm3", "full", seed) for seed in numbers]
    jobs += [Job("prm", "full", seed, separator=name) for name in list(SEPARATORS)[1:] for seed in numbers]
    jobs += [Job("prm", "full", seed, weighting="occurrence") for seed in numbers]
    return jobs + [Job(system, "lora", seed) for seed in numbers for system in ("orm", "hrm3")]


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
        labels = flat(rows, every_step)[1]
        problems = {row["problem"] for row in rows}
        counts["tests"][name] = {
            "problems": len(problems),
            "steps": len(labels),
            "wrong": int((labels < 0.5).sum()),
        }
    counts["different_steps"] = different_steps(folder / "mixture")
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
    fixes = human_steps(data / "prm800k" / "phase1_test.jsonl")
    tests = {"prm800k": [with_corrections(row, fixes) for row in held_out[: profile.prm800k]]}
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


def human_steps(file: Path) -> set[tuple[str, str]]:
    """Return the pairs of a problem and a step that an annotator of PRM800K wrote, because all steps of the model were wrong."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {
        (record["question"]["problem"].strip(), step["human_completion"]["text"].strip())
        for record in records
        for step in record["label"]["steps"] or []
        if step["human_completion"] and step["chosen_completion"] is None
    }


def with_corrections(row: dict[str, Any], fixes: set[tuple[str, str]]) -> dict[str, Any]:
    """
    Return the tree of a problem with added steps after wrong ones, since no solution of PRM800K continues after a wrong step. Where an
    annotator wrote a right step to replace the wrong ones, it is added after the first two of them (label 1). For comparison, the second
    is added after the first (label 0). `is_added` marks the added steps.
    """
    row = {name: list(value) if isinstance(value, list) else value for name, value in row.items()}
    labels, parents, texts = list(row["labels"]), list(row["parents"]), list(row["completions"])
    for step, text in enumerate(texts):
        if (row["prompt"], text) not in fixes or not labels[step]:
            continue
        wrong = [
            i
            for i, parent in enumerate(parents)
            if parent == parents[step] and labels[i] is not None and labels[i] < 0.5
        ]
        wrong = wrong[:2]  # more would only add cost
        added = [(i, text, 1.0) for i in wrong] + [(i, texts[j], 0.0) for i, j in zip(wrong, wrong[1:], strict=False)]
        for parent, new, label in added:
            row["parents"].append(parent)
            row["completions"].append(new)
            row["labels"].append(label)
    number = len(row["labels"]) - len(labels)
    return row | {"problem": row["prompt"], "is_added": [False] * len(labels) + [True] * number}


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


def source_name(file: str) -> str:
    name = Path(file).name
    return "PRM800K" if "prm800k" in name else "PRMBench" if "train_p1" in name else "ProcessBench olympiadbench"


def different_steps(mixture: Path) -> dict[str, int]:
    """Return the number of different labelled steps by the source that they came from first, as a trainer joins equal steps."""
    seen, found = set(), Counter()
    for row in load(mixture):
        tree = StepTree.from_row({name: row[name] for name in ("prompt", "completions", "labels", "parents")})
        name = source_name(row["source"])
        for step, label in enumerate(tree.labels):
            key = (tree.prompt, *(tree.completions[i] for i in tree.path(step)))
            if label is not None and key not in seen:
                seen.add(key)
                found[name] += 1
    return dict(found)


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
    from trl_hrm import hrm_view

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
            max_steps=max(1, round(job.times * profile.rows)),
            per_device_train_batch_size=1,
            learning_rate=LEARNING_RATES[job.adaptation],
            lr_scheduler_type="cosine",
            warmup_steps=3,
            step_separator=SEPARATORS[job.separator],
            label_weighting=job.weighting,
            model_init_kwargs={"dtype": "float32"},
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
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
    trainer.save_model()
    result: dict[str, Any] = {
        "job": asdict(job),
        "rows_with_a_long_prompt": len(lengths) - len(rows),
        "cpu_seconds": time.process_time() - began,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "tokens_per_row": float(np.mean([len(row) for row in trainer.train_dataset["input_ids"]])),
        "labels_per_row": float(np.mean([len(row) for row in trainer.train_dataset["labels"]])),
        "report": str(trainer.reports["train_dataset"]),
    }
    result["scores"] = score_tests(str(out / "training"), read_json(folder / "tests.json"), MAX_MERGE[job.system])
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


def run_baseline(args: argparse.Namespace, name: str, folder: Path) -> None:
    """Score the tests with a new head on the pretrained body (`"untrained"`), or on a body with random weights (`"random"`)."""
    from datasets import Dataset

    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    out, body = folder / "jobs" / name, args.model
    if name == "random":
        body = str(out / "body")
        randomize(args.model, out / "body", args.seed)
    row = {"prompt": "1 + 1?", "completions": ["2"], "labels": [True]}
    trainer = HRMRewardTrainer(
        body,
        HRMRewardConfig(output_dir=str(out / "model"), bf16=False, use_cpu=True, report_to="none", seed=args.seed),
        train_dataset=Dataset.from_list([row]),
    )
    trainer.save_model()
    scores = score_tests(str(out / "model"), read_json(folder / "tests.json"), 1)
    for used in ("model", "body"):
        shutil.rmtree(out / used, ignore_errors=True)
    write_json(out / "scores.json", {"scores": scores})


# Measures


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
    return not is_added(row, step)


def is_added(row: dict[str, Any], step: int) -> bool:
    return "is_added" in row and row["is_added"][step]


def after_an_error(row: dict[str, Any], step: int) -> bool:
    """Return whether the step before this one is wrong. A right step after it is a correction."""
    parent = row["parents"][step]
    if "is_added" in row:
        return is_added(row, step)
    return parent >= 0 and row["labels"][parent] is not None and row["labels"][parent] < 0.5


def first_error_f1(tests: list[dict[str, Any]], scores: list[list[float]], threshold: float, suite) -> float:
    """Return the main metric of a suite: F1 of ProcessBench, PRM-Score of PRMBench. BIG-Bench Mistake is measured like ProcessBench."""
    sums: dict[str, np.ndarray] = {}
    for row, values in zip(tests, scores, strict=True):
        solution = Solution("", row["subset"], "", row["prompt"], row["completions"], row["labels"], row["problem"])
        found = np.array(suite.tally(solution, values, threshold), dtype=float)
        name = row["subset"] if suite is PRM_BENCH else "all"  # a row of PRMBench counts by its class
        sums[name] = sums.get(name, 0) + found
    return float(suite.summarize(sums)["averages"][suite.main][suite.metric])


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % t interval of the mean over seeds. Infinite for one seed."""
    half = T_QUANTILES[len(values) - 1] * np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.inf
    return float(np.mean(values) - half), float(np.mean(values) + half)


# Report


@dataclass(frozen=True)
class Arm:
    """A kind of training and how its model scores steps, over all seeds."""

    title: str
    system: str
    adaptation: str = "full"
    spans: int = 1  # the score of a step is the maximum over merged steps of up to this many steps
    separator: str = "newlines"
    weighting: str = "unique"
    times: float = 1.0  # of the tokens of the other trainings

    @property
    def kind(self) -> tuple[str, str, str, str, float]:
        """See [`Job.kind`]."""
        return self.system, self.adaptation, self.separator, self.weighting, self.times

    def scores(self, finished: dict[Job, dict[str, Any]]) -> dict[int, dict[str, list[list[float]]]]:
        """Return the step scores of each test set, by seed."""
        found = {}
        for job, result in finished.items():
            if job.kind == self.kind:
                found[job.seed] = {
                    test: [[max(values[: self.spans]) for values in row] for row in rows]
                    for test, rows in result["scores"].items()
                }
        return found


MAIN = [
    Arm("ORM", "orm"),
    Arm("PRM", "prm"),
    Arm("HRM, single steps", "hrm"),
    Arm("HRM, spans 1 and 2", "hrm", spans=2),
    Arm("HRM 3, single steps", "hrm3"),
    Arm("HRM 3, spans 1 to 3", "hrm3", spans=3),
]
ARMS = MAIN + [replace(arm, title=f"{arm.title}, LoRA", adaptation="lora") for arm in MAIN]
ARMS += [
    Arm("PRM, a quarter of the tokens", "prm", times=QUARTER),
    Arm("PRM, 3 times the tokens", "prm", times=TRIPLE),
    Arm(r"PRM, separator `\n`", "prm", separator="newline"),
    Arm("PRM, separator ` ки`", "prm", separator="tag"),
    Arm("PRM, weighting `occurrence`", "prm", weighting="occurrence"),
]


def arm_of(job: Job) -> Arm:
    """Return the arm of a training that scores single steps."""
    return next(arm for arm in ARMS if arm.spans == 1 and arm.kind == job.kind)


# pairs of arms: the first minus the second
DIFFERENCES = [
    ("PRM", "ORM"),
    ("HRM, single steps", "PRM"),
    ("HRM, spans 1 and 2", "PRM"),
    ("HRM, spans 1 and 2", "HRM, single steps"),
    ("HRM 3, spans 1 to 3", "HRM, spans 1 and 2"),
    ("PRM", "PRM, LoRA"),
    ("HRM, single steps, LoRA", "PRM, LoRA"),
    ("HRM, spans 1 and 2, LoRA", "PRM, LoRA"),
    ("PRM", "PRM, a quarter of the tokens"),
    ("PRM, 3 times the tokens", "PRM"),
    (r"PRM, separator `\n`", "PRM"),
    ("PRM, separator ` ки`", "PRM"),
    ("PRM, weighting `occurrence`", "PRM"),
]
BASELINES = {"untrained": "before training (pretrained body, new head)", "random": "random weights"}


class Aurocs:
    """AUROC of every arm and seed on the kept steps of a test set, with draws for intervals over problems."""

    def __init__(self, tests, scores: dict[str, dict[int, list[list[float]]]], kept, seed: int):
        pairs, labels, problems = flat(tests, kept)
        columns = {
            (title, number): np.array([rows[i][step] for i, step in pairs])
            for title, by_seed in scores.items()
            for number, rows in by_seed.items()
        }
        self.labels, self.columns = labels, columns
        is_defined = 0 < (labels >= 0.5).sum() < len(labels)  # there are right and wrong steps
        self.values, self.draws = auroc_draws(columns, labels, problems, seed) if is_defined else ({}, {})

    def mean(self, title: str) -> str:
        """Return the mean over seeds, their standard deviation, and the interval over problems."""
        seeds = [key for key in self.values if key[0] == title]
        if not seeds:
            return "–"
        values = [self.values[key] for key in seeds]
        low, high = percentile_interval(np.mean(values), np.mean([self.draws[key] for key in seeds], axis=0))
        spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{spread} [{low:.2f}, {high:.2f}]"

    def difference(self, first: str, second: str) -> tuple[str, bool] | None:
        """
        Return the difference of two arms over their common seeds, and whether both its intervals, over problems and over seeds, exclude 0
        on the same side. `None` without a common seed.
        """
        seeds = [number for title, number in self.values if title == first and (second, number) in self.values]
        if not seeds:
            return None
        values = [self.values[first, number] - self.values[second, number] for number in seeds]
        draws = np.mean([self.draws[first, number] - self.draws[second, number] for number in seeds], axis=0)
        problems, over_seeds = percentile_interval(np.mean(values), draws), t_interval(values)
        is_settled = min(problems[0], over_seeds[0]) > 0 or max(problems[1], over_seeds[1]) < 0
        text = f"{np.mean(values):+.3f} [{problems[0]:+.2f}, {problems[1]:+.2f}]"
        if len(values) > 1:
            text += f" ({over_seeds[0]:+.2f}, {over_seeds[1]:+.2f})"
        return minus(text) + (" *" if is_settled else ""), is_settled


def minus(text: str) -> str:
    return text.replace("-", "−")


def best_f1(tests, scores: list[list[float]], suite) -> float:
    """Return the best value over all thresholds on the same rows, an upper bound."""
    thresholds = np.unique([score for row in scores for score in row])
    middle = np.concatenate([[0.0], (thresholds[1:] + thresholds[:-1]) / 2, [1.0]])
    return max(first_error_f1(tests, scores, threshold, suite) for threshold in middle[:: max(1, len(middle) // 200)])


def report(args: argparse.Namespace, folder: Path, finished: dict[Job, dict[str, Any]], number: int) -> str:
    """Return the section of `docs/evidence.md`, and draw its picture."""
    tests, counts, settings = (read_json(folder / f"{name}.json") for name in ("tests", "counts", "settings"))
    scores: dict[str, dict[str, dict[int, list[list[float]]]]] = {test: {} for test in TESTS}
    arms = {arm.title: arm.scores(finished) for arm in ARMS}
    for name, title in BASELINES.items():
        if not is_finished(folder, name):
            continue
        found = read_json(folder / "jobs" / name / "scores.json")["scores"]
        arms[title] = {
            args.seed: {test: [[values[0] for values in row] for row in rows] for test, rows in found.items()}
        }
    arms = {title: by_seed for title, by_seed in arms.items() if by_seed}
    for test in TESTS:
        scores[test] = {
            title: {seed: found[test] for seed, found in by_seed.items()} for title, by_seed in arms.items()
        }
    aurocs = {test: Aurocs(tests[test], scores[test], every_step, args.seed) for test in TESTS}
    parts = [HEADING, *introduction(settings, counts, finished, number)]
    parts += [
        "AUROC of the scores of all labelled steps: mean over seeds ± their standard deviation, and the 95 % interval over problems in "
        "brackets. A model that cannot tell right from wrong steps has 0.5. A head with random weights can be off 0.5 in both directions.",
        Table(
            ["", "seeds", *TESTS.values()],
            [[title, str(len(arms[title])), *(aurocs[test].mean(title) for test in TESTS)] for title in arms],
        ).markdown(),
    ]
    rows, settled, total = [], 0, 0
    for first, second in DIFFERENCES:
        cells = [aurocs[test].difference(first, second) for test in TESTS]
        if any(cells):
            rows.append([f"{first} − {second}", *(cell[0] if cell else "–" for cell in cells)])
            total += sum(cell is not None for cell in cells)
            settled += sum(cell is not None and cell[1] for cell in cells)
    parts += [
        "Differences, paired by seed and problem, with the interval over problems in brackets and the t interval over seeds in parentheses. "
        "A star marks differences that both intervals separate from 0:",
        Table(["", *TESTS.values()], rows).markdown(),
        f"{settled} of {total} differences are settled in this sense. The others are not: more seeds or more rows would be needed.",
        *outcome_tables(tests, scores, arms, args.seed),
    ]
    draw(aurocs, arms, Path(args.docs).parent / PICTURE if args.docs else folder / "real-labels.png")
    parts.append(f"![AUROC of each system on each test set, with intervals over problems]({PICTURE})")
    return "\n\n".join([*parts, READING.strip()]) + "\n"


def outcome_tables(tests, scores, arms, seed: int) -> list[str]:
    """Return the tables of F1 and of corrections."""
    rows = []
    majority = {test: [[1.0] * len(row["labels"]) for row in tests[test]] for test in SUITES}
    for title in arms:
        cells = []
        for test, suite in SUITES.items():
            found = [first_error_f1(tests[test], one, 0.5, suite) for one in scores[test][title].values()]
            best = [best_f1(tests[test], one, suite) for one in scores[test][title].values()]
            cells.append(f"{100 * np.mean(found):.1f} / {100 * np.mean(best):.1f}")
        rows.append([title, *cells])
    cells = [f"{100 * first_error_f1(tests[test], majority[test], 0.5, suite):.1f}" for test, suite in SUITES.items()]
    rows.append(["majority class: every step is right", *cells])
    parts = [
        "F1 of first errors (PRM-Score for PRMBench), in percent, mean over seeds: with the threshold 0.5, and with the best threshold for "
        "the same rows, which is an upper bound:",
        Table(["", *(TESTS[test] for test in SUITES)], rows).markdown(),
    ]
    kinds = {test: Aurocs(tests[test], scores[test], after_an_error, seed) for test in ("prm800k", "prmbench")}
    rows = []
    for title in arms:
        cells = []
        for one in kinds.values():
            cells.append(one.mean(title))
            for is_kind in (one.labels >= 0.5, one.labels < 0.5):
                means = [
                    column[is_kind].mean() for key, column in one.columns.items() if key[0] == title and is_kind.any()
                ]
                cells.append(f"{np.mean(means):.2f}" if means else "–")
        rows.append([title, *cells])
    number = {test: (int((one.labels >= 0.5).sum()), int((one.labels < 0.5).sum())) for test, one in kinds.items()}
    heads = [
        text
        for test, name in (("prm800k", "PRM800K"), ("prmbench", "PRMBench"))
        for text in (f"{name}: AUROC", f"right steps ({number[test][0]})", f"wrong steps ({number[test][1]})")
    ]
    differences = []
    for first, second in DIFFERENCES[1:5]:
        cells = [one.difference(first, second) for one in kinds.values()]
        if any(cells):
            differences.append([f"{first} − {second}", *(cell[0] if cell else "–" for cell in cells)])
    return parts + [
        "**Corrections.** In PRM800K, no solution continues after a wrong step: annotators continue from a right step, or write one in "
        "place of the wrong ones. Its trees therefore contain no corrections, and its merged pairs have the label of a right step followed by "
        "another step. As a test, each step that an annotator wrote is placed after the wrong steps that it replaced, and for comparison "
        "a second wrong step. In PRMBench, right steps do follow wrong ones. AUROC of right against wrong steps after a wrong step, and "
        "mean scores:",
        Table(["", *heads], rows).markdown(),
        "Differences in AUROC, as above:",
        Table(["", "PRM800K", "PRMBench"], differences).markdown(),
    ]


def introduction(settings, counts, finished, number) -> list[str]:
    profile, mixture = settings["profile"], counts["mixture"]
    steps = {"PRM800K": [0, 0], "PRMBench": [0, 0], "ProcessBench olympiadbench": [0, 0]}
    for source, found in mixture["sources"].items():
        name = source_name(source)
        steps[name][0] += found["labelled_steps"]["train"]
        steps[name][1] = counts["different_steps"].get(name, 0)
    by_system = {
        system: np.mean(
            [
                [result["tokens_per_row"], result["labels_per_row"]]
                for job, result in finished.items()
                if job.system == system
            ],
            axis=0,
        )
        for system in SYSTEMS
        if any(job.system == system for job in finished)
    }
    budget = ", ".join(
        f"{SYSTEMS[system]} {profile['rows'] * tokens:,.0f} tokens with {profile['rows'] * labels:,.0f} labels"
        for system, (tokens, labels) in by_system.items()
    )
    test_rows = ", ".join(
        f"{TESTS[test]} {found['problems']} problems with {found['steps']:,} labelled steps, {found['wrong']:,} of them wrong"
        for test, found in counts["tests"].items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    size = next((f" --profile {name}" for name, one in PROFILES.items() if asdict(one) == profile), "")
    jobs = make_jobs(profile["seeds"])
    missing = Counter(arm_of(job).title for job in jobs if job not in finished)
    seeds = Counter(arm_of(job).title for job in jobs)
    return [
        "Step reward models trained from SmolLM2-135M-Instruct on human and constructed labels, by `benchmarks/real_labels.py"
        f"{size}`, which has the command and describes the data. {len(finished)} of the {number} trainings of the study are finished."
        + (
            " Missing: "
            + "; ".join(
                f"{title}{f' ({count} of {seeds[title]} seeds)' * (count < seeds[title])}"
                for title, count in missing.items()
            )
            + "."
            if missing
            else ""
        ),
        "Training mixture, built by one call of `build_stepwise` with weights: "
        + ", ".join(
            f"{given:,} labelled steps of {name} ({different:,} different ones)"
            for name, (given, different) in steps.items()
        )
        + ". The classes of PRMBench share solutions, whose equal steps are joined in training. "
        f"{mixture['dropped'].get('excluded', 0):,} rows were excluded because their problem is in a test set. Of {counts['overlap']['trained']:,} "
        f"training and {counts['overlap']['tested']:,} test problems, {counts['overlap']['both']} are in both.",
        f"Each training has {profile['rows']} steps of one row of up to {ROW:,} tokens, which is a part of the mixture ({budget}). LoRA: rank 16, "
        f"learning rate {LEARNING_RATES['lora']}. Full: learning rate {LEARNING_RATES['full']}. Cosine schedule, bf16 autocast, one thread.",
        f"Test sets: {test_rows}.",
        f"{settings['date']}, {os.cpu_count()} cores, {versions}.",
    ]


def draw(aurocs: dict[str, Aurocs], arms, path: Path) -> None:
    """Draw the AUROC of the main arms on each test set, with intervals over problems."""
    theme = THEMES["light"]
    figure = new_figure()
    figure.set_size_inches(8, 5.5)
    axes = figure.subplots(1, 1)
    style_axes(axes, theme)
    titles = [title for title in [arm.title for arm in MAIN] + list(BASELINES.values()) if title in arms]
    for i, (test, one) in enumerate(aurocs.items()):
        for place, title in enumerate(titles):
            keys = [key for key in one.values if key[0] == title]
            value = np.mean([one.values[key] for key in keys])
            low, high = percentile_interval(value, np.mean([one.draws[key] for key in keys], axis=0))
            y = len(titles) - place + 0.3 - 0.18 * i
            colour = theme.curves[i]
            axes.plot([low, high], [y, y], color=colour, linewidth=1.5)
            axes.plot(value, y, MARKERS[i], color=colour, markersize=6, label=TESTS[test] if place == 0 else None)
    axes.axvline(0.5, color=theme.quiet, linewidth=1)
    axes.set_yticks([len(titles) - place for place in range(len(titles))], titles)
    axes.set_xlabel("AUROC of step scores")
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor=theme.page)


READING = """
How to read this: a difference is settled only if it is larger than what the choice of problems and the seed of training explain. What is
not settled is unknown, not zero. An AUROC near 0.5 means that the model cannot tell right from wrong steps. Models before training are off
0.5, too, because their heads are random: compare trained models with each other, and with several seeds. The trainings of this table are as
short as stated above, and do not show how good a reward model of this size can get. [Full fine-tuning](#a-pretrained-model) on 190,000
tokens of PRM800K alone reached 0.61 on its held-out problems, and chance on ProcessBench.
"""


# Driver


def main(args: argparse.Namespace) -> None:
    folder, profile = Path(args.output_dir), PROFILES[args.profile]
    folder.mkdir(parents=True, exist_ok=True)
    if args.job:
        if args.job in BASELINES:
            run_baseline(args, args.job, folder)
        else:
            [job] = [job for job in make_jobs(profile.seeds) if job.name == args.job]
            run_job(args, job, folder, profile)
        return
    settings = {"profile": asdict(profile), "seed": args.seed, "model": args.model, "data": args.data}
    if (folder / "settings.json").exists():
        found = read_json(folder / "settings.json")
        if {name: found[name] for name in settings} != settings:
            raise ValueError(f"{folder} has the results of other settings: {found}. Choose another --output_dir.")
    else:
        write_json(folder / "settings.json", settings | {"versions": versions(), "date": str(date.today())})
    prepare(args, folder, profile)
    jobs = make_jobs(profile.seeds)
    if not args.only_report:
        names = [*BASELINES, *(job.name for job in jobs)]
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
        code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
    if code:
        raise RuntimeError(
            f"The job {name} ended with exit code {code}. Its output is in {log.name}. Run the command again to repeat it."
        )


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
