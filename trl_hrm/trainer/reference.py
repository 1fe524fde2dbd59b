"""The reference model of a KL term: a frozen copy, the policy with its adapter off, or its hidden states on disk."""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoTokenizer, DataCollator, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .._compat import (
    DataCollatorForLanguageModeling,
    ForwardRedirection,
    create_model_from_path,
    get_config_model_id,
    maybe_gather_lm_head_ctx,
    prepare_deepspeed,
    prepare_fsdp,
)
from ..io import write_json
from ..kl import LMHead, trained_tokens
from .kl_self_config import KLSelfConfig


if TYPE_CHECKING:
    from peft import PeftModel
    from trl import SFTTrainer

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
    Return the reference model of a [`KLSelfTrainer`], before the trainer changes the policy.

    Args:
        model, args, ref_model, compute_loss_func:
            Arguments of the trainer.
        has_adapter (`bool`):
            Whether the policy has an adapter, or the trainer adds one.

    Returns:
        [`~transformers.PreTrainedModel`]: `None` without a KL term, and for a policy with an adapter, which is its own reference with
        the adapter off.

    Raises:
        `ValueError`: If arguments contradict each other, or if a copy is needed of a model that ZeRO-3 has sharded already and
        that has no name to load it by.
    """
    if ref_model is not None and args.ref_model is not None:
        raise ValueError("`ref_model` was given to the trainer and in its arguments. Give it once.")
    if args.kl_coef == 0:
        if ref_model is not None:
            warnings.warn("`kl_coef` is 0: the reference model is not used.")
        return None
    ref_model = args.ref_model if ref_model is None else ref_model
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
    if isinstance(ref_model, str):
        return load_reference(ref_model, args, is_policy=ref_model == model)
    if ref_model is not None:
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
    if isinstance(model, str):
        return load_reference(model, args, is_policy=True)
    if any(hasattr(weight, "ds_id") for weight in model.parameters()):
        name = get_config_model_id(model.config)
        if not name:
            raise ValueError(
                "The model is sharded by ZeRO-3 already and has no name to load a reference from. Pass the model's name or "
                "path as a string, or a `ref_model`."
            )
        return load_reference(name, args, is_policy=True)
    if args.ref_model_init_kwargs is not None:
        raise ValueError(
            "`ref_model_init_kwargs` was given, and the reference is a copy of the model that was passed. Pass a "
            "`ref_model` by name, or remove `ref_model_init_kwargs`."
        )
    return copy.deepcopy(model)


def load_reference(name: str, args: KLSelfConfig, is_policy: bool = False) -> PreTrainedModel:
    """The causal language model of that name or path, with `args.ref_model_init_kwargs`, else with those of the policy."""
    kwargs = {"trust_remote_code": args.trust_remote_code}
    if args.ref_model_init_kwargs is not None:
        kwargs |= args.ref_model_init_kwargs
    else:
        kwargs |= args.model_init_kwargs or {}
        if not is_policy:
            kwargs.pop("revision", None)  # which another model does not have
    # Distributed training requires device_map=None ("auto" fails)
    if args.distributed_state.distributed_type != DistributedType.NO:
        kwargs["device_map"] = None
    return create_model_from_path(name, **kwargs)


def check_reference(
    reference: PreTrainedModel | None,
    given: str | PreTrainedModel | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: KLSelfConfig,
) -> None:
    """
    Refuse a reference that has other tokens than the policy.

    The sizes of the vocabularies are compared. The tokenizers are compared if the reference has one next to its weights: in the folder
    or repository that `ref_model` names, or in the folder from which it was loaded.

    Args:
        reference ([`~transformers.PreTrainedModel`], *optional*):
            Reference model. `None` for the policy with its adapter off.
        given (`str` or [`~transformers.PreTrainedModel`], *optional*):
            What the user passed as `ref_model`.
        policy ([`~transformers.PreTrainedModel`]):
            Policy without its adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the policy.
        args ([`KLSelfConfig`]):
            Arguments of the trainer.

    Raises:
        `ValueError`: If the vocabularies differ in size, or if the tokenizers have other tokens.
    """
    if reference is not None:
        found, expected = (model.config.get_text_config().vocab_size for model in (reference, policy))
        if found != expected:
            name = get_config_model_id(reference.config) or "the reference model"
            raise ValueError(
                f"{name}: the reference has a vocabulary of {found} tokens, the policy one of {expected}. Their distributions "
                "have no divergence. Use a reference of the same family; if the policy was resized (`chat_template_path` adds "
                "tokens), resize the reference in the same way and pass it as `ref_model`."
            )
    if given is None:
        return
    name = given if isinstance(given, str) else get_config_model_id(given.config)
    if not isinstance(given, str) and not (name and Path(name).is_dir()):
        return  # no tokenizer, or one on the Hub, from which nothing was loaded
    revision = (args.ref_model_init_kwargs or {}).get("revision")
    file = cached_file(name, "tokenizer_config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return
    own = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    known, expected = own.get_vocab(), tokenizer.get_vocab()
    for token in sorted(known.keys() | expected.keys()):
        if known.get(token) != expected.get(token):
            raise ValueError(
                f"{name}: the reference has another tokenizer than the policy: token {token!r} is {known.get(token)} there "
                f"and {expected.get(token)} here. Use a reference that was trained with the policy's tokenizer."
            )


# References: called with the policy, the inputs and the labels, they give hidden states and a head


def causal_lm_of(model: "PreTrainedModel | PeftModel") -> PreTrainedModel:
    """The causal language model in an adapter, or the model itself."""
    return model.get_base_model() if is_peft_model(model) else model


def _last_hidden_states(model: "PreTrainedModel | PeftModel", inputs: dict[str, Any]) -> torch.Tensor:
    return causal_lm_of(model).base_model(**inputs, use_cache=False).last_hidden_state


@contextmanager
def without_adapter(model: "PeftModel") -> Iterator[None]:
    """The model with its adapter off, in evaluation mode. After it, all modules and weights are in the modes they were in."""
    training = [module for module in model.modules() if module.training]
    trained = {weight: weight.requires_grad for weight in model.parameters()}
    model.eval()
    try:
        with model.disable_adapter():
            yield
    finally:
        for module in training:
            module.training = True
        for weight, flag in trained.items():  # PEFT sets those of the adapter
            weight.requires_grad_(flag)


class FrozenReference:
    """
    A reference model of its own, in evaluation mode and without gradients.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Causal language model.
        accelerator ([`~accelerate.Accelerator`]):
            Places it, and shards it where ZeRO-3 or FSDP shard the policy.
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator):
        model.requires_grad_(False).eval()
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model = prepare_deepspeed(model, accelerator)
        elif accelerator.distributed_type == DistributedType.FSDP:
            self.model = prepare_fsdp(model, accelerator)
        else:
            # Not `prepare_model`: once the accelerator has a model, Trainer takes the policy of an evaluation before
            # training for prepared, and that one has no mixed precision then
            self.model = model if accelerator.verify_device_map(model) else model.to(accelerator.device)
        self._accelerator = accelerator

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """
        Hidden states of the reference at the trained tokens, and its head.

        Args:
            policy (`torch.nn.Module`):
                The policy as it is wrapped for training. Not used here.
            inputs (`dict[str, Any]`):
                Inputs of the model, without labels.
            labels (`torch.Tensor`):
                Labels, shape `(B, L)`.

        Returns:
            `tuple[torch.Tensor, LMHead]`: States of shape `(N, H)`, in row-major order, and the head.
        """
        model = self._accelerator.unwrap_model(self.model)
        with self._accelerator.autocast():  # as the policy's forward, which accelerate wraps
            states = ForwardRedirection()(self.model, model, _last_hidden_states, model, inputs)
        return states[:, :-1][trained_tokens(labels)], LMHead.of(model)


class AdapterOff:
    """The policy with its adapter off: what it was before training, without a second model in memory."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator

    @torch.no_grad()
    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """See [`FrozenReference`]."""
        model = self._accelerator.unwrap_model(policy)
        with without_adapter(model), self._accelerator.autocast():
            states = ForwardRedirection()(policy, model, _last_hidden_states, model, inputs)
            return states[:, :-1][trained_tokens(labels)], LMHead.of(causal_lm_of(model))


# Precomputed hidden states


class RefHiddenStore:
    """
    A folder of hidden states, by content of the sequence. One tensor per sequence: bfloat16, shape `(N, H)`, N trained tokens.

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
                    f"{path}: the file is damaged ({error}). Remove it; its states are computed again."
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
        return self.__dict__ | {"_open": {}}  # workers open files of their own

    def write(self, states: dict[str, torch.Tensor]) -> None:
        """Add the states of some sequences as one file, which appears as a whole."""
        name = f"states-{min(states)}.safetensors"
        partial = self.folder / f".{name}.partial"
        save_file(states, partial)
        os.replace(partial, self.folder / name)


def trained_sequences_of(example: dict[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """
    Yield the sequences of a row that have a trained token. A packed row holds several.

    Yields:
        `tuple[str, np.ndarray, np.ndarray]`: Key, token ids and labels. The key is 32 hex digits that depend on the token ids and
        on which of them are trained.
    """
    row_ids = np.asarray(example["input_ids"])
    row_labels = np.asarray(example.get("labels", row_ids))  # as TRL's collator
    borders = np.cumsum(example.get("seq_lengths", [len(row_ids)]))[:-1]
    for ids, labels in zip(np.split(row_ids, borders), np.split(row_labels, borders), strict=True):
        is_trained = labels[1:] != -100  # nothing predicts the first token
        if is_trained.any():
            digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16)
            digest.update(is_trained.tobytes())
            yield digest.hexdigest(), ids, labels


class RefHiddenCollator:
    """
    Adds the states of the reference to the batches of another collator, as `ref_hidden_states`: shape `(N, H)`, for the N
    trained tokens of the batch in row-major order.

    Args:
        collator ([`~transformers.DataCollator`]):
            Makes the batch.
        store ([`RefHiddenStore`]):
            Holds the states.
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
                        "computed for the training and evaluation data that the trainer was made with. Make a trainer with this "
                        "data and another `ref_hidden_dir`, or one without `precompute_ref_hidden`."
                    )
                states.append(self.store[key])
        return self.collator(examples) | {REF_STATES: torch.cat(states)}


class PrecomputedReference:
    """A reference of which only the head is kept. Its hidden states come with the batch."""

    def __init__(self, head: LMHead):
        self.head = head

    def __call__(
        self, policy: torch.nn.Module, inputs: dict[str, Any], labels: torch.Tensor
    ) -> tuple[torch.Tensor, LMHead]:
        """See [`FrozenReference`]."""
        # TRL's kernel computes in the dtype of the states, and would round the head to it
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
            The reference. `None` for the policy with its adapter off.

    Returns:
        `tuple[PrecomputedReference, RefHiddenStore]`: What remains of the reference, and the states.

    Raises:
        `ValueError`: If the folder has states of another reference or of other data, or no token is trained on.
        `TypeError`: If a dataset is a stream.
    """
    args, accelerator = trainer.args, trainer.accelerator
    sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if model is None and sharded:
        raise ValueError(
            "`precompute_ref_hidden` with an adapter does not work under DeepSpeed or FSDP, which wrap the policy later. "
            "Leave it out: with the adapter off, the policy is the reference, and no second model is in memory."
        )
    folder = Path(args.ref_hidden_dir or Path(args.output_dir) / "_ref_hidden")
    evaluation = trainer.eval_dataset or {}
    sequences = {}
    for dataset in [trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`precompute_ref_hidden` needs a `datasets.Dataset`, found a `{type(dataset).__name__}`. Load the data "
                "without `streaming=True`, or train without `precompute_ref_hidden`."
            )
        for example in dataset:
            sequences |= {key: (ids, labels) for key, ids, labels in trained_sequences_of(example)}
    if not sequences:
        raise ValueError(
            "No sequence of the datasets has a token to train on. Do the prompts fill `max_length`? Raise it, or look at the "
            "labels of the data."
        )
    manifest = {
        "version": 1,
        "reference": _digest_of_weights(trainer.model if model is None else model),
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
    accelerator.wait_for_everyone()  # no rank writes before all have looked
    reference = AdapterOff(accelerator) if model is None else FrozenReference(model, accelerator)
    _compute(trainer, reference, missing, store)
    accelerator.wait_for_everyone()
    if model is None:
        with without_adapter(trainer.model):  # which may hold a head of its own
            head = _head_of(causal_lm_of(trainer.model))
    else:
        head = _head_of(accelerator.unwrap_model(reference.model))
    return PrecomputedReference(head), RefHiddenStore(folder)


def _digest_of_weights(model: torch.nn.Module) -> str:
    """Stands for the frozen weights of a model (those of an adapter are not), and for its settings."""
    causal_lm = causal_lm_of(model)
    settings = causal_lm.config.to_dict()
    settings = {name: value for name, value in settings.items() if not name.endswith("_token_id")}
    for name in ("_name_or_path", "transformers_version"):
        settings.pop(name, None)
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    adapted = causal_lm is not model
    for name, weight in sorted(causal_lm.named_parameters()):
        if adapted and weight.requires_grad:
            continue
        with maybe_gather_lm_head_ctx(weight) if hasattr(weight, "ds_id") else nullcontext():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _check_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / MANIFEST
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(
                f"{folder}: the folder is not empty and has no {MANIFEST}, so its states are of an unknown reference. "
                "Remove it, or give another `ref_hidden_dir`."
            )
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: the file is damaged ({error}). Remove the folder to compute the states anew."
        ) from error
    for name, what in (("version", "format"), ("reference", "reference model"), ("data", "data or tokenizer")):
        if found.get(name) != manifest[name]:
            raise ValueError(
                f"{path}: the precomputed hidden states are of another {what}: found {found.get(name)}, expected "
                f"{manifest[name]}. Remove the folder to compute them anew, or give another `ref_hidden_dir`."
            )


def _compute(
    trainer: "SFTTrainer",
    reference: FrozenReference | AdapterOff,
    missing: dict[str, tuple[np.ndarray, np.ndarray]],
    store: RefHiddenStore,
) -> None:
    """Compute and write the states of sequences. Batches go round the ranks."""
    accelerator, size = trainer.accelerator, trainer.args.per_device_eval_batch_size
    collator = DataCollatorForLanguageModeling(pad_token_id=trainer._tokenizer.pad_token_id)
    keys = sorted(missing, key=lambda key: (len(missing[key][0]), key))  # of about the same length in a batch
    batches = [keys[start : start + size] for start in range(0, len(keys), size)]
    rounds = range(0, len(batches), accelerator.num_processes)
    states, num_bytes = {}, 0
    shown = accelerator.is_main_process and not trainer.args.disable_tqdm
    for first in tqdm(rounds, desc="Hidden states of the reference", disable=not shown):
        number = first + accelerator.process_index
        # A rank without a batch of its own takes the first one: under ZeRO-3 and FSDP a forward pass needs all ranks
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
    """A copy of the head, so that the rest of the model can go."""
    head = LMHead.of(model)
    with maybe_gather_lm_head_ctx(head.weight, head.bias):
        # Parameters, as TRL's offloading of activations leaves those where they are
        weight, bias = (
            None if part is None else torch.nn.Parameter(part.detach().clone(), requires_grad=False)
            for part in (head.weight, head.bias)
        )
    if hasattr(head.weight, "ds_status"):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        for part in (weight, bias):
            if part is not None:
                part.ds_status = (
                    ZeroParamStatus.AVAILABLE
                )  # TRL's kernel asks every head under ZeRO-3: this one is whole
    return head._replace(weight=weight, bias=bias)
