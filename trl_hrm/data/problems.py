"""The text of a problem in the rows of all sources, and what makes two texts one problem."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .choices import COLUMNS as CHOICES
from .choices import Choices, read_choices
from .dialogues import INSTRUCTIONS, content_text
from .grouping import text_key
from .sources import JsonLines, all_rows


TEXT_COLUMNS = ("problem", "question", "prompt")
# Columns next to the problem that may be needed to solve it. Choices are added to the text.
PART_COLUMNS = re.compile(
    r"input|context|passage|paragraph|article|story|scenario|body|premises?|background|hints?|tables?|figures?|diagrams?|choices|options|(decoded_)?images?(_\d+)?",
    re.IGNORECASE,
)

UNUSED = "rows_with_unused_column_"  # what counts of such columns begin with


def normalize_problem(text: str) -> str:
    r"""
    The problem without differences of whitespace. Letter case stays: $n$ and $N$ are different variables.

    Example:

    ```python
    >>> normalize_problem("What is\n 1 + 2?  ") == normalize_problem("What is 1 + 2?")
    True
    ```
    """
    return " ".join(text.split())


def problem_key(text: str) -> bytes:
    """16 bytes that stand for the problem: the same for texts that differ in whitespace only."""
    return text_key(normalize_problem(text))


def exclusion_key(text: str) -> bytes:
    """
    16 bytes by which test problems are kept out of other data: the same for texts that differ in whitespace and case only.

    Exclusion is wider than identity: a test problem in other letter case must not be trained on.
    """
    return text_key(normalize_problem(text).casefold())


def problem_split(text: str, test_size: float, seed: int) -> str:
    """
    `"train"` or `"test"`, decided by the seed and the problem alone, without differences of whitespace and case.

    All rows of a problem fall into one split, whatever file, order or number of processes they come from, and a row
    keeps its split when other rows are added. Problems that differ in case alone share a split.
    """
    digest = hashlib.blake2b(f"{seed}\n{normalize_problem(text).casefold()}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < test_size * 2**64 else "train"


def find_column(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first column that has one of the names and a value; written exactly so or, if none is, in other letter case."""
    for name in names:
        if record.get(name) is not None:
            return name
    by_lower = {name.lower(): name for name in record if isinstance(name, str) and record[name] is not None}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def problem_text(record: Mapping[str, Any]) -> str | None:
    """
    The problem of a row, with its choices if it has a list of them.

    It is the first string that is not blank under `problem`, `question` or `prompt`, in any letter case. It may be in an
    object under `question` that has `problem`, as in PRM800K, or be the only message of the user in a list of messages.

    Args:
        record (`Mapping[str, Any]`):
            The row.

    Returns:
        `str` or `None`: The text, `None` if no column has one.
    """
    for name in TEXT_COLUMNS:
        column = find_column(record, [name])
        value = None if column is None else record[column]
        if isinstance(value, Mapping):
            value = value.get("problem")
        if isinstance(value, (list, tuple)):
            value = _user_text(value)
        if isinstance(value, str) and value.strip():
            choices = choices_of(record)
            return value if choices is None else choices.add_to(value)
    return None


def choices_of(record: Mapping[str, Any]) -> Choices | None:
    """The [`Choices`] of a row, or `None`."""
    column = find_column(record, CHOICES)
    return None if column is None else read_choices(record[column])


def unused_parts(record: Mapping[str, Any], used: Sequence[str] = (), has_choices: bool = True) -> list[str]:
    """
    Columns that may carry a part of the problem and are not in its text.

    Args:
        record (`Mapping[str, Any]`):
            The row.
        used (`Sequence[str]`, *optional*):
            Columns that the reader uses.
        has_choices (`bool`, *optional*, defaults to `True`):
            Whether the reader adds the choices to the text.
    """
    if has_choices and choices_of(record) is not None:
        used = [*used, find_column(record, CHOICES)]
    parts = [
        name for name, value in record.items() if PART_COLUMNS.fullmatch(name) and value not in (None, "", [], {})
    ]
    parts = [name for name in parts if name not in used]
    column = find_column(record, TEXT_COLUMNS)
    messages = record.get(column) if isinstance(record.get(column), list) else ()
    others = {str(one.get("role")) for one in messages if isinstance(one, Mapping)} - {"user"}
    return [*parts, *(f"{column} (message of role {role})" for role in sorted(others))]


def parts_warning(unused: Mapping[str, int]) -> list[str]:
    """A sentence on each column that may carry a part of the problem and is not in its text, given how many rows have it."""
    return [
        f"{count:,} {'row has' if count == 1 else 'rows have'} a column `{name}`, which is not part of the problem's text. If the problem needs it, write it into "
        "the text."
        for name, count in unused.items()
    ]


def read_problem_keys(files: Sequence[str]) -> frozenset[bytes]:
    """
    The [`exclusion_key`] of every problem in JSON files of test sets.

    Args:
        files (`Sequence[str]`):
            JSON Lines files or arrays, plain or compressed with gzip, whose rows hold the problem as [`problem_text`] finds it.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a row is not JSON or holds no problem, with file and line.
    """
    return frozenset(exclusion_key(_problem_of(value, where)) for where, value in all_rows(JsonLines(files)))


def _problem_of(value: dict[str, Any], where: str) -> str:
    text = problem_text(value)
    if text is None:
        raise ValueError(
            f"{where}: found no problem to exclude among the keys {sorted(value)}, expected a non-empty string under "
            "`problem`, `question` or `prompt`. Rename the key that holds the problem."
        )
    return text


def _user_text(messages: Sequence[Any]) -> str | None:
    """The text of the only message of the user. A dialogue of several turns has none."""
    if not all(isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages):
        return None
    turns = [message for message in messages if message["role"] not in INSTRUCTIONS]
    if [message["role"] for message in turns] != ["user"]:
        return None
    content = turns[0]["content"]
    blocks = content if isinstance(content, list) else []
    if any(not isinstance(block, Mapping) or not isinstance(block.get("text"), str) for block in blocks):
        return None  # an image, for example
    return content_text(content)
