"""Where records come from: JSON Lines files or a dataset, cut into chunks that processes read on their own."""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from datasets import Dataset


CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 1000


class Address(NamedTuple):
    """Where a record starts: file number, byte offset and line, or, for a dataset, 0, row and row."""

    file: int
    start: int
    line: int


class JsonLines:
    """
    JSON Lines files, read a chunk of whole lines at a time.

    Lines end with `\\n` or `\\r\\n` alone: JSON strings may hold other line separators, such as U+2028. Blank lines are
    skipped but counted, so that line numbers are those of an editor.

    Args:
        files (`Sequence[str]`):
            Paths of the files.

    Raises:
        `FileNotFoundError`: If a path is not a file.
    """

    def __init__(self, files: Sequence[str]):
        self.files = [str(file) for file in files]
        for file in self.files:
            if not Path(file).is_file():
                raise FileNotFoundError(f"{file}: there is no such file; expected the path of a JSON Lines file.")

    def chunks(self) -> list[dict[str, int]]:
        """One dict per chunk of about 4 MB: `file` number, first byte `start`, end `stop`, number of the first `line`."""
        chunks = []
        for number, file in enumerate(self.files):
            with open(file, "rb") as lines:
                start, line = 0, 1
                while block := lines.read(CHUNK_BYTES):
                    block += lines.readline()
                    chunks.append({"file": number, "start": start, "stop": start + len(block), "line": line})
                    start += len(block)
                    line += block.count(b"\n")
        return chunks

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each record of the chunk, `where` being `file:line`."""
        file, start, line = chunk["file"], chunk["start"], chunk["line"]
        with open(self.files[file], "rb") as lines:
            lines.seek(start)
            while start < chunk["stop"]:
                text = lines.readline()
                if text.strip():
                    where = f"{self.files[file]}:{line}"
                    yield where, Address(file, start, line), _parse_line(text, where)
                start += len(text)
                line += 1

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for records at the given addresses, in that order."""
        with ExitStack() as stack:
            handles = [stack.enter_context(open(file, "rb")) for file in self.files]
            for file, start, line in addresses:
                handles[file].seek(start)
                where = f"{self.files[file]}:{line}"
                yield where, _parse_line(handles[file].readline(), where)


class DatasetRows:
    """
    The rows of a dataset, with the methods of [`JsonLines`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset to read.
    """

    def __init__(self, dataset: "Dataset"):
        self.dataset = dataset.with_format(None)

    def types(self) -> dict[str, Any]:
        """Arrow types of the columns beyond those of a step tree."""
        columns = ("prompt", "completions", "labels", "parents", "num_merged")
        return {field.name: field.type for field in self.dataset.features.arrow_schema if field.name not in columns}

    def chunks(self) -> list[dict[str, int]]:
        """One dict per 1000 rows: first row `start`, end `stop`."""
        rows = len(self.dataset)
        return [{"start": start, "stop": min(start + CHUNK_ROWS, rows)} for start in range(0, rows, CHUNK_ROWS)]

    def read(self, chunk: dict[str, int]) -> Iterator[tuple[str, Address, dict[str, Any]]]:
        """Yield `(where, address, record)` for each row of the chunk, `where` being `dataset row i`, from 0."""
        rows = range(chunk["start"], chunk["stop"])
        for row, value in zip(rows, self.dataset.select(rows), strict=True):
            yield f"dataset row {row}", Address(0, row, row), value

    def pick(self, addresses: Iterable[Address]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield `(where, record)` for rows at the given addresses, in that order."""
        for address in addresses:
            yield f"dataset row {address.line}", self.dataset[address.start]


def _parse_line(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text.removeprefix(codecs.BOM_UTF8).rstrip(b"\r\n").decode("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{where}: the line is not valid JSON ({error}); expected one complete JSON object per line, in UTF-8. "
            "The file may be truncated or damaged: fetch it again, or remove the line."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: found a JSON {type(value).__name__}, expected one JSON object per line.")
    if b"\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: a string holds half of a surrogate pair ({error}), which no UTF-8 text can hold. "
                "Remove the escape."
            ) from error
    return value
