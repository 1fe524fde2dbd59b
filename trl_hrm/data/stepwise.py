r"""
Builder for rows in TRL's stepwise supervision format, with an optional `parents` column for trees, from files or datasets.

```json
{"prompt": "What is 1 + 2 + 3?", "completions": ["1 + 2 = 3.", "3 + 3 = 7."], "labels": [true, false]}
```

Math-Shepherd, ER-PRM and RLHFlow rows are detected by their keys and parsed as in [`build_math_shepherd`], and rows of ProcessBench,
MR-GSM8K, PRMBench and BIG-Bench Mistake as in [`~data.benchmark_rows.parse_benchmark_row`].
"""

from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any

import pyarrow as pa

from ..grading import thinking_spans
from ..io import shown
from ..messages import plain_row
from ..step_tree import StepTree
from .benchmark_rows import BENCHMARK, is_benchmark_row, parse_benchmark_row
from .build import Recipe, build_dataset
from .build_config import BuildStepwiseConfig
from .build_report import BuildReport
from .faults import RowError, other_command
from .math_shepherd import is_conversation, is_er_prm, is_math_shepherd, parse_math_shepherd
from .output import claimed_output
from .problems import UNUSED, unused_parts, unused_warnings
from .solutions import check_answers, count_answers, solution_warnings
from .sources import DatasetRows, JsonLines, MixedRows, is_json_file, loaded_dataset, refuse_repeated


THINKING = "rows_with_thinking"
MIXTURE_COLUMNS = {
    "source": "the input that the row comes from, as named in the command",
    "original_source": "the column `source` of the input",
}
ABOUT = {
    "title": "Step trees",
    "description": "Problems with labelled solution steps.",
    "source": "Built from rows in TRL's "
    "[stepwise supervision](https://huggingface.co/docs/trl/dataset_formats#stepwise-supervision) format. The terms of "
    "use of the source data apply.",
    "citation": "",
}


def build_stepwise(config: BuildStepwiseConfig) -> BuildReport:
    """
    Build a dataset from rows in TRL's stepwise supervision format.

    In the views `"tree"` and `"hrm"`, the rows of one prompt are joined into one tree: steps with the same text after the same
    steps become one step, whose label is the mean of theirs.

    Several inputs are mixed: each row gets the column `source`, and the report counts rows and labels per input. The rows of a prompt
    are joined within an input only, so a problem of two inputs has a row of each, in the same split. Trainers join the two. With
    `config.weights`, inputs that have more labels than their share are sampled by problem. See [`~data.build.sampling_limits`].

    Args:
        config ([`BuildStepwiseConfig`]):
            Inputs and options of the build.

    Returns:
        [`BuildReport`]: Report of what was read, written and dropped.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If an input is given twice, a row is invalid, a column has different types in two inputs, or no row is left for
            training. Rows with a blank prompt or step are dropped, unless
            `config.strict` is set.
    """
    with ExitStack() as stack:
        output = stack.enter_context(claimed_output(config, config.inputs))
        sources, options = [], {}
        for number, name in enumerate(config.inputs):
            refuse_repeated(name, config.inputs[:number])
            if is_json_file(name):
                sources.append(JsonLines([name], config.columns))
            else:
                # Cache next to the output: the system's temporary directory may be too small for a copy of the dataset
                dataset = stack.enter_context(loaded_dataset(name, config.split, cache_parent=output.work))
                sources.append(DatasetRows(dataset, config.columns, name))
                options["split"] = config.split
        source = sources[0] if len(sources) == 1 else MixedRows(sources, config.inputs)
        columns, features = ({}, {}) if isinstance(source, JsonLines) else (source.types(), source.features())
        about = ABOUT
        for found in (columns, features):
            found.pop("problem_id", None)  # becomes a string
        if len(sources) > 1:
            for found in (columns, features):
                if "source" in found:
                    found["original_source"] = found.pop("source")
            columns["source"] = pa.string()
            about = ABOUT | {"columns": MIXTURE_COLUMNS}
        if config.weights is not None:
            options["weights"] = [f"{weight:.15g}" for weight in config.weights]
        recipe = Recipe(
            name="stepwise",
            source=source,
            inputs=config.inputs,
            parse=partial(parse_stepwise, view=config.view),
            columns=columns,
            features=features,
            join_prompts=True,
            options=options,
            about=about,
            weights=config.weights,
            warn=partial(_warnings, source=", ".join(config.inputs)),
        )
        return build_dataset(recipe, config, output)


def _warnings(report: dict[str, Any], source: str) -> list[str]:
    check_answers(report["notes"], report["records_in"], source)
    warnings = solution_warnings(report["notes"])
    if report["notes"].get(THINKING):
        warnings.append(
            f"{report['notes'][THINKING]:,} rows have steps with the thinking of a reasoning model. They are kept with their labels, "
            "but search and selection remove thinking before they score a solution. Remove these steps from the rows."
        )
    benchmarks = {name.removeprefix(BENCHMARK): n for name, n in report["notes"].items() if name.startswith(BENCHMARK)}
    if benchmarks:
        rows = ", ".join(f"{number:,} of {name}" for name, number in benchmarks.items())
        warnings.append(
            f"rows of benchmarks become training data ({rows}). Do not measure on these files, and pass the files that you measure on to "
            "--exclude."
        )
    return warnings + unused_warnings(report["notes"])


def parse_stepwise(
    record: dict[str, Any], where: str, notes: Counter, view: str = "tree"
) -> StepTree | list[StepTree]:
    """
    Return the validated step tree of one row, or the trees of a row of PRMBench.

    Args:
        record (`dict[str, Any]`):
            Row in TRL's stepwise supervision format or one of the other formats of this module.
        where (`str`):
            Location of the row, for error messages.
        notes (`Counter`):
            Counter of unused columns that may contain a part of the problem, of rows whose steps look like whole solutions, and of
            rows with the thinking of a reasoning model. It is updated in place.
        view (`str`, *optional*, defaults to `"tree"`):
            View that is built.

    Raises:
        [`RowError`]: If the prompt or a step is blank.
        `ValueError`: If the row is invalid in another way. See [`StepTree.from_row`].
    """
    other = ""
    if record.get("completions") is None:
        if is_math_shepherd(record) or is_er_prm(record) or is_conversation(record):
            return parse_math_shepherd(record, where, notes)
        if is_benchmark_row(record):
            return parse_benchmark_row(record, where, notes, view)
        other = other_command(record)
    if other or not {"prompt", "completions", "labels"} <= record.keys():
        missing = [f"`{name}`" for name in ("prompt", "completions", "labels") if record.get(name) is None]
        raise ValueError(
            f"{where}: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing, found {shown(sorted(record), 200)}. A row "
            "needs `prompt` (string), `completions` (list of step texts) and `labels` (one per step, null for context). For other column names, "
            f"use --columns, such as --columns prompt=problem completions=steps. {other}".rstrip()
        )
    texts = plain_row(record, where)
    prompt, steps = texts.get("prompt"), texts.get("completions")
    if isinstance(prompt, str) and not prompt.strip():
        raise RowError("blank_prompt", where, f"column `prompt` holds {shown(prompt)}, expected a non-empty string.")
    for i, step in enumerate(steps if isinstance(steps, list) else ()):
        if isinstance(step, str) and not step.strip():
            raise RowError(
                "blank_step",
                where,
                f"`completions[{i}]` is {shown(step)}, expected a non-empty step text. Remove the step.",
            )
    notes.update(UNUSED + name for name in unused_parts(record, has_choices=False))
    tree = StepTree.from_row(texts, where)
    if view == "orm" and any(count > 1 for count in tree.num_merged or ()):
        raise ValueError(
            f"{where}: found merged steps (`num_merged`), which would become solutions of their own in the view orm. Build it from the view "
            "tree."
        )
    count_answers(tree.completions, notes, tree.parents)
    if any(map(thinking_spans, tree.completions)):
        notes[THINKING] += 1
    return tree
