"""Build datasets of grid puzzles: draw boards, drop equivalent ones, and write splits that never share a puzzle."""

import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import count, islice
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm import tqdm

from ...data.output import LOAD_FOLDER, REPORT_FILE, Output, digest_of, join_parts, make_table, publish, write_part
from ...io import write_json
from ...pages.page import Table, code, markdown, resource
from ...processes import Workers
from ...terminal import one_line
from ..vocab import ARC_VOCAB, MAZE_VOCAB, GridVocab, sudoku_vocab
from .arc import ArcPlan, PlannedTask, arc_rows
from .csv_source import CsvRow
from .maze import check_maze, make_maze
from .sudoku import canonical_sudoku, check_sudoku, dig_puzzle, random_grid, rate_sudoku, sudoku_rules
from .symmetry import canonical_maze


CHUNK = 50  # boards per task of a worker
PATIENCE = 1000  # draws in a row without a new board, after which a build gives up
ROWS_PER_PART = 1000
MAX_BLANKS = 5  # of the split `few_blanks`
COLUMNS = {
    "puzzle": (pa.list_(pa.uint8()), "ids of the cells of the puzzle, row by row"),
    "solution": (pa.list_(pa.uint8()), "ids of the cells of the solution, row by row; 0 is padding"),
    "height": (pa.int32(), "number of rows"),
    "width": (pa.int32(), "number of columns"),
    "family": (pa.string(), "kind of puzzle: sudoku, maze or arc"),
    "puzzle_id": (pa.string(), "id of the task, for models with one vector per task; otherwise empty"),
    "rating": (pa.int32(), "difficulty"),
    "source": (pa.string(), "where the puzzle comes from"),
    "group": (
        pa.string(),
        "equivalent puzzles have the same group; splits never share a group",
    ),
    "text": (pa.string(), "the puzzle and its solution as text"),
}


def vocab_of(family: str, size: int) -> GridVocab:
    """Return the vocabulary of a family of puzzles. `size` is the number of rows of a Sudoku."""
    return {"maze": MAZE_VOCAB, "arc": ARC_VOCAB}.get(family) or sudoku_vocab(size)


@dataclass(frozen=True)
class Board:
    """
    A puzzle with its solution.

    Args:
        family (`str`):
            `"sudoku"`, `"maze"` or `"arc"`.
        height (`int`), width (`int`):
            Number of rows and of columns.
        puzzle (`bytes`), solution (`bytes`):
            Ids of the cells in row-major order.
        rating (`int`):
            Difficulty.
        source (`str`):
            Where the puzzle comes from.
        group (`str`):
            Hash that equivalent puzzles share.
        layout (`str`):
            Hash that puzzles with equivalent solution grids (Sudoku) or walls (maze) share.
        puzzle_id (`str`, *optional*, defaults to `""`):
            Id of the task.
        text (`str`, *optional*):
            Puzzle and solution as text. Defaults to the symbols of all cells.
    """

    family: str
    height: int
    width: int
    puzzle: bytes
    solution: bytes
    rating: int
    source: str
    group: str
    layout: str
    puzzle_id: str = ""
    text: str | None = None

    def row(self) -> dict[str, Any]:
        """Return the row of the dataset."""
        text = self.text
        if text is None:
            vocab = vocab_of(self.family, self.height)
            lines = [vocab.decode(ids, self.height, self.width) for ids in (self.puzzle, self.solution)]
            text = "\n\n".join("\n".join(board) for board in lines)
        return {
            "puzzle": np.frombuffer(self.puzzle, dtype=np.uint8),
            "solution": np.frombuffer(self.solution, dtype=np.uint8),
            "height": self.height,
            "width": self.width,
            "family": self.family,
            "puzzle_id": self.puzzle_id,
            "rating": self.rating,
            "source": self.source,
            "group": self.group,
            "text": text,
        }


def _hash(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def sudoku_board(
    size: int, puzzle: Sequence[int], solution: Sequence[int], source: str, rating: int | None = None
) -> Board:
    """Return the board of a Sudoku, given as digits. `rating` defaults to the guesses of our solver."""
    rules = sudoku_rules(size)
    grid, form = canonical_sudoku(rules, puzzle, solution)
    return Board(
        family="sudoku",
        height=size,
        width=size,
        puzzle=bytes(digit + 1 for digit in puzzle),
        solution=bytes(digit + 1 for digit in solution),
        rating=rate_sudoku(rules, puzzle) if rating is None else rating,
        source=source,
        group=_hash(form),
        layout=_hash(grid),
    )


def maze_board(
    height: int, width: int, puzzle: Sequence[int], solution: Sequence[int], source: str, rating: int
) -> Board:
    """Return the board of a maze, given as ids."""
    board = np.frombuffer(bytes(puzzle), dtype=np.uint8)
    return Board(
        family="maze",
        height=height,
        width=width,
        puzzle=bytes(puzzle),
        solution=bytes(solution),
        rating=rating,
        source=source,
        group=_hash(canonical_maze(board, height, width)),
        layout=_hash(canonical_maze((board == MAZE_VOCAB.symbols.index("#")).astype(np.uint8), height, width)),
    )


@dataclass(frozen=True)
class BoardMaker:
    """
    Makes boards. Board `index` only depends on the fields and on `index`, so that any process can make it.

    Args:
        family (`str`):
            `"sudoku"` or `"maze"`.
        size (`int`):
            Number of rows and of columns.
        seed (`int`):
            Random seed.
        clues (`int`, *optional*):
            Number of givens of a Sudoku. By default, the puzzles are minimal. See [`~reasoning.data.sudoku.dig_puzzle`].
        loops (`float`, *optional*, defaults to `0.0`), endpoints (`str`, *optional*, defaults to `"random"`):
            Options of mazes. See [`~reasoning.data.maze.make_maze`].
    """

    family: str
    size: int
    seed: int
    clues: int | None = None
    loops: float = 0.0
    endpoints: str = "random"

    def make(self, index: int) -> Board | str:
        """Return a board, or the reason for dropping it."""
        random = Random(f"{self.seed}/{self.family}/{self.size}/{index}")
        if self.family == "maze":
            maze = make_maze(self.size, self.size, random, self.loops, self.endpoints)
            if maze is None:
                return "several shortest paths"
            rating, _ = check_maze(*maze, self.size, self.size)
            return maze_board(self.size, self.size, *maze, source="trl_hrm", rating=rating)
        rules = sudoku_rules(self.size)
        grid = random_grid(rules, random)
        puzzle = dig_puzzle(rules, grid, random, self.clues)
        if puzzle is None:
            return f"minimal with more than {self.clues} clues"
        return sudoku_board(self.size, puzzle, grid, source="trl_hrm")

    def make_few_blanks(self, index: int) -> Board:
        """Return a solved Sudoku with 1 to 5 digits removed."""
        random = Random(f"{self.seed}/few_blanks/{self.size}/{index}")
        rules = sudoku_rules(self.size)
        grid = random_grid(rules, random)
        puzzle = dig_puzzle(rules, grid, random, rules.num_cells - 1 - index % MAX_BLANKS)
        return sudoku_board(self.size, puzzle, grid, source="trl_hrm")


def csv_board(family: str, row: CsvRow) -> Board:
    """
    Return the board of a row of a CSV file.

    Raises:
        `ValueError`: If the answer contradicts the question, a Sudoku has no solution or several, or the answer of a maze is not a shortest
            path. The message names the file and the line.
    """
    try:
        if family == "maze":
            check_maze(row.puzzle, row.solution, row.size, row.size)
            return maze_board(row.size, row.size, row.puzzle, row.solution, row.source, row.rating)
        puzzle, solution = ([symbol - 1 for symbol in board] for board in (row.puzzle, row.solution))
        check_sudoku(sudoku_rules(row.size), puzzle, solution)
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None
    return sudoku_board(row.size, puzzle, solution, row.source, row.rating)


def boards_in_order(
    make: Callable[[Any], Any], items: Iterable[Any], num_proc: int, chunk_size: int = CHUNK
) -> Iterator[Any]:
    """
    Yield `make(item)` for each item, in the order of the items, which may be infinite. The processes work ahead by a few chunks.

    Args:
        make (`Callable[[Any], Any]`):
            Picklable function that makes a board, or several.
        items (`Iterable[Any]`):
            Its arguments.
        num_proc (`int`):
            Number of processes. With 1, this process does the work.
        chunk_size (`int`, *optional*, defaults to `50`):
            Number of items per chunk.
    """
    if num_proc == 1:
        yield from map(make, items)
        return
    items = iter(items)
    method = "fork" if sys.platform == "linux" else "spawn"
    with Workers(num_proc, method, "Lower --num_proc.") as workers:
        pending = deque()
        while True:
            while len(pending) < 2 * num_proc and (chunk := list(islice(items, chunk_size))):
                pending.append(workers.submit(_make_all, make, chunk))
            if not pending:
                return
            yield from pending.popleft().result()


def _make_all(make: Callable[[Any], Any], chunk: Sequence[Any]) -> list[Any]:
    return [make(item) for item in chunk]


def arc_board(row: dict[str, Any]) -> Board:
    """Return the board of a row of an ARC task. See [`~reasoning.data.arc.arc_rows`]."""
    boards = {name: row[name].tobytes() for name in ("puzzle", "solution")}
    return Board(**row | boards, layout="")


def _arc_boards(task: PlannedTask, split: str, **options: Any) -> list[Board]:
    return [arc_board(row) for row in arc_rows(task, split, **options)]


def arc_splits(
    plan: ArcPlan, num_proc: int, **options: Any
) -> tuple[dict[str, Iterator[Board]], dict[str, dict[str, int]]]:
    """
    Return the boards of each split of ARC, which are made while they are read, so that only a few tasks are in memory.

    Args:
        plan ([`~reasoning.data.arc.ArcPlan`]):
            Tasks with their pairs.
        num_proc (`int`):
            Number of processes.
        options:
            Options of [`~reasoning.data.arc.arc_rows`].

    Returns:
        `tuple[dict, dict]`: Boards by split, and facts by split for the report, which are complete once the boards have been read.
    """
    splits, facts = {}, {}
    for split in ("train", "validation", "test"):
        tasks = [task for task in plan.tasks if task.pairs[split]]
        if tasks:
            facts[split] = {"tasks": len(tasks), "pairs": sum(len(task.pairs[split]) for task in tasks)}
            splits[split] = _arc_split(tasks, split, num_proc, facts[split], options)
    return splits, facts


def _arc_split(
    tasks: Sequence[PlannedTask], split: str, num_proc: int, facts: dict[str, int], options: dict[str, Any]
) -> Iterator[Board]:
    facts |= {"boards": 0, "puzzle ids": 0}
    with tqdm(total=len(tasks), desc=split, unit="task") as bar:
        for boards in boards_in_order(partial(_arc_boards, split=split, **options), tasks, num_proc, chunk_size=1):
            facts["boards"] += len(boards)
            facts["puzzle ids"] += len({board.puzzle_id for board in boards})
            yield from boards
            bar.update()


class SplitFiller:
    """
    Fills splits with boards, each with a group that no earlier board has.

    Args:
        num_proc (`int`):
            Number of processes that make boards.

    Attributes:
        splits (`dict[str, list[Board]]`):
            Boards of each split.
        num_drawn (`int`):
            Number of boards that were drawn.
        dropped (`Counter`):
            Number of boards that were dropped, by reason.
        num_leaks (`Counter`):
            Number of boards per split that were dropped because they are equivalent to a training board.
    """

    def __init__(self, num_proc: int):
        self.num_proc = num_proc
        self.splits: dict[str, list[Board]] = {}
        self.num_drawn = 0
        self.dropped = Counter()
        self.num_leaks = Counter()
        self.split_of: dict[str, str] = {}

    def fill(self, sizes: dict[str, int], make: Callable[[Any], Board | str], items: Iterable[Any]) -> None:
        """
        Fill the splits in order, until each has its number of boards, or all items are used.

        Args:
            sizes (`dict[str, int]`):
                Number of boards per split.
            make (`Callable[[Any], Board | str]`):
                Function that makes a board of an item, or returns the reason for dropping it.
            items (`Iterable[Any]`):
                Items. If there are infinitely many, pass an `itertools.count`.

        Raises:
            `ValueError`: If there are infinitely many items, and many boards in a row are dropped.
        """
        wanted = [split for split, size in sizes.items() for _ in range(size)]
        for split in sizes:
            self.splits.setdefault(split, [])
        num_found = in_a_row = 0
        if not wanted:
            return
        boards = boards_in_order(make, items, 1 if len(wanted) <= 2 * CHUNK else self.num_proc)
        with tqdm(total=len(wanted), desc=" ".join(sizes), unit="board") as bar:
            for board in boards:
                self.num_drawn += 1
                split = wanted[num_found]
                reason = board if isinstance(board, str) else self._reason(board, split)
                if reason is None:
                    self.splits[split].append(board)
                    self.split_of[board.group] = split
                    in_a_row = 0
                    num_found += 1
                    bar.update()
                    if num_found == len(wanted):
                        break
                    continue
                self.dropped[reason] += 1
                in_a_row += 1
                if in_a_row == PATIENCE and isinstance(items, count):
                    raise ValueError(
                        f"the last {PATIENCE:,} boards were dropped ({reason}), after {num_found:,} of {len(wanted):,} boards for "
                        f"{', '.join(sizes)} were found. There may be no more of them. Ask for fewer boards, larger boards, or another number "
                        "of clues."
                    )
        boards.close()  # stops the workers

    def _reason(self, board: Board, split: str) -> str | None:
        """Return why a board is dropped, or `None`."""
        found = self.split_of.get(board.group)
        if found is None:
            return None
        if found == "train" and split != "train":
            self.num_leaks[split] += 1
        return "equivalent to an earlier one"

    def add_few_blanks(self, number: int, maker: BoardMaker) -> None:
        """
        Add the split of solved boards with 1 to 5 blanks. Boards of this split may be equivalent to each other, because small boards have
        few forms with one blank, but not to boards of the other splits.
        """
        boards = self.splits["few_blanks"] = []
        for index in count():
            if len(boards) == number:
                break
            board = maker.make_few_blanks(index)
            self.num_drawn += 1
            reason = self._reason(board, "few_blanks")
            if reason is None:
                boards.append(board)
                continue
            self.dropped[reason] += 1
            if index - len(boards) == PATIENCE:
                raise ValueError(
                    f"{PATIENCE:,} boards with few blanks were dropped ({reason}). Lower `num_few_blanks`, or remove solved boards from the "
                    "training split."
                )

    def facts(self) -> dict[str, Any]:
        """Return what is known about the splits, for the report and the card."""
        layouts = {board.layout for board in self.splits["train"]}
        facts = {}
        for split, boards in self.splits.items():
            if not boards:
                continue
            found = {"boards": len(boards)}
            ratings = [board.rating for board in boards]
            found["rating (lowest, mean, highest)"] = [
                min(ratings),
                round(sum(ratings) / len(ratings), 3),
                max(ratings),
            ]
            if boards[0].family == "sudoku":
                clues = [len(board.puzzle) - board.puzzle.count(1) for board in boards]
                found["clues (lowest, mean, highest)"] = [min(clues), round(sum(clues) / len(clues), 3), max(clues)]
            if split != "train":
                found["equivalent to a training board, dropped"] = self.num_leaks[split]
                what = "solution grids" if boards[0].family == "sudoku" else "walls"
                found[f"kept, but the {what} are known from training"] = sum(
                    board.layout in layouts for board in boards
                )
            facts[split] = found
        return facts


class GridReport(dict[str, Any]):
    """Report of a build, with the content of `build_report.json`. Its `str()` is a short table, followed by the warnings."""

    def __str__(self) -> str:
        lines = [("boards drawn", self["drawn"])]
        lines += [(f"dropped: {reason}", number) for reason, number in self["dropped"].items()]
        for split, facts in self["facts"].items():
            lines += [(f"{split}: {name}", value) for name, value in facts.items()]
        width = max(len(one_line(name)) for name, _ in lines)
        table = [f"{one_line(name):<{width}}  {_shown(value):>12}" for name, value in lines]
        return "\n".join(table + [f"warning: {one_line(warning)}" for warning in self["warnings"]])


def _shown(value: Any) -> str:
    return (
        f"{value:,}"
        if isinstance(value, int)
        else ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
    )


def write_grids(
    splits: dict[str, Iterable[Board]], report: GridReport, about: dict[str, Any], output: Output
) -> GridReport:
    """
    Write a dataset of grid puzzles, with its card and report, and rename it to the output.

    Args:
        splits (`dict[str, Iterable[Board]]`):
            Boards of each split. Iterators are read once, and only a part of their boards is in memory. Empty splits are left out.
        report ([`GridReport`]):
            Report. The keys `rows` and `content` are added.
        about (`dict[str, Any]`):
            `title`, `description`, `rating` (what it counts), `splits` (what they share) and `source` for the card, and optionally `group`
            (what a group is).
        output ([`~data.output.Output`]):
            Claimed output.

    Raises:
        `ValueError`: If the training split is empty.
    """
    parts, built = output.work / "parts", output.work / "dataset"
    parts.mkdir()
    (built / "data").mkdir(parents=True)
    types = {name: kind for name, (kind, _) in COLUMNS.items()}
    rows = Counter()
    for split, boards in splits.items():
        boards = iter(boards)
        for part in count():
            table = make_table([board.row() for board in islice(boards, ROWS_PER_PART)], types, split)
            if not table.num_rows:
                break
            write_part(table, parts, split, part)
            rows[split] += table.num_rows
    if not rows["train"]:
        raise ValueError("the train split is empty. Check the input and the number of boards.")
    report["rows"] = {split: rows[split] for split in splits if rows[split]}
    schema, example = join_parts(parts, built / "data", report["rows"], {})
    report["content"] = digest_of(built / "data")
    write_json(built / REPORT_FILE, report)
    _card(about, report, schema, example).save(built / "README.md")
    publish(built, output)
    return report


def _card(about: dict[str, Any], report: GridReport, schema: pa.Schema, example: dict[str, Any]) -> DatasetCard:
    files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in report["rows"]]
    # The content makes `load_dataset` read a folder again that was built again. See `data/card.py`
    config = {"config_name": "default", "description": f"content {report['content']}", "data_files": files}
    data = DatasetCardData(
        pretty_name=about["title"],
        tags=["trl", "trl_hrm", "grid-puzzles", report["view"]],
        configs=[config],
    )
    meanings = {name: meaning for name, (_, meaning) in COLUMNS.items()}
    meanings |= {name: about[name] for name in ("rating", "group") if name in about}
    columns = [
        [
            code(field.name),
            f"list of {field.type.value_type}" if pa.types.is_list(field.type) else str(field.type),
            markdown(meanings[field.name]),
        ]
        for field in schema
    ]
    counts = [["boards drawn", _shown(report["drawn"])]]
    counts += [[f"dropped: {markdown(reason)}", _shown(number)] for reason, number in report["dropped"].items()]
    counts += [
        [f"{split}: {name}", _shown(value)]
        for split, facts in report["facts"].items()
        for name, value in facts.items()
    ]
    shown = {name: [*value[:4], "..."] if isinstance(value, list) else value for name, value in example.items()}
    text = shown.pop("text")
    vocab = vocab_of(example["family"], example["height"])
    return DatasetCard.from_template(
        data,
        template_str=resource("templates/grid_dataset_card.md.jinja"),
        title=about["title"],
        description=about["description"],
        columns=Table(["column", "type", "meaning"], columns).markdown(),
        symbols=Table(["id", "symbol"], [[str(i), code(symbol)] for i, symbol in enumerate(vocab.symbols)]).markdown(),
        board=text,
        example=json.dumps(shown, indent=2, ensure_ascii=False),
        load=LOAD_FOLDER,
        counts=Table(["name", "value"], counts).markdown(),
        warnings=[markdown(warning) for warning in report["warnings"]],
        splits=about["splits"],
        command=report["command"],
        source=about["source"],
    )
