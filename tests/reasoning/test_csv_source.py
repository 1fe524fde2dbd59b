"""CSV files of the papers: how rows are read, and which rows raise errors."""

import gzip
from random import Random

import pytest

from trl_hrm.reasoning.data.csv_source import read_csv, sample_csv


HEADER = "source,question,answer,rating\n"
GRID = "1234341221434321"
MAZE = ("#####" "#S G#" "#####" "#####" "#####", "#####" "#SoG#" "#####" "#####" "#####")  # fmt: skip


def write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "train.csv"


def test_sudoku(file):
    """The model expects the id 1 for a blank cell, and d + 1 for the digit d."""
    write(file, f"{HEADER}puzzles0_kaggle,1.34...22143432.,{GRID},3\nhard,{'.' * 16},{GRID},0\n")
    first, second = read_csv(file, "sudoku")
    assert first.puzzle == bytes([2, 1, 4, 5, 1, 1, 1, 3, 3, 2, 5, 4, 5, 4, 3, 1])
    assert first.solution == bytes(int(digit) + 1 for digit in GRID)
    assert (first.size, first.rating, first.source, first.where) == (4, 3, "puzzles0_kaggle", f"{file}:2")
    assert (second.puzzle, second.where) == (b"\x01" * 16, f"{file}:3")


def test_files_of_other_tools(file):
    """An empty last line, and other symbols of blank cells, as in Kaggle's files. An answer has no blank cells."""
    write(file, f"{HEADER}a,1034000022143430,{GRID},3\nb,1_34____2214343_,{GRID},3\n\n")
    first, second = read_csv(file, "sudoku")
    assert first.puzzle == second.puzzle == bytes([2, 1, 4, 5, 1, 1, 1, 1, 3, 3, 2, 5, 4, 5, 4, 1])
    write(file, f"{HEADER}a,{GRID},0{GRID[1:]},3\n")
    with pytest.raises(ValueError, match="the answer has '0' at row 1, column 1"):
        list(read_csv(file, "sudoku"))


def test_maze(file):
    write(file, f"{HEADER}x,{MAZE[0]},{MAZE[1]},2.0\n")
    (row,) = read_csv(file, "maze")
    assert row.puzzle == bytes([1] * 6 + [3, 2, 4] + [1] * 16)
    assert row.solution == bytes([1] * 6 + [3, 5, 4] + [1] * 16)
    assert (row.size, row.rating) == (5, 2)


def test_compressed(file, tmp_path):
    write(file, f"{HEADER}a,{'.' * 16},{GRID},3\n")
    packed = tmp_path / "train.csv.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert [row.puzzle for row in read_csv(packed, "sudoku")] == [row.puzzle for row in read_csv(file, "sudoku")]


BLANK = "." * 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: found the header"),
        ("question,answer\n", ":1: found the header"),
        (f"{HEADER}a,{BLANK},{GRID}\n", ":2: found 3 fields"),
        (f"{HEADER}a,{BLANK}.,{GRID},1\n", ":2: the question has 17 characters, expected a square board of 4, 6 or 9 rows"),
        (f"{HEADER}a,{'.' * 25},{'1' * 25},1\n", ":2: the question has 25 characters"),
        (f"{HEADER}a,{BLANK},{GRID},1\na,{'.' * 81},{'1' * 81},1\n", ":3: the question has 81 characters, expected 16"),
        (f"{HEADER}a,{BLANK},{GRID}1,1\n", ":2: the answer has 17 characters, expected 16"),
        (f"{HEADER}a,{BLANK},{GRID},1\na,....5...........,{GRID},1\n", ":3: the question has '5' at row 2, column 1"),
        (f"{HEADER}a,{BLANK},{GRID},hard\n", ":2: the rating is 'hard'"),
        (f"{HEADER}a,{BLANK},{GRID},2.5\n", ":2: the rating is '2.5'"),
        (f'{HEADER}a,{BLANK},{GRID},1\n"a\n', ":3: not valid CSV"),
    ],
)  # fmt: skip
def test_invalid_rows(file, text, message):
    """A row that is read with shifted columns or cells would train without an error."""
    write(file, text)
    with pytest.raises(ValueError) as error:
        list(read_csv(file, "sudoku"))
    assert f"{file}{message}" in str(error.value)


def test_invalid_utf8(file):
    file.write_bytes(HEADER.encode() + b"\xff\n")
    with pytest.raises(ValueError, match="not valid UTF-8"):
        list(read_csv(file, "sudoku"))


def rows_of(number: int) -> str:
    """Rows with different sources and questions: row i has a blank in the cells of the bits of i."""
    return HEADER + "".join(
        f"{i},{''.join('.' if i >> cell & 1 else digit for cell, digit in enumerate(GRID))},{GRID},{i}\n"
        for i in range(number)
    )


def test_sample(file):
    """The sample must be random over the whole file, since files are sorted by source, and the same for a seed."""
    write(file, rows_of(200))
    found = [row.rating for row in sample_csv(file, "sudoku", 50, Random("0"))]
    assert len(set(found)) == 50
    assert max(found) > 150
    assert found != sorted(found)
    assert found == [row.rating for row in sample_csv(file, "sudoku", 50, Random("0"))]
    assert found != [row.rating for row in sample_csv(file, "sudoku", 50, Random("1"))]
    assert sorted(row.rating for row in sample_csv(file, "sudoku", 1000, Random("0"))) == list(range(200))
    assert sorted(row.rating for row in sample_csv(file, "sudoku", None, Random("0"))) == list(range(200))


def test_conflicting_rows(file):
    """Two answers to one question: one of them is wrong."""
    other = "1234341243212143"
    write(file, f"{HEADER}a,{BLANK},{GRID},1\na,{BLANK},{GRID},1\nb,{BLANK},{other},1\n")
    with pytest.raises(ValueError) as error:
        sample_csv(file, "sudoku", None, Random("0"))
    assert f"{file}:4" in str(error.value)
    assert "different answers" in str(error.value)


def test_file_without_rows(file):
    write(file, HEADER)
    with pytest.raises(ValueError, match="no rows"):
        sample_csv(file, "sudoku", 5, Random("0"))
