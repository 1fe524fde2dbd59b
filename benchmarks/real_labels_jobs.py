"""
Data, trainings and scores of `real_labels.py`: the mixture of labelled steps, the test sets, and one job, which trains a model and scores
the test sets with it.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from real_model import randomize

from trl_hrm.data.benchmark_rows import ORIGINAL_PROMPT
from trl_hrm.data.problems import exclusion_key, problem_split
from trl_hrm.evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
from trl_hrm.evaluation.benchmarks.prm_bench import PRM_BENCH
from trl_hrm.evaluation.benchmarks.process_bench import PROCESS_BENCH
from trl_hrm.evaluation.benchmarks.suite import read_suites
from trl_hrm.io import read_json, replacing, write_json
from trl_hrm.step_tree import StepTree


MAX_MERGE = {"orm": 1, "prm": 1, "hrm": 2, "hrm3": 3}
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
    jobs = [Job(system, "full", seed) for seed in numbers for system in ("prm", "hrm", "orm")]
    jobs += [Job("prm", "full", seed, times=QUARTER) for seed in numbers]
    jobs += [Job("prm", "full", 0, times=TRIPLE)]
    jobs += [Job("hrm3", "full", seed) for seed in numbers]
    jobs += [Job(system, "lora", seed) for seed in numbers for system in ("prm", "hrm")]
    jobs += [Job("prm", "full", seed, separator=name) for name in list(SEPARATORS)[1:] for seed in numbers]
    jobs += [Job("prm", "full", seed, weighting="occurrence") for seed in numbers]
    return jobs + [Job(system, "lora", seed) for seed in numbers for system in ("orm", "hrm3")]


# Data


def prepare(args: argparse.Namespace, folder: Path, profile: Profile) -> dict[str, Any]:
    """
    Write the test sets and the mixture of training steps, unless they are there. Return the counts.

    Raises:
        `ValueError`: If the folder has the data of another profile or seed.
    """
    settings = {"profile": asdict(profile), "seed": args.seed}
    if (folder / "counts.json").exists():
        counts = read_json(folder / "counts.json")
        if counts["settings"] != settings:
            raise ValueError(
                f"{folder} has the data of {counts['settings']}, not of {settings}. Choose another --output_dir."
            )
        return counts
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
    counts = {"settings": settings, "mixture": build_mixture(args, folder, data), "tests": {}}
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
    Return the tree of a problem with added steps after wrong ones, since solutions of PRM800K hardly ever continue after a wrong step. Where an
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


def digest_of_mixture(folder: Path) -> str:
    """Return a hash of the rows of the mixture, as 16 hex digits. Their `source` is left out, because it is a path."""
    rows = [{name: value for name, value in row.items() if name != "source"} for row in load(folder)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def load(folder: Path) -> list[dict[str, Any]]:
    from datasets import load_dataset

    return load_dataset(str(folder), split="train", cache_dir=str(folder.with_name("cache"))).to_list()


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# Labelled steps of a test set


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


# Training and scoring of one job


def use_bf16() -> bool:
    """Return whether models are trained and scored in bf16, which is slower than float32 on a CPU without AVX-512."""
    import torch

    return torch.backends.cpu.get_cpu_capability() != "AVX2"


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


def run_job(args: argparse.Namespace, job: Job, folder: Path, results: Path, profile: Profile) -> None:
    """Train and score one model, and write the results."""
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
            bf16=use_bf16(),
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
        "date": str(date.today()),
    }
    result["scores"] = score_tests(str(out / "training"), read_json(folder / "tests.json"), MAX_MERGE[job.system])
    shutil.rmtree(out / "training")
    write_result(results / f"{job.name}.json", result)


def score_tests(
    model: str, tests: dict[str, list[dict[str, Any]]], max_merge: int
) -> dict[str, list[list[list[float]]]]:
    """
    Return the scores of each step of each row of each test set: of the step alone and, up to `max_merge`, of the merged steps that end
    with it.
    """
    from trl_hrm import StepScorer

    scorer = StepScorer.from_pretrained(model, batch_size=1, dtype="bfloat16" if use_bf16() else "float32")
    found = {}
    for name, rows in tests.items():
        merged = [with_merged_steps(row, max_merge) for row in rows]
        values = scorer.score_trees([tree for tree, _ in merged], progress=True)
        found[name] = [
            [[float(f"{scores[i]:.5g}") for i in own] for own in owners]
            for scores, (_, owners) in zip(values, merged, strict=True)
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


def run_baseline(args: argparse.Namespace, name: str, folder: Path, results: Path) -> None:
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
    write_result(results / f"{name}.json", {"scores": scores})


def write_result(file: Path, result: dict[str, Any]) -> None:
    """Write the result of a job, with the scores of a row on a line."""
    scores = {
        test: [json.dumps(row, separators=(",", ":")) for row in rows] for test, rows in result["scores"].items()
    }
    text = json.dumps(result | {"scores": scores}, indent=1)
    with replacing(file) as opened:
        opened.write(text.replace('"[[', "[[").replace(']]"', "]]") + "\n")
