"""Readers of the rows of ProcessBench, MR-GSM8K, PRMBench and BIG-Bench Mistake, for evaluation and for training."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..io import shown
from ..step_tree import StepTree
from .faults import RowError


MR_STEP = "model_output_solution_first_error_step"
MR_CORRECTNESS = "model_output_solution_correctness"
MR_STEPS = ("model_output_step_format", "model_output_steps")  # in order of preference
CATEGORIES = {
    "simplicity": ("redundency", "circular"),
    "soundness": ("counterfactual", "step_contradiction", "domain_inconsistency", "confidence"),
    "sensitivity": ("missing_condition", "deception", "multi_solutions"),
}
CLASSES = tuple(name for names in CATEGORIES.values() for name in names)
CORRECT_FROM = "redundency"
PROCESS_BENCH_COLUMNS = ("problem", "steps", "label")
PRM_BENCH_COLUMNS = (
    "idx",
    "classification",
    "original_question",
    "modified_question",
    "original_process",
    "modified_process",
    "error_steps",
)
BIG_BENCH_MISTAKE_COLUMNS = ("input", "steps", "mistake_index")
BENCHMARK = "rows_of_"  # prefix of the counts of rows by benchmark
ORIGINAL_PROMPT = "original_prompt"  # column with the problem that the prompt was changed from


class Place(NamedTuple):
    """
    Location of a row: `where` (file and line, or source and row) for messages, `name` of the file or split, index
    `row` from 0, and the number of the `first_step` in its labels.
    """

    where: str
    name: str
    row: int
    first_step: int = 0


@dataclass(frozen=True)
class Solution:
    """
    A solution with the labels of a benchmark.

    Args:
        where (`str`):
            File and line, or row, of the solution.
        subset (`str`):
            Subset of the benchmark.
        id (`str`):
            Id in the benchmark.
        problem (`str`):
            Problem shown to the reward model.
        steps (`list[str]`):
            Texts of the S steps.
        labels (`list[int | None]`):
            1 for a correct step, 0 for a wrong step, `None` for an unlabelled step.
        origin (`str`):
            Original problem. Solutions with the same origin are drawn together in the bootstrap, and are in the same
            validation split.
    """

    where: str
    subset: str
    id: str
    problem: str
    steps: list[str]
    labels: list[int | None]
    origin: str

    @property
    def first_error(self) -> int:
        """Index of the first wrong step, or -1 if no step is wrong."""
        return self.labels.index(0) if 0 in self.labels else -1


def parse_process_bench(record: dict[str, Any], place: Place, notes: Counter) -> list[Solution]:
    """Parse one row of ProcessBench, or of MR-GSM8K after [`adapt`]."""
    steps = steps_of(record, "steps", place.where)
    problem = text_of(record, "problem", place.where)
    if MR_STEP in record:
        labels = _mr_labels(record, steps, place._replace(first_step=1))
    else:
        labels = first_error_labels(record["label"], steps, -1, "label", place)
    subset = place.name if record.get("subset") is None else str(record["subset"])
    name = f"{place.name}-{place.row}" if record.get("id") is None else str(record["id"])
    return [Solution(place.where, subset, name, problem, steps, labels, origin=problem)]


def adapt(record: dict[str, Any]) -> dict[str, Any]:
    """Convert a row of MR-GSM8K or MR-MATH to the columns of ProcessBench. Return other rows unchanged."""
    column = next((name for name in MR_STEPS if isinstance(record.get(name), list)), None)
    if column is None or MR_STEP not in record or "question" not in record:
        return record
    # each step of MR-MATH is a list with one element
    steps = [step[0] if isinstance(step, list) and len(step) == 1 else step for step in record[column]]
    columns = {"problem": record["question"], "steps": steps, "label": record[MR_STEP]}
    names = [str(record[name]) for name in ("uuid", "id") if record.get(name) is not None]
    return record | columns | ({"id": names[0]} if names else {})


def _mr_labels(record: dict[str, Any], steps: Sequence[str], place: Place) -> list[int | None]:
    value, correctness = record[MR_STEP], record.get(MR_CORRECTNESS)
    if isinstance(value, str):
        value = value.strip()
        value = int(value) if value.isdecimal() else None if value.lower() in ("n/a", "na", "none", "") else value
    labels = first_error_labels(value, steps, None, MR_STEP, place)
    is_right = {"correct": True, "wrong": False, "incorrect": False}.get(str(correctness).strip().lower())
    if isinstance(correctness, bool):
        is_right = correctness
    if is_right is not None and is_right != (0 not in labels):
        raise RowError(
            "label_contradicts_correctness",
            place.where,
            f"`{MR_CORRECTNESS}` is {shown(correctness)}, but `{MR_STEP}` is {shown(record[MR_STEP])}. Expected a step if and only if the "
            "solution is wrong.",
        )
    return labels


def parse_prm_bench(record: dict[str, Any], place: Place, notes: Counter) -> list[Solution]:
    """Parse one row of PRMBench: the modified solution and, for rows of `CORRECT_FROM`, the original solution."""
    where, kind, name = place.where, record["classification"], str(record["idx"])
    if kind not in CLASSES:
        raise RowError(
            "unknown_classification",
            where,
            f"`classification` is {shown(kind)}, expected one of {', '.join(CLASSES)}.",
        )
    steps = steps_of(record, "modified_process", where)
    original = text_of(record, "original_question", where)
    # Each class spells the formulas of the original problem in its own way. `question` has one spelling
    origin = original if record.get("question") is None else text_of(record, "question", where)
    labels = _prm_bench_labels(record["error_steps"], steps, where, notes)
    solutions = [Solution(where, kind, name, text_of(record, "modified_question", where), steps, labels, origin)]
    if kind == CORRECT_FROM:
        steps = steps_of(record, "original_process", where)
        solutions.append(Solution(where, "correct", name, original, steps, [1] * len(steps), origin))
    return solutions


def _prm_bench_labels(error_steps: Any, steps: Sequence[str], where: str, notes: Counter) -> list[int]:
    numbers = error_steps if isinstance(error_steps, list) else [None]
    if not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise RowError(
            "bad_label",
            where,
            f"`error_steps` is {shown(error_steps)}, expected a list of numbers from 1. Correct the row, or remove it.",
        )
    notes["error_steps_past_the_end"] += sum(number > len(steps) for number in numbers)
    return [int(number not in numbers) for number in range(1, len(steps) + 1)]


def parse_big_bench_mistake(record: dict[str, Any], place: Place, notes: Counter) -> list[Solution]:
    """Parse one row of BIG-Bench Mistake."""
    steps = steps_of(record, "steps", place.where)
    problem = text_of(record, "input", place.where)
    labels = first_error_labels(record["mistake_index"], steps, None, "mistake_index", place)
    return [Solution(place.where, place.name, f"{place.name}-{place.row}", problem, steps, labels, origin=problem)]


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    """Return the text of a column. Raise [`RowError`] if it is not a non-empty string."""
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "no_problem",
            where,
            f"`{column}` is {shown(value)}, expected a non-empty string. Correct the row, or remove it.",
        )
    return value


def steps_of(record: dict[str, Any], column: str, where: str) -> list[str]:
    """Return the steps of a column, including blank ones. Raise [`RowError`] if it is not a non-empty list of strings."""
    steps = record[column]
    if not isinstance(steps, list) or not steps:
        raise RowError(
            "no_steps",
            where,
            f"`{column}` is {shown(steps)}, expected a list of steps. Correct the row, or remove it.",
        )
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            raise RowError(
                "bad_step",
                where,
                f"`{column}[{i}]` is {shown(step)}, expected a string. Correct the row, or remove it.",
            )
    return steps


def first_error_labels(
    value: Any, steps: Sequence[str], none: int | None, column: str, place: Place
) -> list[int | None]:
    """
    Return step labels from the number of the first wrong step. Steps after it are unlabelled.

    Args:
        value (`int` or `None`):
            Number of the first wrong step, counted from `place.first_step`, or a value for no error: `none`, or 0 if
            labels count from 1. Integer-valued floats are converted and NaN is treated as `None`, because tables with
            missing values contain them.
        steps (`Sequence[str]`):
            Texts of the S steps.
        none (`int` or `None`):
            Value for no error in this benchmark.
        column (`str`):
            Name of the column, for messages.
        place ([`Place`]):
            Location of the row.
    """
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    first = place.first_step
    no_error = (none, *range(first))
    if not isinstance(value, bool) and value in no_error:
        return [1] * len(steps)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value - first < len(steps):
        hint = (
            " If the labels count from 1, subtract 1 from them (trl-hrm benchmark has --first_step 1)."
            if not first and value == len(steps)
            else ""
        )
        raise RowError(
            "bad_label",
            place.where,
            f"`{column}` is {shown(value)}, expected the index of the first wrong step of {len(steps)} steps"
            f"{', counted from 1' if first else ''}, or {' or '.join(map(json.dumps, no_error))} for no error. Correct the row, or "
            f"remove it.{hint}",
        )
    index = value - first
    return [1] * index + [0] + [None] * (len(steps) - index - 1)


def is_benchmark_row(record: dict[str, Any]) -> bool:
    """Return whether a row has the columns of ProcessBench, MR-GSM8K, PRMBench or BIG-Bench Mistake."""
    record = adapt(record)
    keys = record.keys()
    if isinstance(record.get("label"), list):  # step labels under another name, not the index of the first wrong step
        return False
    return any(
        keys >= set(columns) for columns in (PROCESS_BENCH_COLUMNS, PRM_BENCH_COLUMNS, BIG_BENCH_MISTAKE_COLUMNS)
    )


def parse_benchmark_row(record: dict[str, Any], where: str, notes: Counter, view: str = "tree") -> list[StepTree]:
    """
    Return the labelled solutions of a row as step trees of one path each, for training.

    Of a first-error benchmark, steps after the first wrong step have no label. A row of PRMBench has two solutions: the modified one,
    and the original one, whose steps are all correct. The original problem is kept in the column `original_prompt`. See
    [`~data.build.original_prompt`]. For `view="orm"`, a solution is wrong if any of its steps is wrong, also if later steps are correct or
    have no label.

    Args:
        record (`dict[str, Any]`):
            Row for which [`is_benchmark_row`] is true.
        where (`str`):
            Location of the row, for error messages.
        notes (`Counter`):
            Counter of the rows of each benchmark, and of anomalies that are ignored. It is updated in place.
        view (`str`, *optional*, defaults to `"tree"`):
            View that is built.

    Raises:
        [`RowError`]: If the row has no problem or no steps, or an invalid label.
    """
    record, place = adapt(record), Place(where, "", 0)
    if "modified_process" in record:
        kind, solutions = "prmbench", parse_prm_bench(record, place, notes)[:1]
        steps, original = steps_of(record, "original_process", where), record["original_question"]
        solutions.append(Solution(where, "", "", original, steps, [1] * len(steps), solutions[0].origin))
    elif "mistake_index" in record:
        kind, solutions = "bigbenchmistake", parse_big_bench_mistake(record, place, notes)
    else:
        kind, solutions = "mrgsm8k" if MR_STEP in record else "processbench", parse_process_bench(record, place, notes)
    notes[BENCHMARK + kind] += 1
    trees = []
    for solution in solutions:
        for i, step in enumerate(solution.steps):
            if not step.strip():
                raise RowError(
                    "blank_step", where, f"step {i} is {shown(step)}, expected a non-empty string. Remove the row."
                )
        labels = [None if label is None else float(label) for label in solution.labels]
        if view == "orm":
            labels = [None] * (len(labels) - 1) + [float(0.0 not in labels)]
        extra = {ORIGINAL_PROMPT: solution.origin} if "modified_process" in record else {}
        trees.append(
            StepTree.from_row(
                {"prompt": solution.problem, "completions": solution.steps, "labels": labels, **extra}, where
            )
        )
    return trees
