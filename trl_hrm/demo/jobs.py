"""Jobs of the demo that are not commands: create problems and policy, measure with the checker, and train in this process."""

import importlib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..io import dump_json, read_json_lines, write_json


NUM_PROBLEMS = 6000  # out of 6,480 possible ones, before removing problems that are not trained on
SOLUTIONS = 6  # per labelled problem


def train(name: str, settings: dict[str, Any], **more: Any) -> None:
    """Run the training of `trl-hrm reward` or `trl-hrm kl-self` in this process."""
    script = importlib.import_module(f"..scripts.{name}", __package__)
    script.main(*script.make_parser().parse_dict(settings), **more)


def make_world(folder: str, num_train: int, num_test: int, num_starts: int, num_judged: int, seed: int) -> None:
    """Write training problems, test problems, problems with a wrong prefix, and trees with first-error labels, all of distinct problems."""
    from .measures import slipped
    from .policy import solution_text
    from .world import different_problems, solution_tree, sticky

    rng = random.Random(seed)
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    problems = iter(different_problems(rng, num_train + num_test + num_starts + 2 * num_judged))

    def take(number: int) -> list:
        return [next(problems) for _ in range(number)]

    for name, number in (("train", num_train), ("test", num_test)):
        _write(out / f"{name}.jsonl", ({"problem": p.text(), "answer": str(p.values()[-1])} for p in take(number)))
    starts = [(problem, slipped(problem, rng)) for problem in take(num_starts)]
    _write(
        out / "starts.jsonl",
        (
            {
                "problem": p.text(),
                "answer": str(p.values()[-1]),
                "steps": steps,
                "prefix": solution_text(steps) + "\n\n",
            }
            for p, steps in starts
        ),
    )
    trees = [solution_tree(problem, SOLUTIONS, rng) for problem in take(num_judged)]
    _write(out / "judged-prm.jsonl", (sticky(tree).to_row() for tree in trees))
    _write(out / "judged-hrm.jsonl", (sticky(tree, merged=True).to_row() for tree in trees))
    _write(out / "held-out.jsonl", (solution_tree(problem, SOLUTIONS, rng).to_row() for problem in take(num_judged)))


def make_policy(world: str, folder: str, steps: int, seed: int) -> None:
    """Train a policy on all problems except those written by [`make_world`]."""
    from .policy import train_policy
    from .world import Problem, different_problems

    kept = {Problem.parse(row[key]) for file, key in _FILES for row in _read(Path(world, file))}
    problems = [problem for problem in different_problems(random.Random(seed), NUM_PROBLEMS) if problem not in kept]
    train_policy(folder, problems, steps, seed)
    _keep(str(Path(folder, "problems.json")), {"num_problems": len(problems)})


_FILES = (
    ("train.jsonl", "problem"),
    ("test.jsonl", "problem"),
    ("starts.jsonl", "problem"),
    ("held-out.jsonl", "prompt"),
)


def measure_policy(run: str, output: str) -> None:
    from .measures import measure_policy

    _keep(output, measure_policy(run))


def measure_values(run: str, world: str, num_problems: int, cap: int, output: str) -> None:
    """Measure the MC scores of a search on the first problems, so that searches with different maximum depths are comparable."""
    from .measures import measure_values

    problems = {row["problem"] for row in _read(Path(world, "train.jsonl"))[:num_problems]}
    _keep(output, {"cap": cap, **measure_values(run, problems)})


def measure_tree(run: str, output: str) -> None:
    from .measures import small_tree

    _keep(output, small_tree(run))


def measure_model(model: str, world: str, spans: list[list[int]], seed: int, output: str) -> None:
    """Score held-out steps and possible steps after slips with a reward model."""
    from ..scoring.scorer import StepScorer
    from ..step_tree import StepTree
    from .measures import measure_kinds, measure_scores
    from .world import Problem

    scorer = StepScorer.from_pretrained(model, batch_size=16)
    trees = [StepTree.from_row(row) for row in _read(Path(world, "held-out.jsonl"))]
    starts = [(Problem.parse(row["problem"]), row["steps"]) for row in _read(Path(world, "starts.jsonl"))]
    kinds = [{"spans": span, **measure_kinds(scorer, starts, span, seed)} for span in spans]
    _keep(output, {**measure_scores(scorer, trees), "kinds": kinds})


def self_train(settings: dict[str, Any]) -> None:
    """Train the policy on its best solutions, and measure it every few steps on solutions of held-out problems."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .held_out import HeldOut

    policy = settings["model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(policy)
    rows = []
    for row in load_dataset(settings["dataset_name"], split="test"):
        prompt, answer = (tokenizer.encode(row[name]) for name in ("prompt", "completion"))
        answer.append(tokenizer.eos_token_id)
        rows.append({"input_ids": [*prompt, *answer], "labels": [-100] * len(prompt) + answer})
    reference = AutoModelForCausalLM.from_pretrained(policy).requires_grad_(False)
    measured = HeldOut(reference, rows, tokenizer, max(settings["max_steps"] // 15, 1))
    train("kl_self", settings, callbacks=[measured])
    write_json(Path(settings["output_dir"], "held_out.json"), {**settings, "curve": measured.curve})


def _keep(output: str, found: dict[str, Any]) -> None:
    """Write measurements to a JSON file."""
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(output), found)


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(dump_json(row, path) + "\n" for row in rows), encoding="utf-8")


def _read(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_json_lines(path, "Delete the folder of the demo and run it again.")]
