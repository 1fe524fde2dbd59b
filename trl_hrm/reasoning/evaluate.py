"""
Evaluate models of grid puzzles (HRM, arXiv 2506.21734): exact accuracy by segment, and strategies that choose a segment.

[`predict`] runs the model and sees no solutions. Everything else is a pure function of NumPy arrays. Only [`exact`] and
[`cell_accuracy`] compare with solutions, so no strategy can choose an answer because it is right.

Two accuracies are reported, always under these names: *exact accuracy* is the share of puzzles in which every cell is right, and *cell
accuracy* is the share of cells that are right, givens included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..intervals import T_QUANTILES, difference_interval, mean_interval
from ..io import shown


if TYPE_CHECKING:
    from .modeling_hrm_grid import HrmGridForSolving


PAD = 0  # id of cells that are not part of the board. It is never counted
MIN_SEEDS = 3  # with fewer seeds, the variance between trainings is not known well enough to settle a claim


@dataclass(frozen=True)
class GridPredictions:
    """
    Answers of a model after each segment.

    Args:
        answers (`np.ndarray`):
            Most probable symbol of each cell, `uint8`, shape `(segments, puzzles, cells)`.
        q_halt (`np.ndarray`):
            Logit of halting, `float32`, shape `(segments, puzzles)`. Its sigmoid is trained to be the probability that the answer is
            right.
    """

    answers: np.ndarray
    q_halt: np.ndarray

    def up_to(self, segments: int) -> "GridPredictions":
        """
        Return the predictions of the first segments.

        Raises:
            `ValueError`: If there are fewer segments.
        """
        found = len(self.answers)
        if not 1 <= segments <= found:
            raise ValueError(f"`segments` is {segments}. There are predictions of {found} segments.")
        return GridPredictions(self.answers[:segments], self.q_halt[:segments])


def predict(
    model: "HrmGridForSolving",
    rows: Any,
    *,
    segments: int | None = None,
    batch_size: int = 64,
    puzzle_index: Mapping[str, int] | None = None,
    progress: bool = False,
) -> GridPredictions:
    """
    Return the answers of a model after each segment. Solutions are not read.

    Args:
        model ([`HrmGridForSolving`]):
            Model, which is evaluated on its device. Its mode (training or evaluation) is restored.
        rows (`Dataset` or `Sequence[Mapping]`):
            Puzzles: rows with the columns `puzzle` (ids of the vocabulary, one per cell) and, if `puzzle_index` is given, `puzzle_id`.
        segments (`int`, *optional*):
            Number of segments. Defaults to the number that the model was trained with, `halt_max_steps`. It may be larger.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of puzzles per batch. The answers do not depend on it, up to rounding.
        puzzle_index (`Mapping[str, int]`, *optional*):
            Index of each puzzle id in the puzzle embedding. Required if the model has one.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`GridPredictions`]: Answers and halting logits of each segment.

    Raises:
        `ValueError`: If `rows` is empty, if a puzzle does not have the size of the model or has a symbol outside of its vocabulary, or
            if a puzzle id is unknown.
    """
    import torch

    config = model.config
    segments = config.halt_max_steps if segments is None else segments
    if segments < 1:
        raise ValueError(f"`segments` is {segments}. It must be at least 1.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}. It must be at least 1.")
    if not len(rows):
        raise ValueError("`rows` is empty. Pass at least one puzzle.")
    puzzles = [row["puzzle"] for row in rows]
    for i, puzzle in enumerate(puzzles):
        if len(puzzle) != config.seq_len:
            raise ValueError(
                f"Row {i} has a puzzle of {len(puzzle)} cells, but the model solves puzzles of {config.seq_len} cells "
                f"({config.height}x{config.width}). Use a model of this size."
            )
        if not 0 <= min(puzzle) <= max(puzzle) < config.vocab_size:
            raise ValueError(
                f"Row {i} has symbol ids from {min(puzzle)} to {max(puzzle)}, but the vocabulary of the model has the ids 0 to "
                f"{config.vocab_size - 1}. Use a model of this kind of puzzles."
            )
    ids = None
    if config.num_puzzle_ids > 1:
        if puzzle_index is None:
            raise ValueError(
                "The model has an embedding for each puzzle id. Pass the index of the ids as `puzzle_index`, such as `model.puzzle_index`."
            )
        names = [row["puzzle_id"] for row in rows]
        unknown = [name for name in dict.fromkeys(names) if name not in puzzle_index]
        if unknown:
            raise ValueError(
                f"{len(unknown)} puzzle ids are unknown to the model, such as {shown(unknown[0])}. It cannot solve puzzles whose id it was "
                "not trained on."
            )
        ids = torch.tensor([puzzle_index[name] for name in names], device=model.device)
    cells = np.asarray(puzzles)
    if cells.dtype.kind not in "iu":
        raise ValueError(
            f"The cells of the puzzles are of the type {cells.dtype}. Expected integers, the ids of the vocabulary."
        )
    boards = torch.tensor(cells.astype(np.int64), device=model.device)
    answers = np.empty((segments, len(boards), config.seq_len), np.uint8)
    q_halt = np.empty((segments, len(boards)), np.float32)
    starts: Any = range(0, len(boards), batch_size)
    if progress:
        from tqdm import tqdm

        starts = tqdm(starts, desc="Evaluating", unit="batch", leave=False)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for start in starts:
                here = slice(start, start + batch_size)
                z_H = z_L = None
                for segment in range(segments):
                    out = model(boards[here], None if ids is None else ids[here], z_H, z_L)
                    z_H, z_L = out.z_H, out.z_L
                    answers[segment, here] = out.logits.argmax(-1).cpu().numpy()
                    q_halt[segment, here] = out.q_halt_logits.float().cpu().numpy()
    finally:
        model.train(was_training)
    return GridPredictions(answers, q_halt)


# Comparison with the solutions


def exact(answers: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """
    Return whether every cell of each answer is right. Cells with the padding id 0 in the solution are not counted.

    Args:
        answers (`np.ndarray`):
            Answers, shape `(..., puzzles, cells)`.
        solutions (`np.ndarray`):
            Solutions, shape `(puzzles, cells)`.

    Returns:
        `np.ndarray`: Booleans, shape `(..., puzzles)`.

    Raises:
        `ValueError`: If the shapes differ, or a solution has only padding cells.

    Example:

    ```python
    >>> exact(np.array([[2, 3, 9], [2, 4, 0]]), np.array([[2, 3, 0], [2, 3, 0]]))
    array([ True, False])
    ```
    """
    counted = _counted(answers, solutions)
    return ((answers == solutions) | ~counted).all(-1)


def cell_accuracy(answers: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """
    Return the share of cells of each answer that are right. Padding cells are not counted. See [`exact`] for the arguments and errors.

    Returns:
        `np.ndarray`: Shares, `float64`, shape `(..., puzzles)`.

    Example:

    ```python
    >>> cell_accuracy(np.array([[2, 3, 9], [2, 4, 0]]), np.array([[2, 3, 0], [2, 3, 0]]))
    array([1. , 0.5])
    ```
    """
    counted = _counted(answers, solutions)
    return ((answers == solutions) & counted).sum(-1) / counted.sum(-1)


def _counted(answers: np.ndarray, solutions: np.ndarray) -> np.ndarray:
    """Return which cells are counted, shape `(puzzles, cells)`."""
    if answers.shape[-2:] != solutions.shape:
        raise ValueError(
            f"The answers have the shape {answers.shape} and the solutions {solutions.shape}. The last two dimensions must be equal."
        )
    counted = solutions != PAD
    empty = np.flatnonzero(~counted.any(-1))
    if len(empty):
        raise ValueError(f"The solution of row {empty[0]} has only padding cells, so no answer can be right or wrong.")
    return counted


# Strategies. They return the answer of each puzzle and the number of segments that were needed for it


def fixed(predictions: GridPredictions, segments: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """
    Answer after a fixed number of segments, as in the paper.

    Args:
        predictions ([`GridPredictions`]):
            Predictions of S segments.
        segments (`int`, *optional*):
            Number of segments, at most S. Defaults to S.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Answers, shape `(puzzles, cells)`, and number of segments of each puzzle, shape `(puzzles,)`.
    """
    predictions = predictions.up_to(len(predictions.answers) if segments is None else segments)
    return _at(predictions, np.full(predictions.q_halt.shape[1], len(predictions.answers) - 1))


def first_halt(predictions: GridPredictions) -> tuple[np.ndarray, np.ndarray]:
    """
    Answer after the first segment with a halting logit above 0, or else after the last one. See [`fixed`] for the result.

    The rule is the same for models with a continue head, which halt in training if the halting logit is above the one for continuing: above
    0, an answer is more probably right than wrong, so systems with and without this head can be compared.
    """
    halts = predictions.q_halt > 0
    return _at(predictions, np.where(halts.any(0), halts.argmax(0), len(halts) - 1))


def choose_by_q(predictions: GridPredictions) -> tuple[np.ndarray, np.ndarray]:
    """
    Choose the answer with the highest halting logit, the earliest one if several are equal. All segments are computed, so the number of
    segments in the result is the chosen one, not the cost. See [`fixed`] for the result.
    """
    return _at(predictions, predictions.q_halt.argmax(0))


def _at(predictions: GridPredictions, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return predictions.answers[places, np.arange(len(places))], places + 1


# Means and intervals over puzzles and seeds


@dataclass(frozen=True)
class Estimate:
    """
    Mean over puzzles and seeds, with its 95 % interval.

    Args:
        mean (`float`):
            Mean.
        low, high (`float`):
            95 % interval.
        seeds (`tuple[float, ...]`):
            Mean of each seed.
    """

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def above(self, bound: float = 0.0) -> str:
        """
        Return whether a difference is above a bound: `"holds"`, `"does not hold"`, or `"open"` if the interval contains the bound or there
        are fewer than `MIN_SEEDS` seeds.
        """
        if len(self.seeds) < MIN_SEEDS or self.low <= bound <= self.high:
            return "open"
        return "holds" if self.low > bound else "does not hold"


def estimate(values: np.ndarray, *, is_difference: bool = False) -> Estimate:
    r"""
    Return the mean over puzzles and seeds, with an interval that covers both: other puzzles, and other trainings.

    The two sources of variance are combined as in the method of variance estimates recovery (Zou and Donner, Statistics in Medicine 27,
    2008): the distance from the mean to a bound is \\(\sqrt{d_p^2 + d_s^2}\\). \\(d_p\\) is the distance of the score interval over
    puzzles, computed on the mean over seeds of each puzzle ([`~intervals.mean_interval`],
    [`~intervals.difference_interval`]). \\(d_s\\) is the half-width of the t interval over the means of the seeds.

    Args:
        values (`np.ndarray`):
            Value of each puzzle for each seed, shape `(seeds, puzzles)`: 0 or 1 (or shares), or paired differences from -1 to 1. With one
            seed, the interval only covers other puzzles.
        is_difference (`bool`, *optional*, defaults to `False`):
            Whether the values are differences.

    Example:

    ```python
    >>> estimate(np.array([[1, 0, 1, 1], [1, 0, 1, 1], [1, 0, 1, 1]]))
    Estimate(mean=0.75, low=0.3006..., high=0.9544..., seeds=(0.75, 0.75, 0.75))
    ```
    """
    values = np.asarray(values, dtype=np.float64)
    seeds, mean = values.mean(1), float(values.mean())
    low, high = (difference_interval if is_difference else mean_interval)(values.mean(0))
    half = 0.0
    if len(seeds) > 1:
        quantile = T_QUANTILES[min(len(seeds) - 1, len(T_QUANTILES)) - 1]
        half = quantile * float(seeds.std(ddof=1)) / len(seeds) ** 0.5
    return Estimate(
        mean,
        max(mean - float(np.hypot(mean - low, half)), -1.0 if is_difference else 0.0),
        min(mean + float(np.hypot(high - mean, half)), 1.0),
        tuple(map(float, seeds)),
    )


def by_group(values: np.ndarray, groups: Sequence[Any]) -> dict[Any, Estimate]:
    """
    Return an [`Estimate`] for each group of puzzles, such as all puzzles with the same number of blanks, in sorted order.

    Args:
        values (`np.ndarray`):
            Value of each puzzle for each seed, shape `(seeds, puzzles)`.
        groups (`Sequence`):
            Group of each puzzle, length `puzzles`.
    """
    found = np.asarray(groups)
    return {group.item(): estimate(values[:, found == group]) for group in np.unique(found)}
