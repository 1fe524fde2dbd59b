"""The event log of a search: append-only JSON lines, flushed per event, from which every tree is rebuilt."""

import fcntl
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .open_tree import OpenTree
from .tree import Problem


_HEAD = re.compile(rb'\{"event": "(\w+)", "problem_id": ("(?:[^"\\]|\\.)*")(?:, "(?:status|position)": ("\w+"|\d+))?')


@dataclass
class ProblemEvents:
    """Where the events of a problem stand in the log, its place among the problems, and how it ended, if it did."""

    position: int
    status: str = "open"
    offsets: list[int] = field(default_factory=list)
    num_errors: int = 0


class EventLog:
    """
    A log of one shard of a search.

    A line that a kill left without its end is dropped when the log is opened for writing; `torn` tells how many bytes that
    were. Only where each event stands is kept in memory.

    Args:
        path (`str` or `Path`):
            File of the log. It is made if it does not exist.
        write (`bool`, *optional*, defaults to `False`):
            Open for writing. One process at a time may do that.

    Raises:
        `FileNotFoundError`: If the log is to be read and does not exist.
        `BlockingIOError`: If another process writes to it.
        `ValueError`: If a line that is not the last one is damaged, with file and line.
    """

    def __init__(self, path: str | Path, write: bool = False):
        self.path = Path(path)
        self.problems: dict[str, ProblemEvents] = {}
        self.torn = 0
        self._file = open(self.path, "ab" if write else "rb", buffering=0)  # no event waits in a buffer
        if write:
            self._lock()
        self._scan()
        if write and self.torn:
            self._file.truncate(self._end)

    def append(self, event: dict[str, Any]) -> None:
        """
        Write one event, whose first keys are `event` and `problem_id` and, of a problem, `position`, of its end, `status`.

        Raises:
            `OSError`: If it cannot be written, as on a full disk. The log then ends with the event before it.
        """
        line = json.dumps(event, ensure_ascii=False).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._end)
            raise OSError(
                error.errno,
                f"{self.path}: an event could not be written ({error.strerror}). What was written before it is whole; make "
                "room and start again with the same command to go on",
            ) from error
        self._enter(line, self._end)
        self._end += len(line)

    def read(self, problem_id: str) -> OpenTree:
        """The tree of a problem as far as the log tells it."""
        events = self._events(problem_id)
        opened = OpenTree.from_event(next(events))
        for event in events:
            try:
                opened.apply(event)
            except KeyError as error:
                raise ValueError(
                    f"{self.path}: an event of problem {problem_id!r} refers to {error}, which no event before it made. "
                    "Remove all lines of this problem; it will be searched again."
                ) from error
        return opened

    def problem(self, problem_id: str) -> Problem:
        """A problem as it was when its search began."""
        return OpenTree.from_event(next(self._events(problem_id))).tree.problem

    @property
    def size(self) -> int:
        """Bytes of the whole events in the log."""
        return self._end

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _events(self, problem_id: str) -> Iterator[dict[str, Any]]:
        with open(self.path, "rb") as file:
            for offset in self.problems[problem_id].offsets:
                file.seek(offset)
                line = file.readline()
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{self.path}, byte {offset}: a damaged event of problem {problem_id!r} ({error}). Remove the "
                        "events of this problem from the log; it will be searched again."
                    ) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno,
                f"{self.path}: another process writes to this log. Wait for it or stop it, or give each process a shard of "
                "its own",
            ) from error

    def _scan(self) -> None:
        self._end = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    self.torn = len(line)
                    return
                self._enter(line, self._end, number)
                self._end += len(line)

    def _enter(self, line: bytes, offset: int, number: int | None = None) -> None:
        head = _HEAD.match(line)
        if head is None:
            raise ValueError(
                f"{self.path}, line {number}: found {line[:60]!r}, expected an event of a search. The log is damaged. Remove "
                "the line and all lines of the same problem, which will be searched again, or start in another folder."
            )
        name, problem_id, third = head[1], json.loads(head[2]), head[3]
        if name == b"problem":
            self.problems[problem_id] = ProblemEvents(position=int(third))
        if problem_id not in self.problems:
            raise ValueError(
                f"{self.path}, line {number}: an event of problem {problem_id!r}, whose first event is missing. Remove all "
                "lines of this problem; it will be searched again."
            )
        problem = self.problems[problem_id]
        problem.offsets.append(offset)
        if name == b"error":
            problem.num_errors += 1
        if name == b"close":
            problem.status = json.loads(third)


def shard_name(kind: str, shard: int, num_shards: int, suffix: str) -> str:
    """Name of a shard's file, as in `log-00002-of-00016.jsonl`."""
    return f"{kind}-{shard:05d}-of-{num_shards:05d}.{suffix}"
