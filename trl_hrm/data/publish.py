"""
Built datasets to the Hub, as configurations of one repository.

All rows are uploaded first; one commit then shows them, with the card, and removes what they replace. So who loads the dataset
meanwhile, or after a push that failed anywhere, gets the old one or the new one, whole.
"""

import re
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets.utils.py_utils import convert_file_size_to_int
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, HfApi, hf_hub_url
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, tqdm, validate_repo_id

from ..hub import PushError, pushing, retry
from .publish_card import Config, check_others, merge_card, warn_of_licenses
from .publish_config import PushDatasetConfig
from .publish_shards import CARD_FILE, Build, File, dataset_info, group_sizes, published_files, read_build


BATCH = 1 << 30  # bytes that are uploaded together
UPLOAD_TRIES = 3  # the clients try for minutes themselves


@dataclass
class DatasetPush:
    """
    What a push of a dataset did or, with `dry_run`, would do.

    Args:
        repo_id (`str`):
            The repository.
        revision (`str`):
            The branch.
        configs (`list[str]`):
            The configurations.
        dry_run (`bool`):
            Whether nothing was done.
        private (`bool`, *optional*):
            The visibility that was asked for.
        card (`str`, *optional*):
            In a dry run, the card that a new repository would get.
        commit (`str`, *optional*):
            The commit that holds the dataset. `None` in a dry run.
        url (`str`, *optional*):
            Where to see it.
        sent (`dict[str, int]`):
            Files that were new or other than those of the repository, with their bytes. In a dry run, all files.
        deleted (`list[str]`):
            Files of the configurations that were there before and belong to them no more.
        unchanged (`dict[str, int]`):
            Files that were there already.
    """

    repo_id: str
    revision: str
    configs: list[str]
    dry_run: bool
    private: bool | None = None
    card: str | None = None
    commit: str | None = None
    url: str | None = None
    sent: dict[str, int] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    unchanged: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """The push in a few lines, one for each file that it changes."""
        lines = [f"send       {path}  ({_size(size)})" for path, size in self.sent.items()]
        lines += [f"delete     {path}" for path in self.deleted]
        if self.unchanged:
            lines.append(f"unchanged  {len(self.unchanged)} files ({_size(sum(self.unchanged.values()))})")
        total = f"{len(self.sent)} files, {_size(sum(self.sent.values()))}"
        names = ", ".join(self.configs)
        if self.dry_run:
            visible = {None: "what the Hub makes it by default", True: "private", False: "public"}[self.private]
            lines += ["", f"{CARD_FILE} of a new repository:", "", self.card or "", ""]
            lines.append(
                f"Dry run: nothing was sent, and the Hub was not asked. A push of {names} to {self.repo_id}, branch {self.revision}, "
                f"sends at most {total}: files that are there already are not sent again. A new repository would be {visible}. Only "
                "the push itself finds out whether the repository exists and is visible as asked, which files of earlier pushes it "
                "deletes, and whether the existing card and files fit. An existing card keeps everything but the parts of these "
                "configurations."
            )
        elif self.sent or self.deleted:
            lines.append(f"Pushed {names} to {self.repo_id}: {total}. {self.url}")
        else:
            lines.append(f"{names} is on {self.repo_id} as it is here: nothing to send. {self.url}")
        return "\n".join(lines)


def _size(size: int) -> str:
    return f"{tqdm.format_sizeof(size)}B"


@dataclass
class _Plan:
    """What lies between a commit and the dataset as it shall be."""

    head: str | None
    wanted: list[File]
    add: list[File]
    delete: list[str]


def push_dataset(config: PushDatasetConfig, token: str | None = None) -> DatasetPush:
    """
    Push built datasets to a repository on the Hub, each as a configuration: `load_dataset("me/prm800k", "hrm")`.

    What is there already is not sent again, and a push without a change makes no commit. Rate limits, trouble of the Hub, cut
    connections and other pushes at the same time are met with pauses and further tries.

    Args:
        config ([`PushDatasetConfig`]):
            The folders, the repository, and the options.
        token (`str`, *optional*):
            A token that may write. By default that of `HF_TOKEN` or of `hf auth login`.

    Returns:
        [`DatasetPush`]: What was sent, deleted, and there already.

    Raises:
        [`~hub.PushError`]: If the Hub or the way to it fails.
        `ValueError`: If a folder is not a whole build, two folders have one name, or the repository is public where a private one is
            asked for, or the other way around.

    Example:

    ```python
    >>> from trl_hrm import PushDatasetConfig, push_dataset
    >>> print(push_dataset(PushDatasetConfig(inputs="data/prm800k-hrm", repo_id="me/prm800k", private=True)))
    ```
    """
    if not config.inputs:
        raise ValueError("no folder was given, expected at least one that a builder wrote.")
    if config.config_name is not None and len(config.inputs) != 1:
        raise ValueError(
            f"config_name is {config.config_name!r} for {len(config.inputs)} folders. Push them one by one, each with its own."
        )
    builds: dict[str, Build] = {}
    for folder in config.inputs:
        build = read_build(folder, config.config_name)
        if build.name in builds:
            raise ValueError(
                f"{build.folder} and {builds[build.name].folder} have the view {build.name} both, and a repository has one "
                "configuration of a name. Push them one by one, with --config_name (`config_name=`)."
            )
        builds[build.name] = build
    validate_repo_id(config.repo_id)
    if "/" not in config.repo_id:
        raise ValueError(
            f"repo_id is {config.repo_id!r}, expected the name of a user or an organisation too, as in 'me/{config.repo_id}'."
        )
    size = config.max_shard_size
    max_bytes = int(size) if re.fullmatch(r"-?\d+", size) else convert_file_size_to_int(size)
    if max_bytes < 1:
        raise ValueError(f"max_shard_size is {size}, expected a size as in '500MB', or a number of bytes.")
    with tempfile.TemporaryDirectory() as work:
        what = (config, token, Path(work), list(builds.values()), max_bytes)
        if config.dry_run:
            return _Push(*what).dry_run()
        with pushing(config.repo_id, "dataset", token):
            return _Push(*what).run()


class _Push:
    """
    One push: the stages of `run`, each of which can be tried again.

    The commit is built here and not by `HfApi.upload_folder`, which commits a large folder in several parts, and without the files
    that a `.gitignore` of the repository names.
    """

    def __init__(
        self, config: PushDatasetConfig, token: str | None, work: Path, builds: list[Build], max_shard_size: int
    ):
        self.api = HfApi(token=token)
        self.repo_id = config.repo_id
        self.revision = config.revision
        self.private = config.private
        self.token = token
        self.card = work / CARD_FILE
        self.files: list[File] = []
        self.configs = []
        for build in builds:
            files = published_files(build, max_shard_size, work / build.name)
            self.configs.append(Config(build, dataset_info(build, files)))
            self.files += files
        self.operations: dict[str, CommitOperationAdd] = {}
        names = [build.name for build in builds]
        self.result = DatasetPush(self.repo_id, self.revision, names, config.dry_run, self.private)

    def run(self) -> DatasetPush:
        head = self._retry(self._open, "opening the repository")
        plan = self._retry(partial(self._plan, head), "reading the repository")
        self._retry(partial(self._check_card, plan.add), "checking the card")
        self._retry(partial(self._upload, plan.add), "uploading", max_tries=UPLOAD_TRIES)
        plan = self._retry(self._commit, "committing")
        self._retry(partial(self._verify, plan), "reading back what was pushed")
        warn_of_licenses(self.card.read_text(encoding="utf-8"), self.repo_id, self.configs)
        self.result.commit = plan.head
        self.result.url = f"{self.api.endpoint}/datasets/{self.repo_id}/tree/{self.revision}"
        return self.result

    def dry_run(self) -> DatasetPush:
        """What a push would send at most, without asking the Hub."""
        plan = self._plan(None)
        self._note(plan)
        self.result.card = self.card.read_text(encoding="utf-8")
        warn_of_licenses(self.result.card, self.repo_id, self.configs)
        return self.result

    def _retry(self, attempt, what: str, **options):
        return retry(attempt, f"{self.repo_id}: {what}", token=self.token, **options)

    def _open(self) -> str:
        """The commit to begin from, of a repository and a branch that are made if they are missing."""
        try:
            self._check_private(self.api.dataset_info(self.repo_id))
        except RepositoryNotFoundError:
            # the Hub ignores `private` if another process was quicker: what came of it is checked below
            self.api.create_repo(self.repo_id, repo_type="dataset", private=self.private, exist_ok=True)
            self._check_private(self.api.dataset_info(self.repo_id))
        try:
            return self._head()
        except RevisionNotFoundError:
            self.api.create_branch(self.repo_id, repo_type="dataset", branch=self.revision, exist_ok=True)
            return self._head()

    def _head(self) -> str:
        return self.api.dataset_info(self.repo_id, revision=self.revision).sha

    def _check_private(self, info) -> None:
        if self.private is not None and info.private != self.private:
            is_, asked = ("private", "public") if info.private else ("public", "private")
            raise ValueError(
                f"{self.repo_id} is {is_}, and a {asked} repository was asked for: a push does not change that, and nothing was "
                f"sent. Make it {asked} in its settings on the Hub, or push to another."
            )

    def _plan(self, head: str | None) -> _Plan:
        tree = self._tree(head) if head else {}
        existing = None
        if CARD_FILE in tree:
            url = hf_hub_url(self.repo_id, CARD_FILE, repo_type="dataset", revision=head, endpoint=self.api.endpoint)
            response = get_session().get(url, headers=build_hf_headers(token=self.token))
            hf_raise_for_status(response)
            existing = response.content.decode("utf-8-sig")
        self.card.write_bytes(merge_card(existing, self.repo_id, self.configs).encode())
        wanted = [*self.files, File(CARD_FILE, self.card)]
        paths = {file.path for file in wanted}
        others = [path for path in tree if path not in paths and not self._is_rows(path)]
        check_others(existing, self.repo_id, others, self.result.configs)
        return _Plan(
            head=head,
            wanted=wanted,
            add=[file for file in wanted if not _is_there(file, tree)],
            delete=[path for path in tree if self._is_rows(path) and path not in paths],
        )

    def _tree(self, commit: str) -> dict[str, RepoFile]:
        entries = self.api.list_repo_tree(self.repo_id, repo_type="dataset", revision=commit, recursive=True)
        return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}

    def _is_rows(self, path: str) -> bool:
        """Whether `load_dataset` would read a file as rows of a configuration that is pushed."""
        folder, _, name = path.rpartition("/")
        return name.endswith(".parquet") and folder in self.result.configs

    def _check_card(self, files: list[File]) -> None:
        """Have the Hub check the card's metadata, as it does at the commit: before the rows are sent, not after."""
        if all(file.local != self.card for file in files):
            return
        try:
            DatasetCard.load(self.card).validate()
        except ValueError as error:
            raise ValueError(
                f"the Hub refuses the metadata of {CARD_FILE}, which is made of that of {self.repo_id} and of the folders: {error}. "
                "Nothing was pushed. Mend it where it comes from, then push again."
            ) from error

    def _upload(self, files: list[File]) -> None:
        """Send the rows, which nobody sees yet, and ask whether the Hub takes the rest."""
        total = sum(file.size for file in files)
        with tqdm(
            total=total, desc=f"{self.repo_id}: {len(files)} files", unit="B", unit_scale=True, disable=not files
        ) as bar:
            for indices in group_sizes([file.size for file in files], BATCH):
                batch = [files[i] for i in indices]
                operations = [self._operation(file) for file in batch]
                self.api.preupload_lfs_files(
                    self.repo_id, operations, repo_type="dataset", revision=self.revision, free_memory=False
                )
                if ignored := [operation.path_in_repo for operation in operations if operation._should_ignore]:
                    raise ValueError(
                        f"{self.repo_id}: its .gitignore names {', '.join(ignored)}, so the Hub would leave that out. Nothing was "
                        "pushed. Mend the .gitignore, then push again."
                    )
                bar.update(sum(file.size for file in batch))

    def _operation(self, file: File) -> CommitOperationAdd:
        """The upload of a file. Of rows, it remembers that they have arrived."""
        if not file.path.endswith(".parquet"):
            return CommitOperationAdd(file.path, str(file.local))
        if file.path not in self.operations:
            self.operations[file.path] = CommitOperationAdd(file.path, str(file.local))
        return self.operations[file.path]

    def _commit(self) -> _Plan:
        """
        Make the one commit, unless nothing is left to change. The plan is made anew: another push may have come between, or an
        earlier try of this one may have landed though its answer was lost.
        """
        plan = self._plan(self._head())
        self._note(plan)
        if plan.add or plan.delete:
            operations = [CommitOperationDelete(path) for path in plan.delete]
            operations += [self._operation(file) for file in plan.add]
            commit = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=f"Push {', '.join(self.result.configs)} with trl_hrm",
                repo_type="dataset",
                revision=self.revision,
                parent_commit=plan.head,
            )
            plan.head = commit.oid
        return plan

    def _note(self, plan: _Plan) -> None:
        """Tell what is sent, of all tries together."""
        self.result.sent.update({file.path: file.size for file in plan.add})
        self.result.deleted = list(dict.fromkeys([*self.result.deleted, *plan.delete]))
        self.result.unchanged = {file.path: file.size for file in plan.wanted if file.path not in self.result.sent}

    def _verify(self, plan: _Plan) -> None:
        tree = self._tree(plan.head)
        missing = [file.path for file in plan.wanted if not _is_there(file, tree)]
        stale = [path for path in plan.delete if path in tree]
        if missing or stale:
            raise PushError(
                f"the commit {plan.head} of {self.repo_id} is not what was pushed: other or missing are {missing}, and still there "
                f"are {stale}. Push again; if that does not help, look for a .gitignore in the repository that names these files."
            )
        private = self.api.dataset_info(self.repo_id).private
        if self.private is not None and private != self.private:
            raise PushError(
                f"{self.repo_id} became {'private' if private else 'public'} while {plan.head} was pushed to it. Set in its "
                "settings on the Hub who may see it."
            )


def _is_there(file: File, tree: dict[str, RepoFile]) -> bool:
    entry = tree.get(file.path)
    if entry is None or entry.size != file.size:
        return False
    return entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == file.blob
