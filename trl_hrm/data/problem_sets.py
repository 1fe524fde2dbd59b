r"""
Readers of problems with reference answers, from files and datasets. These formats are supported:

```json
{"problem": "What is 1 + 2 + 3?", "answer": "6"}
{"question": "What is 1 + 2 + 3?", "answer": "1 + 2 = 3 and 3 + 3 = 6.\n#### 6"}
{"problem": "What is 1 + 2 + 3?", "solution": "It is $\\boxed{6}$.", "answer": "6", "unique_id": "test/sums/1.json"}
{"question": {"problem": "What is 1 + 2 + 3?", "ground_truth_answer": "6"}, "label": {}}
{"Problem": "What is 1 + 2 + 3?", "Answer": 6}
{"question": "What is 1 + 2 + 3?", "final_answer": ["6"]}
{"prompt": [{"role": "user", "content": "What is 1 + 2 + 3?"}], "reward_model": {"style": "rule", "ground_truth": "6"}}
{"question": "What is 1 + 2 + 3?", "choices": ["5", "6"], "answer": "B"}
```
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..grading import extract_answer
from ..io import shown
from ..search.tree import Problem, make_id
from ..terminal import one_line
from .faults import RowError, RowFaults
from .problems import (
    CHOICE_COLUMNS,
    TEXT_COLUMNS,
    choices_of,
    exclusion_key,
    find_column,
    parts_warning,
    problem_key,
    problem_text,
    same_answer,
    unused_parts,
)
from .sources import NOTHING, DatasetRows, JsonLines, all_rows, column_paths, is_json_file, loaded_dataset, look_up


KEYS = {
    "plain": "`problem` (or `prompt`, `question`), `answer` (or `final_answer`, `reward_model.ground_truth`, or `solution` with the "
    "answer in its last `\\boxed`) and, optionally, `problem_id` (or `id`, `unique_id`)",
    "gsm8k": "`question` and `answer`, whose last line is `#### ` and the answer",
    "math": "`problem`, `answer` (or `solution`, with the answer in its last `\\boxed`) and, optionally, `unique_id`",
    "prm800k": "`question` with `problem` and `ground_truth_answer`",
}
FORMATS = ("auto", *KEYS)
NAMED_SETS = {  # dataset on the Hub, its configuration and its default split
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
}
NUM_SHOWN_VALUES = 5  # maximum number of values of a column in a message
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "ground_truth_answer",
    "ground_truth",
    "reference_answer",
    "expected_answer",
    "answerKey",
)
# Values that datasets use for a missing answer: the first two are from NuminaMath, the others from tables.
_PLACEHOLDERS = ("proof", "notfound", "n/a", "nan", "null")
_OWN_TEXT = {"gsm8k": ("question",), "math": ("problem",), "prm800k": ("problem",)}
ID_COLUMNS = ("problem_id", "id", "unique_id")


@dataclass
class ProblemSet:
    """
    Problems to annotate, with the counts of the records that they were read from. `num_records` is the sum of `len(problems)`,
    `num_filtered`, `num_repeated`, `num_excluded` and `faults.num_left_out`.

    Args:
        problems (`list[Problem]`):
            Problems, in the order of the source. Their ids are unique. No two of them have the same prefix and, ignoring
            whitespace, the same text.
        num_records (`int`):
            Number of records read.
        num_repeated (`int`):
            Number of records that repeat the problem, prefix and answer of an earlier record.
        num_excluded (`int`):
            Number of records whose problem is in `exclude`.
        num_to_exclude (`int`):
            Number of problems in `exclude`.
        num_filtered (`int`):
            Number of records that do not have the values in `where`.
        num_incomplete (`int`):
            Number of filtered records in which a column of `where` is missing.
        where (`dict[str, str]`):
            Required value of each column.
        faults ([`RowFaults`]):
            Invalid records that were dropped, and records that were kept although they have a fault.
        unused (`Counter`):
            Number of records per column that may contain a part of the problem and is not part of its text.
    """

    problems: list[Problem]
    num_records: int = 0
    num_repeated: int = 0
    num_excluded: int = 0
    num_to_exclude: int = 0
    num_filtered: int = 0
    num_incomplete: int = 0
    where: dict[str, str] = field(default_factory=dict)
    faults: RowFaults = field(default_factory=RowFaults)
    unused: Counter = field(default_factory=Counter)

    @property
    def where_words(self) -> str:
        """The required values, as on the command line."""
        return " ".join(f"{name}={value}" for name, value in self.where.items())

    def describe(self) -> str:
        """Return a line with the counts, and a line for each warning."""
        line = (
            f"{self.num_records:,} records: {len(self.problems):,} problems, {self.num_repeated:,} repeated, "
            f"{self.num_excluded:,} excluded, {self.faults.num_left_out:,} dropped"
        )
        if self.where:
            line += f", {self.num_filtered:,} without {self.where_words}"
        line += "."
        warnings = [*self.faults.warnings(), *parts_warning(self.unused)]
        if self.num_incomplete:
            warnings.append(
                f"{self.num_incomplete:,} of the {self.num_filtered:,} records without {self.where_words} do not have this column. Check "
                "that they are not needed."
            )
        if self.num_to_exclude and not self.num_excluded:
            warnings.append(
                f"no record was excluded: none has one of the {self.num_to_exclude:,} problems to exclude. Check that --exclude names "
                "the right files."
            )
        return "\n".join([line, *(f"warning: {one_line(warning)}" for warning in warnings)])


@dataclass
class _Entry:
    """A problem, the key of its text, and the number of records that repeat it."""

    where: str
    problem: Problem
    key: bytes
    num_repeated: int = 0


def read_problems(
    source: str,
    format: str = "auto",
    split: str | None = None,
    config: str | None = None,
    limit: int | None = None,
    exclude: frozenset[bytes] = frozenset(),
    prefix_column: str | None = None,
    prefix_fault: Callable[[str], str | None] | None = None,
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
    where: Mapping[str, str] | None = None,
) -> ProblemSet:
    """
    Read problems and their reference answers.

    The id of a problem is the id in the record or, if there is none, the hash of the problem's text ([`problem_key`]), which is
    the same in every file. If the record has a prefix, a hash of the prefix is appended, so one problem with several prefixes
    becomes several problems.

    Invalid records are dropped: records without a problem, without an answer or with an ambiguous answer, and all records of a
    problem whose records have different answers. If two problems have the same id, both are kept, and a hash of its text is
    appended to the id of the later one.

    Args:
        source (`str`):
            JSON Lines or JSON file, dataset folder or Hub id, or a name in `NAMED_SETS`. A file or folder with that name takes
            precedence.
        format (`str`, *optional*, defaults to `"auto"`):
            Column format of the records: `"gsm8k"`, `"math"`, `"prm800k"`, `"plain"`, or `"auto"` to detect it from the keys of the
            first record that has a problem.
        split (`str`, *optional*):
            Dataset split to read. Ignored for files. Defaults to `"test"` for a name in `NAMED_SETS`, otherwise to `"train"`.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub, such as `main` for GSM8K. Not supported for files.
        limit (`int`, *optional*):
            Maximum number of problems. Defaults to all.
        exclude (`frozenset[bytes]`, *optional*):
            Keys of the problems to drop, with any prefix. See [`~data.problems.read_problem_keys`] and [`exclusion_key`].
        prefix_column (`str`, *optional*):
            Column with the beginning of each solution, as raw text, which a step search continues.
        prefix_fault (`Callable[[str], str | None]`, *optional*):
            Function that returns what is wrong with a prefix, or `None`. See [`~search.step_search.StepSearch.prefix_fault`].
        columns (`Mapping[str, str]`, *optional*):
            Column to read for each expected name, such as `{"problem": "Question"}`. See [`~data.sources.rename_columns`].
        strict (`bool`, *optional*, defaults to `False`):
            Whether to raise an error at the first invalid record, instead of dropping it.
        where (`Mapping[str, str]`, *optional*):
            Required value of each column, such as `{"label.finish_reason": "solution"}`. Other records are filtered before anything
            else is read from them. Columns are named as in the source or as in `columns`. Values that are not strings are compared
            as JSON: `5`, `0.5`, `true`, `null`.

    Returns:
        [`ProblemSet`]: The problems and the counts of the records.

    Raises:
        `FileNotFoundError`: If the file does not exist.
        `ValueError`: If a prefix is missing or invalid, if no problem is left, if no record has a column of `where`, or, with
            `strict`, if a record is invalid. The message has the file and line, or the row.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` is {shown(format)}. It must be one of {', '.join(FORMATS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is {limit}. It must be at least 1.")
    if source in NAMED_SETS and not Path(source).exists():
        source, own_config, own_split = NAMED_SETS[source]
        config, split = config or own_config, split or own_split
    found = ProblemSet([], num_to_exclude=len(exclude), where=dict(where or {}), faults=RowFaults(strict))
    selection = _Where(found, columns or {})
    reader = _Reader(found.faults)
    with ExitStack() as stack:
        if is_json_file(source):
            if config is not None:
                raise ValueError(
                    f"`problems_config` is {shown(config)}, but {source} is a file, which has no configurations. Remove `problems_config`."
                )
            rows = JsonLines([source], columns)
        else:
            rows = DatasetRows(stack.enter_context(loaded_dataset(source, split or "train", config)), columns, source)
        for place, record in all_rows(rows):
            found.num_records += 1
            if not selection.keeps(record):
                continue
            try:
                if format == "auto":
                    format = _format_of(record, place)
                problem, has_id = _problem(record, format, place)
            except RowError as fault:
                found.faults.leave_out(fault)
                continue
            prefix = "" if prefix_column is None else _prefix(record, prefix_column, prefix_fault, place)
            found.unused.update(unused_parts(record))
            if exclusion_key(problem.prompt) in exclude:
                found.num_excluded += 1
                continue
            reader.add(place, problem, has_id, prefix)
            if len(reader.entries) == limit:
                break
    selection.check(source)
    found.problems = [entry.problem for entry in reader.entries.values()]
    found.num_repeated = sum(entry.num_repeated for entry in reader.entries.values())
    if not found.problems:
        raise ValueError(
            f"{source}: 0 of {found.num_records} records were kept ({found.num_excluded} excluded"
            + (f", {found.num_filtered} filtered by {found.where_words}" if found.where else "")
            + (f", {found.faults.num_left_out} dropped" if found.faults.num_left_out else "")
            + "). Check the source, and the files of problems to exclude."
            + (f" The first invalid record: {found.faults.first}" if found.faults.first else "")
        )
    return found


class _Where:
    """Selects the records that have the required values, and remembers which values there are, for error messages."""

    def __init__(self, found: ProblemSet, columns: Mapping[str, str]):
        self.found = found
        self.columns = {name: name for name in found.where}
        for name in found.where:  # the reader has renamed the columns
            for new, column in sorted(columns.items(), key=lambda pair: len(pair[1])):  # the longest match wins
                if name == column or name.startswith(f"{column}."):
                    self.columns[name] = new + name.removeprefix(column)
        self.values: dict[str, dict[str, None]] = {name: {} for name in found.where}  # the first values of each column
        self.first: dict[str, Any] | None = None

    def keeps(self, record: dict[str, Any]) -> bool:
        """Return whether a record has the values, and count it if not."""
        if self.first is None:
            self.first = record
        values = {name: look_up(record, column) for name, column in self.columns.items()}
        for name, value in values.items():
            if value is not NOTHING and len(self.values[name]) < NUM_SHOWN_VALUES:
                self.values[name][shown(value)] = None
        is_kept = all(_has_value(values[name], expected) for name, expected in self.found.where.items())
        self.found.num_filtered += not is_kept
        self.found.num_incomplete += NOTHING in values.values()
        return is_kept

    def check(self, source: str) -> None:
        """
        Check that there are records with the values.

        Raises:
            `ValueError`: If a column is missing in all records, or if no record has the values.
        """
        for name, values in self.values.items():
            if not values:
                raise ValueError(
                    f"{source}: --where names {name}, but none of the {self.found.num_records:,} records has this column. The first one "
                    f"only has {', '.join(column_paths(self.first or {}))[:400]}."
                )
        if self.values and self.found.num_filtered == self.found.num_records:
            seen = "; ".join(
                f"the first values of {name} are {', '.join(values)}" for name, values in self.values.items()
            )
            raise ValueError(
                f"{source}: none of the {self.found.num_records:,} records has {self.found.where_words}, but {seen}. Correct --where."
            )


def _has_value(value: Any, expected: str) -> bool:
    if value is NOTHING or isinstance(value, str):
        return value == expected
    try:
        parsed = json.loads(expected)
    except ValueError:
        return False
    return value == parsed and isinstance(value, bool) == isinstance(parsed, bool)  # 1 is not true


class _Reader:
    """Collects the problems of all records and merges repeated ones."""

    def __init__(self, faults: RowFaults):
        self.faults = faults
        self.entries: dict[tuple[bytes, str], _Entry] = {}  # by problem and prefix
        self.answers: dict[bytes, tuple[str, str]] = {}  # answer of each problem, and where it was first found
        self.contradicted: set[bytes] = set()
        self.ids: dict[str, tuple[bytes, str]] = {}

    def add(self, where: str, problem: Problem, has_id: bool, prefix: str) -> None:
        """Add one record."""
        key = problem_key(problem.prompt)
        answer, before = self.answers.setdefault(key, (problem.answer, where))
        if key in self.contradicted or not same_answer(answer, problem.answer):
            # It is unknown which answer is right, so all records of the problem are dropped
            message = (
                f"the answer is {shown(problem.answer)}, but {before} has the same problem with the answer {shown(answer)}. Remove the wrong "
                "record."
            )
            self.faults.leave_out(RowError("several_answers", where, message))
            self.contradicted.add(key)
            for place in [place for place, entry in self.entries.items() if entry.key == key]:
                entry = self.entries.pop(place)
                for _ in range(1 + entry.num_repeated):
                    self.faults.leave_out(RowError("several_answers", entry.where, message))
            return
        if has_id:
            other, before = self.ids.setdefault(problem.problem_id, (key, where))
            if other != key:
                message = (
                    f"the id is {shown(problem.problem_id)}, but {before} has the same id for a different problem. Ids must be unique: rename "
                    "one of them."
                )
                self.faults.keep(RowError("repeated_id", where, message))
                problem = replace(problem, problem_id=f"{problem.problem_id}-{key.hex()}")
        if (key, prefix) in self.entries:
            self.entries[key, prefix].num_repeated += 1
        else:
            if prefix:
                problem_id = f"{problem.problem_id}-{make_id(prefix)}"
                problem = replace(problem, problem_id=problem_id, prefix=prefix)
            self.entries[key, prefix] = _Entry(where, problem, key)


def refuse_caseless_ids(problems: Iterable[Problem], known: Container[str], where: str) -> None:
    """
    Raise an error if a run was started by an early version, in which problem ids ignored letter case. Resuming it would search
    these problems a second time.

    Args:
        problems (`Iterable[Problem]`):
            Problems to search.
        known (`Container[str]`):
            Ids of the problems that the run has started.
        where (`str`):
            Path of the log of the run, for the error message.

    Raises:
        `ValueError`: If the run has a problem with an id of an early version.
    """
    for problem in problems:
        key, earlier = problem_key(problem.prompt).hex(), exclusion_key(problem.prompt).hex()
        if key != earlier and problem.problem_id.startswith(key):
            earlier += problem.problem_id.removeprefix(key)
            if problem.problem_id not in known and earlier in known:
                raise ValueError(
                    f"{where}: this run was started by an older version of trl_hrm, in which problem ids ignored letter case: it has "
                    f"the id {shown(earlier)} instead of {shown(problem.problem_id)}. Finish the run with that version, or use a new "
                    "--output_dir."
                )


def _format_of(record: dict[str, Any], where: str) -> str:
    if isinstance(record.get("question"), dict):
        return "prm800k"
    is_math = "problem" in record and ("unique_id" in record or "solution" in record)
    if is_math and find_column(record, ANSWER_COLUMNS) in ("answer", None):
        return "math"
    if {"question", "answer"} <= record.keys() and "####" in str(record["answer"]):
        return "gsm8k"
    has_answer = find_column(record, (*ANSWER_COLUMNS, "solution")) is not None or _ground_truth(record) is not None
    if has_answer and problem_text(record) is not None:
        return "plain"
    formats = "; ".join(f"{name}: {keys}" for name, keys in KEYS.items())
    raise RowError(
        "no_answer" if problem_text(record) is not None else "no_problem",
        where,
        f"the keys {shown(sorted(record), 200)} match no format. Expected {formats}. For other column names, use --columns, such as "
        "--columns problem=Question answer=Solution.",
    )


def _problem(record: dict[str, Any], format: str, where: str) -> tuple[Problem, bool]:
    """Return the problem of a record, and whether the record has an id."""
    if format == "plain":
        text = problem_text(record)
    else:
        own = record if format != "prm800k" else record["question"] if isinstance(record.get("question"), dict) else {}
        text = problem_text({name: own[name] for name in (*_OWN_TEXT[format], *CHOICE_COLUMNS) if name in own})
    if text is None:
        is_plain = format == "plain"
        names = TEXT_COLUMNS if is_plain else _OWN_TEXT[format]
        found = next((record[name] for name in names if record.get(name) is not None), None)
        messages = ", or messages with exactly one user message" if is_plain else ""
        raise RowError(
            "no_problem",
            where,
            f"the problem is {shown(found, 200)}, expected a non-empty string{messages}. {_expected(format)}",
        )
    answers = _answers(record, format)
    if not answers:
        raise RowError(
            "no_answer", where, f"found no answer to the problem {text.strip()[:60]!r}. {_expected(format)}"
        )
    if not all(same_answer(str(answers[0]), str(answer)) for answer in answers):
        raise RowError(
            "several_answers",
            where,
            f"found the answers {', '.join(map(shown, answers))} to the problem {text.strip()[:60]!r}, expected one.",
        )
    answer, choices = answers[0], None if format == "prm800k" else choices_of(record)
    if choices is not None:
        label = choices.label_of(answer)
        if label is None:
            raise RowError(
                "answer_not_among_choices",
                where,
                f"the answer is {shown(answer)}. It must identify exactly one of the choices {shown(choices.texts, 200)} by its text, its label "
                f"({', '.join(choices.labels)}) or its index from 0.",
            )
        answer = label
    column = find_column(record, ID_COLUMNS)
    given = None if column is None else record[column]
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip()):
        raise RowError("bad_id", where, f"the id is {shown(given)}, expected a non-empty string or an integer.")
    problem_id = problem_key(text).hex() if given is None else str(given)
    return Problem(problem_id, text.strip(), str(answer)), given is not None


def _prefix(record: dict[str, Any], column: str, prefix_fault: Callable[[str], str | None] | None, where: str) -> str:
    prefix = record.get(column)
    if not isinstance(prefix, str) or not prefix.strip():
        found = (
            f"{shown(column)} is {shown(prefix)}"
            if column in record
            else f"{shown(column)} is not among the keys {shown(sorted(record), 200)}"
        )
        raise ValueError(
            f"{where}: {found}. It must be a non-empty string with the beginning of a solution. Fill the column, or remove the "
            "record."
        )
    fault = prefix_fault and prefix_fault(prefix)
    if fault is not None:
        raise ValueError(f"{where}: {fault}")
    return prefix


def _answers(record: dict[str, Any], format: str) -> list[str | int | float]:
    """Return the answers of a record: none, one, or several if the record has a list of answers."""
    if format == "prm800k":
        return _values(record["question"].get("ground_truth_answer"))
    # Tables have blank strings for missing answers. They must not hide an answer in another column
    record = {name: value for name, value in record.items() if not (isinstance(value, str) and not value.strip())}
    if format == "gsm8k":
        return _values(extract_answer(str(record.get("answer")), ("hash",)))
    if format == "math":
        if record.get("answer") is not None:
            return _values(record["answer"])
        return _values(extract_answer(str(record.get("solution")), ("boxed",)))
    column = find_column(record, ANSWER_COLUMNS)
    values = _values(_ground_truth(record) if column is None else record[column])
    column = find_column(record, ["solution"])
    if not values and column is not None and find_column(record, ANSWER_COLUMNS) is None:
        return _values(extract_answer(str(record[column]), ("boxed",)))
    return [extract_answer(value, ("hash",)) or value if isinstance(value, str) else value for value in values]


def _values(value: Any) -> list[str | int | float]:
    """Return the stripped answers in a value, without blank strings, NaN, infinity and placeholders for a missing answer."""
    if isinstance(value, list):
        return [answer for item in value for answer in _values(item)]
    if isinstance(value, str):
        return [value.strip()] if value.strip() and value.strip().lower() not in _PLACEHOLDERS else []
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return []
    return [value]


def _ground_truth(record: Mapping[str, Any]) -> Any:
    """Return the answer of a row in verl's format, if any."""
    rule = record.get("reward_model")
    return rule.get("ground_truth") if isinstance(rule, Mapping) else None


def _expected(format: str) -> str:
    return f"The format {shown(format)} expects {KEYS[format]}."
