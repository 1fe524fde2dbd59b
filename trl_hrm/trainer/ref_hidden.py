"""Last hidden states of a reference, computed once and kept on disk: training then needs no more of it than its LM head."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import DataCollator, PreTrainedModel

from .._compat import DataCollatorForLanguageModeling, maybe_gather_lm_head_ctx
from ..io import write_json
from ..kl import LMHead, trained_tokens
from .reference import AdapterOff, FrozenReference, causal_lm_of, without_adapter


if TYPE_CHECKING:
    from trl import SFTTrainer


REF_STATES = "ref_hidden_states"
MANIFEST = "manifest.json"
SHARD_BYTES = 256 << 20


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


def sequences_of(example: dict[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Token ids and labels of each sequence of a row, which holds several if it is packed."""
    ids = np.asarray(example["input_ids"])
    labels = np.asarray(example.get("labels", ids))  # as TRL's collator
    borders = np.cumsum(example.get("seq_lengths", [len(ids)]))[:-1]
    yield from zip(np.split(ids, borders), np.split(labels, borders), strict=True)


def key_of(ids: np.ndarray, labels: np.ndarray) -> str:
    """32 hex digits that stand for a sequence: its token ids, and which of them are trained on."""
    digest = hashlib.blake2b(ids.astype(np.int64).tobytes(), digest_size=16)
    digest.update((labels[1:] != -100).tobytes())
    return digest.hexdigest()


def _is_trained(labels: np.ndarray) -> bool:
    return bool((labels[1:] != -100).any())


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
            for ids, labels in sequences_of(example):
                if _is_trained(labels):
                    states.append(self._states(key_of(ids, labels), ids))
        return self.collator(examples) | {REF_STATES: torch.cat(states)}

    def _states(self, key: str, ids: np.ndarray) -> torch.Tensor:
        if key not in self.store:
            raise ValueError(
                f"{self.store.folder}: no hidden states of the reference for a sequence of {len(ids)} tokens. They were "
                "computed for the training and evaluation data that the trainer was made with. Make a trainer with this "
                "data and another `ref_hidden_dir`, or one without `precompute_ref_hidden`."
            )
        return self.store[key]


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
    sequences = _sequences(trainer)
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


def _sequences(trainer: "SFTTrainer") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The different sequences of all datasets of a trainer that have a trained token."""
    evaluation = trainer.eval_dataset or {}
    datasets = [trainer.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]
    found = {}
    for dataset in datasets:
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`precompute_ref_hidden` needs a `datasets.Dataset`, found a `{type(dataset).__name__}`. Load the data "
                "without `streaming=True`, or train without `precompute_ref_hidden`."
            )
        for example in dataset:
            for ids, labels in sequences_of(example):
                if _is_trained(labels):
                    found[key_of(ids, labels)] = ids, labels
    return found


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
