"""Sections of a reward model's card: code that scores steps with it, in three ways, its step format, and its data."""

import json
import shlex
from dataclasses import fields
from typing import TYPE_CHECKING

from ..encoding import dated_template, uses_clock
from ..heads import num_labels
from ..step_format import STEP_FORMAT_NAME, StepFormat
from .forest_dataset import ForestReport
from .model_card import CardFacts, table


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WITH_TRL_HRM = """\
```python
from trl_hrm import StepScorer

scorer = StepScorer.from_pretrained({model_id})
scores = scorer.score(["1+2+3 = ?"], [[["1+2 = 3.", "3+3 = 6."]]])[0][0]  # one score per step
```"""

WITH_TRANSFORMERS = """\
### With transformers alone

```python
import torch
from transformers import {imported}

tokenizer = AutoTokenizer.from_pretrained({model_id})
model = {load}.eval()
problem, steps = "1+2+3 = ?", ["1+2 = 3.", "3+3 = 6."]


def ids_of(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


{prompt}
places = []
for step in steps:  # each tokenised alone, so that no token crosses a border
    ids += ids_of(step) + ids_of({separator})
    places.append(len(ids) - 1)  # here the step is judged
with torch.inference_mode():
    outputs = model(input_ids=torch.tensor([ids])).logits[0]
{scores}
```"""

WITH_VLLM = """\
### With vLLM

```bash
vllm serve {served} --runner pooling --dtype {dtype}
```

After the code above:

```python
import json
from urllib.request import Request, urlopen

body = {{"model": {served_name}, "input": [ids], "task": "token_classify", "use_activation": False}}
request = Request(
    "http://localhost:8000/pooling", json.dumps(body).encode(), {{"Content-Type": "application/json"}}
)
with urlopen(request) as response:
    outputs = torch.tensor(json.load(response)["data"][0]["data"])
{scores}
```"""

MERGE = """\
vLLM serves no adapter of a token classifier. Merge it into its base model first, after the code above:

```python
model.merge_and_unload().save_pretrained({merged})
tokenizer.save_pretrained({merged})
```

"""

COUNTS = {
    "rows_in": "rows",
    "labels_in": "labels",
    "labels_kept": "judged steps kept",
    "labels_merged": "of which merged steps",
    "labels_joined": "labels of a step that stands in several rows, joined",
    "labels_contradicting": "steps whose labels contradict each other (their mean is trained)",
    "labels_too_long": "labels dropped: longer than `max_length`",
    "trees_without_labels": "problems dropped: no label left",
    "tokens": "distinct tokens",
    "prompts_with_control_text": "prompts that hold control tokens of the tokenizer",
    "steps_with_control_text": "steps that hold control tokens of the tokenizer",
    "steps_with_separator": "steps that hold a separator",
    "tokens_in_rows": "tokens in rows: more where split trees repeat their prefix",
    "labels_per_row_p10": "judged steps per row, 10th percentile",
    "labels_per_row_median": "judged steps per row, median",
}


def quick_start(
    facts: CardFacts, step_format: StepFormat, tokenizer: "PreTrainedTokenizerBase", dtype: str, merged: bool
) -> str:
    """
    Code that scores the steps of a solution with this model: with trl_hrm, with transformers alone, and with vLLM.

    Args:
        facts ([`CardFacts`]):
            Facts of the run.
        step_format ([`StepFormat`]):
            Text contract of the model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        dtype (`str`):
            Type of its weights.
        merged (`bool`):
            Whether it was trained on merged steps.
    """
    scores = _scores(step_format)
    words = {
        "model_id": _quote(facts.model_id),
        "load": _load(facts, step_format, dtype),
        "imported": "AutoTokenizer" if facts.adapter else f"{_auto_class(step_format)}, AutoTokenizer",
        "prompt": _prompt(step_format, tokenizer),
        "separator": _quote(step_format.step_separator),
        "scores": scores,
    }
    intro = (
        "This model judges each step of a solution with a score from 0 (wrong) to 1 (right). Its scores depend on the token ids: "
        f"`{STEP_FORMAT_NAME}` holds how they are made, and the code below makes them so."
    )
    if step_format.sanitize_control_tokens:
        intro += (
            " Control tokens in the text of a problem or a step, such as `<|im_end|>`, are plain text to this model: trl_hrm "
            "encodes them so, and the other code does not."
        )
    if merged:
        intro += (
            " It has also learned to judge a step merged with the one before it: `scorer.score(..., spans=(1, 2))` does both, and "
            "keeps the better score."
        )
    with_transformers = WITH_TRANSFORMERS.format(**words)
    if facts.adapter:
        with_transformers = with_transformers.replace(
            "import torch\n", f"import torch\nfrom peft import {_auto_class(step_format, 'AutoPeftModel')}\n"
        )
    parts = ["## Quick start", intro, WITH_TRL_HRM.format(**words), with_transformers]
    if step_format.head != "lm":
        parts.append(_with_vllm(facts, dtype, scores))
    return "\n\n".join(parts)


def step_format_section(step_format: StepFormat) -> str:
    return f"## Step format\n\n`{STEP_FORMAT_NAME}`:\n\n````json\n{step_format.to_json()}\n````"


def data_section(facts: CardFacts, reports: dict[str, ForestReport]) -> str:
    """What became of the labels of each dataset. Empty if they were given as tokens."""
    if not reports:
        return ""
    rows = [
        (f"`{name}`", *(f"{getattr(report, field.name):,.15g}" for field in fields(report) if field.name in COUNTS))
        for name, report in reports.items()
    ]
    columns = list(zip(("", *COUNTS.values()), *rows, strict=True))
    title = "## Data" + (f"\n\n{facts.dataset}." if facts.dataset else "")
    return table(title, columns[0], columns[1:])


def _auto_class(step_format: StepFormat, prefix: str = "AutoModel") -> str:
    return f"{prefix}For{'CausalLM' if step_format.head == 'lm' else 'TokenClassification'}"


def _load(facts: CardFacts, step_format: StepFormat, dtype: str) -> str:
    if not facts.adapter:
        return f"{_auto_class(step_format)}.from_pretrained({_quote(facts.model_id)}, dtype=torch.{dtype})"
    labels = "" if step_format.head == "lm" else f", num_labels={num_labels(step_format)}"
    return f"{_auto_class(step_format, 'AutoPeftModel')}.from_pretrained({_quote(facts.model_id)}, dtype=torch.{dtype}{labels})"


def _prompt(step_format: StepFormat, tokenizer: "PreTrainedTokenizerBase") -> str:
    if step_format.prompt_style == "chat":
        system = step_format.system_prompt
        before = "" if system is None else f'{{"role": "system", "content": {_quote(system)}}}, '
        options = "".join(f", {name}={value!r}" for name, value in (step_format.chat_template_kwargs or {}).items())
        template = tokenizer.get_chat_template()
        date = ""
        if step_format.chat_template_date is not None and uses_clock(template):
            dated = dated_template(template, step_format.chat_template_date).removesuffix(template)
            date = f"date = {dated!r}  # in place of today's\n"
            options += ", chat_template=date + tokenizer.get_chat_template()"
        return (
            f'messages = [{before}{{"role": "user", "content": problem}}]\n{date}'
            f"encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True{options})\n"
            'ids = list(encoded["input_ids"])'
        )
    return (
        "ids = ids_of(problem)"
        if tokenizer.bos_token_id is None
        else "ids = [tokenizer.bos_token_id] + ids_of(problem)"
    )


def _scores(step_format: StepFormat) -> str:
    if step_format.head == "lm":
        right, wrong = map(_quote, step_format.label_tokens)
        return (
            f"labels = [ids_of({wrong})[0], ids_of({right})[0]]\n"
            "scores = outputs[places][:, labels].softmax(-1)[:, 1].tolist()"
        )
    if step_format.head == "classification":
        return "scores = outputs[places].softmax(-1)[:, 1].tolist()"
    return f"scores = outputs[places, 0].{'clamp(0, 1)' if step_format.regression_loss == 'mse' else 'sigmoid()'}.tolist()"


def _with_vllm(facts: CardFacts, dtype: str, scores: str) -> str:
    served = f"{facts.model_name}-merged" if facts.adapter else facts.model_id
    merge = MERGE.format(merged=_quote(served)) if facts.adapter else ""
    title, code = WITH_VLLM.format(
        served=shlex.quote(served), served_name=_quote(served), dtype=dtype, scores=scores
    ).split("\n\n", 1)
    return f"{title}\n\n{merge}{code}"


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
