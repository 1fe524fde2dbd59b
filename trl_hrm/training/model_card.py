"""Model cards: base model, data, settings, metrics and versions, for the templates of the trainers."""

import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import Trainer
from transformers.integrations import is_wandb_available

from .. import __version__
from .._compat import get_comet_experiment_url, get_config_model_id, get_trackio_space_url
from ..io import shell_word
from ..pages.page import Table, markdown, resource
from ..schema import OTHER_DATASET
from ..terminal import printable


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
# Logged by an evaluation, but not metrics of the model
NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")
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


def save_card(
    trainer: Trainer,
    template: str,
    model_name: str,
    dataset_name: str | None,
    tags: str | list[str] | None,
    license: str | None,
    task: str,
    **values: Any,
) -> None:
    """
    Write the model card of a trained model to its output folder.

    Args:
        trainer ([`~transformers.Trainer`]):
            Trainer with [`HubPushMixin`].
        template (`str`):
            File name of a template in `pages/templates`.
        model_name, dataset_name, tags, license:
            Arguments of `create_model_card`.
        task (`str`):
            Task of the model on the Hub.
        values:
            Other variables of the template.
    """
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
        template_str=resource(f"templates/{template}"),
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


def weights_step(trainer: Trainer) -> int:
    """Return the optimizer step of the current weights, which is not the last step if the best model was loaded."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint:
        # `best_global_step` can be a step that was not saved. Then the checkpoint before it is loaded
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return state.global_step


def metrics_at(trainer: Trainer, step: int) -> dict[str, dict[str, float]]:
    """Return the metrics logged at `step` by evaluation dataset. The name of a single dataset is empty."""
    logs = [log for log in trainer.state.log_history if log["step"] == step and not log.get(OTHER_DATASET)]
    logged = {key: value for log in logs for key, value in log.items()}
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


def _all_tags(trainer: Trainer, tags: str | list[str] | None, trackio_url: str | None) -> list[str]:
    """Return the tags of the user and of the trainer, and the tags that TRL adds for the training environment."""
    found = {*([tags] if isinstance(tags, str) else tags or ()), *trainer._tag_names, "generated_from_trainer"}
    if hasattr(trainer.model.config, "unsloth_version"):
        found.add("unsloth")
    if "JOB_ID" in os.environ:
        found.add("hf_jobs")
    if trackio_url is not None:
        found = {tag for tag in found if not tag.startswith("trackio:")} | {f"trackio:{trackio_url}"}
    return sorted(found)


def _settings_table(trainer: Trainer, step: int, adapter: str | None) -> str:
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
