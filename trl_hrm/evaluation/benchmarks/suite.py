"""Definition of a benchmark for step reward models, and reading of its solutions from files and datasets."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.benchmark_rows import Place, Solution
from ...data.faults import RowError, RowFaults
from ...data.problems import parts_warning, unused_parts
from ...data.sources import SUFFIXES, DatasetRows, JsonLines, all_rows, is_json_file, loaded_dataset
from ...io import shown


_SPLIT_NAME = re.compile(r"(?<![a-z])(?:train|valid|val|dev|test|eval)(?:ing|idation|uation)?(?![a-z])", re.IGNORECASE)


def as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record unchanged."""
    return record


@dataclass(frozen=True)
class Suite:
    """
    Definition of a benchmark.

    Args:
        name (`str`):
            Name of the suite.
        columns (`tuple[str, ...]`):
            Required columns. Rows of a suite are identified by them.
        parse (`Callable`):
            `(record, place, notes) -> list[Solution]`: parses one row. Counts anomalies that it ignores in `notes`.
            Raises [`RowError`] if the row cannot be used.
        tally (`Callable`):
            `(solution, scores, threshold) -> tuple`: returns four counts. The metrics are computed from their sums
            over solutions.
        outcomes (`tuple`):
            For each of the two kinds of predicted items (with and without an error), the tally of a correct prediction
            and of an incorrect one. Every tally is a sum of these four.
        summarize (`Callable`):
            `(sums) -> dict`: computes metrics from the sums of each subset, shape `(..., 4)`, and returns
            `{"subsets": {name: {metric: array}}, "averages": {name: {metric: array}}}`.
        metric (`str`):
            Name of the main metric, which gets an interval.
        main (`str`):
            Name of the main average.
        adapt (`Callable`, *optional*):
            `record -> record`: converts rows of related benchmarks to the columns of this one. Returns all other rows
            unchanged.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any], Place, Counter], list[Solution]]
    tally: Callable[[Solution, Sequence[float], float], tuple[int, int, int, int]]
    outcomes: tuple[tuple[tuple[int, int, int, int], tuple[int, int, int, int]], ...]
    summarize: Callable[[dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]
    metric: str
    main: str
    adapt: Callable[[dict[str, Any]], dict[str, Any]] = as_it_is


@dataclass
class SuiteData:
    """
    Solutions of a suite.

    Args:
        solutions (`list[Solution]`):
            Solutions that were read.
        sources (`list[str]`):
            Sources of the solutions.
        notes (`Counter`):
            Number of anomalies in rows that were ignored, by reason.
        faults ([`RowFaults`]):
            Invalid rows that were dropped, and rows that were kept although they have a fault.
        unused (`Counter`):
            Unused columns that may be part of the problem, with the number of rows that have them.
        num_rows (`int`):
            Number of rows read, including dropped ones.
    """

    solutions: list[Solution]
    sources: list[str]
    notes: Counter
    faults: RowFaults = field(default_factory=RowFaults)
    unused: Counter = field(default_factory=Counter)
    num_rows: int = 0

    def warnings(self) -> list[str]:
        """Return warnings about the rows."""
        return [*self.faults.warnings(), *parts_warning(self.unused)]

    def counts(self) -> dict[str, int]:
        """Return the number of ignored anomalies, dropped rows, and rows that were kept although they have a fault."""
        left_out = {f"rows_left_out_{reason}": len(places) for reason, places in self.faults.left_out.items()}
        kept = {f"rows_kept_{reason}": len(places) for reason, places in self.faults.kept.items()}
        return {**self.notes, **left_out, **kept}


def read_suites(
    suites: Sequence[Suite],
    sources: Sequence[str],
    columns: Mapping[str, str] | None = None,
    first_step: int = 0,
    strict: bool = False,
) -> dict[str, SuiteData]:
    """
    Read the data of suites. The suite of a source is identified by the columns of its first row.

    Invalid rows do not stop reading. As in the authors' scripts, blank steps are scored like others, so that indices
    stay valid. Different rows with the same id all count. Rows without a problem, without steps or with invalid
    labels are dropped, and so are duplicates of rows in an earlier source.

    Args:
        suites (`Sequence[Suite]`):
            Suites to read.
        sources (`Sequence[str]`):
            Files with JSON Lines or a JSON array, and folders or Hub ids of datasets. All splits of a dataset are
            read.
        columns (`Mapping[str, str]`, *optional*):
            Names of columns in the data, such as `{"problem": "question"}`. See [`~data.sources.rename_columns`].
        first_step (`int`, *optional*, defaults to `0`):
            Number of the first step in the labels of first-error benchmarks. Use 1 if labels count from 1 and 0 means
            that no step is wrong.
        strict (`bool`, *optional*, defaults to `False`):
            Whether to raise an error at the first invalid row.

    Returns:
        `dict[str, SuiteData]`: Data of each suite, by name.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a source is given twice or belongs to none of the suites, a suite has no source, no row of a source can be
            used, or, with `strict`, a row is invalid.
    """
    found = {suite.name: SuiteData([], [], Counter(), RowFaults(strict)) for suite in suites}
    paths = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
    for i, source in enumerate(sources):
        if paths[i] in paths[:i]:
            raise ValueError(f"{source}: the source is given twice. Give each source once.")
    seen: dict[tuple[str, str, str], tuple[Solution, str]] = {}
    for source in sources:
        suite, before, unknown = None, 0, []
        for place, record in _records(source, columns):
            if suite is None:
                suite = next((one for one in suites if set(one.columns) <= one.adapt(record).keys()), None)
                if suite is None:
                    unknown.append(_unknown(record, place.where, suites))
                    continue
                before = len(found[suite.name].solutions)
                for fault in unknown:
                    found[suite.name].faults.leave_out(fault)
                found[suite.name].num_rows += len(unknown)
            data = found[suite.name]
            data.num_rows += 1
            record = suite.adapt(record)
            try:
                missing = [column for column in suite.columns if column not in record]
                if missing:
                    raise RowError(
                        "missing_columns",
                        place.where,
                        f"found the columns {shown(sorted(record), 200)}, but {missing} are missing, which rows of {suite.name} require. Complete "
                        "the row, or remove it.",
                    )
                for solution in suite.parse(record, place._replace(first_step=first_step), data.notes):
                    if not _is_new(solution, source, seen, suite.name, data.faults):
                        continue
                    data.solutions.append(solution)
                    for i, step in enumerate(solution.steps):
                        if not step.strip():
                            message = (
                                f"step {i} of {shown(solution.id)} is {shown(step)}, expected a non-empty string."
                            )
                            data.faults.keep(
                                RowError("blank_step", solution.where, f"{message} Correct the row, or remove it.")
                            )
            except RowError as fault:
                data.faults.leave_out(fault)
                continue
            data.unused.update(unused_parts(record, used=suite.columns, has_choices=False))
        if suite is None:
            raise unknown[0] if unknown else ValueError(f"{source}: found no rows. Check the source.")
        if len(found[suite.name].solutions) == before:
            raise ValueError(f"{source}: no row can be used. The first invalid row: {found[suite.name].faults.first}")
        found[suite.name].sources.append(source)
    for name, data in found.items():
        if not data.sources:
            raise ValueError(f"no data for the suite {name}. Add an input with its rows, or remove it from --suite.")
    return found


def _is_new(
    solution: Solution,
    source: str,
    seen: dict[tuple[str, str, str], tuple[Solution, str]],
    suite: str,
    faults: RowFaults,
) -> bool:
    """
    Return whether a solution counts. Duplicates of a solution in an earlier source do not. Other solutions with a
    repeated id do, and are reported.
    """
    first, its_source = seen.setdefault((suite, solution.subset, solution.id), (solution, source))
    if first is solution:
        return True
    is_same = (first.problem, first.steps, first.labels) == (solution.problem, solution.steps, solution.labels)
    message = f"the id {shown(solution.id)} of {solution.subset} already occurs at {first.where}"
    if is_same and its_source != source:
        faults.leave_out(
            RowError(
                "in_an_earlier_source", solution.where, f"{message}, with the same content. Give each source once."
            )
        )
        return False
    content = "the same content" if is_same else "different content"
    faults.keep(
        RowError("repeated_id", solution.where, f"{message}, with {content}. Both rows count. Remove one of them.")
    )
    return True


def _records(source: str, columns: Mapping[str, str] | None) -> Iterator[tuple[Place, dict[str, Any]]]:
    if is_json_file(source):
        name = Path(source.removesuffix(".gz")).stem
        for row, (where, record) in enumerate(all_rows(JsonLines([source], columns))):
            yield Place(where, name, row), record
        return
    if files := _files_without_splits(source):
        for file in files:
            yield from _records(str(file), columns)
        return
    with loaded_dataset(source) as splits:
        for split, dataset in splits.items():
            for row, (where, record) in enumerate(all_rows(DatasetRows(dataset, columns))):
                yield Place(f"{source}, split {split}: {where}", split, row), record


def _files_without_splits(source: str) -> list[Path]:
    """
    Return the files of a folder of JSON files that are not named after splits, such as the `gsm8k.json` of ProcessBench. `load_dataset` would
    read all of them as one split.
    """
    if not Path(source).is_dir():
        return []
    # a dataset card or a folder decides about splits, a LICENSE does not
    files = [file for file in sorted(Path(source).iterdir()) if file.suffix or file.is_dir()]
    is_plain = all(file.name.endswith(SUFFIXES) and not _SPLIT_NAME.search(file.name) for file in files)
    return files if is_plain else []


def _unknown(record: dict[str, Any], where: str, suites: Sequence[Suite]) -> RowError:
    expected = "; ".join(f"{suite.name}: {', '.join(suite.columns)}" for suite in suites)
    return RowError(
        "missing_columns",
        where,
        f"found the columns {shown(sorted(record), 200)}, which match none of the suites in --suite. Expected {expected}. Add the suite of "
        "these rows to --suite, remove the source, or map its columns with --columns, such as --columns problem=question "
        "steps=solution_steps.",
    )
