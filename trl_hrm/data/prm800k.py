r"""
Builder for PRM800K ([Let's Verify Step by Step](https://huggingface.co/papers/2305.20050)), phases 1 and 2.

A record is one annotated solution of one problem. At each of its `steps`, the annotator rated some `completions`. The solution
continues from one of them (`chosen_completion`), or from a step that the annotator wrote (`human_completion`):

```json
{"question": {"problem": "What is 1 + 2 + 3?", "ground_truth_answer": "6"},
 "label": {"finish_reason": "solution", "steps": [
   {"completions": [{"text": "1 + 2 = 3.", "rating": 1, "flagged": false},
                    {"text": "1 + 2 = 4.", "rating": -1, "flagged": false}],
    "chosen_completion": 0, "human_completion": null},
   {"completions": [{"text": "3 + 3 = 7.", "rating": -1, "flagged": false}],
    "chosen_completion": null,
    "human_completion": {"text": "3 + 3 = 6.", "rating": null, "source": "human", "flagged": false}},
   {"completions": [{"text": "So it is 6.\n\n# Answer\n\n6", "rating": 1, "flagged": false}],
    "chosen_completion": 0, "human_completion": null}]}}
```
"""

from collections import Counter
from functools import partial
from typing import Any

import pyarrow as pa

from ..io import shown
from ..step_tree import StepTree
from ..terminal import one_line
from .build import Dropped, Recipe, build_dataset
from .build_config import BuildPRM800KConfig
from .build_report import BuildReport
from .faults import RowError, other_command
from .output import claimed_output
from .sources import JsonLines


ABOUT = {
    "title": "PRM800K step trees",
    "description": "Solutions of MATH problems whose steps were labelled by human annotators: "
    "[PRM800K](https://github.com/openai/prm800k).",
    "license": "mit",
    "language": "en",
    "source": "PRM800K is released by OpenAI under the MIT license: https://github.com/openai/prm800k.",
    "citation": """```bibtex
@article{lightman2023lets,
  title   = {Let's Verify Step by Step},
  author  = {Lightman, Hunter and Kosaraju, Vineet and Burda, Yura and Edwards, Harri and Baker, Bowen and Lee, Teddy and Leike, Jan and Schulman, John and Sutskever, Ilya and Cobbe, Karl},
  journal = {arXiv preprint arXiv:2305.20050},
  year    = {2023}
}
```""",
}

KEPT_FINISH_REASONS = ("solution", "found_error")
SCHEMA = "not_the_schema"  # reason of a `RowError`


def build_prm800k(config: BuildPRM800KConfig) -> BuildReport:
    """
    Build a dataset from PRM800K files.

    Args:
        config ([`BuildPRM800KConfig`]):
            Inputs and options of the build.

    Returns:
        [`BuildReport`]: Report of what was read, written and dropped.

    Raises:
        `FileExistsError`: If the output exists and may not be replaced.
        `FileNotFoundError`: If an input does not exist.
        `ValueError`: If a record is invalid and `config.strict` is set, or if no row is left for training.
    """
    with claimed_output(config, config.inputs) as output:
        recipe = Recipe(
            name="prm800k",
            source=JsonLines(config.inputs, config.columns),
            inputs=config.inputs,
            parse=partial(parse_prm800k, neutral=config.neutral_label, drop_screening=config.drop_screening),
            columns={"answer": pa.string(), "finish_reason": pa.string()},
            is_final=is_final,
            options={"neutral": config.neutral, "drop_screening": config.drop_screening},
            about=ABOUT,
        )
        return build_dataset(recipe, config, output)


def is_final(text: str) -> bool:
    """Return whether a step ends its solution. The last step in PRM800K has the answer under the heading `# Answer`."""
    return "# Answer" in text


def parse_prm800k(
    record: dict[str, Any], where: str, notes: Counter, neutral: float | None = 0.0, drop_screening: bool = False
) -> StepTree:
    """
    Return the step tree of one PRM800K record.

    Args:
        record (`dict[str, Any]`):
            PRM800K record.
        where (`str`):
            File and line of the record, for error messages.
        notes (`Counter`):
            Counter of irregularities in the records. It is updated in place.
        neutral (`float`, *optional*, defaults to `0.0`):
            Label of a step rated 0. `None` keeps the step as context without a label.
        drop_screening (`bool`, *optional*, defaults to `False`):
            Drop the records that were used for annotator screening or quality control.

    Raises:
        [`Dropped`]: If the annotator did not finish the solution or marked the problem as bad, or if `drop_screening` is set and the
            record was used for screening or quality control.
        [`RowError`]: If the record does not follow the PRM800K schema, or its problem is blank.
    """
    question = _get(record, "question", dict, where)
    label = _get(record, "label", dict, where)
    finish_reason = _get(label, "finish_reason", (str, type(None)), f"{where}: `label`")
    if finish_reason not in KEPT_FINISH_REASONS:
        raise Dropped(f"finish_reason={one_line(str(finish_reason), 60)}")
    if drop_screening and (record.get("is_quality_control_question") or record.get("is_initial_screening_question")):
        raise Dropped("screening")
    problem = _get(question, "problem", str, f"{where}: `question`").strip()
    if not problem:
        raise RowError("blank_prompt", where, "column `prompt` holds '', expected a non-empty string.")
    tree = StepTree(
        prompt=problem,
        completions=[],
        labels=[],
        parents=[],
        extra={"answer": question.get("ground_truth_answer"), "finish_reason": finish_reason},
    )
    labels = {1: 1.0, 0: neutral, -1: 0.0, None: None}
    parent = -1
    steps = _get(label, "steps", (list, type(None)), f"{where}: `label`") or []
    for number, step in enumerate(steps):
        parent = _add_step(tree, parent, step, labels, f"{where}: `label.steps[{number}]`", notes)
        if parent is None:
            notes["steps_after_end"] += len(steps) - number - 1
            break
    # Prune the steps that have no label and no labelled step below them, since nothing can be learned from them
    needed = [label is not None for label in tree.labels]
    for i in reversed(range(len(needed))):
        if needed[i] and tree.parents[i] != -1:
            needed[tree.parents[i]] = True
    kept = [i for i, is_needed in enumerate(needed) if is_needed]
    notes["pruned_steps"] += len(needed) - len(kept)
    tree = tree.keep(kept)
    tree.validate(where)
    return tree


def _add_step(
    tree: StepTree, parent: int, step: Any, labels: dict[int | None, float | None], where: str, notes: Counter
) -> int | None:
    """Add the candidates of one step below `parent` and return the index of the one that the solution continues from, if any."""
    chosen = _get(step, "chosen_completion", (int, type(None)), where)
    human = _get(step, "human_completion", (dict, type(None)), where)
    candidates = list(_get(step, "completions", (list, type(None)), where) or [])
    if chosen is not None and not 0 <= chosen < len(candidates):
        raise RowError(
            SCHEMA,
            where,
            f"`chosen_completion` is {shown(chosen)}, expected null or an index of the {len(candidates)} completions.",
        )
    if chosen is not None and human is not None:
        notes["ignored_human_completions"] += 1
    found: dict[str, int] = {}
    given: dict[str, list[float]] = {}
    last = None
    for i, candidate in enumerate([*candidates, human] if chosen is None and human is not None else candidates):
        is_human = i == len(candidates)
        place = f"{where}: `{'human_completion' if is_human else f'completions[{i}]'}`"
        text = _get(candidate, "text", str, place).strip()
        if not text:
            notes["empty_candidates"] += 1
            continue
        if text in found:
            notes["duplicate_candidates"] += 1
        else:
            found[text] = len(tree.completions)
            given[text] = []
            tree.completions.append(text)
            tree.labels.append(None)
            tree.parents.append(parent)
        name = "rating"
        if is_human:
            name = next((name for name in ("corrected_rating", "rating") if candidate.get(name) is not None), None)
        # A step written by the annotator counts as positive if it has no rating, since the solution continues from it
        rating = 1 if name is None else _get(candidate, name, (int, type(None)), place)
        if rating not in labels:
            raise RowError(SCHEMA, place, f"`{name}` is {shown(rating)}, expected -1, 0, 1 or null.")
        if candidate.get("flagged"):
            notes["flagged_candidates"] += 1
        elif labels[rating] is not None:
            given[text].append(labels[rating])
        if is_human:
            notes["human_completions"] += 1
        if is_human or i == chosen:
            last = found[text]
    for text, values in given.items():
        tree.labels[found[text]] = sum(values) / len(values) if values else None
        notes["contradicting_labels"] += len(set(values)) > 1
    return last


def _get(value: Any, name: str, kind: type | tuple[type, ...], where: str) -> Any:
    if not isinstance(value, dict):
        raise RowError(SCHEMA, where, f"found {shown(value)}, expected a JSON object with the key `{name}`.")
    if name not in value:
        raise RowError(
            SCHEMA,
            where,
            f"the key `{name}` is missing, found {shown(sorted(value), 200)}. "
            + (other_command(value) or "Is this a PRM800K file of phase 1 or 2?"),
        )
    found = value[name]
    if not isinstance(found, kind) or isinstance(found, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise RowError(SCHEMA, where, f"`{name}` is {shown(found)}, expected {names}.")
    return found
