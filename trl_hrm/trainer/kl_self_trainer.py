import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel
from trl import SFTTrainer

from .._compat import ForwardRedirection, FusedCausalLMOutput, get_config_model_id
from ..kl import LMHead, narrow_lm_head, scaled_kl, sequence_kl, token_kl, trained_sequences, trained_tokens
from .kl_self_config import KLSelfConfig
from .ref_hidden import REF_STATES, RefHiddenCollator, precompute_hidden
from .reference import AdapterOff, FrozenReference, causal_lm_of, check_reference, copy_of, load_reference


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


class KLSelfTrainer(SFTTrainer):
    """
    Trainer for self-training: supervised fine-tuning on a policy's own best trajectories, held near a reference by a
    log-scaled KL divergence ([HRM](https://huggingface.co/papers/2503.13551), section 3.3).

    `loss = lm_loss + kl_coef * mean_i ln(1 + KL_i)` over the sequences i of the global batch, where KL_i is the sum over the
    trained tokens of sequence i. It does not depend on how the batch is split over accumulation steps, ranks and packed rows.

    It is [`~trl.SFTTrainer`] with one method extended, `compute_loss`; see there for the arguments that are not below. All its
    options hold, but for `label_smoothing_factor`, `compute_loss_func`, images, and context and sequence parallelism.

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
        `ValueError`: If the reference does not fit the policy, or an option does not go with a KL term.
    """

    _tag_names = ["trl", "trl-hrm", "sft", "kl-self"]
    _name = "KL self-training"
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
        # negative log-likelihood, tokens, KL, ln(1 + KL) and sequences of this rank since the last log; and the largest KL
        self._kl_sums = {mode: torch.zeros(5, dtype=torch.float64, device=args.device) for mode in ("train", "eval")}
        self._kl_max = {mode: torch.zeros((), device=args.device) for mode in ("train", "eval")}
        if args.kl_coef:
            self._check_parallelism()
            self._use_reference(reference)

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
            return None
        if ref_model is None:
            return copy_of(model, args)
        if isinstance(ref_model, str):
            return load_reference(ref_model, args)
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

    def _check_parallelism(self) -> None:
        if self._is_vision_dataset:
            raise ValueError("The dataset has images, which the KL term does not support. Use `kl_coef=0`.")
        config = self.accelerator.parallelism_config
        if config is not None and (config.cp_enabled or config.sp_enabled):
            raise ValueError(
                "Context and sequence parallelism split a sequence over ranks, and its KL is not summed over them. Use "
                "data parallelism, ZeRO or FSDP, or `kl_coef=0`."
            )

    def _use_reference(self, model: PreTrainedModel | None) -> None:
        if model is not None:
            check_reference(model, causal_lm_of(self.model), self._tokenizer)
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

    # Metrics

    @torch.no_grad()
    def _count(self, outputs: KLOutput, sequences: torch.Tensor, kl: torch.Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        sums = sequence_kl(outputs.token_kl, sequences)
        self._kl_sums[mode] += torch.stack(
            [
                -outputs.log_probs.sum().double(),
                outputs.label_mask.sum().double(),
                sums.double().sum(),
                kl.log1p().double().sum(),
                kl.new_tensor(len(kl)).double(),
            ]
        )
        if len(sums):
            self._kl_max[mode] = torch.maximum(self._kl_max[mode], sums.max())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.reference is not None:
            mode = "train" if self.model.training else "eval"
            prefix = "eval_" if mode == "eval" else ""
            logs |= {f"{prefix}{name}": value for name, value in self._kl_metrics(mode).items()}
        super().log(logs, start_time)

    def _kl_metrics(self, mode: str) -> dict[str, float]:
        """Means over the tokens or sequences of all ranks since the last log. Empty if there was none."""
        sums = self.accelerator.reduce(self._kl_sums[mode], reduction="sum").tolist()
        kl_max = self.accelerator.gather(self._kl_max[mode]).max().item()
        self._kl_sums[mode].zero_()
        self._kl_max[mode] = torch.zeros_like(self._kl_max[mode])
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
        hidden = states[0][:, :-1][trained_tokens(inputs["labels"])]
        direction = self.trainer.args.kl_direction
        with self.trainer.accelerator.autocast():  # as the fused LM head, inside the forward that accelerate wraps
            kl = token_kl(hidden, LMHead.of(causal_lm), self.ref_hidden, self.ref_head, direction)
        return KLOutput(**outputs, token_kl=kl)


def _num_sequences(batch: dict[str, torch.Tensor]) -> int:
    """Sequences of a batch that have a trained token."""
    sequences = trained_sequences(batch["labels"], batch.get("position_ids"))
    return int(sequences.max()) + 1 if len(sequences) else 0
