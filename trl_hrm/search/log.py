"""Event log of a search, as JSON Lines with one event per line. All trees can be rebuilt from it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from ..io import AppendedLines, parse_json, shown
from ..schema import check_json
from .open_tree import EVENTS, OpenTree
from .tree import Problem, Status


REMEDY = "Remove all lines of this problem. It will be searched again."
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
        `ValueError`: If a line other than the last one is not an event, or contradicts earlier events. The message names file and
            line. The rest of each event is checked by [`EventLog.read`].
    """

    def __init__(self, path: str | Path, write: bool = False):
        self.path = Path(path)
        self.problems: dict[str, ProblemEvents] = {}
        self.size = 0
        self._lines = AppendedLines(self.path) if write else None
        self.torn = self._lines.torn if self._lines else 0
        try:
            with open(self.path, "rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        self._enter(line)
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
        """
        Rebuild the tree of a problem from its events.

        Raises:
            `ValueError`: If an event is damaged or contradicts earlier events. The message names file and line.
        """
        opened = None
        for offset, event in self._events(problem_id):
            try:
                if opened is None:
                    opened = OpenTree.from_event(event)
                else:
                    opened.apply(event)
            except ValueError as error:
                raise self._damaged(offset, problem_id, error) from None
        return opened

    def problem(self, problem_id: str) -> Problem:
        """Return a problem as recorded in the log."""
        _, event = next(self._events(problem_id))
        return Problem(problem_id, event["prompt"], event["answer"], event.get("prefix", ""))

    def lines(self, problem_id: str, reopened: bool = False) -> list[bytes]:
        """
        Return the events of a problem that has ended as lines of the log, without failed requests.

        Args:
            problem_id (`str`):
                Id of the problem.
            reopened (`bool`, *optional*, defaults to `False`):
                Whether to leave out the event that closed the problem, so that its search can continue.
        """
        found, closed = [], b""
        with open(self.path, "rb") as file:
            for offset in self.problems[problem_id].offsets:
                file.seek(offset)
                line = file.readline()
                name = _HEAD.match(line)[1]
                if name == b"close":
                    closed = line
                elif name != b"error":
                    found.append(line)
        return found if reopened else [*found, closed]

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _events(self, problem_id: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the byte offset and the value of each event of a problem."""
        with open(self.path, "rb") as file:
            for offset in self.problems[problem_id].offsets:
                file.seek(offset)
                try:
                    event = parse_json(file.readline(), "the event")
                    check_json(event, EVENTS[event["event"]], "the event")
                except ValueError as error:
                    raise self._damaged(offset, problem_id, error) from None
                yield offset, event

    def _damaged(self, offset: int, problem_id: str, error: ValueError | str) -> ValueError:
        """Return an error about the event at a byte offset."""
        return ValueError(f"{self._line(offset)}: problem {shown(problem_id)}: {error} {REMEDY}")

    def _line(self, offset: int) -> str:
        """Return the file and the number of the line at a byte offset."""
        number = 1
        with open(self.path, "rb") as file:
            while block := file.read(min(offset, 1 << 20)):
                number, offset = number + block.count(b"\n"), offset - len(block)
        return f"{self.path}:{number}"

    def _enter(self, line: bytes) -> None:
        """Record the offset of an event, and the facts about its problem at the start of the line."""
        head = _HEAD.match(line)
        name = head[1].decode() if head else None
        if name not in EVENTS:
            raise ValueError(
                f"{self._line(self.size)}: found {shown(line)}, expected an event of a search. Remove this line and all lines of "
                "the same problem. It will be searched again."
            )
        try:
            problem_id = parse_json(head[2], "the event")
            third = None if head[3] is None else parse_json(head[3], "the event")
        except ValueError as error:
            raise self._damaged(self.size, head[2].decode(errors="replace"), error) from None
        problem = self.problems.get(problem_id)
        if name == "problem":
            if problem is not None:
                raise self._damaged(self.size, problem_id, "the problem begins twice.")
            if type(third) is not int:
                raise self._damaged(self.size, problem_id, f"its position is {shown(third)}, expected a whole number.")
            problem = self.problems[problem_id] = ProblemEvents(position=third)
        elif problem is None:
            raise self._damaged(self.size, problem_id, f"the first event of problem {shown(problem_id)} is missing.")
        elif problem.status not in ("open", "error"):
            raise self._damaged(self.size, problem_id, f"an event follows the end of the search ({problem.status}).")
        if name == "close":
            if third not in get_args(Status):
                raise self._damaged(
                    self.size,
                    problem_id,
                    f"its status is {shown(third)}, expected one of {', '.join(get_args(Status))}.",
                )
            problem.status = third
        problem.num_errors += name == "error"
        problem.offsets.append(self.size)
        self.size += len(line)
