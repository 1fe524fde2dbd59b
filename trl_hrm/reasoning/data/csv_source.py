"""Read puzzles from the CSV files of sudoku-extreme and maze-30x30-hard-1k, with the columns `source,question,answer,rating`."""

import csv
import gzip
import heapq
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from random import Random

from tqdm import tqdm

from ...io import check_regular, shown
from ..vocab import MAZE_VOCAB, sudoku_vocab


HEADER = ["source", "question", "answer", "rating"]
SIZES = (4, 6, 9)  # of Sudoku


@dataclass(frozen=True)
class CsvRow:
    """
    A row of a CSV file.

    Args:
        where (`str`):
            File and line, for error messages.
        source (`str`):
            Where the puzzle comes from, as in the file.
        puzzle (`bytes`), solution (`bytes`):
            Ids of the cells in row-major order.
        size (`int`):
            Number of rows and of columns.
        rating (`int`):
            Difficulty, as in the file. For sudoku-extreme, the number of backtracks of the solver tdoku.
    """

    where: str
    source: str
    puzzle: bytes
    solution: bytes
    size: int
    rating: int


def read_csv(path: str | Path, family: str) -> Iterator[CsvRow]:
    """
    Yield the rows of a CSV file. Empty lines are skipped. In the question of a Sudoku, `.`, `0` and `_` are blank cells.

    Args:
        path (`str` or `Path`):
            CSV file. If its name ends with `.gz`, it is decompressed.
        family (`str`):
            `"sudoku"` or `"maze"`.

    Raises:
        `ValueError`: If the header or a row is invalid. The message names the file and the line. The rules of the puzzle are not checked.
    """
    check_regular(path)
    opened = gzip.open if str(path).endswith(".gz") else open
    size, ids, vocab = 0, {}, MAZE_VOCAB
    with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, strict=True)
        try:
            header = next(lines, [])
            if header != HEADER:
                raise ValueError(
                    f"{path}:1: found the header {shown(','.join(header))}, expected {','.join(HEADER)}, as in sudoku-extreme and "
                    "maze-30x30-hard-1k."
                )
            for fields in lines:
                if not fields:  # an empty line, as some tools write at the end
                    continue
                where = f"{path}:{lines.line_num}"
                if len(fields) != len(HEADER):
                    raise ValueError(
                        f"{where}: found {len(fields)} fields, expected {len(HEADER)}: {','.join(HEADER)}."
                    )
                source, question, answer, rating = fields
                if not ids:  # the first row decides about the size
                    size = isqrt(len(question))
                    if size**2 != len(question) or (family == "sudoku" and size not in SIZES):
                        sizes = " of 4, 6 or 9 rows" if family == "sudoku" else ""
                        raise ValueError(
                            f"{where}: the question has {len(question)} characters, expected a square board{sizes}, one character per cell."
                        )
                    vocab = MAZE_VOCAB if family == "maze" else sudoku_vocab(size)
                    ids = {symbol: index for index, symbol in enumerate(vocab.symbols) if len(symbol) == 1}
                    blanks = dict.fromkeys("0_", ids["."]) if family == "sudoku" else {}
                boards = []
                for name, text, known in (("question", question, ids | blanks), ("answer", answer, ids)):
                    if len(text) != size**2:
                        raise ValueError(
                            f"{where}: the {name} has {len(text)} characters, expected {size**2}, as in the first row."
                        )
                    if not known.keys() >= set(text):
                        cell, symbol = next((cell, symbol) for cell, symbol in enumerate(text) if symbol not in known)
                        raise ValueError(
                            f"{where}: the {name} has {shown(symbol)} at row {cell // size + 1}, column {cell % size + 1}, expected one of "
                            f"{vocab.shown}."
                        )
                    boards.append(bytes(map(known.__getitem__, text)))
                # Some tools write whole numbers as 5.0
                if not re.fullmatch(r"\d{1,9}(\.0)?", rating):
                    raise ValueError(f"{where}: the rating is {shown(rating)}. It must be a whole number below 10**9.")
                yield CsvRow(where, source, *boards, size, int(rating.removesuffix(".0")))
        except csv.Error as error:
            raise ValueError(f"{path}:{lines.line_num}: not valid CSV ({error}).") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not valid UTF-8 after line {lines.line_num} ({error.reason}).") from None


def sample_csv(path: str | Path, family: str, num: int | None, random: Random) -> list[CsvRow]:
    """
    Return `num` random rows of a CSV file in random order, or all of them in random order. The whole file is read and checked.

    Args:
        path (`str` or `Path`):
            CSV file. See [`read_csv`].
        family (`str`):
            `"sudoku"` or `"maze"`.
        num (`int`, *optional*):
            Number of rows. If the file has fewer, all are returned.
        random (`Random`):
            Source of randomness.

    Raises:
        `ValueError`: If a row is invalid, or two of the returned rows have the same question and different answers.
    """
    keyed = (
        (random.random(), number, row)
        for number, row in enumerate(tqdm(read_csv(path, family), desc=Path(path).name, unit="row"))
    )
    rows = [row for *_, row in (sorted(keyed) if num is None else heapq.nsmallest(num, keyed))]
    first = {}
    for row in rows:
        other = first.setdefault(row.puzzle, row)
        if other.solution != row.solution:
            raise ValueError(
                f"{row.where} and {other.where} have the same question and different answers. Remove the wrong row."
            )
    if not rows:
        raise ValueError(f"{path}: found a header and no rows.")
    return rows
