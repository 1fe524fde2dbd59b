"""Rows that belong together because they share a prompt."""

import hashlib
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from datasets import Dataset


def text_key(text: str) -> bytes:
    """16 bytes that stand for `text`: equal texts have equal keys, and a key is small whatever the text's length."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def group_equal(keys: Iterable[Hashable]) -> list[list[int]]:
    """
    Positions of equal keys, in the order in which the keys first appear.

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


def group_by_prompt(dataset: "Dataset") -> list[list[int]]:
    """
    Row indices by prompt, in the order in which the prompts first appear.

    Only the column `prompt` is read, a batch at a time, and only row indices and 16-byte keys are kept, so that memory
    does not depend on the length of the texts.

    Args:
        dataset (`datasets.Dataset`):
            Dataset with a string column `prompt`.

    Returns:
        `list[list[int]]`: One list of row indices per distinct prompt. Every row stands in exactly one of them.
    """
    prompts = dataset.select_columns(["prompt"]).with_format(None)
    return group_equal(text_key(prompt) for batch in prompts.iter(batch_size=1000) for prompt in batch["prompt"])
