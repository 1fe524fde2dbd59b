"""Readers of records from JSON files and datasets, in chunks that can be read in parallel."""

import codecs
import gzip
import io
import itertools
import json
import logging
import os
import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO

from ..io import DuplicateKeyError, check_regular, shown, unique_keys


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 1000
ARRAY_BLOCK = 1 << 20  # number of characters of a JSON array to read at a time
MAX_ROW = 1 << 25  # number of bytes of a row in a file, since a parsed row can need 25 times as much memory
MAX_EXPANSION = 200  # of a gzip file. JSON is compressed to between a third and a fiftieth
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
GZIP = b"\x1f\x8b"

# First bytes of other file formats, with the name of the format and a hint
OTHER_FILES = (
    (
        b"PAR1",
        "a Parquet file",
        "Convert it with `datasets.Dataset.from_parquet(FILE).to_json('rows.jsonl')`, or pass its folder if the command reads datasets.",
    ),
    (b"\x28\xb5\x2f\xfd", "a file compressed with zstd", "Decompress it first."),
    (b"\xfd7zXZ\x00", "a file compressed with xz", "Decompress it first."),
    (b"BZh", "a file compressed with bzip2", "Decompress it first."),
    (b"PK\x03\x04", "a zip archive", "Extract it first."),
    (b"version https://git-lfs", "a Git LFS pointer instead of the file", "Fetch the file with `git lfs pull`."),
    (b"<", "HTML or XML", "Download the raw file instead of its web page."),
)
_SPACE = re.compile(r"[ \t\r\n]*")
_PYTHON = re.compile(r"'|None|True|False|nan|inf|-inf")
_WRAPPERS = ("data", "rows", "examples", "instances", "records", "items")
NOTHING = object()  # value of a missing column
# Half as slow again as without the hook for deeply nested rows, and as fast for flat ones
_DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)


class Address(NamedTuple):
    """Position of a record: file index, byte offset and line number. For a dataset: 0, row index and row index."""

    file: int
    start: int
    line: int


class JsonLines:
    """
    Reader of JSON files, in chunks of whole lines.

    A file has JSON Lines or one array of objects, and may be compressed with gzip. Arrays and compressed files are first converted
    to uncompressed JSON Lines in a temporary folder, so that chunks can be read in parallel.

    Only `\\n` and `\\r\\n` end a line, since JSON strings may contain other line separators, such as U+2028. Blank lines are skipped
    but counted, so that line numbers match those of an editor.

    Args:
        files (`Sequence[str]`):
            Paths of the files.
        columns (`Mapping[str, str]`, *optional*):
            Column to read for each expected name. See [`rename_columns`].

    Raises:
        `FileNotFoundError`: If a file does not exist.
        `ValueError`: If a path is a folder, a pipe or a device, if a file is given twice or has another format, or if one of the
            `columns` is missing in its first row. Methods also raise it for a file that has changed, and for a row of more than 32 MB.
    """

    def __init__(self, files: Sequence[str], columns: Mapping[str, str] | None = None):
        self.files = [str(file) for file in files]
        self.columns = dict(columns or {})
        self._paths = list(self.files)  # JSON Lines files: the files themselves, or converted copies
        self._arrays: set[int] = set()
        self._versions = []
        folder = None
        for number, file in enumerate(self.files):
            if not Path(file).exists():
                raise FileNotFoundError(f"{file}: file not found. Expected a JSON or JSON Lines file.")
            if Path(file).is_dir():
                raise ValueError(
                    f"{file}: found a folder, expected a JSON or JSON Lines file. Convert a dataset with "
                    "`datasets.load_dataset(FOLDER, split='train').to_json('rows.jsonl')`."
                )
            check_regular(file)
            refuse_repeated(file, self.files[:number])
            self._versions.append(_version(file))
            is_compressed, is_array = _form(file)
            if is_array:
                self._arrays.add(number)
            if is_compressed or is_array:
                if folder is None:
                    folder = tempfile.mkdtemp(prefix="trl_hrm-")
                    weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
                self._paths[number] = os.path.join(folder, f"{number}.jsonl")
                _write_lines(file, is_compressed, is_array, self._paths[number])
        for number, path in enumerate(self._paths if self.columns else ()):
            lines = self._lines({"file": number, "start": 0, "stop": os.path.getsize(path), "line": 1})
            for address, text in itertools.islice(lines, 1):
                where = self._where(address)
                check_columns(_parse_line(text, where), self.columns, where)

    def chunks(self) -> list[dict[str, int]]:
        """
        Return one dict per chunk of about 4 MB, with `file` index, byte range `start` to `stop`, and number of the first `line`.

        Raises:
            `ValueError`: If a file has no records.
        """
        chunks = []
        for number, path in enumerate(self._paths):
            is_empty = True
            with open(path, "rb") as lines:
                start, line = 0, 1
                while block := lines.read(CHUNK_BYTES):
                    rest = lines.readline(MAX_ROW)
                    if len(rest) == MAX_ROW:
                        where = self._where(Address(number, start, line + block.count(b"\n")))
                        raise ValueError(
                            f"{where}: the row has more than {MAX_ROW >> 20} MB. Remove it, or check that each row is on a separate line."
                        )
                    block += rest
                    is_empty = is_empty and block.isspace()
                    chunks.append({"file": number, "start": start, "stop": start + len(block), "line": line})
                    start += len(block)
                    line += block.count(b"\n")
            if is_empty:
                raise ValueError(f"{self.files[number]}: no records found. Check the path, or remove the empty input.")
        return chunks

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each record of the chunk. `where` is `file:line` or `file, row i`."""
        for address, text in self._lines(chunk):
            where = self._where(address)
            record = _parse_line(text, where)
            if address.line == 1:
                _refuse_wrapped(record, len(text) == os.path.getsize(self._paths[address.file]), where)
            yield where, address, rename_columns(record, self.columns)

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for records at the given addresses, in that order."""
        with ExitStack() as stack:
            handles = [stack.enter_context(open(path, "rb")) for path in self._paths]
            for address in addresses:
                handles[address.file].seek(address.start)
                where = self._where(address)
                self._check_version(address.file)
                record = _parse_line(handles[address.file].readline(), where)
                yield where, rename_columns(record, self.columns)

    def _lines(self, chunk: dict[str, int]) -> Iterator[tuple[Address, bytes]]:
        file, start, line = chunk["file"], chunk["start"], chunk["line"]
        with open(self._paths[file], "rb") as lines:
            lines.seek(start)
            while start < chunk["stop"]:
                text = lines.readline()
                if not text:
                    break
                if text.strip():
                    yield Address(file, start, line), text
                start += len(text)
                line += 1
        self._check_version(file)

    def _check_version(self, file: int) -> None:
        if _version(self.files[file]) != self._versions[file]:
            raise ValueError(f"{self.files[file]}: the file has changed while it was read. Run the command again.")

    def _where(self, address: Address) -> str:
        name = self.files[address.file]
        return f"{name}, row {address.line - 1}" if address.file in self._arrays else f"{name}:{address.line}"


class DatasetRows:
    """
    Reader of the rows of a dataset, with the methods of [`JsonLines`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset to read.
        columns (`Mapping[str, str]`, *optional*):
            Column to read for each expected name. See [`rename_columns`].
        name (`str`, *optional*):
            Name of the dataset, for the locations of rows.

    Raises:
        `ValueError`: If one of the `columns` is missing in the first row.
    """

    def __init__(self, dataset: "Dataset", columns: Mapping[str, str] | None = None, name: str | None = None):
        from datasets.features.features import require_decoding

        self._features = dict(dataset.features)
        self._json = [name for name, feature in self._features.items() if "Json(" in repr(feature)]
        # Images, audio and videos are not decoded
        media = [
            name for name, feature in self._features.items() if require_decoding(feature) and name not in self._json
        ]
        self._media = dataset.with_format("arrow").select_columns(media) if media else None
        self.dataset = dataset.with_format(None).remove_columns(media)
        self._row = "dataset row" if name is None else f"{name}, dataset row"
        self.columns = dict(columns or {})
        if self.columns and len(self.dataset):
            check_columns(self._record(0), self.columns, f"{self._row} 0")

    def types(self) -> dict[str, Any]:
        """
        Return the Arrow types of the columns of [`DatasetRows.features`].

        Raises:
            `ValueError`: If a column has times of day in nanoseconds, which Python cannot represent.
        """
        from datasets import Features

        types = {field.name: field.type for field in Features(self.features()).arrow_schema}
        for name, kind in types.items():
            if "time64[ns]" in str(kind):
                raise ValueError(
                    f"{self._row}s: the column `{name}` has the type {kind}, whose nanoseconds cannot be kept. Cast it to time64[us], or "
                    "remove it."
                )
        return types

    def features(self) -> dict[str, Any]:
        """Return the features of the columns that are not part of a step tree. Columns of JSON have the type of their values."""
        # `original_prompt` may be messages, which become a text
        own = ("prompt", "completions", "labels", "parents", "num_merged", "original_prompt", *self._json)
        features = {name: feature for name, feature in self._features.items() if name not in self._json}
        return {name: feature for name, feature in rename_columns(features, self.columns).items() if name not in own}

    def chunks(self) -> list[dict[str, int]]:
        """Return one dict per 1000 rows, with the row range `start` to `stop`."""
        rows = len(self.dataset)
        return [{"start": start, "stop": min(start + CHUNK_ROWS, rows)} for start in range(0, rows, CHUNK_ROWS)]

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each row of the chunk. `where` is `dataset row i`, counted from 0."""
        rows = range(chunk["start"], chunk["stop"])
        for row, record in zip(rows, self._records(rows), strict=True):
            yield f"{self._row} {row}", Address(0, row, row), rename_columns(record, self.columns)

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for rows at the given addresses, in that order."""
        addresses = list(addresses)
        for start in range(0, len(addresses), CHUNK_ROWS):
            batch = addresses[start : start + CHUNK_ROWS]
            for address, record in zip(batch, self._records([address.start for address in batch]), strict=True):
                yield f"{self._row} {address.line}", rename_columns(record, self.columns)

    def _records(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield rows. They are read at once, or one by one if a value cannot be read, so that the error names its row."""
        try:
            columns = self.dataset[rows]
            media = [{}] * len(rows) if self._media is None else self._media[rows].to_pylist()
        except (ArithmeticError, ValueError, TypeError):
            yield from map(self._record, rows)
            return
        for values, others in zip(zip(*columns.values(), strict=True), media, strict=True):
            yield dict(zip(columns, values, strict=True)) | others

    def _record(self, row: int) -> dict[str, Any]:
        try:
            record = self.dataset[row]
            return record if self._media is None else record | self._media[row].to_pylist()[0]
        except (ArithmeticError, ValueError, TypeError) as error:  # such as a date after the year 9999
            raise ValueError(
                f"{self._row} {row}: a value cannot be read ({error}). Correct it, or remove its column."
            ) from error


class MixedRows:
    """
    Reader of the records of several inputs, with the methods of [`JsonLines`]. The `file` of an [`Address`] is the number of the input.

    Args:
        sources (`Sequence[JsonLines | DatasetRows]`):
            Reader of each input. A [`JsonLines`] has one file.
        names (`Sequence[str]`):
            Name of each input, for error messages.
    """

    def __init__(self, sources: Sequence[JsonLines | DatasetRows], names: Sequence[str]):
        self.sources = list(sources)
        self.names = list(names)

    def types(self) -> dict[str, Any]:
        """
        Return the Arrow types of the columns of the datasets that are not part of a step tree. Types of numbers are promoted.

        Raises:
            `ValueError`: If a column has different types in two inputs.
        """
        import pyarrow as pa

        found: dict[str, Any] = {}
        for name, source in zip(self.names, self.sources, strict=True):
            for column, kind in source.types().items() if isinstance(source, DatasetRows) else ():
                try:
                    schemas = [pa.schema([(column, one)]) for one in (found.get(column, kind), kind)]
                    found[column] = pa.unify_schemas(schemas, promote_options="permissive").field(0).type
                except pa.ArrowException as error:
                    raise ValueError(
                        f"{name}: the column `{column}` has the type {kind}, and {found[column]} in an earlier input. Convert the column to "
                        "one type, or remove it from one of the inputs."
                    ) from error
        return found

    def features(self) -> dict[str, Any]:
        """Return the features of the columns of [`MixedRows.types`]. Columns with different features have those of their type."""
        found: dict[str, Any] = {}
        for source in self.sources:
            for column, feature in source.features().items() if isinstance(source, DatasetRows) else ():
                found[column] = feature if found.get(column, feature) == feature else None
        return {column: feature for column, feature in found.items() if feature is not None}

    def chunks(self) -> list[dict[str, Any]]:
        """
        Return the chunks of all inputs, with the number of the input as `source`.

        Raises:
            `ValueError`: If an input has no records.
        """
        chunks = []
        for number, (name, source) in enumerate(zip(self.names, self.sources, strict=True)):
            own = source.chunks()
            if not own:
                raise ValueError(f"{name}: no records found. Check the path, or remove the empty input.")
            chunks += [chunk | {"source": number} for chunk in own]
        return chunks

    def read(self, chunk: dict[str, Any]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each record of the chunk."""
        number = chunk["source"]
        for where, address, record in self.sources[number].read(chunk):
            yield where, address._replace(file=number), record

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for records at the given addresses, in that order."""
        addresses = list(addresses)
        picked = [
            source.pick([address._replace(file=0) for address in addresses if address.file == number])
            for number, source in enumerate(self.sources)
        ]
        for address in addresses:
            yield next(picked[address.file])


def refuse_repeated(name: str, others: Iterable[str]) -> None:
    """Raise `ValueError` if an input is also one of the others, under the same or another name."""
    for other in others:
        if name == other or os.path.exists(name) and os.path.exists(other) and os.path.samefile(name, other):
            raise ValueError(f"{name} is given twice, which would double the weight of its rows. Give it once.")


def all_rows(source: JsonLines | DatasetRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, record)` for all records of a source."""
    return ((where, record) for chunk in source.chunks() for where, _, record in source.read(chunk))


def is_json_file(name: str) -> bool:
    """Return whether a source is the path of a JSON file, which may be missing, instead of a dataset."""
    path = Path(name)
    return name.endswith(SUFFIXES) or (path.exists() and not path.is_dir())


@contextmanager
def loaded_dataset(
    name: str, split: str | None = None, config: str | None = None, cache_parent: str | Path | None = None
) -> Iterator["Dataset | DatasetDict"]:
    """
    Context manager that loads a dataset from the Hub or a local directory. See [`load_rows`].

    A local directory is loaded with a temporary cache, since the shared cache may have the rows of another directory with the same
    name.

    Args:
        name (`str`):
            Hub id or directory.
        split (`str`, *optional*):
            Split to load. Defaults to all splits, as a `DatasetDict`.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        cache_parent (`str` or `Path`, *optional*):
            Parent directory of the temporary cache. Defaults to the system's temporary directory.
    """
    with tempfile.TemporaryDirectory(dir=cache_parent) as cache:
        yield load_rows(name, config, split, cache if Path(name).is_dir() else None)


def load_rows(
    name: str, config: str | None = None, split: str | None = None, cache_dir: str | None = None
) -> "Dataset | DatasetDict":
    """
    Load a dataset with `datasets.load_dataset`, or with `load_from_disk` if it is a directory of `save_to_disk`, which
    `load_dataset` refuses.

    Args:
        name (`str`), config (`str`, *optional*):
            Hub id or directory of the dataset, and its configuration.
        split (`str`, *optional*):
            Split to load, such as `"train"` or `"train[:100]"`. Defaults to all splits, as a `DatasetDict`. A `Dataset` that was saved
            with `save_to_disk` is the split `train`.
        cache_dir (`str`, *optional*):
            Directory of the cache. Not used for a directory of `save_to_disk`.

    Raises:
        `FileNotFoundError`: If the dataset does not exist.
        `ValueError`: If the dataset cannot be read, or does not have the split or the configuration.
    """
    from datasets import DatasetDict, ReadInstruction, concatenate_datasets, load_dataset, load_from_disk

    with naming_dataset(name):
        if not any(Path(name, file).is_file() for file in ("state.json", "dataset_dict.json")):
            return load_dataset(name, config, split=split, cache_dir=cache_dir)
        if config is not None:
            raise ValueError(f"a directory of `save_to_disk` has no configurations. Remove {shown(config)}")
        saved = load_from_disk(name).with_format(None)
        splits = saved if isinstance(saved, DatasetDict) else DatasetDict(train=saved)
        if split is None:
            return splits
        sizes = {one: len(rows) for one, rows in splits.items()}
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)  # such as train[:100]
        return concatenate_datasets([splits[one.splitname].select(range(one.from_, one.to)) for one in parts])


@contextmanager
def naming_dataset(name: str) -> Iterator[None]:
    """Context manager that converts errors of `datasets` to a `ValueError` with the name of the dataset and the cause."""
    import yaml
    from datasets.exceptions import DatasetsError

    faults = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError, yaml.YAMLError, DatasetsError)
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it would print the error too
    try:
        yield
    except (*faults, OSError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, ConnectionError) and not Path(name).exists():
            near = get_close_matches(name, [path.as_posix() for path in Path(name).parent.glob("*/")], n=1)
            raise FileNotFoundError(
                f"{name} is not a folder, and the Hub, which may have a dataset of this name, cannot be reached."
                + (f" Did you mean {near[0]}?" if near else "")
            ) from error
        if isinstance(error, OSError) and name in str(error):  # such as a missing folder
            raise
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"{name}: the dataset cannot be read ({cause}).") from error
    except StopIteration as error:  # raised for a file of JSON Lines that is empty
        raise ValueError(f"{name}: the dataset cannot be read, because a file is empty. Remove the file.") from error
    finally:
        logger.setLevel(level)


def parse_columns(columns: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """
    Return the column to read for each expected name, given as a dictionary or as strings such as `answer=reward_model.ground_truth`.

    Raises:
        `ValueError`: If a string has no `=`, or a name is given twice.
    """
    return parse_pairs(columns, "columns", "NAME=COLUMN, such as problem=Question")


def parse_pairs(pairs: Mapping[str, Any] | Sequence[str] | None, option: str, form: str) -> dict[str, Any]:
    """
    Return the pairs of an option, given as a dictionary or as strings such as `NAME=VALUE`.

    Args:
        pairs (`Mapping[str, Any]` or `Sequence[str]`, *optional*):
            The pairs.
        option (`str`), form (`str`):
            Name of the option, and the expected form with an example, for error messages.

    Raises:
        `ValueError`: If a string has no `=`, or a name is given twice.
    """
    if isinstance(pairs, Mapping):
        return dict(pairs)
    if pairs is None:
        return {}
    found: dict[str, str] = {}
    for word in pairs if isinstance(pairs, list | tuple) else [pairs]:
        name, equals, value = str(word).partition("=")
        if not (name and equals and value):
            raise ValueError(f"--{option}: found {shown(word)}, expected {form}.")
        if name in found:
            raise ValueError(f"--{option}: {name} is given twice, as {found[name]} and {value}. Give it once.")
        found[name] = value
    return found


def rename_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """
    Rename columns of a record.

    Args:
        record (`dict[str, Any]`):
            Record to rename.
        columns (`Mapping[str, str]`):
            Column to read for each new name. Use dots for nested values: `reward_model.ground_truth`, `messages.0.content`. If the
            column is missing, the new name is missing too, even if the record had a column of that name.

    Example:

    ```python
    >>> rename_columns({"Question": "1+1?", "info": {"gold": "2"}}, {"problem": "Question", "answer": "info.gold"})
    {'info': {'gold': '2'}, 'problem': '1+1?', 'answer': '2'}
    ```
    """
    if not columns:
        return record
    values = {name: look_up(record, column) for name, column in columns.items()}
    gone = {*columns, *columns.values()}
    kept = {name: value for name, value in record.items() if name not in gone}
    return kept | {name: value for name, value in values.items() if value is not NOTHING}


def check_columns(record: dict[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Raise `ValueError` if one of the columns to rename is missing in a record."""
    missing = [column for column in columns.values() if look_up(record, column) is NOTHING]
    if missing:
        raise ValueError(
            f"{where}: --columns names {', '.join(missing)}, but the row only has {', '.join(column_paths(record))[:400]}."
        )


def look_up(value: Any, path: str) -> Any:
    """Return the value of a column, with dots for nested values, or `NOTHING` if it is missing. See [`rename_columns`]."""
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return NOTHING
    return value


def column_paths(record: dict[str, Any]) -> list[str]:
    """Return the names of the columns, including nested ones."""
    paths = []
    for name, value in record.items():
        paths += [f"{name}.{inner}" for inner in column_paths(value)] if isinstance(value, dict) and value else [name]
    return paths


def _version(file: str) -> tuple[int, int]:
    """Return the size of a file, and the time of its last change."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns


def _form(file: str) -> tuple[bool, bool]:
    """Return whether a file is compressed with gzip, and whether it has a JSON array."""
    with open(file, "rb") as raw:
        is_compressed = raw.read(len(GZIP)) == GZIP
    with _open_bytes(file, is_compressed) as data:
        try:
            head = data.read(4096)
        except (EOFError, OSError, zlib.error) as error:
            raise _damaged(file, error) from error
    for first, kind, remedy in OTHER_FILES:
        if head.startswith(first):
            raise ValueError(f"{file}: found {kind}, expected JSON. {remedy}")
    if b"\x00" in head[:4] or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(
            f"{file}: the first bytes look like UTF-16 or UTF-32, expected UTF-8. Convert the file, for example with "
            "`iconv -f utf-16 -t utf-8`."
        )
    return is_compressed, head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _open_bytes(file: str, is_compressed: bool) -> BinaryIO:
    return gzip.open(file, "rb") if is_compressed else open(file, "rb")


def _damaged(file: str, error: Exception) -> ValueError:
    return ValueError(f"{file}: cannot decompress the gzip file ({error}). It may be truncated. Download it again.")


def _write_lines(file: str, is_compressed: bool, is_array: bool, path: str) -> None:
    """Convert a compressed file or an array to uncompressed JSON Lines."""
    with _open_bytes(file, is_compressed) as data, open(path, "wb") as lines:
        compressed = os.path.getsize(file) if is_compressed else None

        def check_expansion() -> None:
            if compressed and data.tell() > max(MAX_ROW, MAX_EXPANSION * compressed):
                raise ValueError(
                    f"{file}: the gzip file expands to more than {MAX_EXPANSION} times its size. If the content is right, decompress it first."
                )

        try:
            if is_array:
                for value in _elements(io.TextIOWrapper(data, encoding="utf-8-sig"), file):
                    check_expansion()
                    lines.write(json.dumps(value).encode() + b"\n")
            else:
                while block := data.read(ARRAY_BLOCK):
                    check_expansion()
                    lines.write(block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {_not_utf8(error)}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(file, error) from error


def _elements(text: TextIO, file: str) -> Iterator[Any]:
    """Yield the elements of a JSON array. The file is read in blocks, so a long array does not need to fit in memory."""
    decode = _DECODER.raw_decode
    buffer = ""
    while "[" not in buffer:
        buffer += text.read(ARRAY_BLOCK)
    place = buffer.index("[") + 1
    row, is_separated = 0, True
    while True:
        place = _SPACE.match(buffer, place).end()
        if place == len(buffer):
            buffer, place = text.read(ARRAY_BLOCK), 0
            if not buffer:
                raise ValueError(
                    f"{file}: the file ends within its JSON array, after {row} rows. It may be truncated. Download it again."
                )
        elif buffer[place] == "]" and not (row and is_separated):
            if (buffer[place + 1 :] + text.read()).strip():
                raise ValueError(
                    f"{file}: found text after the end of the JSON array, expected one array. Remove this text."
                )
            return
        elif not is_separated:
            if buffer[place] != ",":
                raise ValueError(
                    f"{file}, row {row}: invalid JSON: found {shown(buffer[place : place + 20])} after the previous row, expected a comma "
                    "or the end of the array."
                )
            place, is_separated = place + 1, True
        else:
            try:
                value, place = decode(buffer, place)
            except json.JSONDecodeError as error:
                # The row may continue in the next block. Doubling the block size each time keeps this linear
                more = text.read(max(ARRAY_BLOCK, len(buffer)))
                if not more:
                    remedy = _remedy(buffer, error, ends=True)
                    raise ValueError(f"{file}, row {row}: invalid JSON ({error.msg}). {remedy}") from error
                if len(buffer) - place > MAX_ROW:
                    raise ValueError(
                        f"{file}, row {row}: invalid JSON ({error.msg}), or the row has more than {MAX_ROW >> 20} MB. Correct the row, "
                        "or remove it."
                    ) from error
                buffer, place = buffer[place:] + more, 0
                continue
            except (ValueError, RecursionError) as error:
                raise _unreadable(f"{file}, row {row}", error) from error
            _check_object(value, f"{file}, row {row}")
            yield value
            row, is_separated = row + 1, False


def _parse_line(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = text.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {_not_utf8(error)}") from error
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        remedy = _remedy(line, error, ends=not text.endswith(b"\n"))
        raise ValueError(f"{where}: invalid JSON ({error}). {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(where, error) from error
    _check_object(value, where)
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: a string has half of a surrogate pair ({error}), which UTF-8 cannot encode. Remove the escape sequence."
            ) from error
    return value


def _check_object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a JSON {type(value).__name__}, but each row must be an object.")


def _unreadable(where: str, error: Exception) -> ValueError:
    """
    Return the error for JSON with a key that occurs twice, and for JSON that Python does not read: nested too deeply, or with an
    integer of more than 4,300 digits.
    """
    if isinstance(error, DuplicateKeyError):
        return ValueError(f"{where}: cannot read the JSON ({error} in an object). Remove or rename one of them.")
    found = "nested too deeply" if isinstance(error, RecursionError) else "an integer has more than 4,300 digits"
    return ValueError(f"{where}: cannot read the JSON ({found}). Correct the row, or remove it.")


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"the text is not valid UTF-8 ({error}). Convert the file, for example from Latin-1 with `iconv -f latin1 -t utf-8`."


def _remedy(text: str, error: json.JSONDecodeError, ends: bool) -> str:
    """Return a hint on how to fix text that is not JSON. `ends` is whether the file ends with this text."""
    if _PYTHON.match(text, error.pos):
        return "This is the format of Python's `print`, not JSON. Write the rows with `json.dumps`."
    if error.msg.startswith("Extra data"):
        return "Expected one JSON object per line. Put each object on a separate line."
    if error.msg.startswith("Unterminated string") or not text[error.pos :].strip():
        if ends:
            return "The file ends within this row. It may be truncated. Download it again, or remove the row."
        return (
            "The row continues on the next lines, but JSON Lines must have one object per line. Convert the file with "
            "`jq -c . FILE` or, if the rows are in a list under a key such as `data`, with `jq -c '.data[]' FILE`."
        )
    if error.pos == 0 and "," in text:
        return (
            "Expected one JSON object per line. A CSV file has no lists: read it with `csv.DictReader`, split its texts into lists of steps and "
            "labels, and write each row with `json.dumps`. In another file, correct or remove the row."
        )
    return "Expected one JSON object per line. Correct the row, or remove it."


def _refuse_wrapped(record: dict[str, Any], is_only: bool, where: str) -> None:
    """Raise an error if a file has a single object with all rows in a list under one of its keys."""
    for name in _WRAPPERS:
        inner = record.get(name)
        if is_only and isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            raise ValueError(
                f"{where}: the file has a single object with a list of {len(inner)} objects under `{name}`, expected one row per line or "
                f"an array of rows. If these are the rows, extract them with `jq -c '.{name}[]' FILE`."
            )
