r"""
Problems with reference answers, from the files and datasets that hold them.

```json
{"problem": "What is 1 + 2 + 3?", "answer": "6"}
{"question": "What is 1 + 2 + 3?", "answer": "1 + 2 = 3 and 3 + 3 = 6.\n#### 6"}
{"problem": "What is 1 + 2 + 3?", "solution": "It is $\\boxed{6}$.", "answer": "6", "unique_id": "test/sums/1.json"}
{"question": {"problem": "What is 1 + 2 + 3?", "ground_truth_answer": "6"}, "label": {}}
```
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..grading import extract_answer
from ..search.tree import Problem, make_id
from .problems import problem_key
from .sources import DatasetRows, JsonLines


KEYS = {
    "plain": "`problem` (or `prompt`, `question`), `answer` and, optionally, `problem_id` (or `id`)",
    "gsm8k": "`question` and `answer`, whose last line is `#### ` and the answer",
    "math": "`problem`, `answer` (or `solution`, with the answer in its last box) and, optionally, `unique_id`",
    "prm800k": "`question` with `problem` and `ground_truth_answer`",
}
FORMATS = ("auto", *KEYS)
TEXT_KEYS = {
    "plain": ("problem", "prompt", "question"),
    "gsm8k": ("question",),
    "math": ("problem",),
    "prm800k": ("problem",),
}
ID_KEYS = {"plain": ("problem_id", "id"), "gsm8k": (), "math": ("unique_id",), "prm800k": ()}


@dataclass
class ProblemSet:
    """
    Problems to annotate, and how many records they come from: `num_records` is the sum of `len(problems)`,
    `num_repeated` and `num_excluded`.

    Args:
        problems (`list[Problem]`):
            The problems, in the order of the source. No two have the same id, nor the same text but for whitespace and
            case and the same prefix.
        num_records (`int`):
            Records read.
        num_repeated (`int`):
            Records whose problem, prefix and answer stood in an earlier one.
        num_excluded (`int`):
            Records of problems that were excluded.
    """

    problems: list[Problem]
    num_records: int = 0
    num_repeated: int = 0
    num_excluded: int = 0


def read_problems(
    source: str,
    format: str = "auto",
    split: str = "train",
    config: str | None = None,
    limit: int | None = None,
    exclude: frozenset[bytes] = frozenset(),
    prefix_column: str | None = None,
    prefix_fault: Callable[[str], str | None] | None = None,
) -> ProblemSet:
    """
    Read problems and their reference answers.

    A problem without an explicit id gets the hash of its text, [`problem_key`], so that it keeps it in other files. A hash of the
    prefix, if there is one, is added to either: one problem with several prefixes is several.

    Args:
        source (`str`):
            A JSON Lines file, or the directory or Hub name of a dataset.
        format (`str`, *optional*, defaults to `"auto"`):
            `"gsm8k"`, `"math"`, `"prm800k"` or `"plain"`; `"auto"` tells by the keys of the first record.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset. Files have none.
        config (`str`, *optional*):
            Configuration of a dataset on the Hub, such as `main` for GSM8K. Files have none.
        limit (`int`, *optional*):
            Read no further than this many problems.
        exclude (`frozenset[bytes]`, *optional*):
            Keys of problems to leave out, whatever their prefixes. See [`read_problem_keys`].
        prefix_column (`str`, *optional*):
            Column with the beginning of each solution, raw text that a step search goes on from.
        prefix_fault (`Callable[[str], str | None]`, *optional*):
            Says what is wrong with a prefix. See [`~search.prefixes.prefix_fault`].

    Returns:
        [`ProblemSet`]

    Raises:
        `FileNotFoundError`: If the file is missing.
        `ValueError`: If a record has no problem or no answer, or a prefix is missing or has a fault, if two records have one id,
            or one problem and two answers, or if no problem is left. The message names file and line, or the row.
    """
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FORMATS)}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, expected 1 or more.")
    found = ProblemSet([])
    places: dict[tuple[str, str], str] = {}
    answers: dict[bytes, tuple[str, str]] = {}
    known: set[tuple[bytes, str]] = set()
    with _open(source, split, config) as records:
        for where, record in records:
            if format == "auto":
                format = _format_of(record, where)
            found.num_records += 1
            problem, key, has_id = _problem(record, format, where)
            prefix = "" if prefix_column is None else _prefix(record, prefix_column, prefix_fault, where)
            if has_id and (problem.problem_id, prefix) in places:
                raise ValueError(
                    f"{where}: the id {problem.problem_id!r} stands at {places[problem.problem_id, prefix]} too, expected one "
                    f"record per id{' and prefix' if prefix else ''}. Remove one of them, or rename its id."
                )
            places[problem.problem_id, prefix] = where
            if key in exclude:
                found.num_excluded += 1
                continue
            answer, before = answers.setdefault(key, (problem.answer, where))
            if answer != problem.answer:
                raise ValueError(
                    f"{where}: the answer is {problem.answer!r}, and {answer!r} at {before}, where the same "
                    "problem stands; expected one answer. Remove the record that is wrong."
                )
            if (key, prefix) in known:
                found.num_repeated += 1
            else:
                known.add((key, prefix))
                found.problems.append(_with_prefix(problem, prefix) if prefix else problem)
            if len(found.problems) == limit:
                break
    if not found.problems:
        raise ValueError(
            f"{source}: no problem is left of {found.num_records} records ({found.num_excluded} of them excluded). "
            "Check the source, and the files of problems to exclude."
        )
    return found


@contextmanager
def _open(source: str, split: str, config: str | None) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    """`(where, record)` for each record of a file or dataset."""
    if Path(source).is_file() or source.endswith((".json", ".jsonl")):
        if config is not None:
            raise ValueError(f"{source}: this is a file, which has no configuration {config!r}. Leave it out.")
        yield _records(JsonLines([source]))
        return
    from datasets import load_dataset

    # A cache of its own: for a local directory, the shared one may hold the rows of another of the same name.
    with tempfile.TemporaryDirectory() as cache:
        cache_dir = cache if Path(source).is_dir() else None
        yield _records(DatasetRows(load_dataset(source, config, split=split, cache_dir=cache_dir)))


def _records(source: JsonLines | DatasetRows) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((where, record) for chunk in source.chunks() for where, _, record in source.read(chunk))


def _format_of(record: dict[str, Any], where: str) -> str:
    if isinstance(record.get("question"), dict):
        return "prm800k"
    if "unique_id" in record or {"problem", "solution"} <= record.keys():
        return "math"
    if {"question", "answer"} <= record.keys() and "####" in str(record["answer"]):
        return "gsm8k"
    if "answer" in record and record.keys() & {"problem", "prompt", "question"}:
        return "plain"
    formats = "; ".join(f"{name}: {keys}" for name, keys in KEYS.items())
    raise ValueError(f"{where}: no format has the keys {sorted(record)}. Expected {formats}. Rename the keys.")


def _problem(record: dict[str, Any], format: str, where: str) -> tuple[Problem, bytes, bool]:
    """The problem, the key of its text, and whether the record gives its id."""
    if format == "prm800k":
        record = record["question"] if isinstance(record.get("question"), dict) else {}
    text = next((record[name] for name in TEXT_KEYS[format] if name in record), None)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the problem is {text!r}, expected a non-empty string. {_expected(format)}")
    answer = _answer(record, format)
    if not answer:
        raise ValueError(f"{where}: found no answer to the problem {text.strip()[:60]!r}. {_expected(format)}")
    given = next((record[name] for name in ID_KEYS[format] if record.get(name) is not None), None)
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int)) or not str(given).strip()):
        raise ValueError(f"{where}: the id is {given!r}, expected a non-empty string or an integer.")
    key = problem_key(text)
    problem_id = key.hex() if given is None else str(given)
    return Problem(problem_id, text.strip(), answer), key, given is not None


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


def _with_prefix(problem: Problem, prefix: str) -> Problem:
    return replace(problem, problem_id=f"{problem.problem_id}-{make_id(prefix)}", prefix=prefix)


def _answer(record: dict[str, Any], format: str) -> str | None:
    answer = record.get("ground_truth_answer" if format == "prm800k" else "answer")
    if format == "gsm8k":
        return extract_answer(str(answer), ("hash",))
    if format == "math" and "answer" not in record:
        return extract_answer(str(record.get("solution")), ("boxed",))
    if isinstance(answer, bool) or (isinstance(answer, float) and not math.isfinite(answer)):
        return None
    return str(answer).strip() if isinstance(answer, (str, int, float)) else None


def _expected(format: str) -> str:
    return f"The format {format!r} expects {KEYS[format]}."
