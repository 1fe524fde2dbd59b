"""Pushes of a trainer: each commit holds the weights of the step it names, whole, and none fails in silence."""

import os
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy, SaveStrategy

from .. import __version__
from ..hub import pushing, retry


logger = get_logger(__name__)

SNAPSHOT = "_push-step-"  # and the step: a folder in the output folder, from where what begins with "_" is not pushed
# What a checkpoint holds beside the model so that training can go on
TRAINING_STATE = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
)
# A pickle, which holds paths of this machine. The model card tells the settings.
NEVER_PUSHED = ("training_args.bin",)


@dataclass(frozen=True)
class StepPush:
    """A push in the background: of the checkpoint of `step`, from the files in `snapshot`."""

    step: int
    checkpoint: Path
    snapshot: Path
    job: "Future[CommitInfo]"


class HubPushMixin:
    """
    `push_to_hub` and `hub_strategy` for a [`~transformers.Trainer`], which comes after it among the bases.

    Differs from the Trainer's own pushes in this:

    - A checkpoint is pushed from a snapshot (hard links) made when it is saved, in one commit, so that the commit holds the
      weights of the step that it names, however slow the Hub is, and a reader never sees half of it. Until it is pushed, it
      takes the space of the checkpoint, also of one that `save_total_limit` deletes.
    - `hub_strategy="all_checkpoints"` pushes every checkpoint, one after another. `"every_save"` and `"checkpoint"` skip one
      that is saved while a push runs, unless `hub_always_push=True`, and name it at the end of the training.
    - Pushes are tried again where a fault may pass. One that fails in the background is logged as an error, at once and at the
      end of the training; [`HubPushMixin.push_to_hub`] raises [`PushError`].
    - The model card and the tokenizer are in every folder that is saved and in every commit.
    - `hub_token`, and a `token` in `model_init_kwargs`, are in no saved file and no log: where one is given, the trainer works
      with a copy of its arguments that lacks it.
    - The branch that `hub_revision` names is made if there is none.

    A subclass names the arguments that its model card shows (`_card_settings`), and the function that writes the card (`_save_card`).

    Attributes:
        dataset_name (`str` or `None`):
            Dataset that the model card names: set it before the training, and the cards of checkpoints name it too.
    """

    dataset_name: str | None = None
    _card_settings: tuple[str, ...]

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
            # Also if it stops with an error: what failed is told, the Hub gets what waits (at the exit of the interpreter an
            # upload fails), and no push reads a checkpoint that the next training writes again
            self._finish_current_push()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        Create the repository, and the branch that `hub_revision` names, if there is none yet.

        Raises:
            [`PushError`]: If it cannot be created.
            `ValueError`: If it shall be private, but exists and is public.
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
                    f"The adapter pushed to {self.hub_model_id} names {base!r} as its base model, which is not on the Hub, so it "
                    "loads on this machine at most. To share it, push the base model, and train from its id."
                )
        left = sorted(Path(self.args.output_dir).glob(f"{SNAPSHOT}*"), key=lambda path: (len(path.name), path.name))
        if left:
            logger.warning(
                f"An earlier run did not push {', '.join(map(str, left))}. `{self._upload_command('FOLDER', '.')}` pushes one, in "
                "place of the model that is there. Delete what you do not need."
            )

    def _refuse_public(self, token: str | None, private: bool | None) -> None:
        """The Hub ignores the wish for a repository that exists."""
        if not private:
            return
        api = HfApi(token=token)
        with pushing(self.hub_model_id, token=token):
            info = retry(lambda: api.model_info(self.hub_model_id), f"asking about {self.hub_model_id}", token=token)
        if not info.private:
            raise ValueError(
                f"A private repository is asked for, but {self.hub_model_id} exists and is public, so the weights would be too. "
                "Make it private in its settings on the Hub, or choose another `hub_model_id`."
            )

    def _send_telemetry(self):
        # TRL's trainers report to the Hub when they are made; this package uses no network unless asked
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
        Write the model card, from facts of this run, as `README.md` in `output_dir`.

        Args:
            model_name (`str`, *optional*):
                Name of the model. By default that of its repository or folder.
            dataset_name (`str`, *optional*):
                Dataset it was trained on. By default `trainer.dataset_name`.
            tags (`str` or `list[str]`, *optional*):
                Tags in addition to those of this trainer.
            license (`str`, *optional*):
                License of the model, as the Hub abbreviates it.
        """
        if not self.is_world_process_zero():
            return
        self._save_card(model_name or self._card_name(), dataset_name, tags, license)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = self.args.output_dir if output_dir is None else output_dir
        super()._save(output_dir, state_dict)
        self.create_model_card(model_name=self._card_name())  # after the model: PEFT writes a card of its own
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.parent.resolve() != Path(output_dir).resolve():
            shutil.copy(card, output_dir)

    # In the background

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
        shutil.rmtree(snapshot, ignore_errors=True)  # of a run that was killed
        _link_tree(checkpoint, snapshot, *TRAINING_STATE, *NEVER_PUSHED)
        if strategy != HubStrategy.EVERY_SAVE:
            name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
            _link_tree(checkpoint, snapshot / name, *NEVER_PUSHED)
        by_epoch = self.args.save_strategy == SaveStrategy.EPOCH
        name = f"epoch {self.state.epoch:g}" if by_epoch else f"step {step}"
        job = self._submit(self._push_snapshot, snapshot, f"Training in progress, {name}")
        self._pushes.append(StepPush(step, checkpoint, snapshot, job))

    def _submit(self, function: Callable[..., CommitInfo], folder: Path, *args) -> "Future[CommitInfo]":
        """Push after those that are under way. A failure is logged when it happens: the training may not come to its end."""
        job = self._push_executor.submit(function, folder, *args)

        def log_failure(job):
            if (error := job.exception()) is not None:
                logger.error(f"Not pushed: {folder}. {error}")

        job.add_done_callback(log_failure)
        return job

    def _push_snapshot(self, snapshot: Path, message: str) -> CommitInfo:
        # With `save_total_limit`, the snapshot may be all that is left of a checkpoint that the user wants on the Hub
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
        """Push the files of a folder in one commit."""
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        files = list(filter_repo_objects(files, ignore_patterns=[*DEFAULT_IGNORE_PATTERNS, *ignore]))
        if not any(file.endswith(".safetensors") for file in files):
            raise ValueError(
                f"{folder} holds no weights in the format of transformers to push, only parts of them per process. Have them "
                "gathered when they are saved: `fsdp_state_dict_type: FULL_STATE_DICT` with FSDP, "
                "`zero3_save_16bit_model: true` with DeepSpeed."
            )

        def attempt() -> CommitInfo:
            # Not `upload_folder`, which commits a large folder in several parts. New operations each time: used ones do not ask
            # what is on the Hub, and would commit again what has landed
            operations = [CommitOperationAdd(file, folder / file) for file in files]
            return HfApi(library_name="trl_hrm", library_version=__version__).create_commit(
                self.hub_model_id, operations, commit_message=message, token=token, revision=revision
            )

        with pushing(self.hub_model_id, token=token):
            return retry(attempt, f"pushing {folder} to {self.hub_model_id}", token=token)

    def _finish_current_push(self) -> None:
        """Wait for the pushes in the background. Then tell which failed, and which steps were not pushed at all."""
        if any(not push.job.done() for push in self._pushes):
            logger.info(f"Waiting for the pushes to {self.hub_model_id} to finish.")
        for push in self._pushes:
            if (error := push.job.exception()) is None:
                continue
            if push.snapshot.exists():
                # not the model beside it, which would replace a later one
                folder, name = push.snapshot / push.checkpoint.name, push.checkpoint.name
                left = f"Its files are in {push.snapshot}: push them with `{self._upload_command(folder, name)}`."
            elif push.checkpoint.exists():
                left = f"Its weights are in {push.checkpoint}."
            else:
                left = "Its checkpoint is deleted, as `save_total_limit` asks."
            logger.error(
                f"Step {push.step} is not on the Hub ({self.hub_model_id}): {error} {left} The training went on; `push_to_hub()` "
                "pushes its final weights."
            )
        if self._skipped_pushes:
            logger.warning(
                f"Steps not pushed to {self.hub_model_id}, because the push of an earlier one was still running: "
                f"{', '.join(map(str, self._skipped_pushes))}. To push every one, set `hub_always_push=True`."
            )
        self._pushes, self._skipped_pushes = [], []  # each is told once

    def _upload_command(self, folder: "str | Path", path_in_repo: str) -> str:
        revision = [] if self.args.hub_revision is None else ["--revision", self.args.hub_revision]
        return shlex.join(["hf", "upload", self.hub_model_id, str(folder), path_in_repo, *revision])

    # At the end

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
        Save the model in `output_dir`, and push this folder, without its checkpoints.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Message of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to wait until it is pushed. If not, leave the folder as it is, and the process alive, until the returned
                `Future` is done.
            token (`str`, *optional*), revision (`str`, *optional*), private (`bool`, *optional*):
                Token, branch, and whether a new repository is private. By default as the arguments of the trainer say.
            kwargs:
                Passed to `create_model_card`, for example `license`.

        Returns:
            [`~huggingface_hub.CommitInfo`], without `blocking` a `Future` of it; `None` on all processes but the first.

        Raises:
            [`PushError`]: If the push fails. The model is in `output_dir`.
            `ValueError`: If the repository shall be private, but is public.
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
    """A copy without tokens, if there are any: the Trainer pickles its arguments beside the model, and callbacks log them."""
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
    """The files of a folder again, under another name: no time and no space, where the file system has hard links."""
    shutil.copytree(source, target, copy_function=_link, ignore=shutil.ignore_patterns(*ignored))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
