"""Atomic file writes, JSON Lines files that survive a killed process, and comparison of saved settings."""

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
    Context manager that writes a file atomically. The file replaces `path` at the end of the block, and is discarded
    after an error.

    Args:
        path (`str` or `Path`):
            File to create or replace, in an existing folder.
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
    List the differences between the saved settings of a folder and new settings.

    Args:
        found (`dict[str, Any]`):
            JSON object with the saved settings.
        asked (`dict[str, Any]`):
            JSON object with the new settings.
        ignored (`Collection[str]`, *optional*):
            Names of settings that may differ.

    Returns:
        `list[str]`: Name and both values of each setting that differs, for an error message.

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
    """Write a value as JSON. The file is written atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


class AppendedLines:
    """
    A JSON Lines file opened for appending, by one process at a time.

    Lines are written without a buffer, so a killed process loses at most the line that it was writing. An incomplete
    last line is removed when the file is opened again.

    The lock is a hidden file next to it, which [`AppendedLines.close`] removes. A killed process leaves the lock file
    behind, but unlocked.

    Args:
        path (`str` or `Path`):
            File to open. It is created if it does not exist.

    Attributes:
        size (`int`):
            Size of the file in bytes. The file always ends with a complete line.
        torn (`int`):
            Number of bytes that were removed when the file was opened.

    Raises:
        `BlockingIOError`: If another process has opened the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise BlockingIOError(
                errno.EAGAIN,
                f"{self.path}: another process is writing to this file. Wait for it or stop it, or use another shard or another "
                "--output_dir",
            ) from error
        self._file = open(self.path, "ab", buffering=0)
        self.size = _end_of_last_line(self.path)
        self.torn = os.path.getsize(self.path) - self.size
        if self.torn:
            self._file.truncate(self.size)

    def append(self, value: Any) -> bytes:
        """
        Append a value as one line, and return the line.

        Raises:
            `OSError`: If the line cannot be written, for example because the disk is full. Nothing of the line is
            kept.
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
                f"{self.path}: a line could not be written ({error.strerror}). All earlier lines are complete. Free some disk "
                "space and run the same command again to resume",
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
    """Return the number of bytes up to the last line break, searching backwards."""
    with open(path, "rb") as file:
        start, found = file.seek(0, os.SEEK_END), -1
        while start and found < 0:
            end, start = start, max(0, start - block)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
        return start + found + 1
