"""Solutions of the benchmarks of judging, from the files and datasets that hold them."""

import codecs
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...data.sources import DatasetRows, JsonLines


class Place(NamedTuple):
    """Where a row stands: file and line (or source and row) for messages, the `name` of file or split, the `row` from 0."""

    where: str
    name: str
    row: int


@dataclass(frozen=True)
class Solution:
    """
    A solution that a benchmark has judged.

    Args:
        where (`str`):
            File and line, or row, it was read from.
        subset (`str`):
            Part of the benchmark that it belongs to.
        id (`str`):
            Its name in the benchmark.
        problem (`str`):
            The problem, as the reward model is shown it.
        steps (`list[str]`):
            S step texts.
        labels (`list[int | None]`):
            For each step 1 if it is right, 0 if it is wrong, `None` if the benchmark does not say.
        origin (`str`):
            The problem that it goes back to. Solutions with one origin are drawn together in a bootstrap, and fall into
            one part when rows are split.
    """

    where: str
    subset: str
    id: str
    problem: str
    steps: list[str]
    labels: list[int | None]
    origin: str

    @property
    def first_error(self) -> int:
        """Index of the first wrong step, -1 if there is none."""
        return self.labels.index(0) if 0 in self.labels else -1


@dataclass(frozen=True)
class Benchmark:
    """
    What differs between the benchmarks of judging.

    Args:
        name (`str`):
            Name of the suite.
        columns (`tuple[str, ...]`):
            Columns that each row has, and that tell it from the rows of other suites.
        parse (`Callable`):
            `(record, place, notes) -> list[Solution]`: what one row holds. Oddities that are passed over are counted in
            `notes`.
        tally (`Callable`):
            `(solution, scores, threshold) -> tuple`: four counts, whose sums over solutions are all that the metrics need.
        outcomes (`tuple`):
            For each of the two kinds that are judged (with and without an error), the counts of one that is judged rightly and of
            one that is judged wrongly. Every tally is a sum of these four.
        summarize (`Callable`):
            `(sums) -> dict`: metrics from the sums of each subset, shape `(..., 4)`, as
            `{"subsets": {name: {metric: array}}, "averages": {name: {metric: array}}}`.
        metric (`str`):
            The metric of the benchmark, which gets an interval.
        main (`str`):
            The average that stands for the whole.
    """

    name: str
    columns: tuple[str, ...]
    parse: Callable[[dict[str, Any], Place, Counter], list[Solution]]
    tally: Callable[[Solution, Sequence[float], float], tuple[int, int, int, int]]
    outcomes: tuple[tuple[tuple[int, int, int, int], tuple[int, int, int, int]], ...]
    summarize: Callable[[dict[str, Any]], dict[str, dict[str, dict[str, Any]]]]
    metric: str
    main: str


@dataclass
class Reading:
    """Solutions of a suite, the `sources` they come from, and a count of what was passed over, by reason."""

    solutions: list[Solution]
    sources: list[str]
    notes: Counter


def read_suites(suites: Sequence[Benchmark], sources: Sequence[str]) -> dict[str, Reading]:
    """
    Read the data of suites. Which suite a source belongs to shows in the columns of its first row.

    Args:
        suites (`Sequence[Benchmark]`):
            The suites to read.
        sources (`Sequence[str]`):
            JSON Lines files, files that hold one JSON array of rows, and directories or Hub names of datasets, all splits
            of which are read.

    Returns:
        `dict[str, Reading]`: One for each suite.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a source belongs to none of the suites, a suite has no source, a row is not valid, or two rows
            of a subset have one id.
    """
    found = {suite.name: Reading([], [], Counter()) for suite in suites}
    for source in sources:
        suite = None
        for place, record in _records(source):
            suite = suite or _suite_of(record, place.where, suites)
            missing = [column for column in suite.columns if column not in record]
            if missing:
                raise ValueError(
                    f"{place.where}: found the columns {sorted(record)}, and no {missing} that rows of {suite.name} have. Complete "
                    "the row, or remove it."
                )
            found[suite.name].solutions += suite.parse(record, place, found[suite.name].notes)
        if suite is None:
            raise ValueError(f"{source}: there is no row in it. Check the source.")
        found[suite.name].sources.append(source)
    for name, reading in found.items():
        if not reading.sources:
            raise ValueError(f"no data for the suite {name}: add a source to --data whose rows have its columns.")
        _check_ids(reading.solutions)
    return found


def _records(source: str) -> Iterator[tuple[Place, dict[str, Any]]]:
    path = Path(source)
    if path.is_file() and _starts_an_array(path):
        yield from _array_records(path)
    elif path.is_file() or source.endswith((".json", ".jsonl")):
        for row, (where, record) in enumerate(_rows(JsonLines([source]))):
            yield Place(where, path.stem, row), record
    else:
        from datasets import load_dataset

        # A cache of its own: for a local directory, the shared one may hold the rows of another of the same name.
        with tempfile.TemporaryDirectory() as cache:
            for split, dataset in load_dataset(source, cache_dir=cache if path.is_dir() else None).items():
                for row, (where, record) in enumerate(_rows(DatasetRows(dataset))):
                    yield Place(f"{source}, split {split}: {where}", split, row), record


def _rows(source: JsonLines | DatasetRows) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((where, record) for chunk in source.chunks() for where, _, record in source.read(chunk))


def _starts_an_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _array_records(path: Path) -> Iterator[tuple[Place, dict[str, Any]]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). The file may be truncated: fetch it again.") from error
    for row, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, row {row}: found a JSON {type(record).__name__}, expected an object.")
        yield Place(f"{path}, row {row}", path.stem, row), record


def _suite_of(record: dict[str, Any], where: str, suites: Sequence[Benchmark]) -> Benchmark:
    for suite in suites:
        if set(suite.columns) <= record.keys():
            return suite
    expected = "; ".join(f"{suite.name}: {', '.join(suite.columns)}" for suite in suites)
    raise ValueError(
        f"{where}: found the columns {sorted(record)}, which are those of no suite asked for. Expected {expected}. Add the "
        "suite of these rows to --suite, leave the source out, or rename its columns."
    )


def _check_ids(solutions: Sequence[Solution]) -> None:
    places: dict[tuple[str, str], str] = {}
    for solution in solutions:
        key = solution.subset, solution.id
        if key in places:
            raise ValueError(
                f"{solution.where}: the id {solution.id!r} of {solution.subset} stands at {places[key]} too, and would "
                "count twice. Give each source once, or remove one of the rows."
            )
        places[key] = solution.where


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    """A column that holds a text."""
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: `{column}` is {value!r}, expected a non-empty string. Mend the row, or remove it.")
    return value


def steps_of(record: dict[str, Any], column: str, where: str) -> list[str]:
    """A column that holds the steps of a solution."""
    steps = record[column]
    if not isinstance(steps, list) or not steps:
        raise ValueError(f"{where}: `{column}` is {steps!r}, expected a list of steps. Mend the row, or remove it.")
    for i, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(
                f"{where}: `{column}[{i}]` is {step!r}, expected a non-empty string. Mend the row, or remove it."
            )
    return steps


def first_error_labels(
    value: Any, steps: Sequence[str], none: int | None, column: str, where: str
) -> list[int | None]:
    """Labels of steps from the index of the first wrong one, `none` standing for no error: what follows it is not known."""
    if value == none:
        return [1] * len(steps)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(steps):
        raise ValueError(
            f"{where}: `{column}` is {value!r}, expected the index of the first wrong one of {len(steps)} steps, or "
            f"{json.dumps(none)} for no error. Mend the row, or remove it."
        )
    return [1] * value + [0] + [None] * (len(steps) - value - 1)
