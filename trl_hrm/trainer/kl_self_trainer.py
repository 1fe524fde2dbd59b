import gc
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel
from trl import SFTTrainer

from .._compat import ForwardRedirection, FusedCausalLMOutput, get_config_model_id
from ..encoding import dated_template, uses_clock
from ..kl import LMHead, narrow_lm_head, scaled_kl, sequence_kl, token_kl, trained_sequences, trained_tokens
from .hub_push import HubPushMixin
from .kl_self_config import KLSelfConfig
from .model_card import CardFacts, policy_quick_start, write_card
from .model_setup import forget_evaluation
from .policy_rows import check_trained_rows, drop_empty_completions
from .ref_hidden import REF_STATES, RefHiddenCollator, precompute_hidden
from .reference import (
    AdapterOff,
    FrozenReference,
    causal_lm_of,
    check_tokenizer,
    check_vocabulary,
    copy_of,
    load_reference,
)


if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class KLOutput(FusedCausalLMOutput):
    """
    Output of a policy's forward pass beside a reference.

    Args:
        token_kl (`torch.Tensor`, *optional*):
            KL divergence at the trained tokens, in nats, shape `(N,)`, in row-major order.
    """

    token_kl: torch.Tensor | None = None


class KLSelfTrainer(HubPushMixin, SFTTrainer):
    """
    Trainer for self-training: supervised fine-tuning on a policy's own best trajectories, held near a reference by a
    log-scaled KL divergence ([HRM](https://huggingface.co/papers/2503.13551), section 3.3).

    `loss = lm_loss + kl_coef * mean_i ln(1 + KL_i)` over the sequences i of the global batch, where KL_i is the sum over the
    trained tokens of sequence i. It does not depend on how the batch is split over accumulation steps, ranks and packed rows.

    It is [`~trl.SFTTrainer`] with another loss; see there for the arguments that are not below. All its options hold, but with a
    KL term not `label_smoothing_factor`, `compute_loss_func`, packing that cuts sequences, images, `torch_compile` of an
    adapter, adapters that train biases, and the parallelisms that split a sequence or a model.

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
            Policy to be trained.
        args ([`KLSelfConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        ref_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Reference model. By default `args.ref_model`, and without one the policy as it is given here: with its adapter
            off under PEFT, else a frozen copy.
        **kwargs:
            Other arguments of [`~trl.SFTTrainer`], such as `train_dataset`, `eval_dataset`, `processing_class`, `callbacks`
            and `peft_config`.

    Raises:
        `ValueError`: If the reference does not fit the policy, an option does not go with a KL term, or no row of a dataset has
        a token to train on.
    """

    _tag_names = ["trl", "trl-hrm", "sft", "kl-self"]
    _name = "KL self-training"
    _card_settings = ("kl_coef", "kl_scaling", "kl_direction", "kl_reduction", "packing", "completion_only_loss")
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
        args: KLSelfConfig | None = None,
        ref_model: str | PreTrainedModel | None = None,
        **kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = KLSelfConfig(f"{model_name.split('/')[-1]}-KLSelf")
        if not isinstance(args, KLSelfConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`, expected a `KLSelfConfig`.")
        has_adapter = kwargs.get("peft_config") is not None or (not isinstance(model, str) and is_peft_model(model))
        reference = self._make_reference(model, args, ref_model, has_adapter, kwargs.get("compute_loss_func"))
        super().__init__(model=model, args=args, **kwargs)
        self.reference = None
        self._forward_redirection = ForwardRedirection()
        self._kl_sums: dict[str, torch.Tensor] = {}
        self._kl_max: dict[str, torch.Tensor] = {}
        for mode in ("train", "eval"):
            self._reset_metrics(mode)
        if args.kl_coef:
            self._check_support()
            self._use_reference(reference, args.ref_model if ref_model is None else ref_model)
        if args.precompute_ref_hidden:
            del reference
            gc.collect()  # TRL's redirection of the forward pass leaves a cycle, which would keep the model in memory

    # Data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """
        The rows of [`~trl.SFTTrainer`], without those that have nothing to learn from.

        Raises:
            `ValueError`: If no row is left, or a row of a stream has an empty completion.
        """
        template = self.chat_template
        if template is None and getattr(processing_class, "chat_template", None):
            template = processing_class.get_chat_template()
        if template is not None and uses_clock(template):
            self.chat_template = dated_template(template, args.chat_template_date)
        if formatting_func is None:
            dataset = drop_empty_completions(dataset, dataset_name, args.dataset_text_field)
        rows = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        if isinstance(dataset, Dataset) and not (
            packing and args.packing_strategy != "bfd"
        ):  # others cut rows into pieces
            check_trained_rows(rows, dataset_name, len(dataset), args.max_length)
        return rows

    def _send_telemetry(self):
        # TRL's trainers report to the Hub when they are made; this package uses no network unless asked
        pass

    # Reference

    @staticmethod
    def _make_reference(model, args, ref_model, has_adapter, compute_loss_func) -> PreTrainedModel | None:
        """The reference model, or `None` if it is the policy with its adapter off. Made before the policy is changed."""
        if ref_model is not None and args.ref_model is not None:
            raise ValueError("`ref_model` was given to the trainer and in its arguments. Give it once.")
        ref_model = args.ref_model if ref_model is None else ref_model
        if args.kl_coef == 0:
            if ref_model is not None and args.ref_model is None:
                warnings.warn("`kl_coef` is 0: the reference model is not used.")
            return None
        if compute_loss_func is not None:
            raise ValueError(
                "`compute_loss_func` is not supported with a KL term: it needs the full logits. Subclass `KLSelfTrainer` "
                "and override `compute_loss` instead."
            )
        if has_adapter:
            if ref_model is not None:
                raise ValueError(
                    "`ref_model` was given, and the policy has an adapter: with the adapter off, the policy is the "
                    "reference. Leave `ref_model` out, or train without an adapter."
                )
            if args.ref_model_init_kwargs is not None:
                raise ValueError(
                    "`ref_model_init_kwargs` was given, and the policy has an adapter: no reference is loaded. Remove it."
                )
            return None
        if ref_model is None:
            return copy_of(model, args)
        if isinstance(ref_model, str):
            return load_reference(ref_model, args, is_policy=ref_model == model)
        if ref_model is model:
            raise ValueError(
                "`model` and `ref_model` are the same object, so the reference would move. Leave `ref_model` out: a frozen "
                "copy is made."
            )
        if args.ref_model_init_kwargs is not None:
            raise ValueError(
                "`ref_model_init_kwargs` was given with a `ref_model` that is already instantiated. Pass the model's name "
                "as a string, or remove `ref_model_init_kwargs`."
            )
        return ref_model

    def _check_support(self) -> None:
        adapters = self.model.peft_config.values() if is_peft_model(self.model) else ()
        if any(getattr(adapter, "bias", None) not in (None, "none") for adapter in adapters):
            raise ValueError(
                "The adapter trains biases of the base model, which stay as they are trained when the adapter is off: the "
                "reference would move. Use `bias='none'`."
            )
        if adapters and self.args.torch_compile:
            raise ValueError(
                "`torch_compile` of a policy with an adapter is not supported with a KL term, which turns the adapter off and "
                "on. Leave it out, or use `kl_coef=0`."
            )
        if self._is_vision_dataset:
            raise ValueError("The dataset has images, which the KL term does not support. Use `kl_coef=0`.")
        config = self.accelerator.parallelism_config
        if config is not None and (config.cp_enabled or config.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism split a sequence over ranks, and its KL is not summed over them. Use "
                "data parallelism, ZeRO or FSDP, or `kl_coef=0`."
            )
        devices = set((getattr(self.model, "hf_device_map", None) or {}).values())
        if self.get_tp_size() > 1 or len(devices) > 1:
            raise ValueError(
                "The policy is split over devices (tensor parallelism, or `device_map`), which the KL term does not support. "
                "Start with `accelerate launch`: one process per device, with ZeRO or FSDP if the policy is too large for one."
            )

    def _use_reference(self, model: PreTrainedModel | None, given: str | PreTrainedModel | None) -> None:
        if model is not None:
            check_vocabulary(model, causal_lm_of(self.model))
        if given is not None:
            check_tokenizer(given, self._tokenizer, self.args)
        if self.args.precompute_ref_hidden:
            self.reference, store = precompute_hidden(self, model)
            self.data_collator = RefHiddenCollator(self.data_collator, store)
        elif model is None:
            self.reference = AdapterOff(self.accelerator)
        else:
            self.reference = FrozenReference(model, self.accelerator)

    # Loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        """The batches of one optimizer step and the number of their trained tokens; their sequences are counted on the side."""
        batch_samples, num_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.reference is not None and batch_samples:
            counts = [_num_sequences(batch) for batch in batch_samples]
            num_sequences = torch.tensor(sum(counts), device=device)
            if self.args.average_tokens_across_devices:
                num_sequences = self.accelerator.reduce(num_sequences, reduction="sum")
            self._num_sequences_in_batch = num_sequences
        return batch_samples, num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """
        The loss of [`~trl.SFTTrainer`] plus `kl_coef` times the scaled KL of the sequences of this batch, divided by the number
        of sequences of the global batch.
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
            # Ranks average their gradients, as in SFTTrainer
            if self.args.average_tokens_across_devices:
                kl_loss = kl_loss * (self.accelerator.num_processes // self.get_tp_size())
        loss = loss + self.args.kl_coef * kl_loss
        self._count(policy.outputs, sequences, kl.detach())
        return (loss, outputs) if return_outputs else loss

    def train(self, *args, **kwargs):
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    # Metrics

    def _reset_metrics(self, mode: str) -> None:
        device = self.args.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # negative log-likelihood, tokens, KL, ln(1 + KL) and sequences of this rank since the last log; and the largest KL
        self._kl_sums[mode] = torch.zeros(5, dtype=dtype, device=device)
        self._kl_max[mode] = torch.zeros((), device=device)

    def evaluation_loop(self, *args, **kwargs):
        """The evaluation of [`~trl.SFTTrainer`], whose means begin anew: a prediction before it logs none."""
        self._reset_metrics("eval")
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def _count(self, outputs: KLOutput, sequences: torch.Tensor, kl: torch.Tensor) -> None:
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
            ]
        )
        if len(sums):
            self._kl_max[mode] = torch.maximum(self._kl_max[mode], sums.max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.reference is not None:
            mode = "train" if self.model.training else "eval"
            prefix = ""
            if mode == "eval":  # of one of several datasets: eval_NAME_
                prefix = next((name.removesuffix("runtime") for name in logs if name.endswith("_runtime")), "eval_")
            logs |= {f"{prefix}{name}": value for name, value in self._kl_metrics(mode).items()}
        super().log(logs, start_time)

    def _kl_metrics(self, mode: str) -> dict[str, float]:
        """Means over the tokens or sequences of all ranks since the last log. Empty if there was none."""
        sums = self.accelerator.reduce(self._kl_sums[mode], reduction="sum").tolist()
        kl_max = self.accelerator.gather(self._kl_max[mode]).max().item()
        self._reset_metrics(mode)
        lm_loss, num_tokens, kl, log_kl, num_sequences = sums
        if not num_sequences:
            return {}
        return {
            "lm_loss": lm_loss / num_tokens,
            "kl": kl / num_sequences,
            "kl_per_token": kl / num_tokens,
            "log_kl": log_kl / num_sequences,
            "kl_max": kl_max,
        }

    # Saving

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """As [`HRMRewardTrainer.create_model_card`]."""
        if not self.is_world_process_zero():
            return
        facts = CardFacts.of(self, model_name or self._card_name(), dataset_name, self._card_settings)
        super().create_model_card(model_name=facts.model_name, dataset_name=facts.dataset_on_hub, tags=tags)
        write_card(
            Path(self.args.output_dir) / "README.md",
            facts,
            policy_quick_start(facts, chat=self.processing_class.chat_template is not None),
            task="text-generation",
            license=license,
            sections="",
        )


class _PolicyBesideReference:
    """The policy as SFTTrainer calls it: its fused LM head also yields the KL to the reference. Keeps the last output."""

    def __init__(self, trainer: KLSelfTrainer, model: torch.nn.Module, ref_hidden: torch.Tensor, ref_head: LMHead):
        self.trainer = trainer
        self.model = model
        self.ref_hidden = ref_hidden
        self.ref_head = ref_head

    def __call__(self, **inputs) -> Any:
        if not inputs.get("fused_lm_head"):
            return self.model(**inputs)
        # In the forward pass of the wrapper, so that DDP, ZeRO-3 and FSDP have the LM head ready and see its gradient
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
        length = inputs["labels"].shape[1]  # prompt tuning puts tokens before them
        hidden = states[0][:, -length:][:, :-1][trained_tokens(inputs["labels"])]
        direction = self.trainer.args.kl_direction
        with self.trainer.accelerator.autocast():  # as the fused LM head, inside the forward that accelerate wraps
            kl = token_kl(hidden, LMHead.of(causal_lm), self.ref_hidden, self.ref_head, direction)
        return KLOutput(**outputs, token_kl=kl)


def _num_sequences(batch: dict[str, torch.Tensor]) -> int:
    """Sequences of a batch that have a trained token."""
    sequences = trained_sequences(batch["labels"], batch.get("position_ids"))
    return int(sequences.max()) + 1 if len(sequences) else 0
