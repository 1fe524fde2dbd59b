"""
Model card of a trained model: base model, data, settings, metrics, and code to score with it.

The template is `pages/templates/model_card.md.jinja`. It replaces TRL's template, which has no settings and metrics, and a quick
start that does not fit these models.
"""

import json
import math
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.integrations import is_wandb_available

from .. import __version__
from .._compat import get_comet_experiment_url, get_config_model_id, get_trackio_space_url
from ..encoding import dated_template, uses_clock
from ..io import shell_word
from ..pages.page import Table, code, markdown, resource
from ..step_format import STEP_FORMAT_NAME, StepFormat
from ..terminal import printable


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .kl_self_trainer import KLSelfTrainer
    from .step_trainer import StepTrainer

SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "bf16",
    "fp16",
    "seed",
    "max_length",
)
# Fields of a step format that has code without trl_hrm in the card
_PLAIN_TEXT = {"prompt_template": "{problem}", "step_prefix": "", "step_suffix": "", "score_position": "separator"}
# Logged by an evaluation, but not metrics of the model
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
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
PACKAGES = {
    "TRL": "trl",
    "Transformers": "transformers",
    "Pytorch": "torch",
    "Datasets": "datasets",
    "Tokenizers": "tokenizers",
}


def quote(text: str) -> str:
    """Return a string literal for Python code, in which control characters are escaped."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in json.dumps(text, ensure_ascii=False))


def hub_id(name: str | None) -> str | None:
    """Return `name` if it can be the id of a repository on the Hub, and `None` if it is missing or a local path."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def shown_name(path_or_repo: str) -> str:
    """Return the last part of an absolute path, to hide user names, and any other name unchanged."""
    return Path(path_or_repo).name if os.path.isabs(path_or_repo) else path_or_repo


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
    _save_card(
        trainer,
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
    _save_card(
        trainer,
        model_name,
        dataset_name,
        tags,
        license,
        task="text-generation",
        kind="policy",
        problem=problem,
        data="",
    )


def _save_card(
    trainer: "StepTrainer | KLSelfTrainer",
    model_name: str,
    dataset_name: str | None,
    tags: str | list[str] | None,
    license: str | None,
    task: str,
    **values: Any,
) -> None:
    args, model = trainer.args, trainer.model
    base = hub_id(get_config_model_id(model.config))
    dataset_name = dataset_name or trainer.dataset_name
    dataset, dataset_id = _dataset(dataset_name)
    evaluated, evaluated_id = _dataset(trainer.eval_dataset_name or dataset_name)
    adapter = None
    if is_peft_model(model):
        config = model.peft_config[model.active_adapter]
        size = f", r = {config.r}, alpha = {config.lora_alpha}" if config.peft_type == "LORA" else ""
        adapter = f"{config.peft_type.value}{size}"
    step = weights_step(trainer)
    metrics = metrics_at(trainer, step)
    run_urls = {"Trackio": get_trackio_space_url(), "Comet": get_comet_experiment_url()}
    if is_wandb_available():
        import wandb

        run_urls["Weights & Biases"] = wandb.run.url if wandb.run is not None else None
    data = ModelCardData(
        base_model=base,
        datasets=dataset_id,
        eval_results=eval_results(metrics, evaluated, evaluated_id, task) or None,
        library_name="peft" if adapter else "transformers",
        license=license,
        model_name=model_name,
        pipeline_tag=task,
        tags=_all_tags(trainer, tags, run_urls["Trackio"]),
    )
    card = ModelCard.from_template(
        data,
        template_str=resource("templates/model_card.md.jinja"),
        name=model_name,
        markdown=markdown,
        printable=printable,
        model_id=trainer.hub_model_id or args.hub_model_id or shown_name(args.output_dir),
        base=base,
        dataset=dataset,
        dataset_id=dataset_id,
        evaluated=evaluated,
        adapter=adapter,
        settings=_settings_table(trainer, step, adapter),
        step=f"{step:,}",
        metrics=_metrics_table(metrics),
        trainer_name=trainer._name,
        paper=trainer._paper,
        run_urls={service: url for service, url in run_urls.items() if url},
        versions={"TRL HRM": __version__, **{name: version(package) for name, package in PACKAGES.items()}},
        quote=quote,
        shell_word=shell_word,
        **values,
    )
    card.save(Path(args.output_dir) / "README.md")


def _dataset(name: str | None) -> tuple[str | None, str | None]:
    """Return the name of a dataset to show, and its id if it can be on the Hub."""
    shown = hub_id(name) or (Path(name).absolute().name if name else None)
    return shown, shown if shown and "/" in shown else None


def weights_step(trainer: "StepTrainer | KLSelfTrainer") -> int:
    """Return the optimizer step of the current weights, which is not the last step if the best model was loaded."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint:
        # `best_global_step` can be a step that was not saved. Then the checkpoint before it is loaded
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return state.global_step


def metrics_at(trainer: "StepTrainer | KLSelfTrainer", step: int) -> dict[str, dict[str, float]]:
    """Return the metrics logged at `step` by evaluation dataset. The name of a single dataset is empty."""
    logged = {key: value for log in trainer.state.log_history if log["step"] == step for key, value in log.items()}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    prefixes = sorted([("eval_", ""), *((f"eval_{name}_", name) for name in sets)], key=lambda pair: -len(pair[0]))
    found: dict[str, dict[str, float]] = {}
    for key, value in logged.items():
        prefix, name = next((pair for pair in prefixes if key.startswith(pair[0])), ("", ""))
        metric = key.removeprefix(prefix)
        is_shown = metric.startswith(trainer._card_metrics) and metric not in NO_METRICS
        if prefix and is_shown and isinstance(value, float) and math.isfinite(value):
            found.setdefault(name, {})[metric] = value
    return found


def eval_results(
    metrics: dict[str, dict[str, float]], dataset: str | None, dataset_id: str | None, task: str
) -> list[EvalResult]:
    """Convert metrics to entries of the Hub's `model-index`."""
    dataset = dataset or "the evaluation dataset"
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset_id or "custom",
            dataset_name=f"{dataset}, {name}" if name else dataset,
            dataset_config=name or None,  # the Hub merges results with the same type and configuration
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for name, found in metrics.items()
        for metric, value in found.items()
    ]


def _all_tags(
    trainer: "StepTrainer | KLSelfTrainer", tags: str | list[str] | None, trackio_url: str | None
) -> list[str]:
    """Return the tags of the user and of the trainer, and the tags that TRL adds for the training environment."""
    found = {*([tags] if isinstance(tags, str) else tags or ()), *trainer._tag_names, "generated_from_trainer"}
    if hasattr(trainer.model.config, "unsloth_version"):
        found.add("unsloth")
    if "JOB_ID" in os.environ:
        found.add("hf_jobs")
    if trackio_url is not None:
        found = {tag for tag in found if not tag.startswith("trackio:")} | {f"trackio:{trackio_url}"}
    return sorted(found)


def _settings_table(trainer: "StepTrainer | KLSelfTrainer", step: int, adapter: str | None) -> str:
    args, settings = trainer.args, {}
    for name in (*SETTINGS, *trainer._card_settings):
        if hasattr(args, name):
            value = getattr(args, name)
            text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
            settings[name] = markdown(quote(text)[1:-1])
    settings |= {"processes": str(args.world_size), "epochs": f"{trainer.state.epoch or 0:.4g}", "steps": str(step)}
    if adapter:
        settings["adapter"] = adapter
    return Table(["setting", "value"], [[f"`{name}`", value] for name, value in settings.items()]).markdown()


def _metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    names = ["dataset"] if any(metrics) else []
    rows = [
        [*([markdown(name)] if names else []), markdown(metric.replace("_", " ")), f"{value:.4g}"]
        for name, found in metrics.items()
        for metric, value in found.items()
    ]
    return Table([*names, "metric", "value"], rows).markdown() if rows else ""


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
