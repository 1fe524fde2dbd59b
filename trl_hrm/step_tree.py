"""[`StepTree`]: a problem with its labelled steps, the row format of all datasets in this package."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .io import shown
from .messages import plain_row


# Optional columns with one entry per step. A column with one of these names is per step only if its value is a list.
STEP_COLUMNS = ("mc_correct", "mc_total", "mc_unresolved", "node_ids", "label_weights", "mc_scores")


@dataclass
class StepTree:
    r"""
    A problem with its labelled steps, arranged as a tree.

    Without branches this is TRL's stepwise supervision format (`prompt`, `completions`, `labels`). `parents` adds
    branches: solutions with the same first steps share them, so each step is stored once.

    Args:
        prompt (`str`):
            The problem, without chat template.
        completions (`list[str]`):
            Texts of the S steps, without separators.
        labels (`list[float | None]`):
            Probability in `[0, 1]` that each step is correct. `None` marks context, which is not trained on.
        parents (`list[int]`):
            Index of the step before each step, or `-1` for the prompt. Parents come before their children.
        num_merged (`list[int]`, *optional*):
            Number of original steps in each text: `1` for a single step, `2` for a merged pair. `None` means all `1`.
        step_columns (`dict[str, list]`, *optional*):
            Other columns with one entry per step, named as in `STEP_COLUMNS`.
        extra (`dict[str, Any]`, *optional*):
            All other columns of the row. They are kept unchanged.

    Example:

    ```python
    >>> tree = StepTree("1+2+3?", ["1+2=3.", "3+3=6.", "3+3=7."], [1.0, 1.0, 0.0], [-1, 0, 0])
    >>> [chain.completions for chain in tree.chains()]
    [['1+2=3.', '3+3=6.'], ['1+2=3.', '3+3=7.']]
    ```
    """

    prompt: str
    completions: list[str]
    labels: list[float | None]
    parents: list[int]
    num_merged: list[int] | None = None
    step_columns: dict[str, list] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_row(cls, row: Mapping[str, Any], where: str = "row", blank_steps: bool = False) -> "StepTree":
        """
        Read and validate one dataset row.

        Args:
            row (`Mapping[str, Any]`):
                Row with the columns `prompt`, `completions`, `labels` and, optionally, `parents` and `num_merged`.
                Labels may be booleans, numbers in `[0, 1]` or `None`. The prompt and the steps may be messages, whose texts are read.
                See [`~messages.plain_row`]. Lists may be NumPy arrays, and numbers may be NumPy scalars.
            where (`str`, *optional*, defaults to `"row"`):
                Location of the row (file and line, or dataset and row) for error messages.
            blank_steps (`bool`, *optional*, defaults to `False`):
                Whether to allow steps without text.

        Raises:
            `ValueError`: If a column is missing or a value is invalid. The message names the location, the column and
            the index.
        """
        for name in ("prompt", "completions", "labels"):
            if name not in row:
                raise ValueError(
                    f"{where}: column `{name}` is missing, found {shown(sorted(row), 200)}. A row needs `prompt` (string), "
                    "`completions` (list of step texts) and `labels` (one per step, null for context)."
                )
        lists = ("prompt", "completions", "labels", "parents", "num_merged", *STEP_COLUMNS)
        row = plain_row({**row, **{name: _plain_list(row[name]) for name in lists if name in row}}, where)
        step_columns = {name: row[name] for name in STEP_COLUMNS if isinstance(row.get(name), list)}
        own = {"prompt", "completions", "labels", "parents", "num_merged"} | step_columns.keys()
        completions = _list(row, "completions", where)
        parents = row.get("parents")
        num_merged = row.get("num_merged")
        tree = cls(
            prompt=row["prompt"],
            completions=completions,
            labels=[_label(label, i, where) for i, label in enumerate(_list(row, "labels", where))],
            parents=list(range(-1, len(completions) - 1)) if parents is None else _list(row, "parents", where),
            num_merged=None if num_merged is None else _list(row, "num_merged", where),
            step_columns=step_columns,
            extra={name: value for name, value in row.items() if name not in own},
        )
        tree.validate(where, blank_steps)
        return tree

    def validate(self, where: str = "row", blank_steps: bool = False) -> None:
        """
        Raise `ValueError` if the fields do not form a valid tree of steps. See [`StepTree.from_row`].

        Args:
            where (`str`, *optional*, defaults to `"row"`):
                Location of the tree for error messages.
            blank_steps (`bool`, *optional*, defaults to `False`):
                Whether to allow steps without text. Some benchmarks contain and label them.
        """
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"{where}: column `prompt` holds {shown(self.prompt)}, expected a non-empty string.")
        columns = {"labels": self.labels, "parents": self.parents} | self.step_columns
        if self.num_merged is not None:
            columns["num_merged"] = self.num_merged
        for name, column in columns.items():
            if len(column) != len(self.completions):
                raise ValueError(
                    f"{where}: column `{name}` has {len(column)} entries and `completions` has "
                    f"{len(self.completions)}; expected one per step."
                )
        for i, text in enumerate(self.completions):
            if not isinstance(text, str) or not (text.strip() or blank_steps):
                raise ValueError(
                    f"{where}: `completions[{i}]` is {shown(text)}, expected a non-empty step text. Remove the step."
                )
        for i, parent in enumerate(self.parents):
            if not _is_int(parent) or not -1 <= parent < i:
                raise ValueError(
                    f"{where}: `parents[{i}]` is {shown(parent)}, expected -1 (the prompt) or the index of a step before "
                    f"step {i}. Parents must come before their children."
                )
        for i, count in enumerate(self.num_merged or ()):
            if not _is_int(count) or count < 1:
                raise ValueError(
                    f"{where}: `num_merged[{i}]` is {shown(count)}, expected 1 for a single step, 2 for a pair, ..."
                )

    def label_weights(self, where: str = "row") -> list[float]:
        """
        Return the column `label_weights`, with the weight of each step's label. The weight of a step without a label may be anything.

        Raises:
            `ValueError`: If the tree does not have the column, or the weight of a labelled step is not a number of at least 0.
        """
        weights = self.step_columns.get("label_weights")
        if weights is None:
            raise ValueError(f"{where}: `label_weights` is missing, expected a list with one weight per step.")
        for i, (weight, label) in enumerate(zip(weights, self.labels, strict=True)):
            is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
            if label is not None and not (is_number and 0 <= weight < math.inf):
                raise ValueError(
                    f"{where}: `label_weights[{i}]` is {shown(weight)}, expected a finite number of at least 0 for a labelled step."
                )
        return weights

    def to_row(self) -> dict[str, Any]:
        """Return a row that [`StepTree.from_row`] can read."""
        row = {
            "prompt": self.prompt,
            "completions": self.completions,
            "labels": self.labels,
            "parents": self.parents,
        }
        if self.num_merged is not None:
            row["num_merged"] = self.num_merged
        return row | self.step_columns | self.extra

    def path(self, step: int) -> list[int]:
        """Return the indices of the steps from the first step to `step`, inclusive."""
        path = []
        while step != -1:
            path.append(step)
            step = self.parents[step]
        return path[::-1]

    def leaves(self) -> list[int]:
        """Return the indices of the steps without children."""
        inner = set(self.parents)
        return [i for i in range(len(self.completions)) if i not in inner]

    def chains(self) -> list["StepTree"]:
        """
        Split the tree into one chain per root-to-leaf path. Each chain is a row of TRL's stepwise supervision format.

        Steps before a branch are repeated, with their labels. [`StepTree.from_chains`] is the inverse.
        """
        return [self.take(self.path(leaf)) for leaf in self.leaves()]

    def take(self, path: list[int]) -> "StepTree":
        """Return the steps at `path` as a chain, with this tree's prompt and extra columns."""
        return StepTree(
            prompt=self.prompt,
            completions=[self.completions[i] for i in path],
            labels=[self.labels[i] for i in path],
            parents=list(range(-1, len(path) - 1)),
            num_merged=None if self.num_merged is None else [self.num_merged[i] for i in path],
            step_columns={name: [column[i] for i in path] for name, column in self.step_columns.items()},
            extra=self.extra,
        )

    def keep(self, steps: list[int]) -> "StepTree":
        """Return the tree with only `steps`, in this order. `steps` must contain the parent of each step."""
        place = {-1: -1} | {step: i for i, step in enumerate(steps)}
        return replace(self.take(steps), parents=[place[self.parents[step]] for step in steps])

    @classmethod
    def from_chains(cls, trees: Iterable["StepTree"], where: str = "from_chains") -> tuple["StepTree", int]:
        """
        Join chains (or trees) of one prompt into a tree. Steps with the same text and the same history become one
        step.

        Its label is the mean of the labels that are not `None`, and `None` if all are. With the column `label_weights`, the labels are
        weighted, and the weight of the joined label is the mean of their weights. Trained with `label_weighting="column"`, the tree
        therefore gives the same labels and weights as its chains. Other columns come from the first occurrence. A merged step and
        a single step are never joined.

        Args:
            trees (`Iterable[StepTree]`):
                Chains or trees with the same prompt. Extra columns are taken from the first.
            where (`str`, *optional*, defaults to `"from_chains"`):
                Location of the trees for error messages.

        Returns:
            `tuple[StepTree, int]`: The tree, and the number of its steps with contradicting labels.

        Raises:
            `ValueError`: If `trees` is empty, the prompts differ, only some trees have `label_weights`, or a weight is invalid.
        """
        trees = list(trees)
        if not trees:
            raise ValueError(f"{where}: `trees` is empty, expected at least one chain.")
        if len({tree.prompt for tree in trees}) > 1:
            raise ValueError(f"{where}: the chains have different prompts. Group them by prompt first.")
        names = [name for name in STEP_COLUMNS if any(name in tree.step_columns for tree in trees)]
        num_weighted = sum("label_weights" in tree.step_columns for tree in trees)
        if 0 < num_weighted < len(trees):
            raise ValueError(
                f"{where}: {num_weighted} of the {len(trees)} rows of this problem have a list `label_weights`, so the weights of joined "
                "labels are unknown. Add the column to all rows, such as a weight of 1 for each label, or remove it from all."
            )
        extra = {name: value for name, value in trees[0].extra.items() if name not in names}
        joined = cls(trees[0].prompt, [], [], [], step_columns={name: [] for name in names}, extra=extra)
        found: dict[tuple[int, str, int], int] = {}
        labels: list[list[float]] = []
        weights: list[list[float]] = []
        num_merged: list[int] = []
        for tree in trees:
            tree_weights = tree.label_weights(where) if num_weighted else [1.0] * len(tree.labels)
            index = {-1: -1}
            for i, text in enumerate(tree.completions):
                parent = index[tree.parents[i]]
                count = tree.num_merged[i] if tree.num_merged else 1
                node = found.setdefault((parent, text, count), len(joined.completions))
                if node == len(joined.completions):
                    joined.completions.append(text)
                    joined.parents.append(parent)
                    labels.append([])
                    weights.append([])
                    num_merged.append(count)
                    for name in names:
                        joined.step_columns[name].append(
                            tree.step_columns[name][i] if name in tree.step_columns else None
                        )
                index[i] = node
                if tree.labels[i] is not None:
                    labels[node].append(tree.labels[i])
                    weights[node].append(tree_weights[i])
        joined.labels = [weighted_mean(*given) if given[0] else None for given in zip(labels, weights, strict=True)]
        if num_weighted:
            first = joined.step_columns["label_weights"]
            joined.step_columns["label_weights"] = [
                sum(given) / len(given) if given else before for given, before in zip(weights, first, strict=True)
            ]
        if any(tree.num_merged is not None for tree in trees):
            joined.num_merged = num_merged
        return joined, sum(len(set(given)) > 1 for given in labels)


def weighted_mean(labels: list[float], weights: list[float]) -> float:
    """Return the weighted mean of labels of the same step, and their plain mean if all weights are 0."""
    total = sum(weights)
    if not total:
        return sum(labels) / len(labels)
    return sum(label * weight for label, weight in zip(labels, weights, strict=True)) / total


def _list(row: Mapping[str, Any], name: str, where: str) -> list:
    if not isinstance(row[name], list):
        remedy = " Convert the text to a list, for example with `json.loads`." if isinstance(row[name], str) else ""
        raise ValueError(f"{where}: column `{name}` is a {type(row[name]).__name__}, expected a list.{remedy}")
    return row[name]


def _plain_list(value: Any) -> Any:
    """Return a list, tuple or NumPy array as a new list without NumPy scalars. Anything else is returned unchanged."""
    if hasattr(value, "tolist"):  # NumPy is not imported, since the package must import in milliseconds
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return value
    return [one.item() if getattr(one, "shape", None) == () else one for one in value]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _label(label: Any, i: int, where: str) -> float | None:
    if label is None:
        return None
    if not isinstance(label, (bool, int, float)) or not 0 <= label <= 1:
        raise ValueError(
            f"{where}: `labels[{i}]` is {shown(label)}, expected a boolean, a probability in [0, 1], or null for context. "
            "Map others, such as `+` and `-` or ratings of -1, 0 and 1, to labels first."
        )
    return float(label)
