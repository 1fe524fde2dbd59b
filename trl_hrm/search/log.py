"""The event log of a search: JSON lines, one per event. All trees can be rebuilt from it."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..io import AppendedLines
from .open_tree import OpenTree
from .tree import Problem


_HEAD = re.compile(rb'\{"event": "(\w+)", "problem_id": ("(?:[^"\\]|\\.)*")(?:, "(?:status|position)": ("\w+"|\d+))?')


@dataclass
class ProblemEvents:
    """Positions of the events of a problem in the log, its place among the problems, and its status."""

    position: int
    status: str = "open"
    offsets: list[int] = field(default_factory=list)
    num_errors: int = 0


class EventLog:
    """
    A log of one shard of a search. Only the positions of the events are kept in memory.

    Args:
        path (`str` or `Path`):
            File of the log. It is created if it does not exist.
        write (`bool`, *optional*, defaults to `False`):
            Whether to open the log for writing. Only one process at a time can do that. A line that a kill left without its
            end is then dropped.

    Attributes:
        torn (`int`):
            Number of bytes of a line that a kill left without its end.
        size (`int`):
            Number of bytes of the complete events.

    Raises:
        `FileNotFoundError`: If the log is opened for reading and does not exist.
        `BlockingIOError`: If another process writes to it.
        `ValueError`: If a line other than the last one is damaged, with file and line.
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
                The event. Its first keys are `event` and `problem_id`. The third one is `position` for `"problem"` and `status`
                for `"close"`.

        Raises:
            `OSError`: If it cannot be written, for example because the disk is full. The log then ends with the event before.
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
                    f"{self.path}: an event of problem {problem_id!r} refers to {error}, which no event before it made. "
                    "Remove all lines of this problem; it will be searched again."
                ) from error
        return opened

    def problem(self, problem_id: str) -> Problem:
        """Return a problem as the log has it."""
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
                        f"{self.path}, byte {offset}: a damaged event of problem {problem_id!r} ({error}). Remove the "
                        "events of this problem from the log; it will be searched again."
                    ) from error

    def _enter(self, line: bytes, number: int | None = None) -> None:
        """Note where an event is, and what the start of its line tells about the problem."""
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
        problem.offsets.append(self.size)
        self.size += len(line)
        if name == b"error":
            problem.num_errors += 1
        if name == b"close":
            problem.status = json.loads(third)
