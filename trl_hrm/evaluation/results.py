"""The folder of results: the judged candidates, the numbers made of them, and, while it is being made, parts to go on from."""

import fcntl
import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..io import replacing, write_json
from ..search.log import shard_name
from .pool import PoolProblem, from_row, to_row


RESULTS = "results.json"
CANDIDATES = "candidates.jsonl"
_CANDIDATES = re.compile(r"candidates(-n\d+)?\.jsonl")


@dataclass(kw_only=True)
class Results:
    """
    What `results.json` holds.

    Args:
        strategy (`str`):
            How solutions were found: `"best_of_n"`, `"step_search"`, `"beam_search"` or `"diverse_tree_search"`.
        reward_model (`dict[str, Any]`):
            The reward model and how it was run.
        policy (`dict[str, Any]`, *optional*):
            The policy and how it was run. `None` for candidates of unknown origin.
        settings (`dict[str, Any]`):
            What else decides the numbers: aggregates, spans, extractors.
        versions (`dict[str, str]`):
            Versions of the packages that have a part in them.
        seed (`int`):
            Seed of samples and draws.
        date (`str`):
            When they were made, in UTC.
        num_problems (`int`):
            Number of problems that the curves are about.
        counts (`dict[str, int]`):
            What was left out or could not be judged, by reason.
        solutions (`dict[str, int]`):
            How the solutions end. See [`count_outcomes`]. Of a run read again, its candidates with the answers found here.
        warnings (`list[str]`):
            Warnings: most solutions are useless, references are unreadable.
        n (`list[int]`), curves, hacking_gap, calibration:
            See [`Curves`].
        intervals (`dict[str, Any]`):
            Confidence and methods of the intervals.
        cost (`dict[str, Any]`):
            Seconds, tokens and calls of the policy and of the scorer, and the seconds of the rest.
    """

    strategy: str
    reward_model: dict[str, Any]
    policy: dict[str, Any] | None
    settings: dict[str, Any]
    versions: dict[str, str]
    seed: int
    date: str
    num_problems: int
    counts: dict[str, int]
    n: list[int]
    curves: dict[str, list[dict[str, float]]]
    hacking_gap: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    solutions: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cost: dict[str, Any] = field(default_factory=dict)


def check_results(folder: Path, overwrite: bool) -> None:
    """Raise `FileExistsError` if the folder has results that may not be replaced."""
    if (folder / RESULTS).exists() and not overwrite:
        raise FileExistsError(
            f"{folder / RESULTS}: there are results already. Name another --output_dir, or pass --overwrite to replace them."
        )


def candidates_name(n: int) -> str:
    """The file of the candidates of a step search at one N."""
    return f"candidates-n{n}.jsonl"


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json`, which is there whole or not at all. Candidates that earlier results had beside those of these go."""
    names = [CANDIDATES] if results.strategy == "best_of_n" else map(candidates_name, results.n)
    for name in {path.name for path in folder.iterdir() if _CANDIDATES.fullmatch(path.name)} - set(names):
        (folder / name).unlink()
    write_json(folder / RESULTS, asdict(results))


def load_results(folder: str | Path) -> Results:
    """
    What [`write_results`] wrote.

    Raises:
        `FileNotFoundError`: If there are no results in the folder.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected the --output_dir of trl-hrm best-of-n.")
    return Results(**json.loads(path.read_text(encoding="utf-8")))


def write_candidates(folder: Path, problems: Iterable[PoolProblem], name: str = CANDIDATES) -> None:
    """Write judged problems, one row each, to a file that is there whole or not at all. Results of an earlier one go first."""
    with replacing(folder / name) as file:
        for problem in problems:
            file.write(json.dumps(to_row(problem), ensure_ascii=False) + "\n")
        (folder / RESULTS).unlink(missing_ok=True)


def load_candidates(folder: str | Path, name: str = CANDIDATES) -> Iterator[PoolProblem]:
    """The problems that [`write_candidates`] wrote."""
    path = Path(folder) / name
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield from_row(json.loads(line), f"{path}:{number}")


def reopen_part(folder: Path, shard: int, num_shards: int) -> None:
    """
    Take a part that an earlier start finished for unfinished, until this start has seen that nothing is to be added: the process
    that puts all parts together would take it for one of now.
    """
    finished = folder / shard_name("part", shard, num_shards, "jsonl")
    if finished.exists():
        os.replace(finished, folder / shard_name("partial", shard, num_shards, "jsonl"))


class Part:
    """
    The judged problems of one process, block by block in a file of JSON lines: killed at any moment, at most one block is lost.

    The file is `partial-00000-of-00001.jsonl` until its last block is written, then `part-00000-of-00001.jsonl`, until it is gone on
    with: see [`reopen_part`].

    Args:
        folder (`Path`):
            Folder of the results.
        header (`dict[str, Any]`):
            What decides the blocks. A file of blocks with another header is not gone on with.
        shard (`int`, *optional*, defaults to `0`), num_shards (`int`, *optional*, defaults to `1`):
            Which of several processes this is.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace a file with another header.

    Raises:
        `ValueError`: If there is a file of blocks with another header that may not be replaced.
        `BlockingIOError`: If another process writes to it.
    """

    def __init__(
        self, folder: Path, header: dict[str, Any], shard: int = 0, num_shards: int = 1, overwrite: bool = False
    ):
        self.header = json.loads(json.dumps(header))
        self.path = folder / shard_name("partial", shard, num_shards, "jsonl")
        self.finished = folder / shard_name("part", shard, num_shards, "jsonl")
        self.num_blocks = 0
        folder.mkdir(parents=True, exist_ok=True)
        reopen_part(folder, shard, num_shards)
        self._open(overwrite)

    def append(self, block: dict[str, Any]) -> None:
        """Write one block."""
        line = json.dumps(block, ensure_ascii=False).encode() + b"\n"
        written = 0
        while written < len(line):
            written += self._file.write(line[written:])
        self.num_blocks += 1

    def finish(self) -> None:
        """All blocks are written."""
        self.close()
        os.replace(self.path, self.finished)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open(self, overwrite: bool) -> None:
        self._file = open(self.path, "a+b", buffering=0)  # no block waits in a buffer
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = _whole_lines(self.path) if self._goes_on(overwrite) else []
        except BlockingIOError as error:
            self._file.close()
            raise BlockingIOError(
                error.errno, f"{self.path}: another process writes to it. Wait for it, or name another --output_dir"
            ) from error
        except ValueError:
            self._file.close()
            raise
        self._file.truncate(sum(whole))  # a kill may have torn the last line
        self.num_blocks = max(len(whole) - 1, 0)
        if not whole:
            self._file.write(json.dumps(self.header).encode() + b"\n")

    def _goes_on(self, overwrite: bool) -> bool:
        """Whether the file was begun with this header. If not, its blocks are lost if it is begun anew."""
        found = read_header(self.path)
        if found != self.header and len(_whole_lines(self.path)) > 1 and not overwrite:
            raise ValueError(_other_settings(self.path, found, self.header))
        return found == self.header


def read_header(path: Path) -> dict[str, Any] | None:
    """What a part was begun with, `None` if a kill left nothing whole of it."""
    with open(path, "rb") as lines:
        line = lines.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def read_parts(
    paths: Sequence[Path], unreadable: list[dict[str, str]] | None = None
) -> tuple[Iterator[tuple[PoolProblem, list[int | None]]], Counter]:
    """
    The judged problems of several parts in their order, each with the classes of its answers, and the sums of what the blocks
    count. Counts, and `unreadable`, to which the problems with unreadable references are added, are complete once the problems
    are read.
    """
    counts: Counter = Counter()
    unreadable = [] if unreadable is None else unreadable
    rows = heapq.merge(*(_read_part(path, counts, unreadable) for path in paths), key=lambda row: row["place"])
    return ((from_row(row["problem"]), row["classes"]) for row in rows), counts


def judged_row(place: int, problem: PoolProblem, classes: list[int | None]) -> dict[str, Any]:
    """A judged problem in a block, under `rows`."""
    return {"place": place, "problem": to_row(problem), "classes": classes}


def _whole_lines(path: Path) -> list[int]:
    """Bytes of the lines that have an end: the header and the blocks."""
    with open(path, "rb") as lines:
        return [len(line) for line in lines if line.endswith(b"\n")]


def _read_part(path: Path, counts: Counter, unreadable: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        next(lines)  # the header
        for line in lines:
            block = json.loads(line)
            counts.update(block["counts"])
            unreadable += block.get("unreadable_references", ())
            yield from block["rows"]


def _other_settings(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> str:
    changed = [name for name in {**found, **asked} if found.get(name) != asked.get(name)]
    shown = "; ".join(f"{name} was {_shown(found.get(name))} and is {_shown(asked.get(name))}" for name in changed)
    return (
        f"{path}: begun with other settings: {shown}. Start with the same ones to go on, pass --overwrite to begin anew, or name "
        "another --output_dir."
    )


def _shown(value: Any) -> str:
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 80 else shown[:77] + "..."
