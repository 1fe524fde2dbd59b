"""Stop a training that diverges or has nothing to train on, save complete checkpoints, and refuse to resume another training."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, broadcast_object_list, is_peft_model
from datasets import Dataset
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import has_length

from ..identity import checkpoint_identity
from ..io import claimed_folder, shown
from ..precision import warn_of_slow_bf16
from ..schema import OTHER_DATASET
from .checkpoints import (
    FREE_ARGUMENTS,
    LENGTH_ARGUMENTS,
    RECORD_NAME,
    digest_of_dataset,
    digest_of_weights,
    list_changes,
    model_settings,
    newest_complete,
    plain,
    read_record,
    remove_checkpoint,
    why_incomplete,
    write_record,
)


logger = get_logger(__name__)
Result = TypeVar("Result")

LOCK_NAME = "_training.lock"  # names that begin with "_" are not pushed to the Hub
NEVER = torch.iinfo(torch.long).max
CAUSES = ("loss", "gradient norm", "value of the weights")
# Schedules of the learning rate that do not depend on the number of steps
ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
# Keyword arguments of `from_pretrained` that do not change the model. The revision is recorded as a commit
FREE_MODEL_ARGUMENTS = ("revision", "attn_implementation", "device_map", "token")
FREE_PEFT_SETTINGS = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")


class DivergedError(ValueError):
    """Raised on all processes if a loss, a gradient norm or a weight is NaN or infinite."""


class SafeTrainingMixin:
    """
    Mixin for the habits of [`~transformers.Trainer`] that lose or spoil a training. List it before the trainer in the base classes.

    - **Divergence.** The Trainer logs a NaN loss as `0` (`logging_nan_inf_filter`), saves the NaN weights and ends without an error.
      This class raises [`DivergedError`] on all processes, and never saves weights that are not finite. Each step only updates a
      tensor on the device: the first step whose loss or gradient norm was not finite, without waiting for the device. The tensor is
      read, and combined over all processes, when the Trainer waits anyway: before it logs, evaluates or saves, and at the end.
      With fp16, gradient norms are not checked, because the gradient scaler skips steps that overflow. A batch without labels has
      the loss 0.
    - **Complete checkpoints.** A killed process leaves half a checkpoint. `trl_hrm_checkpoint.json` lists the files of a checkpoint,
      and is written when all processes have written their files. Only `trainer_state.json` comes later. `resume_from_checkpoint=True`
      takes the newest checkpoint that is complete, and logs which ones it skipped.
    - **Identity.** The same file records the settings, the dataset, the base model and the tokenizer of a training, by content.
      Resuming with others is refused, unless `accept_changes` names them.
    - **Evaluation.** `dataloader_drop_last` applies to training only. Metrics of a dataset that is not the trainer's are marked in the
      log, and left out of the model card.
    - **Nothing to train on.** A dataset without a full batch or a training without a step is an error.
    - **One training per folder.** `output_dir` is locked, and tried, before training.

    Subclasses set `_train_data` and `_eval_data` to the datasets as the user passed them, before they are prepared.
    """

    _name: str
    _train_data: Any = None
    _eval_data: Any = None
    _settings: dict[str, Any] | None = None  # of the current training
    _accepted: tuple[str, ...] = ()  # changes that were accepted since the training began
    _is_other = False  # whether the evaluation that is running is of a dataset that is not the trainer's
    # Values of settings that records of earlier versions do not have
    _default_settings: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._forget_divergence()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        Train the model.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                Path of a checkpoint, or `True` for the newest complete checkpoint in `output_dir`. Without one, training
                starts from the beginning. The strings `"true"` and `"false"` of a command line are understood.
            args, kwargs:
                Other arguments of `transformers.Trainer.train`.

        Raises:
            `ValueError`: If the checkpoint is incomplete or belongs to another training, there is nothing to train on, or no weight is
                trainable.
            `OSError`: If `output_dir` cannot be written, or another process trains into it.
            [`DivergedError`]: If the loss, a gradient or a weight is NaN or infinite.
        """
        self._check_length()
        if self.model_init is None and not any(weight.requires_grad for weight in self.model.parameters()):
            raise ValueError(  # with gradient checkpointing, nothing else would fail
                "No weight of the model is trainable, so the training would change nothing. Load an adapter with `is_trainable=True`, or set "
                "`requires_grad` of the weights to be trained."
            )
        self._forget_divergence()
        if self.accelerator.mixed_precision == "bf16" or getattr(self.model, "dtype", None) == torch.bfloat16:
            warn_of_slow_bf16(self.args.device, "Set `bf16=False`, and load the model in float32.")
        with ExitStack() as stack:

            def start() -> tuple[str | None, dict[str, Any], tuple[str, ...]]:
                stack.enter_context(claimed_folder(self.args.output_dir, "output_dir", lock=LOCK_NAME))
                return self._resolve(resume_from_checkpoint)

            checkpoint, self._settings, self._accepted = self._on_main(start)
            return super().train(checkpoint, *args, **kwargs)

    def _on_main(self, function: Callable[[], Result]) -> Result:
        """Return what a function returns on the main process, on all processes. Its `OSError` or `ValueError` is raised on all."""
        outcome: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                outcome = [function(), None]
            except (OSError, ValueError) as error:
                outcome = [None, error]
        result, error = broadcast_object_list(outcome)
        if error is not None:
            raise error
        return result

    # Evaluation

    def evaluate(self, eval_dataset: Any = None, *args, **kwargs) -> dict[str, float]:
        with self._marking_others(eval_dataset):
            return super().evaluate(eval_dataset, *args, **kwargs)

    @contextmanager
    def _marking_others(self, eval_dataset: Any) -> Iterator[None]:
        """Mark the logs of an evaluation of a dataset that is not the trainer's. Each dataset of a `dict` has its own evaluation."""
        own = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        is_own = isinstance(eval_dataset, str | dict) or any(eval_dataset is one for one in [None, *own])
        self._is_other = is_other = self.eval_dataset is not None and not is_own
        number = len(self.state.log_history)
        try:
            yield
        finally:
            if is_other:
                for log in self.state.log_history[number:]:
                    log[OTHER_DATASET] = True
            self._is_other = False

    def get_eval_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._keeping_the_last_batch():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args, **kwargs) -> DataLoader:
        with self._keeping_the_last_batch():
            return super().get_test_dataloader(*args, **kwargs)

    @contextmanager
    def _keeping_the_last_batch(self) -> Iterator[None]:
        """`dataloader_drop_last` is for training. The Trainer would also drop rows of an evaluation."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drops

    # Nothing to train on

    def _check_length(self) -> None:
        check_length(self.args)
        if isinstance(self.train_dataset, Dataset) and not len(self.train_dataset):
            raise ValueError("`train_dataset` has no rows. It must have at least one.")

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader):
        if has_length(dataloader) and not len(dataloader):
            raise ValueError(
                f"`train_dataset` has {len(self.train_dataset):,} rows after preparation, fewer than one batch of "
                f"{self._train_batch_size * self.accelerator.num_processes:,} rows "
                f"(`per_device_train_batch_size` {self._train_batch_size} × `num_processes` {self.accelerator.num_processes}), and "
                "`dataloader_drop_last` drops incomplete batches, so there is nothing to train on. Use a smaller batch, or "
                "`dataloader_drop_last=False`."
            )
        return super().set_initial_training_values(args, dataloader)

    def _run_epoch(self, *args, **kwargs):
        # With `max_steps`, the Trainer would train one step more each time that a finished training is resumed
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # Divergence

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._note("loss", self.state.global_step + 1, loss.isfinite().all())
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        grad_norm = super()._get_grad_norm(*args, **kwargs)
        if grad_norm is not None and self.accelerator.mixed_precision != "fp16":
            norm = torch.as_tensor(grad_norm, device=self.args.device) if isinstance(grad_norm, float) else grad_norm
            norm = norm.to_local() if isinstance(norm, DTensor) else norm
            is_finite = (norm.isfinite() & (norm >= 0)).all()  # DeepSpeed returns -1 for NaN
            self._note("gradient norm", self.state.global_step + 1, is_finite)
        return grad_norm

    def _forget_divergence(self) -> None:
        # For each of CAUSES, the first step with a value that is not finite on this rank
        self._first_not_finite = torch.full((len(CAUSES),), NEVER, device=self.args.device)

    def _note(self, cause: str, step: int, is_finite: torch.Tensor) -> None:
        """Remember a step if its value is not finite, without waiting for the device."""
        first = self._first_not_finite[CAUSES.index(cause)]
        first.copy_(torch.where(is_finite.to(first.device), first, first.clamp(max=step)))

    def _stop_if_diverged(self, on_all: bool = True) -> None:
        """
        Raise [`DivergedError`] if a value was not finite. With `on_all`, all processes must call it, and it is raised on all of them
        if a value was not finite on one of them.
        """
        first = self._first_not_finite[None]
        first = (self.accelerator.gather(first) if on_all else first).amin(dim=0).tolist()
        if min(first) == NEVER:
            return
        step = min(first)
        cause = CAUSES[first.index(step)]
        losses = [(log["step"], log["loss"]) for log in self.state.log_history if "loss" in log]
        last = f"The last logged loss is {losses[-1][1]:.4g} at step {losses[-1][0]}. " if losses else ""
        checkpoint, _ = newest_complete(Path(self.args.output_dir))
        kept = "No checkpoint was saved" if checkpoint is None else f"The newest complete checkpoint is {checkpoint}"
        self._forget_divergence()  # the user may load a good checkpoint and save it
        norm = self.args.max_grad_norm
        clipping = "" if 0 < norm <= 1 else f" Set `max_grad_norm` (now {norm}) to at most 1."
        precision = " Use bf16 or float32 instead of fp16." if self.accelerator.mixed_precision == "fp16" else ""
        raise DivergedError(
            f"The training diverged: the {cause} at step {step} is NaN or infinite. {last}Lower `learning_rate` (now "
            f"{self.args.learning_rate}).{clipping}{precision} {kept}."
        )

    def _check_weights(self) -> None:
        """
        Raise [`DivergedError`] before weights that are not finite are saved.

        If the weights are sharded, all processes save them together, and also check them together. Otherwise, all processes have
        the same weights, and users may save on one process only.
        """
        are_finite = weights_are_finite(self.model)
        self._note("value of the weights", self.state.global_step, torch.tensor(are_finite))
        self._stop_if_diverged(on_all=self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._stop_if_diverged()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._stop_if_diverged()
        if self.state.global_step == self._initial_global_step:
            logger.warning(
                f"The checkpoint is at step {self.state.global_step}, and training ends at step {self.state.max_steps}, so there was "
                "nothing left to train."
            )
        return super()._finalize_training(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError as error:  # its message lists the metrics
            raise ValueError(error.args[0]) from error

    # Complete checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._check_weights()
        if self.args.should_save and not is_peft_model(self.model):
            # The adapter of an earlier training in this folder. It would be loaded instead of the model
            for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
                Path(output_dir or self.args.output_dir, name).unlink(missing_ok=True)
        super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        self._stop_if_diverged()
        if self.args.should_save:
            remove_checkpoint(Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}"))
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        # The last files of each process, before the main process writes `trainer_state.json` and deletes older checkpoints
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_record(Path(output_dir), self._settings or {}, self._accepted)

    # Identity

    def _resolve(self, resume: str | bool | None) -> tuple[str | None, dict[str, Any], tuple[str, ...]]:
        """Return the checkpoint to resume from, the settings of this training, and the changes that were accepted."""
        resume = {"true": True, "false": None, "": None}.get(str(resume).lower(), resume)
        settings = self._training_settings()
        accepts = list(getattr(self.args, "accept_changes", ()))
        unknown = sorted(set(accepts) - settings.keys())
        if unknown:
            raise ValueError(
                f"`accept_changes` contains {shown(unknown[0])}, which is not a setting that is compared. They are "
                f"{', '.join(sorted(settings))}."
            )
        checkpoint = resume
        if resume is True:
            checkpoint, skipped = newest_complete(Path(self.args.output_dir))
            for folder, problem in skipped.items():
                logger.warning(f"{folder} is skipped, because it is incomplete: {problem}.")
            if checkpoint is None:
                logger.warning(
                    f"{self.args.output_dir} has no complete checkpoint to resume from. Training starts from the beginning."
                )
                return None, settings, ()
            logger.warning(f"Training resumes from {checkpoint}.")
        if not checkpoint:
            if accepts:
                raise ValueError(
                    f"`accept_changes` is {accepts}, but no checkpoint is resumed. Set `resume_from_checkpoint`, or remove it."
                )
            earlier, _ = newest_complete(Path(self.args.output_dir))
            if earlier is not None:
                logger.warning(
                    f"Training starts from the beginning, but {self.args.output_dir} has checkpoints of an earlier training, such as "
                    f"{earlier.name}. A later `resume_from_checkpoint=True` takes the one with the highest number, whichever training saved it. "
                    "Delete them, or choose another `output_dir`."
                )
            return None, settings, ()
        if resume is not True and (problem := why_incomplete(Path(checkpoint))) is not None:
            raise ValueError(
                f"{checkpoint} is not a complete checkpoint: {problem}. Use `resume_from_checkpoint=True` for the newest complete "
                "checkpoint in `output_dir`."
            )
        return str(checkpoint), settings, self._accept(Path(checkpoint), settings, accepts)

    def _accept(self, checkpoint: Path, settings: dict[str, Any], accepts: list[str]) -> tuple[str, ...]:
        """Refuse changes since a checkpoint that are not in `accepts`, and return all changes that were accepted so far."""
        record = read_record(checkpoint)
        if record is None:
            logger.warning(
                f"{checkpoint} has no {RECORD_NAME}, because it was saved by an earlier version or by another trainer. It is not "
                "known whether the dataset, the base model and the settings are still the same."
            )
            found = self._settings_without_record(checkpoint)
            if found is None:
                return tuple(accepts)
            record = {"settings": found, "accepted": accepts}
            settings = {name: value for name, value in settings.items() if name in found}
        found = self._default_settings | record["settings"]
        changes = list_changes(found, settings)
        for name in LENGTH_ARGUMENTS:
            for line in changes.get(name, ()):
                schedule = settings["lr_scheduler_type"]
                # A warm-up below 1 is a share of the length. A longer one can lower the learning rate again
                is_endless = schedule in ENDLESS_SCHEDULES and not 0 < settings.get("warmup_steps", 0) < 1
                effect = "" if is_endless else f" The `{schedule}` schedule now spans the new length."
                logger.warning(f"{line}.{effect}")
        may_change = {*accepts, *LENGTH_ARGUMENTS}
        refused = [line for name, lines in changes.items() if name not in may_change for line in lines]
        if refused:
            names = sorted((changes.keys() | set(accepts)) - set(LENGTH_ARGUMENTS))
            raise ValueError(
                f"{checkpoint} belongs to another training: {'; '.join(refused)}. Restore the old values, or accept the changes with "
                f"`accept_changes={names}`."
            )
        # A job that is started again with the same options resumes from a checkpoint that already has the accepted changes
        useless = sorted(set(accepts) - changes.keys() - set(record["accepted"]))
        if useless:
            raise ValueError(
                f"`accept_changes` contains {shown(useless[0])}, which has not changed since {checkpoint}. Remove it."
            )
        for name in changes.keys() - set(LENGTH_ARGUMENTS):
            logger.warning(f"Accepted: {'; '.join(changes[name])}.")
        return tuple(sorted({*accepts, *record["accepted"]}))

    def _settings_without_record(self, checkpoint: Path) -> dict[str, Any] | None:
        """Return the settings of a checkpoint that has no record, as far as its other files tell them."""
        return None

    def _training_settings(self) -> dict[str, Any]:
        """Return everything that a checkpoint is compared with: the arguments that affect training, and `_content`."""
        names = [field.name for field in fields(self.args) if field.init and field.name not in FREE_ARGUMENTS]
        settings = {name: plain(getattr(self.args, name)) for name in names}
        for name in ("model_init_kwargs", "ref_model_init_kwargs"):
            if settings.get(name):
                settings[name] = {k: v for k, v in settings[name].items() if k not in FREE_MODEL_ARGUMENTS}
        if is_peft_model(self.model):
            config = plain(self.model.peft_config[self.model.active_adapter].to_dict())
            if config.get("modules_to_save"):  # PEFT adds the names of the head each time that a config is used
                config["modules_to_save"] = sorted(set(config["modules_to_save"]))
            settings["peft_config"] = {k: v for k, v in config.items() if k not in FREE_PEFT_SETTINGS}
        else:
            settings["peft_config"] = None
        kind = self.accelerator.distributed_type
        settings["sharding"] = kind.value if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) else None
        settings["num_processes"] = self.accelerator.num_processes
        settings["trainer"] = self._name
        return settings | self._content

    @cached_property
    def _content(self) -> dict[str, Any]:
        """Identity of the model, the tokenizer and the datasets before the first training of this trainer."""
        content = {
            "model": model_identity(self.model),
            "tokenizer": digest_of_tokenizer(self.processing_class),
            "train_dataset": _digest(self._train_data),
        }
        if self.args.metric_for_best_model is not None:  # the checkpoints are compared on this dataset
            data = self._eval_data
            content["eval_dataset"] = (
                {name: _digest(one) for name, one in data.items()} if isinstance(data, dict) else _digest(data)
            )
        return content


def check_length(args: TrainingArguments) -> None:
    """Raise `ValueError` if a training has no step."""
    if args.max_steps == 0 or not math.isfinite(args.max_steps):
        raise ValueError(
            f"`max_steps` is {args.max_steps}. It must be at least 1, or -1 to train for `num_train_epochs`."
        )
    if args.max_steps < 0 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(f"`num_train_epochs` is {args.num_train_epochs}. It must be greater than 0.")


def model_identity(model: torch.nn.Module) -> dict[str, Any]:
    """Return the commit or the files that a model was loaded from, without its adapter, or else its config."""
    base = model.get_base_model() if is_peft_model(model) else model
    config = getattr(base, "config", None)
    name, commit = getattr(config, "_name_or_path", None), getattr(config, "_commit_hash", None)
    if name and Path(name).is_dir():
        files = checkpoint_identity(name)
        return {kind: files[kind] for kind in ("weights", "config", "base_model") if kind in files}
    if commit:
        return {"commit": commit}
    # Without an adapter, a checkpoint replaces all weights
    if is_peft_model(model):
        return identity_in_memory(model)
    return {"config": _short_hash(json.dumps(model_settings(base), sort_keys=True))}


def identity_in_memory(model: torch.nn.Module) -> dict[str, Any]:
    """Return the identity of the frozen weights and the config of a model, or only of the config if the weights are sharded."""
    if any(isinstance(weight, DTensor) or hasattr(weight, "ds_tensor") for weight in model.parameters()):
        model = model.get_base_model() if is_peft_model(model) else model
        return {"config": _short_hash(json.dumps(model_settings(model), sort_keys=True))}
    return {"weights": digest_of_weights(model)}


def weights_are_finite(model: torch.nn.Module) -> bool:
    """Return whether all weights that this process holds are finite. Quantized weights are not checked."""
    for weight in model.parameters():
        weight = getattr(weight, "ds_tensor", weight)  # ZeRO-3
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.is_floating_point() and weight.element_size() > 1 and not weight.detach().isfinite().all():
            return False
    return True


def digest_of_tokenizer(tokenizer: Any) -> str | None:
    """Return a hash of the vocabulary, the special tokens and the chat template of a tokenizer."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return None if tokenizer is None else type(tokenizer).__name__
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
    else:
        vocabulary = json.loads(backend.to_str()) | {"truncation": None, "padding": None}  # change with every call
    content = [vocabulary, plain(tokenizer.special_tokens_map), plain(tokenizer.chat_template)]
    return _short_hash(json.dumps(content, sort_keys=True))


def _digest(data: Any) -> str | None:
    """Return the digest of a dataset. A streaming dataset has none."""
    return digest_of_dataset(data) if isinstance(data, Dataset) else None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
