r"""
Evaluate a pretrained policy, SmolLM2-135M-Instruct, on easy word problems before and after one round of self-training.

```bash
python tests/tools/fetch_real_model.py smollm2 --folder outputs
python benchmarks/real_policy.py --model outputs/smollm2 --output_dir outputs/real-policy --docs docs
```

The script makes word problems of one or two steps from templates, and splits them into training and test problems. The policy samples
solutions of the training problems (`annotate`), its correct solutions become a dataset (`export`), and the policy is trained on them
(`KLSelfTrainer`). `evaluate` then measures both policies on the test problems. Everything runs on CPU, in one process. The same command
resumes a stopped run. The results are printed and saved as `results.md`; `--docs` replaces their section of `evidence.md`.
"""

import argparse
import json
import os
import platform
import random
import time
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from common import replace_section, version_words

from trl_hrm import (
    AnnotateConfig,
    EvaluateConfig,
    ExportConfig,
    KLSelfConfig,
    KLSelfTrainer,
    annotate,
    evaluate,
    export,
)
from trl_hrm.evaluation.policy_evaluation import PolicyResults, comparison_picture, format_policies, notes_of
from trl_hrm.io import read_json, write_json


HEADING = "## A pretrained policy"
PICTURE = "images/real-policy.png"  # in the folder of the page
NAMES = ("Tom", "Lisa", "Mia", "Ben", "Anna", "Sam", "Nora", "Leo")
ITEMS = ("apples", "books", "marbles", "pencils", "stickers", "shells", "coins", "cards")
TEMPLATES = (
    (
        "{a} has {x} {items}. {b} gives {a} {y} more {items}. How many {items} does {a} have now?",
        lambda x, y, z: x + y,
    ),
    ("{a} has {x} {items} and {b} has {y} {items}. How many {items} do they have together?", lambda x, y, z: x + y),
    ("{a} has {x} {items} and gives {y} of them to {b}. How many {items} does {a} have left?", lambda x, y, z: x - y),
    ("There are {x} {items} in a box. {a} takes {y} of them out. How many {items} are left?", lambda x, y, z: x - y),
    ("{a} buys {y} bags with {z} {items} each. How many {items} does {a} buy?", lambda x, y, z: y * z),
    (
        "{a} has {x} {items}. {b} gives {a} {y} more. Then {a} loses {z} {items}. How many {items} does {a} have now?",
        lambda x, y, z: x + y - z,
    ),
    (
        "{a} has {x} {items}, {b} has {y} and {c} has {z}. How many {items} do they have together?",
        lambda x, y, z: x + y + z,
    ),
)
READING = (
    "A difference is not settled if its interval contains 0. The intervals cover the choice of problems and the samples, not the seed of "
    "training, and they do not correct for the number of measures."
)
PROMPT = """Question: Mark has 6 pens and buys 3 more pens. How many pens does Mark have now?
Mark has 6 pens. He buys 3 more. 6 + 3 = 9. The answer is 9.

Question: Kate has 8 hats and gives 2 of them away. How many hats does Kate have left?
Kate has 8 hats. She gives 2 away. 8 - 2 = 6. The answer is 6.

Question: {question}
"""
SAMPLING = {
    "engine": "transformers",
    "temperature": 0.7,
    "prompt_style": "plain",
    "final_stops": ["\n\n", "\nQuestion:"],
    "segmentation": "sentence",
    "extractors": ["answer_is", "last_number"],
    "max_solution_tokens": 80,
}
TRAINING = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_length": 512,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
}


def main(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    problems = make_problems(args.num_test + args.num_train, args.seed)
    for name, rows in (("test", problems[: args.num_test]), ("train", problems[args.num_test :])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    sampling = SAMPLING | {"prompt": str(folder / "prompt.txt"), "seed": args.seed}
    seconds = {}
    if (folder / "seconds.json").exists():
        seconds = read_json(folder / "seconds.json")

    def timed(stage: str, started: float) -> None:
        """Add the time of a stage, over all starts of a run."""
        seconds[stage] = seconds.get(stage, 0) + time.perf_counter() - started
        write_json(folder / "seconds.json", seconds)

    trained, dataset = folder / "trained", folder / "dataset"
    if not (trained / "model.safetensors").exists():
        started = time.perf_counter()
        run = AnnotateConfig(
            policy=args.model,
            problems=str(folder / "train.jsonl"),
            search="rollouts",
            num_solutions=args.num_samples,
            num_completions=0,
            output_dir=str(folder / "train-run"),
            **sampling,
        )
        print(annotate(run))
        timed("sampling training solutions", started)
        selected = ExportConfig(
            inputs=[run.output_dir], view="sft", test_size=0.0, output_dir=str(dataset), overwrite=True, seed=args.seed
        )
        print(export(selected))
        started = time.perf_counter()
        train(args.model, dataset, trained, args.seed)
        timed("training", started)
    started = time.perf_counter()
    found = evaluate(
        EvaluateConfig(
            policy=[args.model, str(trained)],
            problems=str(folder / "test.jsonl"),
            n=[n for n in (1, 2, 4, 8, 16) if n <= args.num_samples],
            output_dir=str(folder / "evaluation"),
            overwrite=True,  # samples of a stopped run are kept
            **sampling,
        )
    )
    timed("evaluation of both policies", started)
    text = report(found, read_json(trained / "losses.json"), seconds, args)
    (folder / "results.md").write_text(text, encoding="utf-8")
    print(text)
    if args.docs:
        page = Path(args.docs, "evidence.md")
        page.write_text(replace_section(page.read_text(encoding="utf-8"), text, HEADING), encoding="utf-8")
        Path(args.docs, PICTURE).write_bytes(comparison_picture(named(found)).images["light"])


def make_problems(number: int, seed: int) -> list[dict[str, str]]:
    """Return different word problems with their answers. The answers are positive."""
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < number:
        template, solve = TEMPLATES[len(problems) % len(TEMPLATES)]
        a, b, c = rng.sample(NAMES, 3)
        x, y, z = rng.randint(8, 15), rng.randint(2, 7), rng.randint(2, 5)
        text = template.format(a=a, b=b, c=c, x=x, y=y, z=z, items=rng.choice(ITEMS))
        problems.setdefault(text, str(solve(x, y, z)))
    rows = [{"problem": text, "answer": answer} for text, answer in problems.items()]
    rng.shuffle(rows)
    return rows


def train(model: str, dataset: Path, folder: Path, seed: int) -> None:
    """Train the policy on its correct solutions, and save the losses next to it."""
    from datasets import load_dataset

    trainer = KLSelfTrainer(
        model=model,
        args=KLSelfConfig(output_dir=str(folder), seed=seed, **TRAINING),
        train_dataset=load_dataset(str(dataset), split="train"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    write_json(folder / "losses.json", {"losses": losses, "rows": len(trainer.train_dataset)})
    trainer.save_model()


def named(found: Any) -> list[PolicyResults]:
    """Return the results of both policies with names for the page."""
    return [replace(one, name=name) for one, name in zip(found.policies, ("before", "after"), strict=True)]


def report(found: Any, training: dict[str, Any], seconds: dict[str, float], args: argparse.Namespace) -> str:
    """Return the section of `docs/evidence.md`."""
    policies = named(found)
    names = ("torch", "transformers", "trl", "trl-hrm")
    versions = version_words(names)
    [compared] = found.comparison["policies"].values()
    verdicts: dict[str, list[str]] = {"Higher after training": [], "Lower after training": [], "Not settled": []}
    for name, one in compared["differences"].items():
        direction = "Higher" if one["difference"] > 0 else "Lower"
        is_open = one["low"] <= 0 <= one["high"]
        verdicts["Not settled" if is_open else f"{direction} after training"].append(name)
    outcomes = " ".join(f"{verdict}: {', '.join(names)}." for verdict, names in verdicts.items() if names)
    losses = training["losses"]
    times = ", ".join(f"{stage} {number / 60:.0f} min" for stage, number in seconds.items())
    parts = [
        HEADING,
        "SmolLM2-135M-Instruct (4-bit weights, dequantized to fp32) on word problems of one or two steps, before and after one round of self-training, by "
        "`benchmarks/real_policy.py`, which has the command. The problems come from "
        f"{len(TEMPLATES)} templates. The policy sampled {args.num_samples} solutions of each of {args.num_train} training problems, and "
        f"was trained on the {training['rows']} different correct ones with log-scaled KL regularisation (λ = 0.5, "
        f"{TRAINING['num_train_epochs']} epochs, {len(losses)} steps of 8 rows, learning rate {TRAINING['learning_rate']}). Its loss was "
        f"{losses[0]:.3f} in the first step and {losses[-1]:.3f} in the last.",
        f"`trl-hrm evaluate` then measured both on {args.num_test} other problems, with {args.num_samples} samples per problem at temperature "
        f"{SAMPLING['temperature']}. Accuracy in percent with 95 % intervals over problems, and paired differences in percentage points:",
        format_policies(policies, found.comparison, markdown=True),
        f"![Accuracy of both policies]({PICTURE})",
        "\n".join(f"- {note}" for note in notes_of(policies, found.comparison)),
        f"{outcomes} {READING}",
        f"{date.today()}, {os.cpu_count()} cores ({times}), Python {platform.python_version()}, {versions}. Seed {args.seed}.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--num_train", type=int, default=48, help="number of training problems (default: 48)")
    parser.add_argument("--num_test", type=int, default=48, help="number of test problems (default: 48)")
    parser.add_argument("--num_samples", type=int, default=8, help="number of samples per problem (default: 8)")
    parser.add_argument("--docs", help="folder of evidence.md, whose section is replaced (default: none)")
    parser.add_argument("--output_dir", required=True, help="folder of all results")
    parser.add_argument("--seed", type=int, default=42, help="seed of problems, samples and training (default: 42)")
    main(parser.parse_args())
