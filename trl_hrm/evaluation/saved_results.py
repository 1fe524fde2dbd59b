"""Results of `trl-hrm best-of-n` and `trl-hrm benchmark`: read from their folders, compared, and judged."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from ..pages.numbers import percent
from ..scoring.aggregate import AGGREGATES, aggregate
from .reward_hacking import Verdict, hacking_verdict


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
            The folder, as the user named it.
        name (`str`):
            Short name, unique in the report.
        kind (`str`):
            `"selection"` or `"benchmark"`.
        values (`dict[str, Any]`):
            Content of its `results.json`.
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
        `ValueError`: If a folder is given twice, or was not written by these commands.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is given twice. Give each folder once.")
    names = [path.name for path in resolved]
    results = []
    for path, name in zip(paths, names, strict=True):
        file = path / RESULTS
        if not file.is_file():
            found = "no such folder" if not path.is_dir() else ", ".join(sorted(p.name for p in path.iterdir())[:8])
            raise FileNotFoundError(
                f"{path}: found {found or 'an empty folder'}, expected {RESULTS}, as `trl-hrm best-of-n` and `trl-hrm benchmark` "
                "write it. A run that was stopped writes it when it is started again."
            )
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: not valid JSON ({error}). Run the command that wrote it again.") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file}: found a JSON {type(values).__name__}, expected an object with results.")
        is_benchmark = values.get("kind") == "benchmark"
        if missing := [key for key in (BENCHMARK_KEYS if is_benchmark else SELECTION_KEYS) if key not in values]:
            raise ValueError(
                f"{file}: found the keys {sorted(values)}, and no {missing}, which results of `trl-hrm best-of-n` "
                f"({', '.join(SELECTION_KEYS)}) or `trl-hrm benchmark` (kind, {', '.join(BENCHMARK_KEYS)}) have. Give the folder of "
                "such a run."
            )
        read = _read_benchmark if is_benchmark else _read_selection
        results.append(read(path, name if names.count(name) == 1 else path.as_posix(), values))
    return results


def _read_benchmark(folder: Path, name: str, values: dict[str, Any]) -> Result:
    """Scores of the steps that a benchmark calls right or wrong, by suite."""
    solutions: dict[str, set[str]] = {suite: set() for suite in values["suites"]}
    scores: dict[str, dict[str, list[float]]] = {}
    for row in _read_rows(folder / "scores.jsonl"):
        if row["scores"] is not None and row["suite"] in solutions:
            solutions[row["suite"]].add(_digest(row["subset"], row["id"]))
        parts = scores.setdefault(f"steps of {row['suite']}", {"right": [], "wrong": []})
        for score, label in zip(row["scores"] or (), row["labels"], strict=False):
            if label is not None:
                parts["right" if label else "wrong"].append(score)
    scored = {suite: frozenset(hashes) for suite, hashes in solutions.items()}
    return Result(folder.as_posix(), name, "benchmark", values, solutions=scored, scores=scores)


def _read_selection(folder: Path, name: str, values: dict[str, Any]) -> Result:
    """Scores of whole solutions by the first aggregate, unless that is a function of the user's own."""
    for curve, gap in values["hacking_gap"].items():
        if missing := [key for key in GAP_KEYS if key not in gap]:
            raise ValueError(
                f"{folder / RESULTS}: the hacking gap of {curve} has no {missing}, as in results of an earlier version, whose intervals "
                "have zero width where no problem is solved or all are. Run the command that wrote it again, with --overwrite."
            )
    file = folder / "candidates.jsonl"
    if not file.is_file():  # a step search has candidates for each N
        files = {int(path.stem.rpartition("-n")[2]): path for path in folder.glob("candidates-n*.jsonl")}
        if not files:
            raise FileNotFoundError(
                f"{folder}: found {RESULTS} and no candidates.jsonl or candidates-n8.jsonl or the like beside it, by which results "
                "of different problems are told apart. Copy the whole folder."
            )
        file = files[max(files)]
    rows = _read_rows(file)
    has_prefixes = "prefix_column" in values["settings"]  # then the same problem may be there with several prefixes
    problems = frozenset(
        _digest(row["problem"], row["answer"], *([row["problem_id"]] if has_prefixes else ())) for row in rows
    )
    aggregates = values["settings"].get("aggregate")  # a search has one, best-of-N several
    used = aggregates[0] if isinstance(aggregates, list) else aggregates
    found: dict[str, list[float]] = {"right": [], "wrong": []}
    for candidate, graded in ((one, row.get("graded")) for row in rows for one in row["candidates"]):
        is_wrong = candidate["answer"] is None and not graded  # no answer is wrong
        if used in AGGREGATES and candidate["scores"] and (candidate["correct"] is not None or is_wrong):
            found["right" if candidate["correct"] else "wrong"].append(aggregate(candidate["scores"], used))
    scores = {f"solutions ({used} of the step scores)": found} if any(found.values()) else {}
    return Result(folder.as_posix(), name, "selection", values, problems, scores=scores)


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


def problem_groups(results: Sequence[Result]) -> list[list[Result]]:
    """Results of selection, grouped by their problems. Only results of the same problems can be compared."""
    groups: dict[frozenset[str], list[Result]] = {}
    for result in results:
        if result.kind == "selection":
            groups.setdefault(result.problems, []).append(result)
    return list(groups.values())


def notices(results: Sequence[Result]) -> list[str]:
    """What readers must know before they compare results."""
    found = []
    for group, other in combinations(problem_groups(results), 2):
        mine, theirs = group[0].problems, other[0].problems
        names = (", ".join(result.name for result in one) for one in (group, other))
        found.append(
            f"{' and '.join(names)} hold different problems ({len(mine):,} and {len(theirs):,}, "
            f"{len(mine & theirs):,} of them the same). Their accuracies cannot be compared, and stand apart."
        )
    found += [f"{result.name}: {warning}" for result in results for warning in result.values.get("warnings", ())]
    different = []
    for result, other in combinations([result for result in results if result.kind == "benchmark"], 2):
        for suite in result.solutions.keys() & other.solutions.keys():
            mine, theirs = result.solutions[suite], other.solutions[suite]
            if mine != theirs:
                different.append(
                    f"{result.name} and {other.name} scored different solutions of {suite} ({len(mine):,} and "
                    f"{len(theirs):,}, {len(mine & theirs):,} of them the same). They cannot be compared."
                )
    return found + sorted(different)


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
    first, last = points[0], points[-1]
    others = [(first, f"one candidate ({percent(first['accuracy'])})")] if first["n"] == 1 < last["n"] else []
    for point in result.values["curves"].get("majority_vote", ()):
        if point["n"] == last["n"]:
            others.append((point, f"majority vote at N = {point['n']} ({percent(point['accuracy'])})"))
    reasons = []
    for other, words in others:
        if last["low"] > other["high"]:
            reasons.append(f"Above {words}.")
        elif last["high"] < other["low"]:
            reasons.append(f"Below {words}.")
        else:
            reasons.append(f"Not told apart from {words}.")
    return replace(found, reasons=[*found.reasons, *reasons])


def headline_verdict(result: Result) -> Verdict:
    """The verdict on the curve that answers for a reward model. It names other curves that are hacked."""
    if result.headline is None:
        return Verdict("open", "Cannot be told: no curve of a reward model in these results.", [])
    found = verdict(result, result.headline)
    others = [curve for curve in result.values["hacking_gap"] if curve != result.headline]
    hacked = [result.label(curve) for curve in others if verdict(result, curve).answer == "yes"]
    if not hacked:
        return found
    return replace(found, reasons=[*found.reasons, f"Hacked when chosen by {'; '.join(hacked)}."])


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


def has_bins(result: Result) -> bool:
    """Whether a selection has a calibration to show."""
    bins = (result.values.get("calibration") or {}).get("bins") or ()
    return any(one["count"] for one in bins)
