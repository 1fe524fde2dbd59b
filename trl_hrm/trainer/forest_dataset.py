"""Convert datasets of labelled steps to rows of tokens: join by prompt, encode, drop long paths, split and pack."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin

from .. import __version__
from ..data.problems import group_by_prompt
from ..encoding import find_control_text
from ..forest import TokenTree, TokenTrie, pack, pad_rows
from ..io import shown
from ..step_format import StepFormat
from ..step_tree import StepTree, weighted_mean


TOKEN_COLUMNS = ["input_ids", "position_ids", "subtree_end"]
STEP_COLUMNS = ["step_positions", "labels", "label_weights", "num_merged"]
SOURCE_COLUMNS = ["source_rows", "source_steps"]  # row and step of the dataset that each labelled step comes from
PROMPT_LENGTHS = "prompt_lengths"  # number of tokens of the problem before each labelled step, for implicit rewards
REF_LOG_PROBS = "ref_log_probs"  # log-probability of the solution up to each labelled step, of the reference model


@dataclass
class ForestReport:
    """
    Counts of what was kept and dropped when a dataset was converted to forest rows.

    Args:
        rows_in, rows_out (`int`): Number of rows read, and of token rows written.
        labels_in (`int`): Number of labels read. Each is either kept, joined or too long.
        labels_kept (`int`): Number of labelled steps in the trees.
        labels_merged (`int`): Number of merged steps among the labels kept.
        labels_joined (`int`): Number of labels for a step that already has one, because it occurs in several rows.
        labels_contradicting (`int`): Number of steps with different labels. They are trained with the mean.
        labels_too_long (`int`): Number of labels dropped because their path is longer than `max_length`.
        trees_without_labels (`int`): Number of trees dropped because they have no label left.
        tokens (`int`): Number of tokens in the trees, where shared prefixes count once.
        tokens_unshared (`int`): Number of tokens with one sequence per label.
        prompts_with_control_text, steps_with_control_text (`int`): Number of prompts and of steps that contain control
            tokens of the tokenizer. See `sanitize_control_tokens` of [`StepFormat`].
        steps_with_separator (`int`): Number of steps that contain the `step_separator`, and of single steps that
            contain a `merge_separator` other than white space. To the model, such a step looks like several steps. With
            `prompt_style="turns"`, the `step_separator` is a reply, which may occur in steps.
        tokens_in_rows (`int`): Number of tokens in all rows. Greater than `tokens` if trees are split, since each part
            repeats its prefix, or with `shared_prefix=False`.
        labels_per_row_p10, labels_per_row_median (`float`): 10th percentile and median number of labelled steps per row.
        max_length_p99 (`int`): Smallest `max_length` that keeps 99 % of the labels. 0 if unknown.
    """

    rows_in: int = 0
    rows_out: int = 0
    labels_in: int = 0
    labels_kept: int = 0
    labels_merged: int = 0
    labels_joined: int = 0
    labels_too_long: int = 0
    labels_contradicting: int = 0
    trees_without_labels: int = 0
    tokens: int = 0
    tokens_unshared: int = 0
    prompts_with_control_text: int = 0
    steps_with_control_text: int = 0
    steps_with_separator: int = 0
    tokens_in_rows: int = 0
    labels_per_row_p10: float = 0
    labels_per_row_median: float = 0
    max_length_p99: int = 0

    def count_control_text(
        self,
        tokenizer: PreTrainedTokenizerBase,
        step_format: StepFormat,
        prompt: str,
        steps: Sequence[str],
        num_merged: Sequence[int] | None = None,
    ) -> None:
        """Count a prompt and steps that contain control tokens or separators."""
        self.prompts_with_control_text += bool(find_control_text(tokenizer, prompt))
        merge = step_format.merge_separator
        for step, count in zip(steps, num_merged or [1] * len(steps), strict=True):
            self.steps_with_control_text += bool(find_control_text(tokenizer, step))
            is_forged = count == 1 and not merge.isspace() and merge in step
            is_split = step_format.prompt_style != "turns" and step_format.step_separator in step
            self.steps_with_separator += is_split or is_forged

    def __str__(self) -> str:
        return ", ".join(f"{field.name.replace('_', ' ')} {getattr(self, field.name):,.15g}" for field in fields(self))

    def describe_rows(self, tokens: np.ndarray, labels: np.ndarray) -> None:
        """Set the statistics of the rows, given the number of tokens and of labelled steps in each row."""
        self.rows_out = len(tokens)
        self.tokens_in_rows = int(tokens.sum())
        if len(labels):
            self.labels_per_row_p10, self.labels_per_row_median = map(float, np.percentile(labels, [10, 50]))

    def dropped_by_length(self, max_length: int | None) -> str | None:
        """Return a warning with the `max_length` that would keep 99 % of the labels, or `None` if that many are kept."""
        if not self.max_length_p99 or 100 * self.labels_too_long <= self.labels_in:
            return None
        return (
            f"{self.labels_too_long:,} of {self.labels_in:,} labels ({self.labels_too_long / self.labels_in:.1%}) are dropped "
            f"because their path is longer than `max_length` {max_length}. `max_length={self.max_length_p99}` would keep 99 % "
            "of the labels."
        )


# Columns with the counts of each tree, which are summed into the report
COUNTS = [
    "labels_in",
    "labels_kept",
    "labels_merged",
    "labels_joined",
    "labels_too_long",
    "labels_contradicting",
    "trees_without_labels",
    "tokens",
    "tokens_unshared",
    "prompts_with_control_text",
    "steps_with_control_text",
    "steps_with_separator",
]


@dataclass(frozen=True)
class SamePrompt:
    """
    The rows of each prompt of a dataset of N rows, in 16 bytes per row.

    The first row of a prompt becomes the tree of all of them. The other rows become empty and are dropped.

    Args:
        order (`np.ndarray`): Indices of the rows, with those of a prompt next to each other, shape `(N,)`.
        starts (`np.ndarray`): For the first row of each prompt, its place in `order`, and -1 for the others, shape `(N,)`.
        sizes (`np.ndarray`): For the first row of each prompt, the number of rows of the prompt, and 0 for the others, shape `(N,)`.
    """

    order: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, dataset: Dataset) -> "SamePrompt | None":
        """Return the rows of each prompt, or `None` if no prompt has several rows."""
        order, group_sizes = group_by_prompt(dataset)
        if len(group_sizes) == len(order):
            return None
        places = np.cumsum(group_sizes) - group_sizes
        starts, sizes = np.full(len(order), -1, dtype=np.int32), np.zeros(len(order), dtype=np.int32)
        starts[order[places]], sizes[order[places]] = places, group_sizes
        return cls(order, starts, sizes)

    def rows(self, i: int) -> list[int]:
        """Return the rows of the tree that row `i` becomes."""
        return self.order[self.starts[i] : self.starts[i] + self.sizes[i]].tolist() if self.sizes[i] else []


@dataclass(frozen=True)
class ForestBuilder:
    """
    Converts step trees to forest rows. See [`HRMRewardConfig`] for details on the settings.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of the model.
        step_format ([`StepFormat`]): How prompts and steps are encoded.
        max_length (`int` or `None`): Maximum number of tokens per path and per row. If `None`, nothing is dropped,
            split or packed.
        shared_prefix (`bool`): Whether the branches of a tree share their prefix.
        packing (`bool`): Whether to pack several trees into a row.
        label_weighting (`str`): `"unique"`, `"occurrence"` or `"column"`.
        error_weight (`float`): Weight of a step with label 0 relative to a step with label 1.
        train_on_last_step_only (`bool`): Whether to keep only the label of the last step of each trajectory.
        keep_sources (`bool`): Whether to add the columns `source_rows` and `source_steps`: the row of the dataset and the index
            of the step in this row. For a step that occurs in several rows, the first of them.
        version (`str`): Version of this package. It is a field because `datasets` caches rows by the fields of the
            builder, not by its code.
    """

    tokenizer: PreTrainedTokenizerBase
    step_format: StepFormat
    max_length: int | None
    shared_prefix: bool = True
    packing: bool = True
    label_weighting: Literal["unique", "occurrence", "column"] = "unique"
    error_weight: float = 1.0
    train_on_last_step_only: bool = False
    keep_sources: bool = False
    version: str = __version__

    def __call__(self, dataset: Dataset, name: str, num_proc: int | None = None) -> tuple[Dataset, ForestReport]:
        """
        Encode a dataset of step trees.

        Args:
            dataset ([`~datasets.Dataset`]):
                Dataset in the format of [`StepTree.from_row`]. Rows with the same prompt become one tree.
            name (`str`):
                Name of the dataset in errors and progress bars.
            num_proc (`int`, *optional*):
                Number of processes that encode the trees. It does not change the result.

        Returns:
            `tuple[Dataset, ForestReport]`: Rows with `input_ids`, `position_ids`, `subtree_end` (one entry per token)
            and `step_positions`, `labels`, `label_weights`, `num_merged` (one entry per labelled step). With `keep_sources`, also
            `source_rows` and `source_steps` (one entry per labelled step).

        Raises:
            `ValueError`: If a row is malformed, a prompt leaves no room for a step, or no label is left.
        """
        if not len(dataset):
            raise ValueError(f"{name} has no rows. It must have at least one labelled step.")
        if self.label_weighting == "column" and "label_weights" not in dataset.column_names:
            raise ValueError(
                f"{name} has the columns {dataset.column_names}. `label_weighting='column'` requires the column `label_weights`, with a "
                "weight for each step. Use another `label_weighting`, or add the column."
            )
        missing = {"prompt", "completions", "labels"} - set(dataset.column_names)
        if missing:
            raise ValueError(
                f"{name} has the columns {dataset.column_names}. It must have `prompt`, `completions` and `labels` "
                "(and `parents` for trees)."
            )
        joined = SamePrompt.of(dataset)
        trees = dataset.map(
            self._encode_row,
            with_indices=True,
            fn_kwargs={"dataset": dataset if joined else None, "joined": joined, "name": name},
            remove_columns=dataset.column_names,
            num_proc=num_proc,
            desc=f"Encoding {name}",
        )
        counts = dict.fromkeys(COUNTS, 0)
        # How many labels have each length, since a list of all lengths would grow with the dataset
        lengths = np.zeros(0, dtype=np.int64)
        for table in _tables(trees, *COUNTS, "path_lengths"):
            counts = {name: count + pc.sum(table[name]).as_py() for name, count in counts.items()}
            found = np.bincount(pc.list_flatten(table["path_lengths"]).to_numpy(), minlength=len(lengths))
            found[: len(lengths)] += lengths
            lengths = found
        report = ForestReport(rows_in=len(dataset), **counts)
        if lengths.any():
            kept = math.ceil(report.labels_in * 99 / 100)
            report.max_length_p99 = int(np.searchsorted(np.cumsum(lengths), kept))
        trees = trees.remove_columns([*COUNTS, "path_lengths"])
        # In one process, since several would pack their trees separately, so the rows would depend on `num_proc`
        rows = trees.map(self._rows, batched=True, desc=f"Laying out {name}")
        report.describe_rows(_lengths(rows, "input_ids"), _lengths(rows, "labels"))
        if not len(rows):
            raise ValueError(f"{name}: no labelled step is left ({report}).")
        if self.label_weighting == "column" and not any(
            pc.list_flatten(lists).to_numpy().any() for lists in _arrow(rows, "label_weights")
        ):
            raise ValueError(f"{name}: all `label_weights` of labelled steps are 0. At least one must be above 0.")
        return rows, report

    def _encode_row(
        self, row: Mapping[str, Any], i: int, dataset: Dataset | None, joined: "SamePrompt | None", name: str
    ) -> dict[str, Any]:
        """Encode the trees of one prompt as one token tree, with the label of each labelled step and the counts."""
        indices = [i] if joined is None else joined.rows(i)
        rows = [row] if indices == [i] else [dataset[j] for j in indices]
        places = [f"{name} row {j}" for j in indices]
        trees = [StepTree.from_row(row, where) for row, where in zip(rows, places, strict=True)]
        report = ForestReport()
        trie = TokenTrie()
        is_implicit = self.step_format.head == "implicit"
        labels: list[list[float]] = []
        weights: list[list[float]] = []
        num_merged: list[int] = []
        sources: list[tuple[int, int]] = []
        path_lengths: list[int] = []  # of all labels, including dropped ones
        for place, tree, where in zip(indices, trees, places, strict=True):
            kept = self._kept_labels(tree, where)
            use_column = self.label_weighting == "column"
            given_weights = tree.label_weights(where) if use_column else [1.0] * len(tree.labels)
            report.count_control_text(self.tokenizer, self.step_format, tree.prompt, tree.completions, tree.num_merged)
            try:
                nodes = self.step_format.insert(trie, self.tokenizer, tree.prompt, tree.completions, tree.parents)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
            prompt_length = trie.path_length(nodes[-1])
            if self.max_length is not None and prompt_length >= self.max_length:
                raise ValueError(
                    f"{where}: the prompt has {prompt_length} tokens, which leaves no room for a step within "
                    f"`max_length` {self.max_length}. Raise `max_length`, or remove the row."
                )
            for i in range(len(tree.completions)):
                if kept[i] is None:
                    continue
                path_lengths.append(trie.path_length(nodes[i]))
                if self.max_length is not None and path_lengths[-1] > self.max_length:
                    report.labels_too_long += 1
                    continue
                step = trie.mark(nodes[i], trie.shared_length(nodes[i], nodes[-1]) if is_implicit else 0)
                if step == len(labels):
                    labels.append([])
                    weights.append([])
                    num_merged.append(tree.num_merged[i] if tree.num_merged else 1)
                    sources.append((place, i))
                labels[step].append(kept[i])
                weights[step].append(given_weights[i])
        token_tree = trie.layout()
        report.labels_in = len(path_lengths)
        report.tokens_unshared = sum(path_lengths)
        report.labels_kept = len(labels)
        report.labels_merged = sum(count > 1 for count in num_merged)
        report.labels_joined = sum(len(given) - 1 for given in labels)
        report.labels_contradicting = sum(len(set(given)) > 1 for given in labels)
        report.trees_without_labels = int(bool(trees) and not labels)
        report.tokens = len(token_tree)
        means = np.array(list(map(weighted_mean, labels, weights)), dtype=np.float32)
        sizes = [1 if self.label_weighting == "occurrence" else len(given) for given in labels]
        times = np.array([sum(given) / size for given, size in zip(weights, sizes, strict=True)], dtype=np.float32)
        # A soft label y has the weight y·1 + (1 − y)·error_weight
        step_weights = times * (means + (1 - means) * np.float32(self.error_weight))
        order = token_tree.steps
        columns = _columns(token_tree, means[order], step_weights[order], np.array(num_merged, dtype=np.int32)[order])
        if is_implicit:
            columns[PROMPT_LENGTHS] = token_tree.starts
        if self.keep_sources:
            found = np.array(sources, dtype=np.int32).reshape(-1, 2)[order]
            columns |= dict(zip(SOURCE_COLUMNS, found.T, strict=True))
        counts = {name: getattr(report, name) for name in COUNTS}
        return columns | counts | {"path_lengths": np.array(path_lengths, dtype=np.int32)}

    def _kept_labels(self, tree: StepTree, where: str) -> list[float | None]:
        merged = [i for i, count in enumerate(tree.num_merged or ()) if count > 1]
        if merged:  # with equal separators, a merged step would have the same ids as its single steps
            self.step_format.check_merged(self.tokenizer)
        for i in merged:
            if self.step_format.merge_separator not in tree.completions[i]:
                raise ValueError(
                    f"{where}: `completions[{i}]` is a merged step, but does not contain the `merge_separator` "
                    f"{shown(self.step_format.merge_separator)} of the step format. Build the dataset with this separator, or "
                    "set `merge_separator` to the separator of the dataset."
                )
        if not self.train_on_last_step_only:
            return tree.labels
        if merged:
            raise ValueError(
                f"{where}: `train_on_last_step_only` does not support merged steps (`num_merged[{merged[0]}]` is "
                f"{tree.num_merged[merged[0]]}), because the last step of a trajectory is then ambiguous. Use a dataset "
                "built with `view='orm'`."
            )
        leaves = set(tree.leaves())
        return [label if i in leaves else None for i, label in enumerate(tree.labels)]

    def _rows(self, batch: Mapping[str, list]) -> dict[str, list]:
        """Split the trees of a batch if needed and pack the parts into rows."""
        pieces, values = [], []
        names = TOKEN_COLUMNS + STEP_COLUMNS + [PROMPT_LENGTHS] * (PROMPT_LENGTHS in batch)
        kept = {"labels": np.float32, "label_weights": np.float32, "num_merged": np.int32}
        if self.keep_sources:
            names += SOURCE_COLUMNS
            kept |= dict.fromkeys(SOURCE_COLUMNS, np.int32)
        for i in range(len(batch["input_ids"])):
            columns = {name: batch[name][i] for name in names}
            if not len(columns["labels"]):
                continue
            tree = _token_tree(columns)
            if not self.shared_prefix:
                parts = tree.chains()
            else:
                parts = [tree] if self.max_length is None else tree.split(self.max_length)
            pieces += parts
            values += [columns] * len(parts)
        if self.packing and self.max_length is not None:
            groups = pack([len(piece) for piece in pieces], self.max_length)
        else:
            groups = [[i] for i in range(len(pieces))]
        rows = []
        for group in groups:
            steps = {
                name: np.concatenate([np.asarray(values[i][name], dtype)[pieces[i].steps] for i in group])
                for name, dtype in kept.items()
            }
            joined = TokenTree.join([pieces[i] for i in group])
            columns = _columns(joined, steps["labels"], steps["label_weights"], steps["num_merged"])
            rows.append(
                columns | {PROMPT_LENGTHS: joined.starts} | {name: steps[name] for name in names if name in steps}
            )
        return {name: [row[name] for row in rows] for name in names}


def _tables(rows: Dataset, *columns: str) -> Iterator[pa.Table]:
    # Reading a large dataset as Python objects, one per token, takes minutes
    return rows.select_columns(list(columns)).with_format("arrow").iter(10_000)


def _arrow(rows: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    return (table[column] for table in _tables(rows, column))


def _lengths(rows: Dataset, column: str) -> np.ndarray:
    """Return the length of the list in each row."""
    return np.concatenate(
        [np.array([], int), *(pc.list_value_length(lists).to_numpy() for lists in _arrow(rows, column))]
    )


def flat_column(rows: Dataset, column: str) -> np.ndarray:
    """Concatenate the lists of all rows into one array."""
    return np.concatenate([np.array([], int), *(pc.list_flatten(lists).to_numpy() for lists in _arrow(rows, column))])


def longest_path(rows: Dataset) -> int:
    """Return the number of tokens of the longest path in the rows. The dataset must not be empty."""
    return max(pc.max(pc.list_flatten(lists)).as_py() for lists in _arrow(rows, "position_ids")) + 1


def _token_tree(row: Mapping[str, Any]) -> TokenTree:
    """Return the token tree of a row. Its labelled steps are numbered in order of position."""
    arrays = (np.asarray(row[name], dtype=np.int32) for name in [*TOKEN_COLUMNS, "step_positions"])
    steps = np.arange(len(row["step_positions"]))
    starts = np.asarray(row.get(PROMPT_LENGTHS, np.zeros(len(steps))), dtype=np.int32)
    return TokenTree(*arrays, steps=steps, starts=starts)


def _columns(
    tree: TokenTree, labels: np.ndarray, weights: np.ndarray, num_merged: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the columns of a row. Values are in the order of `tree.step_positions`."""
    return {
        "input_ids": tree.input_ids,
        "position_ids": tree.position_ids,
        "subtree_end": tree.subtree_end.astype(np.int32),
        "step_positions": tree.step_positions.astype(np.int32),
        "labels": labels,
        "label_weights": weights,
        "num_merged": num_merged,
    }


@dataclass
class DataCollatorForForest(DataCollatorMixin):
    """
    Data collator for forest rows. It pads B rows to L tokens and S labelled steps.

    A padding token attends only to itself. `step_positions` are indices into the *flattened* tokens, with and without
    padding. Padded steps point to the first token of their row and have the label -100 and the weight 0.

    Args:
        pad_token_id (`int`):
            Token ID to use for padding.
        padding_free (`bool`, *optional*, defaults to `False`):
            Whether to concatenate all rows into one row without padding. Only for plain sequences
            (`shared_prefix=False`), which attention kernels separate where `position_ids` restart at 0.
        pad_to_multiple_of (`int`, *optional*):
            If set, rows are padded to a multiple of this value.

    Returns:
        `dict[str, torch.Tensor]`: `labels`, `label_weights`, `num_merged` and `step_positions`, shape `(B, S)` each, and for implicit
        rewards `prompt_lengths` and `ref_log_probs`, if the rows have them;
        `num_tokens` (without padding), shape `(B,)`; `input_ids`, `position_ids` and `subtree_end`, shape `(B, L)` each,
        or `(1, sum of lengths)` if padding-free.

    Example (`pad_token_id=0`):

    ```python
    >>> collator([{"input_ids": [7, 8, 9], "position_ids": [0, 1, 2], "subtree_end": [3, 3, 3], "step_positions": [2],
    ...            "labels": [1.0], "label_weights": [1.0], "num_merged": [1]},
    ...           {"input_ids": [7, 9], "position_ids": [0, 1], "subtree_end": [2, 2], "step_positions": [1],
    ...            "labels": [0.0], "label_weights": [1.0], "num_merged": [1]}])
    {'labels': tensor([[1.], [0.]]), 'label_weights': tensor([[1.], [1.]]), 'num_merged': tensor([[1], [1]]),
     'step_positions': tensor([[2], [4]]), 'num_tokens': tensor([3, 2]), 'input_ids': tensor([[7, 8, 9], [7, 9, 0]]),
     'position_ids': tensor([[0, 1, 2], [0, 1, 0]]), 'subtree_end': tensor([[3, 3, 3], [2, 2, 3]])}
    ```
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [_token_tree(example) for example in examples]
        num_steps = max(len(row.steps) for row in rows)
        steps = {
            "labels": torch.full((len(rows), num_steps), -100.0),
            "label_weights": torch.zeros((len(rows), num_steps)),
            "num_merged": torch.full((len(rows), num_steps), -100),
            "step_positions": torch.zeros((len(rows), num_steps), dtype=torch.long),
        }
        if PROMPT_LENGTHS in examples[0]:
            steps[PROMPT_LENGTHS] = torch.zeros((len(rows), num_steps), dtype=torch.long)
        if REF_LOG_PROBS in examples[0]:
            steps[REF_LOG_PROBS] = torch.zeros((len(rows), num_steps), dtype=torch.float64)
        for name, tensor in steps.items():
            for i, example in enumerate(examples):
                tensor[i, : len(example[name])] = torch.as_tensor(example[name])
        num_tokens = torch.tensor([len(row) for row in rows])
        packed = [TokenTree.join(rows)] if self.padding_free else rows
        tokens = pad_rows(packed, self.pad_token_id, self.pad_to_multiple_of or 1)
        width = tokens["input_ids"].shape[1]
        starts = num_tokens.cumsum(0) - num_tokens if self.padding_free else torch.arange(len(rows)) * width
        steps["step_positions"] += starts[:, None]
        return steps | {"num_tokens": num_tokens} | tokens
