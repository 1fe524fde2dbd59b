import gc
import hashlib
import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, gather_object, is_peft_model
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.utils import find_adapter_config_file, is_peft_available

from .._compat import ForwardRedirection, get_config_model_id
from ..identity import digest_of_checkpoint_weights
from ..implicit import StepTokens
from ..kl import causal_lm_of
from ..loading import load_policy
from ..pages.papers import IMPLICIT_PRM_PAPER
from ..training.checkpoints import digest_of_dataset
from ..tree_attention import check_attention, check_model, use_tree_attention
from .forest_dataset import PROMPT_LENGTHS, REF_LOG_PROBS, STEP_COLUMNS, TOKEN_COLUMNS
from .hrm_reward_trainer import HRMRewardTrainer
from .implicit_prm_config import ImplicitPRMConfig
from .reference import AdapterOff, FrozenReference, check_reference, refuse_to_replace


if is_peft_available():
    from peft import PeftModel


logger = get_logger(__name__)
REF_FOLDER = "_ref_log_probs"  # names that begin with "_" are not pushed to the Hub


class ImplicitPRMTrainer(HRMRewardTrainer):
    """
    Trainer for implicit process reward models ([ImplicitPRM](https://huggingface.co/papers/2412.01981)): step rewards from
    solutions that are only labelled right or wrong.

    The reward of a solution is z = β · Σ (ln π − ln π_ref) over its tokens, for a policy π that is trained and a fixed reference
    model π_ref. The loss is the cross-entropy between the label of the solution and σ(z). After training, the part of the sum over
    the tokens of a step is the reward of the step.

    This class inherits from [`HRMRewardTrainer`]: solutions of a problem share their prefix, and the loss does not depend on how the
    global batch is split. Solutions with a label after some of their steps are supported. The reward of
    such a step is the sum up to its end.

    Example:

    ```python
    from datasets import load_dataset
    from trl_hrm import ImplicitPRMConfig, ImplicitPRMTrainer

    trainer = ImplicitPRMTrainer(
        model="Qwen/Qwen2.5-Math-1.5B-Instruct",
        args=ImplicitPRMConfig(output_dir="outputs/implicit-prm"),
        train_dataset=load_dataset("data/outcomes", split="train"),
    )
    trainer.train()
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model to be trained, or a checkpoint of this trainer to train further. If the model is already
            instantiated, its configuration or `args.ref_model` must name a checkpoint, which becomes the reference.
        args ([`ImplicitPRMConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`]):
            Dataset to use for training, in TRL's
            [stepwise supervision](https://huggingface.co/docs/trl/dataset_formats) format with a label on the last step of each
            solution (built with the view `orm`, or with `args.train_on_last_step_only`), or in its unpaired preference format:
            columns `prompt`, `completion` and `label`. A completion is split into steps at the `step_separator`.
        data_collator, eval_dataset, processing_class, compute_metrics, callbacks, optimizers, peft_config:
            See [`HRMRewardTrainer`].

    Raises:
        `FileExistsError`: If `args.output_dir` is the folder of the reference model.
        `FileNotFoundError`: If the reference model does not exist.
        `ValueError`: If the dataset, the model, the reference model, the tokenizer or the attention implementation is not
        supported.
    """

    _tag_names = ["trl", "trl-hrm", "implicit-prm", "step-reward-model"]
    _name = "Implicit PRM"
    _card_settings = ("beta", "score_span", "precompute_ref_log_probs", *HRMRewardTrainer._card_settings)
    _paper = IMPLICIT_PRM_PAPER

    def __init__(
        self, model: "str | PreTrainedModel | PeftModel", args: ImplicitPRMConfig | None = None, *more, **kwargs
    ):
        if isinstance(model, os.PathLike):
            model = os.fspath(model)
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = ImplicitPRMConfig(f"{model_name.split('/')[-1]}-ImplicitPRM")
        if not isinstance(args, ImplicitPRMConfig):
            raise TypeError(f"`args` is a `{type(args).__name__}`. It must be an `ImplicitPRMConfig`.")
        super().__init__(model, args, *more, **kwargs)
        self._signature_columns = [*TOKEN_COLUMNS, *STEP_COLUMNS, PROMPT_LENGTHS, REF_LOG_PROBS]
        self._forward_redirection = ForwardRedirection()
        reference = None
        if is_peft_model(self.model):
            self._check_adapter()
        else:
            reference = self._load_reference()
        self._set_reference_weights()
        self.reference = (
            AdapterOff(self.accelerator) if reference is None else FrozenReference(reference, self.accelerator)
        )
        if args.precompute_ref_log_probs:
            self._precompute()

    # Model and reference

    def _load_model(self, model, args, has_adapter):
        loaded, revision, step_format, has_new_head = super()._load_model(model, args, has_adapter)
        name, ref_revision = step_format.reference_model, step_format.reference_revision
        base = causal_lm_of(loaded).config
        if has_adapter or is_peft_model(loaded):
            if args.ref_model is not None:
                raise ValueError(
                    "You passed `ref_model`, but the model has an adapter: the reference is the model with the adapter disabled. Remove "
                    "`ref_model`, or train without an adapter."
                )
            if name is not None and not is_peft_model(loaded):
                raise ValueError(
                    f"The model was trained with the reference model {name}. With a new adapter, the reference would be the model itself, and "
                    f"the rewards that it has learned would be lost. Train it without an adapter, or train an adapter of {name}."
                )
            name, ref_revision = get_config_model_id(base), revision
            if is_peft_model(loaded):
                adapter = loaded.peft_config[loaded.active_adapter]
                name, ref_revision = adapter.base_model_name_or_path or name, adapter.revision
        elif args.ref_model is not None:
            name, ref_revision = args.ref_model, args.ref_model_revision
            step_format = replace(step_format, reference_weights=None)
        elif name is None:
            name, ref_revision = get_config_model_id(base), revision
        if not name:
            raise ValueError(
                "The model has no name to load the reference model from, which scoring needs too. Pass the path or Hub id of the model, "
                "or save it and set `ref_model`."
            )
        if find_adapter_config_file(name, revision=ref_revision) is not None:
            raise ValueError(
                f"The reference model {name} is an adapter. Merge it into its base model, and set `ref_model` to the merged model."
            )
        refuse_to_replace(name, args.output_dir)  # scoring needs it too
        step_format = replace(step_format, reference_model=name, reference_revision=ref_revision)
        return loaded, revision, step_format, has_new_head

    @classmethod
    def check_head(cls, name, step_format):
        if step_format.head != "implicit":
            raise ValueError(
                f"{name} is a reward model with head {step_format.head!r}. Implicit rewards are trained from a causal language model. "
                "Pass one, such as the model that it was trained from."
            )

    def _load_reference(self) -> PreTrainedModel:
        args, name, revision = self.args, self.step_format.reference_model, self.step_format.reference_revision
        kwargs = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {}), "revision": revision}
        if args.distributed_state.distributed_type != DistributedType.NO:
            kwargs["device_map"] = None  # distributed training requires it ("auto" fails)
        reference = load_policy(name, **kwargs)
        check_reference(reference, name, self.model, self.processing_class, revision, args.trust_remote_code)
        if commit := getattr(
            reference.config, "_commit_hash", None
        ):  # of a Hub repository, whose branch may get other weights
            self.step_format = replace(self.step_format, reference_revision=commit)
        check_model(reference)
        if args.shared_prefix:
            check_attention(reference.config._attn_implementation)
            use_tree_attention(reference, args.device)
        return reference

    def _set_reference_weights(self) -> None:
        """Add the digest of the weights of the reference model to the step format. A checkpoint that is trained further has one."""
        name, known = self.step_format.reference_model, self.step_format.reference_weights
        found = self._on_main(partial(digest_of_checkpoint_weights, name, self.step_format.reference_revision))
        if known not in (None, found):
            raise ValueError(
                f"The reference model {name} has weights with the digest {found}, but the model was trained with {known}. Restore the "
                "reference model, or set `ref_model` to train with a new one."
            )
        self.step_format = replace(self.step_format, reference_weights=found)

    def _check_adapter(self) -> None:
        for adapter in self.model.peft_config.values():
            if adapter.is_prompt_learning:
                raise ValueError(
                    f"Adapters of type {adapter.peft_type.value} add tokens to the prompt, which is not supported. Use LoRA."
                )
            if getattr(adapter, "bias", None) not in (None, "none"):
                raise ValueError(
                    "The adapter trains biases of the base model. Disabling the adapter does not reset them, so the reference would "
                    "change during training. Use `bias='none'`."
                )
        if self.args.torch_compile:
            raise ValueError(
                "`torch_compile` is not supported for a model with an adapter, because the adapter is disabled and enabled in every "
                "step. Remove `torch_compile`."
            )

    def _training_settings(self) -> dict[str, Any]:
        settings = super()._training_settings()
        for name in ("reference_model", "reference_revision", "ref_model_revision"):
            settings.pop(name)  # names. `reference_weights` is the content
        return settings

    def push_to_hub(self, *args, **kwargs):
        name = self.step_format.reference_model
        if Path(name).is_dir():
            logger.warning(
                f"The reference model is the local folder {name}. Whoever loads the pushed model elsewhere must have the same weights "
                "and pass them as `reference_model`. To avoid this, train from a model on the Hub."
            )
        return super().push_to_hub(*args, **kwargs)

    # Rewards

    def _step_logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the reward of the solution up to each labelled step, shape `(B, S, 1)`."""
        steps = self._step_tokens(inputs)
        log_probs_of = partial(self._log_probs, inputs, steps)
        if REF_LOG_PROBS in inputs:
            ref_sums = inputs[REF_LOG_PROBS]
        elif self.reference is None:
            raise ValueError(
                "The log-probabilities of the reference were computed only for the datasets passed to the trainer when it was created. "
                "Create a trainer with this dataset, or set `precompute_ref_log_probs=False`."
            )
        else:  # before the forward pass of the policy, so that nothing comes between it and its backward pass
            ref_sums = steps.sums(self.reference.run(model, log_probs_of))
        policy = self.accelerator.unwrap_model(model)
        # In the forward pass of the wrappers, so that DDP, ZeRO-3 and FSDP gather the LM head and track its gradient
        with self.accelerator.autocast():
            log_probs = self._forward_redirection(model, policy, log_probs_of, policy)
        return self.step_format.beta * (steps.sums(log_probs) - ref_sums).float()[..., None]

    @staticmethod
    def _step_tokens(inputs: dict[str, torch.Tensor]) -> StepTokens:
        return StepTokens.of(
            inputs["position_ids"], inputs["subtree_end"], inputs["step_positions"], inputs[PROMPT_LENGTHS]
        )

    def _log_probs(
        self, inputs: dict[str, torch.Tensor], steps: StepTokens, model: "PreTrainedModel | PeftModel"
    ) -> torch.Tensor:
        return steps.log_probs(model, self._model_inputs(model, inputs))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(inputs)
        exact = inputs.pop(REF_LOG_PROBS, None)
        prepared = super()._prepare_inputs(inputs)
        if exact is not None:  # with DeepSpeed, Trainer casts float inputs to the dtype of the model
            dtype = torch.float32 if self.args.device.type == "mps" else exact.dtype
            prepared[REF_LOG_PROBS] = exact.to(self.args.device, dtype)
        return prepared

    # Precomputed reference

    def _precompute(self) -> None:
        """Add the log-probabilities of the reference to the datasets, and free the reference model."""
        sharded = self.accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        if isinstance(self.reference, AdapterOff) and sharded:
            raise ValueError(
                "`precompute_ref_log_probs` with an adapter is not supported with DeepSpeed or FSDP, because they wrap the model "
                "later. Set `precompute_ref_log_probs=False`. The reference is then the model with the adapter disabled, which needs "
                "no second model in memory."
            )
        self.train_dataset = self._with_ref_log_probs(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self._with_ref_log_probs(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self._with_ref_log_probs(self.eval_dataset)
        self.reference = None
        gc.collect()  # TRL's forward redirection leaves a reference cycle that keeps the model in memory

    def _with_ref_log_probs(self, rows: Dataset) -> Dataset:
        """Return rows with the column `ref_log_probs`. It is stored in a file named by the content that it was computed from."""
        content = {
            "reference": self.step_format.reference_weights,
            "dtype": str(causal_lm_of(self.model).dtype),
            "mixed_precision": self.accelerator.mixed_precision,
            "rows": digest_of_dataset(rows),
        }
        digest = hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
        file = Path(self.args.output_dir) / REF_FOLDER / f"{digest}.safetensors"
        is_stored = self._on_main(file.is_file)
        values = None if is_stored else self._ref_log_probs_of(rows)
        if values is not None and self.accelerator.is_main_process:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial_file = file.with_suffix(".partial")
            save_file({REF_LOG_PROBS: torch.cat(values)}, partial_file)
            os.replace(partial_file, file)
        self.accelerator.wait_for_everyone()
        counts = [len(labels) for labels in rows["labels"]]
        try:
            stored = load_file(file)[REF_LOG_PROBS]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file}: the file is damaged ({error}). Delete it to compute it again.") from error
        prepared = rows.add_column(REF_LOG_PROBS, [part.numpy() for part in stored.split(counts)])
        self._prepared.append((prepared, self.sources_of(rows)))
        return prepared

    def _ref_log_probs_of(self, rows: Dataset) -> list[torch.Tensor]:
        """Return the log-probabilities of all rows, shape `(S,)` each. Batches are distributed over the ranks."""
        accelerator, size = self.accelerator, self.args.per_device_eval_batch_size
        batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
        found: list[tuple[int, torch.Tensor]] = []
        shown = accelerator.is_main_process and not self.args.disable_tqdm
        for first in tqdm(range(0, len(batches), accelerator.num_processes), "Reference", disable=not shown):
            number = first + accelerator.process_index
            # A rank without a batch repeats the first one of the round: with ZeRO-3 and FSDP, a forward pass needs all ranks
            batch = batches[number if number < len(batches) else first]
            examples = [rows[i] for i in batch]
            inputs = self._prepare_inputs(self.data_collator(examples))
            steps = self._step_tokens(inputs)
            sums = steps.sums(self.reference.run(self.model, partial(self._log_probs, inputs, steps))).cpu().double()
            if number < len(batches):
                found += [(i, row[: len(one["labels"])]) for i, row, one in zip(batch, sums, examples, strict=True)]
        return [values for _, values in sorted(gather_object(found), key=lambda pair: pair[0])]
