"""Read and compare the results of `trl-hrm best-of-n`, `step-search`, `evaluate` and `benchmark`."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from ..data.candidates import SavedProblem
from ..io import read_json, read_json_lines, shown
from ..pages.numbers import percent
from ..schema import Amount, Count, Share, check_json
from ..scoring.aggregate import AGGREGATES, aggregate
from ..terminal import plain
from .results import REMEDY, RESULTS, check_values, estimate_words
from .reward_hacking import Verdict, hacking_verdict, no_verdict


SELECTION_KEYS = ("strategy", "settings", "num_problems", "counts", "n", "curves", "hacking_gap")
GAP_KEYS = ("gap", "best_n", "largest_n", "loss", "from_n", "low", "high", "undecided")
BENCHMARK_KEYS = ("reward_model", "suites")
BASELINES = {"greedy": "greedy decoding", "majority_vote": "majority vote", "pass_at_n": "pass@N"}


class Tuned(TypedDict):
    """Threshold of a suite, tuned on a part of its solutions. See [`~evaluation.benchmarks.measures.tune`]."""

    threshold: Share | None
    validation: Share | None
    rest: Share | None
    rest_untuned: Share | None
    num_validation: Count
    num_rest: Count


class TooLong(TypedDict):
    """Solution that was not scored."""

    subset: str
    id: str
    where: str


class SuiteResults(TypedDict):
    """Results of a suite. See [`~evaluation.benchmarks.measures.measure`]."""

    sources: list[str]
    metric: str
    main: str
    threshold: Share
    subsets: dict[str, dict]
    averages: dict[str, dict]
    tuned: Tuned | None
    steps: dict[str, Amount]
    counts: dict[str, Count]
    too_long: list[TooLong]
    faults: NotRequired[dict[str, Any]]
    cost: NotRequired[dict[str, Amount]]
    seconds: Amount


class BenchmarkResults(TypedDict):
    """Content of the `results.json` of `trl-hrm benchmark`."""

    kind: Literal["benchmark"]
    reward_model: dict[str, Any]
    settings: dict[str, Any]
    suites: dict[str, SuiteResults]
    intervals: NotRequired[Any]
    seed: int
    versions: dict[str, str]
    date: str


class SavedScores(TypedDict):
    """Row of `scores.jsonl`."""

    suite: str
    subset: str
    id: str
    where: NotRequired[str]
    solution: NotRequired[str]
    labels: list[Annotated[int, Field(ge=0, le=1)] | None]
    scores: list[Share] | None


@dataclass(frozen=True)
class Result:
    """
    Results of one folder.

    Args:
        folder (`str`):
            Folder of the results, as given by the user.
        name (`str`):
            Short name, unique in the report.
        kind (`str`):
            `"selection"` or `"benchmark"`.
        values (`dict[str, Any]`):
            Content of `results.json`.
        problems (`frozenset[str]`, *optional*):
            For a selection, hashes of the problems with their reference answers. Only results with the same problems
            are compared.
        solutions (`dict[str, frozenset[str]]`, *optional*):
            For a benchmark, hashes of the scored solutions of each suite.
        scores (`dict[str, dict[str, list[float]]]`, *optional*):
            Scores by what is scored (such as the steps of a suite), in lists `"right"` and `"wrong"`.
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
        """The main curve of the reward model: the first curve with a hacking gap."""
        return next(iter(self.values["hacking_gap"]), None)

    def label(self, curve: str) -> str:
        """Return the display name of a curve. The single curve of a step search is named after its strategy."""
        return curve_label(self.values["strategy"] if curve == "step_search" else curve)


def read_results(folders: Sequence[str | Path]) -> list[Result]:
    """
    Read the results of several runs.

    Args:
        folders (`Sequence[str]` or `Sequence[Path]`):
            Output folders of `trl-hrm best-of-n`, `step-search`, `evaluate` or `benchmark`.

    Returns:
        `list[Result]`: Results of each folder, in the same order.

    Raises:
        `FileNotFoundError`: If a folder has no results.
        `ValueError`: If a folder is given twice, or was not written by one of these commands.
    """
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    for i, path in enumerate(resolved):
        if path in resolved[:i]:
            raise ValueError(f"{paths[i]} is given twice. Give each folder once.")
    names = [plain(path.name) for path in resolved]
    results = []
    for path, name in zip(paths, names, strict=True):
        file = path / RESULTS
        if not file.is_file():
            found = "no such folder" if not path.is_dir() else ", ".join(sorted(p.name for p in path.iterdir())[:8])
            raise FileNotFoundError(
                f"{shown(str(path), 300)}: found {found or 'an empty folder'}, expected {RESULTS} of `trl-hrm best-of-n`, `step-search`, "
                "`evaluate` or `benchmark`. If the run was stopped, start it again to complete it."
            )
        values = read_json(file, REMEDY)
        is_benchmark = values.get("kind") == "benchmark"
        if missing := [key for key in (BENCHMARK_KEYS if is_benchmark else SELECTION_KEYS) if key not in values]:
            raise ValueError(
                f"{file}: found the keys {shown(sorted(values), 200)}, but {missing} are missing. Expected results of `trl-hrm best-of-n`, "
                f"`step-search` or `evaluate` ({', '.join(SELECTION_KEYS)}) or of `trl-hrm benchmark` (kind, "
                f"{', '.join(BENCHMARK_KEYS)})."
            )
        read = _read_benchmark if is_benchmark else _read_selection
        results.append(read(path, name if names.count(name) == 1 else plain(path.as_posix()), values))
    return results


def _read_benchmark(folder: Path, name: str, values: dict[str, Any]) -> Result:
    """Read the results of a benchmark. The scores of all labelled steps are grouped by suite."""
    _check_benchmark(values, folder / RESULTS)
    solutions: dict[str, set[str]] = {suite: set() for suite in values["suites"]}
    scores: dict[str, dict[str, list[float]]] = {}
    file, num_rows = folder / "scores.jsonl", Counter()
    for where, row in read_json_lines(file, REMEDY):
        check_json(row, SavedScores, where, REMEDY)
        num_rows[row["suite"]] += 1
        if row["scores"] is not None and len(row["scores"]) != len(row["labels"]):
            raise ValueError(
                f"{where}: found {len(row['scores'])} scores for {len(row['labels'])} labels, expected one per step. {REMEDY}"
            )
        if row["scores"] is not None and row["suite"] in solutions:
            solutions[row["suite"]].add(_digest(row["subset"], row["id"], row.get("solution"), row["labels"]))
        parts = scores.setdefault(f"steps of {row['suite']}", {"right": [], "wrong": []})
        for score, label in zip(row["scores"] or (), row["labels"] if row["scores"] else (), strict=True):
            if label is not None:
                parts["right" if label else "wrong"].append(score)
    for suite, found in values["suites"].items():
        if num_rows[suite] != found["counts"].get("num_solutions"):
            raise ValueError(
                f"{file}: found {num_rows[suite]} solutions of {shown(suite)}, but {RESULTS} has "
                f"{found['counts'].get('num_solutions')}. {REMEDY}"
            )
    scored = {suite: frozenset(hashes) for suite, hashes in solutions.items()}
    return Result(folder.as_posix(), name, "benchmark", values, solutions=scored, scores=scores)


def _check_benchmark(values: dict[str, Any], path: Path) -> None:
    check_json(values, BenchmarkResults, path, REMEDY)
    for name, suite in values["suites"].items():
        where = f"{path}: `suites.{shown(name)[1:-1]}`"
        parts = [*suite["subsets"].values(), *suite["averages"].values()]
        if missing := {suite["metric"], "low", "high"} - set.intersection(*(set(part) for part in parts)):
            raise ValueError(f"{where}: a subset or average has no {' and no '.join(sorted(missing))}. {REMEDY}")
        for part in parts:
            value, low, high = (part[key] for key in (suite["metric"], "low", "high"))
            is_missing = {value is None, low is None, high is None}
            check_json([value, low, high], list[Share | None], where, REMEDY)
            if len(is_missing) > 1 or (value is not None and not low - 1e-9 <= value <= high + 1e-9):
                raise ValueError(f"{where}: {shown(value)} is outside of its interval {shown([low, high])}. {REMEDY}")
        for part in (*parts, suite["steps"]):
            for key, value in part.items():
                check_json({key: value}, dict[str, Count if key.startswith("num_") else Share | None], where, REMEDY)


def _read_selection(folder: Path, name: str, values: dict[str, Any]) -> Result:
    """Read the results of a selection. Solutions are scored with the first aggregate, if it is a built-in one."""
    check_json({"hacking_gap": values["hacking_gap"]}, dict[str, dict[str, dict]], folder / RESULTS, REMEDY)
    for curve, gap in values["hacking_gap"].items():
        if missing := [key for key in GAP_KEYS if key not in gap]:
            raise ValueError(
                f"{folder / RESULTS}: {missing} are missing in the hacking gap of {shown(curve)}. The results may have been written by "
                "an earlier version, with different intervals. Run the command again with --overwrite."
            )
    check_values(values, folder / RESULTS)
    file = folder / "candidates.jsonl"
    if not file.is_file():  # a step search has one file for each N
        files = {int(path.stem.rpartition("-n")[2]): path for path in folder.glob("candidates-n*.jsonl")}
        if not files:
            raise FileNotFoundError(
                f"{folder}: found {RESULTS}, but no candidates.jsonl or candidates-n*.jsonl. The report needs the candidates to check "
                "that results are for the same problems. Copy the whole folder."
            )
        file = files[max(files)]
    rows = []
    for where, row in read_json_lines(file, REMEDY):
        check_json(row, SavedProblem, where, REMEDY)
        rows.append(row)
    if values["strategy"] in ("best_of_n", "evaluate") and len(rows) != values["num_problems"]:
        raise ValueError(f"{file}: found {len(rows)} problems, but {RESULTS} has {values['num_problems']}. {REMEDY}")
    has_prefixes = "prefix_column" in values["settings"]  # a problem can occur with several prefixes
    problems = frozenset(
        _digest(row["problem"], row["answer"], *([row["problem_id"]] if has_prefixes else ())) for row in rows
    )
    aggregates = values["settings"].get("aggregate")  # a string for a step search, a list for best-of-N
    used = aggregates[0] if isinstance(aggregates, list) and aggregates else aggregates
    check_json(used, str | None, f"{folder / RESULTS}: `settings.aggregate`", REMEDY)
    found: dict[str, list[float]] = {"right": [], "wrong": []}
    for candidate, graded in ((one, row.get("graded")) for row in rows for one in row["candidates"]):
        is_wrong = candidate["answer"] is None and not graded  # no answer is wrong
        if used in AGGREGATES and candidate["scores"] and (candidate["correct"] is not None or is_wrong):
            found["right" if candidate["correct"] else "wrong"].append(aggregate(candidate["scores"], used))
    scores = {f"solutions ({used} of the step scores)": found} if any(found.values()) else {}
    return Result(folder.as_posix(), name, "selection", values, problems, scores=scores)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def problem_groups(results: Sequence[Result]) -> list[list[Result]]:
    """Group selection results by their problems. Only results on the same problems can be compared."""
    groups: dict[frozenset[str], list[Result]] = {}
    for result in results:
        if result.kind == "selection":
            groups.setdefault(result.problems, []).append(result)
    return list(groups.values())


def notices(results: Sequence[Result]) -> list[str]:
    """Return the notices at the top of the report: warnings, and results that cannot be compared."""
    found = []
    for group, other in combinations(problem_groups(results), 2):
        mine, theirs = group[0].problems, other[0].problems
        names = (", ".join(result.name for result in one) for one in (group, other))
        found.append(
            f"{' and '.join(names)} have different problems ({len(mine):,} and {len(theirs):,}, "
            f"{len(mine & theirs):,} in common). Their accuracies cannot be compared and are shown separately."
        )
    found += [
        f"{result.name}: {estimate_words(result.values['strategy'], {})}"
        for result in results
        if result.kind == "selection"
        and result.values["strategy"] == "best_of_n"
        and not result.values.get("estimate")
    ]
    found += [f"{result.name}: {warning}" for result in results for warning in result.values.get("warnings", ())]
    different = []
    for result, other in combinations([result for result in results if result.kind == "benchmark"], 2):
        for suite in result.solutions.keys() & other.solutions.keys():
            mine, theirs = result.solutions[suite], other.solutions[suite]
            if mine != theirs:
                different.append(
                    f"{result.name} and {other.name} scored different solutions of {suite} ({len(mine):,} and "
                    f"{len(theirs):,}, {len(mine & theirs):,} in common). They cannot be compared."
                )
    return found + sorted(different)


def verdict(result: Result, curve: str) -> Verdict:
    """
    Return the verdict on whether more candidates make the selection worse.

    Args:
        result ([`Result`]):
            Results of a selection.
        curve (`str`):
            Name of a curve with a hacking gap.

    Returns:
        [`Verdict`]: [`hacking_verdict`] of the curve. Its reasons also compare the curve with majority vote and with a
        single candidate.
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
            reasons.append(f"Better than {words}.")
        elif last["high"] < other["low"]:
            reasons.append(f"Worse than {words}.")
        else:
            reasons.append(f"Not clearly different from {words}.")
    return replace(found, reasons=[*found.reasons, *reasons])


def headline_verdict(result: Result) -> Verdict:
    """Return the verdict on the main curve of a reward model. Its reasons also list other curves that are hacked."""
    if result.headline is None:
        return no_verdict("these results have no curve of a reward model")
    found = verdict(result, result.headline)
    others = [curve for curve in result.values["hacking_gap"] if curve != result.headline]
    hacked = [result.label(curve) for curve in others if verdict(result, curve).answer == "yes"]
    if not hacked:
        return found
    return replace(found, reasons=[*found.reasons, f"Hacked when selected by {'; '.join(hacked)}."])


def curve_label(name: str) -> str:
    """
    Return the display name of a curve.

    Example:

    ```python
    >>> curve_label("weighted_vote/min")
    'weighted vote, min'
    ```
    """
    return BASELINES.get(name, name.replace("best_of_n", "best-of-N").replace("_", " ").replace("/", ", "))


def baselines(group: Sequence[Result]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the majority vote and pass@N curves of a group. Results with the same candidates share one curve."""
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
    """Return whether a selection has calibration data."""
    bins = (result.values.get("calibration") or {}).get("bins") or ()
    return any(one["count"] for one in bins)
