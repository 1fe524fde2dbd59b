"""
Make small files in the formats of PRM800K, GSM8K, MATH500 and OpenMathInstruct-2, with easy sums, for `--dry_run` of the scripts in
this folder.

    python recipes/papers/make_dry_run_data.py --output_dir runs/papers-dry-run/data
"""

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path


NAMES = ("Ann", "Ben", "Eva", "Leo", "Mia", "Tom")
THINGS = ("apples", "books", "coins", "eggs", "pens", "stamps")


def problems(rng: random.Random, count: int) -> list[tuple[str, list[str], int]]:
    """Return different problems, each with the steps of a solution and the answer."""
    found = {}
    while len(found) < count:
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        text = f"{name} has {a} {thing} and buys {b} more {thing}. How many {thing} does {name} have now?"
        found[text] = ([f"{name} starts with {a} {thing}.", f"Then {name} buys {b} more: {a} + {b} = {a + b}."], a + b)
    return [(text, *rest) for text, rest in found.items()]


def prm800k_row(rng: random.Random, problem: str, steps: list[str], answer: int) -> dict:
    """Return a solution with a rating for each step. In half of the rows, the last step is wrong."""
    is_right = rng.random() < 0.5
    found = answer if is_right else answer + 1
    steps = [*steps[:-1], f"{steps[-1].replace(f'= {answer}', f'= {found}')}\n\n# Answer\n\n{found}"]
    ratings = [1] * (len(steps) - 1) + [1 if is_right else -1]
    completions = [
        [{"text": text, "rating": rating, "flagged": False}] for text, rating in zip(steps, ratings, strict=True)
    ]
    return {
        "question": {"problem": problem, "ground_truth_answer": str(answer)},
        "label": {
            "steps": [{"completions": one, "human_completion": None, "chosen_completion": 0} for one in completions],
            "finish_reason": "solution" if is_right else "found_error",
        },
    }


def write(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main(output_dir: Path, seed: int) -> None:
    rng = random.Random(seed)
    made = problems(rng, 120)
    parts = [made[start : start + 20] for start in range(0, 120, 20)]
    for part, name in zip(parts, ("train", "test"), strict=False):
        write(output_dir / f"prm800k/phase1_{name}.jsonl", (prm800k_row(rng, *one) for one in part))
    for part, name in zip(parts[2:], ("train", "test"), strict=False):
        rows = ({"question": text, "answer": "\n".join([*steps, f"#### {x}"])} for text, steps, x in part)
        write(output_dir / f"gsm8k/{name}.jsonl", rows)
    for part, name in zip(parts[4:], ("math/train", "math500/test"), strict=False):
        rows = (
            {"problem": text, "solution": f"{' '.join(steps)} The answer is $\\boxed{{{x}}}$.", "answer": str(x)}
            for text, steps, x in part
        )
        write(output_dir / f"{name}.jsonl", rows)
    rows = (
        {
            "problem": text,
            "generated_solution": f"{' '.join(steps)} The answer is \\boxed{{{x}}}.",
            "expected_answer": str(x),
            "problem_source": ("augmented_gsm8k", "augmented_math")[i % 2],
        }
        for i, (text, steps, x) in enumerate(problems(rng, 20))
    )
    write(output_dir / "openmathinstruct2/train.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="output folder")
    parser.add_argument("--seed", type=int, default=42, help="seed of the problems")
    main(**vars(parser.parse_args()))
