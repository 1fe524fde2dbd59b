"""Convert datasets of labelled steps to rows of tokens with one label per token, and collate them."""

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
from ..io import shown
from ..trainer.forest_dataset import ForestReport


IGNORED = -100  # label of tokens that are ignored in the loss
LABELS_BEFORE = "labels_before"  # column with the number of labels before truncation


@dataclass
class TokenReport(ForestReport):
    """
    Counts of what was kept and dropped when a dataset was converted to token rows. Each row is a tree with one path.

    Args:
        labels_soft (`int`): Number of labels that are neither 0 nor 1.
        labels_elsewhere (`int`): Number of labelled tokens that are not at the end of a `step_separator`.
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
    Tokenize a dataset of labelled steps.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with `prompt`, `completions` and `labels`. A step with the label `None` is only context.
        name (`str`):
            Name of the dataset in errors and progress bars.
        tokenize_row (`Callable`):
            [`~prm.PRMTrainer.tokenize_row`].
        num_proc (`int`, *optional*):
            Number of processes.
        settings:
            Other arguments of `tokenize_row`.

    Returns:
        [`~datasets.Dataset`]: Dataset with the columns `labels` (`int64`, or `float32` if a label is neither 0 nor 1),
        `input_ids` and [`LABELS_BEFORE`].

    Raises:
        `ValueError`: If a column is missing or does not contain lists, the rows are trees, a prompt or step is not a text, the labels
        are not numbers, or a row does not have one label per step.
    """
    missing = {"prompt", "completions", "labels"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{name} has the columns {dataset.column_names}. It must have `prompt`, `completions` and `labels` or, if it is "
            "already tokenized, `input_ids` and `labels`."
        )
    if "parents" in dataset.column_names:
        raise ValueError(
            f"{name} has a column `parents`, so its rows are trees, which PRMTrainer does not support. Use HRMRewardTrainer, "
            "or remove the column if every row is a single chain of steps."
        )
    for column in ("completions", "labels"):
        if isinstance(dataset.features[column], Value):
            raise ValueError(
                f"{name}: the column `{column}` contains {dataset.features[column].dtype}. It must contain lists with one entry "
                "per step."
            )
    types, kind = pa.types, dataset.features.arrow_schema.field("labels").type
    is_number = (types.is_boolean, types.is_integer, types.is_floating, types.is_null)
    if not any(test(getattr(kind, "value_type", kind)) for test in is_number):
        raise ValueError(
            f"{name}: the column `labels` contains {kind}. It must contain lists of numbers or booleans, such as [True, False]. "
            "Convert the labels."
        )
    return dataset.map(
        _tokenize,
        with_indices=True,
        fn_kwargs={"name": name, "tokenize_row": tokenize_row, "settings": settings, "version": __version__},
        remove_columns=dataset.column_names,
        num_proc=num_proc,
        desc=f"Tokenizing {name}",
        # `datasets` would infer the type from the first rows, where all labels may be 0 and 1
        features=Features(
            {
                "labels": Sequence(Value("float32" if _has_soft_labels(dataset) else "int64")),
                "input_ids": Sequence(Value("int64")),
                LABELS_BEFORE: Value("int64"),
            }
        ),
    )


def _has_soft_labels(dataset: Dataset) -> bool:
    # In Arrow, because reading the labels of a large dataset as Python objects takes minutes, in every process and run
    for batch in dataset.select_columns("labels").with_format("arrow").iter(10_000):
        labels = pc.list_flatten(batch["labels"]).cast("float64").drop_null()
        hard = pc.is_in(labels, pa.array([0.0, 1.0, IGNORED]))
        if pc.any(pc.invert(hard)).as_py():
            return True
    return False


# `version` is unused in these functions, but part of the cache key: `datasets` caches rows by the arguments of a function


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
                f"{name} row {i}: `{column}` is or contains `None`. `prompt` must be a text, and `completions` and `labels` must "
                "have one entry per step. Remove the row. Only labels can be `None`, for steps that are only context."
            )
    for column, texts in (("prompt", [row["prompt"]]), ("completions", row["completions"])):
        others = [text for text in texts if not isinstance(text, str)]
        if others:
            raise ValueError(
                f"{name} row {i}: found {shown(others[0])} in `{column}`, expected a text. Convert the column to texts, or use "
                "HRMRewardTrainer, which also reads messages."
            )
    labels = row["labels"]
    if len(labels) != len(row["completions"]):
        raise ValueError(
            f"{name} row {i}: `labels` has {len(labels)} entries, but `completions` has {len(row['completions'])}. Each step "
            "must have one label."
        )
    if settings["train_on_last_step_only"] and not settings["is_eval"]:
        labels = labels[-1:]
    num_labels = sum(label is not None and label != IGNORED for label in labels)
    return tokenize_row(row, **settings) | {LABELS_BEFORE: num_labels}


def check_token_rows(
    rows: Dataset, name: str, separator_ids: list[int] | None, num_proc: int | None
) -> tuple[Dataset, TokenReport, np.ndarray]:
    """
    Check and count the labels of token rows, and drop the rows of [`tokenize_dataset`] that have no label left.

    Args:
        rows ([`~datasets.Dataset`]):
            Dataset with `input_ids` and `labels`. Each token has one label, or [`IGNORED`].
        name (`str`):
            Name of the dataset in errors and progress bars.
        separator_ids (`list[int]`, *optional*):
            Token ids of `step_separator`, if there is a tokenizer.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `tuple[Dataset, TokenReport, np.ndarray]`: The rows, their counts, and the number of labels in each row before rows were
        dropped. Rows that were already tokenized are returned unchanged.

    Raises:
        `ValueError`: If the column `labels` is missing, a row does not have one label per token, a label is not a
        probability, or no label is left.
    """
    if "labels" not in rows.column_names:
        raise ValueError(
            f"{name} has `input_ids`, but no `labels`: its columns are {rows.column_names}. Add one label per token."
        )
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
            f"{name}: no labelled step is left ({report}). Truncation to `max_length` or `max_completion_length` drops "
            "labels. Raise these limits, or use a dataset with labels."
        )
    if LABELS_BEFORE in rows.column_names:
        rows = rows.remove_columns(LABELS_BEFORE)
        if report.trees_without_labels:
            rows = rows.select(np.flatnonzero(kept))
            facts = {column: values[kept > 0] for column, values in facts.items()}
    report.describe_rows(facts["tokens"], facts["labels"])
    return rows, report, kept


def _facts(row: Mapping[str, Any], i: int, name: str, separator_ids: list[int] | None, version: str) -> dict[str, int]:
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"], dtype=np.float64)
    if len(labels) != len(ids):
        raise ValueError(
            f"{name} row {i}: `labels` has {len(labels)} entries, but `input_ids` has {len(ids)}. Each token must have one "
            f"label, or {IGNORED}."
        )
    [positions] = np.nonzero(labels != IGNORED)
    found = labels[positions]
    for position, label in zip(positions, found, strict=True):
        if not 0 <= label <= 1:
            raise ValueError(
                f"{name} row {i}: the label at token {position} is {label:g}. It must be a probability in [0, 1], or "
                f"{IGNORED} to ignore the token. Convert ratings such as -1, 0, 1 to labels first. Use `None` as the label "
                "of a step that is only context."
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
    [`~transformers.DataCollatorForTokenClassification`] that also supports soft labels, instead of casting them to
    integers.

    Integer labels are batched as `int64`, other labels as `float32`.
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
