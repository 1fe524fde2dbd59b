r"""
Rows in TRL's stepwise-supervision format, or in this package's own with `parents`, from files or datasets.

```json
{"prompt": "What is 1 + 2 + 3?", "completions": ["1 + 2 = 3.", "3 + 3 = 7."], "labels": [true, false]}
```

Rows of Math-Shepherd, ER-PRM and RLHFlow are recognised by their keys and read as [`build_math_shepherd`] reads them.
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
from .faults import RowError, other_command
from .math_shepherd import is_conversation, is_er_prm, is_math_shepherd, parse_math_shepherd
from .output import temporary_directory
from .problems import UNUSED, parts_warning, unused_parts
from .solutions import check_answers, count_answers, solution_warnings
from .sources import DatasetRows, JsonLines, is_json_file


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
            Files of JSON Lines or of a JSON array, or one directory or Hub name of a dataset.
        config ([`BuildConfig`]):
            Options that all builders share.
        split (`str`, *optional*, defaults to `"train"`):
            Split to read of a dataset. Files have none.

    Returns:
        `dict[str, Any]`: The build report.
    """
    inputs = [str(name) for name in inputs]
    if len(inputs) == 1 and not is_json_file(inputs[0]):
        # A cache of its own: for a local directory, the shared one may hold the rows of another of the same name.
        with temporary_directory(config) as cache:
            cache_dir = cache if Path(inputs[0]).is_dir() else None
            source = DatasetRows(load_dataset(inputs[0], split=split, cache_dir=cache_dir), config.columns)
            return build_dataset(_recipe(source, inputs, source.types(), {"split": split}), config)
    return build_dataset(_recipe(JsonLines(inputs, config.columns), inputs, {}, {}), config)


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
    parts = {name: count for name, count in report["notes"].items() if name.startswith(UNUSED)}
    return warnings + parts_warning({name.removeprefix(UNUSED): count for name, count in parts.items()})


def parse_stepwise(record: dict[str, Any], where: str, notes: Counter) -> StepTree:
    """
    The tree of one row, validated.

    Args:
        record (`dict[str, Any]`):
            The row.
        where (`str`):
            Place of the row, for error messages.
        notes (`Counter`):
            Counts columns that may carry a part of the problem and are not in its text, rows whose steps look like whole
            solutions, and rows with the thinking of a reasoning model.

    Raises:
        [`RowError`]: If the prompt or a step is blank.
        `ValueError`: If the row is not valid otherwise. See [`StepTree.from_row`].
    """
    if "completions" not in record:
        if is_math_shepherd(record) or is_er_prm(record) or is_conversation(record):
            return parse_math_shepherd(record, where, notes)
        remedy = other_command(record)
        if remedy:
            raise ValueError(
                f"{where}: found {sorted(record)}, expected `prompt`, `completions` and `labels`. {remedy}"
            )
    prompt, steps = record.get("prompt"), record.get("completions")
    if isinstance(prompt, str) and not prompt.strip():
        raise RowError("blank_prompt", where, f"column `prompt` holds {prompt!r}, expected a non-empty string.")
    for i, step in enumerate(steps if isinstance(steps, list) else ()):
        if isinstance(step, str) and not step.strip():
            raise RowError(
                "blank_step",
                where,
                f"`completions[{i}]` is {step!r}, expected a non-empty step text. Remove the step.",
            )
    for name in unused_parts(record, has_choices=False):
        notes[f"{UNUSED}{name}"] += 1
    tree = StepTree.from_row(record, where)
    count_answers(tree.completions, notes, tree.parents)
    if any(map(thinking_spans, tree.completions)):
        notes[THINKING] += 1
    return tree
