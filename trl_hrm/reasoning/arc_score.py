"""
Score answers to ARC tasks: undo the augmentations, vote, and compare the best two grids with the solution (HRM, arXiv 2506.21734).

The votes are counted without the solutions. Only [`score_arc`] reads them, after the votes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import trange

from .data.arc import crop, parse_puzzle_name, undo_augmentation
from .evaluate import predict


if TYPE_CHECKING:
    from .modeling_hrm_grid import HrmGridForSolving

ROWS_PER_PART = 5000  # answers of all segments are in memory: 72 MB with 16 segments

Grid = tuple[tuple[int, ...], ...]  # rows of colours, so that equal grids are equal keys
TestInput = tuple[str, Grid]  # name of a task, and one of its test inputs


class ArcCandidate(NamedTuple):
    """
    Output grid with its votes.

    Args:
        grid (`Grid`):
            Rows of colours.
        votes (`int`):
            Number of augmented copies with this answer.
        q (`float`):
            Mean probability of being right, according to the halting head.
    """

    grid: Grid
    votes: int
    q: float


class ArcVotes:
    """
    Votes of the augmented copies of ARC tasks. They can be added in parts, so that not all answers must be in memory.

    An answer is not a grid if its upper left cell is not a colour. Such answers have no vote and are counted in `empty_answers`.

    Example:

    ```python
    >>> predictions = predict(model, rows, puzzle_index=model.puzzle_index)
    >>> votes = ArcVotes()
    >>> votes.add(rows, predictions.answers[-1], predictions.q_halt[-1])
    >>> score_arc(votes.ranked(), rows).tasks_solved
    ```
    """

    def __init__(self) -> None:
        self.empty_answers = 0
        self._probabilities: dict[TestInput, dict[Grid, list[float]]] = {}

    def add(self, rows: Iterable[Mapping[str, Any]], answers: np.ndarray, q_halt: np.ndarray) -> None:
        """
        Add one vote per row. The column `solution` is not read.

        Args:
            rows (`Iterable[Mapping]`):
                Rows with the columns `puzzle_id` and `puzzle`, not translated.
            answers (`np.ndarray`):
                Ids of `ARC_VOCAB`, shape `(rows, 900)`.
            q_halt (`np.ndarray`):
                Halting logits of the answers, shape `(rows,)`.

        Raises:
            `ValueError`: If a puzzle id is not one of an ARC task, if a puzzle has no grid in its upper left corner, if a halting logit is
                not finite, or if the numbers of rows, answers and logits differ.
        """
        probabilities = 1 / (1 + np.exp(-np.clip(np.asarray(q_halt, np.float64), -50, 50)))
        if not np.isfinite(probabilities).all():
            raise ValueError(
                f"The halting logit of row {np.flatnonzero(~np.isfinite(probabilities))[0]} is not a number."
            )
        for row, answer, probability in zip(rows, np.asarray(answers, np.uint8), probabilities.tolist(), strict=True):
            _, code, colours = parse_puzzle_name(row["puzzle_id"])
            place = self._probabilities.setdefault(_of_row(row, "puzzle"), {})
            grid = _original(answer, code, colours)
            if grid:
                place.setdefault(grid, []).append(probability)
            else:
                self.empty_answers += 1

    def ranked(self) -> dict[TestInput, list[ArcCandidate]]:
        """
        Return the answers to each test input, best first: by the number of votes, then by the mean probability of being right, then
        by the grid, so that the order of the rows does not matter.
        """
        return {
            test_input: sorted(
                # sorted, because a sum of floats depends on the order
                (ArcCandidate(grid, len(found), sum(sorted(found)) / len(found)) for grid, found in answers.items()),
                key=lambda candidate: (-candidate.votes, -candidate.q, candidate.grid),
            )
            for test_input, answers in self._probabilities.items()
        }


@dataclass(frozen=True)
class ArcScore:
    """
    Score of a model on ARC tasks.

    The two shares are not comparable with each other: HRM reports `tasks_solved`, TRM and ARC Prize report
    `mean_share_of_test_inputs`. They differ for tasks with several test inputs.

    Args:
        tasks_solved (`float`):
            Share of the tasks with all test inputs solved.
        mean_share_of_test_inputs (`float`):
            Mean over the tasks of the share of their test inputs that are solved.
        num_tasks, num_test_inputs (`int`):
            Number of tasks and of test inputs.
        attempts (`int`):
            Number of attempts per test input. A test input is solved if one of them is right.
        unanswered (`int`):
            Number of test inputs without any answer that is a grid. They count as not solved.
        solved (`dict[str, list[bool]]`):
            Whether each test input of a task is solved.
    """

    tasks_solved: float
    mean_share_of_test_inputs: float
    num_tasks: int
    num_test_inputs: int
    attempts: int
    unanswered: int
    solved: dict[str, list[bool]] = field(repr=False)


def score_arc(
    ranked: Mapping[TestInput, Sequence[ArcCandidate]], rows: Iterable[Mapping[str, Any]], attempts: int = 2
) -> ArcScore:
    """
    Compare the best answers with the solutions.

    Args:
        ranked (`Mapping[TestInput, Sequence[ArcCandidate]]`):
            Answers to each test input. See [`ArcVotes.ranked`].
        rows (`Iterable[Mapping]`):
            Rows with the columns `puzzle_id`, `puzzle` and `solution`. Of augmented copies, at least one per test input is required.
        attempts (`int`, *optional*, defaults to `2`):
            Number of attempts per test input. A test input is solved if one of them is right. The papers use 2.

    Returns:
        [`ArcScore`]: Both shares of solved tasks.

    Raises:
        `ValueError`: If `rows` is empty, if `attempts` is below 1, if two rows have the same test input and different solutions, or if
            answers and rows have different test inputs.
    """
    if attempts < 1:
        raise ValueError(f"`attempts` is {attempts}. It must be at least 1.")
    solutions: dict[TestInput, Grid] = {}
    for row in rows:
        task, solution = _of_row(row, "solution")
        if solutions.setdefault(_of_row(row, "puzzle"), solution) != solution:
            raise ValueError(
                f"Two rows of the same test input of task {task} have different solutions, the second one with the id {row['puzzle_id']}. "
                "Build the dataset again."
            )
    if not solutions:
        raise ValueError("`rows` is empty. Expected at least one test input.")
    different = solutions.keys() ^ ranked.keys()
    if different:
        task, grid = min(different)
        raise ValueError(
            f"{len(different)} test inputs are only in the answers or only in the rows, such as {len(grid)}x{len(grid[0])} cells of task {task}. "
            "Score the rows that were answered."
        )
    solved: dict[str, list[bool]] = {}
    for (task, grid), solution in sorted(solutions.items()):
        tried = [candidate.grid for candidate in ranked[task, grid][:attempts]]
        solved.setdefault(task, []).append(solution in tried)
    return ArcScore(
        tasks_solved=float(np.mean([all(found) for found in solved.values()])),
        mean_share_of_test_inputs=float(np.mean([np.mean(found) for found in solved.values()])),
        num_tasks=len(solved),
        num_test_inputs=len(solutions),
        attempts=attempts,
        unanswered=sum(not candidates for candidates in ranked.values()),
        solved=solved,
    )


def evaluate_arc(
    model: "HrmGridForSolving",
    rows: Any,
    *,
    segments: int | None = None,
    batch_size: int = 64,
    attempts: int = 2,
    use_blank_id: bool = False,
    progress: bool = False,
) -> ArcScore:
    """
    Answer the test inputs of ARC tasks and score the answers after the last segment.

    Args:
        model ([`HrmGridForSolving`]):
            Model with an embedding for each puzzle id.
        rows (`Dataset` or `Sequence[Mapping]`):
            Rows of the test split of `trl-hrm build-grid arc`.
        segments (`int`, *optional*):
            Number of segments. See [`~reasoning.evaluate.predict`].
        batch_size (`int`, *optional*, defaults to `64`):
            Number of rows per batch.
        attempts (`int`, *optional*, defaults to `2`):
            See [`score_arc`].
        use_blank_id (`bool`, *optional*, defaults to `False`):
            Whether all rows get the blank id instead of their own, to measure how much the model depends on the ids. The model does not
            know which task a row belongs to then.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`ArcScore`]: Both shares of solved tasks.

    Raises:
        `ValueError`: If the model has no embedding of puzzle ids, or does not know an id. See also [`~reasoning.evaluate.predict`].
    """
    if model.config.num_puzzle_ids <= 1:
        raise ValueError(
            "The model has no embedding of puzzle ids, so it cannot tell tasks apart. Train it on rows with puzzle ids."
        )
    index = model.puzzle_index
    votes = ArcVotes()
    for start in trange(0, len(rows), ROWS_PER_PART, desc="ARC", unit="part", disable=not progress):
        end = min(start + ROWS_PER_PART, len(rows))
        part = rows.select(range(start, end)) if hasattr(rows, "select") else rows[start:end]
        if use_blank_id:
            index = {row["puzzle_id"]: 0 for row in part}
        predictions = predict(
            model, part, segments=segments, batch_size=batch_size, puzzle_index=index, progress=progress
        )
        votes.add(part, predictions.answers[-1], predictions.q_halt[-1])
    return score_arc(votes.ranked(), rows, attempts)


def _original(ids: Any, code: int, colours: str) -> Grid:
    """Return the grid of a padded board or an answer as a tuple, without the augmentation. It is empty if the answer is not a grid."""
    grid = undo_augmentation(crop(np.asarray(ids, np.uint8)), code, colours)
    return tuple(map(tuple, grid.tolist())) if grid.size else ()


def _of_row(row: Mapping[str, Any], column: str) -> TestInput:
    """Return the task of a row and a grid of it. A board without one would be counted as the same test input as all others without one."""
    task, code, colours = parse_puzzle_name(row["puzzle_id"])
    grid = _original(row[column], code, colours)
    if not grid:
        raise ValueError(
            f"The `{column}` of a row with the id {row['puzzle_id']} has no grid in its upper left corner. Use the rows of the split `test`. "
            "Those of `train` are moved."
        )
    return task, grid
