"""What a report says: results of `trl-hrm best-of-n` and `trl-hrm benchmark`, read, checked, and put into words."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..scoring.aggregate import AGGREGATES, aggregate
from .hacking import Verdict, hacking_verdict, percent


RESULTS = "results.json"
SELECTION_KEYS = ("strategy", "settings", "num_problems", "counts", "n", "curves", "hacking_gap")
GAP_KEYS = ("gap", "best_n", "largest_n", "loss", "from_n", "low", "high", "undecided")
BENCHMARK_KEYS = ("reward_model", "suites")
BASELINES = {"majority_vote": "majority vote", "pass_at_n": "pass@N"}


@dataclass(frozen=True)
class Result:
    """
    The results of one folder.

    Args:
        folder (`str`):
            The folder, as it was given.
        name (`str`):
            Short name, which no other result of the report has.
        kind (`str`):
            `"selection"` or `"benchmark"`.
        values (`dict[str, Any]`):
            What its `results.json` holds.
        problems (`frozenset[str]`, *optional*):
            Of a selection, hashes of problems with their reference answers. Two results are compared only where these are the
            same.
        solutions (`dict[str, frozenset[str]]`, *optional*):
            Of benchmarks, hashes of the scored solutions of each suite.
        scores (`dict[str, dict[str, list[float]]]`, *optional*):
            For each kind of thing that is scored, its scores in `"right"` and `"wrong"`.
    """

    folder: str
    name: str
    kind: Literal["selection", "benchmark"]
    values: dict[str, Any]
    problems: frozenset[str] = frozenset()
    solutions: dict[str, frozenset[str]] = field(default_factory=dict)
    scores: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def headline(self) -> str | None:
        """The curve that answers for the reward model: the first one that has a gap."""
        return next(iter(self.values["hacking_gap"]), None)

    def label(self, curve: str) -> str:
        """The name of one of its curves as it is read. A search has one, which is called by its strategy."""
        return curve_label(self.values["strategy"] if curve == "step_search" else curve)


def read_results(folders: Sequence[str | Path]) -> list[Result]:
    """
    Read the results of several runs.

    Args:
        folders (`Sequence[str]` or `Sequence[Path]`):
            Folders that `trl-hrm best-of-n` or `trl-hrm benchmark` has written.

    Returns:
        `list[Result]`: One for each, in their order.

    Raises:
        `FileNotFoundError`: If a folder holds no results.
        `ValueError`: If a folder is given twice, or its results are not those of these commands.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is given twice. Give each folder once.")
    names = [path.name for path in resolved]
    return [
        _read_result(path, name if names.count(name) == 1 else path.as_posix())
        for path, name in zip(paths, names, strict=True)
    ]


def _read_result(folder: Path, name: str) -> Result:
    file = folder / RESULTS
    if not file.is_file():
        found = "no such folder" if not folder.is_dir() else ", ".join(sorted(p.name for p in folder.iterdir())[:8])
        raise FileNotFoundError(
            f"{folder}: found {found or 'an empty folder'}, expected {RESULTS}, as `trl-hrm best-of-n` and `trl-hrm benchmark` "
            "write it. A run that was stopped writes it when it is started again."
        )
    values = _read_json(file)
    if values.get("kind") == "benchmark":
        _require(values, BENCHMARK_KEYS, file)
        rows = _read_rows(folder / "scores.jsonl")
        solutions = {
            suite: frozenset(
                _digest(row["subset"], row["id"])
                for row in rows
                if row["suite"] == suite and row["scores"] is not None
            )
            for suite in values["suites"]
        }
        return Result(folder.as_posix(), name, "benchmark", values, solutions=solutions, scores=_step_scores(rows))
    _require(values, SELECTION_KEYS, file)
    for curve, gap in values["hacking_gap"].items():
        if missing := [key for key in GAP_KEYS if key not in gap]:
            raise ValueError(
                f"{file}: the hacking gap of {curve} has no {missing}, as in results of an earlier version, whose intervals have zero "
                "width where no problem is solved or all are. Run the command that wrote it again, with --overwrite."
            )
    rows = _read_rows(_candidate_file(folder))
    begun = "prefix_column" in values["settings"]  # then the same problem may be there with several beginnings
    problems = frozenset(
        _digest(row["problem"], row["answer"], *([row["problem_id"]] if begun else ())) for row in rows
    )
    named = values["settings"].get("aggregate")  # a search has one, best-of-N several, of which the first counts
    scores = _solution_scores(rows, named[0] if isinstance(named, list) else named)
    return Result(folder.as_posix(), name, "selection", values, problems, scores=scores)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error}). Run the command that wrote it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: found a JSON {type(values).__name__}, expected an object with results.")
    return values


def _require(values: dict[str, Any], keys: Sequence[str], file: Path) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        raise ValueError(
            f"{file}: found the keys {sorted(values)}, and no {missing}, which results of `trl-hrm best-of-n` "
            f"({', '.join(SELECTION_KEYS)}) or `trl-hrm benchmark` (kind, {', '.join(BENCHMARK_KEYS)}) have. Give the folder of "
            "such a run."
        )


def _candidate_file(folder: Path) -> Path:
    """The candidates; of a step search, those at the largest N."""
    file = folder / "candidates.jsonl"
    if file.is_file():
        return file
    files = {int(path.stem.rpartition("-n")[2]): path for path in folder.glob("candidates-n*.jsonl")}
    if not files:
        raise FileNotFoundError(
            f"{folder}: found {RESULTS} and no candidates.jsonl or candidates-n8.jsonl or the like beside it, by which results "
            "of different problems are told apart. Copy the whole folder."
        )
    return files[max(files)]


def _read_rows(file: Path) -> list[dict[str, Any]]:
    rows = []
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not a complete JSON object ({error}).") from error
    return rows


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _solution_scores(rows: list[dict[str, Any]], name: str | None) -> dict[str, dict[str, list[float]]]:
    """Scores of solutions by an aggregate. Nothing where that is a function of the user's own."""
    if name not in AGGREGATES:
        return {}
    found: dict[str, list[float]] = {"right": [], "wrong": []}
    for row in rows:
        for candidate in row["candidates"]:
            is_wrong = candidate["answer"] is None and not row.get("graded")  # no answer is wrong
            known = candidate["correct"] is not None or is_wrong
            if candidate["scores"] and known:
                found["right" if candidate["correct"] else "wrong"].append(aggregate(candidate["scores"], name))
    return {f"solutions ({name} of the step scores)": found} if any(found.values()) else {}


def _step_scores(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Scores of the steps that a benchmark calls right or wrong, by suite."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        parts = found.setdefault(f"steps of {row['suite']}", {"right": [], "wrong": []})
        for score, label in zip(row["scores"] or (), row["labels"], strict=False):
            if label is not None:
                parts["right" if label else "wrong"].append(score)
    return found


def problem_groups(results: Sequence[Result]) -> list[list[Result]]:
    """The results of selection, those of the same problems together: only these can be compared."""
    groups: dict[frozenset[str], list[Result]] = {}
    for result in results:
        if result.kind == "selection":
            groups.setdefault(result.problems, []).append(result)
    return list(groups.values())


def notices(results: Sequence[Result]) -> list[str]:
    """What must be known before results are compared."""
    groups = problem_groups(results)
    found = []
    for i, group in enumerate(groups):
        for other in groups[i + 1 :]:
            mine, theirs = group[0].problems, other[0].problems
            found.append(
                f"{_names(group)} and {_names(other)} hold different problems ({len(mine):,} and {len(theirs):,}, "
                f"{len(mine & theirs):,} of them the same). Their accuracies cannot be compared, and stand apart."
            )
    found += [f"{result.name}: {warning}" for result in results for warning in result.values.get("warnings", ())]
    return found + _suite_notices([result for result in results if result.kind == "benchmark"])


def _suite_notices(results: Sequence[Result]) -> list[str]:
    found = []
    for i, result in enumerate(results):
        for other in results[i + 1 :]:
            for suite in result.solutions.keys() & other.solutions.keys():
                mine, theirs = result.solutions[suite], other.solutions[suite]
                if mine != theirs:
                    found.append(
                        f"{result.name} and {other.name} scored different solutions of {suite} ({len(mine):,} and "
                        f"{len(theirs):,}, {len(mine & theirs):,} of them the same). They cannot be compared."
                    )
    return sorted(found)


def _names(results: Sequence[Result]) -> str:
    return ", ".join(result.name for result in results)


def verdict(result: Result, curve: str) -> Verdict:
    """
    Whether more candidates make a reward model's choice worse.

    Args:
        result ([`Result`]):
            Results of a selection.
        curve (`str`):
            One of its curves that has a gap.

    Returns:
        [`Verdict`]: That of [`hacking_verdict`], with how the curve compares with votes and with no selection among its reasons.
    """
    points = result.values["curves"][curve]
    found = hacking_verdict(result.values["hacking_gap"][curve], points)
    return replace(found, reasons=[*found.reasons, *_beside(result, curve, points[-1])])


def _beside(result: Result, curve: str, last: dict[str, Any]) -> list[str]:
    """How the last point of a curve stands beside N = 1 and beside the vote."""
    found = []
    first = result.values["curves"][curve][0]
    if first["n"] == 1 and last["n"] > 1:
        found.append(f"{_compare(last, first)} one candidate ({percent(first['accuracy'])}).")
    for point in result.values["curves"].get("majority_vote", ()):
        if point["n"] == last["n"]:
            found.append(f"{_compare(last, point)} majority vote at N = {point['n']} ({percent(point['accuracy'])}).")
    return found


def _compare(point: dict[str, Any], other: dict[str, Any]) -> str:
    if point["low"] > other["high"]:
        return "Above"
    if point["high"] < other["low"]:
        return "Below"
    return "Not told apart from"


def curve_label(name: str) -> str:
    """
    The name of a curve as it is read.

    Example:

    ```python
    >>> curve_label("weighted_vote/min")
    'weighted vote, min'
    ```
    """
    return BASELINES.get(name, name.replace("_", " ").replace("/", ", "))


def baselines(group: Sequence[Result]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Votes and pass@N of results that are drawn together, each curve once: results that share their candidates share these."""
    found: list[tuple[str, list[dict[str, Any]]]] = []
    for key, label in BASELINES.items():
        curves: list[tuple[str, list[dict[str, Any]]]] = []
        for result in group:
            curve = result.values["curves"].get(key)
            if curve and all(curve != other for _, other in curves):
                curves.append((result.name, curve))
        found += [(label if len(curves) == 1 else f"{label}, {name}", curve) for name, curve in curves]
    return found


def expected_calibration_error(bins: Sequence[dict[str, Any]]) -> float | None:
    """Mean distance between score and share of right ones over the bins, weighted by their counts."""
    filled = [one for one in bins if one["count"]]
    total = sum(one["count"] for one in filled)
    if not total:
        return None
    return sum(one["count"] * abs(one["mean_score"] - one["share_right"]) for one in filled) / total


def has_bins(result: Result) -> bool:
    """Whether a selection has a calibration to show."""
    bins = (result.values.get("calibration") or {}).get("bins") or ()
    return any(one["count"] for one in bins)
