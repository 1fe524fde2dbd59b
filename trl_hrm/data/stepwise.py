r"""
Rows in TRL's stepwise-supervision format, or in this package's own with `parents`, from files or datasets.

```json
{"prompt": "What is 1 + 2 + 3?", "completions": ["1 + 2 = 3.", "3 + 3 = 7."], "labels": [true, false]}
```
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from datasets import load_dataset

from ..grading import thinking_spans
from ..step_tree import StepTree
from .build import Recipe, build_dataset
from .build_config import BuildConfig
from .output import temporary_directory
from .solutions import check_answers, count_answers, solution_warnings
from .sources import DatasetRows, JsonLines


THINKING = "rows_with_thinking"
ABOUT = {
    "title": "Step trees",
    "description": "Problems whose steps were judged.",
    "source": "Built from rows in TRL's "
    "[stepwise supervision](https://huggingface.co/docs/trl/dataset_formats#stepwise-supervision) format. The terms of "
    "use are those of the data it was built from.",
    "citation": "",
}


def build_stepwise(inputs: Sequence[str], config: BuildConfig, split: str = "train") -> dict[str, Any]:
    """
    Build a dataset from rows in TRL's stepwise-supervision format. In the views `"tree"` and `"hrm"` the rows of one
    prompt are joined: steps with the same text after the same steps become one, labelled by the mean.

    Args:
        inputs (`Sequence[str]`):
            JSON Lines files, or one directory or Hub name of a dataset.
        config ([`BuildConfig`]):
            Options that all builders share.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset. Files have none.

    Returns:
        `dict[str, Any]`: The build report.
    """
    inputs = [str(name) for name in inputs]
    if len(inputs) == 1 and not Path(inputs[0]).is_file() and not inputs[0].endswith((".json", ".jsonl")):
        # A cache of its own: for a local directory, the shared one may hold the rows of another of the same name.
        with temporary_directory(config) as cache:
            cache_dir = cache if Path(inputs[0]).is_dir() else None
            source = DatasetRows(load_dataset(inputs[0], split=split, cache_dir=cache_dir))
            return build_dataset(_recipe(source, inputs, source.types(), {"split": split}), config)
    return build_dataset(_recipe(JsonLines(inputs), inputs, {}, {}), config)


def _recipe(
    source: JsonLines | DatasetRows, inputs: list[str], columns: dict[str, Any], options: dict[str, Any]
) -> Recipe:
    return Recipe(
        name="stepwise",
        source=source,
        inputs=inputs,
        parse=parse_stepwise,
        columns=columns,
        join_prompts=True,
        options=options,
        about=ABOUT,
        warn=partial(_warnings, source=", ".join(inputs)),
    )


def _warnings(report: dict[str, Any], source: str) -> list[str]:
    check_answers(report["notes"], report["records_in"], source)
    warnings = solution_warnings(report["notes"])
    if report["notes"].get(THINKING):
        warnings.append(
            f"{report['notes'][THINKING]:,} rows have the thinking of a reasoning model among their steps. It is kept with its "
            "labels, but searches and selections leave thinking out before they score: remove those steps."
        )
    return warnings


def parse_stepwise(record: dict[str, Any], where: str, notes: Counter) -> StepTree:
    """
    The tree of one row, validated.

    Args:
        record (`dict[str, Any]`):
            The row.
        where (`str`):
            Place of the row, for error messages.
        notes (`Counter`):
            Counts rows whose steps look like whole solutions, and rows with the thinking of a reasoning model.

    Raises:
        `ValueError`: If the row is not valid. See [`StepTree.from_row`].
    """
    tree = StepTree.from_row(record, where)
    count_answers(tree.completions, notes, tree.parents)
    if any(map(thinking_spans, tree.completions)):
        notes[THINKING] += 1
    return tree
