"""
Sudoku of any box shape: a solver, a generator of puzzles with a unique solution, and a canonical form.

Boards are lists of digits in row-major order, with 0 for a blank cell.
"""

from collections.abc import Sequence
from functools import cache
from itertools import permutations, product
from random import Random

import numpy as np

from ..vocab import box_shape


class Sudoku:
    """
    The rules of a board: which candidates exclude each other.

    All candidates of a board, a digit in a cell, are the bits of one integer: bit `(digit - 1) * num_cells + cell`. Each rule says that
    one of `size` candidates is right: the digits of a cell, or the cells of a digit in a row, column or box. The solver counts the
    candidates of all rules of a kind at once, by shifting the integer, which is much faster in Python than loops over cells.

    Args:
        box_height (`int`):
            Number of rows of a box.
        box_width (`int`):
            Number of columns of a box.
    """

    def __init__(self, box_height: int, box_width: int):
        self.box_height, self.box_width = box_height, box_width
        self.size = size = box_height * box_width
        self.num_cells = cells = size * size
        boxes = [(cell // size // box_height) * box_height + cell % size // box_width for cell in range(cells)]
        units = [(digit, kind, key) for digit in range(size) for kind, key in product(range(3), range(size))]
        members = dict.fromkeys(units, 0) | {(cell,): 0 for cell in range(cells)}
        unit_of = {}
        for digit, cell in product(range(size), range(cells)):
            bit = digit * cells + cell
            unit_of[bit] = [
                (cell,),
                (digit, 0, cell // size),
                (digit, 1, cell % size),
                (digit, 2, boxes[cell]),
            ]
            for unit in unit_of[bit]:
                members[unit] |= 1 << bit
        self.all = (1 << size * cells) - 1
        # Candidates that remain if a candidate is right
        self.keep = [
            self.all & ~(members[a] | members[b] | members[c] | members[d]) | 1 << bit
            for bit, (a, b, c, d) in unit_of.items()
        ]
        # For each kind of rule: the first candidate of each rule, and the distances of the others from it
        corners = [row * size + column for row in range(0, size, box_height) for column in range(0, size, box_width)]
        kinds = [
            (range(cells), [digit * cells for digit in range(size)]),
            ([digit * cells + row * size for digit in range(size) for row in range(size)], range(size)),
            (
                [digit * cells + column for digit in range(size) for column in range(size)],
                range(0, cells, size),
            ),
            (
                [digit * cells + corner for digit in range(size) for corner in corners],
                [row * size + column for row in range(box_height) for column in range(box_width)],
            ),
        ]
        self.kinds = [
            (sum(1 << bit for bit in first), tuple(shifts), sum(1 << shift for shift in shifts))
            for first, shifts in kinds
        ]

    def candidates(self, board: Sequence[int]) -> int:
        """Return the candidates that the givens leave. Givens that contradict each other leave a cell without one of them."""
        left, cells, keep = self.all, self.num_cells, self.keep
        for cell, digit in enumerate(board):
            if digit:
                left &= keep[(digit - 1) * cells + cell]
        return left

    def search(self, left: int, limit: int = 2, random: Random | None = None) -> tuple[list[int], int]:
        """
        Find solutions: naked and hidden singles first, then guesses of the digit of a cell with the fewest candidates.

        Args:
            left (`int`):
                Candidates. See [`Sudoku.candidates`].
            limit (`int`, *optional*, defaults to `2`):
                Number of solutions after which the search stops.
            random (`Random`, *optional*):
                Order of the guesses. By default, small digits come first.

        Returns:
            `tuple[list[int], int]`: The solutions as sets of candidates, and the number of guesses.
        """
        found, guesses = [], 0
        stack = [(left, 0)]
        while stack:
            left, placed = self._place_singles(*stack.pop())
            if not left:
                continue
            if left.bit_count() == self.num_cells:
                found.append(left)
                if len(found) == limit:
                    break
                continue
            bits = self._smallest_cell(left)
            if random is not None:
                random.shuffle(bits)
            guesses += len(bits)
            stack += [(left & self.keep[bit], placed | 1 << bit) for bit in reversed(bits)]
        return found, guesses

    def _place_singles(self, left: int, placed: int) -> tuple[int, int]:
        """
        Place the only candidate of each rule, again and again. Return the remaining candidates, 0 if there is no solution, and the
        placed candidates.
        """
        keep = self.keep
        while True:
            singles = 0
            for first, shifts, spread in self.kinds:
                once = twice = 0  # rules with at least one and at least two candidates
                for shift in shifts:
                    some = (left >> shift) & first
                    twice |= once & some
                    once |= some
                if once != first:
                    return 0, placed
                singles |= left & ((once & ~twice) * spread)
            singles &= ~placed
            if not singles:
                return left, placed
            placed |= singles
            while singles:
                bit = singles.bit_length() - 1
                singles ^= 1 << bit
                left &= keep[bit]

    def _smallest_cell(self, left: int) -> list[int]:
        """Return the candidates of the first cell with the fewest, but at least 2."""
        first, shifts, _ = self.kinds[0]
        counts = [0] * (self.size + 1)  # counts[n]: cells with at least n candidates
        counts[0] = first
        for shift in shifts:
            some = (left >> shift) & first
            for n in range(self.size, 0, -1):
                counts[n] |= counts[n - 1] & some
        for n in range(2, self.size + 1):
            exactly = counts[n] & ~(counts[n + 1] if n < self.size else 0)
            if exactly:
                cell = (exactly & -exactly).bit_length() - 1
                return [shift + cell for shift in shifts if left >> (shift + cell) & 1]
        raise AssertionError("every cell has one candidate")

    def board(self, placed: int) -> list[int]:
        """Return a solution of [`Sudoku.search`] as digits."""
        board = [0] * self.num_cells
        while placed:
            bit = placed.bit_length() - 1
            placed ^= 1 << bit
            board[bit % self.num_cells] = bit // self.num_cells + 1
        return board


@cache
def sudoku_rules(size: int) -> Sudoku:
    """Return the rules of boards of `size` rows and columns, with the boxes of [`~reasoning.vocab.box_shape`]."""
    return Sudoku(*box_shape(size))


def random_grid(rules: Sudoku, random: Random) -> list[int]:
    """
    Return a full grid, by guesses in random order. Every grid can be drawn, but not all with the same probability.
    """
    return rules.board(rules.search(rules.all, 1, random)[0][0])


def dig_puzzle(rules: Sudoku, grid: Sequence[int], random: Random, clues: int | None = None) -> list[int] | None:
    """
    Remove digits from a full grid in random order, as long as the solution stays unique.

    Args:
        rules ([`Sudoku`]):
            Rules of the board.
        grid (`Sequence[int]`):
            Full grid.
        random (`Random`):
            Order of the removals.
        clues (`int`, *optional*):
            Number of givens to leave. By default, the puzzle is minimal: without any of its givens, it has several solutions.

    Returns:
        `list[int]` or `None`: The puzzle. `None` if this order leads to a minimal puzzle with more than `clues` givens.
    """
    puzzle = list(grid)
    cells = random.sample(range(rules.num_cells), rules.num_cells)
    num_givens = rules.num_cells
    for cell in cells:
        if num_givens == clues:
            break
        puzzle[cell] = 0
        # The solution stays unique if no other digit in this cell leads to a solution
        others = rules.candidates(puzzle) & ~(1 << (grid[cell] - 1) * rules.num_cells + cell)
        if rules.search(others, 1)[0]:
            puzzle[cell] = grid[cell]
        else:
            num_givens -= 1
    return puzzle if clues is None or num_givens == clues else None


def rate_sudoku(rules: Sudoku, puzzle: Sequence[int]) -> int:
    """
    Return the number of guesses that [`Sudoku.search`] needs to find the solution and to prove that it is the only one. 0 means that naked
    and hidden singles are enough. It is not comparable with the ratings of sudoku-extreme, which count the backtracks of another solver.
    """
    return rules.search(rules.candidates(puzzle))[1]


def check_sudoku(rules: Sudoku, puzzle: Sequence[int], solution: Sequence[int] | None = None) -> list[int]:
    """
    Check that a puzzle has exactly one solution.

    Args:
        rules ([`Sudoku`]):
            Rules of the board.
        puzzle (`Sequence[int]`):
            Digits of the puzzle.
        solution (`Sequence[int]`, *optional*):
            Digits of the solution, which are checked as well.

    Returns:
        `list[int]`: The solution.

    Raises:
        `ValueError`: If the puzzle has no solution or several, or if `solution` is wrong.
    """
    size = rules.size
    if solution is not None:
        for cell, (given, digit) in enumerate(zip(puzzle, solution, strict=True)):
            place = f"row {cell // size + 1}, column {cell % size + 1}"
            if not 1 <= digit <= size:
                raise ValueError(f"the solution has no digit at {place}.")
            if given not in (0, digit):
                raise ValueError(f"the solution has {digit} at {place}, but the puzzle has {given} there.")
        if rules.candidates(solution).bit_count() != rules.num_cells:
            raise ValueError("the solution has a digit twice in a row, column or box.")
    found = [rules.board(one) for one in rules.search(rules.candidates(puzzle))[0]]
    if len(found) != 1:
        raise ValueError(
            f"the puzzle has {'no solution' if not found else 'several solutions'}. It must have exactly one."
        )
    return found[0]


@cache
def _line_orders(box_length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return all orders of columns that keep the columns of a box together, and their inverses, each `(num_orders, size)`."""
    blocks = [range(first, first + box_length) for first in range(0, size, box_length)]
    orders = np.array(
        [
            [column for block in within for column in block]
            for order in permutations(blocks)
            for within in product(*map(list, map(permutations, order)))
        ]
    )
    return orders, np.argsort(orders, axis=1)


def canonical_sudoku(rules: Sudoku, puzzle: Sequence[int], solution: Sequence[int]) -> tuple[bytes, bytes]:
    """
    Return the canonical form of a puzzle with a unique solution. Two puzzles have the same one exactly if they are equivalent: if one
    becomes the other by a permutation of the digits, of the bands and the rows in them, of the stacks and the columns in them, and, for
    square boxes, by a transposition.

    The canonical grid is the smallest of all equivalent grids in lexicographic order. Its first row is 1, 2, 3, ..., which any of the
    rows can become with any order of the columns. This fixes the digits, and the order of the other rows, whose first digits differ. So
    there are `2 * 9 * 1296 * 2` candidates for a 9x9 grid, and few of them have the smallest second row. The canonical puzzle is the
    smallest among those that have the canonical grid as their solution.

    Args:
        rules ([`Sudoku`]):
            Rules of the board.
        puzzle (`Sequence[int]`):
            Digits of the puzzle.
        solution (`Sequence[int]`):
            Digits of its only solution.

    Returns:
        `tuple[bytes, bytes]`: The canonical grid and the canonical puzzle, a digit per byte.
    """
    size, height = rules.size, rules.box_height
    orders, inverse = _line_orders(rules.box_width, size)
    grid = np.asarray(solution).reshape(size, size) - 1
    given = np.asarray(puzzle).reshape(size, size) > 0
    is_square = rules.box_height == rules.box_width
    grids, masks = ([grid, grid.T], [given, given.T]) if is_square else ([grid], [given])
    # Which grid, first row and second row
    starts = [
        (which, row, other)
        for which in range(len(grids))
        for row in range(size)
        for other in range(row - row % height, row - row % height + height)
        if other != row
    ]
    # For each start, the column of the first row that has the digit of each column of the second row
    places = np.argsort(np.stack(grids), axis=2)
    seconds = np.array([places[which, row][grids[which][other]] for which, row, other in starts])
    # All pairs of a start and an order of the columns. One digit of the second row after the other decides which are left
    start, order = np.divmod(np.arange(len(starts) * len(orders)), len(orders))
    for column in range(size):
        digits = inverse[order, seconds[start, orders[order, column]]]
        smallest = digits == digits.min()
        start, order = start[smallest], order[smallest]
    forms = []
    for (which, row, other), columns in zip((starts[i] for i in start), orders[order], strict=True):
        ordered = grids[which][:, columns]
        ordered = np.argsort(ordered[row])[ordered]
        first = ordered[:, 0].copy()
        first[row], first[other] = -2, -1
        bands = first.reshape(-1, height).min(axis=1).repeat(height)
        rows = np.lexsort((first, bands))
        found = (ordered[rows] + 1).astype(np.uint8)
        forms.append((found.tobytes(), (found * masks[which][:, columns][rows]).tobytes()))
    return min(forms)
