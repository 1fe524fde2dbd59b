"""Base class of the trainers of step reward models: loss over the global batch, evaluation, checkpoints and logs."""

import copy
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import find_adapter_config_file

from .._compat import BaseTrainer, disable_dropout_in_model
from ..io import shown
from ..loading import WeightFit, check_adapted_head, check_adapter, list_misfits
from ..losses import step_loss, step_score
from ..messages import plain_row
from ..step_format import StepFormat
from ..training.checkpoints import plain
from ..training.hub_push import HubPushMixin
from ..training.safe_training import SafeTrainingMixin
from .forest_dataset import flat_column
from .model_card import save_reward_model_card


if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

logger = get_logger(__name__)
PREPARED = (
    "The evaluation dataset was already prepared when the trainer received it, so the texts of its steps are unknown. Pass it with "
    "`prompt`, `completions` and `labels`."
)
# Linear layers of the heads of `classification`, `regression`, `mlp` and `value`
_HEAD_LAYERS = ("classifier", "score", "score.0", "score.2", "v_head.summary")


@dataclass(frozen=True)
class StepSources:
    """
    Where the N labelled steps of prepared rows come from, in the order of the rows.

    Args:
        data ([`~datasets.Dataset`]): Dataset before it was prepared.
        rows (`np.ndarray`): Row of `data` for each step, shape `(N,)`.
        steps (`np.ndarray`): Index of each step in its row, shape `(N,)`.
    """

    data: Dataset
    rows: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class EvaluatedSteps:
    """
    The N labelled steps of an evaluation, in the order of the prepared rows.

    Args:
        scores (`np.ndarray`): Probability of each step to be correct, according to the model, in `[0, 1]`. Shape `(N,)`.
        losses (`np.ndarray`): Loss of each step, before weighting. Shape `(N,)`.
        labels (`np.ndarray`): Probability of each step to be correct, according to the dataset. Shape `(N,)`.
        num_merged (`np.ndarray`): Number of original steps in each step. Shape `(N,)`.
        sources ([`StepSources`]): Where the steps come from.
        name (`str`): Prefix of the metrics of the evaluation, such as `eval`.
    """

    scores: np.ndarray
    losses: np.ndarray
    labels: np.ndarray
    num_merged: np.ndarray
    sources: StepSources
    name: str


def check_dataset(dataset: Any, name: str, reason: str) -> None:
    """Raise `TypeError` with the reason and a remedy if `dataset` is not a [`~datasets.Dataset`]."""
    if isinstance(dataset, Dataset):
        return
    remedy = "Load the dataset without `streaming=True`."
    if isinstance(dataset, list):
        remedy = "Convert the rows with `Dataset.from_list`."
    elif isinstance(dataset, dict) and dataset:
        remedy = f"Pass one of its splits, such as {shown(next(iter(dataset)))}."
    raise TypeError(
        f"`{name}` is a `{type(dataset).__name__}`. It must be a `datasets.Dataset`, because {reason} before training. {remedy}"
    )


class StepTrainer(SafeTrainingMixin, HubPushMixin, BaseTrainer):
    """
    Base class of the trainers of step reward models.

    A subclass sets `step_format` before calling `super().__init__` and `label_names` after it. It implements
    `_prepare_dataset`, `_step_logits`, `_step_labels` and `_num_tokens`, and lists the arguments to show in the model
    card (`_card_settings`).

    Args:
        args ([`~transformers.TrainingArguments`]):
            Configuration for this trainer.
        train_dataset, eval_dataset, processing_class:
            Arguments of the subclass.
        trainer_arguments:
            Other arguments of [`~transformers.Trainer`].
    """

    # compute_loss already divides by the weight of the global batch
    loss_is_scaled_for_ga = True
    _card_settings: tuple[str, ...]
    step_format: StepFormat
    _save_card = save_reward_model_card
    _format_is_known = True  # whether the training rows were encoded with `step_format`
    _has_new_head = False  # whether this trainer initialized the head

    def __init__(
        self,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | DatasetDict | dict[str, Dataset] | None,
        processing_class: PreTrainedTokenizerBase | None,
        **trainer_arguments,
    ):
        self.reports: dict[str, Any] = {}  # what was kept and dropped of each dataset, by its name
        self._sources: dict[str, StepSources] = {}  # of datasets that `_prepare_dataset` has just prepared, by name
        self._prepared: list[tuple[Dataset, StepSources | None]] = []
        self.evaluated: Dataset | None = None  # in the evaluation that is running
        self._outputs: tuple[str, EvalLoopOutput] | None = None  # prefix and outputs of this evaluation
        self._train_data, self._eval_data = train_dataset, eval_dataset
        train_dataset = self._prepare_once(train_dataset, processing_class, args, "train_dataset")
        eval_dataset = self._prepare_eval_dataset(eval_dataset, processing_class, args)
        super().__init__(
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **trainer_arguments,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which `Trainer` uses when several GPUs are "
                "visible to a single process. Launch the script with `accelerate launch` or `torchrun`, or make a "
                "single GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        self._start_counting()
        # loss and weight of each evaluated row on all ranks
        self._eval_sums: list[torch.Tensor] = []
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    # To be implemented by subclasses

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase | None, args: TrainingArguments, name: str
    ) -> Dataset:
        """Return the rows to train or evaluate on, and store what was kept and dropped in `self.reports[name]`."""
        raise NotImplementedError

    def _step_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs of the head, shape `(B, S, C)`."""
        raise NotImplementedError

    def _step_labels(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Return the labels (negative: no label), their weights, and the number of original steps in each step, shape
        `(B, S)` each.
        """
        raise NotImplementedError

    def _num_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the number of tokens without padding."""
        raise NotImplementedError

    # Datasets

    def _prepare_once(self, dataset, processing_class, args, name):
        # Preparing a dataset twice would overwrite its report without the rows dropped the first time. It would happen
        # because `Trainer.evaluate` calls `evaluate` for each dataset of a dict, and users pass `trainer.eval_dataset`
        if any(dataset is prepared for prepared, _ in self._prepared):
            return dataset
        dataset = self._prepare_dataset(dataset, processing_class, args, name)
        self._prepared.append((dataset, self._sources.pop(name, None)))
        return dataset

    def _prepare_eval_dataset(self, eval_dataset, processing_class, args):
        if isinstance(eval_dataset, dict):
            return {
                name: self._prepare_once(dataset, processing_class, args, f"eval_dataset[{shown(name)}]")
                for name, dataset in eval_dataset.items()
            }
        if eval_dataset is not None:
            return self._prepare_once(eval_dataset, processing_class, args, "eval_dataset")
        return None

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset passed here is prepared as in `__init__`. A `str` selects one that was prepared there
        self._warn_of_new_head()
        if eval_dataset is self._eval_data:
            eval_dataset = None
        if isinstance(eval_dataset, dict) and isinstance(self._eval_data, dict):
            own = self._eval_data
            eval_dataset = {
                name: self.eval_dataset[name] if rows is own.get(name) else rows for name, rows in eval_dataset.items()
            }
        if not isinstance(eval_dataset, str):
            reports = dict(self.reports)
            eval_dataset = self._prepare_eval_dataset(eval_dataset, self.processing_class, self.args)
            self.reports |= reports  # another dataset does not replace the report of the trainer's own
        evaluated = self.eval_dataset if eval_dataset is None else eval_dataset
        self.evaluated = self.eval_dataset[evaluated] if isinstance(evaluated, str) else evaluated
        try:
            return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)
        finally:
            self.evaluated = self._outputs = None

    def predict(self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        self._warn_of_new_head()
        test_dataset = self._prepare_once(test_dataset, self.processing_class, self.args, "test_dataset")
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def _warn_of_new_head(self) -> None:
        if self._has_new_head and not self.state.global_step:
            logger.warning(
                "The head of the model is newly initialized and has not been trained, so its scores are random. To evaluate a "
                "trained reward model, pass its checkpoint as `model`, or call `train` first."
            )

    # Loss

    def compute_step_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_merged: torch.Tensor) -> torch.Tensor:
        """
        Return the loss of each labelled step, before weighting. Override this method to train with another loss.

        Args:
            logits (`torch.Tensor`):
                Outputs at the step tokens of N labelled steps, shape `(N, C)`, C = 2 (0 wrong, 1 correct) or 1.
            labels (`torch.Tensor`):
                Probabilities that the steps are correct, shape `(N,)`.
            num_merged (`torch.Tensor`):
                Number of original steps in each labelled step (1, or 2 for a merged pair), shape `(N,)`.

        Returns:
            `torch.Tensor`: Losses, shape `(N,)`.
        """
        return step_loss(logits, labels, self.step_format)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of one optimizer step and the total weight of their labelled steps on all ranks."""
        batch_samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batch_samples:
            return batch_samples, None
        if self._counting_since is None:
            self._counting_since = time.perf_counter()
        weight = torch.stack([self._step_labels(batch)[1].sum() for batch in batch_samples]).sum().to(device)
        return batch_samples, self.accelerator.reduce(weight, reduction="sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # With DeepSpeed, Trainer casts float inputs to the dtype of the model: in bf16, a label of 0.9 becomes 0.8984
        labels = {name: inputs[name].to(self.args.device) for name in self.label_names}
        return labels | super()._prepare_inputs({k: v for k, v in inputs.items() if k not in labels})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Return the sum of `w·ℓ` over the labelled steps of this batch, divided by the sum of `w` over the global batch.

        `num_items_in_batch` is the sum over the global batch. Since gradients are averaged over ranks, the loss is
        multiplied by `num_processes`.
        """
        logits = self._step_logits(model, inputs)
        labels, weights, num_merged = self._step_labels(inputs)
        judged = labels >= 0
        labels, weights = labels[judged], weights[judged]
        losses = self.compute_step_loss(logits[judged], labels, num_merged[judged])
        if num_items_in_batch is None:
            num_items_in_batch = weights.sum()
        else:
            weights = weights * self.accelerator.num_processes
        # The clamp gives a batch without labels a loss of 0 instead of NaN
        loss = (weights * losses).sum() / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny)
        if self.model.training:
            self._count(inputs, logits.detach()[judged], labels)
        return (loss, TokenClassifierOutput(loss=loss, logits=logits)) if return_outputs else loss

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self._step_logits(model, inputs).float()
        labels, weights, num_merged = self._step_labels(inputs)
        judged = labels >= 0
        losses = torch.zeros_like(weights)
        losses[judged] = weights[judged] * self.compute_step_loss(logits[judged], labels[judged], num_merged[judged])
        # Per row, so that `gather_for_metrics` can drop the rows that pad the last batch
        sums = torch.stack([losses.sum(dim=1), weights.sum(dim=1)], dim=1)
        self._eval_sums.append(self.accelerator.gather_for_metrics(sums))
        loss = losses.sum() / weights.sum().clamp(min=torch.finfo(torch.float32).tiny)
        if prediction_loss_only:
            return loss, None, None
        label_ids = tuple(inputs[name] for name in self.label_names)
        return loss, logits, label_ids if len(label_ids) > 1 else label_ids[0]

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        # The evaluation loss is the mean over all steps. Trainer would average over batches
        self._eval_sums = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._outputs = metric_key_prefix, output
        if self._eval_sums:  # empty if a subclass overrides `prediction_step`
            loss, weight = torch.cat(self._eval_sums).cpu().double().sum(dim=0)
            output.metrics[f"{metric_key_prefix}_loss"] = (loss / weight).item()
        return output

    def sources_of(self, dataset: Dataset | None) -> StepSources | None:
        """Return where the labelled steps of a prepared dataset come from, or `None` if the caller passed prepared rows."""
        return next((sources for prepared, sources in self._prepared if prepared is dataset), None)

    def _source_row(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a row of a dataset with `prompt` and `completions`, as [`StepSources`] counts its steps."""
        return row

    def source_path(self, sources: StepSources, index: int) -> tuple[str, list[str]]:
        """
        Return the problem and the steps of a solution up to a labelled step.

        Args:
            sources ([`StepSources`]):
                Sources of an evaluation.
            index (`int`):
                Number of the step, below N.

        Returns:
            `tuple[str, list[str]]`: The text of the problem, and the texts of the steps. The last one is the labelled step.
        """
        number = int(sources.rows[index])
        row = plain_row(self._source_row(sources.data[number]), f"row {number}")
        step, path = int(sources.steps[index]), []
        parents = row.get("parents")
        while step >= 0:
            path.append(row["completions"][step])
            step = step - 1 if parents is None else parents[step]
        return row["prompt"], path[::-1]

    def evaluated_steps(self) -> EvaluatedSteps:
        """
        Return the scores of all labelled steps of the evaluation that has just been computed, on every process. Only for callbacks in
        `on_evaluate`. Nothing is computed by the model.

        Raises:
            `RuntimeError`: If no evaluation is running.
            `ValueError`: If the evaluation has no outputs at the steps, if the dataset was prepared by the caller, so that the texts of
                its steps are unknown, or if its rows were evaluated in another order.
        """
        if self.evaluated is None or self._outputs is None:
            raise RuntimeError("No evaluation is running. Call `evaluated_steps` in `on_evaluate` of a callback.")
        name, output = self._outputs
        sources = self.sources_of(self.evaluated)
        if sources is None:
            raise ValueError(PREPARED)
        predictions, label_ids = output.predictions, output.label_ids
        label_ids = label_ids if isinstance(label_ids, tuple) else (label_ids,)
        if not isinstance(predictions, np.ndarray) or predictions.shape[:-1] != np.shape(label_ids[0]):
            found = "missing" if predictions is None else f"of shape {np.shape(predictions)}"
            raise ValueError(
                f"The predictions of the evaluation are {found}. They must be the outputs at every label. Remove `prediction_loss_only` "
                "and `preprocess_logits_for_metrics`."
            )
        judged = label_ids[0] >= 0
        labels = label_ids[0][judged]
        expected = flat_column(self.evaluated, "labels")
        if not np.array_equal(labels, expected[expected >= 0].astype(labels.dtype)) or len(labels) != len(
            sources.rows
        ):
            raise ValueError(
                "The rows of the evaluation are in another order than in the dataset, so the texts of its steps are unknown. Leave "
                "`train_sampling_strategy` and the sampler of the evaluation at their default values."
            )
        num_merged = label_ids[2][judged] if len(label_ids) > 2 else np.ones(len(labels), int)
        logits = torch.from_numpy(predictions[judged]).float()
        with torch.no_grad():
            losses = self.compute_step_loss(logits, torch.from_numpy(labels).float(), torch.from_numpy(num_merged))
        scores = step_score(logits.double(), self.step_format)
        if self._is_other and name == "eval":
            name += "_other"
        return EvaluatedSteps(scores.numpy(), losses.float().numpy(), labels, num_merged, sources, name)

    # Saving and the model card

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.step_format.save(output_dir or self.args.output_dir)

    # Checkpoints

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._loaded_from = resume_from_checkpoint
        if is_peft_model(self.model) and not self.is_fsdp_enabled and find_adapter_config_file(resume_from_checkpoint):
            check_adapter(self.model, resume_from_checkpoint)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            if "size mismatch" not in str(error):
                raise
            raise ValueError(
                f"{resume_from_checkpoint}: the weights do not fit the model: {' '.join(str(error).split())} Resume with the "
                "model and the `head` of the checkpoint."
            ) from error

    def _load_best_model(self) -> None:
        self._loaded_from = self.state.best_model_checkpoint
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # Trainer only warns and leaves the weights that are missing from the checkpoint unchanged
        if not (load_result.missing_keys or load_result.unexpected_keys):
            return
        if not isinstance(self.model, PreTrainedModel):
            raise ValueError(
                f"{self._loaded_from}: the weights do not fit {type(self.model).__name__}: "
                f"{list_misfits(load_result.missing_keys, load_result.unexpected_keys)}. Resume with the model of the "
                "checkpoint."
            )
        # In files, some names differ (mixture of experts) or are absent (tied weights). `from_pretrained` handles both
        model, info = type(self.model).from_pretrained(
            self._loaded_from,
            config=self.model.config,
            dtype=self.model.dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        WeightFit.of(model, info).refuse(self._loaded_from, self.step_format)
        self.model.load_state_dict(model.state_dict())

    def _training_settings(self) -> dict[str, Any]:
        settings = super()._training_settings()
        settings.pop("step_format", None)  # it may come from the model or from a file
        return settings | plain(asdict(self.step_format))

    @property
    def _default_settings(self) -> dict[str, Any]:
        return plain(asdict(StepFormat()))  # earlier versions had fewer fields, with the effect of today's defaults

    def _settings_without_record(self, checkpoint: Path) -> dict[str, Any] | None:
        trained_format = StepFormat.find(str(checkpoint))
        return None if trained_format is None else plain(asdict(trained_format))

    # Training

    def train(self, *args, **kwargs):
        if self.model is None:  # of `model_init`, which a hyperparameter search deletes after each trial
            self.model = self.model_wrapped = self.call_model_init(kwargs.get("trial"))
        # After an evaluation, Accelerate considers the model prepared, and each process would train a separate model
        if self.model_wrapped is self.model:
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def set_initial_training_values(self, *args, **kwargs):
        # For each attempt of `auto_find_batch_size`. Discards counts that an earlier attempt or training did not log
        self._start_counting()
        return super().set_initial_training_values(*args, **kwargs)

    # Logs

    def _start_counting(self) -> None:
        # correct predictions, labels and tokens of this rank since the last log
        self._train_counts = torch.zeros(3, dtype=torch.long, device=self.args.device)
        self._labels_seen = 0
        self._counting_since = None

    def _count(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> None:
        scores = step_score(logits, self.step_format)
        self._train_counts += torch.stack(
            [
                ((scores >= 0.5) == (labels >= 0.5)).sum(),
                labels.new_tensor(len(labels)).long(),
                self._num_tokens(inputs),
            ]
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._counting_since is not None:  # an interval of training
            hits, labels, tokens = self.accelerator.reduce(self._train_counts, reduction="sum").tolist()
            self._labels_seen += labels
            seconds = time.perf_counter() - self._counting_since
            logs["accuracy"] = hits / max(labels, 1)
            logs["labels_per_second"] = labels / seconds
            logs["tokens_per_second"] = tokens / seconds
            logs["num_labels"] = self._labels_seen
            if "train_dataset" in self.reports:  # absent if the dataset was already prepared
                logs["dropped_labels"] = self.reports["train_dataset"].labels_too_long
            self._train_counts.zero_()
            self._counting_since = None  # the next batch restarts the clock, to exclude evaluation and saving
        super().log(logs, start_time)


def warn_of_another_format(name: str, found: StepFormat, step_format: StepFormat) -> None:
    """Warn if a checkpoint was trained with a different step format."""
    theirs, ours = asdict(found), asdict(step_format)
    changed = [f"`{key}` {shown(theirs[key])} (now {shown(ours[key])})" for key in ours if theirs[key] != ours[key]]
    if changed:
        logger.warning(
            f"{name} was trained with a different step format: {', '.join(changed)}. Its scores depend on the step format. "
            "Set these arguments to the old values, unless you want to change the format."
        )


def set_up_model(
    model: "PreTrainedModel | PeftModel",
    args: TrainingArguments,
    peft_config: "PeftConfig | None",
    step_format: StepFormat,
) -> "PreTrainedModel | PeftModel":
    """
    Prepare a model for training: freeze output embeddings that are not used, add the adapter of `peft_config`, disable dropout
    if `args.disable_dropout`, and enable input gradients for gradient checkpointing with an adapter.

    Raises:
        `ValueError`: If `peft_config` is given and the model already has an adapter, or a head would be neither trained nor saved.
    """
    if step_format.head == "value":
        # DistributedDataParallel fails if a trained weight gets no gradient
        unused = model.get_output_embeddings()
        if unused is not None and unused.weight is not model.get_input_embeddings().weight:
            unused.requires_grad_(False)
    if peft_config is not None:
        from peft import TaskType, get_peft_model

        if is_peft_model(model):
            raise ValueError(
                "You passed a `PeftModel` instance together with a `peft_config`. Merge the adapter into the base model "
                "first, or continue training it without `peft_config`."
            )
        peft_config = copy.deepcopy(peft_config)  # changed below, and by PEFT
        # With the task type TOKEN_CLS, PEFT also trains and saves the modules `classifier` and `score`
        peft_config.task_type = TaskType.CAUSAL_LM if step_format.is_causal_lm else TaskType.TOKEN_CLS
        if step_format.head == "value":
            peft_config.modules_to_save = [*(peft_config.modules_to_save or ()), "v_head.summary"]
        # "all-linear" would also add an adapter to the head, which fails
        if not step_format.is_causal_lm and getattr(peft_config, "target_modules", None) == "all-linear":
            given = peft_config.exclude_modules or []
            if not isinstance(given, str):  # a regular expression has to exclude the head itself
                peft_config.exclude_modules = [*given, *_HEAD_LAYERS]
        # ZeRO-3 requires all parameters to have the same dtype, see https://github.com/huggingface/trl/issues/6089
        zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        # The adapter's config records the base model, and must also record its revision
        revision = (getattr(args, "model_init_kwargs", None) or {}).get("revision")
        kwargs = {"autocast_adapter_dtype": False} if zero3 else {}
        model = get_peft_model(model, peft_config, revision=revision, **kwargs)
    elif is_peft_model(model) and not step_format.is_causal_lm:
        check_adapted_head(model)
    if args.disable_dropout:
        disable_dropout_in_model(model)
    # transformers.Trainer does this for models without adapter, see https://github.com/huggingface/transformers/issues/42489
    if is_peft_model(model) and args.gradient_checkpointing:
        model.enable_input_require_grads()
    return model
