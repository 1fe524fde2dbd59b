"""Symmetries of puzzles: they keep what makes a puzzle, can be undone, and lead to the same canonical form."""

from random import Random

import numpy as np
import pytest

from trl_hrm.reasoning.data.maze import check_maze, make_maze
from trl_hrm.reasoning.data.sudoku import canonical_sudoku, check_sudoku, dig_puzzle, random_grid, sudoku_rules
from trl_hrm.reasoning.data.symmetry import augment, canonical_maze, maze_symmetries, random_symmetry


def sudoku(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rules, random = sudoku_rules(size), Random(seed)
    grid = random_grid(rules, random)
    puzzle = dig_puzzle(rules, grid, random)
    return np.array(puzzle, dtype=np.uint8) + 1, np.array(grid, dtype=np.uint8) + 1


@pytest.mark.parametrize("size", [4, 6, 9])
def test_sudoku(size):
    """Columns moved across stacks, or a transposition of 2x3 boxes, would give boards that break the rules."""
    rules = sudoku_rules(size)
    puzzle, solution = sudoku(size, 0)
    form = canonical_sudoku(rules, puzzle - 1, solution - 1)
    rng = np.random.default_rng(1)
    for _ in range(20):
        moved, answer = augment("sudoku", puzzle, solution, size, size, rng)
        assert moved.dtype == answer.dtype == np.uint8
        assert (moved == 1).sum() == (puzzle == 1).sum()
        assert check_sudoku(rules, (moved - 1).tolist(), (answer - 1).tolist()) == (answer - 1).tolist()
        assert canonical_sudoku(rules, moved - 1, answer - 1) == form
    other = sudoku(size, 1)
    assert canonical_sudoku(rules, other[0] - 1, other[1] - 1) != form


@pytest.mark.parametrize(("height", "width"), [(9, 9), (7, 11)])
def test_maze(height, width):
    """A rotation of the puzzle without its solution would give a path through walls."""
    puzzle, solution = (np.array(board, dtype=np.uint8) for board in make_maze(height, width, Random(0)))
    length, _ = check_maze(puzzle.tolist(), solution.tolist(), height, width)
    rng = np.random.default_rng(1)
    found = set()
    for _ in range(60):
        moved, answer = augment("maze", puzzle, solution, height, width, rng)
        assert check_maze(moved.tolist(), answer.tolist(), height, width) == (length, 1)
        assert canonical_maze(moved, height, width) == canonical_maze(puzzle, height, width)
        found.add(moved.tobytes())
    assert len(found) == (8 if height == width else 4)
    first = maze_symmetries(height, width)[0]
    assert (first.apply(puzzle) == puzzle).all()


@pytest.mark.parametrize(
    ("family", "height", "width"),
    [("sudoku", 4, 4), ("sudoku", 6, 6), ("sudoku", 9, 9), ("maze", 9, 9), ("maze", 7, 11)],
)
def test_inverse(family, height, width):
    """Votes over symmetric copies are counted on boards that are moved back."""
    rng = np.random.default_rng(0)
    num_symbols = height + 2 if family == "sudoku" else 6
    for _ in range(20):
        board = rng.integers(0, num_symbols, height * width).astype(np.uint8)
        symmetry = random_symmetry(family, height, width, rng)
        assert (symmetry.inverse().apply(symmetry.apply(board)) == board).all()
        assert (symmetry.apply(symmetry.inverse().apply(board)) == board).all()


def test_all_symmetries_are_drawn():
    """4x4 Sudoku has 8 orders of rows, 8 of columns, 2 transpositions and 24 renamings."""
    rng = np.random.default_rng(0)
    found = [random_symmetry("sudoku", 4, 4, rng) for _ in range(1500)]
    assert len({symmetry.cells.tobytes() for symmetry in found}) == 128
    assert len({symmetry.symbols.tobytes() for symmetry in found}) == 24
    assert all(symmetry.symbols[:2].tolist() == [0, 1] for symmetry in found)  # padding and blank


def test_the_generator_decides():
    """A resumed training run must see the same boards."""
    puzzle, solution = sudoku(6, 0)
    twice = [augment("sudoku", puzzle, solution, 6, 6, np.random.default_rng([42, 3, 7])) for _ in range(2)]
    assert all((a == b).all() for a, b in zip(*twice, strict=True))


def test_unknown_family():
    with pytest.raises(ValueError, match="'chess'"):
        random_symmetry("chess", 8, 8, np.random.default_rng(0))
