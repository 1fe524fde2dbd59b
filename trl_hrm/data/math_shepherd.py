r"""
Math-Shepherd ([paper](https://huggingface.co/papers/2312.08935)) as step trees.

A record is one sampled solution, written twice: `input` has the tag `ки` after each step, and `label` has the step's
label there, `+` or `-`:

```json
{"input": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3. ки\nStep 2: 3 + 3 = 7. The answer is: 7 ки",
 "label": "What is 1 + 2 + 3? Step 1: 1 + 2 = 3. +\nStep 2: 3 + 3 = 7. The answer is: 7 -",
 "task": "GSM8K"}
```
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ..step_tree import StepTree
from .build import Dropped, Recipe, build_dataset
from .build_config import BuildConfig
from .sources import JsonLines


ABOUT = {
    "title": "Math-Shepherd step trees",
    "description": "Sampled solutions of GSM8K and MATH problems whose steps were judged by Monte Carlo rollouts: "
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
FIRST_STEP = "Step 1:"
LABELS = {"+": 1.0, "-": 0.0}


def build_math_shepherd(files: Sequence[str], config: BuildConfig) -> dict[str, Any]:
    """
    Build a dataset from Math-Shepherd files. In the views `"tree"` and `"hrm"` the solutions of one problem are joined:
    steps with the same text after the same steps become one, labelled by the mean.

    Args:
        files (`Sequence[str]`):
            JSON Lines files.
        config ([`BuildConfig`]):
            Options that all builders share.

    Returns:
        `dict[str, Any]`: The build report.
    """
    recipe = Recipe(
        name="math-shepherd",
        source=JsonLines(files),
        inputs=[str(file) for file in files],
        parse=parse_math_shepherd,
        columns={"task": pa.string()},
        join_prompts=True,
        about=ABOUT,
    )
    return build_dataset(recipe, config)


def parse_math_shepherd(record: dict[str, Any], where: str, notes: Counter) -> StepTree:
    """
    The chain of one Math-Shepherd record.

    Args:
        record (`dict[str, Any]`):
            The record.
        where (`str`):
            File and line of the record, for error messages.
        notes (`Counter`):
            Not used: this source has no peculiarities short of dropping a record.

    Raises:
        [`Dropped`]: If the two texts cannot be read as steps and their labels. The reason is one of `no_tag`,
            `text_after_last_tag`, `texts_differ`, `unknown_label`, `no_first_step` and `empty_step`.
        `ValueError`: If `input` or `label` is missing or not a string.
    """
    for name in ("input", "label"):
        if name not in record:
            raise ValueError(
                f"{where}: the key `{name}` is missing, found {sorted(record)}. Is this a Math-Shepherd file?"
            )
        if not isinstance(record[name], str):
            raise ValueError(f"{where}: `{name}` is {record[name]!r}, expected a string.")
    *segments, rest = record["input"].split(TAG)
    if not segments:
        raise Dropped("no_tag")
    if rest.strip():
        raise Dropped("text_after_last_tag")
    labels = _labels(segments, record["label"])
    start = segments[0].rfind(FIRST_STEP)
    if start == -1 or not segments[0][:start].strip():
        raise Dropped("no_first_step")
    steps = [segments[0][start:].strip(), *(segment.strip() for segment in segments[1:])]
    if not all(steps):
        raise Dropped("empty_step")
    return StepTree(
        prompt=segments[0][:start].strip(),
        completions=steps,
        labels=labels,
        parents=list(range(-1, len(steps) - 1)),
        extra={"task": record.get("task")},
    )


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
