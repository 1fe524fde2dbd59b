"""What a benchmark of step judgements is made of, and how its solutions are read from files and datasets."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...data.faults import RowError, RowFaults
from ...data.problems import parts_warning, unused_parts
from ...data.sources import DatasetRows, JsonLines, all_rows, is_json_file, loaded_dataset


class Place(NamedTuple):
    """
    Where a row stands: file and line (or source and row) for messages, the `name` of file or split, the `row` from 0, and
    the number of the `first_step` in its labels.
    """

    where: str
    name: str
    row: int
    first_step: int = 0


@dataclass(frozen=True)
class Solution:
    """
    A solution whose steps a benchmark has labelled.

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
        """Index of the first wrong step, -1 if no step is wrong."""
        return self.labels.index(0) if 0 in self.labels else -1


def as_it_is(record: dict[str, Any]) -> dict[str, Any]:
    """The record."""
    return record


@dataclass(frozen=True)
class Suite:
    """
    What differs between the benchmarks.

    Args:
        name (`str`):
            Name of the suite.
        columns (`tuple[str, ...]`):
            Columns that each row has, and by which the rows of a suite are recognised.
        parse (`Callable`):
            `(record, place, notes) -> list[Solution]`: what one row holds. Oddities that are passed over are counted in
            `notes`. Raises [`RowError`] for a row that cannot be used.
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
        adapt (`Callable`, *optional*):
            `record -> record`: brings rows of other benchmarks into the columns of this one. It returns rows that it does not
            know as they are.
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
            The solutions.
        sources (`list[str]`):
            The sources that they come from.
        notes (`Counter`):
            What was passed over within rows, by reason.
        faults ([`RowFaults`]):
            Rows that were left out because of a fault, and those that were kept with one.
        unused (`Counter`):
            Columns that may carry a part of the problem and are not in its text, with the number of rows that have them.
        num_rows (`int`):
            Rows read, those that were left out too.
    """

    solutions: list[Solution]
    sources: list[str]
    notes: Counter
    faults: RowFaults = field(default_factory=RowFaults)
    unused: Counter = field(default_factory=Counter)
    num_rows: int = 0

    def warnings(self) -> list[str]:
        """What the user should know of the rows."""
        return [*self.faults.warnings(), *parts_warning(self.unused)]

    def counts(self) -> dict[str, int]:
        """What was passed over in rows, left out and kept with a fault, by reason."""
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
    Read the data of suites. The columns of its first row tell which suite a source belongs to.

    A row with a fault does not stop the others. As in the authors' scripts, a blank step is scored as given, so that no
    index moves, and rows of one id that differ all count. Left out are rows without a problem, without steps or with labels
    that cannot be read, and rows that another source has given already.

    Args:
        suites (`Sequence[Suite]`):
            The suites to read.
        sources (`Sequence[str]`):
            Files with JSON Lines or a JSON array, and directories or Hub names of datasets, of which all splits are read.
        columns (`Mapping[str, str]`, *optional*):
            New names of columns, such as `{"problem": "question"}`. See [`~data.sources.rename_columns`].
        first_step (`int`, *optional*, defaults to `0`):
            Number of the first step in the labels of first-error benchmarks: 0, or 1 where labels count from 1 and 0 means that no step is wrong.
        strict (`bool`, *optional*, defaults to `False`):
            Raise the first fault of a row.

    Returns:
        `dict[str, SuiteData]`: One for each suite.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a source is given twice or belongs to none of the suites, a suite has no source, no row of a source can be
            used, or, with `strict`, a row has a fault.
    """
    found = {suite.name: SuiteData([], [], Counter(), RowFaults(strict)) for suite in suites}
    paths = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
    for i, source in enumerate(sources):
        if paths[i] in paths[:i]:
            raise ValueError(
                f"{source}: the source is given twice, and its rows would count twice. Give each source once."
            )
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
                        f"found the columns {sorted(record)}, and no {missing} that rows of {suite.name} have. Complete the row, or "
                        "remove it.",
                    )
                for solution in suite.parse(record, place._replace(first_step=first_step), data.notes):
                    if not _is_new(solution, source, seen, suite.name, data.faults):
                        continue
                    data.solutions.append(solution)
                    for i, step in enumerate(solution.steps):
                        if not step.strip():
                            message = f"step {i} of {solution.id!r} is {step!r}, expected a non-empty string."
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
            raise ValueError(f"{source}: no row of it can be used. The first fault: {found[suite.name].faults.first}")
        found[suite.name].sources.append(source)
    for name, data in found.items():
        if not data.sources:
            raise ValueError(f"no data for the suite {name}: add an input whose rows have its columns.")
    return found


def _is_new(
    solution: Solution,
    source: str,
    seen: dict[tuple[str, str, str], tuple[Solution, str]],
    suite: str,
    faults: RowFaults,
) -> bool:
    """Whether a solution counts. One that an earlier source has does not; others with the id of an earlier one are counted."""
    first, its_source = seen.setdefault((suite, solution.subset, solution.id), (solution, source))
    if first is solution:
        return True
    is_same = (first.problem, first.steps, first.labels) == (solution.problem, solution.steps, solution.labels)
    message = f"the id {solution.id!r} of {solution.subset} stands at {first.where} too"
    if is_same and its_source != source:
        faults.leave_out(
            RowError(
                "in_an_earlier_source", solution.where, f"{message}, and would count twice. Give each source once."
            )
        )
        return False
    content = "the same content" if is_same else "other content"
    faults.keep(
        RowError(
            "repeated_id", solution.where, f"{message}, with {content}, and would count twice. Remove one of the rows."
        )
    )
    return True


def _records(source: str, columns: Mapping[str, str] | None) -> Iterator[tuple[Place, dict[str, Any]]]:
    if is_json_file(source):
        name = Path(source.removesuffix(".gz")).stem
        for row, (where, record) in enumerate(all_rows(JsonLines([source], columns))):
            yield Place(where, name, row), record
        return
    with loaded_dataset(source) as splits:
        for split, dataset in splits.items():
            for row, (where, record) in enumerate(all_rows(DatasetRows(dataset, columns))):
                yield Place(f"{source}, split {split}: {where}", split, row), record


def _unknown(record: dict[str, Any], where: str, suites: Sequence[Suite]) -> RowError:
    expected = "; ".join(f"{suite.name}: {', '.join(suite.columns)}" for suite in suites)
    return RowError(
        "missing_columns",
        where,
        f"found the columns {sorted(record)}, which belong to none of the suites in --suite. Expected {expected}. Add the "
        "suite of these rows to --suite, leave the source out, or name its columns with --columns, such as --columns problem=question "
        "steps=solution_steps.",
    )


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    """A column that holds a text."""
    value = record[column]
    if not isinstance(value, str) or not value.strip():
        raise RowError(
            "no_problem",
            where,
            f"`{column}` is {value!r}, expected a non-empty string. Correct the row, or remove it.",
        )
    return value


def steps_of(record: dict[str, Any], column: str, where: str) -> list[str]:
    """A column that holds the steps of a solution, blank ones too."""
    steps = record[column]
    if not isinstance(steps, list) or not steps:
        raise RowError(
            "no_steps", where, f"`{column}` is {steps!r}, expected a list of steps. Correct the row, or remove it."
        )
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            raise RowError(
                "bad_step", where, f"`{column}[{i}]` is {step!r}, expected a string. Correct the row, or remove it."
            )
    return steps


def first_error_labels(
    value: Any, steps: Sequence[str], none: int | None, column: str, place: Place
) -> list[int | None]:
    """
    Labels of steps from the number of the first wrong one; what follows it is not known.

    Args:
        value (`int` or `None`):
            Number of the step, from `place.first_step`, or what stands for no error: `none`, or 0 where labels count from 1.
            A whole float counts as an integer and NaN as `None`, which is how tables with missing values have them.
        steps (`Sequence[str]`):
            The S steps.
        none (`int` or `None`):
            What stands for no error in this benchmark.
        column (`str`):
            Name of the column, for messages.
        place ([`Place`]):
            The place of the row.
    """
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    first = place.first_step
    no_error = (none, *range(first))
    if not isinstance(value, bool) and value in no_error:
        return [1] * len(steps)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value - first < len(steps):
        hint = " Do the labels count from 1? Then pass --first_step 1." if not first and value == len(steps) else ""
        raise RowError(
            "bad_label",
            place.where,
            f"`{column}` is {value!r}, expected the index of the first wrong one of {len(steps)} steps"
            f"{', counted from 1' if first else ''}, or {' or '.join(map(json.dumps, no_error))} for no error. Correct the row, or "
            f"remove it.{hint}",
        )
    index = value - first
    return [1] * index + [0] + [None] * (len(steps) - index - 1)
