"""
Train a small step reward model from scratch on CPU and let it find the wrong step of solutions that it has not seen.

```bash
trl-hrm quickstart
```

The problems are sums of single digits, such as `Start with 7, subtract 2, add 3, subtract 1, add 2.` A solution has one step for each
operation, such as `7 - 2 = 5`. Some results are wrong by one. As in PRM800K, the steps after the first wrong step have no label.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import COUNT, SEED, Config


if TYPE_CHECKING:
    from ..step_tree import StepTree


DIGITS = range(10)
OPERANDS = range(1, 4)
NUM_OPERATIONS = 4
ERROR_RATE = 0.4  # probability of a wrong result
NUM_PROBLEMS = 1000
NUM_SOLUTIONS = 32  # solutions of each training problem
NUM_HELD_OUT = 200  # problems that are not trained on, with one solution each
SOLUTIONS = "solutions.jsonl"


@dataclass(kw_only=True)
class QuickstartConfig(Config):
    """
    Configuration of [`quickstart`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/quickstart"`):
            Folder for the reward model and for `solutions.jsonl`, the held-out solutions. It may hold an earlier quickstart, which is
            replaced.
        max_steps (`int`, *optional*, defaults to `800`):
            Number of training steps.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the problems, the solutions and the training.
    """

    output_dir: str = field(
        default="outputs/quickstart",
        metadata={
            "help": "Folder for the reward model and for solutions.jsonl, the held-out solutions. It may hold an earlier quickstart, "
            "which is replaced."
        },
    )
    max_steps: int = field(default=800, metadata={"help": "Number of training steps.", "range": COUNT})
    seed: int = field(
        default=42, metadata={"help": "Random seed of the problems, the solutions and the training.", "range": SEED}
    )


def quickstart(config: QuickstartConfig) -> str:
    """
    Train a small step reward model on arithmetic and score solutions of held-out problems with it.

    Args:
        config ([`QuickstartConfig`]):
            Output folder, length of the training and seed.

    Returns:
        `str`: Three held-out solutions with the score of each step, in colours if stdout is a terminal, and the number of held-out
        solutions in which scores and labels agree on the first wrong step.

    Raises:
        `FileExistsError`: If `output_dir` has files but no `solutions.jsonl`, so that a model is never replaced by mistake.
        `OSError`: If `output_dir` cannot be written. This is checked first.
    """
    from ..io import claimed_folder

    with claimed_folder(config.output_dir, "output_dir", [SOLUTIONS]) as folder:
        if not (folder / SOLUTIONS).exists() and any(path.name != ".lock" for path in folder.iterdir()):
            raise FileExistsError(
                f"{config.output_dir} has files that do not belong to a quickstart. Choose another `output_dir`."
            )
        return _quickstart(config)


def _quickstart(config: QuickstartConfig) -> str:

    import torch
    from datasets import Dataset

    from ..io import dump_json, replacing
    from ..scoring.scorer import StepScorer
    from ..step_format import STEP_FORMAT_NAME
    from ..terminal import has_color, say
    from ..tiny_model import make_tiny_model, texts_of
    from ..trainer.hrm_reward_config import HRMRewardConfig
    from ..trainer.hrm_reward_trainer import HRMRewardTrainer
    from .score import format_scores

    rng = random.Random(config.seed)
    problems = list({random_problem(rng): None for _ in range(2 * (NUM_PROBLEMS + NUM_HELD_OUT))})
    train = [solution_tree(*problem, NUM_SOLUTIONS, rng) for problem in problems[:NUM_PROBLEMS]]
    held_out = [solution_tree(*problem, 1, rng) for problem in problems[NUM_PROBLEMS:][:NUM_HELD_OUT]]

    rows = [tree.to_row() for tree in train]
    solutions = Path(config.output_dir, SOLUTIONS)
    with replacing(solutions) as file:
        file.writelines(dump_json(tree.to_row(), solutions) + "\n" for tree in held_out)
    say(
        f"Training a reward model on {sum(len(tree.completions) for tree in train):,} steps of {len(train):,} problems."
    )
    texts = (text + "\n\n" for row in rows for text in texts_of(row))  # with the separator, which becomes one token
    # Without it, the untrained model cannot be used if the training is interrupted
    Path(config.output_dir, STEP_FORMAT_NAME).unlink(missing_ok=True)
    make_tiny_model(texts, config.output_dir, vocab_size=400, seed=config.seed)
    trainer = HRMRewardTrainer(
        config.output_dir,
        HRMRewardConfig(
            output_dir=config.output_dir,
            max_steps=config.max_steps,
            per_device_train_batch_size=2,
            max_length=512,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, config.max_steps // 2),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            seed=config.seed,
        ),
        train_dataset=Dataset.from_list(rows),
    )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model of this size is slower with more threads
    try:
        trainer.train()
    finally:
        torch.set_num_threads(num_threads)
    trainer.save_model()

    scores = StepScorer.from_pretrained(config.output_dir).score_trees(held_out)
    num_equal = sum(
        first_wrong(tree.labels) == first_wrong(values) for tree, values in zip(held_out, scores, strict=True)
    )
    places = sorted(range(len(held_out)), key=lambda i: first_wrong(held_out[i].labels) is None)  # with errors first
    shown = "\n\n".join(format_scores(held_out[i], scores[i], has_color()) for i in (places[0], places[1], places[-1]))
    return (
        f"\nSolutions of problems that were not trained on, with the score of each step:\n\n{shown}\n\n"
        f"The model agrees with the labels on the first wrong step in {num_equal} of {len(held_out)} solutions.\n"
        f"Next: trl-hrm score {solutions} --reward_model {config.output_dir}"
    )


def random_problem(rng: random.Random) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Return a start value and operations, each an operator and an operand, with single digits as results."""
    start = value = rng.choice(DIGITS)
    operations = []
    for _ in range(NUM_OPERATIONS):
        allowed = [(op, n) for op in "+-" for n in OPERANDS if apply(value, op, n) in DIGITS]
        operations.append(rng.choice(allowed))
        value = apply(value, *operations[-1])
    return start, tuple(operations)


def apply(value: int, operator: str, operand: int) -> int:
    return value + operand if operator == "+" else value - operand


def solution_tree(
    start: int, operations: tuple[tuple[str, int], ...], num_solutions: int, rng: random.Random
) -> "StepTree":
    """
    Return solutions of a problem as a tree.

    Args:
        start (`int`):
            Start value of the problem.
        operations (`tuple[tuple[str, int], ...]`):
            Operators and operands.
        num_solutions (`int`):
            Number of solutions. Equal beginnings are merged.
        rng (`random.Random`):
            Source of randomness.

    Returns:
        [`StepTree`]: Label 1 for a right result, 0 for the first wrong result, and `None` for the steps after it. A solution ends
        early if its next result is not a single digit.
    """
    from ..step_tree import StepTree

    verbs = {"+": "add", "-": "subtract"}
    prompt = f"Start with {start}, " + ", ".join(f"{verbs[op]} {n}" for op, n in operations) + "."
    chains = []
    for _ in range(num_solutions):
        value, steps, labels = start, [], []
        for op, n in operations:
            right = apply(value, op, n)
            if right not in DIGITS:
                break
            is_wrong = rng.random() < ERROR_RATE
            result = rng.choice([digit for digit in (right - 1, right + 1) if digit in DIGITS]) if is_wrong else right
            steps.append(f"{value} {op} {n} = {result}")
            labels.append(None if 0.0 in labels else float(not is_wrong))
            value = result
        chains.append(StepTree(prompt, steps, labels, list(range(-1, len(steps) - 1))))
    return StepTree.from_chains(chains)[0]


def first_wrong(values: list[float | None]) -> int | None:
    """Return the index of the first label or score below 0.5, or `None` if there is none."""
    return next((i for i, value in enumerate(values) if value is not None and value < 0.5), None)
