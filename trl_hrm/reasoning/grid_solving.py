"""Solving one's own boards with a model: reading, symmetric copies, halting and votes."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .configuration_hrm_grid import HrmGridConfig
from .halting import halt


if TYPE_CHECKING:
    from .modeling_hrm_grid import HrmGridForSolving


@dataclass
class GridSolution:
    """
    Answer of a model to one puzzle. The answer is not guaranteed to be right.

    Args:
        answer (`list[str]`):
            Rows of the answer as text. Answers to ARC puzzles are cropped to their size.
        ids (`list[list[int]]`):
            Ids of the answer, row by row, of shape (height, width) of the model.
        q_halt (`list[float]`):
            Logit of "the answer is right" after each segment.
        segments_used (`int`):
            Segment that the answer comes from, starting at 1.
        segments (`list[list[str]]`):
            Rows of the answer after each segment.
        agrees_with_givens (`bool`, *optional*):
            Whether the answer keeps the givens (Sudoku), or the walls, start and goal (maze). `None` for ARC.
        valid (`bool`, *optional*):
            Whether each row, column and box of a Sudoku has each digit once. `None` for other puzzles.
        votes (`int`):
            Number of copies with this answer. `q_halt`, `segments_used` and `segments` belong to the copy with the highest logit among
            them.
    """

    answer: list[str]
    ids: list[list[int]]
    q_halt: list[float]
    segments_used: int
    segments: list[list[str]]
    agrees_with_givens: bool | None
    valid: bool | None
    votes: int


def read_boards(puzzle: str | Sequence, config: HrmGridConfig) -> tuple[list[list[int]], bool]:
    """
    Return the ids of each board, row by row, and whether `puzzle` is a list of puzzles.

    Args:
        puzzle (`str` or `Sequence`):
            One puzzle, as text, rows or lists of symbols (see `GridVocab.encode`), or a list of puzzles.
        config ([`HrmGridConfig`]):
            Configuration with the vocabulary and the size of the board.

    Returns:
        `tuple[list[list[int]], bool]`: Ids of shape (N, L), and whether there is a list of puzzles.

    Raises:
        `ValueError`: If a board has another size or a symbol outside the vocabulary, or if a Sudoku has a digit twice in a row,
            column or box, or a maze has not one start and one goal.
    """
    vocab = config.grid_vocab
    several = False
    if not isinstance(puzzle, str):
        puzzle = without_arrays(puzzle)
        if not isinstance(puzzle, list) or not puzzle or not isinstance(puzzle[0], Sequence) or not puzzle[0]:
            raise ValueError(f"Found the puzzle {str(puzzle)[:60]!r}. Expected text, rows, or a list of puzzles.")
        first = puzzle[0]
        if isinstance(first, str):
            # Rows of one puzzle, unless the first text is a whole board.
            cells = "".join(first.split()) if vocab.name == "sudoku" else first
            several = "\n" in first.strip() or (config.height > 1 and len(cells) == config.seq_len)
        else:
            # Lists of symbols are rows of one puzzle. Lists of rows are puzzles.
            several = isinstance(first[0], Sequence) and (not isinstance(first[0], str) or len(first[0]) > 1)
    boards = []
    for number, board in enumerate(puzzle if several else [puzzle], start=1):
        where = f"Puzzle {number}" if several else "The puzzle"
        rows = vocab.encode(board, where)
        height, width = len(rows), len(rows[0])
        if vocab.name == "arc" and height <= config.height and width <= config.width:
            rows = pad_arc(rows, config.height, config.width)
        elif (height, width) != (config.height, config.width):
            raise ValueError(
                f"{where} has {height} x {width} cells. The model expects {config.height} x {config.width} cells."
            )
        if vocab.name == "sudoku":
            for name, cells in sudoku_units(config):
                digits = [rows[row][column] for row, column in cells if rows[row][column] > 1]
                twice = [digit for digit, count in Counter(digits).items() if count > 1]
                if twice:
                    raise ValueError(
                        f"{where} has no solution: the digit {vocab.symbols[twice[0]]} is given twice in {name}. Correct the givens."
                    )
        board = [index for row in rows for index in row]
        if vocab.name == "maze":
            for symbol, expected in (("S", 1), ("G", 1), ("o", 0)):
                found = board.count(vocab.symbols.index(symbol))
                if found != expected:
                    raise ValueError(
                        f"{where} has {found} cells with {symbol!r}, expected {expected}: a maze has one start S, one goal G, and no path o."
                    )
        boards.append(board)
    return boards, several


def without_arrays(value: Any) -> Any:
    """Return a board or boards with arrays and their numbers, at all levels, as lists and as numbers of Python."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return [without_arrays(part) for part in value] if isinstance(value, list | tuple) else value


def sudoku_units(config: HrmGridConfig) -> list[tuple[str, list[tuple[int, int]]]]:
    """Return the name and cells (row, column) of each row, column and box of a Sudoku."""
    size, box_height, box_width = config.height, config.box_height, config.box_width
    rows = [(f"row {row + 1}", [(row, column) for column in range(size)]) for row in range(size)]
    columns = [(f"column {column + 1}", [(row, column) for row in range(size)]) for column in range(size)]
    boxes = [
        (
            f"the box at row {top + 1}, column {left + 1}",
            [(row, column) for row in range(top, top + box_height) for column in range(left, left + box_width)],
        )
        for top in range(0, size, box_height)
        for left in range(0, size, box_width)
    ]
    return rows + columns + boxes


def pad_arc(rows: list[list[int]], height: int, width: int) -> list[list[int]]:
    """Return an ARC grid at the top left of a board. `<eos>` marks the row below it and the column to the right of it."""
    right, below = len(rows[0]), len(rows)
    board = [row + ([1] + [0] * (width - right - 1) if right < width else []) for row in rows]
    if below < height:
        board.append([1] * right + [0] * (width - right))
    return board + [[0] * width for _ in range(height - len(board))]


def crop_arc(rows: list[list[int]]) -> list[list[int]]:
    """Return the largest rectangle at the top left of a board that only has colours. It can be empty."""
    best, width = (0, 0), len(rows[0])
    for height, row in enumerate(rows, start=1):
        width = next((column for column, index in enumerate(row[:width]) if index < 2), width)
        best = max(best, (height, width), key=lambda size: size[0] * size[1])
    return [row[: best[1]] for row in rows[: best[0]]]


def symmetric_copies(config: HrmGridConfig, votes: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """
    Return symmetries of the puzzle: digit permutations and, with square boxes, transposition for Sudoku; rotations and reflections
    for mazes. The first one is the identity.

    Args:
        config ([`HrmGridConfig`]):
            Configuration with the vocabulary and the size of the board.
        votes (`int`):
            Number of symmetries.
        seed (`int`):
            Seed of the choice.

    Returns:
        `list[tuple[list[int], list[int]]]`: For each symmetry the cell that each cell of the copy comes from, and the id that replaces each id.

    Raises:
        `ValueError`: If the puzzle has fewer symmetries, or if it is an ARC puzzle.
    """
    height, width = config.height, config.width
    index = torch.arange(height * width).view(height, width)
    symbols = list(range(config.vocab_size))
    generator = random.Random(seed)
    name = config.grid_vocab.name
    if votes == 1:
        return [(index.flatten().tolist(), symbols)]
    if name == "sudoku":
        copies = [(index.flatten().tolist(), symbols)]
        for _ in range(votes - 1):
            digits = symbols[2:]
            generator.shuffle(digits)
            transposed = config.box_height == config.box_width and generator.random() < 0.5
            copies.append(((index.T if transposed else index).flatten().tolist(), symbols[:2] + digits))
        return copies
    if name == "maze":
        turns = [0, 1, 2, 3] if height == width else [0, 2]
        cells = [board.rot90(turn).flatten().tolist() for board in (index, index.flip(1)) for turn in turns]
        if votes > len(cells):
            raise ValueError(
                f"`votes` is {votes}, but a maze of {height} x {width} cells has {len(cells)} symmetries. Use fewer votes, or set `noise`."
            )
        rest = cells[1:]
        generator.shuffle(rest)
        return [(cell, symbols) for cell in [cells[0], *rest[: votes - 1]]]
    raise ValueError(
        f"`votes` is {votes}, but puzzles of the kind {name!r} have no symmetries that keep their puzzle id. Set `noise`, or `votes=1`."
    )


@torch.no_grad()
def solve_boards(
    model: "HrmGridForSolving",
    boards: list[list[int]],
    puzzle_ids: list[int],
    segments: int,
    halting: str,
    noise: float,
    votes: int,
    seed: int,
    batch_size: int,
) -> list[GridSolution]:
    """
    Return the solutions of encoded boards. See [`HrmGridForSolving.solve`] for the arguments.
    """
    config, device = model.config, model.device
    vocab = config.grid_vocab
    copies = symmetric_copies(config, 1 if noise else votes, seed)
    cells = torch.tensor([cell for cell, _ in copies], device=device).expand(votes, -1)
    symbols = torch.tensor([symbol for _, symbol in copies], device=device).expand(votes, -1)
    # The same noise for all boards, so that a solution does not depend on the other boards of the call.
    z_H, z_L = model.initial_state(votes)
    if noise:
        generator = torch.Generator().manual_seed(seed)
        z_H = z_H + noise * torch.randn(z_H.shape, generator=generator).to(z_H)
        z_L = z_L + noise * torch.randn(z_L.shape, generator=generator).to(z_L)
    puzzles = torch.tensor(boards, device=device)
    rows = torch.arange(len(boards) * votes, device=device)
    chunks = []
    for chunk in rows.split(batch_size):
        vote = chunk % votes
        inputs = symbols[vote].gather(1, puzzles[chunk // votes].gather(1, cells[vote]))
        ids = torch.tensor(puzzle_ids, device=device)[chunk // votes]
        state_H, state_L = z_H[vote], z_L[vote]
        answers, q_halts, first_halt = [], [], torch.zeros_like(chunk)
        for segment in range(1, segments + 1):
            output = model(inputs, ids, state_H, state_L)
            state_H, state_L = output.z_H, output.z_L
            # Undo the symmetry: the answer at cell i of the copy belongs to cell `cells[i]` of the puzzle.
            answer = symbols[vote].argsort(1).gather(1, output.logits.argmax(-1))
            answers.append(torch.empty_like(answer).scatter_(1, cells[vote], answer))
            q_halts.append(output.q_halt_logits)
            # Also for models with a continue head: q_halt > 0 means "more probably right than wrong" for all models.
            halted = halt(torch.full_like(chunk, segment), output.q_halt_logits, None, segments)
            first_halt = torch.where((first_halt == 0) & halted, segment, first_halt)
            if halting == "q" and first_halt.all():
                break
        q_halt = torch.stack(q_halts, 1)
        used = {"fixed": torch.full_like(chunk, segments), "q": first_halt, "choose": q_halt.argmax(1) + 1}[halting]
        chunks.append((torch.stack(answers, 1).tolist(), q_halt.tolist(), used.tolist()))
    answers, q_halts, used = ([item for chunk in chunks for item in chunk[part]] for part in range(3))

    def text(ids: list[int]) -> list[str]:
        if vocab.name != "arc":
            return vocab.decode(ids, config.height, config.width)
        grid = crop_arc([ids[start : start + config.width] for start in range(0, len(ids), config.width)])
        return vocab.decode([index for row in grid for index in row], len(grid), len(grid[0])) if grid else []

    solutions = []
    for number, puzzle in enumerate(boards):
        # Votes with the same answer are counted, ties are decided by the mean logit.
        candidates = {}
        for copy in range(number * votes, (number + 1) * votes):
            answer = tuple(answers[copy][used[copy] - 1])
            candidates.setdefault(answer, []).append((q_halts[copy][used[copy] - 1], copy))
        answer, counted = max(
            candidates.items(), key=lambda item: (len(item[1]), sum(q for q, _ in item[1]) / len(item[1]))
        )
        copy = max(counted, key=lambda item: item[0])[1]
        grid = [list(answer[start : start + config.width]) for start in range(0, len(answer), config.width)]
        agrees = valid = None
        if vocab.name == "sudoku":
            agrees = all(given in (1, index) for given, index in zip(puzzle, answer, strict=True))
            digits = set(range(2, config.vocab_size))
            valid = all({grid[row][column] for row, column in unit} == digits for _, unit in sudoku_units(config))
        elif vocab.name == "maze":
            blank, path = vocab.symbols.index(" "), vocab.symbols.index("o")
            agrees = all(
                given == index or (given == blank and index == path)
                for given, index in zip(puzzle, answer, strict=True)
            )
        # Boards that halt early are computed until all boards of their batch have halted. The rest depends on the other boards
        end = used[copy] if halting == "q" else segments
        shown = [text(ids) for ids in answers[copy][:end]]
        q_halt = q_halts[copy][:end]
        solutions.append(
            GridSolution(shown[used[copy] - 1], grid, q_halt, used[copy], shown, agrees, valid, len(counted))
        )
    return solutions
