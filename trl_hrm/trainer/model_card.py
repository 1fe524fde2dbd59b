"""The card of a trained model, from facts: base, data, settings, metrics, and code that scores with it."""

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import is_peft_model
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import __version__
from .._compat import get_config_model_id


if TYPE_CHECKING:
    from transformers import Trainer


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
# What an evaluation logs beside its metrics
_NO_METRICS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "num_tokens")


def hub_id(name: str | None) -> str | None:
    """`name` if it can be the id of a repository on the Hub, `None` if it is missing or a path on this machine."""
    if not name or os.path.exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def shown_name(path_or_repo: str) -> str:
    """The name of a repository or a relative folder as it is; of an absolute path the last part, which tells no user name."""
    return Path(path_or_repo).name if os.path.isabs(path_or_repo) else path_or_repo


@dataclass(frozen=True)
class CardFacts:
    """
    What a card tells of a run, whatever is trained.

    Args:
        model_name, model_id (`str`): Name in the title; repository, or folder, to load from.
        base_model (`str` or `None`): Id of the model that was fine-tuned, if it is on the Hub.
        dataset (`str` or `None`): Id of the dataset on the Hub, or name of a folder.
        adapter (`str` or `None`): Kind and size of the adapter that was trained.
        settings (`dict[str, str]`): Settings of the training.
        step (`int`): Optimizer step of the weights.
        metrics (`dict[str, dict[str, float]]`): Metrics of these weights by evaluation dataset, whose name is empty if
            there is only one.
    """

    model_name: str
    model_id: str
    base_model: str | None
    dataset: str | None
    adapter: str | None
    settings: dict[str, str]
    step: int
    metrics: dict[str, dict[str, float]]

    @classmethod
    def of(
        cls,
        trainer: "Trainer",
        model_name: str | None,
        dataset_name: str | None,
        settings: tuple[str, ...],
    ) -> "CardFacts":
        """Facts of a trainer. `settings` names arguments of it beside the common ones."""
        args = trainer.args
        model_id = trainer.hub_model_id or args.hub_model_id or shown_name(args.output_dir)
        step = weights_step(trainer)
        dataset_name = dataset_name or trainer.dataset_name
        return cls(
            model_name=model_name or Path(model_id).absolute().name,
            model_id=model_id,
            base_model=hub_id(get_config_model_id(trainer.model.config)),
            dataset=hub_id(dataset_name) or (Path(dataset_name).absolute().name if dataset_name else None),
            adapter=_adapter(trainer.model),
            settings={
                **{name: _cell(getattr(args, name)) for name in (*SETTINGS, *settings) if hasattr(args, name)},
                "processes": str(args.world_size),
                "epochs": f"{trainer.state.epoch or 0:.4g}",
                "steps": str(step),
            },
            step=step,
            metrics=metrics_at(trainer, step),
        )

    @property
    def dataset_on_hub(self) -> str | None:
        return self.dataset if self.dataset and "/" in self.dataset else None


def weights_step(trainer: "Trainer") -> int:
    """The optimizer step that the weights come from: not the last one if the best ones were loaded at the end."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and not trainer.is_in_train and state.best_model_checkpoint:
        # not `best_global_step`, whose weights may not have been saved: then those of the checkpoint before are loaded
        return int(state.best_model_checkpoint.rpartition("-")[2])
    return state.global_step


def metrics_at(trainer: "Trainer", step: int) -> dict[str, dict[str, float]]:
    """What was logged of the evaluations at a step, by evaluation dataset. Metrics of other weights are not shown."""
    logged = {key: value for log in trainer.state.log_history if log["step"] == step for key, value in log.items()}
    sets = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {}
    prefixes = sorted([("eval_", ""), *((f"eval_{name}_", name) for name in sets)], key=lambda pair: -len(pair[0]))
    found: dict[str, dict[str, float]] = {}
    for key, value in logged.items():
        prefix, name = next((pair for pair in prefixes if key.startswith(pair[0])), ("", ""))
        metric = key.removeprefix(prefix)
        if prefix and metric not in _NO_METRICS and isinstance(value, float) and math.isfinite(value):
            found.setdefault(name, {})[metric] = value
    return found


def write_card(path: Path, facts: CardFacts, quick_start: str, task: str, license: str | None, sections: str) -> None:
    """
    Complete the card that TRL wrote.

    Args:
        path (`Path`):
            The card: its metadata, and text from "Training procedure" on, are kept.
        facts ([`CardFacts`]):
            Facts of the run.
        quick_start (`str`):
            Section that replaces TRL's, which does not fit these models.
        task (`str`):
            Task of the model, as the Hub calls it.
        license (`str`, *optional*):
            Licence of the model.
        sections (`str`):
            Sections between the quick start and the metrics.
    """
    card = ModelCard(path.read_text(encoding="utf-8"))
    card.data.tags = sorted(set(card.data.tags))  # TRL's order changes from run to run
    card.data.licence = None  # TRL's placeholder
    card.data.pipeline_tag = task
    card.data.library_name = "peft" if facts.adapter else "transformers"
    if license is not None:
        card.data.license = license
    card.data.eval_results = eval_results(facts, task) or None
    ours = "\n\n".join(section for section in (quick_start, sections, _metrics_section(facts)) if section)
    text = re.sub(r"## Quick start\n.*?(?=## Training procedure)", lambda _: ours + "\n\n", card.text, flags=re.DOTALL)
    if facts.base_model is None:  # TRL names it None, or by a path
        card.data.base_model = None
        text = re.sub(r"a fine-tuned version of \[.*?\]\(.*?\)", "fine-tuned", text, count=1)
    settings = table("### Settings", ("setting", "value"), [(f"`{k}`", v) for k, v in _settings(facts).items()])
    text = text.replace(
        "### Framework versions\n\n", f"{settings}\n\n### Framework versions\n\n- TRL HRM: {__version__}\n"
    )
    card.text = text
    card.save(path)


def eval_results(facts: CardFacts, task: str) -> list[EvalResult]:
    """The metrics as the Hub's `model-index`."""
    dataset = facts.dataset or "the evaluation dataset"
    return [
        EvalResult(
            task_type=task,
            dataset_type=facts.dataset_on_hub or "custom",
            dataset_name=f"{dataset}, {name}" if name else dataset,
            dataset_config=name or None,  # results of one type and configuration are listed as one
            metric_type=metric,
            metric_name=metric.replace("_", " "),
            metric_value=value,
        )
        for name, metrics in facts.metrics.items()
        for metric, value in metrics.items()
    ]


def table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [
        [" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (head, ("---",) * len(head), *rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([title, "", *lines])


def _settings(facts: CardFacts) -> dict[str, str]:
    return facts.settings | ({"adapter": facts.adapter} if facts.adapter else {})


def _metrics_section(facts: CardFacts) -> str:
    rows = [
        (*([name] if any(facts.metrics) else []), metric.replace("_", " "), f"{value:.4g}")
        for name, metrics in facts.metrics.items()
        for metric, value in metrics.items()
    ]
    if not rows:
        return ""
    head = (*(["dataset"] if any(facts.metrics) else []), "metric", "value")
    title = f"## Evaluation\n\nOf the weights of step {facts.step:,}"
    return table(f"{title}, on held-out rows of {facts.dataset}." if facts.dataset else f"{title}.", head, rows)


def _adapter(model) -> str | None:
    if not is_peft_model(model):
        return None
    config = model.peft_config[model.active_adapter]
    size = f", r = {config.r}, alpha = {config.lora_alpha}" if config.peft_type == "LORA" else ""
    return f"{config.peft_type.value}{size}"


def _cell(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(getattr(value, "value", value))
    return json.dumps(text, ensure_ascii=False)[1:-1]


def policy_quick_start(facts: CardFacts, chat: bool) -> str:
    """Code that solves a problem with a policy, whose tokenizer may have a chat template."""
    problem = '[{"role": "user", "content": "1+2+3 = ?"}]' if chat else '"1+2+3 = ?"'
    return f"""\
## Quick start

```python
from transformers import pipeline

generator = pipeline("text-generation", model={json.dumps(facts.model_id, ensure_ascii=False)})
solution = generator({problem}, max_new_tokens=512, return_full_text=False)[0]["generated_text"]
```"""
