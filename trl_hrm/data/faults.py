"""Faults of single rows: a row that cannot be used is left out, counted and named, and does not stop the rest."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


NUM_SHOWN = 5  # places in a line
# Records of other formats, by a key that they alone have, and the command that reads them
OTHER_FORMATS = {
    "reasoning_steps": "This is a tree of openr: use trl-hrm export FILE --format openr.",
    "finish_reason": "This is a record of PRM800K: use trl-hrm build-prm800k.",
    "final_answer_correct": "This is a row of ProcessBench: use trl-hrm benchmark --suite processbench.",
    "mistake_index": "This is a row of BIG-Bench Mistake: use trl-hrm benchmark --suite bigbenchmistake.",
    "modified_process": "This is a row of PRMBench: use trl-hrm benchmark --suite prmbench.",
    "model_output_steps": "This is a row of MR-GSM8K: use trl-hrm benchmark --suite processbench.",
    "candidates": "These are solutions without judged steps: use trl-hrm select-raft or trl-hrm best-of-n.",
}


class RowError(ValueError):
    """
    A fault of one row.

    Args:
        reason (`str`):
            Name of the fault in counts, such as `"no_answer"`.
        where (`str`):
            File and line of the row.
        message (`str`):
            What was found and what was expected.
    """

    def __init__(self, reason: str, where: str, message: str):
        super().__init__(reason, where, message)  # all three, so that other processes can hand it over
        self.reason = reason
        self.where = where
        self.message = message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass
class RowFaults:
    """
    Collects the faults of rows, so that all of them are reported at once.

    Args:
        strict (`bool`, *optional*, defaults to `False`):
            Raise the first fault instead.
        left_out (`dict[str, list[str]]`, *optional*):
            Places of the rows that were left out, by reason.
        kept (`dict[str, list[str]]`, *optional*):
            Places of the rows that were kept although they have a fault, by reason.
        first (`str`, *optional*):
            Message of the first fault.
    """

    strict: bool = False
    left_out: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    first: str | None = None

    def leave_out(self, fault: RowError) -> None:
        """Count a row that cannot be used. Raises the fault if `strict`."""
        self._add(self.left_out, fault)

    def keep(self, fault: RowError) -> None:
        """Count a row that is used as it is. Raises the fault if `strict`."""
        self._add(self.kept, fault)

    def _add(self, places: dict[str, list[str]], fault: RowError) -> None:
        if self.strict:
            raise fault
        self.first = self.first or str(fault)
        places.setdefault(fault.reason, []).append(fault.where)

    @property
    def num_left_out(self) -> int:
        """Number of rows that were left out."""
        return sum(map(len, self.left_out.values()))

    def warnings(self) -> list[str]:
        """One sentence per reason, with the first places."""
        return [
            format_places(reason, places, verb)
            for verb, faults in (("left out", self.left_out), ("kept as given", self.kept))
            for reason, places in faults.items()
        ]


def format_places(reason: str, places: list[str], verb: str = "left out", number: int | None = None) -> str:
    """
    How many rows have a fault, and where the first ones are.

    Example:

    ```python
    >>> format_places("no_answer", ["a.jsonl:3", "a.jsonl:9"])
    '2 rows left out (no answer): a.jsonl:3, a.jsonl:9'
    ```
    """
    number = len(places) if number is None else number
    more = f" and {number - NUM_SHOWN:,} more" if number > NUM_SHOWN else ""
    rows = "row" if number == 1 else "rows"
    return f"{number:,} {rows} {verb} ({reason.replace('_', ' ')}): {', '.join(places[:NUM_SHOWN])}{more}"


def other_command(record: Mapping[str, Any]) -> str:
    """A sentence that names the command for a record that was given to another one, empty if the format is not known."""
    label = record.get("label")
    keys = {*record, *(label if isinstance(label, Mapping) else ())}
    return next((remedy for key, remedy in OTHER_FORMATS.items() if key in keys), "")
