"""Write the files of a dataset: parts with the rows, one Parquet file per split, and an atomic move to the output."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

from ..config import OutputConfig
from ..io import claimed_name, resolved_output


logger = logging.getLogger(__name__)

REPORT_FILE = "build_report.json"
PICTURE = "scores.png"  # of `select-raft`
LOAD_FOLDER = 'load_dataset("path/to/this/directory")  # or the id of the repository on the Hub'
_OWN = re.compile(
    rf"README\.md|{re.escape(REPORT_FILE)}|{re.escape(PICTURE)}|data/[a-z_]+-\d{{5}}-of-\d{{5}}\.parquet"
)

COLUMNS = {
    "prompt": pa.string(),
    "completions": pa.list_(pa.string()),
    "labels": pa.list_(pa.float32()),
    "parents": pa.list_(pa.int32()),
    "num_merged": pa.list_(pa.int32()),
    "completion": pa.string(),
    "mc_score": pa.float64(),
}


class Output(NamedTuple):
    """
    Claimed output of a build.

    Args:
        folder (`Path`):
            Folder of the dataset, which does not exist yet or holds an earlier build.
        work (`Path`):
            Temporary folder on the same file system, so the dataset can be renamed to `folder`.
        config ([`~config.OutputConfig`]):
            Options of the build.
    """

    folder: Path
    work: Path
    config: OutputConfig


@contextmanager
def claimed_output(config: OutputConfig, inputs: Iterable[str] = ()) -> Iterator[Output]:
    """
    Context manager that claims the output of a build before any work is done.

    The name of the output is locked until the end of the block. The temporary folder is a hidden folder next to the output. If a
    killed build left one, it is removed, and an earlier dataset that the build had moved aside is restored.

    Args:
        config ([`~config.OutputConfig`]):
            Folder of the dataset, and whether to replace it.
        inputs (`Iterable[str]`, *optional*):
            Files and folders that are read.

    Raises:
        `BlockingIOError`: If another process is building the same output.
        `FileExistsError`: If the output exists and may not be replaced.
        `OSError`: If the output cannot be written.
    """
    given = config.output_dir
    folder = resolved_output(given, "output_dir")
    for name in filter(os.path.exists, inputs):
        if Path(os.path.realpath(name)).is_relative_to(folder):
            raise FileExistsError(f"{given}: the output contains the input {name}. Choose another `output_dir`.")
    if os.path.exists(folder) and not folder.is_dir():
        raise NotADirectoryError(f"{given} is a file. Choose a folder as `output_dir`.")
    if os.path.ismount(folder):
        raise OSError(f"{given} is a mount point, which cannot be replaced. Choose a folder in it as `output_dir`.")
    work, replaced = _hidden(folder, "partial"), _hidden(folder, "replaced")
    with claimed_name(folder, given, "output_dir"):
        if replaced.exists() and not folder.exists():  # killed between the two renames of `publish`
            replaced.rename(folder)
            logger.warning("Restored %s, which an interrupted build had moved aside.", given)
        for left in filter(os.path.exists, (replaced, work)):
            shutil.rmtree(left)
            logger.warning("Removed %s, which an interrupted build had left.", left)
        _check_replaced(folder, config)
        work.mkdir()
        try:
            yield Output(folder, work, config)
        finally:
            shutil.rmtree(work, ignore_errors=True)  # the next build removes what a worker still writes


def _hidden(folder: Path, kind: str) -> Path:
    """Return a name next to a folder that no other program uses."""
    return folder.with_name(f".{folder.name}.trl-hrm-{kind}")


def _check_replaced(folder: Path, config: OutputConfig) -> None:
    """Raise `FileExistsError` if a folder exists, unless `overwrite` is set and it only has files of an earlier build."""
    given = config.output_dir
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not config.overwrite:
        raise FileExistsError(
            f"{given}: the output already exists. Choose another --output_dir, or pass --overwrite (`overwrite=True`) to replace it."
        )
    if not (folder / REPORT_FILE).is_file():
        raise FileExistsError(
            f"{given}: --overwrite only replaces earlier builds, but this folder has no {REPORT_FILE}. Delete it yourself, or choose "
            "another --output_dir."
        )
    found = [path for path in folder.iterdir() if path.name != "data"] + list((folder / "data").glob("**/*"))
    foreign = sorted(
        str(path.relative_to(folder)) for path in found if not _OWN.fullmatch(path.relative_to(folder).as_posix())
    )
    if foreign:
        more = f" and {len(foreign) - 3:,} more" if len(foreign) > 3 else ""
        raise FileExistsError(
            f"{given}: --overwrite would delete {', '.join(foreign[:3])}{more}, which no build has written. Move the file away, or "
            "choose another --output_dir."
        )


def publish(built: Path, output: Output) -> None:
    """
    Rename a built folder to the output. An earlier dataset is moved aside first.

    If the process is killed in between, [`claimed_output`] restores the earlier dataset.

    Raises:
        `FileExistsError`: If the output may not be replaced, because files were added during the build.
    """
    folder, replaced = output.folder, _hidden(output.folder, "replaced")
    _check_replaced(folder, output.config)
    if not folder.exists():
        built.rename(folder)
        return
    folder.rename(replaced)
    try:
        built.rename(folder)
    except OSError:
        replaced.rename(folder)
        raise
    shutil.rmtree(replaced)


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
