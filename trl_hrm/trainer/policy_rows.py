"""Rows of supervised fine-tuning that have nothing to learn from: they are dropped and counted, or refused."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset


logger = get_logger(__name__)


def drop_empty_completions(
    dataset: Dataset | IterableDataset, name: str, text_field: str = "text"
) -> Dataset | IterableDataset:
    """
    Drop the rows whose completion is empty. They would train the policy to end the sequence at once.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in one of TRL's formats. Rows of tokens are returned as they are.
        name (`str`):
            Name of the dataset in messages.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column of plain texts.

    Raises:
        `ValueError`: If no row is left, or a row of a stream, which is read later and cannot be counted, has an empty
        completion.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(_refuse_empty, fn_kwargs={"name": name, "text_field": text_field})
    if not len(dataset):
        raise ValueError(f"{name} has no rows, expected at least one to train on.")
    if "input_ids" in dataset.column_names:
        return dataset
    kept = dataset.filter(
        lambda row: not _is_empty(row, text_field), desc=f"Dropping empty completions from {name} dataset"
    )
    dropped = len(dataset) - len(kept)
    if dropped == len(dataset):
        raise ValueError(f"{name}: all {dropped:,} completions are empty, so no row is left to train on.")
    if dropped:
        logger.warning(
            f"{name}: {dropped:,} of {len(dataset):,} rows have an empty completion and are dropped. They would train the policy "
            "to end at once."
        )
        return kept
    return dataset


def check_trained_rows(rows: Dataset, name: str, rows_in: int, max_length: int | None) -> None:
    """
    Count the rows that have no token to train on after tokenization and truncation.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `labels`, -100 for tokens that are not trained, and `seq_lengths` where several are packed into one. Rows
            without any label may have been dropped before.
        name (`str`):
            Name of the dataset in messages.
        rows_in (`int`):
            Number of rows before tokenization.
        max_length (`int` or `None`):
            Maximum number of tokens per row.

    Raises:
        `ValueError`: If no row has a token to train on.
    """
    if "labels" not in rows.column_names:
        return
    columns = [column for column in ("labels", "seq_lengths") if column in rows.column_names]
    trained = 0
    for row in rows.select_columns(columns).with_format("numpy"):
        ends = np.cumsum(row.get("seq_lengths", [len(row["labels"])]))
        sequences = np.split(row["labels"], ends[:-1])
        trained += sum(bool((labels[1:] != -100).any()) for labels in sequences)  # nothing predicts a first token
    remedy = (
        "Is every token masked?"
        if max_length is None
        else f"The prompts alone fill `max_length` {max_length}: raise it, or shorten the prompts."
    )
    if not trained:
        raise ValueError(f"{name}: none of {rows_in:,} rows has a token to train on. {remedy}")
    if trained < rows_in:
        logger.warning(
            f"{name}: {rows_in - trained:,} of {rows_in:,} rows have no token to train on and are ignored. {remedy}"
        )


def _refuse_empty(row: Mapping[str, Any], name: str, text_field: str) -> Mapping[str, Any]:
    if _is_empty(row, text_field):
        raise ValueError(f"{name}: a row has an empty completion, expected a text: {str(dict(row))[:200]}. Remove it.")
    return row


def _is_empty(row: Mapping[str, Any], text_field: str) -> bool:
    """Whether a row in one of TRL's formats has nothing for the policy to say."""
    if "input_ids" in row:
        return False
    name = next((name for name in ("completion", "messages", text_field) if name in row), None)
    if name is None:
        return False  # another format
    value = row[name]
    if value is None or isinstance(value, str):
        return not _has_text(value)
    if not isinstance(value, list):
        return False
    answers = value if "completion" in row else [message for message in value if message.get("role") == "assistant"]
    is_empty = not any(
        _has_text(answer.get("content")) or any(answer.get(key) for key in answer.keys() - {"role", "content"})
        for answer in answers
    )
    return is_empty and bool(answers or "completion" in row)


def _has_text(content: str | list[dict[str, Any]] | None) -> bool:
    if isinstance(content, list):
        return any(block.get("type") != "text" or block["text"].strip() for block in content)
    return bool(content and content.strip())
