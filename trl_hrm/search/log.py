"""Event log of a search, as JSON Lines with one event per line. All trees can be rebuilt from it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io import AppendedLines, shown
from .open_tree import OpenTree
from .tree import Problem


_HEAD = re.compile(rb'\{"event": "(\w+)", "problem_id": ("(?:[^"\\]|\\.)*")(?:, "(?:status|position)": ("\w+"|\d+))?')


@dataclass
class ProblemEvents:
    """Position of a problem among all problems, its status, and the byte offsets of its events in the log."""

    position: int
    status: str = "open"
    offsets: list[int] = field(default_factory=list)
    num_errors: int = 0


class EventLog:
    """
    Log of one shard of a search. Only the byte offsets of the events are kept in memory.

    Args:
        path (`str` or `Path`):
            Path of the log file. For writing, it is created if it does not exist.
        write (`bool`, *optional*, defaults to `False`):
            Whether to open the log for writing. Only one process can write at a time. An incomplete last line, left by a killed
            process, is then removed.

    Attributes:
        torn (`int`):
            Number of bytes in an incomplete last line.
        size (`int`):
            Number of bytes of the complete events.

    Raises:
        `FileNotFoundError`: If the log is opened for reading and does not exist.
        `BlockingIOError`: If another process is writing to the log.
        `ValueError`: If a line other than the last one is damaged. The message names file and line.
    """

    def __init__(self, path: str | Path, write: bool = False):
        self.path = Path(path)
        self.problems: dict[str, ProblemEvents] = {}
        self.size = 0
        self._lines = AppendedLines(self.path) if write else None
        self.torn = self._lines.torn if self._lines else 0
        try:
            with open(self.path, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.endswith(b"\n"):
                        self._enter(line, number)
                    else:
                        self.torn = len(line)
        except ValueError:
            self.close()
            raise

    def append(self, event: dict[str, Any]) -> None:
        """
        Write one event.

        Args:
            event (`dict[str, Any]`):
                Event to write. Its first keys must be `event` and `problem_id`. The third key must be `position` for a `"problem"`
                event and `status` for a `"close"` event.

        Raises:
            `OSError`: If the event cannot be written, for example because the disk is full. The log then ends with the previous
                event.
        """
        self._enter(self._lines.append(event))

    def read(self, problem_id: str) -> OpenTree:
        """Rebuild the tree of a problem from its events."""
        events = self._events(problem_id)
        opened = OpenTree.from_event(next(events))
        for event in events:
            try:
                opened.apply(event)
            except KeyError as error:
                raise ValueError(
                    f"{self.path}: an event of problem {shown(problem_id)} refers to {error}, but no earlier event created it. Remove "
                    "all lines of this problem. It will be searched again."
                ) from error
        return opened

    def problem(self, problem_id: str) -> Problem:
        """Return a problem as recorded in the log."""
        return OpenTree.from_event(next(self._events(problem_id))).tree.problem

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()

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
                        f"{self.path}, byte {offset}: the event of problem {shown(problem_id)} is damaged ({error}). Remove all lines "
                        "of this problem. It will be searched again."
                    ) from error

    def _enter(self, line: bytes, number: int | None = None) -> None:
        """Record the offset of an event, and the facts about its problem at the start of the line."""
        head = _HEAD.match(line)
        if head is None:
            raise ValueError(
                f"{self.path}, line {number}: the line starts with {line[:60]!r}, which is not an event of a search. The log is "
                "damaged. Remove this line and all lines of the same problem. The problem will be searched again. Or start in "
                "another folder."
            )
        name, problem_id, third = head[1], json.loads(head[2]), head[3]
        if name == b"problem":
            self.problems[problem_id] = ProblemEvents(position=int(third))
        if problem_id not in self.problems:
            raise ValueError(
                f"{self.path}, line {number}: the first event of problem {shown(problem_id)} is missing. Remove all lines of this "
                "problem. It will be searched again."
            )
        problem = self.problems[problem_id]
        problem.offsets.append(self.size)
        self.size += len(line)
        if name == b"error":
            problem.num_errors += 1
        if name == b"close":
            problem.status = json.loads(third)
