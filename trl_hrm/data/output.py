"""The files of a dataset: rows in parts, one Parquet file per split made of them, a folder that appears as a whole."""

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from .build_config import BuildConfig


REPORT_FILE = "build_report.json"

COLUMNS = {
    "prompt": pa.string(),
    "completions": pa.list_(pa.string()),
    "labels": pa.list_(pa.float32()),
    "parents": pa.list_(pa.int32()),
    "num_merged": pa.list_(pa.int32()),
    "completion": pa.string(),
    "mc_score": pa.float64(),
}


def check_output(output: Path, config: BuildConfig) -> None:
    """Raise `FileExistsError` if the output exists and may not be replaced."""
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


def temporary_directory(config: BuildConfig) -> tempfile.TemporaryDirectory:
    """A directory on the same file system as the output, so that a folder can be renamed from one to the other."""
    output = Path(config.output_dir).absolute()
    anchor = next(parent for parent in output.parents if parent.exists())
    return tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=anchor)


def move(built: Path, output: Path, replaced: Path) -> None:
    """Give the built folder the name of the output. An earlier one goes to `replaced`."""
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


def make_table(rows: list[dict[str, Any]], types: Mapping[str, pa.DataType], where: str) -> pa.Table:
    """Rows as a table, in which columns without a type get that of their values."""
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


def write_part(table: pa.Table, parts: Path, split: str, part: int) -> None:
    """Write the rows of a chunk, in a form that is quick to write and to read again."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(parts / f"{split}-{part:08d}.arrow", table.schema, options=options) as writer:
        writer.write_table(table)


def join_parts(parts: Path, data: Path, rows: dict[str, int]) -> tuple[pa.Schema, dict[str, Any]]:
    """One Parquet file per split, a row group per part. Returns the schema and the first training row."""
    files = {split: sorted(parts.glob(f"{split}-*.arrow")) for split in rows}
    schemas = [_read_part(file).schema for split in files for file in files[split]]
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
                part = _read_part(file).read_all()
                table = pa.concat_tables([schema.empty_table(), part], promote_options="permissive")
                writer.write_table(table.select(schema.names).cast(schema))
                file.unlink()
    for split, expected in rows.items():
        written = pq.read_metadata(data / f"{split}-00000-of-00001.parquet").num_rows
        assert written == expected, f"{split}: {written} rows written, {expected} counted"
    first = next(pq.ParquetFile(data / "train-00000-of-00001.parquet").iter_batches(batch_size=1))
    return schema, first.to_pylist()[0]


def _read_part(file: Path) -> pa.ipc.RecordBatchFileReader:
    return pa.ipc.open_file(pa.memory_map(str(file)))


def digest_of(folder: Path) -> str:
    """16 hex digits that stand for the contents of the files of a folder."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
