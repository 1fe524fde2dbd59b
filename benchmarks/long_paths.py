"""
Memory and time of long paths, as in thinking traces: a training step and scoring of one path of 2,000 to 32,000 tokens.

    python benchmarks/long_paths.py --output outputs/long_paths.json --docs docs/thinking.md

Each measurement is a process of its own, which reports its peak resident memory. The path is a problem with steps of about 64 tokens. Every
eighth step begins with "Wait". The dataset has merged thoughts, so training also sees each of these steps merged with the thought before it.

- `training`: two steps of HRMRewardTrainer with gradient checkpointing, batch size 1. The time is the duration of the second step.
- `scoring`: StepScorer with spans 1 and thought.
- `scoring 8`: 8 such paths in one call.

The growth per token is the slope of a least-squares line through the peaks. Models: a Qwen2 token classifier with random weights, hidden size
256 and 4 layers, in fp32. `--real_model` adds SmolLM2-135M (see `tests/tools/fetch_real_model.py`).
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import version_words


LENGTHS = [2048, 4096, 8192, 16384, 32768]
KINDS = ["training", "scoring", "scoring 8"]
STEP_TOKENS = 64
MARK = "Wait, "


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens per path (default: %(default)s)"
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to measure (default: all)")
    parser.add_argument("--hidden_size", type=int, default=256, help="hidden size of the model (default: 256)")
    parser.add_argument("--num_layers", type=int, default=4, help="number of layers of the model (default: 4)")
    parser.add_argument("--real_model", help="folder of SmolLM2-135M, to measure it too")
    parser.add_argument("--real_lengths", type=int, nargs="+", default=[2048, 4096], help="lengths for --real_model")
    parser.add_argument("--output", default="outputs/long_paths.json", help="JSON file of the results")
    parser.add_argument("--docs", help="Markdown file to write the tables to")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def make_solution(tokenizer, num_tokens: int, seed: int) -> list[str]:
    """Return the steps of a solution with about `num_tokens` tokens. Every eighth step begins with a mark."""
    rng = random.Random(seed)
    steps, total = [], 0
    while total < num_tokens - 2 * STEP_TOKENS:
        mark = MARK * (len(steps) % 8 == 7)
        step = mark + " ".join(f"{rng.choice('abcxyz')} = {rng.randrange(100)}" for _ in range(STEP_TOKENS // 6))
        steps.append(step)
        total += len(tokenizer(step + "\n\n")["input_ids"])
    return steps


def worker(job: dict) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForTokenClassification, AutoTokenizer

    from trl_hrm import HRMRewardConfig, HRMRewardTrainer, StepFormat, StepScorer, StepTree, hrm_view

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoModelForTokenClassification.from_pretrained(job["model"], num_labels=2, dtype=torch.float32)
    model.config.max_position_embeddings = max(model.config.max_position_embeddings, 2 * job["length"])
    model.config.pad_token_id = tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    solutions = [
        make_solution(tokenizer, job["length"], seed) for seed in range(8 if job["kind"] == "scoring 8" else 1)
    ]
    start_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    facts = {"steps": len(solutions[0]), "start_memory": start_memory}
    if job["kind"] == "training":
        rows = [
            hrm_view(
                StepTree("1 + 2?", steps, [float(i % 3 > 0) for i in range(len(steps))], [*range(-1, len(steps) - 1)]),
                merge="thoughts",
            ).to_row()
            for steps in solutions
        ]
        config = HRMRewardConfig(
            output_dir=job["work"],
            max_length=None,
            max_steps=2,
            per_device_train_batch_size=1,
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        times: list[float] = []

        class Timed(HRMRewardTrainer):
            def training_step(self, *args, **kwargs):
                times.append(time.perf_counter())
                return super().training_step(*args, **kwargs)

        trainer = Timed(model, config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
        facts["tokens"] = len(trainer.train_dataset[0]["input_ids"])
        trainer.train()
        facts["seconds"] = time.perf_counter() - times[-1]
    else:
        scorer = StepScorer(model, tokenizer, StepFormat())
        began = time.perf_counter()
        scores = scorer.score(["1 + 2?"] * len(solutions), [[steps] for steps in solutions], spans=(1, "thought"))
        facts["seconds"] = time.perf_counter() - began
        assert all(len(found[0]) == len(steps) for found, steps in zip(scores, solutions, strict=True))
    facts["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps(facts))


def measure(job: dict) -> dict:
    """Return the result of a worker process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-4000:]}")
    return {name: job[name] for name in ("name", "kind", "length")} | json.loads(done.stdout.splitlines()[-1])


def fit(lengths: list[int], values: list[float]) -> tuple[float, float]:
    """Return the slope of the least-squares line through the values, and the exponent of the power law through the last two."""
    import math

    import numpy as np

    slope, _ = np.polyfit(lengths, values, 1)
    exponent = math.log(values[-1] / values[-2]) / math.log(lengths[-1] / lengths[-2])
    return float(slope), exponent


def report(results: list[dict], facts: dict) -> str:
    """Return the tables as Markdown."""
    lines = []
    for name in dict.fromkeys(one["name"] for one in results):
        own = [one for one in results if one["name"] == name]
        kinds = list(dict.fromkeys(one["kind"] for one in own))
        lines += [f"{name}:", "", f"| tokens per path | {' | '.join(f'{kind}: MiB | s' for kind in kinds)} |"]
        lines += ["|---" * (1 + 2 * len(kinds)) + "|"]
        for length in dict.fromkeys(one["length"] for one in own):
            cells = []
            for kind in kinds:
                found = [one for one in own if (one["kind"], one["length"]) == (kind, length)]
                cells += [f"{found[0]['memory']:,.0f}", f"{found[0]['seconds']:,.1f}"] if found else ["", ""]
            lines.append(f"| {length:,} | {' | '.join(cells)} |")
        lines.append("")
        for kind in kinds:
            found = [one for one in own if one["kind"] == kind]
            if len(found) > 2:
                slope, exponent = fit(
                    [one["length"] for one in found], [one["memory"] - one["start_memory"] for one in found]
                )
                lines.append(
                    f"- {kind}: {slope * 1024:,.0f} KiB per token of the path. From {found[-2]['length']:,} to {found[-1]['length']:,} "
                    f"tokens, the memory above the start grows with the power {exponent:.2f} of the length."
                )
        lines.append("")
    return "\n".join([*lines, facts["line"]])


def main() -> None:
    args = make_parser().parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    from trl_hrm.tiny_model import make_tiny_model

    results = []
    with tempfile.TemporaryDirectory() as folder:
        texts = [MARK + " ".join(f"{letter} = {i}" for letter in "abcxyz" for i in range(100)) + "\n\n1 + 2?"]
        make_tiny_model(
            texts * 2, Path(folder, "tiny"), hidden_size=args.hidden_size, num_layers=args.num_layers, vocab_size=400
        )
        models = [
            (
                f"Qwen2, hidden size {args.hidden_size}, {args.num_layers} layers",
                str(Path(folder, "tiny")),
                args.lengths,
            )
        ]
        if args.real_model:
            models.append(("SmolLM2-135M", args.real_model, args.real_lengths))
        for name, model, lengths in models:
            for kind in args.kinds:
                for length in lengths:
                    job = {
                        "name": name,
                        "model": model,
                        "kind": kind,
                        "length": length,
                        "work": str(Path(folder, "out")),
                    }
                    results.append(measure(job))
                    print(f"{name}, {kind}, {length:,}: {results[-1]}", file=sys.stderr, flush=True)
    packages = ("torch", "transformers", "trl", "datasets")
    versions = version_words(packages)
    line = f"{time.strftime('%Y-%m-%d')}; {versions}; Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores, fp32."
    text = report(results, {"line": line})
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"results": results, "line": line}, indent=1) + "\n", encoding="utf-8")
    print(text)
    if args.docs:
        page = Path(args.docs)
        head, mark, _ = page.read_text(encoding="utf-8").partition("<!-- long_paths.py -->\n")
        if not mark:
            raise ValueError(f"{page} has no line <!-- long_paths.py -->, after which the tables are written. Add it.")
        page.write_text(f"{head}{mark}\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
