"""Reference models for a KL term or implicit rewards: a frozen copy, the policy with its adapter disabled, or hidden states on disk."""

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .._compat import (
    DataCollatorForLanguageModeling,
    ForwardRedirection,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    prepare_deepspeed,
    prepare_fsdp,
)
from ..io import read_json, shown, write_json
from ..kl import LMHead, causal_lm_of, trained_tokens
from ..loading import load_policy, load_tokenizer
from ..training.checkpoints import digest_of_weights
from .kl_self_config import KLSelfConfig


if TYPE_CHECKING:
    from peft import PeftModel
    from trl import SFTTrainer

Result = TypeVar("Result")
REF_STATES = "ref_hidden_states"
MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20


def make_reference(
    model: "str | PreTrainedModel | PeftModel",
    args: KLSelfConfig,
    ref_model: str | PreTrainedModel | None,
    has_adapter: bool,
    compute_loss_func: Callable | None,
) -> PreTrainedModel | None:
    """
    Return the reference model of a [`KLSelfTrainer`]. Called before the trainer changes the policy.

    Args:
        model, args, ref_model, compute_loss_func:
            Arguments of the trainer.
        has_adapter (`bool`):
            Whether the policy has an adapter, or the trainer adds one.

    Returns:
        [`~transformers.PreTrainedModel`]: The reference model. `None` without a KL term, and for a policy with an adapter,
        where the reference is the policy with the adapter disabled.

    Raises:
        `FileExistsError`: If `args.output_dir` is the folder of `ref_model`.
        `ValueError`: If arguments contradict each other, or if the reference is a copy of a model that ZeRO-3 has already
        sharded and that has no name to load it from.
    """
    if ref_model is not None and args.ref_model is not None:
        raise ValueError("You passed `ref_model` both to the trainer and in `args`. Pass it only once.")
    if args.kl_coef == 0:
        if ref_model is not None:
            warnings.warn("`kl_coef` is 0, so the reference model is not used.")
        return None
    ref_model = args.ref_model if ref_model is None else ref_model
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` is not supported with a KL term, because it needs the full logits. Subclass "
            "`KLSelfTrainer` and override `compute_loss` instead."
        )
    if has_adapter:
        if ref_model is not None:
            raise ValueError(
                "You passed `ref_model`, but the policy has an adapter: the reference is the policy with the adapter "
                "disabled. Remove `ref_model`, or train without an adapter."
            )
        if args.ref_model_init_kwargs is not None:
            raise ValueError(
                "You passed `ref_model_init_kwargs`, but the policy has an adapter, so no reference is loaded. Remove "
                "`ref_model_init_kwargs`."
            )
        return None
    if isinstance(ref_model, str):
        refuse_to_replace(ref_model, args.output_dir)
        return load_reference(ref_model, args, is_policy=ref_model == model)
    if ref_model is not None:
        if ref_model is model:
            raise ValueError(
                "`model` and `ref_model` are the same object, so the reference would be trained too. Remove `ref_model` to use "
                "a frozen copy of `model`."
            )
        if args.ref_model_init_kwargs is not None:
            raise ValueError(
                "You passed `ref_model_init_kwargs` with a `ref_model` that is already instantiated. Pass the model's name "
                "as a string, or remove `ref_model_init_kwargs`."
            )
        return ref_model
    if isinstance(model, str):
        return load_reference(model, args, is_policy=True)
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        name = get_config_model_id(model.config)
        if not name:
            raise ValueError(
                "The model is already sharded by ZeRO-3 and has no name to load a reference from. Pass the model's name or "
                "path as a string, or pass a `ref_model`."
            )
        return load_reference(name, args, is_policy=True)
    if args.ref_model_init_kwargs is not None:
        raise ValueError(
            "You passed `ref_model_init_kwargs`, but the reference is a copy of the model that you passed. Pass the name of "
            "a `ref_model`, or remove `ref_model_init_kwargs`."
        )
    return copy.deepcopy(model)


def load_reference(name: str, args: KLSelfConfig, is_policy: bool = False) -> PreTrainedModel:
    """Load a causal language model with `args.ref_model_init_kwargs` or, if they are not set, `args.model_init_kwargs`."""
    kwargs = {"trust_remote_code": args.trust_remote_code}
    if args.ref_model_init_kwargs is not None:
        kwargs |= args.ref_model_init_kwargs
    else:
        kwargs |= args.model_init_kwargs or {}
    kwargs["revision"] = reference_revision(args, is_policy)
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None
    return load_policy(name, **kwargs)


def reference_revision(args: KLSelfConfig, is_policy: bool = False) -> str | None:
    """
    Return the revision of a reference: of `args.ref_model_init_kwargs` or, if they are not set and the reference is in the repository
    of the policy (`is_policy`), of `args.model_init_kwargs`.
    """
    if args.ref_model_init_kwargs is not None:
        return args.ref_model_init_kwargs.get("revision")
    return (args.model_init_kwargs or {}).get("revision") if is_policy else None


def refuse_to_replace(name: str, output_dir: str) -> None:
    """Raise `FileExistsError` if `output_dir` is the folder of the reference model `name`."""
    if Path(name).is_dir() and Path(output_dir).is_dir() and Path(name).samefile(output_dir):
        raise FileExistsError(
            f"{output_dir} is also the folder of the reference model, which would be replaced. Choose another `output_dir`."
        )


def check_reference(
    reference: PreTrainedModel | None,
    given: str | PreTrainedModel | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """
    Check that the reference has the same tokens as the policy.

    The sizes of the vocabularies are compared. The tokenizers are compared if the folder or repository of the reference has a
    tokenizer, and `ref_model` is a string or was loaded from a local folder.

    Args:
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. `None` for the policy with its adapter disabled.
        given (`str` or [`~transformers.PreTrainedModel`], *optional*):
            What the user passed as `ref_model`.
        policy ([`~transformers.PreTrainedModel`]):
            Policy without its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        revision (`str`, *optional*), trust_remote_code (`bool`, *optional*, defaults to `False`):
            Arguments for loading the tokenizer of the reference.

    Raises:
        `ValueError`: If the vocabularies differ in size, or the tokenizers have different tokens.
    """
    if reference is not None:
        found, expected = (model.config.get_text_config().vocab_size for model in (reference, policy))
        if found != expected:
            name = get_config_model_id(reference.config) or "the reference model"
            raise ValueError(
                f"{name}: the reference has a vocabulary of {found} tokens, but the policy has {expected}. They must have the "
                "same vocabulary. Use a reference of the same model family. If the policy was resized (`chat_template_path` adds "
                "tokens), resize the reference in the same way and pass it as `ref_model`."
            )
    if given is None:
        return
    name = given if isinstance(given, str) else get_config_model_id(given.config)
    if not isinstance(given, str) and not (name and Path(name).is_dir()):
        return  # do not download a tokenizer for a model that is already instantiated
    file = cached_file(name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return
    own = load_tokenizer(name, revision, trust_remote_code)
    known, expected = own.get_vocab(), tokenizer.get_vocab()
    for token in sorted(known.keys() | expected.keys()):
        if known.get(token) != expected.get(token):
            raise ValueError(
                f"{name}: the tokenizers of the reference and the policy differ: token {shown(token)} has the id {known.get(token)} "
                f"in the reference and {expected.get(token)} in the policy. Use a reference that was trained with the policy's "
                "tokenizer."
            )


# References: callables that take the policy, the inputs and the labels, and return hidden states and an LM head


def _last_hidden_states(model: "PreTrainedModel | PeftModel", inputs: dict[str, Any]) -> torch.Tensor:
    return causal_lm_of(model).base_model(**inputs, use_cache=False).last_hidden_state


@contextmanager
def without_adapter(model: "PeftModel") -> Iterator[None]:
    """Disable the adapter and switch to evaluation mode. On exit, restore `training` and `requires_grad` everywhere."""
    training = [module for module in model.modules() if module.training]
    trained = {weight: weight.requires_grad for weight in model.parameters()}
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True
        for weight, flag in trained.items():  # `disable_adapter` changes the flags of the adapter's weights
            weight.requires_grad_(flag)


class FrozenReference:
    """
    A separate reference model, in evaluation mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator that moves the model to its device. With ZeRO-3 or FSDP, the model is sharded like the policy.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(model, accelerator)
        else:
            # With `prepare_model`, the accelerator would already have a model. In an evaluation before training, Trainer
            # would then consider the policy prepared, and run it without mixed precision
            self.model = model if accelerator.verify_device_map(model) else model.to(accelerator.device)
        self._accelerator = accelerator

    @torch.no_grad()
    def run(self, policy: torch.nn.Module, function: Callable[[torch.nn.Module], Result]) -> Result:
        """
        Return the result of a function of the reference model. It runs in the forward pass of the model's wrappers, which gather
        sharded weights.

        Args:
            policy (`torch.nn.Module`):
                Policy, wrapped for training. Unused by this reference.
            function (`Callable`):
                Function of the model without wrappers.
        """
        model = self._accelerator.unwrap_model(self.model)
        with self._accelerator.autocast():  # same precision as the policy's forward pass
            return ForwardRedirection()(self.model, model, function, model)

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """
        Return the hidden states of the reference at the N trained tokens, and its LM head.

        Args:
            policy (`torch.nn.Module`):
                Policy, wrapped for training. Unused by this reference.
            inputs (`dict[str, Any]`):
                Inputs of the model, without labels.
            labels (`torch.Tensor`):
                Labels, shape `(B, L)`.

        Returns:
            `tuple[torch.Tensor, LMHead]`: Hidden states, shape `(N, H)`, in row-major order, and the LM head.
        """
        states = self.run(policy, partial(_last_hidden_states, inputs=inputs))
        return states[:, :-1][trained_tokens(labels)], LMHead.of(self._accelerator.unwrap_model(self.model))


class AdapterOff:
    """The policy with its adapter disabled as reference, without a second model in memory."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @torch.no_grad()
    def run(self, policy: torch.nn.Module, function: Callable[[torch.nn.Module], Result]) -> Result:
        """See [`FrozenReference.run`]."""
        model = self._accelerator.unwrap_model(policy)
        with without_adapter(model), self._accelerator.autocast():
            return ForwardRedirection()(policy, model, function, model)

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """See [`FrozenReference`]."""
        model = self._accelerator.unwrap_model(policy)
        states = self.run(policy, partial(_last_hidden_states, inputs=inputs))
        with without_adapter(model):  # the adapter may replace the head
            return states[:, :-1][trained_tokens(labels)], LMHead.of(causal_lm_of(model))


# Precomputed hidden states


class RefHiddenStore:
    """
    Folder of hidden states, with one tensor per sequence: bfloat16, shape `(N, H)`, for N trained tokens. The key of a
    sequence is a hash of its content.

    Args:
        folder (`str` or `Path`):
            Folder with safetensors files.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path in sorted(self.folder.glob("states-*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(
                    f"{path}: the file is damaged ({error}). Delete it and run again to recompute its states."
                ) from error

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __getitem__(self, key: str) -> torch.Tensor:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_tensor(key)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # each data loader worker opens the files itself

    def write(self, states: dict[str, torch.Tensor]) -> None:
        """Write the states of some sequences to one file, atomically."""
        name = f"states-{min(states)}.safetensors"
        partial = self.folder / f".{name}.partial"
        save_file(states, partial)
        os.replace(partial, self.folder / name)


def trained_sequences_of(example: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """
    Yield the sequences of a row that have a trained token. A packed row contains several sequences.

    Yields:
        `tuple[str, np.ndarray, np.ndarray]`: Key, token ids and labels. The key is a hash (32 hex digits) of the token ids and
        the mask of trained tokens.
    """
    row_ids = np.asarray(example["input_ids"])
    row_labels = np.asarray(example.get("labels", row_ids))  # same default as TRL's collator
    borders = np.cumsum(example.get("seq_lengths", [len(row_ids)]))[:-1]
    for ids, labels in zip(np.split(row_ids, borders), np.split(row_labels, borders), strict=True):
        is_trained = labels[1:] != -100  # the first token is never predicted
        if is_trained.any():
            digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16)
            digest.update(is_trained.tobytes())
            yield digest.hexdigest(), ids, labels


class RefHiddenCollator:
    """
    Data collator that adds the hidden states of the reference to the batches of another collator, as `ref_hidden_states`:
    shape `(N, H)`, for the N trained tokens of the batch in row-major order.

    Args:
        collator ([`~transformers.DataCollator`]):
            Collator that forms the batch.
        store ([`RefHiddenStore`]):
            Hidden states of all sequences.
    """

    def __init__(self, collator: DataCollator, store: RefHiddenStore):
        self.collator = collator
        self.store = store
        self._no_states = store[next(iter(store))][:0]  # shape (0, H), for rows without a trained token

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        states = [self._no_states]
        for example in examples:
            for key, ids, _ in trained_sequences_of(example):
                if key not in self.store:
                    raise ValueError(
                        f"{self.store.folder}: no hidden states of the reference for a sequence of {len(ids)} tokens. They were "
                        "computed only for the datasets passed to the trainer when it was created. Create a trainer with this "
                        "dataset and another `ref_hidden_dir`, or set `precompute_ref_hidden=False`."
                    )
                states.append(self.store[key])
        return self.collator(examples) | {REF_STATES: torch.cat(states)}


class PrecomputedReference:
    """Reference whose hidden states are read from the batch. Only its LM head is kept in memory."""

    def __init__(self, head: LMHead):
        self.head = head

    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """See [`FrozenReference`]."""
        # TRL's kernel computes in the dtype of the states, and would otherwise round the head to it
        return inputs[REF_STATES].to(self.head.weight.dtype), self.head


def precompute_hidden(
    trainer: "SFTTrainer", model: PreTrainedModel | None
) -> tuple[PrecomputedReference, RefHiddenStore]:
    """
    Compute the hidden states of the reference for all sequences of the trainer's datasets that are not on disk yet.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer with prepared datasets.
        model ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. `None` for the policy with its adapter disabled.

    Returns:
        `tuple[PrecomputedReference, RefHiddenStore]`: The LM head of the reference, and the hidden states.

    Raises:
        `ValueError`: If the folder has states of another reference or of other data, or no sequence has a token to train on.
        `TypeError`: If a dataset is a streaming dataset.
    """
    args, accelerator = trainer.args, trainer.accelerator
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if model is None and sharded:
        raise ValueError(
            "`precompute_ref_hidden` with an adapter is not supported with DeepSpeed or FSDP, because they wrap the policy "
            "later. Set `precompute_ref_hidden=False`. The reference is then the policy with the adapter disabled, which "
            "needs no second model in memory."
        )
    folder = Path(args.ref_hidden_dir or Path(args.output_dir) / "_ref_hidden")
    evaluation = trainer.eval_dataset or {}
    sequences = {}
    for dataset in [trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`precompute_ref_hidden` requires a `datasets.Dataset`, but the dataset is a `{type(dataset).__name__}`. "
                "Load it without `streaming=True`, or set `precompute_ref_hidden=False`."
            )
        for example in dataset:
            sequences |= {key: (ids, labels) for key, ids, labels in trained_sequences_of(example)}
    if not sequences:
        raise ValueError(
            "No sequence of the datasets has a token to train on. If the prompts alone fill `max_length`, raise it. Otherwise, "
            "check the labels of the data."
        )
    manifest = {
        "version": 1,
        "reference": digest_of_weights(trainer.model if model is None else model),
        "data": hashlib.blake2b("".join(sorted(sequences)).encode(), digest_size=16).hexdigest(),
        "num_sequences": len(sequences),
    }
    _check_manifest(folder, manifest)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, manifest)
    accelerator.wait_for_everyone()

    store = RefHiddenStore(folder)
    missing = {key: sequence for key, sequence in sequences.items() if key not in store}
    accelerator.wait_for_everyone()  # no rank writes before all ranks have read the folder
    reference = AdapterOff(accelerator) if model is None else FrozenReference(model, accelerator)
    _compute(trainer, reference, missing, store)
    accelerator.wait_for_everyone()
    if model is None:
        with without_adapter(trainer.model):  # the adapter may replace the head
            head = _head_of(causal_lm_of(trainer.model))
    else:
        head = _head_of(accelerator.unwrap_model(reference.model))
    return PrecomputedReference(head), RefHiddenStore(folder)


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: the folder is not empty and has no {MANIFEST}, so the reference of its states is unknown. Delete "
                "the folder, or set another `ref_hidden_dir`."
            )
        return
    found = read_json(path, "Delete the folder to recompute the states.")
    for name, what in (("version", "format"), ("reference", "reference model"), ("data", "data or tokenizer")):
        if found.get(name) != manifest[name]:
            raise ValueError(
                f"{path}: the hidden states were computed with another {what}: found {shown(found.get(name))}, expected "
                f"{manifest[name]}. Delete the folder to recompute them, or set another `ref_hidden_dir`."
            )


def _compute(
    trainer: "SFTTrainer",
    reference: FrozenReference | AdapterOff,
    missing: dict[str, tuple[np.ndarray, np.ndarray]],
    store: RefHiddenStore,
) -> None:
    """Compute and write the hidden states of sequences. Batches are distributed over the ranks."""
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    collator = DataCollatorForLanguageModeling(pad_token_id=trainer._tokenizer.pad_token_id)
    keys = sorted(missing, key=lambda key: (len(missing[key][0]), key))  # similar lengths in a batch need less padding
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    rounds = range(0, len(batches), accelerator.num_processes)
    states, num_bytes = {}, 0
    shown = accelerator.is_main_process and not trainer.args.disable_tqdm
    for first in tqdm(rounds, desc="Hidden states of the reference", disable=not shown):
        number = first + accelerator.process_index
        # A rank without a batch repeats the first one of the round: with ZeRO-3 and FSDP, a forward pass needs all ranks
        batch = batches[number if number < len(batches) else first]
        rows = [{"input_ids": missing[key][0], "labels": missing[key][1]} for key in batch]
        inputs = {name: value.to(accelerator.device) for name, value in collator(rows).items()}
        labels = inputs.pop("labels")
        hidden = reference(trainer.model, inputs, labels)[0].to(torch.bfloat16).cpu()
        if number < len(batches):
            counts = trained_tokens(labels).sum(dim=1).tolist()
            states |= {key: part.clone() for key, part in zip(batch, hidden.split(counts), strict=True)}
            num_bytes += hidden.nbytes
        if num_bytes > SHARD_BYTES:
            store.write(states)
            states, num_bytes = {}, 0
    if states:
        store.write(states)


def _head_of(model: PreTrainedModel) -> LMHead:
    """Return a copy of the LM head, so that the model can be freed."""
    head = LMHead.of(model)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        # Parameters, because TRL's activation offloading does not move parameters
        weight, bias = (
            None if part is None else torch.nn.Parameter(part.detach().clone(), requires_grad=False)
            for part in (head.weight, head.bias)
        )
    if hasattr(head.weight, "ds_status"):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for part in (weight, bias):
            if part is not None:
                # With ZeRO-3, TRL's kernel checks whether the head is gathered. The copy always is
                part.ds_status = ZeroParamStatus.AVAILABLE
    return head._replace(weight=weight, bias=bias)
