"""
Solve grid puzzles with a trained reasoning model.

```bash
trl-hrm solve outputs/reason puzzle.txt
trl-hrm solve me/my-sudoku-hrm puzzles.txt --segments 32 --halting choose --output answers.jsonl
```

The file has one board per block of lines, with an empty line between blocks, or one square board per line:

```
53..7....
6..195...
.98....6.
8...6...3
4..8.3..1
7...2...6
.6....28.
...419..5
....8..79
```
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ..config import COUNT, SEED, Config
from ..io import claimed_file, dump_json, parse_json, read_text, shown, write_or_keep
from ..terminal import plain
from .reason import MARK


if TYPE_CHECKING:
    from ..reasoning import HrmGridConfig, HrmGridForSolving
    from ..reasoning.grid_solving import GridSolution


@dataclass(kw_only=True)
class SolveConfig(Config):
    """
    Configuration of [`solve`].

    Args:
        model (`str`):
            Path or Hub id of a model, or output folder of `trl-hrm reason`.
        file (`str`):
            Text file with puzzles: one board per block of lines, with an empty line between blocks, or one square board per line.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        segments (`int`, *optional*):
            Number of segments. Defaults to the number of the training.
        halting (`str`, *optional*, defaults to `"fixed"`):
            Segment of the answer: `"fixed"` (the last one), `"q"` (the first one with a halting logit above 0) or `"choose"` (the one with
            the highest halting logit).
        votes (`int`, *optional*, defaults to `1`):
            Number of symmetric or noisy copies of each puzzle. The most frequent answer wins.
        noise (`float`, *optional*, defaults to `0.0`):
            Standard deviation of noise on the initial states.
        seed (`int`, *optional*, defaults to `0`):
            Random seed of the copies and of the noise.
        puzzle_id (`str`, *optional*):
            Id of the task, for models that were trained with puzzle ids, such as models for ARC.
        allow_blank_id (`bool`, *optional*, defaults to `False`):
            Whether to solve puzzles with an unknown or missing id. Accuracy is then near 0 for models that were trained with ids.
        device (`str`, *optional*, defaults to `"auto"`):
            Device: `"auto"` for a GPU if there is one, or a device of PyTorch.
        output (`str`, *optional*):
            JSON Lines file for the answers of all segments. By default, answers are only printed.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    model: str = field(
        metadata={
            "help": "Path or Hub id of a model, or output folder of `trl-hrm reason`.",
            "metavar": "MODEL",
            "positional": True,
        }
    )
    file: str = field(
        metadata={
            "help": "Text file with puzzles: one board per block of lines, with an empty line between blocks, or one square board per "
            "line.",
            "metavar": "FILE",
            "positional": True,
        }
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the model on the Hub."})
    segments: int | None = field(
        default=None, metadata={"help": "Number of segments (default: as in the training).", "range": COUNT}
    )
    halting: Literal["fixed", "q", "choose"] = field(
        default="fixed",
        metadata={
            "help": "Segment of the answer: fixed (the last one), q (the first one with a halting logit above 0) or choose (the one with "
            "the highest halting logit)."
        },
    )
    votes: int = field(
        default=1,
        metadata={
            "help": "Number of symmetric or noisy copies of each puzzle. The most frequent answer wins.",
            "range": COUNT,
        },
    )
    noise: float = field(
        default=0.0, metadata={"help": "Standard deviation of noise on the initial states.", "range": "[0, inf)"}
    )
    seed: int = field(default=0, metadata={"help": "Random seed of the copies and of the noise.", "range": SEED})
    puzzle_id: str | None = field(
        default=None,
        metadata={"help": "Id of the task, for models that were trained with puzzle ids, such as models for ARC."},
    )
    allow_blank_id: bool = field(
        default=False,
        metadata={
            "help": "Solve puzzles with an unknown or missing id. Accuracy is then near 0 for models that were trained with ids."
        },
    )
    device: str = field(
        default="auto", metadata={"help": "Device: auto for a GPU if there is one, or a device of PyTorch."}
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "JSON Lines file for the answers of all segments (default: only print the answers).",
            "metavar": "FILE",
        },
    )

    def __post_init__(self):
        super().__post_init__()
        self.refuse_revision_of_folder("revision", "model")
        if self.allow_blank_id and self.puzzle_id is not None:
            raise ValueError(
                "`allow_blank_id` is for puzzles without a known id, but `puzzle_id` is set. Remove one of them."
            )
        if self.seed and self.votes == 1 and not self.noise:
            raise ValueError("`seed` has no effect without `votes` or `noise`. Remove it, or set one of them.")


class Puzzle(NamedTuple):
    """A board in a file: its rows, and the file and number of its first line."""

    rows: list[str]
    where: str


@dataclass(frozen=True)
class SolveResults:
    """
    Result of [`solve`]. `str()` gives the text that the command prints.

    Args:
        puzzles (`list[Puzzle]`):
            Puzzles, in the order of the file.
        solutions (`list[GridSolution]`):
            Answer to each puzzle. It is not guaranteed to be right.
        output (`str`, *optional*):
            File with the answers.
    """

    puzzles: list[Puzzle]
    solutions: "list[GridSolution]"
    output: str | None = None

    def __str__(self) -> str:
        parts = [format_solution(*pair) for pair in zip(self.puzzles, self.solutions, strict=True)]
        doubtful = sum(bool(faults_of(solution)) for solution in self.solutions)
        if any(solution.valid is not None for solution in self.solutions):
            parts.append(f"{len(self.solutions) - doubtful} of {len(self.solutions)} answers are valid solutions.")
        if self.output is not None:
            parts.append(f"Answers of all segments: {plain(self.output)}")
        return "\n\n".join(parts)


def solve(config: SolveConfig) -> SolveResults:
    """
    Solve the puzzles in a file.

    Args:
        config ([`SolveConfig`]):
            Model, file and options.

    Returns:
        [`SolveResults`]: The answers, with the halting logit after each segment. Answers that contradict the givens or are invalid are
        marked, and are not an error.

    Raises:
        `OSError`: If the output file cannot be written, or the model or file cannot be read. The output is checked first.
        `ValueError`: If a board does not fit the model. The message has the file and line.
    """
    if config.output is None:
        return _solve(config)
    with claimed_file(config.output, "output", inputs=[config.file]) as output:
        if output.exists() and output.stat().st_size and not _has_answers(output):
            raise FileExistsError(
                f"{config.output} exists and has no answers of an earlier run. Choose another `output`."
            )
        results = _solve(config)
        lines = [
            dump_json({"source": puzzle.where, "puzzle": puzzle.rows, **asdict(solution)}, config.output)
            for puzzle, solution in zip(results.puzzles, results.solutions, strict=True)
        ]
        write_or_keep(output.parent, {output.name: "".join(f"{line}\n" for line in lines)})
    return results


def _has_answers(file: Path) -> bool:
    """Return whether the first line of a file is an answer. Other files, such as weights, are not replaced."""
    with open(file, "rb") as opened:
        line = opened.readline(1 << 24)
    try:
        row = parse_json(line, str(file))
    except ValueError:
        return False
    return isinstance(row, dict) and "answer" in row


def _solve(config: SolveConfig) -> SolveResults:
    import torch

    text = read_text(config.file)  # before the model, because it is faster
    model = load_model(config)
    puzzles = read_puzzles(text, config.file, model.config)
    check_puzzles(puzzles, model)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        model = model.to(device)
    except (AssertionError, RuntimeError) as error:  # PyTorch's messages for unknown and missing devices
        raise ValueError(
            f"`device` is {shown(device)}, which cannot be used: {str(error).splitlines()[0]} Set it to auto or cpu."
        ) from None
    solutions = model.solve(
        [puzzle.rows for puzzle in puzzles],
        segments=config.segments,
        halting=config.halting,
        noise=config.noise,
        votes=config.votes,
        seed=config.seed,
        puzzle_id=config.puzzle_id,
        allow_blank_id=config.allow_blank_id,
    )
    return SolveResults(puzzles, solutions, config.output)


def load_model(config: SolveConfig) -> "HrmGridForSolving":
    """
    Return the model of a path, of a Hub id, or of a folder of `trl-hrm reason`.

    Raises:
        `ValueError`: If it is another kind of model.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig

    from ..reasoning import HrmGridConfig, HrmGridForSolving

    name, folder = config.model, Path(config.model)
    if (folder / "model" / "config.json").is_file() and not (folder / "config.json").exists():
        name = str(folder / "model")
    elif (folder / "results.json").is_file() and (folder / MARK).is_file():
        raise ValueError(
            f"{config.model}: this run of `trl-hrm reason` has no model, because none of its systems is recurrent. Add one, such as hrm, "
            "or pass the folder of a model."
        )
    elif (folder / MARK).is_file():
        raise ValueError(
            f"{config.model}: this run of `trl-hrm reason` is not finished. Run its command again, or pass the folder of a model."
        )
    if not folder.exists() and (folder.is_absolute() or config.model.count("/") != 1):
        raise FileNotFoundError(
            f"{config.model} is neither a folder nor the id of a repository on the Hub, such as me/my-sudoku-hrm."
        )
    try:
        found = AutoConfig.from_pretrained(name, revision=config.revision)
    except ValueError as error:  # of a field of `config.json`
        raise ValueError(f"{config.model}: {error}") from error
    except TypeError as error:
        raise ValueError(
            f"{config.model}: config.json is damaged ({error}). Download or save the model again."
        ) from error
    if not isinstance(found, HrmGridConfig):
        raise ValueError(
            f"{config.model} is a model of the type {found.model_type!r}, expected 'hrm_grid', such as trained by `trl-hrm train-grid`."
        )
    try:
        model, info = HrmGridForSolving.from_pretrained(
            name, revision=config.revision, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except SafetensorError as error:
        raise ValueError(
            f"{config.model}: the weights file is damaged ({error}). Download or save the model again."
        ) from error
    random = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})  # transformers only warns
    if random:
        raise ValueError(
            f"{config.model}: {len(random)} weights are missing or have another shape than config.json expects, such as {shown(random[0])}. "
            "Download or save the model again."
        )
    return model.eval()


def read_puzzles(text: str, file: str, config: "HrmGridConfig") -> list[Puzzle]:
    """
    Split a text into boards: blocks of lines, or lines with as many symbols as a board has cells.

    Args:
        text (`str`):
            Content of the file.
        file (`str`):
            Name of the file, for the puzzles.
        config ([`~reasoning.HrmGridConfig`]):
            Configuration of the model: kind and size of the boards. Spaces are ignored in Sudoku only.

    Raises:
        `ValueError`: If the text has no boards.
    """
    puzzles: list[Puzzle] = []
    block: list[str] = []
    is_sudoku, width = config.grid_vocab.name == "sudoku", config.width
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        row = "".join(line.split()) if is_sudoku else line
        if row.strip() and len(row) == config.seq_len and not block and config.height > 1:
            rows = [row[start : start + width] for start in range(0, len(row), width)]
            puzzles.append(Puzzle(rows, f"{file}:{number}"))
        elif row.strip():
            block.append(row)
        elif block:
            puzzles.append(Puzzle(block, f"{file}:{number - len(block)}"))
            block = []
    if not puzzles:
        raise ValueError(f"{file}: found no boards. Write one row per line, with an empty line between boards.")
    return puzzles


def check_puzzles(puzzles: Sequence[Puzzle], model: "HrmGridForSolving") -> None:
    """
    Check that every board fits the model.

    Raises:
        `ValueError`: If one does not. The message has the file and line.
    """
    from ..reasoning.grid_solving import read_boards

    for puzzle in puzzles:
        try:
            read_boards(puzzle.rows, model.config)
        except ValueError as error:
            raise ValueError(f"{puzzle.where}: {error}") from None


def faults_of(solution: "GridSolution") -> list[str]:
    """Return what is wrong with an answer, as far as the rules of the puzzle show it."""
    faults = []
    if solution.agrees_with_givens is False:
        faults.append("it contradicts cells of the puzzle")
    if solution.valid is False:
        faults.append("a row, column or box does not have each digit once")
    return faults


def format_solution(puzzle: Puzzle, solution: "GridSolution") -> str:
    """Return a puzzle and its answer side by side, with the halting logits of all segments."""
    width = max(map(len, puzzle.rows))
    lines = [plain(puzzle.where)]
    for before, after in zip_longest(puzzle.rows, solution.answer, fillvalue=""):  # answers of ARC have their own size
        lines.append(f"  {before:<{width}}    {after}")
    logits = " ".join(f"{value:.1f}" for value in solution.q_halt)
    lines.append(f"Answer of segment {solution.segments_used}. q after each segment: {logits}")
    if solution.votes > 1:
        lines.append(f"{solution.votes} copies have this answer.")
    if faults := faults_of(solution):
        lines.append(f"This answer is wrong: {'; '.join(faults)}.")
    elif solution.valid:
        lines.append("This answer is a valid solution.")
    return "\n".join(lines)
