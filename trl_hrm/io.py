"""Files that are written as a whole or not at all, files of JSON lines that survive a kill, and settings of folders."""

import errno
import json
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout


@contextmanager
def replacing(path: str | Path, mode: str = "w") -> Iterator[IO]:
    """
    A file to write that takes the place of `path` at the end of the block. After an error nothing is left of it.

    Args:
        path (`str` or `Path`):
            File to make or to replace. Its folder exists.
        mode (`str`, *optional*, defaults to `"w"`):
            `"w"` for text in UTF-8, `"wb"` for bytes.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def changed_settings(found: dict[str, Any], asked: dict[str, Any], ignored: Collection[str] = ()) -> list[str]:
    """
    Compare the settings that a folder was started with and the settings that are asked for.

    Args:
        found (`dict[str, Any]`):
            JSON object with the settings of the folder.
        asked (`dict[str, Any]`):
            JSON object with the settings that are asked for.
        ignored (`Collection[str]`, *optional*):
            Names that may differ.

    Returns:
        `list[str]`: For each setting that differs its name and both values, for an error message.

    Example:

    ```python
    >>> changed_settings({"n": 4, "search": {"max_depth": 8}}, {"n": 4, "search": {"max_depth": 9}})
    ['search.max_depth was 8 and is 9']
    ```
    """
    changed = []
    for name in sorted((found.keys() | asked.keys()) - set(ignored)):
        before, now = found.get(name), asked.get(name)
        inner = [{} if value is None else value for value in (before, now)]
        if before != now and all(isinstance(value, dict) for value in inner):
            changed += [f"{name}.{setting}" for setting in changed_settings(*inner)]
        elif before != now:
            was, is_now = (json.dumps(value, ensure_ascii=False) for value in (before, now))
            was, is_now = (text if len(text) <= 80 else text[:77] + "..." for text in (was, is_now))
            changed.append(f"{name} was {was} and is {is_now}")
    return changed


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON, to a file that is there whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class AppendedLines:
    """
    A file of JSON lines that is open for appending, by one process at a time.

    Lines are written without a buffer, so that a killed process loses at most the line that it was writing. Such a torn line
    is dropped when the file is opened again.

    The lock is a hidden file next to it, which is removed on [`AppendedLines.close`]. A process that is killed leaves it
    behind, unlocked.

    Args:
        path (`str` or `Path`):
            The file. It is created if it does not exist.

    Attributes:
        size (`int`):
            Number of bytes of the file, which ends with a whole line.
        torn (`int`):
            Number of bytes that were dropped when the file was opened.

    Raises:
        `BlockingIOError`: If another process has the file open.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                errno.EAGAIN,
                f"{self.path}: another process writes to this file. Wait for it or stop it, or use another shard or another "
                "--output_dir",
            ) from error
        self._file = open(self.path, "ab", buffering=0)
        self.size = _end_of_last_line(self.path)
        self.torn = os.path.getsize(self.path) - self.size
        if self.torn:
            self._file.truncate(self.size)

    def append(self, value: Any) -> bytes:
        """
        Write a value as one line, and return the line.

        Raises:
            `OSError`: If it cannot be written, for example because the disk is full. The file then ends with the line before.
        """
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self.size)
            raise OSError(
                error.errno,
                f"{self.path}: a line could not be written ({error.strerror}). All lines before it are complete. Free some "
                "space and start the same command again to resume",
            ) from error
        self.size += len(line)
        return line

    def clear(self) -> None:
        """Remove all lines."""
        self._file.truncate(0)
        self.size = 0

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._file.closed:
            return
        self._file.close()
        with suppress(OSError):  # Windows cannot remove a file that is open
            os.unlink(self._lock.lock_file)
        self._lock.release()

    def __enter__(self) -> "AppendedLines":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _end_of_last_line(path: Path, block: int = 1 << 16) -> int:
    """Number of bytes up to the last line break, found from the end of the file."""
    with open(path, "rb") as file:
        start, found = file.seek(0, os.SEEK_END), -1
        while start and found < 0:
            end, start = start, max(0, start - block)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
        return start + found + 1
