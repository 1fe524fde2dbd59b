"""Push checkpoints and final models to the Hub. Each commit is complete, and failed pushes are reported."""

import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from .. import __version__
from ..hub import pushing, retry
from ..io import shell_word, shown
from ..terminal import one_line, plain
from .checkpoints import RECORD_NAME


logger = get_logger(__name__)

# Prefix of the snapshot folders in the output folder. The final push skips names that start with "_"
SNAPSHOT = "_push-step-"
# Files of a checkpoint that are only needed to resume training
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "slots_*.safetensors",
    "raw_weights.safetensors",
    "trainer_state.json",
    RECORD_NAME,
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
)
# A pickle that contains local paths. The model card lists the settings
NEVER_PUSHED = ("training_args.bin",)
# Files of an earlier push that would be loaded instead of a full model, or with it. An adapter needs no others deleted: its base model
# may even be in the same repository
REPLACED = ("adapter_config.json", "adapter_model.*", "step_format.json")
REPLACED_BY_FULL_MODEL = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")


@dataclass(frozen=True)
class StepPush:
    """A background push of the files in `snapshot`, which were saved at `step`."""

    step: int
    checkpoint: Path
    snapshot: Path
    job: "Future[CommitInfo]"


class HubPushMixin:
    """
    Mixin that implements `push_to_hub` and `hub_strategy`. List it before [`~transformers.Trainer`] in the base classes.

    It differs from the pushes of [`~transformers.Trainer`] as follows:

    - Each checkpoint is pushed in one commit from a snapshot (hard links) that is taken when the checkpoint is saved. The
      commit therefore contains the weights of the step in its message, even if the Hub is slow, and readers always see a
      complete version. The snapshot keeps the disk space of the checkpoint in use until the push is done, even if
      `save_total_limit` deletes the checkpoint.
    - `hub_strategy="all_checkpoints"` pushes every checkpoint, one after another. `"every_save"` and `"checkpoint"` skip a
      checkpoint that is saved while a push is running, unless `hub_always_push=True`. Skipped steps are listed at the end of
      training.
    - Pushes are retried after temporary errors. A failed background push is logged as an error immediately and at the end of
      training. [`HubPushMixin.push_to_hub`] raises [`PushError`].
    - Every saved folder and every commit contains the model card and the tokenizer.
    - `hub_token` and a `token` in `model_init_kwargs` are never saved or logged. If one is given, the trainer uses a copy of
      its arguments without it.
    - The branch `hub_revision` is created if it does not exist.

    Subclasses set the arguments to show in the model card (`_card_settings`), the beginnings of the names of the metrics to show, if
    not all of them (`_card_metrics`), and the function that writes the card (`_save_card`).

    Attributes:
        dataset_name (`str` or `None`):
            Name of the dataset in the model card. Set it before training to include it in the cards of checkpoints.
        eval_dataset_name (`str` or `None`):
            Name of the evaluation dataset in the model card, if it is not a part of that dataset.
    """

    dataset_name: str | None = None
    eval_dataset_name: str | None = None
    _card_settings: tuple[str, ...]
    _card_metrics: tuple[str, ...] = ("",)

    def __init__(self, *args, **kwargs):
        self._pushes: list[StepPush] = []
        self._skipped_pushes: list[int] = []
        self._hub_token: str | None = None
        super().__init__(*args, **kwargs)
        self._hub_token = self.args.hub_token
        self.args = _without_tokens(self.args)

    @cached_property
    def _push_executor(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            # Even after an error: report failed pushes, finish queued ones (uploads fail when the interpreter exits), and do
            # not let a push read a checkpoint that the next training overwrites
            self._finish_current_push()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository and the branch `hub_revision` if they do not exist.

        Raises:
            [`PushError`]: If the repository or the branch cannot be created.
            `ValueError`: If a private repository is requested, but the repository exists and is public.
        """
        if not self.is_world_process_zero():
            return
        token = token or self._hub_token or self.args.hub_token
        private = self.args.hub_private_repo if private is None else private
        name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        with pushing(name, token=token):
            retry(lambda: super(HubPushMixin, self).init_hf_repo(token, private), f"creating {name}", token=token)
        self._refuse_public(token, private)
        if (revision := self.args.hub_revision) is not None:
            api = HfApi(token=token)

            def create_branch() -> None:
                if not api.revision_exists(self.hub_model_id, revision):
                    api.create_branch(self.hub_model_id, branch=revision)

            with pushing(self.hub_model_id, token=token):
                retry(create_branch, f"the branch {revision}", token=token)
        if is_peft_model(self.model):
            base = self.model.peft_config[self.model.active_adapter].base_model_name_or_path
            if not base or os.path.isdir(base):
                logger.warning(
                    f"The base model of the adapter pushed to {self.hub_model_id} is {shown(base)}, which is not on the Hub, so the "
                    "adapter cannot be loaded on other machines. Push the base model and train from its model id."
                )
        left = sorted(Path(self.args.output_dir).glob(f"{SNAPSHOT}*"), key=lambda path: (len(path.name), path.name))
        if left:
            logger.warning(
                f"An earlier run did not push {', '.join(plain(str(path)) for path in left)}. To push one of them, which replaces the model on the "
                f"Hub, run `{self._upload_command('FOLDER', '.')}`. Otherwise, delete them."
            )

    def _refuse_public(self, token: str | None, private: bool | None) -> None:
        """Raise if `private` is requested but the repository is public. The Hub ignores `private` for existing repositories."""
        if not private:
            return
        api = HfApi(token=token)
        with pushing(self.hub_model_id, token=token):
            info = retry(lambda: api.model_info(self.hub_model_id), f"asking about {self.hub_model_id}", token=token)
        if not info.private:
            raise ValueError(
                f"You requested a private repository, but {self.hub_model_id} already exists and is public. Make it private in its "
                "settings on the Hub, or choose another `hub_model_id`."
            )

    def _send_telemetry(self):
        # TRL's trainers send telemetry to the Hub when they are created. This package uses the network only on request
        pass

    # The model card, and saving

    def _card_name(self) -> str:
        return Path(self.hub_model_id or self.args.hub_model_id or self.args.output_dir).absolute().name

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        license: str | None = None,
    ) -> None:
        """
        Write the model card of this run to `README.md` in `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model. Defaults to the name of its repository or folder.
            dataset_name (`str`, *optional*):
                Name of the training dataset. Defaults to `trainer.dataset_name`.
            tags (`str` or `list[str]`, *optional*):
                Tags to add to the default tags of this trainer.
            license (`str`, *optional*):
                License of the model, as an identifier of the Hub such as `"apache-2.0"`.
        """
        if not self.is_world_process_zero():
            return
        self._save_card(model_name or self._card_name(), dataset_name, tags, license)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        super()._save(output_dir, state_dict)
        self.create_model_card(model_name=self._card_name())  # after saving the model, to replace PEFT's card
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.parent.resolve() != Path(output_dir).resolve():
            shutil.copy(card, output_dir)

    # Pushes in the background

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # each rank writes its part of the checkpoint
        if not self.is_world_process_zero():
            return
        step = self.state.global_step
        running = any(not push.job.done() for push in self._pushes)
        if running and strategy != HubStrategy.ALL_CHECKPOINTS and not self.args.hub_always_push:
            self._skipped_pushes.append(step)
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint = Path(checkpoint_folder)
        snapshot = Path(self.args.output_dir, f"{SNAPSHOT}{step}")
        shutil.rmtree(snapshot, ignore_errors=True)  # left by a run that was killed
        _link_tree(checkpoint, snapshot, *TRAINING_STATE, *NEVER_PUSHED)
        if strategy != HubStrategy.EVERY_SAVE:
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            _link_tree(checkpoint, snapshot / name, *NEVER_PUSHED)
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        name = f"epoch {self.state.epoch:g}" if by_epoch else f"step {step}"
        job = self._submit(self._push_snapshot, snapshot, f"Training in progress, {name}")
        self._pushes.append(StepPush(step, checkpoint, snapshot, job))

    def _submit(self, function: Callable[..., CommitInfo], folder: Path, *args) -> "Future[CommitInfo]":
        """Queue a push. A failure is logged immediately, in case the training does not reach its end."""
        job = self._push_executor.submit(function, folder, *args)

        def log_failure(job):
            if (error := job.exception()) is not None:
                logger.error(one_line(f"Not pushed: {folder}. {error}"))

        job.add_done_callback(log_failure)
        return job

    def _push_snapshot(self, snapshot: Path, message: str) -> CommitInfo:
        # With `save_total_limit`, the snapshot can be the only copy of a checkpoint that the user wants on the Hub
        keep = self.args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        try:
            commit = self._push_folder(snapshot, message, self._hub_token, self.args.hub_revision)
            keep = False
            return commit
        finally:
            if not keep:
                shutil.rmtree(snapshot)

    def _push_folder(
        self, folder: Path, message: str, token: str | None, revision: str | None, ignore: Sequence[str] = ()
    ) -> CommitInfo:
        """Push the files of a folder in one commit, which also deletes the files of an earlier model that would be loaded instead."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = list(filter_repo_objects(files, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, *ignore]))
        if not any(file.endswith(".safetensors") for file in files):
            raise ValueError(
                f"{folder} contains only sharded weights, and no weights in the transformers format to push. Set "
                "`fsdp_state_dict_type: FULL_STATE_DICT` (FSDP) or `zero3_save_16bit_model: true` (DeepSpeed) to save the full "
                "weights."
            )

        patterns: tuple[str, ...] = ()  # an adapter in a subfolder, or a checkpoint, leaves everything as it is
        if "adapter_config.json" in files:
            patterns = REPLACED
        elif any(filter_repo_objects(files, allow_patterns=list(REPLACED_BY_FULL_MODEL))):
            patterns = REPLACED + REPLACED_BY_FULL_MODEL

        def attempt() -> CommitInfo:
            # `upload_folder` splits a large folder into several commits. Operations are created anew for each attempt: used
            # ones do not check which files are on the Hub, and would commit a second time what was already committed
            operations = [CommitOperationAdd(file, folder / file) for file in files]
            api = HfApi(library_name="trl_hrm", library_version=__version__)
            there = api.list_repo_files(self.hub_model_id, revision=revision, token=token)
            old = filter_repo_objects(sorted({*there} - {*files}), allow_patterns=patterns)
            operations += [CommitOperationDelete(file) for file in old if "/" not in file]
            return api.create_commit(
                self.hub_model_id, operations, commit_message=message, token=token, revision=revision
            )

        with pushing(self.hub_model_id, token=token):
            return retry(attempt, f"pushing {folder} to {self.hub_model_id}", token=token)

    def _finish_current_push(self) -> None:
        """Wait for the background pushes, then log which of them failed and which steps were skipped."""
        if any(not push.job.done() for push in self._pushes):
            logger.info(f"Waiting for the pushes to {self.hub_model_id} to finish.")
        for push in self._pushes:
            if (error := push.job.exception()) is None:
                continue
            if push.snapshot.exists():
                # only the checkpoint subfolder: the model next to it would replace a later one on the Hub
                folder, name = push.snapshot / push.checkpoint.name, push.checkpoint.name
                left = f"Its files are in {push.snapshot}. Push them with `{self._upload_command(folder, name)}`."
            elif push.checkpoint.exists():
                left = f"Its weights are in {push.checkpoint}."
            else:
                left = "Its checkpoint was deleted because of `save_total_limit`."
            logger.error(
                f"Step {push.step} was not pushed to the Hub ({self.hub_model_id}): {one_line(str(error))} {plain(left)} The training was not affected. "
                "To push the final weights, call `push_to_hub()`."
            )
        if self._skipped_pushes:
            logger.warning(
                f"Steps not pushed to {self.hub_model_id}, because the push of an earlier step was still running: "
                f"{', '.join(map(str, self._skipped_pushes))}. To push every step, set `hub_always_push=True`."
            )
        self._pushes, self._skipped_pushes = [], []  # report each only once

    def _upload_command(self, folder: "str | Path", path_in_repo: str) -> str:
        revision = [] if self.args.hub_revision is None else ["--revision", self.args.hub_revision]
        return " ".join(map(shell_word, ["hf", "upload", self.hub_model_id, str(folder), path_in_repo, *revision]))

    # Push at the end of training

    def push_to_hub(
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """
        Save the model to `output_dir` and push this folder without its checkpoints.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Commit message.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until the push is done. If `False`, do not change the folder or end the process before the
                returned `Future` is done.
            token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*):
                Token, branch, and whether a new repository is private. Default to the arguments of the trainer.
            kwargs:
                Additional arguments for `create_model_card`, such as `license`.

        Returns:
            [`~huggingface_hub.CommitInfo`], or a `Future` of it if `blocking=False`. `None` on all processes except the main
            process.

        Raises:
            [`PushError`]: If the push fails. The model is still saved in `output_dir`.
            `ValueError`: If a private repository is requested, but the repository is public.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token or self._hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        else:
            self._refuse_public(token, self.args.hub_private_repo if private is None else private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = {*([tags] if isinstance(tags, str) else tags), *(getattr(self.model, "model_tags", None) or [])}
        self.create_model_card(**{"model_name": self._card_name(), **kwargs}, tags=sorted(tags))
        self._finish_current_push()
        folder = Path(self.args.output_dir)
        target = (commit_message, token, revision or self.args.hub_revision, ("_*", "checkpoint-*", *NEVER_PUSHED))
        return self._push_folder(folder, *target) if blocking else self._submit(self._push_folder, folder, *target)


def _without_tokens(args: TrainingArguments) -> TrainingArguments:
    """
    Return the arguments, or a copy without tokens if there are any: Trainer saves its arguments with the model, and
    callbacks log them.
    """
    secret = {"hub_token": None} if args.hub_token is not None else {}
    for name in ("model_init_kwargs", "ref_model_init_kwargs"):
        given = getattr(args, name, None)
        if given and "token" in given:
            secret[name] = {key: value for key, value in given.items() if key != "token"}
    if secret:
        args = copy(args)
        vars(args).update(secret)
    return args


def _link_tree(source: Path, target: Path, *ignored: str) -> None:
    """Copy a folder with hard links where the file system supports them, which takes no time and no space."""
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(*ignored))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
