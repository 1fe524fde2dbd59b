"""Build a `DatasetDict` on disk from records: parse, apply the view, split, and write Parquet files, card and report."""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from ..io import shown, write_json
from ..processes import Workers, num_cores
from ..search.prompts import Prompt
from ..search.values import RELATIVE_LABELS
from ..step_tree import StepTree
from .benchmark_rows import ORIGINAL_PROMPT
from .build_config import BuildConfig
from .build_report import BuildReport, count_row, dump_counts, load_counts, nest_counts
from .card import build_card, build_command
from .faults import NUM_SHOWN, RowError, format_places
from .hierarchy import hrm_view, orm_view, prm_view
from .output import (
    COLUMNS,
    REPORT_FILE,
    Output,
    digest_of,
    join_parts,
    make_table,
    publish,
    write_part,
)
from .problems import (
    choices_of,
    exclusion_key,
    group_keys,
    problem_key,
    problem_order,
    problem_split,
    read_problem_keys,
    text_key,
    text_keys,
)
from .self_training import sft_row
from .sources import Address, DatasetRows, JsonLines, MixedRows
from .tree_files import NodeFiles


GROUPED_ROWS = 1000
LEFT_OUT = "left_out_by_weights"


class Dropped(Exception):
    """
    Raised by a parser to drop a record on purpose.

    Args:
        reason (`str`):
            Reason for the drop, which the report counts.
        notes (`Mapping[str, int]`, *optional*):
            Counts to add to the notes of the report.
    """

    def __init__(self, reason: str, notes: Mapping[str, int] | None = None):
        super().__init__(reason)
        self.notes = notes or {}


@dataclass
class Recipe:
    """
    Definition of a builder: where its records come from, and how to turn a record into a tree.

    Args:
        name (`str`):
            Name of the builder, as in `trl-hrm build-<name>`.
        source ([`JsonLines`], [`DatasetRows`], [`MixedRows`] or [`NodeFiles`]):
            Source of the records. With a [`MixedRows`], each row gets the column `source` with its input. The rows of a prompt are
            joined within an input only.
        inputs (`list[str]`):
            Files or datasets, as named by the user.
        parse (`Callable[[Any, str, Counter], StepTree | list[StepTree]]`):
            Function that returns the tree of a record, or several trees. Its arguments are the record, its location
            for error messages, and a counter for notes. It raises [`Dropped`] to drop a record on purpose, [`RowError`] for an
            invalid record, which is dropped unless `config.strict` is set, and `ValueError` to stop the build.
        columns (`Mapping[str, pa.DataType]`, *optional*):
            Types of the columns in the `extra` of the trees. The types of other columns are inferred from their values.
        features (`Mapping[str, Any]`, *optional*):
            Features of these columns, such as an image. Other columns have the features of their types.
        is_final (`Callable[[str], bool]`, *optional*):
            Function that returns whether a step ends its trajectory, for `view="orm"`. See [`orm_view`].
        join_prompts (`bool`, *optional*, defaults to `False`):
            Whether to join the records of one prompt into one tree in the views `"tree"` and `"hrm"`.
        options (`dict[str, Any]`, *optional*):
            Options of this builder that are not in [`BuildConfig`], for the rebuild command.
        about (`dict[str, Any]`, *optional*):
            Title, description, license, citation and meanings of columns for the dataset card.
        command (`str`, *optional*):
            Name of the command. Defaults to `build-<name>`.
        warnings (`list[str]`, *optional*):
            Warnings about the source.
        describe (`Callable[[dict], dict]`, *optional*):
            Function that returns the `"facts"` of a report, for the report and the card.
        warn (`Callable[[dict], list[str]]`, *optional*):
            Function that returns more warnings, given a report.
        asked ([`~search.prompts.Prompt`], *optional*):
            Prompt that the policy was given, for `view="sft"`. Defaults to the bare problem.
        weights (`list[float]`, *optional*):
            Relative number of labelled steps of each input of a [`MixedRows`] in the train split. See [`sampling_limits`].
    """

    name: str
    source: JsonLines | DatasetRows | MixedRows | NodeFiles
    inputs: list[str]
    parse: Callable[[Any, str, Counter], StepTree | list[StepTree]]
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)
    features: Mapping[str, Any] = field(default_factory=dict)
    is_final: Callable[[str], bool] | None = None
    join_prompts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    warnings: list[str] = field(default_factory=list)
    describe: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    warn: Callable[[dict[str, Any]], list[str]] | None = None
    asked: Prompt | None = None
    weights: list[float] | None = None

    @property
    def is_mixture(self) -> bool:
        """Whether the rows are labelled with the input that they come from."""
        return isinstance(self.source, MixedRows)

    def trees(self, record: Any, where: str, notes: Counter, number: int) -> list[StepTree]:
        """Return the trees of a record of the input with this number."""
        parsed = self.parse(record, where, notes)
        trees = parsed if isinstance(parsed, list) else [parsed]
        for tree in trees if self.is_mixture else ():
            if "source" in tree.extra:
                notes["replaced_original_sources"] += "original_source" in tree.extra
                tree.extra["original_source"] = tree.extra["source"]
            tree.extra["source"] = self.inputs[number]
        return trees


def build_dataset(recipe: Recipe, config: BuildConfig, output: Output) -> BuildReport:
    """
    Build a dataset and write it to `config.output_dir`.

    The dataset is written to a temporary folder, which is renamed at the end, so a failed or interrupted build leaves nothing
    behind. Records are read and rows are written in chunks of 4 MB, so memory use does not grow with the
    input.

    Args:
        recipe ([`Recipe`]):
            Source of the records and its parser.
        config ([`BuildConfig`]):
            Options of the build, such as the view.
        output ([`~data.output.Output`]):
            Claimed output. See [`~data.output.claimed_output`].

    Returns:
        `dict[str, Any]`: The report, as written to `build_report.json`.

    Raises:
        `ValueError`: If the build must stop at an invalid record, or if no row is left for training.
    """
    worker = _Worker(recipe, config, read_problem_keys(config.exclude), str(output.work / "parts"))
    Path(worker.parts).mkdir()
    command = build_command(recipe.command or f"build-{recipe.name}", recipe.inputs, recipe.options, config)
    report = make_report(recipe.name, recipe.inputs, command, config, worker.run(), recipe.warnings)
    if recipe.warn:
        report["warnings"] += recipe.warn(report)
    if recipe.describe:
        report["facts"] = recipe.describe(report)
    finish_dataset(recipe.about, report, output, recipe.features)
    return report


def sampling_limits(problems: Sequence[np.ndarray], weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """
    Return which problems the largest mixture with the given weights has, if no problem is repeated: for each source, the largest
    [`~data.problems.problem_order`] of its problems in the mixture.

    The source that runs out first is used whole. Of each other source, the problems are taken in their order while their labelled
    steps do not exceed its share, but at least one problem.

    Args:
        problems (`Sequence[np.ndarray]`):
            For each source, the order and the number of labelled steps of each of its R training rows, shape `(R, 2)`. Rows of one
            problem have the same order.
        weights (`Sequence[float]`):
            Relative number of labelled steps of each source.
        names (`Sequence[str]`):
            Names of the sources, for error messages.

    Raises:
        `ValueError`: If a source has no labelled step in the train split.

    Example:

    ```python
    >>> rows = np.array([[7, 2], [5, 2], [9, 2]], dtype=np.uint64)
    >>> sampling_limits([rows, rows[:1]], [2, 1], ["a", "b"])  # 4 labelled steps of a, 2 of b
    [7, 7]
    ```
    """
    totals = [int(rows[:, 1].sum()) for rows in problems]
    for name, total in zip(names, totals, strict=True):
        if not total:
            raise ValueError(
                f"{name}: no labelled step is in the train split, so `weights` cannot be applied. Remove this input and its weight, or "
                "change `test_size`, `seed` or `exclude`."
            )
    shares = [Fraction(str(weight)) for weight in weights]  # of the decimal number: 0.3 is three times 0.1
    unit = min(total / share for total, share in zip(totals, shares, strict=True))
    limits = []
    for rows, share in zip(problems, shares, strict=True):
        orders, places = np.unique(rows[:, 0], return_inverse=True)
        labels = np.zeros(len(orders), dtype=np.int64)
        np.add.at(labels, places, rows[:, 1].astype(np.int64))
        number = np.searchsorted(np.cumsum(labels), int(unit * share), side="right")
        limits.append(int(orders[max(number, 1) - 1]))
    return limits


def finish_dataset(
    about: dict[str, Any], report: dict[str, Any], output: Output, features: Mapping[str, Any] | None = None
) -> None:
    """
    Assemble a dataset from its parts, add the card and the report, and rename it to the output.

    Args:
        about (`dict[str, Any]`):
            See [`Recipe`].
        report (`dict[str, Any]`):
            Report of the build. The key `content` is added.
        output ([`~data.output.Output`]):
            Claimed output. Its temporary folder has the rows in `parts`, and any other files of the dataset in `dataset`.
        features (`Mapping[str, Any]`, *optional*):
            See [`Recipe`].
    """
    built = output.work / "dataset"
    (built / "data").mkdir(parents=True)
    example = join_parts(output.work / "parts", built / "data", report["rows"], features or {})
    report["content"] = digest_of(built / "data")
    write_json(built / REPORT_FILE, report)
    build_card(about, report, *example).save(built / "README.md")
    publish(built, output)


def count_labels(
    recipe: Recipe, config: BuildConfig, cells: Callable[[StepTree], list[tuple[int, ...] | None]]
) -> Counter[tuple[int, ...]]:
    """
    Return the number of labels per cell in the training rows that [`build_dataset`] would write. `cells` returns the cell of each
    step of a row, `None` without a label.
    """
    worker = _Worker(recipe, config, read_problem_keys(config.exclude))
    return load_counts(worker.map(_count_chunk, worker.chunks(), "count", cells=cells)["counts"])


@dataclass
class _Worker:
    """Work that each process does on its chunks. It is pickled to every process."""

    recipe: Recipe
    config: BuildConfig
    excluded: frozenset[bytes]
    parts: str = ""
    limits: list[int] | None = None  # with `weights`, see `sampling_limits`

    @property
    def joins(self) -> bool:
        """Whether the records of a prompt become one tree."""
        return self.recipe.join_prompts and self.config.view in ("tree", "hrm")

    def run(self) -> Counter:
        """Write the rows of all chunks and return the counts."""
        chunks = self.chunks()
        if self.recipe.weights is not None:
            rows = np.concatenate(self.measure(chunks))
            problems = [rows[rows[:, 0] == number, 1:] for number in range(len(self.recipe.inputs))]
            limits = sampling_limits(problems, self.recipe.weights, self.recipe.inputs)
            return replace(self, recipe=replace(self.recipe, weights=None), limits=limits).run()
        dumps = []
        if self.joins:
            dumps, chunks = self.index(chunks)
        if not chunks:
            return load_counts(dumps)
        written = self.map(_write_groups if self.joins else _write_chunk, chunks)
        counts = load_counts([*dumps, *written["counts"]])
        if self.config.view == "sft":
            trees = Counter(key for keys in written["keys"] for key in keys)
            counts["notes", "repeated_problems"] = sum(count > 1 for count in trees.values())
        if self.recipe.is_mixture:
            pairs = np.unique(np.concatenate(written["problems"]), axis=0)  # of an input and a problem
            _, numbers = np.unique(pairs[:, 1], return_counts=True)
            counts["notes", "problems_in_several_inputs"] = int((numbers > 1).sum())
        return counts

    def index(self, chunks: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the counts of the chunks, and batches of about `GROUPED_ROWS` records, in which those of a prompt follow each other."""
        found = self.map(_index_chunk, chunks, "index")
        addresses = np.concatenate([chunk.reshape(-1, 4) for chunk in found["addresses"]])
        rows, sizes = group_keys(np.concatenate(found["keys"]))
        ends = np.cumsum(sizes)
        batches, start, group = [], 0, 0
        while start < len(rows):
            last = min(int(np.searchsorted(ends, start + GROUPED_ROWS)), len(ends) - 1)
            stop = int(ends[last])
            batches.append({"addresses": addresses[rows[start:stop]].ravel(), "sizes": sizes[group : last + 1]})
            start, group = stop, last + 1
        return found["counts"], batches

    def measure(self, chunks: list[dict[str, Any]]) -> list[np.ndarray]:
        """
        Return the number of the input, the [`~data.problems.problem_order`] and the number of labelled steps of each of the R training
        rows, in arrays of shape `(R, 3)`.
        """
        if not self.joins:
            return self.map(_measure_chunk, chunks, "measure")["rows"]
        batches = self.index(chunks)[1]
        return self.map(_measure_groups, batches, "measure")["rows"] if batches else [np.zeros((0, 3), np.uint64)]

    def chunks(self) -> list[dict[str, Any]]:
        """Return the chunks of the source."""
        chunks = self.recipe.source.chunks()
        if not chunks:
            raise ValueError(
                f"{', '.join(self.recipe.inputs)}: no records found. Check the path, or remove the empty input."
            )
        return chunks

    def map(
        self, function: Callable, chunks: list[dict[str, Any]], task: str = "build", **options: Any
    ) -> dict[str, list]:
        """Apply `function` to each chunk in parallel. Return the results by name, in the order of the chunks."""
        num_proc = min(self.config.num_proc or num_cores(), len(chunks))
        function = partial(function, worker=self, **options)
        with tqdm(total=len(chunks), desc=f"{self.recipe.name}: {task}", unit="chunk") as bar:
            if num_proc == 1:
                results = []
                for part, chunk in enumerate(chunks):
                    results.append(function(chunk, part))
                    bar.update()
            else:
                method = "fork" if sys.platform == "linux" else "spawn"  # a fork starts at once and shares `excluded`
                with Workers(num_proc, method, "Lower --num_proc.", _set_function, function) as workers:
                    futures = [workers.submit(_call, chunk, part) for part, chunk in enumerate(chunks)]
                    for future in as_completed(futures):
                        future.result()  # raises the first error
                        bar.update()
                results = [future.result() for future in futures]
        return {name: [result[name] for result in results] for name in results[0]}

    def keep(
        self, record: dict[str, Any], where: str, number: int, counts: Counter, views: Callable
    ) -> list[StepTree]:
        """Count a record of the input with this number and return its rows, which are empty if it is dropped."""
        notes = Counter()
        counts["records_in",] += 1
        source = self.recipe.inputs[number] if self.recipe.is_mixture else None
        if source is not None:
            counts["sources", source, "records_in"] += 1
        try:
            trees = self.recipe.trees(record, where, notes, number)
            if any(
                exclusion_key(text) in self.excluded
                for tree in trees
                for text in (tree.prompt, _with_choices(tree), original_prompt(tree, where))
            ):
                raise Dropped("excluded")
            trees = _labelled(trees)
            if not trees:
                raise Dropped("no_labelled_step")
            rows = [row for tree in trees for row in views(tree, notes)]
            if not rows:
                raise Dropped("no_labelled_final_step")
            if self.limits is not None and any(
                problem_order(original_prompt(tree), self.config.seed) > self.limits[number]
                and self.split(tree) == "train"
                for tree in rows
            ):
                counts["sources", source, LEFT_OUT] += 1
                raise Dropped(LEFT_OUT)
            if self.config.view in ("prm", "orm"):
                notes["left_out_paths"] += sum(len(tree.leaves()) for tree in trees) - len(rows)
        except RowError as fault:
            if self.config.strict:
                raise
            counts["dropped", fault.reason] += 1
            if counts["dropped", fault.reason] <= NUM_SHOWN:
                counts["faults", fault.reason, fault.where, str(fault)] += 1
            return []
        except Dropped as dropped:
            counts["dropped", str(dropped)] += 1
            for note, count in dropped.notes.items():
                counts["notes", note] += count
            return []
        notes["rows_with_original_prompt"] += any(tree.extra.get(ORIGINAL_PROMPT) is not None for tree in trees)
        counts["records_kept",] += 1
        if source is not None:
            counts["sources", source, "records_kept"] += 1
        for note, count in notes.items():
            counts["notes", note] += count
        return rows

    def split(self, tree: StepTree) -> str:
        """Return the split of a tree."""
        return problem_split(original_prompt(tree), self.config.test_size, self.config.seed)

    def measured(self, number: int, tree: StepTree) -> list[tuple[int, int, int]]:
        """Return the entry of a row for [`_Worker.measure`], if it is in the train split."""
        if self.split(tree) == "test":
            return []
        return [
            (
                number,
                problem_order(original_prompt(tree), self.config.seed),
                sum(one is not None for one in tree.labels),
            )
        ]

    def rows(self, tree: StepTree, notes: Counter) -> list[StepTree]:
        """Return the rows of a tree in the requested view. For `"sft"`, the parser already returns one tree per row."""
        if self.config.view == "prm":
            return prm_view(tree)
        if self.config.view == "orm":
            return orm_view(tree, self.recipe.is_final)
        if self.config.view == "hrm":
            config = self.config
            merging = {"merge": config.merge, "thinking_marks": config.thinking_marks}
            return [hrm_view(tree, config.merge_separator, config.max_merge, notes, **merging)]
        return [tree]

    def write(self, part: int, trees: list[StepTree], where: str, counts: Counter) -> dict[str, Any]:
        """Write the rows of a chunk, one Parquet file per split."""
        is_mixture = self.recipe.is_mixture
        rows = {"train": [], "test": []}
        for tree in trees:
            split = self.split(tree)
            row = sft_row(tree, self.recipe.asked) if self.config.view == "sft" else tree.to_row()
            if self.config.view in ("prm", "orm"):
                del row["parents"]
            given = row.get("problem_id")  # a string in all outputs, although inputs may have integers
            row["problem_id"] = problem_key(tree.prompt).hex() if given is None else str(given)
            rows[split].append(row)
            count_row(counts, split, tree, tree.extra["source"] if is_mixture else None)
        for split in rows:
            if rows[split]:
                table = make_table(rows[split], COLUMNS | dict(self.recipe.columns), where)
                write_part(table, Path(self.parts), split, part)
        problems = [
            (self.recipe.inputs.index(tree.extra["source"]), problem_order(original_prompt(tree), self.config.seed))
            for tree in (trees if is_mixture else ())
        ]
        return {"counts": dump_counts(counts), "problems": np.array(problems, dtype=np.uint64).reshape(-1, 2)}


def _labelled(trees: list[StepTree]) -> list[StepTree]:
    return [tree for tree in trees if any(label is not None for label in tree.labels)]


def original_prompt(tree: StepTree, where: str = "") -> str:
    """
    Return the problem that decides about the split, the exclusion and the sampling of a tree: the column `original_prompt`, if it has a
    value, so that a modified problem stays with the problem that it was made from. Otherwise the prompt with the choices of the row, if
    it has any, so that a problem has the same split whether its choices are in a column or in its text.

    Raises:
        [`RowError`]: If the column has a value other than a non-empty string.
    """
    value = tree.extra.get(ORIGINAL_PROMPT)
    if value is None:
        return _with_choices(tree)
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "bad_original_prompt",
            where,
            f"column `{ORIGINAL_PROMPT}` is {shown(value)}, expected the problem that the prompt was made from, or null. Correct the row, or "
            "rename the column.",
        )
    return value


def _with_choices(tree: StepTree) -> str:
    """Return the prompt with the choices of the row, as the readers of problems and of test sets do."""
    choices = choices_of(tree.extra)
    return tree.prompt if choices is None else choices.add_to(tree.prompt)


def _set_function(function: Callable) -> None:
    global _function
    _function = function


def _call(chunk: dict[str, Any], part: int) -> dict[str, Any]:
    """Call the function of this process, which is sent to it only once."""
    return _function(chunk, part)


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Disable garbage collection. A chunk creates many objects but no reference cycles, so this is a third faster."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_search_for_cycles()
def _write_chunk(chunk: dict[str, Any], part: int, worker: _Worker) -> dict[str, Any]:
    counts, trees, keys, where = Counter(), [], [], ""
    for where, address, record in worker.recipe.source.read(chunk):
        rows = worker.keep(record, where, address.file, counts, worker.rows)
        trees += rows
        if rows and worker.config.view == "sft":
            keys.append(text_key(rows[0].extra["problem_id"]))
    return worker.write(part, trees, where, counts) | {"keys": keys}


@_no_search_for_cycles()
def _count_chunk(chunk: dict[str, Any], part: int, worker: _Worker, cells: Callable) -> dict[str, str]:
    counts = Counter()
    for where, address, record in worker.recipe.source.read(chunk):
        for tree in worker.keep(record, where, address.file, Counter(), worker.rows):
            if worker.split(tree) == "train":
                counts.update(cell for cell in cells(tree) if cell is not None)
    return {"counts": dump_counts(counts)}


@_no_search_for_cycles()
def _measure_chunk(chunk: dict[str, Any], part: int, worker: _Worker) -> dict[str, np.ndarray]:
    rows = []
    for where, address, record in worker.recipe.source.read(chunk):
        for tree in worker.keep(record, where, address.file, Counter(), worker.rows):
            rows += worker.measured(address.file, tree)
    return {"rows": np.array(rows, dtype=np.uint64).reshape(-1, 3)}


def _index_chunk(chunk: dict[str, Any], part: int, worker: _Worker) -> dict[str, Any]:
    counts, prompts, addresses = Counter(), [], []
    for where, address, record in worker.recipe.source.read(chunk):
        trees = worker.keep(record, where, address.file, counts, lambda tree, notes: [tree])
        for number, prompt in enumerate(dict.fromkeys(tree.prompt for tree in trees)):  # a record may have several
            prompts.append(f"{address.file}\n{prompt}" if worker.recipe.is_mixture else prompt)
            addresses.append((*address, number))
    return {
        "counts": dump_counts(counts),
        "keys": text_keys(prompts),
        "addresses": np.array(addresses, dtype=np.int64),
    }


def _measure_groups(batch: dict[str, Any], part: int, worker: _Worker) -> dict[str, np.ndarray]:
    rows = []
    for number, tree, _ in _joined(batch, worker, Counter()):
        rows += worker.measured(number, tree)
    return {"rows": np.array(rows, dtype=np.uint64).reshape(-1, 3)}


def _write_groups(batch: dict[str, Any], part: int, worker: _Worker) -> dict[str, Any]:
    counts, trees, where = Counter(), [], ""
    for _, tree, where in _joined(batch, worker, counts):  # noqa: B007  the last location is used
        trees.append(tree)
    return worker.write(part, trees, where, counts)


def _joined(batch: dict[str, Any], worker: _Worker, counts: Counter) -> Iterator[tuple[int, StepTree, str]]:
    """Yield the number of the input, the row and the last location of each prompt of a batch. Notes are added to `counts`."""
    numbers = iter(batch["addresses"].tolist())
    places = zip(numbers, numbers, numbers, numbers, strict=True)
    places = [(Address(*place[:3]), place[3]) for place in places]
    records = zip(places, worker.recipe.source.pick(address for address, _ in places), strict=True)
    for size in batch["sizes"].tolist():
        chains = []
        for _ in range(size):
            (address, number), (where, record) = next(records)
            trees = _labelled(worker.recipe.trees(record, where, Counter(), address.file))
            prompt = list(dict.fromkeys(tree.prompt for tree in trees))[number]
            chains += [tree for tree in trees if tree.prompt == prompt]
        tree, contradictions = StepTree.from_chains(chains, where)
        # If the rows come from several problems, the first in the alphabet decides about the split, whatever the order of the rows
        changed = [chain for chain in chains if chain.extra.get(ORIGINAL_PROMPT) is not None]
        deciding = min(changed or chains, key=original_prompt)
        tree.extra = {name: value for name, value in deciding.extra.items() if name not in tree.step_columns}
        if contradictions and worker.config.view == "hrm" and tree.extra.get("label_kind") in RELATIVE_LABELS:
            raise ValueError(
                f"{where}: the rows of this problem have different labels of the kind {tree.extra['label_kind']!r} for the same step, so "
                "the label of a merged step is unknown. Build each run on its own, or use another view."
            )
        notes = Counter(joined_records=size - 1, contradicting_labels=contradictions)
        rows = worker.rows(tree, notes)
        for note, count in notes.items():
            counts["notes", note] += count
        for row in rows:
            yield address.file, row, where


def make_report(
    builder: str, inputs: list[str], command: str, config: BuildConfig, counts: Counter, warnings: Sequence[str] = ()
) -> BuildReport:
    """
    Return the report of a build from counts with the keys `("records_in",)`, `("records_kept",)`, `("dropped", reason)`,
    `("rows", split)`, `("labels", split, kind, value)` and `("notes", note)`.

    Raises:
        `ValueError`: If no rows or no training rows are left.
    """
    faults = [key[1:] for key in counts if key[0] == "faults"]
    found = {"records_in": 0, "records_kept": 0, "dropped": {}, "rows": {}, "labels": {}, "notes": {}}
    found |= nest_counts(Counter({key: count for key, count in counts.items() if count > 0 and key[0] != "faults"}))
    dropped = ", ".join(f"{reason}: {count}" for reason, count in found["dropped"].items()) or "none"
    assert found["records_in"] == found["records_kept"] + sum(found["dropped"].values())
    if not found["records_kept"]:
        raise ValueError(
            f"{', '.join(inputs)}: 0 of {found['records_in']} records were kept (dropped: {dropped}). "
            + " ".join(
                [*warnings, "Check that the files have the format of this builder, and the options that drop records."]
            )
            + (f" The first invalid record: {faults[0][2]}" if faults else "")
        )
    if "train" not in found["rows"]:
        raise ValueError(
            f"the train split is empty: test_size={config.test_size} and seed={config.seed} put all {found['rows']['test']} rows in "
            "the test split. Lower test_size, or change the seed."
        )
    warnings = list(warnings)
    if config.test_size and "test" not in found["rows"]:
        warnings.append(
            f"no test split was written: test_size={config.test_size} and seed={config.seed} put all problems in the train split. "
            "Raise test_size, change the seed, or use more problems."
        )
    if config.exclude and not found["dropped"].get("excluded"):
        warnings.append(
            f"no record was excluded: none has a problem of {', '.join(config.exclude)}. Check that these are the right files."
        )
    for reason in dict.fromkeys(reason for reason, *_ in faults):
        places = [where for other, where, _ in faults if other == reason]
        first = next(message for other, _, message in faults if other == reason)
        warnings.append(f"{format_places(reason, places, number=found['dropped'][reason])}. The first: {first}")
    labels = [kinds for splits in found["labels"].values() for kinds in splits.values()]
    report = {
        "builder": builder,
        "inputs": inputs,
        "command": command,
        "view": config.view,
        "records_in": found["records_in"],
        "records_kept": found["records_kept"],
        "dropped": found["dropped"],
        "rows": {split: found["rows"][split] for split in ("train", "test") if split in found["rows"]},
        "labelled_steps": sum(sum(values.values()) - values.get("null", 0) for values in labels),
        "labels": {split: found["labels"][split] for split in ("train", "test") if split in found["labels"]},
        **({"sources": {name: found["sources"][name] for name in inputs}} if "sources" in found else {}),
        "notes": found["notes"],
        "warnings": warnings,
    }
    return BuildReport(report)
