import copy
import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer

from .._compat import ForwardRedirection, FusedCausalLMOutput, get_config_model_id
from ..encoding import dated_template, uses_clock
from ..identity import checkpoint_identity
from ..io import shown
from ..kl import (
    LMHead,
    causal_lm_of,
    narrow_lm_head,
    scaled_kl,
    sequence_kl,
    token_kl,
    trained_sequences,
    trained_tokens,
)
from ..loading import check_policy, load_policy, load_tokenizer, refuse_frozen_adapter, refuse_nan
from ..pages.papers import HRM_PAPER
from ..training.hub_push import HubPushMixin
from ..training.safe_training import SafeTrainingMixin, identity_in_memory
from .kl_self_config import KLSelfConfig
from .model_card import save_policy_card
from .reference import (
    REF_STATES,
    AdapterOff,
    FrozenReference,
    RefHiddenCollator,
    check_reference,
    make_reference,
    precompute_hidden,
    reference_revision,
    trained_sequences_of,
)


if TYPE_CHECKING:
    from peft import PeftModel

logger = get_logger(__name__)


@dataclass
class KLOutput(FusedCausalLMOutput):
    """
    Output of the policy's forward pass, with the KL to the reference.

    Args:
        token_kl (`torch.Tensor`, *optional*):
            KL divergence at the N trained tokens, in nats, shape `(N,)`, in row-major order.
    """

    token_kl: torch.Tensor | None = None


class KLSelfTrainer(SafeTrainingMixin, HubPushMixin, SFTTrainer):
    """
    Trainer for self-training: supervised fine-tuning on a policy's own best solutions, regularised towards a reference
    model by a log-scaled KL divergence ([HRM](https://huggingface.co/papers/2503.13551), section 3.3).

    The loss is `lm_loss + kl_coef * mean_i ln(1 + KL_i)` over the sequences i of the global batch, where KL_i is summed over
    the trained tokens of sequence i. It does not depend on how the batch is split over accumulation steps, ranks and packed
    rows.

    This class inherits from [`~trl.SFTTrainer`] and adds the KL term to its loss. With a KL term, these options are not
    supported: `label_smoothing_factor`, `compute_loss_func`, packing that cuts sequences, images, `torch_compile` with an
    adapter, adapters that train biases, and parallelism that splits a sequence or a model.

    Example:

    ```python
    from datasets import load_dataset
    from trl_hrm import KLSelfConfig, KLSelfTrainer

    trainer = KLSelfTrainer(
        model="Qwen/Qwen2.5-Math-7B-Instruct",
        args=KLSelfConfig(output_dir="outputs/kl-self", learning_rate=2e-6, kl_coef=0.5),
        train_dataset=load_dataset("data/gsm8k-sft", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Policy to be trained. An adapter must be passed as a [`~peft.PeftModel`], loaded with `is_trainable=True`.
        args ([`KLSelfConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Reference model. Defaults to `args.ref_model`. If neither is set, it is a frozen copy of the policy or, if the policy
            has an adapter, the policy with the adapter disabled.
        **kwargs:
            Other arguments of [`~trl.SFTTrainer`], such as `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`
            and `peft_config`.

    Raises:
        `FileExistsError`: If `args.output_dir` is the folder of the reference model.
        `ValueError`: If `model` is the name of an adapter, the reference model does not fit the policy, an option is not supported with a
        KL term, or no row of a dataset has a token to train on.
    """

    _tag_names = ["trl", "trl-hrm", "sft", "kl-self"]
    _name = "KL self-training"
    _save_card = save_policy_card
    _card_settings = ("kl_coef", "kl_scaling", "kl_direction", "kl_reduction", "packing", "completion_only_loss")
    _paper = HRM_PAPER

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: KLSelfConfig | None = None,
        ref_model: str | PreTrainedModel | None = None,
        **kwargs,
    ):
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if isinstance(ref_model, os.PathLike):
            ref_model = os.fspath(ref_model)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = KLSelfConfig(f"{model_name.split('/')[-1]}-KLSelf")
        if not isinstance(args, KLSelfConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be a `KLSelfConfig`.")
        if isinstance(model, str):
            init = args.model_init_kwargs or {}
            refuse_frozen_adapter(model, init.get("revision"))
            if not check_policy(model, init.get("revision"), args.trust_remote_code):
                load_policy(model, **init)  # an older format, whose weights are only known once they are loaded
            if kwargs.get("processing_class") is None:
                load_tokenizer(model, init.get("revision"), args.trust_remote_code)  # a damaged one raises here
        has_adapter = kwargs.get("peft_config") is not None or (not isinstance(model, str) and is_peft_model(model))
        self._train_data, self._eval_data = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        given = args.ref_model if ref_model is None else ref_model
        if given is None and isinstance(model, str) and reference_revision(args) is not None:
            given = model  # possibly in another revision than the policy
        self._ref_revision = reference_revision(args, is_policy=given == model)
        self._given_reference = given if given is None or isinstance(given, str) else identity_in_memory(given)
        reference = make_reference(model, args, ref_model, has_adapter, kwargs.get("compute_loss_func"))
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(model, str):
            refuse_nan(self.model, model)
        self.reference = None
        self._forward_redirection = ForwardRedirection()
        self._kl_sums: dict[str, torch.Tensor] = {}
        self._kl_max: dict[str, torch.Tensor] = {}
        for mode in ("train", "eval"):
            self._reset_metrics(mode)
        if args.kl_coef:
            self._check_support()
            policy = causal_lm_of(self.model)
            check_reference(reference, given, policy, self._tokenizer, self._ref_revision, args.trust_remote_code)
            if args.precompute_ref_hidden:
                self.reference, store = precompute_hidden(self, reference)
                self.data_collator = RefHiddenCollator(self.data_collator, store)
            elif reference is None:
                self.reference = AdapterOff(self.accelerator)
            else:
                self.reference = FrozenReference(reference, self.accelerator)
        if args.precompute_ref_hidden:
            del reference
            gc.collect()  # TRL's forward redirection leaves a reference cycle that keeps the model in memory

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """
        Prepare a dataset as [`~trl.SFTTrainer`] does, after dropping rows with an empty completion. Rows whose column
        `is_complete` is false are not trained on the end of sequence, or the end of turn, after their completion.

        Raises:
            `ValueError`: If no row is left to train on, a row of a streaming dataset has an empty completion, or the end of an
                unfinished row cannot be told from its text.
        """
        template = self.chat_template
        if template is None and getattr(processing_class, "chat_template", None):
            template = processing_class.get_chat_template()
        if template is not None and uses_clock(template):
            self.chat_template = dated_template(template, args.chat_template_date)
        if formatting_func is None:
            dataset = drop_empty_completions(dataset, dataset_name, args.dataset_text_field)
        if has_unfinished_rows(dataset, dataset_name):
            if formatting_func is not None:
                raise ValueError(
                    f"{dataset_name}: some rows are unfinished (`is_complete` is false), and `formatting_func` may end them. "
                    "Remove `formatting_func`, or the unfinished rows."
                )
            whole = copy.copy(args)  # truncated, packed and shuffled below, once the ends are masked
            whole.max_length, whole.shuffle_dataset = None, False
            dataset = dataset.with_format(None)  # `is_complete` as Python booleans
            rows = super()._prepare_dataset(dataset, processing_class, whole, False, None, dataset_name)
            mask = partial(mask_ends, tokenizer=self._tokenizer, chat_template=self.chat_template, name=dataset_name)
            dataset = rows.map(mask)
        rows = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        cuts_rows = packing and args.packing_strategy != "bfd"
        if not isinstance(dataset, Dataset) or cuts_rows or "labels" not in rows.column_names:
            return rows
        columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in rows.column_names]
        trained = sum(
            1 for row in rows.select_columns(columns).with_format("numpy") for _ in trained_sequences_of(row)
        )
        remedy = (
            "Is every token masked?"
            if args.max_length is None
            else f"The prompts alone fill `max_length` {args.max_length}. Raise it, or shorten the prompts."
        )
        if not trained:
            raise ValueError(f"{dataset_name}: none of {len(dataset):,} rows has a token to train on. {remedy}")
        if trained < len(dataset):
            logger.warning(
                f"{dataset_name}: {len(dataset) - trained:,} of {len(dataset):,} rows have no token to train on and are ignored. "
                f"{remedy}"
            )
        return rows

    def _check_support(self) -> None:
        adapters = self.model.peft_config.values() if is_peft_model(self.model) else ()
        if any(getattr(adapter, "bias", None) not in (None, "none") for adapter in adapters):
            raise ValueError(
                "The adapter trains biases of the base model. Disabling the adapter does not reset them, so the reference "
                "would change during training. Use `bias='none'`."
            )
        if adapters and self.args.torch_compile:
            raise ValueError(
                "`torch_compile` is not supported for a policy with an adapter and a KL term, because the adapter is disabled "
                "and enabled in every step. Remove `torch_compile`, or use `kl_coef=0`."
            )
        if self._is_vision_dataset:
            raise ValueError("The dataset has images, which are not supported with a KL term. Use `kl_coef=0`.")
        config = self.accelerator.parallelism_config
        if config is not None and (config.cp_enabled or config.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism are not supported with a KL term: they split a sequence over ranks, and its "
                "KL is not summed over them. Use data parallelism, ZeRO or FSDP, or `kl_coef=0`."
            )
        devices = set((getattr(self.model, "hf_device_map", None) or {}).values())
        if self.get_tp_size() > 1 or len(devices) > 1:
            raise ValueError(
                "The policy is split over devices (tensor parallelism or `device_map`), which is not supported with a KL term. "
                "Use `accelerate launch` with one process per device, and ZeRO or FSDP if the policy is too large for one device."
            )

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """Return the batches of one optimizer step and the number of their trained tokens, and count their sequences."""
        batch_samples, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.reference is not None and batch_samples:
            sequences = [trained_sequences(batch["labels"], batch.get("position_ids")) for batch in batch_samples]
            counts = [int(numbers.max()) + 1 for numbers in sequences if len(numbers)]
            num_sequences = torch.tensor(sum(counts), device=device)
            if self.args.average_tokens_across_devices:
                num_sequences = self.accelerator.reduce(num_sequences, reduction="sum")
            self._num_sequences_in_batch = num_sequences
        return batch_samples, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        Return the loss of [`~trl.SFTTrainer`] plus `kl_coef` times the scaled KL, summed over the sequences of this batch and
        divided by the number of sequences in the global batch.
        """
        if self.reference is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        states = {name: inputs[name] for name in inputs if name != "labels"}
        ref_hidden, ref_head = self.reference(model, states, labels)
        inputs = {name: value for name, value in inputs.items() if name != REF_STATES}
        policy = _PolicyBesideReference(self, model, ref_hidden, ref_head)
        loss = super().compute_loss(policy, inputs, return_outputs, num_items_in_batch)
        loss, outputs = loss if return_outputs else (loss, None)

        sequences = trained_sequences(labels, inputs.get("position_ids"))
        kl = sequence_kl(policy.outputs.token_kl, sequences, self.args.kl_reduction)
        kl_loss = scaled_kl(kl, self.args.kl_scaling).sum()
        if num_items_in_batch is None:
            kl_loss = kl_loss / max(len(kl), 1)
        else:
            kl_loss = kl_loss / self._num_sequences_in_batch.clamp(min=1)  # 0 if no rank has a trained token
            # As in SFTTrainer: gradients are averaged over ranks
            if self.args.average_tokens_across_devices:
                kl_loss = kl_loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = loss + self.args.kl_coef * kl_loss
        self._count(policy.outputs, sequences, kl.detach(), scaled_kl(kl.detach(), self.args.kl_scaling))
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        # After an evaluation, Accelerate considers the model prepared, and each process would train a separate model
        if self.model_wrapped is self.model:
            self.model._is_accelerate_prepared = False
        return super().train(*args, **kwargs)

    def set_initial_training_values(self, *args, **kwargs):
        self._reset_metrics("train")  # for each attempt of `auto_find_batch_size`
        return super().set_initial_training_values(*args, **kwargs)

    # Checkpoints

    @cached_property
    def _content(self) -> dict[str, Any]:
        content = super()._content
        reference = self._given_reference
        if not self.args.kl_coef:
            reference = None
        elif isinstance(reference, str):
            reference = checkpoint_identity(reference, self._ref_revision)
        elif reference is None and content["model"].keys() == {"config"}:
            reference = identity_in_memory(self.model)  # a copy of a policy that was not loaded from files
        return content | {"reference": reference}

    # Metrics

    def _reset_metrics(self, mode: str) -> None:
        device = self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # Sums over this rank since the last log: negative log-likelihood, tokens, KL, ln(1 + KL), sequences, scaled KL
        self._kl_sums[mode] = torch.zeros(6, dtype=dtype, device=device)
        self._kl_max[mode] = torch.zeros((), device=device)

    def evaluation_loop(self, *args, **kwargs):
        self._reset_metrics("eval")  # `predict` adds to the sums, but never logs them
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def _count(self, outputs: KLOutput, sequences: torch.Tensor, kl: torch.Tensor, scaled: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        sums = sequence_kl(outputs.token_kl, sequences)
        dtype = self._kl_sums[mode].dtype
        self._kl_sums[mode] += torch.stack(
            [
                -outputs.log_probs.sum(dtype=dtype),
                outputs.label_mask.sum(dtype=dtype),
                sums.sum(dtype=dtype),
                kl.log1p().sum(dtype=dtype),
                kl.new_tensor(len(kl), dtype=dtype),
                scaled.sum(dtype=dtype),
            ]
        )
        if len(sums):
            self._kl_max[mode] = torch.maximum(self._kl_max[mode], sums.max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss and the KL since the last log, over all ranks."""
        if self.reference is not None:
            mode = "train" if self.model.training else "eval"
            sums = self.accelerator.reduce(self._kl_sums[mode], reduction="sum").tolist()
            kl_max = self.accelerator.gather(self._kl_max[mode]).max().item()
            self._reset_metrics(mode)
            lm_loss, num_tokens, kl, log_kl, num_sequences, scaled = sums
            prefix = ""
            if mode == "eval":  # with several datasets: eval_NAME_
                prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "eval_")
            if num_sequences:
                if mode == "eval" and self.args.loss_type == "nll" and self.accelerator.num_processes == 1:
                    # The Trainer has the mean over batches, whose rows have different numbers of tokens
                    logs[f"{prefix}loss"] = lm_loss / num_tokens + self.args.kl_coef * scaled / num_sequences
                logs |= {
                    f"{prefix}lm_loss": lm_loss / num_tokens,
                    f"{prefix}kl": kl / num_sequences,
                    f"{prefix}kl_per_token": kl / num_tokens,
                    f"{prefix}log_kl": log_kl / num_sequences,
                    f"{prefix}kl_max": kl_max,
                }
        super().log(logs, start_time)


class _PolicyBesideReference:
    """Wrapper of the policy that computes the KL to the reference in the forward pass of SFTTrainer's loss."""

    def __init__(self, trainer: KLSelfTrainer, model: torch.nn.Module, ref_hidden: torch.Tensor, ref_head: LMHead):
        self.trainer = trainer
        self.model = model
        self.ref_hidden = ref_hidden
        self.ref_head = ref_head

    def __call__(self, **inputs) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        # Inside the wrapper's forward pass, so that DDP, ZeRO-3 and FSDP gather the LM head and track its gradient
        policy = self.trainer.accelerator.unwrap_model(self.model)
        self.outputs = self.trainer._forward_redirection(self.model, policy, self._forward, policy, inputs)
        return self.outputs

    def _forward(self, policy: "PreTrainedModel | PeftModel", inputs: dict[str, Any]) -> KLOutput:
        causal_lm = causal_lm_of(policy)
        states = []
        hook = causal_lm.base_model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        try:
            with narrow_lm_head(inputs["labels"].device):
                outputs = policy.forward(**inputs)
        finally:
            hook.remove()
        length = inputs["labels"].shape[1]  # prompt tuning prepends tokens
        hidden = states[0][:, -length:][:, :-1][trained_tokens(inputs["labels"])]
        direction = self.trainer.args.kl_direction
        with self.trainer.accelerator.autocast():  # same precision as the fused LM head
            kl = token_kl(hidden, LMHead.of(causal_lm), self.ref_hidden, self.ref_head, direction)
        return KLOutput(**outputs, token_kl=kl)


def drop_empty_completions(
    dataset: Dataset | IterableDataset, name: str, text_field: str = "text"
) -> Dataset | IterableDataset:
    """
    Drop rows with an empty completion, which would train the policy to end the sequence immediately.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Rows in one of TRL's formats. Tokenized rows are returned unchanged.
        name (`str`):
            Name of the dataset in messages.
        text_field (`str`, *optional*, defaults to `"text"`):
            Name of the column with plain text.

    Raises:
        `ValueError`: If no row is left, or a row of a streaming dataset has an empty completion (raised when the row is
        read).
    """
    if isinstance(dataset, IterableDataset):
        return dataset.map(_refuse_empty, fn_kwargs={"name": name, "text_field": text_field})
    if not len(dataset):
        raise ValueError(f"{name} has no rows. It must have at least one.")
    if "input_ids" in dataset.column_names:
        return dataset
    kept = dataset.filter(
        lambda row: not _is_empty(row, text_field), desc=f"Dropping empty completions from {name} dataset"
    )
    dropped = len(dataset) - len(kept)
    if dropped == len(dataset):
        raise ValueError(f"{name}: all {dropped:,} completions are empty, so no row is left to train on.")
    if dropped:
        logger.warning(
            f"{name}: {dropped:,} of {len(dataset):,} rows have an empty completion and are dropped. They would train the policy "
            "to end the sequence immediately."
        )
        return kept
    return dataset


def has_unfinished_rows(dataset: Dataset | IterableDataset, name: str) -> bool:
    """Return whether a dataset of texts or messages has rows with `is_complete` false, as `export --prefixes` writes them."""
    if isinstance(dataset, IterableDataset):
        row = next(iter(dataset), {})
        return "is_complete" in row and "input_ids" not in row
    columns = dataset.column_names
    if "is_complete" not in columns or "input_ids" in columns:
        return False
    return not all(_is_complete(value, name) for value in dataset.with_format(None).unique("is_complete"))


def _is_complete(value: bool | None, name: str) -> bool:
    if value not in (True, False, None):  # a text such as "false" counts as true in Python
        raise ValueError(f"{name}: `is_complete` is {shown(value)}. It must be true, false or null.")
    return value is None or bool(value)


def mask_ends(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None, name: str
) -> dict[str, list[int]]:
    """
    Return the labels of a tokenized row. After an unfinished completion, the end of sequence or the end of turn has the label
    -100.

    Args:
        row (`Mapping[str, Any]`):
            Row with `input_ids` and `labels`, not truncated, and the columns that it was tokenized from.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        chat_template (`str`, *optional*):
            Chat template of the rows. Defaults to the template of the tokenizer.
        name (`str`):
            Name of the dataset in messages.

    Raises:
        `ValueError`: If the text of the row is not the beginning of its tokens, or `is_complete` is not a boolean.
    """
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if _is_complete(row["is_complete"], name):
        return {"labels": labels}
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list):
        messages = row["prompt"] + row["completion"]
    if messages is None:
        text_ids = list(ids)
        while text_ids and text_ids[-1] == tokenizer.eos_token_id:
            text_ids.pop()
    else:
        text_ids = tokenizer.apply_chat_template(
            messages,
            chat_template=chat_template,
            continue_final_message=True,
            return_dict=True,
            **(row.get("chat_template_kwargs") or {}),
        )["input_ids"]
    if not text_ids or ids[: len(text_ids)] != text_ids:
        raise ValueError(
            f"{name}: where the text of the unfinished row {shown(messages or tokenizer.decode(ids), 200)} ends is unknown, so "
            "training would teach the policy to stop there. Remove the rows whose `is_complete` is false, or use a chat template "
            "that renders a message the same way with and without its end."
        )
    return {"labels": labels[: len(text_ids)] + [-100] * (len(ids) - len(text_ids))}


def _refuse_empty(row: Mapping[str, Any], name: str, text_field: str) -> Mapping[str, Any]:
    if _is_empty(row, text_field):
        raise ValueError(f"{name}: a row has an empty completion: {shown(dict(row), 200)}. Remove the row.")
    return row


def _is_empty(row: Mapping[str, Any], text_field: str) -> bool:
    """Return whether the completion of a row in one of TRL's formats is empty."""
    if "input_ids" in row:
        return False
    name = next((name for name in ("completion", "messages", text_field) if name in row), None)
    if name is None:
        return False  # another format
    value = row[name]
    if value is None or isinstance(value, str):
        return not _has_text(value)
    if not isinstance(value, list):
        return False
    answers = value if "completion" in row else [message for message in value if message.get("role") == "assistant"]
    is_empty = not any(
        _has_text(answer.get("content")) or any(answer.get(key) for key in answer.keys() - {"role", "content"})
        for answer in answers
    )
    return is_empty and bool(answers or "completion" in row)


def _has_text(content: str | list[dict[str, Any]] | None) -> bool:
    if isinstance(content, list):
        return any(block.get("type") != "text" or block["text"].strip() for block in content)
    return bool(content and content.strip())
