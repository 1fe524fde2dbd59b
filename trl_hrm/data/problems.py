"""What makes two problem texts one problem: splits, exclusion and ids all go by the same normalised text."""

import hashlib
from collections.abc import Sequence
from typing import Any

from .grouping import text_key
from .sources import JsonLines


def normalize_problem(text: str) -> str:
    r"""
    The problem without differences of whitespace and case.

    Example:

    ```python
    >>> normalize_problem("What is\n 1 + 2?  ") == normalize_problem("what is 1 + 2?")
    True
    ```
    """
    return " ".join(text.split()).casefold()


def problem_key(text: str) -> bytes:
    """16 bytes that stand for the problem: the same for texts that differ in whitespace and case only."""
    return text_key(normalize_problem(text))


def problem_split(text: str, test_size: float, seed: int) -> str:
    """
    `"train"` or `"test"`, decided by the seed and the normalised problem alone.

    All rows of a problem fall into one split, whatever file, order or number of processes they come from, and a row
    keeps its split when other rows are added.
    """
    digest = hashlib.blake2b(f"{seed}\n{normalize_problem(text)}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < test_size * 2**64 else "train"


def read_problem_keys(files: Sequence[str]) -> frozenset[bytes]:
    """
    Keys of the problems in JSON Lines files of test sets.

    Args:
        files (`Sequence[str]`):
            Files whose lines hold the problem under `problem`, `question` or `prompt`, as a string or, as in PRM800K,
            in an object under `question` that has `problem`.

    Raises:
        `FileNotFoundError`: If a file is missing.
        `ValueError`: If a line is not JSON or holds no problem, with file and line.
    """
    lines = JsonLines(files)
    return frozenset(
        problem_key(_problem_of(value, where)) for chunk in lines.chunks() for where, _, value in lines.read(chunk)
    )


def _problem_of(value: dict[str, Any], where: str) -> str:
    for name in ("problem", "question", "prompt"):
        text = value.get(name)
        if isinstance(text, dict):
            text = text.get("problem")
        if isinstance(text, str) and text.strip():
            return text
    raise ValueError(
        f"{where}: found no problem to exclude among the keys {sorted(value)}, expected a non-empty string under "
        "`problem`, `question` or `prompt`. Rename the key that holds the problem."
    )
