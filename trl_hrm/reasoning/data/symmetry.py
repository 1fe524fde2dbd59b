"""Symmetries of Sudoku boards and mazes: random ones for augmentation, their inverses, and canonical forms of mazes."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from ..vocab import MAZE_VOCAB, box_shape
from .arc import translate


@dataclass(frozen=True)
class Symmetry:
    """
    A symmetry of a puzzle: it moves cells and renames symbols.

    Args:
        cells (`np.ndarray`):
            For each cell of the result, the cell it comes from.
        symbols (`np.ndarray`):
            For each id, the id that replaces it.
    """

    cells: np.ndarray
    symbols: np.ndarray

    def apply(self, board: np.ndarray) -> np.ndarray:
        """Return a board, of shape `(num_cells,)`, after the symmetry."""
        return self.symbols[board[self.cells]]

    def inverse(self) -> "Symmetry":
        """Return the symmetry that undoes this one."""
        return Symmetry(np.argsort(self.cells), np.argsort(self.symbols).astype(self.symbols.dtype))


def random_symmetry(family: str, height: int, width: int, rng: np.random.Generator) -> Symmetry:
    """
    Return a random symmetry, uniformly among all of them.

    For Sudoku, it permutes the digits, the bands, the rows of each band, the stacks and the columns of each stack, and, if the boxes are
    square, transposes the board or not. For a maze, it is one of the 8 rotations and reflections, or one of the 4 that keep the shape if
    the maze is not square.

    Args:
        family (`str`):
            `"sudoku"` or `"maze"`.
        height (`int`), width (`int`):
            Number of rows and of columns.
        rng (`np.random.Generator`):
            Source of randomness.
    """
    cells = np.arange(height * width).reshape(height, width)
    if family == "maze":
        forms = maze_symmetries(height, width)
        return forms[rng.integers(len(forms))]
    if family != "sudoku":
        raise ValueError(f"`family` is {family!r}. It must be 'sudoku' or 'maze'.")
    box_height, box_width = box_shape(height)
    cells = cells[_random_lines(box_height, height, rng)][:, _random_lines(box_width, width, rng)]
    if box_height == box_width and rng.integers(2):
        cells = cells.T
    digits = 2 + rng.permutation(height)  # the ids 0 and 1 are padding and blank
    return Symmetry(cells.ravel(), np.concatenate([[0, 1], digits]).astype(np.uint8))


def _random_lines(box_length: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random order of the rows or columns of a Sudoku that keeps the lines of a box together."""
    lines = rng.permuted(np.arange(size).reshape(-1, box_length), axis=1)
    return lines[rng.permutation(len(lines))].ravel()


def augment(
    family: str, puzzle: np.ndarray, solution: np.ndarray, height: int, width: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """
    Return a puzzle and its solution after the same random symmetry (see [`random_symmetry`]). ARC grids are moved instead (see
    [`~reasoning.data.arc.translate`]), because rotated or recoloured tasks have puzzle ids of their own.

    Args:
        family (`str`):
            `"sudoku"`, `"maze"` or `"arc"`.
        puzzle (`np.ndarray`), solution (`np.ndarray`):
            Ids of the cells, `uint8` of shape `(height * width,)`.
        height (`int`), width (`int`):
            Number of rows and of columns.
        rng (`np.random.Generator`):
            Source of randomness.

    Example:

    ```python
    >>> puzzle, solution = augment("sudoku", puzzle, solution, 9, 9, np.random.default_rng([seed, slot, refill]))
    ```
    """
    if family == "arc":
        return translate(puzzle, solution, rng)
    symmetry = random_symmetry(family, height, width, rng)
    return symmetry.apply(puzzle), symmetry.apply(solution)


@cache
def maze_symmetries(height: int, width: int) -> tuple[Symmetry, ...]:
    """Return the rotations and reflections that keep the shape of a maze: 8 for a square, otherwise 4. The first one is the identity."""
    cells = np.arange(height * width).reshape(height, width)
    boards = [cells, cells.T] if height == width else [cells]
    symbols = np.arange(len(MAZE_VOCAB), dtype=np.uint8)
    return tuple(
        Symmetry(np.ascontiguousarray(form).ravel(), symbols)
        for board in boards
        for form in (board, board[::-1], board[:, ::-1], board[::-1, ::-1])
    )


def canonical_maze(board: np.ndarray, height: int, width: int) -> bytes:
    """Return the smallest of all rotations and reflections of a maze, in lexicographic order."""
    return min(symmetry.apply(board).tobytes() for symmetry in maze_symmetries(height, width))
