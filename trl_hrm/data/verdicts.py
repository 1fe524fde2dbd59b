"""Verdicts of a judge on solutions: which step is the first wrong one, by several votes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ..intervals import wilson_interval
from ..io import read_json_lines
from ..schema import Share, check_json


NO_ERROR = -1  # a vote that finds no wrong step, as in ProcessBench
JUDGES = "judges"  # folder in a run, with one folder per judge
VERDICTS = "verdicts.jsonl"
REMEDY = "Run `trl-hrm judge` again to write it."


class VerdictRow(TypedDict):
    """Line of `verdicts.jsonl`: a solution in TRL's stepwise format, with the votes of the judge."""

    prompt: str
    completions: list[str]
    labels: list[Share | None]
    problem_id: str
    node_ids: list[str]
    judge_votes: list[int | None]


@dataclass(frozen=True)
class Verdict:
    """
    Votes of a judge on a solution.

    Args:
        problem_id (`str`):
            Id of the problem.
        node_ids (`tuple[str, ...]`):
            Ids of the S steps, as in the column `node_ids` of an export.
        votes (`tuple[int | None, ...]`):
            Index of the first wrong step for each vote, from 0, `-1` (`NO_ERROR`) if all steps are right, and `None` if the response
            of the judge was unreadable.
    """

    problem_id: str
    node_ids: tuple[str, ...]
    votes: tuple[int | None, ...]

    @property
    def readable(self) -> tuple[int, ...]:
        """The readable votes."""
        return tuple(vote for vote in self.votes if vote is not None)

    @property
    def most_frequent(self) -> tuple[int, ...]:
        """The most frequent readable vote, or several if they are equally frequent."""
        counts = Counter(self.readable)
        return tuple(sorted(vote for vote, count in counts.items() if count == max(counts.values())))

    @property
    def first_error(self) -> int | None:
        """The most frequent vote. `None` if no vote is readable, or several are the most frequent."""
        return self.most_frequent[0] if len(self.most_frequent) == 1 else None

    def agreement(self, first_error: int) -> float | None:
        """Return the share of the readable votes that name this first wrong step, or `None` if no vote is readable."""
        return self.readable.count(first_error) / len(self.readable) if self.readable else None

    def labels(self) -> list[float | None]:
        """
        Return the label of each step: of the readable votes without an error before the step, the share without an error in it.

        A label is `None` if no vote reaches the step, and after the first error of the verdict, since a judge that stops there says
        nothing about later steps. If several votes are the most frequent, the earliest wrong step among them counts as the first error.
        """
        votes = self.readable
        last = min((vote for vote in self.most_frequent if vote != NO_ERROR), default=len(self.node_ids) - 1)
        labels: list[float | None] = []
        for step in range(len(self.node_ids)):
            reached = [vote for vote in votes if vote == NO_ERROR or vote >= step]
            share = sum(vote != step for vote in reached) / len(reached) if reached and step <= last else None
            labels.append(share)
        return labels

    def columns(self) -> dict[str, Any]:
        """Return the columns of `verdicts.jsonl` with the votes, their most frequent value, and its 95 % interval."""
        first, votes = self.first_error, self.readable
        agreed = None if first is None else votes.count(first)
        low, high = (None, None) if agreed is None else wilson_interval(agreed, len(votes))
        return {
            "problem_id": self.problem_id,
            "node_ids": list(self.node_ids),
            "judge_votes": list(self.votes),
            "judge_first_error": first,
            "judge_agreement": None if first is None else self.agreement(first),
            "judge_low": low,
            "judge_high": high,
        }


def read_verdicts(run: str | Path, name: str = "judge") -> Iterator[Verdict]:
    """
    Read the verdicts that `trl-hrm judge` added to a run.

    Args:
        run (`str` or `Path`):
            Folder of the run.
        name (`str`, *optional*, defaults to `"judge"`):
            Name of the judge.

    Raises:
        `FileNotFoundError`: If this judge has not judged the run.
        `ValueError`: If the file is damaged. The message has the file and line.
    """
    path = Path(run, JUDGES, name, VERDICTS)
    if not path.is_file():
        named = "" if name == "judge" else f" --name {name}"
        raise FileNotFoundError(
            f"{path} does not exist. Run `trl-hrm judge {run}{named}` to the end, with all of its shards."
        )
    for where, row in read_json_lines(path, REMEDY):
        yield _verdict(row, where)


def _verdict(row: Any, where: str) -> Verdict:
    check_json(row, VerdictRow, where, REMEDY, more=True)
    steps = len(row["node_ids"])
    wrong = [vote for vote in row["judge_votes"] if vote is not None and not NO_ERROR <= vote < steps]
    if wrong or not steps:
        raise ValueError(f"{where}: found the vote {wrong[0] if wrong else None} for {steps} steps. {REMEDY}")
    return Verdict(row["problem_id"], tuple(row["node_ids"]), tuple(row["judge_votes"]))
