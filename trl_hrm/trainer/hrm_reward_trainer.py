import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict, Value
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction
from transformers.utils import find_adapter_config_file, is_peft_available

from .. import __version__
from .._compat import get_config_model_id, global_then_local_main_first
from ..grading import thinking_spans
from ..heads import LABEL_NAMES, check_head, gather_steps, step_outputs
from ..io import shown
from ..loading import load_base_model, load_reward_model, load_tokenizer, read_step_format
from ..losses import step_score
from ..messages import prompt_text, step_text, system_texts
from ..pages.papers import HRM_PAPER
from ..rewards import separator_rule
from ..search.steps import cut_text
from ..step_format import StepFormat, published_name
from ..step_metrics import METRICS, judged_steps, step_metrics
from ..tree_attention import check_attention, check_model, model_inputs, use_tree_attention
from .forest_dataset import (
    SOURCE_COLUMNS,
    STEP_COLUMNS,
    TOKEN_COLUMNS,
    DataCollatorForForest,
    ForestBuilder,
    ForestReport,
    flat_column,
    longest_path,
)
from .hrm_reward_config import HRMRewardConfig
from .step_table_callback import StepTableCallback
from .step_trainer import StepSources, StepTrainer, check_dataset, set_up_model, warn_of_another_format


if is_peft_available():
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


class HRMRewardTrainer(StepTrainer):
    """
    Trainer for step reward models: hierarchical (HRM), process (PRM) and outcome (ORM) reward models.

    A problem and its labelled steps form a tree, which is encoded as one row of tokens. Shared tokens pass through the
    model once, and every step attends only to its own history (see [`trl_hrm.forest`]). The loss is the weighted mean
    over all labelled steps of the global batch, so it does not depend on the number of accumulation steps or ranks.

    Example:

    ```python
    from datasets import load_dataset
    from trl_hrm import HRMRewardConfig, HRMRewardTrainer

    dataset = load_dataset("data/prm800k-hrm")
    trainer = HRMRewardTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        args=HRMRewardConfig(output_dir="outputs/hrm"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Model to be trained. Can be either:

            - A string: *model id* of a model on the Hub, or path to a *directory* with a saved model. It is loaded as a
              token classifier (`head` `"classification"`, `"mlp"` or `"regression"`) or as a causal language model
              (`"value"`, `"lm"` or `"lm_mean"`) with the keyword arguments in `args.model_init_kwargs`. `dtype` defaults to `float32`. A base model gets a newly
              initialized head. A trained reward model (with a `step_format.json`, or a published model) or its adapter
              keeps its head, so it can be evaluated or trained further. It also keeps its step format, unless `args` sets
              another one.
            - A model whose outputs fit `args.head`.
        args ([`HRMRewardConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function that forms a batch from forest rows. Defaults to
            [`~trainer.forest_dataset.DataCollatorForForest`].
        train_dataset ([`~datasets.Dataset`]):
            Dataset to use for training, in TRL's
            [stepwise supervision](https://huggingface.co/docs/trl/dataset_formats) format: columns `prompt`,
            `completions` and `labels`, and optionally `parents` for trees. Rows in its unpaired preference format (`prompt`,
            `completion` and `label`) have one label, on the last step. See `docs/dataset_formats.md`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset to use for evaluation, or a dictionary of named datasets.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name. If it has no padding token, its EOS token is used.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Function to use instead of [`HRMRewardTrainer.compute_metrics`]. It takes the same argument.
        callbacks, optimizers:
            See [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. Its task type is set according to `args.head`, so that the newly
            initialized head of a token classifier is trained and saved with the adapter.

    To change the loss or the metrics, subclass and override [`HRMRewardTrainer.compute_step_loss`] or
    [`HRMRewardTrainer.compute_metrics`].

    Raises:
        `ValueError`: If the dataset, the model, the tokenizer or the attention implementation is not supported.
        `TypeError`: If a dataset is not a [`~datasets.Dataset`]. Streaming datasets are not supported, because rows are
        joined by prompt and packed.
    """

    _tag_names = ["trl", "trl-hrm", "hrm-reward", "step-reward-model"]
    _name = "HRM Reward"
    _card_settings = (
        "shared_prefix",
        "packing",
        "label_weighting",
        "error_weight",
        "train_on_last_step_only",
        "disable_dropout",
    )
    _paper = HRM_PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: HRMRewardConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: "PeftConfig | None" = None,
    ):
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = HRMRewardConfig(f"{model_name.split('/')[-1]}-HRM")
        if not isinstance(args, HRMRewardConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be an `HRMRewardConfig`.")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        if peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"`peft_config` is a `{type(peft_config).__name__}`, whose virtual tokens do not fit the attention masks of trees. Use LoRA."
            )
        # Seed before the head of a token classifier is randomly initialized
        set_seed(args.seed)
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        model, revision, self.step_format, self._has_new_head = self._load_model(model, args, peft_config is not None)
        if processing_class is None:
            processing_class = load_tokenizer(name, revision, args.trust_remote_code)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if processing_class.pad_token_id is None:
            raise ValueError("The tokenizer has neither a padding token nor an EOS token. Set `tokenizer.pad_token`.")
        self.step_format.check(processing_class)
        model = set_up_model(model, args, peft_config, self.step_format)
        check_head(model, self.step_format)
        check_model(model)  # also without shared prefixes, since sequences still share rows
        if args.shared_prefix:
            check_attention(model.config._attn_implementation)
            use_tree_attention(model, args.device)
        self._label_token_ids = (
            self.step_format.label_token_ids(processing_class) if self.step_format.head == "lm" else None
        )
        self._max_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if data_collator is None:
            data_collator = DataCollatorForForest(
                processing_class.pad_token_id,
                padding_free=not args.shared_prefix,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self.compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.label_names = ["labels", "label_weights", "num_merged"]
        self._signature_columns = TOKEN_COLUMNS + STEP_COLUMNS  # other columns are removed
        if args.log_worst_steps:
            if eval_dataset is None:
                raise ValueError(
                    f"`log_worst_steps` is {args.log_worst_steps}, but there is no evaluation. Pass an `eval_dataset`, and set "
                    "`eval_strategy` and `eval_steps`."
                )
            self.add_callback(StepTableCallback(self, args.log_worst_steps))

    def _load_model(
        self, model: "str | PreTrainedModel | PeftModel", args: HRMRewardConfig, has_adapter: bool
    ) -> tuple["PreTrainedModel | PeftModel", str | None, StepFormat, bool]:
        """See [`load_model`]. `has_adapter`: whether this trainer adds an adapter."""
        loaded = load_model(model, args)
        self.check_head(model if isinstance(model, str) else type(model).__name__, loaded[2])
        return loaded

    @classmethod
    def check_head(cls, name: str, step_format: StepFormat) -> None:
        """Raise `ValueError` if this trainer does not train models with the head of the model `name`."""
        if step_format.head == "implicit":
            raise ValueError(
                f"{name} has the head 'implicit'. Train it with ImplicitPRMTrainer (`trl-hrm implicit-prm`)."
            )

    # Datasets and batches

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: HRMRewardConfig, name: str
    ) -> Dataset:
        if isinstance(dataset, Dataset) and set(TOKEN_COLUMNS + STEP_COLUMNS) <= set(dataset.column_names):
            return dataset  # already prepared
        rows, self.reports[name] = prepare_rows(dataset, processing_class, self.step_format, args, name)
        if name != "train_dataset":
            self._sources[name] = StepSources(
                dataset.with_format(None), *(flat_column(rows, column) for column in SOURCE_COLUMNS)
            )
            rows = rows.remove_columns(SOURCE_COLUMNS)
        longest = longest_path(rows)
        if self._max_positions is not None and longest > self._max_positions:
            raise ValueError(
                f"{name}: a path has {longest:,} tokens, but the model has {self._max_positions:,} positions. Set `max_length` to at most "
                f"{self._max_positions:,}, which drops the steps of longer paths, or use a model with more positions."
            )
        return rows

    def _source_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        if "completions" not in row:
            return stepwise_row(row, 0, self.step_format.step_separator, "the dataset", __version__)
        return row

    def _step_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs at the step tokens, shape `(B, S, C)`. Padded steps repeat token 0."""
        tokens = self._model_inputs(self.model, inputs)
        with step_outputs(self.model, self.step_format, self._label_token_ids):
            logits = model(**tokens).logits
        return gather_steps(logits, inputs["step_positions"])

    def _model_inputs(self, model: "PreTrainedModel | PeftModel", inputs: dict[str, torch.Tensor]) -> dict:
        """Return the keyword arguments for the forward pass of a model without wrappers."""
        tokens = {name: inputs[name] for name in TOKEN_COLUMNS}
        if self.args.shared_prefix:
            return model_inputs(**tokens, config=model.config, dtype=model.dtype)
        # Without a mask and a cache, attention kernels separate the sequences by `position_ids`
        return {name: tokens[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}

    def _step_labels(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return inputs["labels"], inputs["label_weights"], inputs["num_merged"]

    def _num_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return inputs["num_tokens"].sum()

    # Metrics

    def compute_metrics(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """
        Compute the metrics of an evaluation. Override this method or pass `compute_metrics` to use other metrics.

        Args:
            eval_prediction ([`~transformers.EvalPrediction`]):
                `predictions` are the outputs at the step tokens, shape `(rows, S, C)`. `label_ids` is a tuple
                `(labels, label_weights, num_merged)`, shape `(rows, S)` each, where padded steps have a negative label.
                Use [`judged_steps`] to select the labelled steps.

        Returns:
            `dict[str, float]`: The metrics of [`step_metrics`] over all steps. If there are merged steps, also the
            metrics over single steps and over merged steps (`single_accuracy`, `merged_accuracy`, ...).
        """
        logits, labels, _, num_merged = judged_steps(eval_prediction.predictions, eval_prediction.label_ids)
        scores = step_score(torch.from_numpy(logits).double(), self.step_format).numpy()
        return _metrics(scores, labels, num_merged)

    def train(self, *args, **kwargs):
        self._check_best_metric()
        return super().train(*args, **kwargs)

    def _check_best_metric(self) -> None:
        """Raise before training if `metric_for_best_model` is not defined on the evaluation set."""
        wanted = self.args.metric_for_best_model
        own = getattr(self.compute_metrics, "__func__", None) is HRMRewardTrainer.compute_metrics
        if wanted is None or self.eval_dataset is None or not own:
            return
        wanted = f"eval_{wanted.removeprefix('eval_')}"
        if isinstance(self.eval_dataset, dict) and wanted.removeprefix("eval_") in ("loss", *METRICS):
            raise ValueError(
                f"`metric_for_best_model` is {shown(self.args.metric_for_best_model)}, but there are several evaluation datasets: "
                f"{', '.join(self.eval_dataset)}. Name one, such as 'eval_{next(iter(self.eval_dataset))}_loss'."
            )
        datasets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        for name, dataset in datasets.items():
            metric = wanted.removeprefix(f"eval_{name}_" if name else "eval_")
            labels, num_merged = flat_column(dataset, "labels"), flat_column(dataset, "num_merged")
            if metric.removeprefix("single_").removeprefix("merged_") not in METRICS:
                continue  # a metric of another dataset, or one that does not depend on the labels
            if metric not in _metrics(labels, labels, num_merged):
                raise ValueError(
                    f"`metric_for_best_model` is {shown(wanted)}, which is not defined on the evaluation set: it has "
                    f"{(labels >= 0.5).sum():,} correct and {(labels < 0.5).sum():,} wrong steps, and {(num_merged > 1).sum():,} "
                    "of them are merged steps. `auroc` and `balanced_accuracy` need correct and wrong steps, `error_f1` needs "
                    "wrong steps, and `single_...` and `merged_...` need merged steps. Add such steps to the evaluation set, or "
                    "choose another metric, such as `eval_loss` or `eval_accuracy`."
                )


def _metrics(scores: np.ndarray, labels: np.ndarray, num_merged: np.ndarray) -> dict[str, float]:
    """Compute metrics over all steps and, if there are merged steps, also over single and over merged steps."""
    metrics = step_metrics(scores, labels)
    merged = num_merged > 1
    if merged.any():
        for name, group in (("single", ~merged), ("merged", merged)):
            metrics |= {f"{name}_{k}": v for k, v in step_metrics(scores[group], labels[group]).items()}
    return metrics


def prepare_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, step_format: StepFormat, args: HRMRewardConfig, name: str
) -> tuple[Dataset, ForestReport]:
    """
    Encode a dataset of step trees as rows to train or evaluate on, and log what was kept and dropped.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset in the format of [`StepTree.from_row`], or in TRL's unpaired preference format. See [`stepwise_row`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        step_format ([`StepFormat`]):
            How prompts and steps are encoded.
        args ([`HRMRewardConfig`]):
            Arguments of the training.
        name (`str`):
            Name of the dataset in messages. `train_on_last_step_only` applies to `"train_dataset"`, and only it requires the column
            of `label_weighting="column"`. The rows of other datasets also have the columns `source_rows` and `source_steps`.

    Raises:
        `TypeError`: If the dataset is not a [`~datasets.Dataset`].
        `ValueError`: If a row is malformed, a prompt leaves no room for a step, or no label is left.
    """
    check_dataset(dataset, name, "rows are joined by prompt and packed")
    dataset = dataset.with_format(None)
    if "prompt" in dataset.column_names and not isinstance(dataset.features["prompt"], Value):
        own = [] if step_format.system_prompt is None else [step_format.system_prompt]
        prompts = dataset.select_columns("prompt")
        other = sum(_system_texts(row["prompt"]) not in ([], own) for row in prompts)
        if other:
            logger.warning(
                f"{name}: the system messages of {other:,} of {len(dataset):,} prompts are left out. If the reward model should see a system "
                "message, set `system_prompt` to it (with `prompt_style='chat'`), which is the same for all rows."
            )
    is_training = name == "train_dataset"
    has_weights = "label_weights" in dataset.column_names
    label_weighting = args.label_weighting
    if is_training and has_weights and label_weighting != "column":
        logger.warning(
            f"{name} has the column `label_weights`, which is not used. To weight the loss of each step by it, set "
            "`label_weighting='column'`. Do not use the weights of a dataset with `balance`, which would undo the balance."
        )
    if not is_training and not has_weights and label_weighting == "column":
        label_weighting = "unique"
    if {"completion", "label"} <= set(dataset.column_names) and "completions" not in dataset.column_names:
        if label_weighting == "column":
            raise ValueError(
                f"{name} has the columns `completion` and `label`, but `label_weighting='column'` needs one weight per step. Pass rows with "
                "`completions`, `labels` and `label_weights`, or remove it."
            )
        dataset = dataset.map(
            partial(stepwise_row, separator=step_format.step_separator, name=name, version=__version__),
            with_indices=True,
            remove_columns=dataset.column_names,
            desc=f"Splitting {name} into steps",
        )
        if number := sum(dataset["has_thinking"]):
            logger.warning(
                f"{name}: the thinking in {number:,} of {len(dataset):,} completions is left out. To train on it, split the completions into "
                "steps (`prompt`, `completions` and `labels`)."
            )
        dataset = dataset.remove_columns("has_thinking")
    builder = ForestBuilder(
        tokenizer=tokenizer,
        step_format=step_format,
        max_length=args.max_length,
        shared_prefix=args.shared_prefix,
        packing=args.packing,
        label_weighting=label_weighting,
        error_weight=args.error_weight,
        train_on_last_step_only=args.train_on_last_step_only and is_training,
        keep_sources=not is_training,
    )
    with global_then_local_main_first():
        rows, report = builder(dataset, name, num_proc=args.dataset_num_proc)
    dropped = report.labels_too_long or report.labels_contradicting or report.trees_without_labels
    dropped = dropped or report.prompts_with_control_text or report.steps_with_control_text
    logger.log(logging.WARNING if dropped else logging.INFO, f"{name}: {report}")
    too_long = report.dropped_by_length(args.max_length)
    if too_long is not None:
        logger.warning(f"{name}: {too_long}")
    return rows, report


def _system_texts(prompt: Any) -> list[str]:
    """Return the system messages of a prompt. Invalid prompts are errors later, with their row."""
    try:
        return system_texts(prompt)
    except ValueError:
        return []


def stepwise_row(row: Mapping[str, Any], index: int, separator: str, name: str, version: str) -> dict[str, Any]:
    """
    Convert a row in TRL's unpaired preference format to the stepwise format, with a label on the last step only, and say whether it
    has thinking, which is left out.

    Args:
        row (`Mapping[str, Any]`):
            Row with `prompt`, `completion` and `label`. A conversation has one user message and one assistant message, and may
            have a system message, which is left out: it is a setting of the step format.
        index (`int`):
            Number of the row, for errors.
        separator (`str`):
            Separator at which the completion is split into steps.
        name (`str`):
            Name of the dataset, for errors.
        version (`str`):
            Version of this package. It is an argument because `datasets` caches rows by the arguments of a function, not by its code.

    Raises:
        `ValueError`: If the prompt or the completion is not one text, or the completion has no steps.
    """
    texts = []
    for column, role, read in (("prompt", "user", prompt_text), ("completion", "assistant", step_text)):
        try:
            value = read(row[column])
        except ValueError:
            value = None
        if not isinstance(value, str):
            raise ValueError(
                f"{name} row {index}: `{column}` is {shown(row[column])}. It must be a string, or a conversation with one {role} message."
            )
        texts.append(value)
    steps = cut_text(texts[1], separator_rule(separator))
    if not steps:
        raise ValueError(
            f"{name} row {index}: `completion` is {shown(texts[1])}. It must have at least one step. Remove the row."
        )
    label = row["label"]
    if label not in (True, False):
        raise ValueError(f"{name} row {index}: `label` is {shown(label)}. It must be true (right) or false (wrong).")
    labels = [None] * (len(steps) - 1) + [float(label)]
    return {
        "prompt": texts[0],
        "completions": steps,
        "labels": labels,
        "has_thinking": bool(thinking_spans(texts[1])),
    }


def find_step_format(
    model: str, args: HRMRewardConfig, revision: str | None = None
) -> tuple[StepFormat, StepFormat | None]:
    """
    Return the step format to train a model with, and the one that it was trained with before (`None` for a base model).

    A reward model keeps its step format unless `args` defines another one, which gives a warning.
    """
    step_format = args.make_step_format()
    try:
        trained_format = read_step_format(model, revision)
    except FileNotFoundError:  # a base model
        return step_format, None
    if args.step_format is None and not args.changed_text_format():
        return trained_format, trained_format
    step_format = with_reference_of(step_format, trained_format)
    warn_of_another_format(model, trained_format, step_format)
    return step_format, trained_format


def with_reference_of(step_format: StepFormat, trained_format: StepFormat) -> StepFormat:
    """Return a step format with the reference model of a checkpoint that is trained further, if both have implicit rewards."""
    if not step_format.head == trained_format.head == "implicit":
        return step_format
    names = ("reference_model", "reference_revision", "reference_weights")
    return replace(step_format, **{name: getattr(trained_format, name) for name in names})


def load_model(
    model: "str | PreTrainedModel | PeftModel", args: HRMRewardConfig
) -> tuple["PreTrainedModel | PeftModel", str | None, StepFormat, bool]:
    """
    Load the model of a trainer if `model` is a string, and determine its step format.

    For a reward model (a checkpoint with a `step_format.json`, or a published model) or an adapter, the weights are checked
    as in scoring. Its step format is used unless `args` defines another one. A base model gets a newly initialized head.

    Returns:
        `tuple[PreTrainedModel or PeftModel, str or None, StepFormat, bool]`: The model, the revision it was loaded from, its
        step format, and whether its head is newly initialized (`False` if the model was already instantiated).

    Raises:
        `ValueError`: If `args.model_init_kwargs` is given with a model that is already instantiated, or if the weights of
        the checkpoint do not fit the model.
    """
    if not isinstance(model, str):
        step_format = args.make_step_format()
        if args.model_init_kwargs is not None:
            raise ValueError(
                "You passed `model_init_kwargs` with a model that is already instantiated. Pass the model's name as a "
                "string, or remove `model_init_kwargs`."
            )
        name = get_config_model_id(model.config)
        if name and (Path(name).is_dir() or published_name(name) is not None):
            trained_format = StepFormat.find(name)
            if trained_format is not None:
                step_format = with_reference_of(step_format, trained_format)
                warn_of_another_format(name, trained_format, step_format)
        return model, None, step_format, False
    kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None
    revision = kwargs.pop("revision", None)
    step_format, trained_format = find_step_format(model, args, revision)
    if step_format.head in ("classification", "mlp"):  # names of the classes in pipelines
        kwargs |= {"id2label": LABEL_NAMES, "label2id": {name: i for i, name in LABEL_NAMES.items()}}
    if trained_format is not None or find_adapter_config_file(model, revision=revision) is not None:
        loaded = load_reward_model(model, step_format, revision, is_trainable=True, **kwargs)
        return loaded, revision, step_format, False
    loaded, has_new_head = load_base_model(model, step_format, revision=revision, **kwargs)
    return loaded, revision, step_format, has_new_head
