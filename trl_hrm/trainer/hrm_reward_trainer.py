import logging
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, DatasetDict
from transformers import (
    AutoTokenizer,
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction
from transformers.utils import is_peft_available

from .._compat import (
    BaseTrainer,
    disable_dropout_in_model,
    get_config_model_id,
    global_then_local_main_first,
)
from ..heads import check_head, gather_steps, step_outputs
from ..losses import step_loss, step_score
from ..step_metrics import judged_steps, step_metrics
from ..tree_attention import check_attention, model_inputs, use_tree_attention
from .forest_dataset import STEP_COLUMNS, TOKEN_COLUMNS, DataCollatorForForest, ForestBuilder, ForestReport
from .hrm_reward_config import HRMRewardConfig
from .model_setup import add_adapter, load_model, with_scorer


if is_peft_available():
    from peft import PeftConfig, PeftModel


logger = get_logger(__name__)


class HRMRewardTrainer(BaseTrainer):
    """
    Trainer for step reward models: Hierarchical (HRM), process (PRM) and outcome (ORM) reward models.

    A problem and its judged steps are a tree, and a tree is one row of the batch: every shared token passes through the
    model once, and every step sees exactly its own history (see [`trl_hrm.forest`]). The loss is the weighted mean over
    the judged steps of the global batch, whatever their split over accumulation steps and ranks.

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

            - A string: id of a model on the Hub, or path to a *directory* with a saved model. It is loaded as a token
              classifier (`head` `"classification"`, `"regression"`) or as a causal language model (`"lm"`) with the
              keyword arguments in `args.model_init_kwargs`; `dtype` defaults to `float32`.
            - A model with the outputs that the head needs.
        args ([`HRMRewardConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        data_collator ([`~transformers.DataCollator`], *optional*):
            Function that forms a batch from forest rows. Will default to
            [`~trainer.forest_dataset.DataCollatorForForest`].
        train_dataset ([`~datasets.Dataset`]):
            Rows of judged steps: TRL's [stepwise supervision](https://huggingface.co/docs/trl/dataset_formats) columns
            `prompt`, `completions`, `labels`, with optional `parents` for trees. See `docs/dataset_formats.md`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Dataset to use for evaluation, or several by name.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer. If `None`, it is loaded from the model's name. Its padding token, or else its EOS token, pads.
        compute_metrics (`Callable[[EvalPrediction], dict]`, *optional*):
            Replaces [`HRMRewardTrainer.compute_metrics`] and takes the same argument.
        callbacks, optimizers:
            See [`~transformers.Trainer`].
        peft_config ([`~peft.PeftConfig`], *optional*):
            PEFT configuration used to wrap the model. Its task type is set to that of the head, so that the newly made
            classifier of a token classifier is trained and saved with the adapter.

    To change the loss or the metrics, subclass and override [`HRMRewardTrainer.compute_step_loss`] or
    [`HRMRewardTrainer.compute_metrics`].

    Raises:
        `ValueError`: If the dataset, the model, the tokenizer or the attention implementation does not fit; each
        message says what to do.
        `TypeError`: If a dataset is not a [`~datasets.Dataset`] (streaming datasets cannot be joined by prompt and
        packed).
    """

    # compute_loss divides by the weight of the global batch itself
    loss_is_scaled_for_ga = True

    _tag_names = ["trl", "trl-hrm", "hrm-reward", "step-reward-model"]
    _name = "HRM Reward"
    _template_file = "rm_model_card.md"
    _paper = {
        "title": "Towards Hierarchical Multi-Step Reward Models for Enhanced Reasoning in Large Language Models",
        "id": "2503.13551",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{wang2025hierarchical,
                title        = {{Towards Hierarchical Multi-Step Reward Models for Enhanced Reasoning in Large Language Models}},
                author       = {Wang, Teng and Jiang, Zhangyi and He, Zhenqi and Tong, Shenyang and Yang, Wenhan and Zheng, Yanan and Li, Zeyu and He, Zifan and Gong, Hailei and Ye, Zewen and Ma, Shengjie and Zhang, Jianping},
                year         = 2025,
                journal      = {arXiv preprint arXiv:2503.13551}
            }"""),
    }

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
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = HRMRewardConfig(f"{model_name.split('/')[-1]}-HRM")
        if train_dataset is None:
            raise ValueError("`train_dataset` is required")
        self.step_format = args.step_format()

        # The head of a token classifier is new and random: seed before it is made
        set_seed(args.seed)
        model, revision = load_model(model, args, self.step_format)
        if processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(
                get_config_model_id(model.config), revision=revision, trust_remote_code=args.trust_remote_code
            )
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        if processing_class.pad_token_id is None:
            raise ValueError("The tokenizer has neither a padding nor an EOS token. Set `tokenizer.pad_token`.")
        self.step_format.check(processing_class)
        if peft_config is not None:
            model = add_adapter(model, peft_config, args, self.step_format)
        check_head(model, self.step_format)
        if args.shared_prefix:
            check_attention(model.config._attn_implementation)
            use_tree_attention(model, args.device)
        self._label_token_ids = (
            self.step_format.label_token_ids(processing_class) if self.step_format.head == "lm" else None
        )
        if args.disable_dropout:
            disable_dropout_in_model(model)
        # transformers.Trainer does this for plain models; see https://github.com/huggingface/transformers/issues/42489
        if is_peft_model(model) and args.gradient_checkpointing:
            model.enable_input_require_grads()

        # Datasets
        self.reports: dict[str, ForestReport] = {}
        train_dataset = self._prepare_dataset(train_dataset, processing_class, args, "train_dataset")
        eval_dataset = self._prepare_eval_dataset(eval_dataset, processing_class, args)
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
        if args.n_gpu > 1:
            raise ValueError(
                f"{type(self).__name__} does not support `nn.DataParallel`, which `Trainer` uses when several GPUs are "
                "visible to a single process. Launch the script with `accelerate launch` or `torchrun`, or make a "
                "single GPU visible with `CUDA_VISIBLE_DEVICES`."
            )
        self.label_names = ["labels", "label_weights", "num_merged"]
        # hits, labels and tokens of this rank since the last log
        self._train_counts = torch.zeros(3, dtype=torch.long, device=self.args.device)
        self._labels_seen = 0
        self._counting_since = None
        if hasattr(self.model, "add_model_tags"):
            self.model.add_model_tags(self._tag_names)

    def _send_telemetry(self):
        # TRL's trainers report to the Hub when they are made; this package uses no network unless asked
        pass

    # Datasets

    def _prepare_eval_dataset(self, eval_dataset, processing_class, args):
        if isinstance(eval_dataset, dict):
            return {
                name: self._prepare_dataset(dataset, processing_class, args, f"eval_dataset[{name!r}]")
                for name, dataset in eval_dataset.items()
            }
        if eval_dataset is not None:
            return self._prepare_dataset(eval_dataset, processing_class, args, "eval_dataset")
        return None

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: HRMRewardConfig, name: str
    ) -> Dataset:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`{name}` is a `{type(dataset).__name__}`, expected a `datasets.Dataset`. Rows of one prompt are "
                "joined and packed before training, which a stream does not allow; load it without `streaming=True`."
            )
        if set(TOKEN_COLUMNS + STEP_COLUMNS) <= set(dataset.column_names):
            return dataset  # prepared before
        builder = ForestBuilder(
            tokenizer=processing_class,
            step_format=self.step_format,
            max_length=args.max_length,
            shared_prefix=args.shared_prefix,
            packing=args.packing,
            label_weighting=args.label_weighting,
            error_weight=args.error_weight,
            train_on_last_step_only=args.train_on_last_step_only and name == "train_dataset",
        )
        with global_then_local_main_first():
            rows, report = builder(dataset, name, num_proc=args.dataset_num_proc)
        self.reports[name] = report
        dropped = report.labels_too_long or report.labels_contradicting or report.trees_without_labels
        logger.log(logging.WARNING if dropped else logging.INFO, f"{name}: {report}")
        return rows

    def _set_signature_columns_if_needed(self):
        # If `self.args.remove_unused_columns` is True, non-signature columns are removed.
        if self._signature_columns is None:
            self._signature_columns = TOKEN_COLUMNS + STEP_COLUMNS

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # A dataset passed here is prepared as `__init__` does; a `str` selects one that is
        if not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_eval_dataset(eval_dataset, self.processing_class, self.args)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset: Dataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"):
        test_dataset = self._prepare_dataset(test_dataset, self.processing_class, self.args, "test_dataset")
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    # Loss

    def compute_step_loss(self, logits: torch.Tensor, labels: torch.Tensor, num_merged: torch.Tensor) -> torch.Tensor:
        """
        Loss of each judged step, before weighting. Override it to train with another loss.

        Args:
            logits (`torch.Tensor`):
                Outputs at the step tokens of N judged steps, shape `(N, C)`, C = 2 (0 wrong, 1 correct) or 1.
            labels (`torch.Tensor`):
                Probabilities that the steps are correct, shape `(N,)`.
            num_merged (`torch.Tensor`):
                Original steps in each judged step (1, or 2 for a merged pair), shape `(N,)`.

        Returns:
            `torch.Tensor`: Losses, shape `(N,)`.
        """
        return step_loss(logits, labels, self.step_format)

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step, and the weight of their judged steps on all ranks."""
        batch_samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batch_samples:
            return batch_samples, None
        if self._counting_since is None:
            self._counting_since = time.perf_counter()
        weight = torch.stack([batch["label_weights"].sum() for batch in batch_samples]).sum().to(device)
        return batch_samples, self.accelerator.reduce(weight, reduction="sum")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # With DeepSpeed, Trainer casts every float input to the dtype of the model: a label of 0.9 would be 0.8984
        floats = {name: inputs[name].to(self.args.device) for name in ("labels", "label_weights")}
        return floats | super()._prepare_inputs({k: v for k, v in inputs.items() if k not in floats})

    def _step_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Outputs at the step tokens, shape `(B, S, C)`; padded steps repeat token 0."""
        tokens = {name: inputs[name] for name in TOKEN_COLUMNS}
        if self.args.shared_prefix:
            tokens = model_inputs(**tokens, config=self.model.config, dtype=self.model.dtype)
        else:
            # Without a mask and a cache, attention stays within the sequences that `position_ids` delimit
            tokens = {name: tokens[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
        with step_outputs(self.model, self._label_token_ids):
            logits = model(**tokens).logits
        return gather_steps(logits, inputs["step_positions"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Sum of `w·ℓ` over the judged steps of this batch, divided by the sum of `w` over the global batch.

        `num_items_in_batch` is that global weight. Ranks average their gradients, hence the factor `num_processes`.
        """
        logits = self._step_logits(model, inputs)
        judged = inputs["labels"] >= 0
        labels, weights = inputs["labels"][judged], inputs["label_weights"][judged]
        losses = self.compute_step_loss(logits[judged], labels, inputs["num_merged"][judged])
        if num_items_in_batch is None:
            num_items_in_batch = weights.sum()
        else:
            weights = weights * self.accelerator.num_processes
        # A batch without any label (all weights 0) has loss 0, not NaN
        loss = (weights * losses).sum() / num_items_in_batch.clamp(min=torch.finfo(torch.float32).tiny)
        if self.model.training:
            self._count(inputs, logits.detach()[judged], labels)
        return (loss, {"logits": logits}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        # The loss of an evaluation is a mean over all its steps, not over batches: `evaluation_loop` computes it
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = self._step_logits(model, inputs).float()
        return None, logits, tuple(inputs[name] for name in self.label_names)

    # Metrics

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        logits, labels, weights, num_merged = judged_steps(output.predictions, output.label_ids)
        losses = self.compute_step_loss(
            torch.from_numpy(logits), torch.from_numpy(labels), torch.from_numpy(num_merged)
        ).numpy()
        output.metrics[f"{metric_key_prefix}_loss"] = float(np.average(losses, weights=weights.astype(np.float64)))
        return output

    def compute_metrics(self, eval_prediction: EvalPrediction) -> dict[str, float]:
        """
        Metrics of an evaluation. Override it, or pass `compute_metrics`, to compute others.

        Args:
            eval_prediction ([`~transformers.EvalPrediction`]):
                `predictions` are the outputs at the step tokens, shape `(rows, S, C)`; `label_ids` is a tuple
                `(labels, label_weights, num_merged)`, shape `(rows, S)` each, padded with a negative label.
                [`judged_steps`] gives the judged steps alone.

        Returns:
            `dict[str, float]`: The metrics of [`step_metrics`] over all steps, and, where both occur, also over single
            and merged steps alone (`single_accuracy`, `merged_accuracy`, ...).
        """
        logits, labels, _, num_merged = judged_steps(eval_prediction.predictions, eval_prediction.label_ids)
        scores = step_score(torch.from_numpy(logits).double(), self.step_format).numpy()
        metrics = step_metrics(scores, labels)
        merged = num_merged > 1
        if merged.any():
            for name, group in (("single", ~merged), ("merged", merged)):
                metrics |= {f"{name}_{k}": v for k, v in step_metrics(scores[group], labels[group]).items()}
        return metrics

    def _count(self, inputs: dict[str, torch.Tensor], logits: torch.Tensor, labels: torch.Tensor) -> None:
        scores = step_score(logits, self.step_format)
        self._train_counts += torch.stack(
            [
                ((scores >= 0.5) == (labels >= 0.5)).sum(),
                labels.new_tensor(len(labels)).long(),
                inputs["num_tokens"].sum(),
            ]
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # an interval of training
            hits, labels, tokens = self.accelerator.reduce(self._train_counts, reduction="sum").tolist()
            self._labels_seen += labels
            seconds = time.perf_counter() - self._counting_since
            logs["accuracy"] = hits / max(labels, 1)
            logs["labels_per_second"] = labels / seconds
            logs["tokens_per_second"] = tokens / seconds
            logs["num_labels"] = self._labels_seen
            if "train_dataset" in self.reports:  # not if it was given as forest rows
                logs["dropped_labels"] = self.reports["train_dataset"].labels_too_long
            self._train_counts.zero_()
            self._counting_since = None  # the next batch starts the clock, so evaluating and saving do not count
        super().log(logs, start_time)

    # Saving

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self.step_format.save(output_dir or self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        # Ensure the model card is saved along with the checkpoint
        self.create_model_card(model_name=Path(self.args.hub_model_id or self.args.output_dir).name)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name=model_name, dataset_name=dataset_name, tags=tags)
        if self.is_world_process_zero():
            path = Path(self.args.output_dir) / "README.md"
            card = with_scorer(path.read_text(encoding="utf-8"), self.hub_model_id or self.args.output_dir)
            path.write_text(card, encoding="utf-8")
