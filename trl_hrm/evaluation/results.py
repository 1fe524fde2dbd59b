"""The folder of results: scored and graded candidates, `results.json`, and, until these are complete, parts to resume from."""

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..data.candidates import ProblemCandidates
from ..io import AppendedLines, changed_settings, replacing, write_json
from ..search.outcomes import describe_outcomes
from ..search.run_folder import shard_name
from .reward_hacking import gap_words, hacking_verdict


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
            What was left out or could not be scored or graded, by reason.
        solutions (`dict[str, int]`):
            How the solutions end. See [`~search.outcomes.count_outcomes`]. For a run that is read again, its candidates with the answers found here.
        warnings (`list[str]`):
            Warnings, for example of unreadable references.
        n (`list[int]`), curves, hacking_gap, calibration:
            See [`~evaluation.curves.Curves`].
        intervals (`dict[str, Any]`):
            Confidence and methods of the intervals.
        cost (`dict[str, Any]`):
            Seconds, tokens and calls of the policy and of the scorer, and the seconds of the rest.
        output_dir (`str`, *optional*):
            Folder of the results. It is not written to the file.
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
    output_dir: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{format_results(self)}\nNext: trl-hrm report {self.output_dir} --output report.html"


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
    """Write `results.json` as a whole or not at all, and remove the candidates of earlier results."""
    names = [CANDIDATES] if results.strategy == "best_of_n" else map(candidates_name, results.n)
    for name in {path.name for path in folder.iterdir() if _CANDIDATES.fullmatch(path.name)} - set(names):
        (folder / name).unlink()
    results.output_dir = str(folder)
    values = asdict(results)
    del values["output_dir"]
    write_json(folder / RESULTS, values)


def load_results(folder: str | Path) -> Results:
    """
    Return what [`write_results`] wrote.

    Raises:
        `FileNotFoundError`: If the folder holds no results.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file, expected the --output_dir of trl-hrm best-of-n.")
    return Results(**json.loads(path.read_text(encoding="utf-8")), output_dir=str(folder))


def format_results(results: Results) -> str:
    """Return the curves as a table in percent with their intervals, the verdicts on reward hacking, and what was left out."""
    width = max(map(len, results.curves)) + 2
    lines = [
        f"accuracy in percent and 95 % intervals over {results.num_problems:,} problems",
        "N".ljust(width) + "".join(f"{n:>12}" for n in results.n),
    ]
    for name, points in results.curves.items():
        lines.append(name.ljust(width) + "".join(f"{100 * point['accuracy']:>12.1f}" for point in points))
        intervals = (f"{100 * point['low']:.1f}-{100 * point['high']:.1f}" for point in points)
        lines.append(" " * width + "".join(f"{interval:>12}" for interval in intervals))
    for name, gap in results.hacking_gap.items():
        verdict = hacking_verdict(gap, results.curves[name])
        lines.append(f"hacking gap of {name}: {gap_words(gap)}. {verdict.words}")
    counted = {name: count for name, count in results.counts.items() if count and name != "num_candidates"}
    if counted:
        lines.append("counted: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counted.items()))
    given = results.counts.get("problems_with_given_grades")
    if given:
        lines.append(f"the grades of {given:,} problems were given with their candidates and are used as they are")
    if results.solutions:
        lines.append(describe_outcomes(results.solutions))
    lines += [f"warning: {warning}" for warning in results.warnings]
    if not given and results.counts["candidates_without_answer"] == results.counts.get("num_candidates"):
        lines.append(
            "warning: no solution states an answer, so that all accuracies are 0. Do --extractors read what the policy writes, and "
            "does it have the tokens to come to an end?"
        )
    return "\n".join(lines)


def write_candidates(folder: Path, problems: Iterable[ProblemCandidates], name: str = CANDIDATES) -> None:
    """Write scored and graded problems, one row each, to a file that is there whole or not at all. Results of an earlier one go first."""
    with replacing(folder / name) as file:
        for problem in problems:
            file.write(json.dumps(problem.to_row(), ensure_ascii=False) + "\n")
        (folder / RESULTS).unlink(missing_ok=True)


def load_candidates(folder: str | Path, name: str = CANDIDATES) -> Iterator[ProblemCandidates]:
    """The problems that [`write_candidates`] wrote."""
    path = Path(folder) / name
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            yield ProblemCandidates.from_row(json.loads(line), f"{path}:{number}")


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
    The scored and graded problems of one process, block by block in a file of JSON lines: killed at any moment, at most one block is lost.

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
        self._lines = AppendedLines(self.path)
        with open(self.path, "rb") as lines:
            num_blocks = sum(1 for _ in lines) - 1
        found = read_header(self.path)
        if found == self.header:
            self.num_blocks = num_blocks
        elif num_blocks < 1 or overwrite:
            self._lines.clear()
            self._lines.append(self.header)
        else:
            self.close()
            raise ValueError(
                f"{self.path}: this run was started with other settings: "
                f"{'; '.join(changed_settings(found or {}, self.header))}. Start with the same settings to resume, pass "
                "--overwrite to start again, or name another --output_dir."
            )

    def append(self, block: dict[str, Any]) -> None:
        """Write one block."""
        self._lines.append(block)
        self.num_blocks += 1

    def finish(self) -> None:
        """All blocks are written."""
        self.close()
        os.replace(self.path, self.finished)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_header(path: Path) -> dict[str, Any] | None:
    """What a part was begun with, `None` if a kill left nothing whole of it."""
    with open(path, "rb") as lines:
        line = lines.readline()
    return json.loads(line) if line.endswith(b"\n") else None


def read_parts(
    paths: Sequence[Path], unreadable: list[dict[str, str]] | None = None
) -> tuple[Iterator[tuple[ProblemCandidates, list[int | None]]], Counter]:
    """
    The scored problems of several parts in their order, each with the classes of its answers, and the sums of what the blocks
    count. Counts, and `unreadable`, to which the problems with unreadable references are added, are complete once the problems
    are read.
    """
    counts: Counter = Counter()
    unreadable = [] if unreadable is None else unreadable
    rows = heapq.merge(*(_read_part(path, counts, unreadable) for path in paths), key=lambda row: row["place"])
    return ((ProblemCandidates.from_row(row["problem"]), row["classes"]) for row in rows), counts


def scored_row(place: int, problem: ProblemCandidates, classes: list[int | None]) -> dict[str, Any]:
    """Return a scored and graded problem as a block has it, under `rows`."""
    return {"place": place, "problem": problem.to_row(), "classes": classes}


def _read_part(path: Path, counts: Counter, unreadable: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        next(lines)  # the header
        for line in lines:
            block = json.loads(line)
            counts.update(block["counts"])
            unreadable += block.get("unreadable_references", ())
            yield from block["rows"]
