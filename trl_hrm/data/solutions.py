"""
Tell whole solutions from lists of steps. Both come as `completions`, and scores of one read as the other mean nothing.

```json
{"prompt": "3 + 4?", "completions": ["Add 3 and 4.", "So \\boxed{7}."]}
{"problem": "3 + 4?", "completions": ["Add. So \\boxed{7}.", "Subtract. So \\boxed{1}."], "pred": "7"}
```

The first row has the steps of one solution. The second is what search-and-learn writes: whole solutions of one problem.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..grading import extract_answer, thinking_spans
from ..search.steps import visible_steps
from ..step_tree import StepTree


ROWS = "rows_of_whole_solutions"  # counts rows that are read as whole solutions
SEVERAL = "rows_with_several_answers"  # counts rows in which several steps of one solution each state an answer
ALL = "rows_with_answers_in_every_step"
_REMEDY = (
    "Give the whole solutions of a problem in a column `candidates` to trl-hrm best-of-n or select-raft, which cut them into "
    "steps, or one solution per row with the list of its steps in `completions`."
)
_SEARCH_AND_LEARN = {"pred", "agg_scores", "completion_tokens"}  # columns that it writes next to `completions`


def count_answers(steps: Sequence[str], notes: Counter, parents: Sequence[int] | None = None) -> None:
    """
    Count a row whose steps look like whole solutions: several steps of one path each state an answer.

    Args:
        steps (`Sequence[str]`):
            S step texts.
        notes (`Counter`):
            Counts the row as `SEVERAL`, and as `ALL` if every step of a path states an answer.
        parents (`Sequence[int]`, *optional*):
            S indices of the step before each step, `-1` for the prompt. By default a chain.
    """
    parents = range(-1, len(steps) - 1) if parents is None else parents
    found, lengths, most, is_all = [], [], 0, False
    for step, parent in zip(steps, parents, strict=True):
        has_answer = isinstance(step, str) and extract_answer(step) is not None
        found.append(has_answer + (found[parent] if parent >= 0 else 0))
        lengths.append(1 + (lengths[parent] if parent >= 0 else 0))
        most = max(most, found[-1])
        is_all = is_all or lengths[-1] == found[-1] > 1
    if most > 1:
        notes[SEVERAL] += 1
        if is_all:
            notes[ALL] += 1


def check_answers(notes: Mapping[str, int], num_rows: int, source: str) -> None:
    """
    Refuse rows that are whole solutions instead of steps.

    Args:
        notes (`Mapping[str, int]`):
            What [`count_answers`] counted.
        num_rows (`int`):
            Number of rows with `completions`.
        source (`str`):
            What was read, for the message.

    Raises:
        `ValueError`: If every step states an answer in most rows.
    """
    number = notes.get(ALL, 0)
    if 2 * number > num_rows:
        raise ValueError(
            f"{source}: every one of several `completions` states an answer in {number:,} of {num_rows:,} rows, expected the steps of "
            f"one solution. They look like whole solutions. {_REMEDY}"
        )


def solution_warnings(notes: Mapping[str, int]) -> list[str]:
    """Warnings made of what [`count_answers`] and [`read_whole_solutions`] counted."""
    warnings = []
    if notes.get(ROWS):
        warnings.append(
            f"{notes[ROWS]:,} rows have `problem` and `completions`, as search-and-learn writes them: each completion is read as a "
            "whole solution, and the bare problem as its prompt."
        )
    if notes.get(SEVERAL):
        warnings.append(
            f"{notes[SEVERAL]:,} rows have several `completions` that each state an answer. They are read as the steps of one "
            f"solution; if they are whole solutions, their scores mean nothing. {_REMEDY}"
        )
    return warnings


def leave_out_thinking(tree: StepTree, where: str, keep_thinking: bool = False) -> tuple[StepTree, list[int]]:
    """
    Return the tree without a reasoning model's thinking, and the places of its steps in the tree that was given.

    Args:
        tree ([`StepTree`]):
            Steps. Thinking may reach over several of them.
        where (`str`):
            Place of the tree, for the error message.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Whether only its tags are left out.

    Raises:
        `ValueError`: If a tree with branches has thinking.
    """
    steps = list(range(len(tree.completions)))
    if not any(map(thinking_spans, tree.completions)):
        return tree, steps
    if tree.parents != list(range(-1, len(steps) - 1)):
        raise ValueError(
            f"{where}: found the thinking of a reasoning model in a tree with branches, where it is not clear which steps it reaches "
            "over. Remove it, or give each solution as a row of its own."
        )
    texts = visible_steps(tree.completions, keep_thinking)
    steps = [step for step in steps if texts[step].strip()]
    return replace(tree.take(steps), completions=[texts[step].strip() for step in steps]), steps


def read_whole_solutions(
    rows: Iterable[tuple[str, dict[str, Any]]], notes: Counter
) -> list[tuple[str, dict[str, Any]]]:
    """
    Return rows with their places, in which the `completions` of rows without a `prompt` have become `candidates`, and the
    `problem` the prompt.

    search-and-learn writes such rows. They are recognised by its other columns, or because several completions each state an
    answer. One such row decides for all rows without a `prompt`, because solutions that were cut off state no answer.

    Args:
        rows (`Iterable[tuple[str, dict[str, Any]]]`):
            Place and row.
        notes (`Counter`):
            Counts the rows that are changed, as `ROWS`.

    Raises:
        `ValueError`: If there are rows without a `prompt` and it is not clear whether their `completions` are steps.
    """
    rows = list(rows)
    unclear = [
        i
        for i, (_, row) in enumerate(rows)
        if isinstance(row.get("problem"), str)
        and isinstance(row.get("completions"), list)
        and all(row.get(name) is None for name in ("prompt", "completion", "candidates"))
    ]
    if not unclear:
        return rows
    found = Counter()
    for i in unclear:
        count_answers(rows[i][1]["completions"], found)
    if not found[SEVERAL] and not any(_SEARCH_AND_LEARN & rows[i][1].keys() for i in unclear):
        where, row = rows[unclear[0]]
        raise ValueError(
            f"{where}: found `problem` and `completions` without `prompt` among the keys {sorted(row)}, and no two of the "
            "completions state an answer, so that they may be whole solutions or the steps of one. Rename `completions` to "
            "`candidates` if they are whole solutions, and `problem` to `prompt`."
        )
    for i in unclear:
        where, row = rows[i]
        rest = {name: value for name, value in row.items() if name != "completions"}
        rows[i] = where, rest | {"prompt": row["problem"], "candidates": row["completions"]}
    notes[ROWS] += len(unclear)
    return rows
