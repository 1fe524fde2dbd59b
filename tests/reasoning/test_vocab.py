"""Symbols, their ids, and reading of boards."""

import pytest

from trl_hrm.reasoning import ARC_VOCAB, MAZE_VOCAB, GridVocab, box_shape, sudoku_vocab


def test_ids_of_the_original():
    """Ids of the original datasets: blank 1 and digit d + 1, maze characters in order, colour + 2."""
    sudoku = sudoku_vocab(9)
    assert len(sudoku) == 11 and len(MAZE_VOCAB) == 6 and len(ARC_VOCAB) == 12
    assert sudoku.encode([".123456789"]) == [list(range(1, 11))]
    assert MAZE_VOCAB.encode(["# SGo"]) == [[1, 2, 3, 4, 5]]
    assert ARC_VOCAB.encode([[0, 9]]) == [[2, 11]]
    assert all(vocab.symbols[0] == "<pad>" for vocab in (sudoku, MAZE_VOCAB, ARC_VOCAB))


@pytest.mark.parametrize(
    "board",
    [
        "1..4\n..1.\n.3..\n4..1",
        "1004\n0010\n0300\n4001\n",
        "1 _ _ 4\n_ _ 1 _\n_ 3 _ _\n4 _ _ 1",
        "1..4..1..3..4..1",
        " 1004 0010 0300 4001 ",
        ["1..4", "..1.", ".3..", "4..1"],
        [[1, 0, 0, 4], [0, 0, 1, 0], [0, 3, 0, 0], [4, 0, 0, 1]],
        [["1", ".", ".", "4"], [".", ".", "1", "."], [".", "3", ".", "."], ["4", ".", ".", "1"]],
    ],
    ids=["dots", "zeros", "underscores", "one line", "one line with spaces", "rows", "numbers", "symbols"],
)
def test_sudoku_forms(board):
    """All usual ways to write a Sudoku give the same ids."""
    assert sudoku_vocab(4).encode(board) == [[2, 1, 1, 5], [1, 1, 2, 1], [1, 4, 1, 1], [5, 1, 1, 2]]


def test_spaces_of_a_maze_are_cells():
    """Stripping a maze would move its cells."""
    assert MAZE_VOCAB.encode("S  \n# G\n   ") == [[3, 2, 2], [1, 2, 4], [2, 2, 2]]
    assert MAZE_VOCAB.encode("   \nS G\n   ")[0] == [2, 2, 2]


@pytest.mark.parametrize(
    ("vocab", "board", "message"),
    [
        (sudoku_vocab(4), "1..4\n..x.\n....\n....", "File 7: row 2, column 3 is 'x'"),
        (sudoku_vocab(4), "1..5\n....\n....\n....", "row 1, column 4 is '5'"),
        (sudoku_vocab(4), "1..4\n...\n....\n....", "row 2 has 3 cells, but row 1 has 4"),
        (sudoku_vocab(4), "", "is empty"),
        (sudoku_vocab(4), [], "is empty"),
        (sudoku_vocab(4), [1, 2, 3, 4], "row 1 is the number 1. Expected a list of rows"),
        (MAZE_VOCAB, "S.G", "row 1, column 2 is '.'"),
        (MAZE_VOCAB, "S0G", "row 1, column 2 is '0'"),
        (ARC_VOCAB, [[1, 10]], "row 1, column 2 is '10'"),
        (ARC_VOCAB, [[1, -1]], "row 1, column 2 is '-1'"),
    ],
    ids=[
        "letter",
        "digit",
        "row",
        "empty text",
        "empty list",
        "flat",
        "maze dot",
        "maze zero",
        "arc 10",
        "arc negative",
    ],
)
def test_bad_boards(vocab, board, message):
    """The message names the board, the row and the column."""
    with pytest.raises(ValueError, match=message):
        vocab.encode(board, "File 7")


def test_decode():
    """Rows are cut at the width, and a padding cell does not move the others."""
    vocab = sudoku_vocab(4)
    assert vocab.decode([2, 1, 0, 5, 3, 3], 2, 3) == ["1.?", "422"]
    for board in (["1..4", "..1.", ".3..", "4..1"],):
        assert vocab.decode(sum(vocab.encode(board), []), 4, 4) == board
    with pytest.raises(ValueError, match="Found 3 ids, expected 2 x 2 = 4"):
        vocab.decode([1, 1, 1], 2, 2)


def test_dict():
    for vocab in (sudoku_vocab(6), MAZE_VOCAB, ARC_VOCAB):
        assert GridVocab.from_dict(vocab.to_dict()) == vocab
    for values in ({"name": "maze"}, {"name": "maze", "symbols": 3}, "maze", None):
        with pytest.raises(ValueError, match="has a 'name' and a list of 'symbols'"):
            GridVocab.from_dict(values)
    with pytest.raises(ValueError, match="are texts"):
        GridVocab("maze", ("<pad>", 1))
    with pytest.raises(ValueError, match="must be '<pad>'"):
        GridVocab("maze", ("#", " "))
    with pytest.raises(ValueError, match="duplicate"):
        GridVocab("maze", ("<pad>", "#", "#"))


def test_boxes():
    """6 x 6 boxes have 2 rows and 3 columns, not the other way round."""
    assert [box_shape(size) for size in (4, 6, 9)] == [(2, 2), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="size 5"):
        sudoku_vocab(5)


def test_the_blank_cell_of_a_sudoku():
    """Code outside the vocabulary relies on its id."""
    with pytest.raises(ValueError, match=r"second symbol of a Sudoku vocabulary must be '\.'"):
        GridVocab("sudoku", ("<pad>", "1", ".", "2"))
