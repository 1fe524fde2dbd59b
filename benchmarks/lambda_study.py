"""
Effect of λ: train a small policy on its own right solutions with several λ, and draw figure 4 of the HRM paper.

```bash
python benchmarks/lambda_study.py                                        # trains the policy first
python benchmarks/lambda_study.py --policy outputs/lambda-study/policy --problems outputs/lambda-study/problems.jsonl
```

The policy of `recipes/tiny/make_policy.py` samples solutions of problems that it was not trained on. The training data are the solutions with
the right answer. Duplicates are kept, because removing them would give rare and common solutions the same weight. All runs with the same
seed start from the same policy and use the same batches in the same order.

Every `--measure_every` steps, two quantities are measured on the same right solutions of held-out problems: KL(ref ‖ policy), summed over
the tokens of a solution and averaged over solutions, and the language-model loss per token. Accuracy is measured before and after training on
solutions of the held-out problems sampled at T = 1, with the same random numbers in every run.

Writes all points to `lambda_study.json` and the picture to `lambda_study.png`.
"""

import argparse
import asyncio
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lambda_report import Setting, draw, header, shown_accuracy, table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
)
from transformers.utils import logging

from trl_hrm.demo.held_out import HeldOut
from trl_hrm.grading.extraction import extract_answer
from trl_hrm.kl import SCALINGS
from trl_hrm.search.engines.base import Sample
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.search.open_tree import request_seed
from trl_hrm.trainer.kl_self_config import KLSelfConfig
from trl_hrm.trainer.kl_self_trainer import KLSelfTrainer


ROOT = Path(__file__).resolve().parents[1]
NUM_PROBLEMS = 700  # created with the policy, which is not trained on them
HELD_OUT_SEED = 12345  # seed of the held-out solutions, the same for all seeds of a study


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", default="outputs/lambda-study", help="output folder (default: outputs/lambda-study)"
    )
    parser.add_argument("--policy", help="folder of a policy (default: train one in --output_dir)")
    parser.add_argument("--problems", help="JSON Lines file with `problem` and `answer`; the last seventh is held out")
    parser.add_argument(
        "--lambdas", type=float, nargs="+", default=[0, 0.001, 0.5, 10], help="values of λ (default: 0 .001 .5 10)"
    )
    parser.add_argument(
        "--scalings",
        nargs="+",
        choices=SCALINGS,
        default=list(SCALINGS),
        help="scalings of the KL term (default: both)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of sampling and training (default: 0)"
    )
    parser.add_argument("--max_steps", type=int, default=100, help="optimizer steps per run (default: 100)")
    parser.add_argument("--batch_size", type=int, default=32, help="solutions per step (default: 32)")
    parser.add_argument("--learning_rate", type=float, default=3e-4, help="peak learning rate (default: 0.0003)")
    parser.add_argument("--measure_every", type=int, default=10, help="steps between measurements (default: 10)")
    parser.add_argument("--num_samples", type=int, default=8, help="solutions sampled per problem (default: 8)")
    parser.add_argument(
        "--max_tokens", type=int, default=160, help="maximum number of tokens per solution (default: 160)"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    if (args.policy is None) != (args.problems is None):
        raise SystemExit("error: Set both --policy and --problems, or neither to create them.")
    torch.set_num_threads(1)  # tiny models are slower with more threads
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.policy is None:
        make_policy(args)
    start = time.perf_counter()
    result = run(args)
    seconds = time.perf_counter() - start
    print(
        f"\n{header(result)}\n\n{table(result)}\n\n{seconds:.0f} s. Results: lambda_study.json and .png in {args.output_dir}"
    )


def make_policy(args: argparse.Namespace) -> None:
    args.policy, args.problems = f"{args.output_dir}/policy", f"{args.output_dir}/problems.jsonl"
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    script = str(ROOT / "recipes" / "tiny" / "make_policy.py")
    options = ["--output_dir", args.policy, "--problems", args.problems, "--num_problems", str(NUM_PROBLEMS)]
    subprocess.run([sys.executable, script, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the study and write its JSON file and picture to `args.output_dir`. Return the contents of the JSON file."""
    with open(args.problems, encoding="utf-8") as file:
        problems = [json.loads(line) for line in file]
    policy = AutoModelForCausalLM.from_pretrained(args.policy).requires_grad_(False)
    study = Study(args, policy, AutoTokenizer.from_pretrained(args.policy), problems)
    held_out_rows = study.right(study.held_out, HELD_OUT_SEED)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "trl", "trl-hrm")},
        "settings": vars(args),
        "num_problems": len(study.problems),
        "num_held_out_problems": len(study.held_out),
        "num_held_out_trajectories": len(held_out_rows),
        "seeds": [],
        "runs": [],
    }
    for seed in args.seeds:
        rows = study.right(study.problems, seed)
        result["seeds"].append(study.describe(seed, rows))
        for setting in settings(args):
            result["runs"].append(study.run(setting, seed, rows, held_out_rows))
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "lambda_study.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, output / "lambda_study.png")
    return result


def settings(args: argparse.Namespace) -> list[Setting]:
    """Return λ and scaling of each run. There is one run for λ = 0, which has no scaling."""
    return [
        Setting(kl_coef, scaling) for kl_coef in args.lambdas for scaling in (args.scalings if kl_coef else [None])
    ]


class Study:
    """
    Policy, problems and methods shared by all runs.

    Args:
        args (`argparse.Namespace`):
            Options of [`make_parser`].
        policy ([`~transformers.PreTrainedModel`]):
            Initial policy of every run. It is not modified.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        problems (`list[dict[str, str]]`):
            Problems and answers. The last seventh is held out.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        problems: list[dict[str, str]],
    ):
        self.args = args
        self.policy = policy
        self.tokenizer = tokenizer
        split = len(problems) * 6 // 7
        self.problems, self.held_out = problems[:split], problems[split:]

    def right(self, problems: list[dict[str, str]], seed: int) -> list[dict[str, list[int]]]:
        """Sample solutions and return the right ones as token ids, with labels only on the solution."""
        rows = []
        sampled = self.sample(self.policy, problems, seed, round=0)
        for problem, one in sampled:
            if is_right(one, problem):
                prompt = self.tokenizer.encode(problem["problem"])
                rows.append({"input_ids": prompt + one.token_ids, "labels": [-100] * len(prompt) + one.token_ids})
        if not rows:
            raise ValueError(
                f"{self.args.policy}: none of {len(sampled)} solutions of {len(problems)} problems of {self.args.problems} "
                "is right. Use more problems, or a policy that solves some of them."
            )
        return rows

    def describe(self, seed: int, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Return statistics of the training rows of a seed, and the accuracy before training."""
        described = {
            "seed": seed,
            "num_trajectories": len(rows),
            "num_different": len({tuple(row["input_ids"]) for row in rows}),
            "mean_tokens": statistics.fmean(sum(label != -100 for label in row["labels"]) for row in rows),
            "accuracy": self.accuracy(self.policy, seed),
        }
        print(
            f"seed {seed}: training on {len(rows):,} right solutions, {described['num_different']:,} distinct; "
            f"{shown_accuracy(described['accuracy'])} right",
            flush=True,
        )
        return described

    def run(self, setting: Setting, seed: int, rows: list[dict], held_out_rows: list[dict]) -> dict[str, Any]:
        """Train with one λ. Return the curve on the held-out solutions, the trainer's log, and the accuracy after training."""
        start = time.perf_counter()
        measure = HeldOut(self.policy, held_out_rows, self.tokenizer, self.args.measure_every)
        model, log = self.train(setting, seed, rows, measure)
        found = self.accuracy(model, seed)
        seconds, last = round(time.perf_counter() - start, 1), measure.curve[-1]
        print(
            f"  λ = {setting.kl_coef:g} ({setting.kl_scaling}): LM loss {last['lm_loss']:.4f}, KL {last['kl']:.4f}, "
            f"{shown_accuracy(found)} right, {seconds:.0f} s",
            flush=True,
        )
        shared = {"seed": seed, **setting._asdict(), "accuracy": found, "seconds": seconds}
        return {**shared, "curve": measure.curve, "log": log}

    def sample(
        self, model: PreTrainedModel, problems: list[dict[str, str]], seed: int, round: int
    ) -> list[tuple[dict, Sample]]:
        """Sample `num_samples` solutions per problem at T = 1. The random numbers only depend on seed, problem and round."""

        async def sample_all() -> list[list[Sample]]:
            engine = TransformersEngine(model, self.tokenizer, batch_size=256)
            prompts = [problem["problem"] for problem in problems]
            n, max_tokens = self.args.num_samples, self.args.max_tokens
            requests = [
                engine.sample(self.tokenizer.encode(prompt), n, [], max_tokens, request_seed(seed, prompt, round))
                for prompt in prompts
            ]
            samples = await asyncio.gather(*requests)
            await engine.close()
            return samples

        found = asyncio.run(sample_all())
        return [(problem, one) for problem, samples in zip(problems, found, strict=True) for one in samples]

    def accuracy(self, model: PreTrainedModel, seed: int) -> dict[str, int]:
        """Return the accuracy on new samples of the held-out problems."""
        right = [is_right(one, problem) for problem, one in self.sample(model, self.held_out, seed, round=1)]
        return {"num_right": sum(right), "num_samples": len(right)}

    def train(
        self, setting: Setting, seed: int, rows: list[dict], measure: "HeldOut"
    ) -> tuple[PreTrainedModel, list[dict[str, float]]]:
        """Return the trained policy and the trainer's log."""
        trainer = KLSelfTrainer(
            copy.deepcopy(self.policy).requires_grad_(True),
            KLSelfConfig(
                output_dir=self.args.output_dir,
                kl_coef=setting.kl_coef,
                kl_scaling=setting.kl_scaling or "log1p",
                max_steps=self.args.max_steps,
                per_device_train_batch_size=self.args.batch_size,
                learning_rate=self.args.learning_rate,
                warmup_steps=self.args.max_steps // 10,  # Adam's first steps are large even for small gradients
                logging_steps=self.args.measure_every,
                dataset_kwargs={"skip_prepare_dataset": True},
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[measure],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.model, trainer.state.log_history


def is_right(sample: Sample, problem: dict[str, str]) -> bool:
    return sample.finish == "eos" and extract_answer(sample.text, ["marker"]) == problem["answer"]


if __name__ == "__main__":
    main(make_parser().parse_args())
