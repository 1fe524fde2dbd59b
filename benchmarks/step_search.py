"""
Time of a step search spent in the policy, in the scorer, and in the rest, which is our own code (target: below 5 %).

```bash
python benchmarks/step_search.py
```

1. *Split.* A tiny policy trained for a minute on synthetic arithmetic problems, and a tiny reward model with random weights, both in this
   process. Answers are graded by math-verify, and every event is logged. Policy is the time in which the engine has requests, and scorer
   is the time of its calls. The rest is the remaining wall time: records, the log, selection, and grading that takes longer than the scorer.
   With real models, which are slower, the share of the rest is smaller.
2. *One call per depth.* The same trees are scored again, with all problems of a depth in one call, as in the search, and with one call per
   problem.
3. *Own code only.* A scripted policy without latency and a constant reward model. The result is steps per second, including work that
   otherwise overlaps with the engine.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import EqualGrader, version_words
from transformers.utils import logging

from trl_hrm import StepFormat
from trl_hrm.grading import AnswerGrader
from trl_hrm.scoring.scorer import StepScorer
from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.engines.transformers import TransformersEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.prompts import Prompt
from trl_hrm.search.scheduler import Progress, Scheduler, SchedulerConfig
from trl_hrm.search.step_search import BeamSearch, DiverseTreeSearch, GreedyStepSearch, StepSearch
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Problem
from trl_hrm.step_tree import StepTree
from trl_hrm.tiny_model import make_tiny_model


RULE = RULES["step_header"]
PROMPT = Prompt("world", "{question}", rule="step_header", final_stops=("# END!",), style="plain")
LIMITS = {"rule": RULE, "final_stops": PROMPT.final_stops, "max_depth": 8, "max_step_tokens": 40}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_problems", type=int, default=16, help="number of problems (default: 16)")
    parser.add_argument(
        "--n", type=int, default=16, help="number of next steps per depth, a multiple of 4 (default: 16)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds (default: 3)")
    parser.add_argument("--policy_steps", type=int, default=700, help="training steps of the policy (default: 700)")
    args = parser.parse_args()
    versions = version_words(("torch", "transformers", "math-verify"))
    print(f"python {platform.python_version()}, {versions}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}\n")
    logging.disable_progress_bar()
    searches = {
        "greedy": GreedyStepSearch(num_candidates=args.n, **LIMITS),
        "beam": BeamSearch(width=args.n // 4, expansion=4, **LIMITS),
        "diverse trees": DiverseTreeSearch(num_trees=args.n // 4, width=4, **LIMITS),
    }
    with tempfile.TemporaryDirectory() as folder:
        problems = make_models(Path(folder), args)
        scorer = RecordingScorer(StepScorer.from_pretrained(f"{folder}/hrm"))
        found: dict[str, list[Progress]] = {name: [] for name in searches}
        with AnswerGrader() as grader:
            # Warm-up: one-time loading is not measured
            run_search(searches["greedy"], problems[:1], scorer, grader, load_engine(folder))
            scorer.calls.clear()
            for _ in range(args.rounds):
                for name, search in searches.items():
                    found[name].append(run_search(search, problems, scorer, grader, load_engine(folder)))
        show_split(found, args)
        show_calls(scorer, args)
    show_ours(searches["greedy"], args)


class RecordingScorer:
    """Scores trees and records them."""

    def __init__(self, scorer: StepScorer):
        self.scorer = scorer
        self.calls: list[list[StepTree]] = []

    def __call__(self, trees: list[StepTree]) -> list[list[float]]:
        self.calls.append(trees)
        return self.scorer.score_trees(trees)


def make_models(folder: Path, args: argparse.Namespace) -> list[tuple[int, Problem]]:
    """Create a trained policy, a reward model with random weights, and problems."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "tiny" / "make_policy.py"
    command = [
        sys.executable,
        str(recipe),
        "--output_dir",
        f"{folder}/policy",
        "--problems",
        f"{folder}/problems.jsonl",
    ]
    options = ["--num_problems", str(args.num_problems), "--max_steps", str(args.policy_steps)]
    subprocess.run([*command, *options], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "problems.jsonl").read_text().splitlines()]
    make_tiny_model([row["problem"] for row in rows], str(folder / "hrm"), kind="token", vocab_size=320)
    StepFormat().save(folder / "hrm")
    return [(i, Problem(f"p{i}", row["problem"], row["answer"])) for i, row in enumerate(rows)]


def load_engine(folder: str) -> TransformersEngine:
    return TransformersEngine.from_pretrained(f"{folder}/policy", batch_size=64)


def run_search(search: StepSearch, problems: list[tuple[int, Problem]], score, grader, engine) -> Progress:
    return asyncio.run(search_once(search, problems, score, grader, engine))


async def search_once(search: StepSearch, problems: list[tuple[int, Problem]], score, grader, engine) -> Progress:
    config = SchedulerConfig(max_in_flight=256)
    with tempfile.TemporaryDirectory() as logs, EventLog(Path(logs, "log.jsonl"), write=True) as log:
        try:
            scheduler = Scheduler(engine, search, grader, PROMPT, search.rule, log, config=config, score=score)
            progress = await scheduler.run(problems)
        finally:
            await engine.close()
    progress.total = progress.seconds  # `seconds` keeps counting
    return progress


def show_split(found: dict[str, list[Progress]], args: argparse.Namespace) -> None:
    print(f"Split: {args.num_problems} problems, N = {args.n}, {args.rounds} rounds; seconds per problem (median)\n")
    print("| search | policy | scorer | rest | rest, share (all rounds) | tokens | scorer calls | steps scored |")
    print("|---|---|---|---|---|---|---|---|")
    for name, runs in found.items():
        rests = [run.total - run.policy_seconds - run.scorer_seconds for run in runs]
        parts = [[run.policy_seconds for run in runs], [run.scorer_seconds for run in runs], rests]
        seconds = " | ".join(f"{statistics.median(part) / args.num_problems:.4f}" for part in parts)
        shares = [rest / run.total for rest, run in zip(rests, runs, strict=True)]
        every = ", ".join(f"{share:.1%}" for share in shares)
        last = runs[-1]
        print(
            f"| {name} | {seconds} | {statistics.median(shares):.1%} ({every}) | {last.generated_tokens:,} | {last.num_calls} | "
            f"{last.num_steps:,} |"
        )


def show_calls(scorer: RecordingScorer, args: argparse.Namespace) -> None:
    """Repeat the scoring of the last round, with one call per depth and with one call per problem and depth."""
    calls = scorer.calls[-(len(scorer.calls) // args.rounds) :]
    ways = {"one call per depth": calls, "one call per problem and depth": [[tree] for call in calls for tree in call]}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            for trees in way:
                scorer.scorer.score_trees(trees)
            seconds[name].append(time.perf_counter() - began)
    print("\nScoring of the last round, repeated\n")
    print("| way | calls | seconds (median; all) |\n|---|---|---|")
    for name, way in ways.items():
        every = ", ".join(f"{value:.2f}" for value in seconds[name])
        print(f"| {name} | {len(way)} | {statistics.median(seconds[name]):.2f} ({every}) |")


def write(prefix: str, rng: random.Random) -> str:
    """Return a short step. A sixth of the steps end the solution."""
    step = "".join(rng.choices("abcdefgh ", k=rng.randint(10, 30)))
    number = prefix.count("# Step ")
    return f"{step}\n# END!" if rng.random() < 1 / 6 else f"{step}\n\n# Step {max(number, 1) + 1}\n"


def show_ours(search: StepSearch, args: argparse.Namespace) -> None:
    problems = [(i, Problem(f"p{i}", f"Question {i}", "7")) for i in range(100)]
    runs = []
    for _ in range(args.rounds):
        progress = run_search(
            search,
            problems,
            lambda trees: [[0.5] * len(tree.completions) for tree in trees],
            EqualGrader(),
            ScriptedEngine(write),
        )
        runs.append(progress.num_sequences / progress.total)
    every = ", ".join(f"{rate:,.0f}" for rate in runs)
    print(
        f"\nOwn code only: {statistics.median(runs):,.0f} steps/s ({every}), including the scripted policy and the log"
    )


if __name__ == "__main__":
    main()
