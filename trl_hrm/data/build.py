"""From records to a `DatasetDict` on disk: parse, view, split, write Parquet, card and report."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features

from ..step_tree import StepTree
from .build_config import BuildConfig
from .card import build_card, build_command
from .grouping import group_equal, text_key
from .hierarchy import hrm_view, orm_view, prm_view
from .problems import problem_key, problem_split, read_problem_keys
from .report import count_row, dump_counts, load_counts, nest_counts
from .sources import Address, DatasetRows, JsonLines


GROUPED_ROWS = 1000
REPORT_FILE = "build_report.json"

COLUMNS = {
    "prompt": pa.string(),
    "completions": pa.list_(pa.string()),
    "labels": pa.list_(pa.float32()),
    "parents": pa.list_(pa.int32()),
    "num_merged": pa.list_(pa.int32()),
}


class Dropped(Exception):
    """Raised by a parser for a record that is left out on purpose. The reason is counted in the report."""


@dataclass
class Recipe:
    """
    What a source of records has of its own.

    Args:
        name (`str`):
            Name of the builder, as in `trl-hrm build-<name>`.
        source ([`JsonLines`] or [`DatasetRows`]):
            Where the records come from.
        inputs (`list[str]`):
            Files or datasets, as the user named them.
        parse (`Callable[[dict, str, Counter], StepTree]`):
            Makes a tree of a record. It is given the record, its place for error messages, and a counter for notes. It
            raises [`Dropped`] for records left out on purpose and `ValueError` for faults.
        columns (`Mapping[str, pa.DataType]`, *optional*):
            Types of the columns that the trees carry in `extra`. Types not given are taken from the values.
        is_final (`Callable[[str], bool]`, *optional*):
            Tells complete trajectories from others for `view="orm"`. See [`orm_view`].
        join_prompts (`bool`, *optional*, defaults to `False`):
            Whether the records of one prompt are joined to one tree in the views `"tree"` and `"hrm"`.
        options (`dict[str, Any]`, *optional*):
            Options of this builder alone, for the report and the rebuild command.
        about (`dict[str, Any]`, *optional*):
            Title, description, license and citation for the dataset card.
    """

    name: str
    source: JsonLines | DatasetRows
    inputs: list[str]
    parse: Callable[[dict[str, Any], str, Counter], StepTree]
    columns: Mapping[str, pa.DataType] = field(default_factory=dict)
    is_final: Callable[[str], bool] | None = None
    join_prompts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def build_dataset(recipe: Recipe, config: BuildConfig) -> dict[str, Any]:
    """
    Build a dataset and write it to `config.output_dir`.

    Everything is written to a temporary directory beside the output, which takes the output's name at the very end: a
    build that fails or is interrupted leaves nothing behind. Records are read, and rows written, a chunk of 4 MB at a
    time, so that memory does not grow with the input.

    Args:
        recipe ([`Recipe`]):
            The source of the records and its parser.
        config ([`BuildConfig`]):
            Options that all builders share.

    Returns:
        `dict[str, Any]`: The report, as written to `build_report.json`.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `ValueError`: If a record is faulty, or if no row is left for training.
    """
    output = Path(config.output_dir).absolute()
    _check_output(output, config)
    worker = _Worker(recipe, config, read_problem_keys(config.exclude))
    with temporary_directory(config) as work:
        worker.parts = str(Path(work, "parts"))
        Path(worker.parts).mkdir()
        built = Path(work, "dataset")
        (built / "data").mkdir(parents=True)
        report = _report(recipe, config, worker.run())
        example = _join_parts(Path(worker.parts), built / "data", report["rows"])
        report["content"] = _digest(built / "data")
        (built / REPORT_FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        build_card(recipe.about, report, *example).save(built / "README.md")
        _move(built, output, Path(work, "replaced"))
    return report


def temporary_directory(config: BuildConfig) -> tempfile.TemporaryDirectory:
    """A directory beside the output, so that moving files from one to the other is a matter of names."""
    output = Path(config.output_dir).absolute()
    anchor = next(parent for parent in output.parents if parent.exists())
    return tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=anchor)


@dataclass
class _Worker:
    """What each process does with its chunks. A copy travels to every process."""

    recipe: Recipe
    config: BuildConfig
    excluded: frozenset[bytes]
    parts: str = ""

    def run(self) -> Counter:
        chunks = self.recipe.source.chunks()
        if not chunks:
            raise ValueError(
                f"{', '.join(self.recipe.inputs)}: there is nothing in it, expected records to build from."
            )
        if not (self.recipe.join_prompts and self.config.view in ("tree", "hrm")):
            return load_counts(self._map(_write_chunk, chunks)["counts"])
        found = self._map(_index_chunk, chunks)
        addresses = np.concatenate([np.array(chunk, dtype=np.int64).reshape(-1, 3) for chunk in found["addresses"]])
        if not len(addresses):
            return load_counts(found["counts"])
        batches = [([], [])]
        for group in group_equal(key for keys in found["keys"] for key in keys):
            if len(batches[-1][0]) >= GROUPED_ROWS:
                batches.append(([], []))
            batches[-1][0].extend(group)
            batches[-1][1].append(len(group))
        written = self._map(_write_groups, [{"addresses": addresses[i].ravel(), "sizes": n} for i, n in batches])
        return load_counts([*found["counts"], *written["counts"]])

    def _map(self, function: Callable, chunks: list[dict[str, Any]]) -> Dataset:
        num_proc = min(self.config.num_proc or _num_cores(), len(chunks))
        return Dataset.from_list(chunks).map(
            partial(function, worker=self),
            with_indices=True,
            remove_columns=list(chunks[0]),
            num_proc=num_proc if num_proc > 1 else None,
            keep_in_memory=True,
            load_from_cache_file=False,
            new_fingerprint=f"{self.recipe.name}-{function.__name__}",
            desc=f"{self.recipe.name}: {'index' if function is _index_chunk else 'build'}",
        )

    def keep(self, record: dict[str, Any], where: str, counts: Counter, views: Callable) -> list[StepTree]:
        """The rows of a record, none if it is dropped; either way it is counted."""
        notes = Counter()
        counts["records_in",] += 1
        try:
            tree = self.recipe.parse(record, where, notes)
            if problem_key(tree.prompt) in self.excluded:
                raise Dropped("excluded")
            if all(label is None for label in tree.labels):
                raise Dropped("no_labelled_step")
            rows = views(tree, where)
            if not rows:
                raise Dropped("no_labelled_final_step")
            if self.config.view in ("prm", "orm"):
                notes["left_out_paths"] += len(tree.leaves()) - len(rows)
        except Dropped as reason:
            counts["dropped", str(reason)] += 1
            return []
        counts["records_kept",] += 1
        for note, count in notes.items():
            counts["notes", note] += count
        return rows

    def rows(self, tree: StepTree, where: str) -> list[StepTree]:
        """The rows of a tree in the view asked for."""
        if self.config.view == "prm":
            return prm_view(tree)
        if self.config.view == "orm":
            return orm_view(tree, self.recipe.is_final)
        if self.config.view == "tree":
            return [tree]
        try:
            return [hrm_view(tree, self.config.merge_separator, self.config.max_merge)]
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def write(self, part: int, trees: list[StepTree], where: str, counts: Counter) -> dict[str, str]:
        """Write the rows of a chunk, one Parquet file per split."""
        rows = {"train": [], "test": []}
        for tree in trees:
            split = problem_split(tree.prompt, self.config.test_size, self.config.seed)
            row = tree.to_row()
            if self.config.view in ("prm", "orm"):
                del row["parents"]
            row.setdefault("problem_id", problem_key(tree.prompt).hex())
            rows[split].append(row)
            count_row(counts, split, tree)
        for split in rows:
            if rows[split]:
                table = _table(rows[split], COLUMNS | dict(self.recipe.columns), where)
                pq.write_table(table, Path(self.parts, f"{split}-{part:08d}.parquet"))
        return {"counts": dump_counts(counts)}


def _write_chunk(chunk: dict[str, Any], part: int, worker: _Worker) -> dict[str, str]:
    counts, trees, where = Counter(), [], ""
    for where, _, record in worker.recipe.source.read(chunk):
        trees += worker.keep(record, where, counts, worker.rows)
    return worker.write(part, trees, where, counts)


def _index_chunk(chunk: dict[str, Any], part: int, worker: _Worker) -> dict[str, Any]:
    counts, keys, addresses = Counter(), [], []
    for where, address, record in worker.recipe.source.read(chunk):
        for tree in worker.keep(record, where, counts, lambda tree, where: [tree]):
            keys.append(text_key(tree.prompt))
            addresses.append(address)
    return {"counts": dump_counts(counts), "keys": keys, "addresses": addresses}


def _write_groups(batch: dict[str, Any], part: int, worker: _Worker) -> dict[str, str]:
    counts, trees, where = Counter(), [], ""
    numbers = iter(batch["addresses"])
    records = worker.recipe.source.pick(Address(*three) for three in zip(numbers, numbers, numbers, strict=True))
    for size in batch["sizes"]:
        chains = []
        for _ in range(size):
            where, record = next(records)
            chains.append(worker.recipe.parse(record, where, Counter()))
        tree, contradictions = StepTree.from_chains(chains)
        counts["notes", "joined_records"] += size - 1
        counts["notes", "contradicting_labels"] += contradictions
        trees += worker.rows(tree, where)
    return worker.write(part, trees, where, counts)


def _table(rows: list[dict[str, Any]], types: Mapping[str, pa.DataType], where: str) -> pa.Table:
    names = [name for name in types if any(name in row for row in rows)]
    names += sorted({name for row in rows for name in row} - set(names))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows], type=types.get(name))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ValueError(
                f"{where}: column `{name}`, in this row or one of those before it, holds values of different types or "
                f"of a type that no column can hold ({error}). Give it one type, or remove it."
            ) from error
    return pa.table(columns)


def _join_parts(parts: Path, data: Path, rows: dict[str, int]) -> tuple[pa.Schema, dict[str, Any]]:
    """One Parquet file per split, a row group per part. Returns the schema and the first training row."""
    files = {split: sorted(parts.glob(f"{split}-*.parquet")) for split in rows}
    schemas = [pq.read_schema(file) for split in files for file in files[split]]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"a column holds values of different types in different rows ({error}). Give it one type, or remove it."
        ) from error
    schema = Features.from_arrow_schema(schema).arrow_schema
    for split in files:
        with pq.ParquetWriter(data / f"{split}-00000-of-00001.parquet", schema) as writer:
            for file in files[split]:
                table = pa.concat_tables([schema.empty_table(), pq.read_table(file)], promote_options="permissive")
                writer.write_table(table.select(schema.names).cast(schema))
                file.unlink()
    for split, expected in rows.items():
        written = pq.read_metadata(data / f"{split}-00000-of-00001.parquet").num_rows
        assert written == expected, f"{split}: {written} rows written, {expected} counted"
    first = next(pq.ParquetFile(data / "train-00000-of-00001.parquet").iter_batches(batch_size=1))
    return schema, first.to_pylist()[0]


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _report(recipe: Recipe, config: BuildConfig, counts: Counter) -> dict[str, Any]:
    found = {"records_in": 0, "records_kept": 0, "dropped": {}, "rows": {}, "labels": {}, "notes": {}}
    found |= nest_counts(+counts)
    dropped = ", ".join(f"{reason}: {count}" for reason, count in found["dropped"].items()) or "none"
    assert found["records_in"] == found["records_kept"] + sum(found["dropped"].values())
    if not found["records_kept"]:
        raise ValueError(
            f"{', '.join(recipe.inputs)}: no row is left of {found['records_in']} records (dropped: {dropped}). "
            "Check that the files hold this builder's format, and the options that drop records."
        )
    if "train" not in found["rows"]:
        raise ValueError(
            f"the train split is empty: all {found['rows']['test']} rows fell into the test split at "
            f"test_size={config.test_size} and seed={config.seed}. Lower test_size, or change the seed."
        )
    warnings = []
    if config.test_size and "test" not in found["rows"]:
        warnings.append(
            f"the test split is empty and was left out: no problem fell into it at test_size={config.test_size} and "
            f"seed={config.seed}. Raise test_size, or change the seed."
        )
    labels = [kinds for splits in found["labels"].values() for kinds in splits.values()]
    return {
        "builder": recipe.name,
        "inputs": recipe.inputs,
        "command": build_command(recipe.name, recipe.inputs, recipe.options, config),
        "view": config.view,
        "records_in": found["records_in"],
        "records_kept": found["records_kept"],
        "dropped": found["dropped"],
        "rows": {split: found["rows"][split] for split in ("train", "test") if split in found["rows"]},
        "labelled_steps": sum(sum(values.values()) - values.get("null", 0) for values in labels),
        "labels": {split: found["labels"][split] for split in ("train", "test") if split in found["labels"]},
        "notes": found["notes"],
        "warnings": warnings,
    }


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _move(built: Path, output: Path, replaced: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        built.rename(output)
        return
    output.rename(replaced)
    try:
        built.rename(output)
    except OSError:
        replaced.rename(output)
        raise


def _check_output(output: Path, config: BuildConfig) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not config.overwrite:
        raise FileExistsError(
            f"{config.output_dir}: the output exists already. Name another directory, or pass --overwrite "
            "(`overwrite=True`) to replace it."
        )
    if not (output / REPORT_FILE).is_file():
        raise FileExistsError(
            f"{config.output_dir}: --overwrite replaces earlier builds only, and this is none: it has no "
            f"{REPORT_FILE}. Remove it yourself, or name another directory."
        )
