"""Where records come from: JSON files or a dataset, cut into chunks that processes read on their own."""

import codecs
import gzip
import io
import itertools
import json
import os
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TextIO


if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 1000
ARRAY_BLOCK = 1 << 20  # characters of a JSON array that are read at a time
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
GZIP = b"\x1f\x8b"

# The first bytes of files that are not JSON: what they are, and what to do
OTHER_FILES = (
    (b"PAR1", "a Parquet file", "Name the folder that holds it instead."),
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
_NOTHING = object()


class Address(NamedTuple):
    """Where a record starts: file number, byte offset and line, or, for a dataset, 0, row and row."""

    file: int
    start: int
    line: int


class JsonLines:
    """
    Rows of JSON files, read a chunk of whole lines at a time.

    A file holds JSON Lines or one array of objects, and may be compressed with gzip. Arrays and compressed files are first
    written to a temporary folder as plain JSON Lines, so that chunks can be read in parallel.

    Lines end with `\\n` or `\\r\\n` alone: JSON strings may hold other line separators, such as U+2028. Blank lines are
    skipped but counted, so that line numbers match those that an editor shows.

    Args:
        files (`Sequence[str]`):
            Paths of the files.
        columns (`Mapping[str, str]`, *optional*):
            New names of columns. See [`rename_columns`].

    Raises:
        `FileNotFoundError`: If a path is not a file.
        `ValueError`: If a file is of another kind, or its first row lacks one of the `columns`.
    """

    def __init__(self, files: Sequence[str], columns: Mapping[str, str] | None = None):
        self.files = [str(file) for file in files]
        self.columns = dict(columns or {})
        self._paths = list(self.files)  # of the lines: the files themselves, or plain copies of them
        self._arrays: set[int] = set()
        folder = None
        for number, file in enumerate(self.files):
            if not Path(file).is_file():
                raise FileNotFoundError(f"{file}: file not found. Expected a JSON or JSON Lines file.")
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
        """One dict per chunk of about 4 MB: `file` number, first byte `start`, end `stop`, number of the first `line`."""
        chunks = []
        for number, path in enumerate(self._paths):
            with open(path, "rb") as lines:
                start, line = 0, 1
                while block := lines.read(CHUNK_BYTES):
                    block += lines.readline()
                    chunks.append({"file": number, "start": start, "stop": start + len(block), "line": line})
                    start += len(block)
                    line += block.count(b"\n")
        return chunks

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each record of the chunk, `where` being `file:line` or `file, row i`."""
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
                record = _parse_line(handles[address.file].readline(), where)
                yield where, rename_columns(record, self.columns)

    def _lines(self, chunk: dict[str, int]) -> Iterator[tuple[Address, bytes]]:
        file, start, line = chunk["file"], chunk["start"], chunk["line"]
        with open(self._paths[file], "rb") as lines:
            lines.seek(start)
            while start < chunk["stop"]:
                text = lines.readline()
                if text.strip():
                    yield Address(file, start, line), text
                start += len(text)
                line += 1

    def _where(self, address: Address) -> str:
        name = self.files[address.file]
        return f"{name}, row {address.line - 1}" if address.file in self._arrays else f"{name}:{address.line}"


class DatasetRows:
    """
    The rows of a dataset, with the methods of [`JsonLines`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset to read.
        columns (`Mapping[str, str]`, *optional*):
            New names of columns. See [`rename_columns`].

    Raises:
        `ValueError`: If the first row lacks one of the `columns`.
    """

    def __init__(self, dataset: "Dataset", columns: Mapping[str, str] | None = None):
        self.dataset = dataset.with_format(None)
        self.columns = dict(columns or {})
        if self.columns and len(self.dataset):
            check_columns(self.dataset[0], self.columns, "dataset row 0")

    def types(self) -> dict[str, Any]:
        """Arrow types of the columns that are not part of a step tree."""
        own = ("prompt", "completions", "labels", "parents", "num_merged")
        types = {field.name: field.type for field in self.dataset.features.arrow_schema}
        return {name: kind for name, kind in rename_columns(types, self.columns).items() if name not in own}

    def chunks(self) -> list[dict[str, int]]:
        """One dict per 1000 rows: first row `start`, end `stop`."""
        rows = len(self.dataset)
        return [{"start": start, "stop": min(start + CHUNK_ROWS, rows)} for start in range(0, rows, CHUNK_ROWS)]

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each row of the chunk, `where` being `dataset row i`, from 0."""
        rows = range(chunk["start"], chunk["stop"])
        for row, value in zip(rows, self.dataset.select(rows), strict=True):
            yield f"dataset row {row}", Address(0, row, row), rename_columns(value, self.columns)

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for rows at the given addresses, in that order."""
        for address in addresses:
            yield f"dataset row {address.line}", rename_columns(self.dataset[address.start], self.columns)


def all_rows(source: JsonLines | DatasetRows) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(where, record)` for all records of a source."""
    return ((where, record) for chunk in source.chunks() for where, _, record in source.read(chunk))


def is_json_file(name: str) -> bool:
    """Whether a source is a JSON file, there or missing, rather than a dataset."""
    return Path(name).is_file() or name.endswith(SUFFIXES)


@contextmanager
def loaded_dataset(
    name: str, split: str | None = None, config: str | None = None, cache_parent: str | Path | None = None
) -> Iterator["Dataset | DatasetDict"]:
    """
    A dataset of the Hub or of a local directory, for the length of the block.

    A local directory gets a cache of its own, since the shared cache may hold the rows of another directory of the same name.

    Args:
        name (`str`):
            Hub id or directory.
        split (`str`, *optional*):
            Split to load. Defaults to all splits, as a `DatasetDict`.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub.
        cache_parent (`str` or `Path`, *optional*):
            Directory in which to make the cache of a local directory. Defaults to the directory of temporary files.
    """
    from datasets import load_dataset

    with tempfile.TemporaryDirectory(dir=cache_parent) as cache:
        try:
            dataset = load_dataset(name, config, split=split, cache_dir=cache if Path(name).is_dir() else None)
        except ValueError as error:  # names the splits or configurations that there are, and no place
            raise ValueError(f"{name}: {error}") from error
        yield dataset


def parse_columns(columns: Mapping[str, str] | Sequence[str] | None) -> dict[str, str]:
    """
    Return the new names of columns, given as a dictionary or as words such as `answer=reward_model.ground_truth`.

    Raises:
        `ValueError`: If a word has no `=`, or a name is given twice.
    """
    if isinstance(columns, Mapping):
        return dict(columns)
    if columns is None:
        return {}
    words = columns if isinstance(columns, list | tuple) else [columns]
    columns = {}
    for word in words:
        name, equals, column = str(word).partition("=")
        if not (name and equals and column):
            raise ValueError(f"--columns: found {word!r}, expected NAME=COLUMN, such as problem=Question.")
        if name in columns:
            raise ValueError(f"--columns: {name} is given twice, as {columns[name]} and {column}. Give it once.")
        columns[name] = column
    return columns


def rename_columns(record: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """
    A record with new names for some of its columns.

    Args:
        record (`dict[str, Any]`):
            The record.
        columns (`Mapping[str, str]`):
            For each new name the column. Dots lead into nested values: `reward_model.ground_truth`, `messages.0.content`. A
            column that the record lacks stays missing under its new name, whatever else had that name.

    Example:

    ```python
    >>> rename_columns({"Question": "1+1?", "info": {"gold": "2"}}, {"problem": "Question", "answer": "info.gold"})
    {'info': {'gold': '2'}, 'problem': '1+1?', 'answer': '2'}
    ```
    """
    if not columns:
        return record
    values = {name: _lookup(record, column) for name, column in columns.items()}
    gone = {*columns, *columns.values()}
    kept = {name: value for name, value in record.items() if name not in gone}
    return kept | {name: value for name, value in values.items() if value is not _NOTHING}


def check_columns(record: dict[str, Any], columns: Mapping[str, str], where: str) -> None:
    """Raise `ValueError` if a record lacks columns that are to get new names."""
    missing = [column for column in columns.values() if _lookup(record, column) is _NOTHING]
    if missing:
        raise ValueError(
            f"{where}: found no column {', '.join(missing)}, which --columns names. The row has {', '.join(_paths(record))}."
        )


def _lookup(value: Any, path: str) -> Any:
    if isinstance(value, dict) and path in value:
        return value[path]
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _NOTHING
    return value


def _paths(record: dict[str, Any]) -> list[str]:
    """Names of the columns, and of those in nested objects."""
    paths = []
    for name, value in record.items():
        paths += [f"{name}.{inner}" for inner in _paths(value)] if isinstance(value, dict) and value else [name]
    return paths


def _form(file: str) -> tuple[bool, bool]:
    """Whether a file is compressed with gzip, and whether it holds an array."""
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
            f"{file}: the file is not in UTF-8 but, by its first bytes, in UTF-16 or UTF-32. Convert it, for example with "
            "`iconv -f utf-16 -t utf-8`."
        )
    return is_compressed, head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _open_bytes(file: str, is_compressed: bool) -> BinaryIO:
    return gzip.open(file, "rb") if is_compressed else open(file, "rb")


def _damaged(file: str, error: Exception) -> ValueError:
    return ValueError(f"{file}: the gzip file cannot be decompressed ({error}). It may be truncated: fetch it again.")


def _write_lines(file: str, is_compressed: bool, is_array: bool, path: str) -> None:
    """Write the rows of a compressed file or of an array as plain JSON Lines."""
    with _open_bytes(file, is_compressed) as data, open(path, "wb") as lines:
        try:
            if is_array:
                for value in _elements(io.TextIOWrapper(data, encoding="utf-8-sig"), file):
                    lines.write(json.dumps(value).encode() + b"\n")
            else:
                shutil.copyfileobj(data, lines)
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: {_not_utf8(error)}") from error
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise _damaged(file, error) from error


def _elements(text: TextIO, file: str) -> Iterator[Any]:
    """The elements of a JSON array. Of a long one, a block at a time is in memory."""
    decode = json.JSONDecoder().raw_decode
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
                    f"{file}: the file ends before its JSON array does, after {row} rows. It may be truncated: fetch it again."
                )
        elif buffer[place] == "]" and not (row and is_separated):
            if (buffer[place + 1 :] + text.read()).strip():
                raise ValueError(
                    f"{file}: found more after the end of the JSON array, expected one array. Remove the rest."
                )
            return
        elif not is_separated:
            if buffer[place] != ",":
                raise ValueError(
                    f"{file}, row {row}: not valid JSON: found {buffer[place : place + 20]!r} after the row before it, expected a "
                    "comma or the end of the array."
                )
            place, is_separated = place + 1, True
        else:
            try:
                value, place = decode(buffer, place)
            except json.JSONDecodeError as error:
                # the row may continue in the next block; reading twice as much each time keeps this linear
                more = text.read(max(ARRAY_BLOCK, len(buffer)))
                if not more:
                    remedy = _remedy(buffer, error, ends=True)
                    raise ValueError(f"{file}, row {row}: not valid JSON ({error.msg}). {remedy}") from error
                buffer, place = buffer[place:] + more, 0
                continue
            yield value
            row, is_separated = row + 1, False


def _parse_line(text: bytes, where: str) -> dict[str, Any]:
    try:
        line = text.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {_not_utf8(error)}") from error
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        remedy = _remedy(line, error, ends=not text.endswith(b"\n"))
        raise ValueError(f"{where}: the line is not valid JSON ({error}). {remedy}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a JSON {type(value).__name__}, expected an object for each row.")
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: a string holds half of a surrogate pair ({error}), which no UTF-8 text can hold. "
                "Remove the escape."
            ) from error
    return value


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"the text is not in UTF-8 ({error}). Convert the file, for example with `iconv -f latin1 -t utf-8` if it is in Latin-1."


def _remedy(text: str, error: json.JSONDecodeError, ends: bool) -> str:
    """What to do about text that is not JSON. `ends` says that the file ends with it."""
    if _PYTHON.match(text, error.pos):
        return "This is how Python prints values, not JSON. Write the rows with `json.dumps`."
    if error.msg.startswith("Extra data"):
        return "Expected one JSON object per line and nothing after it. Put each object on a line of its own."
    if error.msg.startswith("Unterminated string") or not text[error.pos :].strip():
        if ends:
            return "The file ends within this row. It may be truncated: fetch it again, or remove the row."
        return (
            "The row continues on the next lines, and JSON Lines have one object per line. Rewrite the file with `jq -c . FILE`, "
            "or, if the rows are in a list under a key such as `data`, with `jq -c '.data[]' FILE`."
        )
    return "Expected one JSON object per line. Correct the row, or remove it."


def _refuse_wrapped(record: dict[str, Any], is_only: bool, where: str) -> None:
    """Refuse a file whose rows are in a list under one key of its only object."""
    for name in _WRAPPERS:
        inner = record.get(name)
        if is_only and isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            raise ValueError(
                f"{where}: the file holds one object, with a list of {len(inner)} objects under `{name}`; expected one row per line, "
                f"or an array of rows. If these are the rows, extract them with `jq -c '.{name}[]' FILE`."
            )
