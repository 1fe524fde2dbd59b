"""
Push built datasets to the Hub, as configurations of one repository.

All rows are uploaded first. A single commit then adds them and the card, and removes the files they replace. Readers therefore
always see a complete version of the dataset, the old one or the new one, during a push and after a failed one.
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
from ..io import shown
from .publish_card import Config, check_others, merge_card, warn_of_licenses, warn_of_paths
from .publish_config import PushDatasetConfig
from .publish_shards import CARD_FILE, Build, File, dataset_info, group_sizes, published_files, read_build


BATCH = 1 << 30  # bytes per upload batch
UPLOAD_TRIES = 3  # few, because the upload clients already retry for minutes


@dataclass
class DatasetPush:
    """
    Result of [`push_dataset`]: what it did or, with `dry_run`, what it would do.

    Args:
        repo_id (`str`):
            Dataset repository.
        revision (`str`):
            Branch.
        configs (`list[str]`):
            Pushed dataset configurations.
        dry_run (`bool`):
            Whether this was a dry run.
        private (`bool`, *optional*):
            Requested visibility of the repository.
        card (`str`, *optional*):
            In a dry run, the card of a new repository.
        commit (`str`, *optional*):
            Commit that contains the dataset. `None` in a dry run.
        url (`str`, *optional*):
            URL of the dataset. `None` in a dry run.
        sent (`dict[str, int]`):
            Size in bytes of each new or changed file. In a dry run, of all files.
        deleted (`list[str]`):
            Old files of the configurations that were deleted.
        unchanged (`dict[str, int]`):
            Size in bytes of each file that was already in the repository.
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
        """Return a summary with one line per changed file."""
        lines = [f"upload     {path}  ({_size(size)})" for path, size in self.sent.items()]
        lines += [f"delete     {path}" for path in self.deleted]
        if self.unchanged:
            lines.append(f"unchanged  {len(self.unchanged)} files ({_size(sum(self.unchanged.values()))})")
        total = f"{len(self.sent)} files, {_size(sum(self.sent.values()))}"
        names = ", ".join(self.configs)
        if self.dry_run:
            visible = {None: "have the default visibility of the Hub", True: "be private", False: "be public"}[
                self.private
            ]
            lines += ["", f"{CARD_FILE} of a new repository:", "", self.card or "", ""]
            lines.append(
                f"Dry run: nothing was uploaded, and the Hub was not contacted. A push of {names} to {self.repo_id}, branch "
                f"{self.revision}, uploads at most {total}, since files that are already there are skipped. A new repository would "
                f"{visible}. Only a real push checks whether the repository exists and has the requested visibility, which old files "
                "to delete, and whether the existing card and files are compatible. In an existing card, only the parts of these "
                "configurations are replaced."
            )
        elif self.sent or self.deleted:
            lines.append(f"Pushed {names} to {self.repo_id}: {total}. {self.url}")
        else:
            lines.append(f"{names} on {self.repo_id} is already up to date. {self.url}")
        return "\n".join(lines)


def _size(size: int) -> str:
    return f"{tqdm.format_sizeof(size)}B"


@dataclass
class _Plan:
    """Changes that turn a commit into the new version of the dataset."""

    head: str | None
    wanted: list[File]
    add: list[File]
    delete: list[str]


def push_dataset(config: PushDatasetConfig, token: str | None = None) -> DatasetPush:
    """
    Push built datasets to a repository on the Hub, each as a configuration that `load_dataset("me/prm800k", "hrm")` can load.

    Files that are already in the repository are not uploaded again, and a push without changes creates no commit. The push is
    retried with pauses after rate limits, Hub errors, lost connections and concurrent pushes.

    Args:
        config ([`PushDatasetConfig`]):
            Folders, repository and options of the push.
        token (`str`, *optional*):
            Token with write access. Defaults to `HF_TOKEN` or the token of `hf auth login`.

    Returns:
        [`DatasetPush`]: Files that were uploaded, deleted and unchanged.

    Raises:
        [`~hub.PushError`]: If the Hub or the connection to it fails.
        `ValueError`: If a folder is not a complete build, two folders have the same configuration name, or the repository does not
            have the requested visibility.

    Example:

    ```python
    >>> from trl_hrm import PushDatasetConfig, push_dataset
    >>> print(push_dataset(PushDatasetConfig(inputs="data/prm800k-hrm", repo_id="me/prm800k", private=True)))
    ```
    """
    if not config.inputs:
        raise ValueError("`inputs` is empty. Pass at least one folder written by a builder.")
    if config.config_name is not None and len(config.inputs) != 1:
        raise ValueError(
            f"`config_name` is {shown(config.config_name)}, but there are {len(config.inputs)} folders. Push each folder separately, with its "
            "own `config_name`."
        )
    builds: dict[str, Build] = {}
    for folder in config.inputs:
        build = read_build(folder, config.config_name)
        if build.name in builds:
            raise ValueError(
                f"{build.folder} and {builds[build.name].folder} both have the view {build.name}, but configuration names must be "
                "unique. Push them separately, each with its own `config_name`."
            )
        builds[build.name] = build
        warn_of_paths(build)
    validate_repo_id(config.repo_id)
    if "/" not in config.repo_id:
        raise ValueError(
            f"`repo_id` is {shown(config.repo_id)}. It must include a user or organization, such as 'me/{config.repo_id}'."
        )
    size = config.max_shard_size
    max_bytes = int(size) if re.fullmatch(r"-?\d+", size) else convert_file_size_to_int(size)
    if max_bytes < 1:
        raise ValueError(f"`max_shard_size` is {size}. It must be a size such as '500MB', or a number of bytes.")
    with tempfile.TemporaryDirectory() as work:
        what = (config, token, Path(work), list(builds.values()), max_bytes)
        if config.dry_run:
            return _Push(*what).dry_run()
        with pushing(config.repo_id, "dataset", token):
            return _Push(*what).run()


class _Push:
    """
    One push. Each stage of `run` can be retried.

    It does not use `HfApi.upload_folder`, which splits a large folder into several commits and skips the files that a `.gitignore`
    of the repository matches.
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
        """Return the most that a push would upload, without contacting the Hub."""
        plan = self._plan(None)
        self._note(plan)
        self.result.card = self.card.read_text(encoding="utf-8")
        warn_of_licenses(self.result.card, self.repo_id, self.configs)
        return self.result

    def _retry(self, attempt, what: str, **options):
        return retry(attempt, f"{self.repo_id}: {what}", token=self.token, **options)

    def _open(self) -> str:
        """Create the repository and the branch if they do not exist, and return the current commit."""
        try:
            self._check_private(self.api.dataset_info(self.repo_id))
        except RepositoryNotFoundError:
            # The Hub ignores `private` if another process created the repository first, so it is checked again
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
                f"{self.repo_id} is {is_}, but a {asked} repository was requested. Nothing was uploaded. Make it {asked} in its "
                "settings on the Hub, or push to another repository."
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
        """Return whether `load_dataset` would read a file as rows of a pushed configuration."""
        folder, _, name = path.rpartition("/")
        return name.endswith(".parquet") and folder in self.result.configs

    def _check_card(self, files: list[File]) -> None:
        """Let the Hub validate the card's metadata before the rows are uploaded. Otherwise only the final commit would fail."""
        if all(file.local != self.card for file in files):
            return
        try:
            DatasetCard.load(self.card).validate()
        except ValueError as error:
            raise ValueError(
                f"the Hub rejects the metadata of {CARD_FILE}, which is merged from the cards of {self.repo_id} and of the folders: "
                f"{error}. Nothing was pushed. Correct the card with the invalid metadata, then push again."
            ) from error

    def _upload(self, files: list[File]) -> None:
        """Upload the rows, which are not visible before the commit, and check that the Hub accepts the other files."""
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
                        f"{self.repo_id}: its .gitignore matches {', '.join(ignored)}, so the Hub would ignore these files. Nothing was "
                        "pushed. Change the .gitignore, then push again."
                    )
                bar.update(sum(file.size for file in batch))

    def _operation(self, file: File) -> CommitOperationAdd:
        """Return the upload operation of a file. Operations of Parquet files are cached, since they record a finished upload."""
        if not file.path.endswith(".parquet"):
            return CommitOperationAdd(file.path, str(file.local))
        if file.path not in self.operations:
            self.operations[file.path] = CommitOperationAdd(file.path, str(file.local))
        return self.operations[file.path]

    def _commit(self) -> _Plan:
        """
        Create the commit if there are changes. The plan is recomputed first, because another push may have finished in the meantime,
        or an earlier attempt may have succeeded although its response was lost.
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
        """Add the files of the plan to the result. Those of earlier attempts stay, since their commit may have succeeded."""
        self.result.sent.update({file.path: file.size for file in plan.add})
        self.result.deleted = list(dict.fromkeys([*self.result.deleted, *plan.delete]))
        self.result.unchanged = {file.path: file.size for file in plan.wanted if file.path not in self.result.sent}

    def _verify(self, plan: _Plan) -> None:
        tree = self._tree(plan.head)
        missing = [file.path for file in plan.wanted if not _is_there(file, tree)]
        stale = [path for path in plan.delete if path in tree]
        if missing or stale:
            raise PushError(
                f"the commit {plan.head} of {self.repo_id} does not match what was pushed. Missing or different files: {missing}. Files "
                f"that were not deleted: {stale}. Push again. If this does not help, check whether a .gitignore in the repository "
                "matches these files."
            )
        private = self.api.dataset_info(self.repo_id).private
        if self.private is not None and private != self.private:
            raise PushError(
                f"{self.repo_id} became {'private' if private else 'public'} during the push of {plan.head}. Check its visibility in "
                "its settings on the Hub."
            )


def _is_there(file: File, tree: dict[str, RepoFile]) -> bool:
    entry = tree.get(file.path)
    if entry is None or entry.size != file.size:
        return False
    return entry.lfs.sha256 == file.sha256 if entry.lfs else entry.blob_id == file.blob
