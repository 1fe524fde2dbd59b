"""Symbols of a grid puzzle and their ids: Sudoku, mazes and ARC."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt


@dataclass(frozen=True)
class GridVocab:
    """
    The symbols of a grid puzzle. The id of a symbol is its index, as in the code of the HRM paper (arXiv 2506.21734).

    Args:
        name (`str`):
            Kind of puzzle: `"sudoku"`, `"maze"` or `"arc"`.
        symbols (`tuple[str, ...]`):
            Symbols in the order of their ids. The first one is `"<pad>"`.
    """

    name: str
    symbols: tuple[str, ...]

    def __post_init__(self):
        object.__setattr__(self, "symbols", tuple(self.symbols))
        if not isinstance(self.name, str) or not all(isinstance(symbol, str) for symbol in self.symbols):
            raise ValueError(
                f"The name and the symbols of a vocabulary are texts, found {self.name!r} and {self.symbols!r}."
            )
        if not self.symbols or self.symbols[0] != "<pad>":
            raise ValueError(f"The first symbol of a vocabulary must be '<pad>', found {self.symbols[:1]}.")
        if len(set(self.symbols)) != len(self.symbols):
            raise ValueError(f"The vocabulary {self.name!r} has duplicate symbols: {self.symbols}.")
        if self.name == "sudoku" and self.symbols[1:2] != (".",):
            raise ValueError(
                f"The second symbol of a Sudoku vocabulary must be '.', a blank cell, found {self.symbols[1:2]}."
            )

    def __len__(self) -> int:
        return len(self.symbols)

    def encode(
        self, rows: str | Sequence[str] | Sequence[Sequence[int | str]], where: str = "the board"
    ) -> list[list[int]]:
        """
        Return the ids of a board, one list per row.

        Args:
            rows (`str`, `Sequence[str]` or `Sequence[Sequence[int | str]]`):
                Board as text with one line per row, as a list of rows, or as a list of lists of symbols. A text of one line is
                a square board if its length is a square number. Integers stand for the symbol with the same name. For Sudoku,
                `.`, `0` and `_` are blank cells, and spaces are ignored.
            where (`str`, *optional*, defaults to `"the board"`):
                Name of the board in error messages, for example a file and a line.

        Returns:
            `list[list[int]]`: Ids of shape (height, width).

        Raises:
            `ValueError`: If a symbol is not in the vocabulary, if the rows have different lengths, or if the board is empty.
        """
        sudoku = self.name == "sudoku"
        if isinstance(rows, str):
            rows = [line for line in rows.splitlines() if line.strip() or (line and not sudoku)]
            if sudoku:
                rows = ["".join(line.split()) for line in rows]
            if len(rows) == 1 and isqrt(len(rows[0])) ** 2 == len(rows[0]):
                side = isqrt(len(rows[0]))
                rows = [rows[0][start : start + side] for start in range(0, side * side, side)]
        elif sudoku:
            rows = ["".join(row.split()) if isinstance(row, str) else row for row in rows]
        if len(rows) and isinstance(rows[0], int):
            raise ValueError(
                f"{where}: row 1 is the number {rows[0]}. Expected a list of rows, each with one symbol per cell."
            )
        if not len(rows) or not len(rows[0]):
            raise ValueError(f"{where} is empty. Expected rows of the symbols {self.shown}.")
        ids = {symbol: index for index, symbol in enumerate(self.symbols)}
        if sudoku:
            ids |= {"0": ids["."], "_": ids["."]}
        board = []
        for row_number, row in enumerate(rows, start=1):
            if len(row) != len(rows[0]):
                raise ValueError(
                    f"{where}: row {row_number} has {len(row)} cells, but row 1 has {len(rows[0])}. All rows must have the same "
                    "length."
                )
            board.append([])
            for column_number, symbol in enumerate(row, start=1):
                if str(symbol) not in ids:
                    raise ValueError(
                        f"{where}: row {row_number}, column {column_number} is {str(symbol)!r}, which is not a symbol of the "
                        f"vocabulary {self.name!r}. Expected one of {self.shown}."
                    )
                board[-1].append(ids[str(symbol)])
        return board

    def decode(self, ids: Sequence[int], height: int, width: int) -> list[str]:
        """
        Return the rows of a board as text. `<pad>` and other symbols with more than one character are written as `?`.

        Args:
            ids (`Sequence[int]`):
                Ids of all cells, row by row.
            height (`int`):
                Number of rows.
            width (`int`):
                Number of columns.

        Returns:
            `list[str]`: One string per row.
        """
        if len(ids) != height * width:
            raise ValueError(f"Found {len(ids)} ids, expected {height} x {width} = {height * width}.")
        shown = [symbol if len(symbol) == 1 else "?" for symbol in self.symbols]
        return [
            "".join(shown[int(index)] for index in ids[start : start + width])
            for start in range(0, height * width, width)
        ]

    @property
    def shown(self) -> str:
        """The symbols as they are written in messages."""
        return ", ".join(repr(symbol) for symbol in self.symbols[1:])

    def to_dict(self) -> dict:
        """Return the vocabulary as a JSON object."""
        return {"name": self.name, "symbols": list(self.symbols)}

    @classmethod
    def from_dict(cls, values: dict) -> "GridVocab":
        """Return the vocabulary of a JSON object written by `to_dict`."""
        if (
            not isinstance(values, dict)
            or set(values) != {"name", "symbols"}
            or not isinstance(values["symbols"], list | tuple)
        ):
            raise ValueError(f"A vocabulary has a 'name' and a list of 'symbols', found {values!r}.")
        return cls(values["name"], tuple(values["symbols"]))


def box_shape(size: int) -> tuple[int, int]:
    """Return the rows and columns of a box of a Sudoku of this size: 4, 6 or 9."""
    boxes = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
    if size not in boxes:
        raise ValueError(f"Found a Sudoku of size {size}. Expected 4, 6 or 9.")
    return boxes[size]


def sudoku_vocab(size: int) -> GridVocab:
    """Return the vocabulary of a Sudoku of this size: blank is 1, digit d is d + 1."""
    box_shape(size)
    return GridVocab("sudoku", ("<pad>", ".", *(str(digit) for digit in range(1, size + 1))))


MAZE_VOCAB = GridVocab("maze", ("<pad>", "#", " ", "S", "G", "o"))
ARC_VOCAB = GridVocab("arc", ("<pad>", "<eos>", *(str(colour) for colour in range(10))))
