"""Handling of invalid rows: they are dropped, counted and reported, and do not stop the command."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


NUM_SHOWN = 5  # maximum number of locations in a message
# Keys that identify records of other formats, with the command that reads them
OTHER_FORMATS = {
    "reasoning_steps": "This is an openr tree: use trl-hrm export FILE --format openr.",
    "solution_prefix": "This is openr's flat file (math-aps), whose prefixes of solutions are not divided into steps. Use its file with "
    "the trees (math-aps-tree): trl-hrm export FILE --format openr.",
    "finish_reason": "This is a PRM800K record: use trl-hrm build-prm800k.",
    "final_answer_correct": "This is a ProcessBench row: use trl-hrm benchmark --suite processbench.",
    "mistake_index": "This is a BIG-Bench Mistake row: use trl-hrm benchmark --suite bigbenchmistake.",
    "modified_process": "This is a PRMBench row: use trl-hrm benchmark --suite prmbench.",
    "model_output_steps": "This is an MR-GSM8K row: use trl-hrm benchmark --suite processbench.",
    "candidates": "These are solutions without step labels: use trl-hrm select-raft or trl-hrm best-of-n.",
}


class RowError(ValueError):
    """
    Error raised for an invalid row.

    Args:
        reason (`str`):
            Short name of the error for the counts, such as `"no_answer"`.
        where (`str`):
            File and line of the row.
        message (`str`):
            Error message with what was found and what was expected.
    """

    def __init__(self, reason: str, where: str, message: str):
        super().__init__(reason, where, message)  # pickling between processes requires all arguments
        self.reason = reason
        self.where = where
        self.message = message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class RowFaults:
    """
    Collects the errors of invalid rows, to report all of them at once.

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Raise the first error instead of collecting errors.
        left_out (`dict[str, list[str]]`, *optional*):
            Locations of the dropped rows, by reason.
        kept (`dict[str, list[str]]`, *optional*):
            Locations of the rows that were kept although they have a fault, by reason.
        first (`str`, *optional*):
            Message of the first error.
    """

    strict: bool = False
    left_out: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    first: str | None = None

    def leave_out(self, fault: RowError) -> None:
        """Count a dropped row. Raises the error if `strict`."""
        self._add(self.left_out, fault)

    def keep(self, fault: RowError) -> None:
        """Count a row that is kept although it has a fault. Raises the error if `strict`."""
        self._add(self.kept, fault)

    def _add(self, places: dict[str, list[str]], fault: RowError) -> None:
        if self.strict:
            raise fault
        self.first = self.first or str(fault)
        places.setdefault(fault.reason, []).append(fault.where)

    @property
    def num_left_out(self) -> int:
        """Number of dropped rows."""
        return sum(map(len, self.left_out.values()))

    def warnings(self) -> list[str]:
        """Return one line per reason, with the first locations."""
        return [
            format_places(reason, places, verb)
            for verb, faults in (("dropped", self.left_out), ("kept", self.kept))
            for reason, places in faults.items()
        ]


def format_places(reason: str, places: list[str], verb: str = "dropped", number: int | None = None) -> str:
    """
    Return a line with the number of affected rows and the first locations.

    Example:

    ```python
    >>> format_places("no_answer", ["a.jsonl:3", "a.jsonl:9"])
    '2 rows dropped (no answer): a.jsonl:3, a.jsonl:9'
    ```
    """
    number = len(places) if number is None else number
    more = f" and {number - NUM_SHOWN:,} more" if number > NUM_SHOWN else ""
    rows = "row" if number == 1 else "rows"
    return f"{number:,} {rows} {verb} ({reason.replace('_', ' ')}): {', '.join(places[:NUM_SHOWN])}{more}"


def other_command(record: Mapping[str, Any]) -> str:
    """Return a hint with the command that reads the format of `record`, or an empty string if the format is unknown."""
    label, steps = record.get("label"), record.get("reasoning_steps")
    keys = {*record, *(label if isinstance(label, Mapping) else ())}
    if isinstance(steps, list):  # not a tree, but prefixes, or the user's own steps
        keys -= {"reasoning_steps"}
        keys |= {key for step in steps[:1] if isinstance(step, Mapping) for key in step}
    return next((remedy for key, remedy in OTHER_FORMATS.items() if key in keys), "")
