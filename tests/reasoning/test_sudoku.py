"""Sudoku: solver, generator and canonical form, compared with slow and plain ones."""

from collections import Counter
from functools import cache
from itertools import permutations, product
from random import Random

import pytest

from trl_hrm.reasoning.data.sudoku import (
    Sudoku,
    canonical_sudoku,
    check_sudoku,
    dig_puzzle,
    random_grid,
    rate_sudoku,
    sudoku_rules,
)


# From the article "Sudoku" of Wikipedia, and the puzzle that Arto Inkala published in 2010
EASY = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
EASY_SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "800000000003600000070090200050007000000045700000100030001000068008500010090000400"
HARD_SOLUTION = "812753649943682175675491283154237896369845721287169534521974368438526917796318452"


def digits(text: str) -> list[int]:
    return list(map(int, text))


@cache
def peers(box_height: int, box_width: int) -> list[list[int]]:
    """Return the cells in the row, column or box of each cell."""
    size = box_height * box_width
    places = [(cell // size, cell % size) for cell in range(size * size)]
    box_of = [(row // box_height, column // box_width) for row, column in places]
    return [
        [
            other
            for other, (r, c) in enumerate(places)
            if other != cell and (r == row or c == column or box_of[other] == box_of[cell])
        ]
        for cell, (row, column) in enumerate(places)
    ]


def count_plainly(board: list[int], box_height: int, box_width: int, limit: int = 2) -> int:
    """Count the solutions of a board by trying the digits of the cell with the fewest, without any propagation."""
    best, choices = None, None
    for cell, others in enumerate(peers(box_height, box_width)):
        if board[cell]:
            continue
        left = set(range(1, box_height * box_width + 1)) - {board[other] for other in others}
        if choices is None or len(left) < len(choices):
            best, choices = cell, left
        if not choices:
            return 0
    if best is None:
        return 1
    number = 0
    for digit in choices:
        board[best] = digit
        number += count_plainly(board, box_height, box_width, limit - number)
        board[best] = 0
        if number >= limit:
            break
    return number


def line_orders(box_length: int, size: int) -> list[list[int]]:
    blocks = [list(range(first, first + box_length)) for first in range(0, size, box_length)]
    return [
        [line for block in order for line in block]
        for choice in permutations(blocks)
        for order in product(*(list(permutations(block)) for block in choice))
    ]


def smallest_form(puzzle: list[int], grid: list[int], box_height: int, box_width: int) -> tuple:
    """Return the smallest form of a puzzle among all symmetries, by trying all of them. The digits are renamed as they first appear."""
    size = box_height * box_width
    forms = []
    for rows, columns in product(line_orders(box_height, size), line_orders(box_width, size)):
        orders = [[row * size + column for row in rows for column in columns]]
        if box_height == box_width:
            orders.append([column * size + row for row in rows for column in columns])
        for cells in orders:
            names = {}
            form = tuple(names.setdefault(grid[cell], len(names) + 1) for cell in cells)
            forms.append((form, tuple(names[puzzle[cell]] if puzzle[cell] else 0 for cell in cells)))
    return min(forms)


def test_there_are_288_grids_of_2_kinds_and_36_kinds_of_minimal_puzzles_of_4x4():
    """Known numbers of 4x4 Sudoku: a solver that misses solutions or a canonical form that joins or splits kinds changes them."""
    rules = sudoku_rules(4)
    grids = [rules.board(found) for found in rules.search(rules.all, limit=1000)[0]]
    assert len(grids) == len(set(map(tuple, grids))) == 288
    assert len({canonical_sudoku(rules, grid, grid) for grid in grids}) == 2
    kinds = set()
    for seed in range(900):
        random = Random(seed)
        grid = random_grid(rules, random)
        kinds.add(canonical_sudoku(rules, dig_puzzle(rules, grid, random), grid))
    assert Counter(len(puzzle) - puzzle.count(0) for _, puzzle in kinds) == {4: 13, 5: 22, 6: 1}


@pytest.mark.parametrize(("box", "number"), [((2, 2), 20), ((2, 3), 15), ((3, 2), 5), ((3, 3), 1)], ids=str)
def test_minimal_puzzles_have_one_solution_and_no_given_to_spare(box, number):
    """A shortcut in the uniqueness test would keep puzzles with several solutions, or givens that are not needed."""
    rules = Sudoku(*box)
    for seed in range(number):
        random = Random(seed)
        grid = random_grid(rules, random)
        puzzle = dig_puzzle(rules, grid, random)
        assert all(given in (0, digit) for given, digit in zip(puzzle, grid, strict=True))
        assert count_plainly(puzzle, *box) == 1
        assert check_sudoku(rules, puzzle) == grid
        for cell in range(len(puzzle)):
            if puzzle[cell]:
                without = [0 if other == cell else digit for other, digit in enumerate(puzzle)]
                assert count_plainly(without, *box) == 2


def test_clues():
    """Digging must stop at the number of clues, and must not return a puzzle with more of them."""
    rules = sudoku_rules(6)
    found = Counter()
    for seed in range(100):
        random = Random(seed)
        puzzle = dig_puzzle(rules, random_grid(rules, random), random, clues=10)
        found[None if puzzle is None else len(puzzle) - puzzle.count(0)] += 1
    assert set(found) == {None, 10}


def test_known_puzzles():
    """The first one needs singles only. A wrong count of guesses would give it a rating."""
    rules = sudoku_rules(9)
    assert check_sudoku(rules, digits(EASY), digits(EASY_SOLUTION)) == digits(EASY_SOLUTION)
    assert check_sudoku(rules, digits(HARD)) == digits(HARD_SOLUTION)
    assert rate_sudoku(rules, digits(EASY)) == 0
    assert rate_sudoku(rules, digits(HARD)) > 20


def test_search_counts_all_solutions():
    """The board without four cells of two rows and two columns of two digits has two solutions."""
    rules = sudoku_rules(4)
    board = digits("1234341221434321")
    for cell in (0, 2, 4, 6):  # 1 and 3 change places in the first two rows
        board[cell] = 0
    found, _ = rules.search(rules.candidates(board), limit=10)
    assert len(found) == count_plainly(board, 2, 2, 10) == 2


@pytest.mark.parametrize(
    ("puzzle", "solution", "message"),
    [
        ("1100000000000000", None, "no solution"),
        ("0" * 16, None, "several solutions"),
        ("2000000000000000", "1234341221434321", "1 at row 1, column 1, but the puzzle has 2"),
        ("1000000000000000", "1234341221434320", "no digit at row 4, column 4"),
        ("1000000000000000", "1234341221434312", "twice"),
        ("1000000000000000", "1234341221434321", "several solutions"),
    ],
)
def test_invalid_puzzles(puzzle, solution, message):
    with pytest.raises(ValueError, match=message):
        check_sudoku(sudoku_rules(4), digits(puzzle), None if solution is None else digits(solution))


@pytest.mark.parametrize(("box", "number"), [((2, 2), 40), ((2, 3), 3), ((3, 2), 2)], ids=str)
def test_canonical_form_equals_the_smallest_of_all_symmetries(box, number):
    """The fast form only looks at a part of the symmetries. A missing one would split kinds, and held-out puzzles would leak."""
    rules = Sudoku(*box)
    for seed in range(number):
        random = Random(seed)
        grid = random_grid(rules, random)
        puzzle = dig_puzzle(rules, grid, random)
        found = canonical_sudoku(rules, puzzle, grid)
        assert tuple(map(tuple, found)) == smallest_form(puzzle, grid, *box)


def test_6x6_has_49_kinds_of_grids():
    """28,200,960 grids of 6x6 have 49 kinds without transposition. More would mean that equivalent grids look different."""
    rules = sudoku_rules(6)
    kinds = set()
    for seed in range(1500):
        grid = random_grid(rules, Random(seed))
        kinds.add(canonical_sudoku(rules, grid, grid)[0])
    assert len(kinds) <= 49
    assert len(kinds) >= 45  # some kinds are rare
