"""From rows of judged steps to rows of tokens with a label for each: tokenise, check, drop, count, batch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Sequence, Value
from transformers import DataCollatorForTokenClassification

from .. import __version__
from ..trainer.forest_dataset import ForestReport


IGNORED = -100  # label of a token where nothing is judged
LABELS_BEFORE = "labels_before"  # column with the number of labels before anything is cut off


@dataclass
class TokenReport(ForestReport):
    """
    What became of a dataset on its way into token rows, each of which is a tree of one chain.

    Args:
        labels_soft (`int`): Labels that are neither 0 nor 1.
        labels_elsewhere (`int`): Labelled tokens that do not end a `step_separator`.
    """

    labels_soft: int = 0
    labels_elsewhere: int = 0


def tokenize_dataset(
    dataset: Dataset,
    name: str,
    tokenize_row: Callable[..., dict[str, list]],
    num_proc: int | None,
    **settings,
) -> Dataset:
    """
    Turn judged steps into tokens, one row into one.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `prompt`, `completions` and `labels`. A label may be null: context only.
        name (`str`):
            Name of the dataset in errors and progress bars.
        tokenize_row (`Callable`):
            [`~prm.PRMTrainer.tokenize_row`].
        num_proc (`int`, *optional*):
            Number of processes.
        settings:
            Passed to `tokenize_row`.

    Returns:
        [`~datasets.Dataset`]: Columns `labels` (`int64`; `float32` if a label is neither 0 nor 1), `input_ids`, and
        [`LABELS_BEFORE`].

    Raises:
        `ValueError`: If a column is missing or holds no lists, if the rows are trees, if a text is null, or if a row has
        not one label for each step.
    """
    missing = {"prompt", "completions", "labels"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}, expected `prompt`, `completions` and `labels`, or "
            "`input_ids` and `labels` of rows that are tokenised already."
        )
    if "parents" in dataset.column_names:
        raise ValueError(
            f"{name} has a column `parents`: its rows are trees, and PRMTrainer would read each as a single chain of "
            "steps. Train with HRMRewardTrainer, which takes trees as they are, or remove the column if they are "
            "chains."
        )
    for column in ("completions", "labels"):
        if isinstance(dataset.features[column], Value):
            raise ValueError(
                f"{name}: the column `{column}` holds {dataset.features[column].dtype}, expected lists: one entry for each step."
            )
    return dataset.map(
        _tokenize,
        with_indices=True,
        fn_kwargs={"name": name, "tokenize_row": tokenize_row, "settings": settings, "version": __version__},
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
        # Given, since the type of a column does not follow from the first rows, which may all be 0 and 1
        features=Features(
            {
                "labels": Sequence(Value("float32" if _has_soft_labels(dataset) else "int64")),
                "input_ids": Sequence(Value("int64")),
                LABELS_BEFORE: Value("int64"),
            }
        ),
    )


def _has_soft_labels(dataset: Dataset) -> bool:
    # In Arrow: a Python object for each label of a large dataset takes minutes, in every process and every run
    for batch in dataset.select_columns("labels").with_format("arrow").iter(10_000):
        labels = pc.list_flatten(batch["labels"]).cast("float64").drop_null()
        hard = pc.is_in(labels, pa.array([0.0, 1.0, IGNORED]))
        if pc.any(pc.invert(hard)).as_py():
            return True
    return False


# `version` is not read: `datasets` caches rows by the arguments of these functions, not by their code


def _tokenize(
    row: Mapping[str, Any],
    i: int,
    name: str,
    tokenize_row: Callable[..., dict[str, list]],
    settings: dict[str, Any],
    version: str,
) -> dict[str, Any]:
    for column in ("prompt", "completions", "labels"):
        if row[column] is None or (column == "completions" and None in row[column]):
            raise ValueError(
                f"{name} row {i}: null in `{column}`, expected a text as `prompt`, a text for each step in `completions`, and a "
                "label for each in `labels`. Remove the row. Only a label may be null: context only."
            )
    labels = row["labels"]
    if len(labels) != len(row["completions"]):
        raise ValueError(
            f"{name} row {i}: `labels` has {len(labels)} entries and `completions` has {len(row['completions'])}; "
            "expected one per step."
        )
    if settings["train_on_last_step_only"] and not settings["is_eval"]:
        labels = labels[-1:]
    num_labels = sum(label is not None and label != IGNORED for label in labels)
    return tokenize_row(row, **settings) | {LABELS_BEFORE: num_labels}


def check_token_rows(
    rows: Dataset, name: str, separator_ids: list[int] | None, num_proc: int | None
) -> tuple[Dataset, TokenReport]:
    """
    Count the labels of token rows, and drop the rows that [`tokenize_dataset`] made without any.

    Args:
        rows ([`~datasets.Dataset`]):
            Rows with `input_ids` and `labels`, one label per token, [`IGNORED`] where nothing is judged.
        name (`str`):
            Name of the dataset in errors and progress bars.
        separator_ids (`list[int]`, *optional*):
            Ids of `step_separator`, if there is a tokenizer.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `tuple[Dataset, TokenReport]`: Rows that came as tokens are returned as they are.

    Raises:
        `ValueError`: If there is no column `labels`, if a row has not one label for each token, if a label is no
        probability, or if no label is left.
    """
    if "labels" not in rows.column_names:
        raise ValueError(f"{name} has `input_ids` without `labels`, found the columns {rows.column_names}.")
    facts = rows.map(
        _facts,
        with_indices=True,
        fn_kwargs={"name": name, "separator_ids": separator_ids, "version": __version__},
        remove_columns=rows.column_names,
        num_proc=num_proc,
        desc=f"Checking {name}",
    ).with_format("numpy")[:]
    kept = facts["labels"]
    report = TokenReport(
        rows_in=len(rows),
        labels_in=int(facts["before"].sum()),
        labels_kept=int(kept.sum()),
        trees_without_labels=int((kept == 0).sum()),
        tokens=int(facts["tokens"].sum()),
        tokens_unshared=int(facts["tokens_unshared"].sum()),
        labels_soft=int(facts["soft"].sum()),
        labels_elsewhere=int(facts["elsewhere"].sum()),
    )
    report.labels_too_long = report.labels_in - report.labels_kept
    if not report.labels_kept:
        raise ValueError(
            f"{name}: no labelled step is left ({report}). Steps lose their label where a row is longer than "
            "`max_length` or `max_completion_length`; raise them, or give rows with labels."
        )
    if LABELS_BEFORE in rows.column_names:
        rows = rows.remove_columns(LABELS_BEFORE)
        if report.trees_without_labels:
            rows = rows.select(np.flatnonzero(kept))
            facts = {column: values[kept > 0] for column, values in facts.items()}
    report.describe_rows(facts["tokens"], facts["labels"])
    return rows, report


def _facts(row: Mapping[str, Any], i: int, name: str, separator_ids: list[int] | None, version: str) -> dict[str, int]:
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"], dtype=np.float64)
    if len(labels) != len(ids):
        raise ValueError(
            f"{name} row {i}: `labels` has {len(labels)} entries and `input_ids` has {len(ids)}; expected one per token."
        )
    [positions] = np.nonzero(labels != IGNORED)
    found = labels[positions]
    for position, label in zip(positions, found, strict=True):
        if not 0 <= label <= 1:
            raise ValueError(
                f"{name} row {i}: the label at token {position} is {label:g}, expected a probability in [0, 1], or "
                f"{IGNORED} where nothing is judged. Map ratings such as -1, 0, 1 to labels first; null in a row of steps "
                "is context only."
            )
    elsewhere = len(positions)
    if separator_ids:
        elsewhere -= sum(list(ids[: p + 1][-len(separator_ids) :]) == separator_ids for p in positions)
    return {
        "tokens": len(ids),
        "tokens_unshared": int((positions + 1).sum()),
        "labels": len(positions),
        "before": row.get(LABELS_BEFORE, len(positions)),
        "soft": int(((found != 0) & (found != 1)).sum()),
        "elsewhere": elsewhere,
    }


@dataclass
class DataCollatorForStepLabels(DataCollatorForTokenClassification):
    """
    [`~transformers.DataCollatorForTokenClassification`], which makes integers of labels, for soft labels too.

    Integer labels give an `int64` batch, as ever. Other labels give a `float32` batch.
    """

    def torch_call(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(features)
        rows = [torch.as_tensor(feature["labels"]) for feature in features]
        if any(row.is_floating_point() for row in rows):
            labels = torch.full(batch["labels"].shape, float(self.label_pad_token_id))
            for i, row in enumerate(rows):
                if self.tokenizer.padding_side == "right":
                    labels[i, : len(row)] = row
                else:
                    labels[i, labels.shape[1] - len(row) :] = row
            batch["labels"] = labels
        return batch
