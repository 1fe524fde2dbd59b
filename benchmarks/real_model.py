"""
Train a reward model from SmolLM2-135M on PRM800K's phase1_test.jsonl, and measure it on problems that it has not seen.

```bash
python tests/tools/fetch_real_model.py outputs/smollm2
python benchmarks/real_model.py --model outputs/smollm2 --prm800k data/prm800k/phase1_test.jsonl \
    --processbench data/processbench/gsm8k.json --prmbench data/prmbench/test.jsonl --output_dir outputs/real-model
```

One epoch of full fine-tuning on the HRM view of the training problems, in two processes on CPU. On the held-out problems, the trained model is
compared with itself before training (pretrained body, new head) and with random weights of the same architecture. `trl-hrm benchmark` measures
the trained model on ProcessBench and PRMBench. Each part is written to a folder of `--output_dir` and is not repeated if it is there. The tables
are printed and saved as `results.md`, all numbers as `results.json`.
"""

import argparse
import importlib.metadata
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trl_hrm.evaluation.benchmarks.measures import format_results
from trl_hrm.evaluation.intervals import NUM_DRAWS, percentile_interval
from trl_hrm.io import read_json, write_json
from trl_hrm.pages.page import Table


ROOT = Path(__file__).resolve().parents[1]
MODELS = {"trained": "trained", "untrained": "before training", "random": "random weights"}
KINDS = {"all steps": (1, 2), "single steps": (1,), "merged steps": (2,)}  # by the number of merged steps
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
    "save_strategy": "no",
    "eval_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "ddp_find_unused_parameters": False,
}


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"seed": args.seed, "versions": versions(), "benchmarks": {}}
    build(folder / "dataset", args)
    train(folder / "trained", folder / "dataset", args)
    save_untrained(folder / "untrained", folder / "dataset", args.model, args)
    randomize(args.model, folder / "random-body", args.seed)
    save_untrained(folder / "random", folder / "dataset", str(folder / "random-body"), args)
    results["held_out"] = held_out(folder, args.seed)
    for suite, data in (("processbench", args.processbench), ("prmbench", args.prmbench)):
        for name in args.benchmarked if data else ():
            found = benchmark(folder / f"{suite}-{name}", folder / name, suite, data, args.seed)
            results["benchmarks"][f"{suite}, {MODELS[name]}"] = found
    write_json(folder / "results.json", results)
    (folder / "results.md").write_text(report(results), encoding="utf-8")
    print(report(results))


def build(folder: Path, args: argparse.Namespace) -> None:
    if not folder.exists():
        run("trl_hrm.cli", "build-prm800k", args.prm800k, "--view", "hrm", "--seed", args.seed, "--output_dir", folder)


def train(folder: Path, dataset: Path, args: argparse.Namespace) -> None:
    """Train in two processes, unless the folder has a trained model."""
    if (folder / "model.safetensors").exists():
        return
    options = {"dataset_name": dataset, "model_name_or_path": args.model, "output_dir": folder, "seed": args.seed}
    flags = [text for name, value in {**options, **TRAINING}.items() for text in (f"--{name}", value)]
    config = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
    run("accelerate.commands.launch", "--config_file", config, ROOT / "recipes" / "hrm_reward.py", *flags)


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
    Return the AUROC of each model, and the difference of the first one from each other, with 95 % intervals over problems.

    The intervals come from a Bayesian bootstrap (Rubin, 1981): a step counts with the weight of its problem, which is drawn from an
    exponential distribution. All models get the same weights, so the differences are paired.

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
    first, *others = scores
    for name in others:
        difference = f"{first} minus {name}"
        values[difference] = values[first] - values[name]
        draws[difference] = draws[first] - draws[name]
    return {name: interval(value, draws[name]) for name, value in values.items()}


def interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    low, high = percentile_interval(value, drawn)
    return {"value": float(value), "low": low, "high": high}


def benchmark(folder: Path, model: Path, suite: str, data: str, seed: int) -> dict[str, Any]:
    if not (folder / "results.json").exists():
        options = ["--reward_model_batch_size", 1, "--seed", seed, "--output_dir", folder]
        run("trl_hrm.cli", "benchmark", data, "--suite", suite, "--reward_model", model, *options)
    return read_json(folder / "results.json")["suites"][suite]


def run(module: str, *args: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, args)], check=True)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "trl", "accelerate", "datasets", "trl-hrm")
    return {name: importlib.metadata.version(name) for name in names}


def report(results: dict[str, Any]) -> str:
    """Return the results as Markdown tables."""
    held_out = results["held_out"]
    titles = MODELS | {f"trained minus {name}": f"trained minus {MODELS[name]}" for name in ("untrained", "random")}
    rows = [[title, *(shown(held_out[kind][name]) for kind in KINDS)] for name, title in titles.items()]
    head = ["", *(f"{kind} ({held_out[kind]['steps']:,}, {held_out[kind]['wrong']:,} wrong)" for kind in KINDS)]
    parts = [
        f"AUROC on {held_out['problems']} held-out problems, with 95 % intervals over problems.",
        Table(head, rows).markdown(),
    ]
    for name, found in results["benchmarks"].items():
        parts += [name, "```\n" + format_results(name.split(",")[0], found) + "\n```"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return "\n\n".join([*parts, f"Seed {results['seed']}; {versions}."]) + "\n"


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
    parser.add_argument("--output_dir", required=True, help="folder of all results")
    parser.add_argument("--seed", type=int, default=42, help="seed of split, training and intervals (default: 42)")
    main(parser.parse_args())
