r"""
Problems with reference answers, from the files and datasets that hold them.

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

import math
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from typing import Any

from ..grading import extract_answer
from ..search.tree import Problem, make_id
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
    unused_parts,
)
from .sources import DatasetRows, JsonLines, all_rows, is_json_file, loaded_dataset


KEYS = {
    "plain": "`problem` (or `prompt`, `question`), `answer` (or `final_answer`, `reward_model.ground_truth`, or `solution` with the "
    "answer in its last box) and, optionally, `problem_id` (or `id`, `unique_id`)",
    "gsm8k": "`question` and `answer`, whose last line is `#### ` and the answer",
    "math": "`problem`, `answer` (or `solution`, with the answer in its last box) and, optionally, `unique_id`",
    "prm800k": "`question` with `problem` and `ground_truth_answer`",
}
FORMATS = ("auto", *KEYS)
ANSWER_COLUMNS = (
    "answer",
    "final_answer",
    "ground_truth_answer",
    "ground_truth",
    "reference_answer",
    "expected_answer",
    "answerKey",
)
# What data sets write where a problem has no answer: NuminaMath the first two, tables the others.
_PLACEHOLDERS = ("proof", "notfound", "n/a", "nan", "null")
_OWN_TEXT = {"gsm8k": ("question",), "math": ("problem",), "prm800k": ("problem",)}
ID_COLUMNS = {
    "plain": ("problem_id", "id", "unique_id"),
    "gsm8k": (),
    "math": ("unique_id",),
    "prm800k": (),
}


@dataclass
class ProblemSet:
    """
    Problems to annotate, and how many records they come from: `num_records` is the sum of `len(problems)`,
    `num_repeated`, `num_excluded` and `faults.num_left_out`.

    Args:
        problems (`list[Problem]`):
            The problems, in the order of the source. No two have the same id, nor the same text but for whitespace and the
            same prefix.
        num_records (`int`):
            Records read.
        num_repeated (`int`):
            Records whose problem, prefix and answer were in an earlier one.
        num_excluded (`int`):
            Records of problems that were excluded.
        faults ([`RowFaults`]):
            Records that were left out because of a fault, and those that were kept with one.
        unused (`Counter`):
            Columns that may carry a part of the problem and are not in its text, with the number of records that have them.
    """

    problems: list[Problem]
    num_records: int = 0
    num_repeated: int = 0
    num_excluded: int = 0
    faults: RowFaults = field(default_factory=RowFaults)
    unused: Counter = field(default_factory=Counter)

    def describe(self) -> str:
        """What was read, in a line, and a line for each warning."""
        line = (
            f"{self.num_records:,} records: {len(self.problems):,} problems, {self.num_repeated:,} repeated, "
            f"{self.num_excluded:,} excluded, {self.faults.num_left_out:,} left out."
        )
        warnings = [*self.faults.warnings(), *parts_warning(self.unused)]
        return "\n".join([line, *(f"warning: {warning}" for warning in warnings)])


@dataclass
class _Entry:
    """A problem, the key of its text, and its records."""

    where: str
    problem: Problem
    key: bytes
    num_repeated: int = 0


def read_problems(
    source: str,
    format: str = "auto",
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    exclude: frozenset[bytes] = frozenset(),
    prefix_column: str | None = None,
    prefix_fault: Callable[[str], str | None] | None = None,
    columns: Mapping[str, str] | None = None,
    strict: bool = False,
) -> ProblemSet:
    """
    Read problems and their reference answers.

    A problem without an explicit id gets the hash of its text, [`problem_key`], so that it keeps it in other files. A hash of the
    prefix, if there is one, is added to either: one problem with several prefixes is several.

    Records with a fault do not stop the others. Left out are records without a problem or without one clear answer, and all
    records of a problem that have different answers. A problem with the id of another problem is kept, and a hash of
    its text is added to its id.

    Args:
        source (`str`):
            A file of JSON Lines or of a JSON array, or the directory or Hub name of a dataset.
        format (`str`, *optional*, defaults to `"auto"`):
            `"gsm8k"`, `"math"`, `"prm800k"` or `"plain"`; `"auto"` goes by the keys of the first record that has a problem.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset. Files have none.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub, such as `main` for GSM8K. Files have none.
        limit (`int`, *optional*):
            Read no further than this many problems.
        exclude (`frozenset[bytes]`, *optional*):
            Keys of problems to leave out, whatever their prefixes. See [`~data.problems.read_problem_keys`] and [`exclusion_key`].
        prefix_column (`str`, *optional*):
            Column with the beginning of each solution, raw text that a step search continues.
        prefix_fault (`Callable[[str], str | None]`, *optional*):
            Says what is wrong with a prefix. See [`~search.step_search.StepSearch.prefix_fault`].
        columns (`Mapping[str, str]`, *optional*):
            New names of columns, such as `{"problem": "Question"}`. See [`~data.sources.rename_columns`].
        strict (`bool`, *optional*, defaults to `False`):
            Raise the first fault of a record.

    Returns:
        [`ProblemSet`]

    Raises:
        `FileNotFoundError`: If the file is missing.
        `ValueError`: If a prefix is missing or has a fault, if no problem is left, or, with `strict`, if a record has a fault.
            The message names file and line, or the row.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more.")
    found = ProblemSet([], faults=RowFaults(strict))
    reader = _Reader(found.faults)
    with ExitStack() as stack:
        if is_json_file(source):
            if config is not None:
                raise ValueError(f"{source}: this is a file, which has no configuration {config!r}. Leave it out.")
            rows = JsonLines([source], columns)
        else:
            rows = DatasetRows(stack.enter_context(loaded_dataset(source, split, config)), columns)
        for where, record in all_rows(rows):
            found.num_records += 1
            try:
                if format == "auto":
                    format = _format_of(record, where)
                problem, has_id = _problem(record, format, where)
            except RowError as fault:
                found.faults.leave_out(fault)
                continue
            prefix = "" if prefix_column is None else _prefix(record, prefix_column, prefix_fault, where)
            found.unused.update(unused_parts(record))
            if exclusion_key(problem.prompt) in exclude:
                found.num_excluded += 1
                continue
            reader.add(where, problem, has_id, prefix)
            if len(reader.entries) == limit:
                break
    found.problems = [entry.problem for entry in reader.entries.values()]
    found.num_repeated = sum(entry.num_repeated for entry in reader.entries.values())
    if not found.problems:
        raise ValueError(
            f"{source}: no problem is left of {found.num_records} records ({found.num_excluded} of them excluded"
            + (f", {found.faults.num_left_out} left out" if found.faults.num_left_out else "")
            + "). Check the source, and the files of problems to exclude."
            + (f" The first fault: {found.faults.first}" if found.faults.first else "")
        )
    return found


class _Reader:
    """Puts the records of a problem together."""

    def __init__(self, faults: RowFaults):
        self.faults = faults
        self.entries: dict[tuple[bytes, str], _Entry] = {}  # by problem and prefix
        self.answers: dict[bytes, tuple[str, str]] = {}  # of each problem, and where it was found first
        self.contradicted: set[bytes] = set()
        self.ids: dict[str, tuple[bytes, str]] = {}

    def add(self, where: str, problem: Problem, has_id: bool, prefix: str) -> None:
        """Add one record."""
        key = problem_key(problem.prompt)
        answer, before = self.answers.setdefault(key, (problem.answer, where))
        if key in self.contradicted or not _same_answer(answer, problem.answer):
            # Which of the answers is right is not known: all records of the problem are left out
            message = (
                f"the answer is {problem.answer!r}, and {answer!r} at {before}, where the same problem stands; expected one answer. "
                "Remove the record that is wrong."
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
                    f"the id {problem.problem_id!r} stands at {before} too, for another problem; expected one problem per id. Rename "
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
    Refuse to resume a run of a version that ignored letter case in the ids of problems: all would be searched again, next to
    their earlier trees.

    Args:
        problems (`Iterable[Problem]`):
            Problems to search.
        known (`Container[str]`):
            Ids of the problems that the run has begun.
        where (`str`):
            Its log.

    Raises:
        `ValueError`: If the run has a problem under the id of such a version.
    """
    for problem in problems:
        key, earlier = problem_key(problem.prompt).hex(), exclusion_key(problem.prompt).hex()
        if key != earlier and problem.problem_id.startswith(key):
            earlier += problem.problem_id.removeprefix(key)
            if problem.problem_id not in known and earlier in known:
                raise ValueError(
                    f"{where}: this run was begun by a version that ignored letter case in the ids of problems: it has "
                    f"{earlier!r} for what is now {problem.problem_id!r}. Finish it with that version, or start in another "
                    "--output_dir."
                )


def _format_of(record: dict[str, Any], where: str) -> str:
    if isinstance(record.get("question"), dict):
        return "prm800k"
    if "problem" in record and ("unique_id" in record or "solution" in record):
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
        f"no format has the keys {sorted(record)}. Expected {formats}. Name other columns with --columns, such as "
        "--columns problem=Question answer=Solution.",
    )


def _problem(record: dict[str, Any], format: str, where: str) -> tuple[Problem, bool]:
    """The problem, and whether the record gives its id."""
    if format == "plain":
        text = problem_text(record)
    else:
        own = record if format != "prm800k" else record["question"] if isinstance(record.get("question"), dict) else {}
        text = problem_text({name: own[name] for name in (*_OWN_TEXT[format], *CHOICE_COLUMNS) if name in own})
    if text is None:
        is_plain = format == "plain"
        names = TEXT_COLUMNS if is_plain else _OWN_TEXT[format]
        shown = next((record[name] for name in names if record.get(name) is not None), None)
        messages = ", or messages with a single one of the user" if is_plain else ""
        raise RowError(
            "no_problem",
            where,
            f"the problem is {repr(shown)[:200]}, expected a non-empty string{messages}. {_expected(format)}",
        )
    answers = _answers(record, format)
    if not answers:
        raise RowError(
            "no_answer", where, f"found no answer to the problem {text.strip()[:60]!r}. {_expected(format)}"
        )
    if not all(_same_answer(str(answers[0]), str(answer)) for answer in answers):
        raise RowError(
            "several_answers",
            where,
            f"found the answers {', '.join(map(str, answers))} to the problem {text.strip()[:60]!r}, expected one.",
        )
    answer, choices = answers[0], None if format == "prm800k" else choices_of(record)
    if choices is not None:
        label = choices.label_of(answer)
        if label is None:
            raise RowError(
                "answer_not_among_choices",
                where,
                f"the answer is {answer!r}, expected one of the choices {choices.texts}, its label ({', '.join(choices.labels)}), or "
                "its index from 0, and no two of them at once.",
            )
        answer = label
    column = find_column(record, ID_COLUMNS[format])
    given = None if column is None else record[column]
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip()):
        raise RowError("bad_id", where, f"the id is {given!r}, expected a non-empty string or an integer.")
    problem_id = problem_key(text).hex() if given is None else str(given)
    return Problem(problem_id, text.strip(), str(answer)), given is not None


def _prefix(record: dict[str, Any], column: str, prefix_fault: Callable[[str], str | None] | None, where: str) -> str:
    prefix = record.get(column)
    if not isinstance(prefix, str) or not prefix.strip():
        found = f"{column!r} is {prefix!r}" if column in record else f"no {column!r} among the keys {sorted(record)}"
        raise ValueError(
            f"{where}: found {found}, expected the beginning of a solution as a string that is not blank. Fill the column, or "
            "remove the record."
        )
    fault = prefix_fault and prefix_fault(prefix)
    if fault is not None:
        raise ValueError(f"{where}: {fault}")
    return prefix


def _answers(record: dict[str, Any], format: str) -> list[str | int | float]:
    """The answers of a record: none, one, or several that it gives as a list."""
    if format == "prm800k":
        return _values(record["question"].get("ground_truth_answer"))
    if format == "gsm8k":
        return _values(extract_answer(str(record.get("answer")), ("hash",)))
    if format == "math":
        if "answer" in record:
            return _values(record["answer"])
        return _values(extract_answer(str(record.get("solution")), ("boxed",)))
    column = find_column(record, ANSWER_COLUMNS)
    values = _values(_ground_truth(record) if column is None else record[column])
    column = find_column(record, ["solution"])
    if not values and column is not None and find_column(record, ANSWER_COLUMNS) is None:
        return _values(extract_answer(str(record[column]), ("boxed",)))
    return [extract_answer(value, ("hash",)) or value if isinstance(value, str) else value for value in values]


def _values(value: Any) -> list[str | int | float]:
    """The answers in a value, stripped; none of what is blank, not a number, or no answer at all."""
    if isinstance(value, list):
        return [answer for item in value for answer in _values(item)]
    if isinstance(value, str):
        return [value.strip()] if value.strip() and value.strip().lower() not in _PLACEHOLDERS else []
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return []
    return [value]


def _ground_truth(record: Mapping[str, Any]) -> Any:
    """The answer in verl's rows."""
    rule = record.get("reward_model")
    return rule.get("ground_truth") if isinstance(rule, Mapping) else None


def _same_answer(answer: str, other: str) -> bool:
    """Whether answers are the same text without dollar signs and spaces, or the same number."""
    answer, other = ("".join(one.replace("$", "").split()) for one in (answer, other))
    if answer == other:
        return True
    try:
        return Decimal(answer.replace(",", "")) == Decimal(other.replace(",", ""))
    except InvalidOperation:
        return False


def _expected(format: str) -> str:
    return f"The format {format!r} expects {KEYS[format]}."
