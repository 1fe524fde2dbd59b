r"""
Builder for Math-Shepherd ([paper](https://huggingface.co/papers/2312.08935)) and for the similar formats of ER-PRM and RLHFlow.

A Math-Shepherd record is one sampled solution, written twice: `input` has the tag `ки` after each step, and `label` has the
label of the step, `+` or `-`, in its place:

```json
{"input": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3. ки\nStep 2: 3 + 3 = 7. The answer is: 7 ки",
 "label": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3. +\nStep 2: 3 + 3 = 7. The answer is: 7 -",
 "task": "GSM8K"}
```

An [ER-PRM](https://github.com/hanningzhang/ER-PRM) record has one text with the same tag, and a value in `[0, 1]` for each tag:

```json
{"text": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3. ки\nStep 2: 3 + 3 = 7. The answer is: 7 ки", "value": [0.9, 0.1]}
```

An [RLHFlow](https://github.com/RLHFlow/RLHF-Reward-Modeling) record is a conversation in which the user writes a step and the
assistant replies with its label:

```json
{"conversations": [{"role": "user", "content": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3."}, {"role": "assistant", "content": "+"},
                   {"role": "user", "content": "Step 2: 3 + 3 = 7."}, {"role": "assistant", "content": "-"}]}
```
"""

import re
from collections import Counter
from typing import Any

import pyarrow as pa

from ..io import shown
from ..step_tree import StepTree
from .build import Dropped, Recipe, build_dataset
from .build_config import BuildMathShepherdConfig
from .build_report import BuildReport
from .faults import RowError, other_command
from .output import claimed_output
from .sources import JsonLines


ABOUT = {
    "title": "Math-Shepherd step trees",
    "description": "Sampled solutions of GSM8K and MATH problems whose steps were labelled by Monte Carlo rollouts: "
    "[Math-Shepherd](https://huggingface.co/datasets/peiyi9979/Math-Shepherd).",
    "language": "en",
    "source": "Math-Shepherd: https://huggingface.co/datasets/peiyi9979/Math-Shepherd. See there for its terms of use.",
    "citation": """```bibtex
@article{wang2023mathshepherd,
  title   = {Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations},
  author  = {Wang, Peiyi and Li, Lei and Shao, Zhihong and Xu, R. X. and Dai, Damai and Li, Yifei and Chen, Deli and Wu, Y. and Sui, Zhifang},
  journal = {arXiv preprint arXiv:2312.08935},
  year    = {2023}
}
```""",
}

TAG = "ки"
FIRST_STEP = re.compile(r"(?:#+[ \t]*)?Step 1:")
LABELS = {"+": 1.0, "-": 0.0}


def build_math_shepherd(config: BuildMathShepherdConfig) -> BuildReport:
    """
    Build a dataset from Math-Shepherd, ER-PRM or RLHFlow files. The format of a record is detected from its keys.

    In the views `"tree"` and `"hrm"`, the solutions of one problem are joined into one tree: steps with the same text after the
    same steps become one step, whose label is the mean of theirs.

    Args:
        config ([`BuildMathShepherdConfig`]):
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
            name="math-shepherd",
            source=JsonLines(config.inputs, config.columns),
            inputs=config.inputs,
            parse=parse_math_shepherd,
            columns={"task": pa.string()},
            join_prompts=True,
            about=ABOUT,
        )
        return build_dataset(recipe, config, output)


def parse_math_shepherd(record: dict[str, Any], where: str, notes: Counter) -> StepTree:
    """
    Return one Math-Shepherd, ER-PRM or RLHFlow record as a step tree with a single path.

    Args:
        record (`dict[str, Any]`):
            Record in one of the three formats.
        where (`str`):
            File and line of the record, for error messages.
        notes (`Counter`):
            Not used. It is part of the signature that [`Recipe`] expects.

    Raises:
        [`Dropped`]: If the texts cannot be read as steps with labels. The reason is one of `no_tag`, `text_after_last_tag`,
            `texts_differ`, `unknown_label`, `no_first_step` and `empty_step`.
        [`RowError`]: If a key is missing or its value is invalid.
    """
    if is_conversation(record):
        segments, labels = _conversation(record["conversations"], where)
    elif is_er_prm(record):
        segments, values = _segments(_text(record, "text", where)), record["value"]
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, (bool, int, float)) and 0 <= value <= 1 for value in values):
            raise RowError(
                "unknown_label", where, f"`value` is {shown(record['value'])}, expected numbers from 0 to 1."
            )
        labels = [float(value) for value in values]
        if len(labels) != len(segments):
            raise RowError(
                "values_differ",
                where,
                f"`value` has {len(labels)} values for {len(segments)} steps, expected one value per step.",
            )
    else:
        text, labelled = _text(record, "input", where), _text(record, "label", where)
        segments = _segments(text)
        labels = _labels(segments, labelled)
    starts = [match.start() for match in FIRST_STEP.finditer(segments[0])]
    if not starts or not segments[0][: starts[-1]].strip():
        raise Dropped("no_first_step")
    steps = [segments[0][starts[-1] :].strip(), *(segment.strip() for segment in segments[1:])]
    if not all(steps):
        raise Dropped("empty_step")
    return StepTree(
        prompt=segments[0][: starts[-1]].strip(),
        completions=steps,
        labels=labels,
        parents=list(range(-1, len(steps) - 1)),
        extra={"task": record["task"]} if "task" in record else {},
    )


def is_math_shepherd(record: dict[str, Any]) -> bool:
    """Return whether a record has the keys of Math-Shepherd."""
    return {"input", "label"} <= record.keys() and isinstance(record["label"], str)


def is_er_prm(record: dict[str, Any]) -> bool:
    """Return whether a record has the keys of ER-PRM."""
    return {"text", "value"} <= record.keys()


def is_conversation(record: dict[str, Any]) -> bool:
    """Return whether a record has the keys of RLHFlow."""
    return "conversations" in record


def _text(record: dict[str, Any], name: str, where: str) -> str:
    if name not in record:
        raise RowError(
            "missing_key",
            where,
            f"the key `{name}` is missing, found {shown(sorted(record), 200)}. "
            + (
                other_command(record)
                or "Is this a Math-Shepherd file? Expected `input` and `label`, `text` and `value` (ER-PRM), or `conversations` "
                "(RLHFlow)."
            ),
        )
    if not isinstance(record[name], str):
        raise RowError("not_a_string", where, f"`{name}` is {shown(record[name])}, expected a string.")
    return record[name]


def _segments(text: str) -> list[str]:
    """Return the text before each tag."""
    *segments, rest = text.split(TAG)
    if not segments:
        raise Dropped("no_tag")
    if rest.strip():
        raise Dropped("text_after_last_tag")
    return segments


def _conversation(messages: Any, where: str) -> tuple[list[str], list[float]]:
    """Return the steps and labels of an RLHFlow conversation."""
    turns = messages if isinstance(messages, list) else []
    if (
        not turns
        or len(turns) % 2
        or not all(
            isinstance(turn, dict)
            and turn.get("role") == ("assistant" if i % 2 else "user")
            and isinstance(turn.get("content"), str)
            for i, turn in enumerate(turns)
        )
    ):
        raise RowError(
            "no_conversation",
            where,
            f"`conversations` is {shown(messages)}, expected messages with `role` and `content` that alternate between a step "
            "(role `user`) and its label (role `assistant`).",
        )
    labels = [LABELS.get(turn["content"].strip()) for turn in turns[1::2]]
    if None in labels:
        raise Dropped("unknown_label")
    return [turn["content"] for turn in turns[::2]], labels


def _labels(segments: list[str], text: str) -> list[float]:
    labels = []
    for segment in segments:
        if not text.startswith(segment) or len(text) == len(segment):
            raise Dropped("texts_differ")
        sign = text[len(segment)]
        if sign not in LABELS:
            raise Dropped("unknown_label")
        labels.append(LABELS[sign])
        text = text[len(segment) + 1 :]
    if text.strip():
        raise Dropped("texts_differ")
    return labels
