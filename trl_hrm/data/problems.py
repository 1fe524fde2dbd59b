"""Extract the text of a problem from a row, and identify, split and group problems by their text."""

import hashlib
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import numpy as np

from ..io import shown
from ..messages import prompt_text
from .sources import JsonLines, all_rows


if TYPE_CHECKING:
    from datasets import Dataset


TEXT_COLUMNS = ("problem", "question", "prompt")
CHOICE_COLUMNS = ("choices", "options")
# Columns that may be needed to solve the problem. Choices are added to its text, the others only trigger a warning.
PART_COLUMNS = re.compile(
    r"input|context|passage|paragraph|article|story|scenario|body|premises?|background|hints?|tables?|figures?|diagrams?|choices|options|(decoded_)?images?(_\d+)?",
    re.IGNORECASE,
)
UNUSED = "rows_with_unused_column_"  # prefix of the counts of columns that may contain a part of the problem
_LABELLED_CHOICE = re.compile(r"\(?([A-Z])[).:]\s*(.+)", re.DOTALL)


@dataclass(frozen=True)
class Choices:
    """
    The choices of a multiple-choice problem.

    Args:
        labels (`list[str]`):
            Label of each choice, such as `"A"`.
        texts (`list[str]`):
            Text of each choice.
    """

    labels: list[str]
    texts: list[str]

    def add_to(self, problem: str) -> str:
        """
        Return the problem with its choices, one per line. A problem that already contains them is returned unchanged.

        Example:

        ```python
        >>> print(Choices(["A", "B"], ["3", "4"]).add_to("What is 1 + 2?"))
        What is 1 + 2?
        A. 3
        B. 4
        ```
        """
        place = 0
        for label, text in zip(self.labels, self.texts, strict=True):
            shown = re.compile(rf"(?<!\w){re.escape(label)}(?!\w)").search(problem, place)
            place = -1 if shown is None else problem.find(text, shown.end())
            if place == -1:
                break
            place += len(text)
        else:
            return problem
        lines = [f"{label}. {text}" for label, text in zip(self.labels, self.texts, strict=True)]
        return "\n".join([problem.strip(), *lines])

    def label_of(self, answer: str | int | float) -> str | None:
        """
        Return the label of the choice that `answer` identifies by its label, its text or its index from 0, or `None` if it is
        ambiguous.
        """
        text = str(answer).strip()
        if text in self.labels:
            return text
        marked = re.fullmatch(r"\(?([A-Za-z0-9]+)[).:]?", text)
        if marked and marked[1] in self.labels:
            return marked[1]
        by_text = [label for label, choice in zip(self.labels, self.texts, strict=True) if choice.strip() == text]
        labelled = _LABELLED_CHOICE.fullmatch(text)
        if not by_text and labelled and labelled[1] in self.labels:
            return labelled[1]
        is_index = isinstance(answer, int) and 0 <= answer < len(self.labels)
        by_index = [self.labels[answer]] if is_index else []
        found = {*by_text, *by_index}
        return found.pop() if len(found) == 1 else None


def read_choices(value: Any) -> Choices | None:
    """
    Return the choices in `value`, in any format used by public datasets: a list of texts with or without labels, a dictionary from
    labels to texts, or a dictionary with the lists `text` and `label`. Return `None` for anything else.
    """
    if isinstance(value, Mapping) and {"text", "label"} <= value.keys():
        labels, texts = value["label"], value["text"]
    elif isinstance(value, Mapping):
        labels, texts = list(value), list(value.values())
    elif isinstance(value, (list, tuple)):
        labels, texts = list(ascii_uppercase[: len(value)]), list(value)
        marked = [_LABELLED_CHOICE.fullmatch(text) for text in texts if isinstance(text, str)]
        if len(marked) == len(texts) and all(marked) and [match[1] for match in marked] == labels:
            texts = [match[2] for match in marked]
    else:
        return None
    if not isinstance(labels, list) or not isinstance(texts, list) or not 1 < len(texts) == len(labels):
        return None
    if not all(isinstance(text, (str, int, float)) and str(text).strip() for text in [*labels, *texts]):
        return None
    return Choices([str(label).strip() for label in labels], [str(text).strip() for text in texts])


def problem_text(record: Mapping[str, Any]) -> str | None:
    """
    Return the problem of a row, with its choices if it has any.

    The problem is the first non-empty string under `problem`, `question` or `prompt`, in any letter case. It may also be nested
    under `question.problem`, as in PRM800K, or be the only user message in a list of messages.

    Args:
        record (`Mapping[str, Any]`):
            The row.

    Returns:
        `str` or `None`: The problem, or `None` if the row has none.
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


def _user_text(messages: Sequence[Any]) -> str | None:
    """Return the text of the only user message, or `None` if there is not exactly one, or it is not text."""
    try:
        text = prompt_text(messages)
    except ValueError:  # such as an image
        return None
    return text if isinstance(text, str) else None


def find_column(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """Return the first of the columns `names` that has a value. Exact matches take precedence over other letter case."""
    for name in names:
        if record.get(name) is not None:
            return name
    by_lower = {name.lower(): name for name in record if isinstance(name, str) and record[name] is not None}
    return next((by_lower[name.lower()] for name in names if name.lower() in by_lower), None)


def choices_of(record: Mapping[str, Any]) -> Choices | None:
    """Return the [`Choices`] of a row, or `None`."""
    column = find_column(record, CHOICE_COLUMNS)
    return None if column is None else read_choices(record[column])


def unused_parts(record: Mapping[str, Any], used: Sequence[str] = (), has_choices: bool = True) -> list[str]:
    """
    Return the columns that may contain a part of the problem and are not part of its text.

    Args:
        record (`Mapping[str, Any]`):
            The row.
        used (`Sequence[str]`, *optional*):
            Columns that the caller uses.
        has_choices (`bool`, *optional*, defaults to `True`):
            Whether the caller adds the choices to the text.
    """
    if has_choices and choices_of(record) is not None:
        used = [*used, find_column(record, CHOICE_COLUMNS)]
    parts = [
        name for name, value in record.items() if PART_COLUMNS.fullmatch(name) and value not in (None, "", [], {})
    ]
    parts = [name for name in parts if name not in used]
    for column in dict.fromkeys(find_column(record, [name]) for name in TEXT_COLUMNS):
        messages = record[column] if column is not None and isinstance(record[column], list) else ()
        others = {str(one.get("role")) for one in messages if isinstance(one, Mapping)} - {"user"}
        parts += [f"{column} (message of role {role})" for role in sorted(others)]
    return parts


def parts_warning(unused: Mapping[str, int]) -> list[str]:
    """Return a warning for each unused column, given the number of rows per column. See [`unused_parts`]."""
    return [
        f"{count:,} {'row has' if count == 1 else 'rows have'} a column `{name}`, which is not part of the problem's text. If it is "
        "needed to solve the problem, add it to the text."
        for name, count in unused.items()
    ]


def unused_warnings(notes: Mapping[str, int]) -> list[str]:
    """Return a warning for each unused column that was counted in `notes` as `UNUSED + name`. See [`unused_parts`]."""
    unused = {name.removeprefix(UNUSED): count for name, count in notes.items() if name.startswith(UNUSED)}
    return parts_warning(unused)


def normalize_problem(text: str) -> str:
    r"""
    Normalize the whitespace of a problem. Letter case is kept, since $n$ and $N$ are different variables.

    Example:

    ```python
    >>> normalize_problem("What is\n 1 + 2?  ") == normalize_problem("What is 1 + 2?")
    True
    ```
    """
    return " ".join(text.split())


def text_key(text: str) -> bytes:
    """Return a 16-byte hash of `text`, which takes less memory than a long text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def problem_key(text: str) -> bytes:
    """Return a 16-byte hash of a problem that ignores differences in whitespace."""
    return text_key(normalize_problem(text))


def exclusion_key(text: str) -> bytes:
    """
    Return a 16-byte hash of a problem that ignores differences in whitespace and letter case, used to exclude test problems.

    It ignores case, unlike [`problem_key`], because a test problem in other letter case must not be trained on either.
    """
    return text_key(normalize_problem(text).casefold())


def problem_split(text: str, test_size: float, seed: int) -> str:
    """
    Return the split of a problem, `"train"` or `"test"`. It depends only on the seed and on the text of the problem, ignoring
    differences in whitespace and case.

    All rows of a problem are therefore in the same split, regardless of their file, their order or the number of processes, and a
    row keeps its split when other rows are added.
    """
    return "test" if _draw(text, str(seed)) < test_size * 2**64 else "train"


def problem_order(text: str, seed: int) -> int:
    """
    Return a random number from 0 to 2**64 - 1 for a problem, which decides whether a mixture with weights keeps it. Like
    [`problem_split`], it depends only on the seed and on the text of the problem, but the two are independent of each other.
    """
    return _draw(text, f"mixture {seed}")


def _draw(text: str, seed: str) -> int:
    digest = hashlib.blake2b(f"{seed}\n{normalize_problem(text).casefold()}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def read_problem_keys(files: Sequence[str]) -> frozenset[bytes]:
    """
    Return the [`exclusion_key`] of every problem in JSON files of test sets. Rows of PRMBench have two: the original and the modified
    problem.

    Args:
        files (`Sequence[str]`):
            JSON Lines files or JSON arrays, optionally compressed with gzip. See [`problem_text`] for the supported columns.

    Raises:
        `FileNotFoundError`: If a file does not exist.
        `ValueError`: If a file has no rows, or a row is not valid JSON or has no problem.
    """
    keys = set()
    for where, row in all_rows(JsonLines(files)):
        text = row.get("input") if "mistake_index" in row else problem_text(row)  # a row of BIG-Bench Mistake
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{where}: found no problem to exclude among the keys {shown(sorted(row), 200)}. It must be a non-empty string under `problem`, "
                "`question` or `prompt`. Rename the key of the problem."
            )
        # the last two are columns of PRMBench
        changed = [row.get(name) for name in ("original_prompt", "original_question", "modified_question")]
        texts = [_user_text(one) if isinstance(one, (list, tuple)) else one for one in (text, *changed)]
        keys.update(exclusion_key(one) for one in texts if isinstance(one, str))
    return frozenset(keys)


def same_answer(answer: str, other: str) -> bool:
    """Return whether two answers are the same number, or the same text without dollar signs and spaces."""
    answer, other = ("".join(one.replace("$", "").split()) for one in (answer, other))
    if answer == other:
        return True
    try:
        return Decimal(answer.replace(",", "")) == Decimal(other.replace(",", ""))
    except InvalidOperation:
        return False


def group_equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """
    Group the positions of equal keys, in the order in which the keys first appear.

    Example:

    ```python
    >>> group_equal(["a", "b", "a"])
    [[0, 2], [1]]
    ```
    """
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def text_keys(texts: Iterable[str]) -> np.ndarray:
    """Return the [`text_key`] of each of N texts as two integers, shape `(N, 2)`."""
    return np.frombuffer(b"".join(map(text_key, texts)), dtype=np.uint64).reshape(-1, 2)


def group_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Group the positions of equal keys, in the order in which the keys first appear. Like [`group_equal`], with a few bytes of memory
    per key instead of Python objects.

    Args:
        keys (`np.ndarray`):
            Keys of N rows, shape `(N, 2)`. See [`text_keys`].

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The N positions, group by group and ascending within a group, and the size of each group.

    Example:

    ```python
    >>> rows, sizes = group_keys(text_keys(["a", "b", "a"]))
    >>> rows.tolist(), sizes.tolist()
    ([0, 2, 1], [2, 1])
    ```
    """
    by_key = np.lexsort((keys[:, 1], keys[:, 0]))  # stable, so positions ascend within a group
    found = keys[by_key]
    is_first = np.ones(len(found), dtype=bool)
    is_first[1:] = (found[1:] != found[:-1]).any(axis=1)
    starts = np.flatnonzero(is_first)
    sizes = np.diff(starts, append=len(found))
    order = np.argsort(by_key[starts])
    starts, sizes = starts[order], sizes[order]
    places = np.arange(len(found)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    return by_key[places], sizes


def group_by_prompt(dataset: "Dataset") -> tuple[np.ndarray, np.ndarray]:
    """
    Group the row indices of a dataset by prompt, in the order in which the prompts first appear.

    Only the column `prompt` is read, in batches, and only row indices and 16-byte keys are kept in memory.

    Args:
        dataset (`datasets.Dataset`):
            Dataset with a column `prompt` of strings or messages.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The row indices, group by group, and the size of each group. See [`group_keys`].
    """
    prompts = dataset.select_columns(["prompt"]).with_format(None)
    keys = [text_keys(map(_group_text, batch["prompt"])) for batch in prompts.iter(batch_size=1000)]
    return group_keys(np.concatenate([text_keys([]), *keys]))


def _group_text(prompt: Any) -> str:
    """Return the text that rows of one prompt have in common. Invalid prompts are errors when the row is read, with its location."""
    try:
        text = prompt_text(prompt)
    except ValueError:
        text = None
    return text if isinstance(text, str) else repr(prompt)
