import logging
import os
import textwrap
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from datasets import Dataset
from torch import nn
from transformers import (
    BaseImageProcessor,
    DataCollator,
    FeatureExtractionMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalPrediction
from transformers.utils import is_peft_available

from .._compat import get_config_model_id, global_then_local_main_first
from ..io import shown
from ..step_format import STEP_FORMAT_NAME, StepFormat
from ..trainer.step_trainer import StepSources, StepTrainer, check_dataset, set_up_model
from ..tree_attention import is_causal
from .prm_config import PRMConfig
from .token_rows import IGNORED, DataCollatorForStepLabels, check_token_rows, tokenize_dataset


if is_peft_available():
    from peft import PeftConfig


logger = get_logger(__name__)


def compute_accuracy(eval_pred: EvalPrediction) -> dict[str, float]:
    """
    Compute the accuracy of predictions.

    Args:
        eval_pred ([`~transformers.EvalPrediction`] or `tuple`):
            Either `predictions` of shape `(B, L, C)` and `labels` of shape `(B, L)`, where -100 is ignored and a soft label
            of at least 0.5 counts as correct, or `predictions` of shape `(B, 2)` with the rewards of pairs and `labels` with
            the index of the better reward, where ties are ignored with a warning.

    Returns:
        `dict[str, float]`: `accuracy`.
    """
    predictions, labels, *_ = eval_pred
    if predictions.ndim == 3:
        judged = labels != IGNORED
        predictions, labels = predictions[judged], labels[judged]
        if np.issubdtype(labels.dtype, np.floating):
            labels = labels >= 0.5
    else:
        ties = predictions[:, 0] == predictions[:, 1]
        if ties.any():
            # Same message as in TRL, since users may test for it. accelerate's logger would require an initialized state
            logging.getLogger(__name__).warning(
                f"There are {ties.sum()} out of {len(ties)} instances where the predictions for both options are equal. "
                "These instances are ignored in the accuracy computation."
            )
        predictions, labels = predictions[~ties], labels[~ties]
    return {"accuracy": float((predictions.argmax(axis=-1) == labels).mean())}


class PRMTrainer(StepTrainer):
    """
    Trainer for process reward models (PRM). It is a drop-in replacement for TRL's `PRMTrainer`, which was removed in TRL
    1.14.

    Arguments, dataset columns and metrics are the same as in TRL. As in [`HRMRewardTrainer`], the loss is the mean over
    all labelled steps of the global batch, so it does not depend on the number of accumulation steps or ranks. For all
    differences, see `docs/migrating_from_trl_prm.md`. For trees of steps, packing and other heads, use
    [`HRMRewardTrainer`].

    Example:

    ```python
    from datasets import load_dataset
    from transformers import AutoModelForTokenClassification, AutoTokenizer
    from trl_hrm.prm import PRMConfig, PRMTrainer

    trainer = PRMTrainer(
        model=AutoModelForTokenClassification.from_pretrained("Qwen/Qwen2.5-0.5B", num_labels=2),
        args=PRMConfig(output_dir="outputs/prm"),
        processing_class=AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B"),
        train_dataset=load_dataset("trl-lib/math_shepherd", split="train"),
    )
    trainer.train()
    ```

    Args:
        model ([`~transformers.PreTrainedModel`], *optional*):
            Model with two logits per token (0 wrong, 1 correct), preferably an `AutoModelForTokenClassification`.
        args ([`PRMConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function that forms a batch with `input_ids`, `labels` and other inputs of the model. Defaults to
            [`~prm.token_rows.DataCollatorForStepLabels`].
        train_dataset ([`~datasets.Dataset`]):
            Dataset to use for training, with the columns `prompt`, `completions` and `labels`. If it has a column
            `input_ids`, it must be tokenized, with `labels` for each token.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset to use for evaluation, or a dictionary of named datasets. Each is tokenized if it has no `input_ids`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. Required unless you pass a `data_collator` and tokenized datasets.
        model_init (`Callable[[], PreTrainedModel]`, *optional*):
            Function that creates the model, to use instead of `model`. It is called again for each trial of a
            hyperparameter search.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Function that computes metrics from `predictions` of shape `(B, L, C)` and `label_ids` of shape `(B, L)`, both
            padded with -100. Defaults to [`compute_accuracy`].
        callbacks, optimizers, preprocess_logits_for_metrics:
            See [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. Its task type is set to token classification, so that the newly
            initialized classifier is trained and saved with the adapter.

    Raises:
        `ValueError`: If the dataset, the tokenizer or the data collator is not supported.
        `TypeError`: If a dataset is not a [`~datasets.Dataset`].
    """

    _tag_names = ["trl", "prm"]
    _name = "PRM"
    _paper = {
        "title": "Solving math word problems with process-and outcome-based feedback",
        "id": "2211.14275",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{uesato2022solving,
                title        = {{Solving Math Word Problems With Process- and Outcome-Based Feedback}},
                author       = {Uesato, Jonathan and Kushman, Nate and Kumar, Ramana and Song, Francis and Siegel, Noah and Wang, Lisa and Creswell, Antonia and Irving, Geoffrey and Higgins, Irina},
                year         = 2022,
                journal      = {arXiv preprint arXiv:2211.14275}
            }"""),
    }

    _card_settings = ("max_completion_length", "train_on_last_step_only", "disable_dropout")

    compute_metrics = staticmethod(compute_accuracy)

    def __init__(
        self,
        model: PreTrainedModel | nn.Module | None = None,
        args: PRMConfig | None = None,
        data_collator: DataCollator | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase
        | BaseImageProcessor
        | FeatureExtractionMixin
        | ProcessorMixin
        | None = None,
        model_init: Callable[[], PreTrainedModel] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        preprocess_logits_for_metrics: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        peft_config: "PeftConfig | None" = None,
    ):
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if isinstance(model, str):
            raise ValueError(
                f"`model` is the string {shown(model)}. It must be a model. Load it with "
                f"`AutoModelForTokenClassification.from_pretrained({shown(model)}, num_labels=2)`, or use HRMRewardTrainer, "
                "which loads models by name."
            )
        if args is None:
            args = (
                PRMConfig() if model is None else PRMConfig(f"{get_config_model_id(model.config).split('/')[-1]}-PRM")
            )
        if not hasattr(args, "max_completion_length"):  # Axolotl passes its own class
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be a `PRMConfig`.")
        if data_collator is None:
            if processing_class is None:
                raise ValueError(
                    "`processing_class` is missing. The default data collator needs the tokenizer. Pass `processing_class` "
                    "or a `data_collator`."
                )
            data_collator = DataCollatorForStepLabels(processing_class)
        self.step_format = StepFormat(step_separator=args.step_separator)
        self.data_collator = data_collator  # read when datasets are prepared
        self._peft_config = peft_config
        if model is not None:
            set_seed(args.seed)  # adapters are randomly initialized
            model = set_up_model(model, args, peft_config, self.step_format)

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,
            compute_metrics=compute_metrics or self.compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self.label_names = ["labels"]

    def call_model_init(self, trial=None) -> nn.Module:
        return set_up_model(super().call_model_init(trial), self.args, self._peft_config, self.step_format)

    # Datasets and batches

    @staticmethod
    def tokenize_row(
        features: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        step_separator: str,
        max_length: int | None,
        max_completion_length: int | None,
        train_on_last_step_only: bool,
        is_eval: bool,
    ) -> dict[str, list]:
        r"""
        Tokenize a row of the dataset.

        Args:
            features (`dict[str, Any]`):
                Row with the keys `"prompt"`, `"completions"` and `"labels"`. A step with the label `None` is only context.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the model.
            step_separator (`str`):
                Text added after every step. Its last token gets the label of the step.
            max_length (`int` or `None`):
                Maximum number of tokens of the row. If `None`, the row is not truncated.
            max_completion_length (`int` or `None`):
                Maximum number of tokens of the steps. If `None`, the steps are not truncated.
            train_on_last_step_only (`bool`):
                Whether to keep only the label of the last step.
            is_eval (`bool`):
                Whether the row is used for evaluation, where `train_on_last_step_only` has no effect.

        Returns:
            `dict[str, list]`: `"input_ids"`, and `"labels"` of the same length, which are -100 except at the last token of
            each step. Labels 0 and 1 are integers, other labels are floats.

        Example:

        ```python
        >>> row = {"prompt": "1+2+3?", "completions": ["1+2=3.", "3+3=7."], "labels": [True, False]}
        >>> PRMTrainer.tokenize_row(row, tokenizer, "\n", None, None, train_on_last_step_only=False, is_eval=False)
        {'input_ids': [5, 11, 6, 11, 7, 12, 5, 11, 6, 13, 7, 14, 3, 7, 11, 7, 13, 8, 14, 3],
         'labels': [-100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, -100, 1, -100, -100, -100, -100, -100, -100, 0]}
        ```
        """
        step_format = StepFormat(step_separator=step_separator)
        prompt_ids = step_format.encode_prompt(tokenizer, features["prompt"])
        # one text at a time, since callers may pass a tokenizer that does not accept lists
        step_ids = [step_format.encode_step(tokenizer, step) for step in features["completions"]]
        step_labels = [IGNORED if label is None else label for label in features["labels"]]
        step_labels = [int(label) if label in (0, 1, IGNORED) else float(label) for label in step_labels]
        if train_on_last_step_only and not is_eval:
            step_labels[:-1] = [IGNORED] * len(step_labels[:-1])
        completion_ids = list(chain.from_iterable(step_ids))
        labels = list(
            chain.from_iterable(
                [IGNORED] * (len(ids) - 1) + [label] for ids, label in zip(step_ids, step_labels, strict=True)
            )
        )
        input_ids = prompt_ids + completion_ids[:max_completion_length]
        labels = [IGNORED] * len(prompt_ids) + labels[:max_completion_length]
        return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase | None, args: PRMConfig, name: str
    ) -> Dataset:
        check_dataset(dataset, name, "labels are checked")
        if not len(dataset):
            raise ValueError(f"{name} has no rows. It must have at least one labelled step.")
        if name == "train_dataset" and "label_weights" in dataset.column_names:
            logger.warning(
                f"{name} has the column `label_weights`, which `PRMTrainer` does not use. To weight the loss of each step by it, use "
                "`HRMRewardTrainer` with `label_weighting='column'`."
            )
        with global_then_local_main_first():
            rows = dataset
            if "input_ids" not in dataset.column_names:
                if processing_class is None:
                    raise ValueError(
                        f"`processing_class` is missing. It is required because {name} has no `input_ids` and must be tokenized."
                    )
                self.step_format.check(processing_class)
                rows = tokenize_dataset(
                    dataset,
                    name,
                    self.tokenize_row,
                    args.dataset_num_proc,
                    tokenizer=processing_class,
                    step_separator=args.step_separator,
                    max_length=args.max_length,
                    max_completion_length=args.max_completion_length,
                    train_on_last_step_only=args.train_on_last_step_only,
                    is_eval=name != "train_dataset",
                )
            separator_ids = (
                None
                if processing_class is None
                else processing_class(args.step_separator, add_special_tokens=False)["input_ids"]
            )
            rows, report, num_labels = check_token_rows(rows, name, separator_ids, args.dataset_num_proc)
            if "input_ids" not in dataset.column_names:
                for row in dataset.select_columns(["prompt", "completions"]):
                    report.count_control_text(processing_class, self.step_format, row["prompt"], row["completions"])
        self.reports[name] = report
        if name != "train_dataset" and "input_ids" not in dataset.column_names:
            self._sources[name] = self._token_sources(dataset, num_labels)
        dropped = report.labels_too_long or report.trees_without_labels
        dropped = dropped or report.prompts_with_control_text or report.steps_with_control_text
        logger.log(logging.WARNING if dropped else logging.INFO, f"{name}: {report}")
        if report.labels_soft:
            self._check_collator(rows, args, name)
        if name == "train_dataset" and self.reports[name].labels_elsewhere:
            logger.warning(
                f"{name}: {report.labels_elsewhere} of {report.labels_kept} labelled tokens are not at the end of the "
                f"`step_separator` {shown(args.step_separator)}, so the step format is unknown and no {STEP_FORMAT_NAME} is saved. "
                "Set `step_separator` to the separator of the dataset, and pass the tokenizer as `processing_class`."
            )
        return rows

    @staticmethod
    def _token_sources(dataset: Dataset, num_labels: np.ndarray) -> StepSources:
        """Return where the labelled tokens of evaluation rows come from, given the number of labels left in each row."""
        steps: list[int] = []
        for labels, number in zip(dataset["labels"], num_labels.tolist(), strict=True):
            labelled = [i for i, label in enumerate(labels) if label is not None and label != IGNORED]
            steps += labelled[:number]  # truncation drops the last steps
        return StepSources(dataset, np.repeat(np.arange(len(num_labels)), num_labels), np.array(steps, int))

    def _check_collator(self, rows: Dataset, args: PRMConfig, name: str) -> None:
        """Raise if the user's data collator casts soft labels to integers: 0.9 would be trained as 0."""
        i = next(i for i, labels in enumerate(rows["labels"]) if set(np.unique(labels)) - {IGNORED, 0, 1})
        row = rows[i]
        if args.remove_unused_columns:  # the collator may not support the columns that Trainer removes
            row = {key: row[key] for key in ("input_ids", "attention_mask", "labels") if key in row}
        labels = self.data_collator([row])["labels"]
        if not labels.is_floating_point():
            raise ValueError(
                f"{name} has soft labels, but the `data_collator` ({type(self.data_collator).__name__}) casts labels to "
                f"{labels.dtype}, so 0.9 would be trained as 0. Remove `data_collator`, use "
                "`trl_hrm.prm.token_rows.DataCollatorForStepLabels`, or round the labels of the dataset."
            )

    def _step_logits(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the outputs at every token, shape `(B, L, C)`."""
        logits = model(**{name: values for name, values in inputs.items() if name not in self.label_names}).logits
        if logits.shape[-1] != 2:
            raise ValueError(
                f"The model has {logits.shape[-1]} outputs per token. It must have 2 (0 wrong, 1 correct). Load it with "
                "`num_labels=2`."
            )
        return logits

    def _step_labels(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        labels = inputs["labels"]
        return labels, (labels >= 0).float(), torch.ones_like(labels, dtype=torch.long)

    def _num_tokens(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = inputs.get("attention_mask")  # missing with some custom collators
        return (inputs["labels"].new_tensor(inputs["labels"].numel()) if mask is None else mask.sum()).long()

    # Loss

    def compute_step_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_merged: torch.Tensor) -> torch.Tensor:
        epsilon = self.args.label_smoothing_factor
        return super().compute_step_loss(logits, (1 - epsilon) * labels + epsilon / 2, num_merged)

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save and not self._format_is_known:
            (Path(output_dir or self.args.output_dir) / STEP_FORMAT_NAME).unlink()

    @property
    def _format_is_known(self) -> bool:
        """
        Whether the training rows were encoded with `step_format`, and the model scores a step before the next ones. Tokenized datasets
        may use another format, and encoders see the steps that follow.
        """
        return not self.reports["train_dataset"].labels_elsewhere and is_causal(self.model)
