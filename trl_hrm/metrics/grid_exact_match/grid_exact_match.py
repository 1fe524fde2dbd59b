"""Exact match of grid puzzles, as a metric of the `evaluate` library."""

import datasets
import evaluate
import numpy as np

from trl_hrm.reasoning.evaluate import PAD, cell_accuracy, exact


DESCRIPTION = """
Share of grid puzzles (Sudoku, mazes, ARC) in which every cell is right, and mean share of cells that are right. Cells of the solution with
the padding id are not counted.
"""

INPUTS = """
Args:
    predictions (`list[list[int]]`):
        Ids of the cells of each answer.
    references (`list[list[int]]`):
        Ids of the cells of each solution. Puzzles may have different sizes.
    ignore_id (`int`, *optional*, defaults to `0`):
        Id of the cells of a solution that are not counted, `-100` for labels.

Returns:
    `dict[str, float]`: `num_puzzles`, `exact_match` and `cell_accuracy`.

Example:

    >>> grid_exact_match = evaluate.load("trl_hrm/metrics/grid_exact_match")
    >>> grid_exact_match.compute(predictions=[[2, 3, 9], [2, 4, 4]], references=[[2, 3, 0], [2, 3, 4]])["exact_match"]
    0.5
"""


class GridExactMatch(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("int64")),
                    "references": datasets.List(datasets.Value("int64")),
                }
            ),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], ignore_id: int = 0
    ) -> dict[str, float]:
        if not len(references):
            raise ValueError("`predictions` is empty. Expected at least one puzzle.")
        right, shares = [], []
        for i, (answer, solution) in enumerate(zip(predictions, references, strict=True)):
            ids = np.asarray(answer, np.int64)[None], np.asarray(solution, np.int64)[None]
            counted = ids[1] != ignore_id
            if (ids[1][counted] < 0).any():
                raise ValueError(
                    f"puzzle {i}: the solution has the id {ids[1][counted].min()}. Ids must be at least 0, except for `ignore_id` "
                    f"({ignore_id})."
                )
            # moved by one, so that the padding id means "not counted" with any `ignore_id`
            moved = ids[0] + 1, np.where(counted, ids[1] + 1, PAD)
            try:
                right.append(exact(*moved).item())
                shares.append(cell_accuracy(*moved).item())
            except ValueError as error:
                raise ValueError(f"puzzle {i}: {error}") from None
        return {
            "num_puzzles": len(right),
            "exact_match": float(np.mean(right)),
            "cell_accuracy": float(np.mean(shares)),
        }
