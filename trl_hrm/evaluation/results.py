"""Folder of results: scored and graded candidates, `results.json`, and part files to resume from until both are complete."""

import heapq
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ..data.candidates import ProblemCandidates, SavedProblem
from ..identity import Comparison, compare_runs, describe_changes
from ..io import (
    AppendedLines,
    dump_json,
    parse_json,
    read_json,
    read_json_lines,
    replacing,
    shell_word,
    shown,
    write_json,
)
from ..schema import INT64, Amount, Count, Share, check_json
from ..scoring.generative_scorer import format_judge_cost
from ..search.outcomes import describe_outcomes
from ..search.run_folder import Reference, shard_name
from ..terminal import one_line
from .reward_hacking import gap_words, hacking_verdict


RESULTS = "results.json"
CANDIDATES = "candidates.jsonl"
REMEDY = "Run the command that wrote the file again, with --overwrite."
_CANDIDATES = re.compile(r"candidates(-n\d+)?\.jsonl")

Number = Annotated[int, Field(ge=1, le=INT64)]  # N
Difference = Annotated[float, Field(ge=-1, le=1)]


class Point(TypedDict):
    """Accuracy at one N with its interval and, for a step search, the cost of this N. See [`~evaluation.curves.Curves`]."""

    n: Number
    accuracy: Share
    low: Share
    high: Share
    policy_seconds: NotRequired[Amount]
    policy_num_tokens: NotRequired[Count]
    policy_num_requests: NotRequired[Count]
    policy_num_sequences: NotRequired[Count]
    scorer_seconds: NotRequired[Amount]
    scorer_num_calls: NotRequired[Count]
    scorer_num_steps: NotRequired[Count]
    scorer_num_tokens: NotRequired[Count]
    rest_seconds: NotRequired[float]


class Gap(TypedDict):
    """Hacking gap of a curve. See [`~evaluation.curves.Curves`]."""

    gap: Share | None
    best_n: Number | None
    largest_n: Number
    loss: Difference | None
    from_n: Number | None
    low: Difference | None
    high: Difference | None
    undecided: str | None


class Estimate(TypedDict, total=False):
    """How the accuracies were estimated. See [`~evaluation.curves.Curves`]. A step search only has a `method`."""

    method: Literal["subsets", "searches"]
    min_candidates: Number
    max_candidates: Number
    min_graded: Count
    num_draws: Number


class Bin(TypedDict):
    """Scores of an interval. See [`~step_metrics.calibration_bins`]."""

    low: Share
    high: Share
    count: Count
    mean_score: Share | None
    share_right: Share | None


class Calibration(TypedDict, total=False):
    """Comparison of scores with grades. See [`~evaluation.curves.Curves`]."""

    aggregate: str
    bins: list[Bin]


class Cost(TypedDict, total=False):
    """Seconds, tokens and calls. `None` is unknown."""

    policy: dict[str, Amount | None] | None
    scorer: dict[str, Amount | None]
    rest_seconds: float


class ScoredRow(TypedDict):
    """Problem of a [`Part`], with its index and the classes of its answers."""

    place: Count
    problem: SavedProblem
    classes: list[Count | None]


class Header(TypedDict, total=False):
    """First line of a [`Part`]. It has other keys, which are only compared."""

    identity: dict[str, dict[str, Any]]


class Block(TypedDict):
    """Line of a [`Part`] after the first. `number` is missing in files of earlier versions."""

    number: NotRequired[Count]
    rows: list[ScoredRow]
    counts: dict[str, Amount]
    unreadable_references: NotRequired[list[Reference]]


@dataclass(kw_only=True)
class Results:
    """
    Content of `results.json`.

    Args:
        strategy (`str`):
            How solutions were found: `"best_of_n"`, `"step_search"`, `"beam_search"`, `"diverse_tree_search"`, or `"evaluate"` for the
            evaluation of a policy.
        reward_model (`dict[str, Any]`, *optional*):
            Name and options of the reward model. `None` for the evaluation of a policy.
        policy (`dict[str, Any]`, *optional*):
            Name and options of the policy. `None` if the origin of the candidates is unknown.
        settings (`dict[str, Any]`):
            All other settings that affect the numbers, such as aggregates, spans and extractors.
        versions (`dict[str, str]`):
            Versions of the packages used.
        seed (`int`):
            Random seed of the samples and of the draws.
        date (`str`):
            Date and time of the results, in UTC.
        num_problems (`int`):
            Number of problems in the curves.
        counts (`dict[str, int]`):
            Number of problems and candidates that were dropped, or could not be scored or graded, by reason.
        solutions (`dict[str, int]`):
            Number of solutions by outcome. See [`~search.outcomes.count_outcomes`]. For an existing run, only its
            candidates are counted, with the answers extracted here.
        warnings (`list[str]`):
            Warnings, for example about references that could not be parsed.
        n (`list[int]`), curves, hacking_gap, calibration, estimate:
            See [`~evaluation.curves.Curves`]. `estimate` is empty in files of earlier versions, whose best-of-N selected
            from the first N candidates.
        intervals (`dict[str, Any]`):
            Confidence level and methods of the intervals.
        cost (`dict[str, Any]`):
            Seconds, tokens and calls of the policy and of the scorer, and the seconds of everything else.
        output_dir (`str`, *optional*):
            Folder of the results. Not saved in the file.
    """

    strategy: str
    reward_model: dict[str, Any] | None
    policy: dict[str, Any] | None
    settings: dict[str, Any]
    versions: dict[str, str]
    seed: int
    date: str
    num_problems: Count
    counts: dict[str, Count]
    n: list[Number]
    curves: dict[str, list[Point]]
    hacking_gap: dict[str, Gap] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=dict)
    estimate: Estimate = field(default_factory=dict)
    intervals: dict[str, Any] = field(default_factory=dict)
    solutions: dict[str, Count] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    cost: Cost = field(default_factory=dict)
    output_dir: str | None = field(default=None, compare=False)

    def __str__(self) -> str:
        return f"{format_results(self)}\nNext: trl-hrm report {shell_word(str(self.output_dir))} --output report.html"


def check_results(folder: Path, overwrite: bool) -> None:
    """
    Raise `FileExistsError` if the folder already has results, unless `overwrite` is set, or if it has other files with their names.
    """
    path = folder / RESULTS
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another --output_dir, or pass --overwrite to replace it.")
    if path.exists():
        is_own = "strategy" in read_json(path)
    else:  # an interrupted run leaves candidates next to a part, or to the folder of a search
        path = next((path for path in folder.glob("*.jsonl") if _CANDIDATES.fullmatch(path.name)), None)
        is_own = path is None or any(folder.glob("part*-of-*.jsonl")) or any(folder.glob("*/manifest.json"))
    if not is_own:
        raise FileExistsError(
            f"{path} exists, and was not written by `best-of-n`, `step-search` or `evaluate`. Choose another --output_dir."
        )


def candidates_name(n: int) -> str:
    """Return the file name of the candidates of a step search at one N."""
    return f"candidates-n{n}.jsonl"


def write_results(folder: Path, results: Results) -> None:
    """Write `results.json` atomically, and remove the candidates of earlier results."""
    is_pool = results.strategy in ("best_of_n", "evaluate")
    names = [CANDIDATES] if is_pool else map(candidates_name, results.n)
    for name in {path.name for path in folder.iterdir() if _CANDIDATES.fullmatch(path.name)} - set(names):
        (folder / name).unlink()
    results.output_dir = str(folder)
    values = asdict(results)
    del values["output_dir"]
    write_json(folder / RESULTS, values)


def load_results(folder: str | Path) -> Results:
    """
    Read the results that [`write_results`] wrote.

    Raises:
        `FileNotFoundError`: If the folder has no results.
        `ValueError`: If the file is damaged. The message names the file and the key.
    """
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Pass the --output_dir of `trl-hrm best-of-n`, `step-search` or `evaluate`."
        )
    values = read_json(path, REMEDY)
    check_values(values, path)
    return Results(**values | {"output_dir": str(folder)})


def check_values(values: dict[str, Any], path: Path) -> None:
    """Raise `ValueError` unless the values of a `results.json` have the right types and fit together."""
    check_json(values, Results, path, REMEDY)
    if not values["curves"]:
        raise ValueError(f"{path}: `curves` is empty. {REMEDY}")
    for name, points in values["curves"].items():
        where = f"{path}: `curves.{shown(name)[1:-1]}`"
        n = [point["n"] for point in points]
        if not n or sorted(set(n)) != n:
            raise ValueError(f"{where} has the N {shown(n)}, expected at least one, in ascending order. {REMEDY}")
        for point in points:
            if not point["low"] - 1e-9 <= point["accuracy"] <= point["high"] + 1e-9:
                raise ValueError(f"{where} has an accuracy outside of its interval at N = {point['n']}. {REMEDY}")
    estimate = values.get("estimate", {})
    for key in ("method", "min_candidates", "max_candidates"):
        # empty in files of earlier versions
        if estimate and key not in estimate and (key == "method" or estimate["method"] == "subsets"):
            raise ValueError(f"{path}: `estimate` has no `{key}`. {REMEDY}")
    for i, one in enumerate(values.get("calibration", {}).get("bins", ())):
        if one["count"] and None in (one["mean_score"], one["share_right"]):
            raise ValueError(
                f"{path}: `calibration.bins[{i}]` has a count, but no `mean_score` or `share_right`. {REMEDY}"
            )
    for name, gap in values.get("hacking_gap", {}).items():
        where = f"{path}: `hacking_gap.{shown(name)[1:-1]}`"
        n = [point["n"] for point in values["curves"].get(name, [])]
        if gap["best_n"] not in [*n, None] or n[-1:] != [gap["largest_n"]] or gap["from_n"] not in [*n, None]:
            raise ValueError(f"{where} has an N that is not in the curve {shown(name)}. {REMEDY}")
        if len({gap[key] is None for key in ("loss", "from_n", "low", "high")}) > 1:
            raise ValueError(f"{where} has some of `loss`, `from_n`, `low` and `high`, expected all or none. {REMEDY}")
        if None in (gap["gap"], gap["best_n"], gap["loss"]) and gap["undecided"] is None:
            raise ValueError(
                f"{where} has no `gap`, `best_n` or `loss`, and no reason why it is `undecided`. {REMEDY}"
            )


def format_results(results: Results) -> str:
    """Return a text with the curves and their intervals in percent, the verdicts on reward hacking, and the counts."""
    width = max(map(len, results.curves)) + 2
    lines = [
        f"accuracy in percent and 95 % intervals over {results.num_problems:,} problems",
        estimate_words(results.strategy, results.estimate),
        "N".ljust(width) + "".join(f"{n:>12}" for n in results.n),
    ]
    for name, points in results.curves.items():
        lines.append(name.ljust(width) + "".join(f"{100 * point['accuracy']:>12.1f}" for point in points))
        intervals = (f"{100 * point['low']:.1f}-{100 * point['high']:.1f}" for point in points)
        lines.append(" " * width + "".join(f"{interval:>12}" for interval in intervals))
    for name, gap in results.hacking_gap.items():
        verdict = hacking_verdict(gap, results.curves[name])
        gap_text = "" if gap["undecided"] else f"{gap_words(gap)}. "
        lines.append(f"hacking gap of {name}: {gap_text}{verdict.words}")
    counted = {name: count for name, count in results.counts.items() if count and not name.endswith("num_candidates")}
    if counted:
        lines.append("counted: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counted.items()))
    given = results.counts.get("problems_with_given_grades")
    if given:
        lines.append(f"candidates of {given:,} problems came with grades, which were not changed")
    if results.solutions:
        lines.append(describe_outcomes(results.solutions))
    scorer = results.cost.get("scorer", {})
    if "judge_samples" in scorer:
        lines.append(format_judge_cost({name.removeprefix("judge_"): value for name, value in scorer.items()}))
    lines += [f"warning: {one_line(warning)}" for warning in results.warnings]
    return "\n".join(lines)


def estimate_words(strategy: str, estimate: Estimate) -> str:
    """
    Return a sentence on how the accuracies of a `results.json` were estimated.

    Args:
        strategy (`str`):
            Strategy of the results.
        estimate (`dict[str, Any]`):
            See [`Results`]. Empty in files of earlier versions.

    Example:

    ```python
    >>> estimate_words("step_search", {"method": "searches"})
    'Each N is a separate search.'
    ```
    """
    if estimate.get("method", "searches" if strategy != "best_of_n" else None) == "searches":
        return "Each N is a separate search."
    if not estimate:
        return "An earlier version selected from the first N candidates of each problem. Run the command again with --overwrite."
    sizes = f"{estimate['min_candidates']:,}"
    if estimate["max_candidates"] > estimate["min_candidates"]:
        sizes += f" to {estimate['max_candidates']:,}"
    words = f"Means over all subsets of N of the {sizes} candidates of a problem."
    if "min_graded" in estimate:
        words += f" Some have no grade: each problem has at least {estimate['min_graded']:,} with a grade."
    if "num_draws" in estimate:
        draws = f"{estimate['num_draws']:,}"
        words += f" Votes with more than {draws} subsets: means over {draws} random subsets."
    return words


def write_candidates(folder: Path, problems: Iterable[ProblemCandidates], name: str = CANDIDATES) -> None:
    """Write scored and graded problems atomically, one row per problem. Remove earlier results first."""
    with replacing(folder / name) as file:
        for problem in problems:
            file.write(dump_json(problem.to_row(), folder / name) + "\n")
        (folder / RESULTS).unlink(missing_ok=True)


def load_candidates(folder: str | Path, name: str = CANDIDATES) -> Iterator[ProblemCandidates]:
    """
    Read the problems that [`write_candidates`] wrote.

    Raises:
        `ValueError`: If a row is damaged. The message names file and line.
    """
    for where, row in read_json_lines(Path(folder) / name, REMEDY):
        yield ProblemCandidates.from_row(row, where)


def reopen_part(folder: Path, shard: int, num_shards: int) -> None:
    """
    Mark a part as unfinished if an earlier run finished it. Otherwise the process that combines the parts could use it
    before this run has checked that it is complete.
    """
    finished = folder / shard_name("part", shard, num_shards, "jsonl")
    if finished.exists():
        os.replace(finished, folder / shard_name("partial", shard, num_shards, "jsonl"))


class Part:
    """
    File with the scored and graded problems of one process. Each line is a block of problems. A killed process loses
    at most one block.

    The file is called `partial-00000-of-00001.jsonl` until the last block is written, and then
    `part-00000-of-00001.jsonl`. A resumed run renames it back until it has checked that the file is complete.

    Args:
        folder (`Path`):
            Folder of the results.
        header (`dict[str, Any]`):
            Settings of the run. A file with a different header is not resumed. See [`compare_headers`].
        shard (`int`, *optional*, defaults to `0`), num_shards (`int`, *optional*, defaults to `1`):
            Index of this process, and number of processes.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a file with a different header.

    Attributes:
        notes (`list[str]`):
            Notes for the user about the header of the file, for example about a reward model that was moved.

    Raises:
        `ValueError`: If there is a file with a different header and `overwrite` is not set, or if a block is damaged.
        `BlockingIOError`: If another process is writing to the file.
    """

    def __init__(
        self, folder: Path, header: dict[str, Any], shard: int = 0, num_shards: int = 1, overwrite: bool = False
    ):
        self.header = json.loads(json.dumps(header))
        self.path = folder / shard_name("partial", shard, num_shards, "jsonl")
        self.finished = folder / shard_name("part", shard, num_shards, "jsonl")
        self.num_blocks = 0
        self.notes: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        reopen_part(folder, shard, num_shards)
        self._lines = AppendedLines(self.path)
        with open(self.path, "rb") as lines:
            num_blocks = sum(1 for _ in lines) - 1
        found = read_header(self.path)
        changes, notes, _ = compare_headers(found or {}, self.header)
        if not changes:
            self.num_blocks = num_blocks
            self.notes = notes
            try:
                for _ in _read_part(self.path, Counter(), []):
                    pass  # a damaged block is noticed before anything is scored
            except ValueError:
                self.close()
                raise
        elif num_blocks < 1 or overwrite:
            self._lines.clear()
            self._lines.append(self.header)
        else:
            self.close()
            raise ValueError(
                f"{self.path}: this run was started with other settings: {describe_changes(changes)} Use the same settings to "
                "resume, pass --overwrite to score again (samples are kept), or choose another --output_dir."
            )

    def append(self, block: dict[str, Any]) -> None:
        """Write one block."""
        self._lines.append({"number": self.num_blocks} | block)
        self.num_blocks += 1

    def finish(self) -> None:
        """Close the file and mark it as complete."""
        self.close()
        os.replace(self.path, self.finished)

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> "Part":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def compare_headers(found: dict[str, Any], header: dict[str, Any]) -> Comparison:
    """
    Compare the header of a part with the header of this run. Settings of the curves are ignored, because the scores and grades in a part
    do not depend on them. Headers of older versions do not have the options of the grader.
    """
    ignored = {"n", "aggregate", "num_draws"} | ({"grader"} - found.keys())
    found, header = ({name: one[name] for name in one.keys() - ignored} for one in (found, header))
    return compare_runs(found, header)


def read_header(path: Path) -> dict[str, Any] | None:
    """
    Return the header of a part, or `None` if the file has no complete line.

    Raises:
        `ValueError`: If the line is not a JSON object.
    """
    with open(path, "rb") as lines:
        line = lines.readline()
    if not line.endswith(b"\n"):
        return None
    remedy = "Delete the file, or pass --overwrite, to score its problems again."
    header = parse_json(line, f"{path}:1")
    check_json(header, dict, f"{path}:1", remedy)
    check_json(header, Header, f"{path}:1", remedy, more=True)
    return header


def read_parts(
    paths: Sequence[Path], unreadable: list[dict[str, str]] | None = None
) -> tuple[Iterator[tuple[ProblemCandidates, list[int | None]]], Counter]:
    """
    Return an iterator over the scored problems of several parts, in order and with the classes of their answers, and
    the summed counts of the blocks.

    Problems with unreadable references are appended to `unreadable`. The counts and this list are complete once the
    iterator is exhausted.
    """
    counts: Counter = Counter()
    unreadable = [] if unreadable is None else unreadable
    rows = heapq.merge(*(_read_part(path, counts, unreadable) for path in paths), key=lambda row: row["place"])
    return ((ProblemCandidates.from_row(row["problem"]), row["classes"]) for row in rows), counts


def scored_row(place: int, problem: ProblemCandidates, classes: list[int | None]) -> dict[str, Any]:
    """Return a scored and graded problem as an entry of the `rows` of a block."""
    return {"place": place, "problem": problem.to_row(), "classes": classes}


def _read_part(path: Path, counts: Counter, unreadable: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    remedy = "Delete the file and run the same command again. Its problems will be scored again."
    last = -1
    for number, (where, block) in enumerate(islice(read_json_lines(path, remedy), 1, None)):  # after the header
        check_json(block, Block, where, remedy)
        if block.get("number", number) != number:
            raise ValueError(f"{where}: found block {block['number']}, expected block {number}. {remedy}")
        for row in block["rows"]:
            if row["place"] <= last:
                raise ValueError(f"{where}: problem {row['place']} follows problem {last}. {remedy}")
            if len(row["classes"]) != len(row["problem"]["candidates"]):
                raise ValueError(f"{where}: problem {row['place']} has not one class per candidate. {remedy}")
            last = row["place"]
        counts.update(block["counts"])
        unreadable += block.get("unreadable_references", ())
        yield from block["rows"]
