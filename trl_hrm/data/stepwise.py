r"""
Rows in TRL's stepwise-supervision format, or in this package's own with `parents`, from files or datasets.

```json
{"prompt": "What is 1 + 2 + 3?", "completions": ["1 + 2 = 3.", "3 + 3 = 7."], "labels": [true, false]}
```

Rows of Math-Shepherd, ER-PRM and RLHFlow are recognised by their keys and read as [`build_math_shepherd`] reads them.
"""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

from ..grading import thinking_spans
from ..step_tree import StepTree
from .build import Recipe, build_dataset
from .build_config import BuildStepwiseConfig
from .build_report import BuildReport
from .faults import RowError, other_command
from .math_shepherd import is_conversation, is_er_prm, is_math_shepherd, parse_math_shepherd
from .output import temporary_directory
from .problems import UNUSED, unused_parts, unused_warnings
from .solutions import check_answers, count_answers, solution_warnings
from .sources import DatasetRows, JsonLines, is_json_file, loaded_dataset


THINKING = "rows_with_thinking"
ABOUT = {
    "title": "Step trees",
    "description": "Problems whose steps were judged.",
    "source": "Built from rows in TRL's "
    "[stepwise supervision](https://huggingface.co/docs/trl/dataset_formats#stepwise-supervision) format. The terms of "
    "use are those of the data it was built from.",
    "citation": "",
}


def build_stepwise(config: BuildStepwiseConfig) -> BuildReport:
    """
    Build a dataset from rows in TRL's stepwise-supervision format.

    In the views `"tree"` and `"hrm"` the rows of one prompt are joined: steps with the same text after the same steps become
    one, labelled by the mean.

    Args:
        config ([`BuildStepwiseConfig`]):
            What to read, and what a row is.

    Returns:
        [`BuildReport`]: What was read, written and dropped.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If a row is not valid, or no row is left for training.
    """
    with ExitStack() as stack:
        if len(config.inputs) == 1 and not is_json_file(config.inputs[0]):
            # Beside the output: where temporary files go, there may be no space for a copy of a dataset
            folder = stack.enter_context(temporary_directory(config))
            dataset = stack.enter_context(loaded_dataset(config.inputs[0], config.split, cache_parent=folder))
            source = DatasetRows(dataset, config.columns)
            columns, options = source.types(), {"split": config.split}
        else:
            source, columns, options = JsonLines(config.inputs, config.columns), {}, {}
        recipe = Recipe(
            name="stepwise",
            source=source,
            inputs=config.inputs,
            parse=parse_stepwise,
            columns=columns,
            join_prompts=True,
            options=options,
            about=ABOUT,
            warn=partial(_warnings, source=", ".join(config.inputs)),
        )
        return build_dataset(recipe, config)


def _warnings(report: dict[str, Any], source: str) -> list[str]:
    check_answers(report["notes"], report["records_in"], source)
    warnings = solution_warnings(report["notes"])
    if report["notes"].get(THINKING):
        warnings.append(
            f"{report['notes'][THINKING]:,} rows have the thinking of a reasoning model among their steps. It is kept with its "
            "labels, but searches and selections leave thinking out before they score: remove those steps."
        )
    return warnings + unused_warnings(report["notes"])


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
    notes.update(UNUSED + name for name in unused_parts(record, has_choices=False))
    tree = StepTree.from_row(record, where)
    count_answers(tree.completions, notes, tree.parents)
    if any(map(thinking_spans, tree.completions)):
        notes[THINKING] += 1
    return tree
