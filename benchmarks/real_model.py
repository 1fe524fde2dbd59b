"""
Train a reward model from SmolLM2-135M on PRM800K's phase1_test.jsonl, and measure it on problems that it has not seen.

```bash
python tests/tools/fetch_real_model.py smollm2 --folder outputs
python benchmarks/real_model.py --model outputs/smollm2 --prm800k data/prm800k/phase1_test.jsonl \
    --processbench data/processbench/gsm8k.json --prmbench data/prmbench.jsonl --output_dir outputs/real-model --docs docs/evidence.md
```

One epoch of full fine-tuning on the HRM view of the training problems, in two processes on CPU. On the held-out problems, the trained model is
compared with itself before training (pretrained body, new head) and with random weights of the same architecture. `trl-hrm benchmark` measures
the trained model on ProcessBench and PRMBench. Each part is written to a folder of `--output_dir` and is not repeated if it is there. An
interrupted training continues. The results are printed and saved as `results.md` and `results.json`; `--docs` replaces their section of a page.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from common import save_section, version_words, versions

from trl_hrm.data.problems import problem_key
from trl_hrm.evaluation.benchmarks.measures import format_results
from trl_hrm.intervals import NUM_DRAWS, percentile_interval
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table


ROOT = Path(__file__).resolve().parents[1]
MODELS = {"trained": "trained", "untrained": "before training", "random": "random weights"}
ROWS = MODELS | {
    "trained minus untrained": "trained minus before training",
    "trained minus random": "trained minus random weights",
}
KINDS = {"all steps": (1, 2), "single steps": (1,), "merged steps": (2,)}  # by the number of merged steps
HEADING = "## A pretrained model"
READING = """
How to read this: an AUROC of 0.5 is chance. 77 problems teach a model of this size the text format and a little about wrong steps. They do
not teach it to judge solutions of other problems, which ProcessBench and PRMBench measure. The intervals cover the choice of problems, not
the seed of training, and 13 problems are few. A difference whose interval contains 0 is not settled. Models that were not trained have a
head with random weights, so their AUROC can differ from 0.5 in both directions.
"""
TRAINING = {
    "dtype": "float32",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,  # 4 rows per step in two processes
    "learning_rate": 4e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 3,
    "max_length": 2048,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "save_strategy": "steps",
    "save_steps": 4,
    "save_total_limit": 1,
    "resume_from_checkpoint": True,
    "eval_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"seed": args.seed, "date": str(date.today()), "versions": versions(), "benchmarks": {}}
    build(folder / "dataset", args)
    results["losses"] = train(folder / "trained", folder / "dataset", args)
    save_untrained(folder / "untrained", folder / "dataset", args.model, args)
    randomize(args.model, folder / "random-body", args.seed)
    save_untrained(folder / "random", folder / "dataset", str(folder / "random-body"), args)
    results["held_out"] = held_out(folder, args.seed)
    prmbench = folder / "prmbench.jsonl"
    if args.prmbench:
        results["prmbench_rows"] = drop_seen(Path(args.prmbench), prmbench, folder / "dataset")
    for suite, data in (("processbench", args.processbench), ("prmbench", args.prmbench and str(prmbench))):
        for name in args.benchmarked if data else ():
            found = benchmark(folder / f"{suite}-{name}", folder / name, suite, data, args.seed)
            results["benchmarks"][f"{suite}, {MODELS[name]}"] = found
    write_json(folder / "results.json", results)
    save_section(folder, report(results), args.docs, HEADING)


def build(folder: Path, args: argparse.Namespace) -> None:
    if not folder.exists():
        run("trl_hrm.cli", "build-prm800k", args.prm800k, "--view", "hrm", "--seed", args.seed, "--output_dir", folder)


def train(folder: Path, dataset: Path, args: argparse.Namespace) -> list[float]:
    """Train in two processes, unless the folder has a trained model. Return the loss of each step."""
    if not (folder / "model.safetensors").exists():
        options = {"dataset_name": dataset, "model_name_or_path": args.model, "output_dir": folder, "seed": args.seed}
        flags = [text for name, value in {**options, **TRAINING}.items() for text in (f"--{name}", value)]
        config = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
        run("accelerate.commands.launch", "--config_file", config, ROOT / "recipes" / "hrm_reward.py", *flags)
    [checkpoint] = folder.glob("checkpoint-*")
    return [entry["loss"] for entry in read_json(checkpoint / "trainer_state.json")["log_history"] if "loss" in entry]


def save_untrained(folder: Path, dataset: Path, model: str, args: argparse.Namespace) -> None:
    """Save the model that training starts from, with the head that the seed gives."""
    if folder.exists():
        return
    from datasets import load_dataset

    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    trainer = HRMRewardTrainer(
        model=model,
        args=HRMRewardConfig(output_dir=str(folder), bf16=False, use_cpu=True, report_to="none", seed=args.seed),
        train_dataset=load_dataset(str(dataset), split="train").select(range(1)),
    )
    trainer.save_model()


def randomize(model: str, folder: Path, seed: int) -> None:
    """Save a model of the same architecture and with the same tokenizer whose weights are random."""
    if folder.exists():
        return
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def held_out(folder: Path, seed: int) -> dict[str, Any]:
    """Score the labelled steps of the held-out problems, and return the AUROC of each model with its interval over problems."""
    from datasets import load_dataset

    from trl_hrm import StepScorer, StepTree

    rows = load_dataset(str(folder / "dataset"), split="test").to_list()
    trees = [StepTree.from_row(row) for row in rows]
    found = {}
    for name in MODELS:
        file = folder / f"held-out-{name}.json"
        if not file.exists():
            scorer = StepScorer.from_pretrained(str(folder / name), batch_size=1)
            write_json(file, {"scores": scorer.score_trees(trees, progress=True)})
        found[name] = read_json(file)["scores"]
    result: dict[str, Any] = {"problems": len(rows)}
    for kind, merged in KINDS.items():
        chosen = [
            (i, step)
            for i, row in enumerate(rows)
            for step, label in enumerate(row["labels"])
            if label is not None and row["num_merged"][step] in merged
        ]
        labels = np.array([rows[i]["labels"][step] for i, step in chosen])
        scores = {name: np.array([found[name][i][step] for i, step in chosen]) for name in MODELS}
        intervals = auroc_intervals(scores, labels, np.array([i for i, _ in chosen]), seed)
        result[kind] = {"steps": len(labels), "wrong": int((labels < 0.5).sum()), **intervals}
    return result


def auroc_intervals(
    scores: dict[str, np.ndarray], labels: np.ndarray, problems: np.ndarray, seed: int
) -> dict[str, dict[str, float]]:
    """
    Return the AUROC of each model, and the difference of the first one from each other, with 95 % intervals over problems. The
    arguments are those of [`auroc_draws`]. All models get the same weights, so the differences are paired.
    """
    values, draws = auroc_draws(scores, labels, problems, seed)
    first, *others = scores
    for name in others:
        difference = f"{first} minus {name}"
        values[difference] = values[first] - values[name]
        draws[difference] = draws[first] - draws[name]
    return {name: interval(value, draws[name]) for name, value in values.items()}


def auroc_draws(
    scores: dict[str, np.ndarray], labels: np.ndarray, problems: np.ndarray, seed: int
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """
    Return the AUROC of each model, and draws of it for an interval over problems, shape `(NUM_DRAWS,)`.

    The draws come from a Bayesian bootstrap (Rubin, 1981): a step counts with the weight of its problem, which is drawn from an
    exponential distribution.

    Args:
        scores (`dict[str, np.ndarray]`):
            Scores of the steps by each model, shape `(N,)`.
        labels (`np.ndarray`), problems (`np.ndarray`):
            Label of each step, and number of its problem (from 0), shape `(N,)`.
        seed (`int`):
            Seed of the weights.
    """
    member = np.eye(problems.max() + 1)[problems]  # (N, problems)
    right, wrong = labels >= 0.5, labels < 0.5
    weights = np.random.default_rng(seed).exponential(size=(NUM_DRAWS, member.shape[1]))
    pairs = np.outer(member[right].sum(axis=0), member[wrong].sum(axis=0))
    draws, values = {}, {}
    for name, one in scores.items():
        won = (one[right][:, None] > one[wrong]) + (one[right][:, None] == one[wrong]) / 2
        wins = member[right].T @ won @ member[wrong]  # by the problems of the correct step and of the wrong step
        values[name] = wins.sum() / pairs.sum()
        draws[name] = ((weights @ wins) * weights).sum(axis=1) / ((weights @ pairs) * weights).sum(axis=1)
    return values, draws


def interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(value, drawn)
    return {"value": float(value), "low": low, "high": high}


def drop_seen(source: Path, target: Path, dataset: Path) -> tuple[int, int]:
    """
    Write the rows of PRMBench whose problem was not trained on. Both PRMBench and the training problems come from PRM800K. Return the
    numbers of rows kept and read.
    """
    from datasets import load_dataset

    seen = {problem_key(prompt) for prompt in load_dataset(str(dataset), split="train")["prompt"]}
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [line for line in lines if problem_key(json.loads(line)["original_question"]) not in seen]
    target.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    return len(kept), len(lines)


def benchmark(folder: Path, model: Path, suite: str, data: str, seed: int) -> dict[str, Any]:
    if not (folder / "results.json").exists():
        options = ["--reward_model_batch_size", 1, "--seed", seed, "--output_dir", folder]
        run("trl_hrm.cli", "benchmark", data, "--suite", suite, "--reward_model", model, *options)
    return read_json(folder / "results.json")["suites"][suite]


def run(module: str, *args: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, args)], check=True)


def report(results: dict[str, Any]) -> str:
    """Return the section of `docs/evidence.md`."""
    held_out, losses = results["held_out"], results["losses"]
    versions = version_words(results["versions"])
    parts = [
        HEADING,
        "A reward model trained from SmolLM2-135M-Instruct (4-bit weights, dequantized to fp32) on the human labels of PRM800K's `phase1_test.jsonl`, by "
        "`benchmarks/real_model.py`, which has the command. One epoch on the HRM view of 77 problems, full fine-tuning in fp32 in two "
        f"processes on CPU: {len(losses)} steps of 4 rows of up to {TRAINING['max_length']:,} tokens, learning rate "
        f"{TRAINING['learning_rate']}. The mean loss is {np.mean(losses[:8]):.2f} in the first 8 steps and {np.mean(losses[-8:]):.2f} in "
        "the last 8.",
        f"{results['date']}, {os.cpu_count()} cores, {versions}. Seed {results['seed']} for the split, training and intervals.",
        f"AUROC of the step scores on the {held_out['problems']} problems that were held out, with 95 % intervals over problems:",
        Table(
            ["", *(f"{kind} ({held_out[kind]['steps']:,}, {held_out[kind]['wrong']:,} wrong)" for kind in KINDS)],
            [[title, *(shown(held_out[kind][name]) for kind in KINDS)] for name, title in ROWS.items()],
        ).markdown(),
    ]
    for name, found in results["benchmarks"].items():
        parts += [f"`trl-hrm benchmark`, {name}:", f"```\n{format_results(name.split(',')[0], found)}\n```"]
    if "prmbench_rows" in results:
        kept, read = results["prmbench_rows"]
        parts.append(
            f"PRMBench was made from PRM800K. {kept} of its {read} rows are used: those whose problem is not a training problem."
        )
    return "\n\n".join([*parts, READING.strip()]) + "\n"


def shown(value: dict[str, float]) -> str:
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]".replace("-", "−")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder of the language model to train from")
    parser.add_argument("--prm800k", required=True, help="phase1_test.jsonl of PRM800K")
    parser.add_argument("--processbench", help="ProcessBench file (default: not measured)")
    parser.add_argument("--prmbench", help="PRMBench file (default: not measured)")
    parser.add_argument(
        "--benchmarked", nargs="*", default=["trained"], choices=MODELS, help="models to benchmark (default: trained)"
    )
    parser.add_argument("--docs", help="page whose section with these results is replaced (default: none)")
    parser.add_argument("--output_dir", required=True, help="folder of all results")
    parser.add_argument("--seed", type=int, default=42, help="seed of split, training and intervals (default: 42)")
    main(parser.parse_args())
