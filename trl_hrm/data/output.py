"""Write the files of a dataset: parts with the rows, one Parquet file per split, and an atomic move to the output."""

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
            f"{config.output_dir}: the output already exists. Choose another --output_dir, or pass --overwrite (`overwrite=True`) to "
            "replace it."
        )
    if not (output / REPORT_FILE).is_file():
        raise FileExistsError(
            f"{config.output_dir}: --overwrite only replaces earlier builds, but this folder has no {REPORT_FILE}. Delete it "
            "yourself, or choose another --output_dir."
        )


def temporary_directory(config: BuildConfig) -> tempfile.TemporaryDirectory:
    """Create a temporary directory on the same file system as the output, so it can be renamed to the output."""
    output = Path(config.output_dir).absolute()
    anchor = next(parent for parent in output.parents if parent.exists())
    return tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=anchor)


def move(built: Path, output: Path, replaced: Path) -> None:
    """Rename the built folder to the output. If the output exists, it is first moved to `replaced`."""
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
    """Convert rows to a table. The types of columns that are not in `types` are inferred from their values."""
    names = [name for name in types if any(name in row for row in rows)]
    names += sorted({name for row in rows for name in row} - set(names))
    columns = {}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in rows], type=types.get(name))
        except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: the column `{name[:80]}` has values of different types, or of an unsupported type, in this row or an earlier one "
                f"({error}). Use one type for the column, or remove it."
            ) from error
    return pa.table(columns)


def write_part(table: pa.Table, parts: Path, split: str, part: int) -> None:
    """Write the rows of a chunk to an Arrow file, which is fast to write and to read."""
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(parts / f"{split}-{part:08d}.arrow", table.schema, options=options) as writer:
        writer.write_table(table)


def join_parts(
    parts: Path, data: Path, rows: dict[str, int], features: Mapping[str, Any]
) -> tuple[pa.Schema, dict[str, Any]]:
    """
    Join the parts to one Parquet file per split, with a row group per part. `features` has the features of some columns. Return the
    schema and the first training row.

    Raises:
        `ValueError`: If a column has values of different types, or a type that Parquet cannot store.
    """
    files = {split: sorted(parts.glob(f"{split}-*.arrow")) for split in rows}
    schemas = [_read_part(file).schema for split in files for file in files[split]]
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive").remove_metadata()
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"a column has values of different types ({error}). Use one type for the column, or remove it."
        ) from error
    for field in schema:
        if "struct<>" in str(field.type):
            raise ValueError(
                f"the column `{field.name[:80]}` has only empty objects, which Parquet cannot store. Remove the column."
            )
    found = Features.from_arrow_schema(schema)
    schema = Features(found | {name: features[name] for name in found if name in features}).arrow_schema
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
    """Return a hash of the contents of the files in a folder, as 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
