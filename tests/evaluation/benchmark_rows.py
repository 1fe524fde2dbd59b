"""Hand-written rows of the step-judging benchmarks, and scorers with given scores."""

from collections.abc import Callable

from trl_hrm import StepFormat
from trl_hrm.scoring.tree_scorer import TreeScorer

from ..helpers import tiny_tokenizer


def process_row(
    number: int, label: int, num_steps: int = 3, subset: str = "gsm8k", problem: str | None = None
) -> dict:
    """Return a row of ProcessBench. Each step's text says whether it is right."""
    says = ["ok"] * num_steps if label < 0 else ["ok"] * label + ["bad"] + ["after"] * (num_steps - label - 1)
    return {
        "id": f"{subset}-{number}",
        "generator": "by hand",
        "problem": problem or f"What is {number} + {number}?",
        "steps": [f"{word} {number}.{i}" for i, word in enumerate(says)],
        "final_answer_correct": label < 0,
        "label": label,
    }


def prm_row(number: int, classification: str, wrong: list[int], num_steps: int = 3) -> dict:
    """Return a row of PRMBench. `wrong` counts steps from 1."""
    return {
        "idx": f"prm_test_p1_{number}",
        "classification": classification,
        "original_question": f"What is {number} + {number}?",
        "modified_question": f"What is {number} + {number}, please?",
        "original_process": [f"ok {number}.{i}" for i in range(num_steps)],
        "modified_process": [
            f"{'bad' if i + 1 in wrong else 'ok'} {classification} {number}.{i}" for i in range(num_steps)
        ],
        "modified_steps": wrong,
        "error_steps": wrong,
        "reason": "by hand",
        "question": f"What is {number} + {number}?",
    }


def mistake_row(number: int, mistake_index: int | None, num_steps: int = 3) -> dict:
    """Return a row of BIG-Bench Mistake."""
    row = process_row(number, -1 if mistake_index is None else mistake_index, num_steps)
    return {
        "input": row["problem"],
        "steps": row["steps"],
        "target": "1",
        "answer": "1" if mistake_index is None else "2",
        "mistake_index": mistake_index,
    }


class SayingScorer(TreeScorer):
    """Scores a step by its text, and records the steps that it scored."""

    def __init__(self, score_of: Callable[[str], float], max_positions: int | None = None):
        super().__init__(tiny_tokenizer(), StepFormat(), max_positions)
        self.score_of = score_of
        self.asked: list[tuple[str, list[str]]] = []

    def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
        self.asked += [(prompt, steps) for prompt, group in zip(prompts, candidates, strict=True) for steps in group]
        return [[[self.score_of(step) for step in steps] for steps in group] for group in candidates]


def knows(step: str) -> float:
    """Return the score from a reward model that knows the truth."""
    return 0.1 if step.startswith("bad") else 0.9
