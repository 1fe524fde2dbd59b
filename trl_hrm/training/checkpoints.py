"""Checkpoints of a training: which of them are complete, and what the training that saved them consisted of."""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME

from .. import __version__
from .._compat import maybe_gather_lm_head_ctx
from ..identity import changed_settings
from ..io import read_json, shown, write_json


RECORD_NAME = "trl_hrm_checkpoint.json"
# A checkpoint can be resumed without these files. The first is never pushed to the Hub, the second is often edited
NOT_NEEDED = ("training_args.bin", "README.md")
WEIGHTS = (
    *("model*.safetensors", "adapter_model.safetensors", "*/adapter_model.safetensors"),
    *("pytorch_model*", "adapter_model.bin", "global_step*"),
)
OPTIMIZER = ("optimizer*", "global_step*")

# Arguments that a resumed training may change without a question, because they do not change what is learned, except for rounding
FREE_ARGUMENTS = frozenset(
    """
    output_dir resume_from_checkpoint accept_changes ignore_data_skip restore_callback_states_from_checkpoint label_names
    do_train do_eval do_predict eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches
    eval_use_gather_object eval_packing per_device_eval_batch_size prediction_loss_only include_for_metrics batch_eval_metrics
    bf16_full_eval fp16_full_eval load_best_model_at_end
    log_level log_level_replica log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy
    report_to run_name project trackio_bucket_id trackio_space_id trackio_static_space_id disable_tqdm debug
    skip_memory_metrics include_num_input_tokens_seen
    save_strategy save_steps save_total_limit save_only_model save_on_each_node enable_jit_checkpoint
    push_to_hub hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    dataset_num_proc dataloader_in_order dataloader_multiprocessing_context dataloader_num_workers
    dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor remove_unused_columns
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    activation_offloading torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps tf32 use_cache use_cpu
    use_liger_kernel liger_kernel_config full_determinism pad_to_multiple_of
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout deepspeed fsdp
    fsdp_config parallelism_config local_rank
    trust_remote_code ref_model precompute_ref_hidden ref_hidden_dir precompute_ref_log_probs
    log_worst_steps log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    num_generations_eval stop_on_reward_hacking ds3_gather_for_generation
    vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_enable_sleep_mode
    """.split()
)
# Changing these extends or shortens a training. It is logged, not refused
LENGTH_ARGUMENTS = ("num_train_epochs", "max_steps")


def plain(value: Any) -> Any:
    """Return a setting as JSON: sets as sorted lists, enums as their values, and other objects and infinity as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)

    def convert(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, set | frozenset):
            return sorted(value, key=str)
        return value.to_dict() if hasattr(value, "to_dict") else str(value)

    return json.loads(json.dumps(value, default=convert))


def digest_of_dataset(dataset: Dataset) -> str:
    """
    Return a hash of the rows of a dataset, as 16 hex digits. It depends on names, order and values, but not on how the rows are
    stored: as files or in memory, in how many parts, selected or shuffled, with `string` or `large_string`.
    """
    digest = hashlib.sha256()
    names = sorted(dataset.column_names)
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        for name in names:
            digest.update(f"{name}\n".encode())
            _add(digest, table[name].combine_chunks())
    return digest.hexdigest()[:16]


def _add(digest: Any, array: pa.Array) -> None:
    """Add the type, the missing values and the values of an array to a hash."""
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    kind, types = array.type, pa.types
    digest.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            digest.update(f"{len(array)} struct {field.name}\n".encode())
            _add(digest, values)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        digest.update(f"{len(array)} list\n".encode())
        digest.update(pc.list_value_length(array).drop_null().to_numpy().astype(np.int64).tobytes())
        _add(digest, array.flatten())
    elif types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        values = array.drop_null().cast(pa.large_binary())
        _, offsets, data = values.buffers()
        digest.update(f"{len(array)} text\n".encode())
        digest.update(pc.binary_length(values).to_numpy().tobytes())
        if len(values):
            bounds = np.frombuffer(offsets, np.int64)[values.offset : values.offset + len(values) + 1]
            digest.update(memoryview(data)[bounds[0] : bounds[-1]])
    elif types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind):
        dtype = np.float64 if types.is_floating(kind) else np.int64
        digest.update(f"{len(array)} {np.dtype(dtype).name}\n".encode())
        digest.update(array.drop_null().to_numpy(zero_copy_only=False).astype(dtype).tobytes())
    else:  # dates, decimals and other types that are not trained on
        digest.update(f"{len(array)} {array.to_pylist()!r}\n".encode())


def model_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Return the config of a model without names, versions and token ids, or its class if it has no config."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {"class": type(model).__name__}
    left_out = ("_name_or_path", "transformers_version")
    return {k: v for k, v in plain(config.to_dict()).items() if k not in left_out and not k.endswith("_token_id")}


def digest_of_weights(model: torch.nn.Module) -> str:
    """Return a hash of the config and the weights of a model (without the weights of an adapter)."""
    base = model.get_base_model() if is_peft_model(model) else model
    digest = hashlib.blake2b(json.dumps(model_settings(base), sort_keys=True).encode(), digest_size=16)
    for name, weight in sorted(base.named_parameters()):
        if base is not model and weight.requires_grad:
            continue
        with maybe_gather_lm_head_ctx(weight) if hasattr(weight, "ds_id") else nullcontext():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def remove_checkpoint(folder: Path) -> None:
    """
    Remove the files of a checkpoint. A checkpoint that is overwritten in place would look complete if the process were killed
    meanwhile, so its state is removed first.
    """
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    for path in list(folder.iterdir()) if folder.exists() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_record(folder: Path, settings: dict[str, Any], accepted: Collection[str]) -> None:
    """
    Write what a checkpoint consists of: the settings of its training, the changes that were accepted when it was resumed, and all
    files with their sizes.

    Call it when all processes have written their files. The Trainer then writes `trainer_state.json`, as the last file.
    """
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (*NOT_NEEDED, RECORD_NAME, TRAINER_STATE_NAME)
    }
    record = {"trl_hrm": __version__, "settings": settings, "accepted": sorted(accepted), "files": files}
    write_json(folder / RECORD_NAME, record)


def read_record(folder: Path) -> dict[str, Any] | None:
    """
    Return what [`write_record`] wrote, or `None` if the checkpoint has no record because it was saved by an earlier version or by
    another trainer.

    Raises:
        `ValueError`: If the record is damaged.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    record = read_json(path)
    for name, kind, inner in (("settings", dict, object), ("accepted", list, str), ("files", dict, int)):
        value = record.get(name)
        values = value.values() if isinstance(value, dict) else value
        if not isinstance(value, kind) or not all(isinstance(one, inner) for one in values):
            raise ValueError(f"{path}: found {shown(value)} as `{name}`, expected what the trainer writes.")
    return record


def why_incomplete(folder: Path) -> str | None:
    """
    Return why training cannot be resumed from a checkpoint, or `None` if the checkpoint is complete.

    A complete checkpoint has a valid `trainer_state.json`, which is written last, and all files of its record with their sizes and
    valid headers. If it has no record, it must have weights and the state of the optimizer.
    """
    if not folder.is_dir():
        return "the folder does not exist"
    state = folder / TRAINER_STATE_NAME
    if not state.is_file():
        return f"{state.name} is missing"
    try:
        step = json.loads(state.read_bytes())["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError):  # `read_json` refuses NaN, which metrics can be
        return f"{state.name} is damaged"
    if not isinstance(step, int):
        return f"{state.name} is damaged"
    try:
        record = read_record(folder)
    except ValueError as error:
        return str(error).rstrip(".")
    if record is not None:
        sizes = {name: (folder / name).stat().st_size for name in record["files"] if (folder / name).is_file()}
        missing = sorted(record["files"].keys() - sizes.keys())
        if missing:
            return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
        for name, size in record["files"].items():
            if sizes[name] != size:
                return f"{name} has {sizes[name]:,} bytes, and was saved with {size:,}"
        damaged = next((name for name in sorted(sizes) if not _has_valid_header(folder / name)), None)
        return damaged and f"{damaged} is damaged"
    if not any(list(folder.glob(pattern)) for pattern in WEIGHTS):
        return "the weights are missing"
    for index in folder.glob("*.index.json"):
        try:
            shards = set(read_json(index)["weight_map"].values())
        except (ValueError, KeyError, AttributeError):
            return f"{index.name} is damaged"
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            return f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    if not any(list(folder.glob(pattern)) for pattern in OPTIMIZER):
        return "the state of the optimizer is missing, as in checkpoints saved with `save_only_model`"
    return None


def _has_valid_header(path: Path) -> bool:
    """Return whether a file can be opened. After a power loss, a file may have its full size and contain only zeros."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        if path.suffix == ".json":
            json.loads(path.read_bytes())
    except (SafetensorError, ValueError, RecursionError):
        return False
    return path.suffix not in (".pt", ".pth") or is_zipfile(path)


def newest_complete(output_dir: Path) -> tuple[Path | None, dict[Path, str]]:
    """
    Return the newest complete checkpoint of a training, and why each newer one is incomplete.

    Args:
        output_dir (`Path`):
            Output folder of the training. It does not need to exist.
    """
    found = {}
    for path in output_dir.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    skipped = {}
    for step in sorted(found, reverse=True):
        problem = why_incomplete(found[step])
        if problem is None:
            return found[step], skipped
        skipped[found[step]] = problem
    return None, skipped


def list_changes(found: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """
    Return the settings that differ, each with its name and both values, by the name to pass in `accept_changes`. A setting that one
    of the two does not know does not differ: it was added or removed by another version.
    """
    changes = {name: changed_settings({name: found[name]}, {name: now[name]}) for name in now if name in found}
    return {name: lines for name, lines in changes.items() if lines}
