"""
Model card of a trained model: base model, data, settings, metrics, and code to score with it.

The template is `pages/templates/model_card.md.jinja`. It replaces TRL's template, which has no settings and metrics, and a quick
start that does not fit these models.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..encoding import dated_template, uses_clock
from ..pages.page import Table, code
from ..step_format import STEP_FORMAT_NAME, StepFormat
from ..training.model_card import quote, save_card, shown_name


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .kl_self_trainer import KLSelfTrainer
    from .step_trainer import StepTrainer

# Fields of a step format that has code without trl_hrm in the card
_PLAIN_TEXT = {"prompt_template": "{problem}", "step_prefix": "", "step_suffix": "", "score_position": "separator"}
COUNTS = {
    "rows_in": "rows",
    "labels_in": "labels",
    "labels_kept": "labelled steps kept",
    "labels_merged": "merged steps among them",
    "labels_joined": "labels joined with another label of the same step",
    "labels_contradicting": "steps with contradicting labels (trained with their mean)",
    "labels_too_long": "labels dropped: longer than `max_length`",
    "trees_without_labels": "problems dropped: no label left",
    "tokens": "tokens in trees (shared prefixes count once)",
    "prompts_with_control_text": "prompts that contain control tokens of the tokenizer",
    "steps_with_control_text": "steps that contain control tokens of the tokenizer",
    "steps_with_separator": "steps that contain a separator",
    "tokens_in_rows": "tokens in rows (split trees repeat their prefix)",
    "labels_per_row_p10": "labelled steps per row, 10th percentile",
    "labels_per_row_median": "labelled steps per row, median",
}


def save_reward_model_card(
    trainer: "StepTrainer",
    model_name: str,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    """Write the model card of a reward model. See [`HRMRewardTrainer.create_model_card`]."""
    step_format, reports = trainer.step_format, trainer.reports.values()
    if step_format.reference_model is not None:
        step_format = replace(step_format, reference_model=shown_name(step_format.reference_model))
    rows = [[title, *(f"{getattr(report, name):,.15g}" for report in reports)] for name, title in COUNTS.items()]
    labels = Table(["", *map(code, trainer.reports)], rows)
    save_card(
        trainer,
        "model_card.md.jinja",
        model_name,
        dataset_name,
        tags,
        license,
        task="text-generation" if step_format.is_causal_lm else "token-classification",
        kind="steps" if trainer._format_is_known else "tokens",
        merged=any(report.labels_merged for report in reports),
        dtype=str(next(trainer.model.parameters()).dtype).removeprefix("torch."),
        task_class="ForCausalLM" if step_format.is_causal_lm else "ForTokenClassification",
        num_labels=None if step_format.is_causal_lm else step_format.num_labels,
        step_format=step_format,
        step_format_name=STEP_FORMAT_NAME,
        # if the dataset was tokenized by the user, the prompt format is unknown
        prompt_code=prompt_code(step_format, trainer.processing_class) if trainer._format_is_known else "",
        scores_code=scores_code(step_format),
        is_plain=step_format.tokenization == "pieces"
        and step_format.head in ("classification", "regression", "lm")
        and replace(step_format, **_PLAIN_TEXT) == step_format,
        data=labels.markdown() if reports else "",  # no reports if the dataset was already prepared
    )


def save_policy_card(
    trainer: "KLSelfTrainer",
    model_name: str,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    """Write the model card of a policy. See [`HRMRewardTrainer.create_model_card`]."""
    is_chat = trainer.processing_class.chat_template is not None
    problem = '[{"role": "user", "content": "1+2+3 = ?"}]' if is_chat else '"1+2+3 = ?"'
    save_card(
        trainer,
        "model_card.md.jinja",
        model_name,
        dataset_name,
        tags,
        license,
        task="text-generation",
        kind="policy",
        problem=problem,
        data="",
    )


def prompt_code(step_format: StepFormat, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return code that encodes a problem."""
    if step_format.prompt_style != "chat":
        bos = "" if tokenizer.bos_token_id is None else "[tokenizer.bos_token_id] + "
        return f"ids = {bos}ids_of(problem)"
    system = step_format.system_prompt
    before = "" if system is None else f'{{"role": "system", "content": {quote(system)}}}, '
    options = "".join(f", {name}={value!r}" for name, value in (step_format.chat_template_kwargs or {}).items())
    template = tokenizer.get_chat_template()
    date = ""
    if step_format.chat_template_date is not None and uses_clock(template):
        dated = dated_template(template, step_format.chat_template_date).removesuffix(template)
        date = f"date = {dated!r}  # instead of today's date\n"
        options += ", chat_template=date + tokenizer.get_chat_template()"
    return (
        f'messages = [{before}{{"role": "user", "content": problem}}]\n{date}'
        f"encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True{options})\n"
        'ids = list(encoded["input_ids"])'
    )


def scores_code(step_format: StepFormat) -> str:
    """Return code that computes scores from the outputs of the model."""
    if step_format.head == "lm":
        right, wrong = (
            token if isinstance(token, int) else f"ids_of({quote(token)})[0]" for token in step_format.label_tokens
        )
        return f"labels = [{wrong}, {right}]\nscores = outputs[places][:, labels].softmax(-1)[:, 1].tolist()"
    if step_format.head == "classification":
        return "scores = outputs[places].softmax(-1)[:, 1].tolist()"
    return f"scores = outputs[places, 0].{'clamp(0, 1)' if step_format.regression_loss == 'mse' else 'sigmoid()'}.tolist()"
