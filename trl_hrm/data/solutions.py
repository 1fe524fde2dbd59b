"""
Distinguish whole solutions from lists of steps. Datasets use the column `completions` for both, and scores are meaningless if one
is read as the other.

```json
{"prompt": "3 + 4?", "completions": ["Add 3 and 4.", "So \\boxed{7}."]}
{"problem": "3 + 4?", "completions": ["Add. So \\boxed{7}.", "Subtract. So \\boxed{1}."], "pred": "7"}
```

The first row has the steps of one solution. The second row has whole solutions of one problem, as written by search-and-learn.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..grading import extract_answer, thinking_spans
from ..io import shown
from ..search.outcomes import MIN_LINES, step_warnings
from ..search.steps import StepRule, visible_steps
from ..step_tree import StepTree


ROWS = "rows_of_whole_solutions"  # counts rows that are read as whole solutions
SEVERAL = "rows_with_several_answers"  # counts rows in which several steps of one solution each state an answer
ALL = "rows_with_answers_in_every_step"
# Texts of several lines, and those of them in which the step rule finds no steps
LONG, UNSPLIT = "texts_of_several_lines", "texts_of_several_lines_without_steps"
_REMEDY = (
    "For whole solutions, put all solutions of a problem in a column `candidates` and use trl-hrm best-of-n or select-raft, which "
    "split them into steps. Otherwise, put the steps of one solution per row in `completions`."
)
_SEARCH_AND_LEARN = {"pred", "agg_scores", "completion_tokens"}  # columns written by search-and-learn


def count_answers(steps: Sequence[str], notes: Counter, parents: Sequence[int] | None = None) -> None:
    """
    Count a row if its steps look like whole solutions, because several steps of one path each state an answer.

    Args:
        steps (`Sequence[str]`):
            S step texts.
        notes (`Counter`):
            Counter to update: `SEVERAL` if several steps of a path state an answer, and also `ALL` if every step of a path does.
        parents (`Sequence[int]`, *optional*):
            S indices of the step before each step, `-1` for the prompt. Defaults to a single path.
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


def count_unsplit_text(steps: Sequence[str], rule: StepRule, notes: Counter) -> None:
    """
    Count a solution that was given as a text if it has several lines, and if the step rule finds nothing in them.

    Args:
        steps (`Sequence[str]`):
            Steps of the text.
        rule ([`StepRule`]):
            Rule that it was split with.
        notes (`Counter`):
            Counts for [`solution_warnings`].
    """
    if sum(bool(line.strip()) for step in steps for line in step.splitlines()) >= MIN_LINES:
        has_mark = not rule.keeps_thinking and re.search(rule.pattern, steps[0])
        notes[LONG] += 1
        notes[UNSPLIT] += len(steps) == 1 and not has_mark


def check_answers(notes: Mapping[str, int], num_rows: int, source: str) -> None:
    """
    Raise an error if the rows contain whole solutions instead of steps.

    Args:
        notes (`Mapping[str, int]`):
            Counts of [`count_answers`].
        num_rows (`int`):
            Number of rows with `completions`.
        source (`str`):
            Name of the source, for the error message.

    Raises:
        `ValueError`: If, in more than half of the rows, every step states an answer.
    """
    number = notes.get(ALL, 0)
    if 2 * number > num_rows:
        raise ValueError(
            f"{source}: in {number:,} of {num_rows:,} rows, every item of `completions` states an answer. These look like whole "
            f"solutions, but `completions` must contain the steps of one solution. {_REMEDY}"
        )


def solution_warnings(notes: Mapping[str, int], rule: str | None = None) -> list[str]:
    """
    Return warnings for the counts of [`count_answers`], [`read_whole_solutions`] and [`~data.candidates.CandidateRows`].

    Args:
        notes (`Mapping[str, int]`):
            The counts.
        rule (`str`, *optional*):
            Name of the step rule that splits texts.
    """
    unsplit = {"long": notes.get(LONG, 0), "unsplit": notes.get(UNSPLIT, 0)}
    warnings = step_warnings(unsplit, {"steps": {"name": rule}})
    if notes.get(ROWS):
        warnings.append(
            f"{notes[ROWS]:,} rows have `problem` and `completions`, as written by search-and-learn. Each completion is read as a whole "
            "solution, with the bare problem as its prompt."
        )
    if notes.get(SEVERAL):
        warnings.append(
            f"in {notes[SEVERAL]:,} rows, several items of `completions` each state an answer. They are read as the steps of one "
            f"solution. If they are whole solutions, their scores are meaningless. {_REMEDY}"
        )
    return warnings


def leave_out_thinking(tree: StepTree, where: str, keep_thinking: bool = False) -> tuple[StepTree, list[int]]:
    """
    Remove the thinking of a reasoning model from a tree. Return the tree, and for each of its steps the index in the original tree.

    Args:
        tree ([`StepTree`]):
            Step tree. Thinking may span several steps.
        where (`str`):
            Location of the tree, for the error message.
        keep_thinking (`bool`, *optional*, defaults to `False`):
            Keep the thinking and remove only its tags.

    Raises:
        `ValueError`: If a tree with branches contains thinking.
    """
    steps = list(range(len(tree.completions)))
    if not any(map(thinking_spans, tree.completions)):
        return tree, steps
    if tree.parents != list(range(-1, len(steps) - 1)):
        raise ValueError(
            f"{where}: the tree has branches and contains the thinking of a reasoning model, so it is unclear which steps the thinking "
            "spans. Remove the thinking, or put each solution in a separate row."
        )
    texts = visible_steps(tree.completions, keep_thinking)
    steps = [step for step in steps if texts[step].strip()]
    return replace(tree.take(steps), completions=[texts[step].strip() for step in steps]), steps


def read_whole_solutions(
    rows: Iterable[tuple[str, dict[str, Any]]], notes: Counter
) -> list[tuple[str, dict[str, Any]]]:
    """
    Rename the columns of rows without a `prompt`: `completions` becomes `candidates`, and `problem` becomes `prompt`.

    search-and-learn writes such rows. They are detected by its other columns, or because several completions each state an
    answer. One such row decides for all rows without a `prompt`, because truncated solutions state no answer.

    Args:
        rows (`Iterable[tuple[str, dict[str, Any]]]`):
            Pairs of location and row.
        notes (`Counter`):
            Counter to update: `ROWS` for each changed row.

    Returns:
        `list[tuple[str, dict[str, Any]]]`: All rows with their locations.

    Raises:
        `ValueError`: If there are rows without a `prompt` and it is unclear whether their `completions` are steps.
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
            f"{where}: the keys {shown(sorted(row), 200)} include `problem` and `completions`, but not `prompt`, so it is unclear whether "
            "`completions` are whole solutions or the steps of one solution. Rename `problem` to `prompt` and, if they are whole "
            "solutions, `completions` to `candidates`."
        )
    for i in unclear:
        where, row = rows[i]
        rest = {name: value for name, value in row.items() if name != "completions"}
        rows[i] = where, rest | {"prompt": row["problem"], "candidates": row["completions"]}
    notes[ROWS] += len(unclear)
    return rows
