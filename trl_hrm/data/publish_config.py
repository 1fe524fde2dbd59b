from dataclasses import dataclass, field

from ..config import Config


@dataclass(kw_only=True)
class PushDatasetConfig(Config):
    """
    Configuration of [`push_dataset`].

    Args:
        inputs (`list[str]`):
            Folders of `trl-hrm build-prm800k`, `build-math-shepherd`, `build-stepwise`, `build-grid`, `export` or `select-raft`.
        repo_id (`str`):
            Dataset repository, such as `"me/prm800k"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether the repository must be private. If an existing repository does not match, the push fails before anything is
            uploaded. By default, the Hub decides for a new repository, and an existing one keeps its visibility.
        config_name (`str`, *optional*):
            Name of the dataset configuration. Only for a single folder. Defaults to its view: `"tree"`, `"hrm"`, `"prm"`, `"orm"`,
            `"sft"` or `"raft"`, or to its kind of puzzle: `"sudoku"`, `"maze"` or `"arc"`.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch to push to. It is created if it does not exist.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`):
            Maximum size of a shard. Larger files are split between row groups.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to only check the folders and return the files and the card that would be uploaded. The Hub is not contacted, so
            the state of the repository is unknown.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Folders of `trl-hrm build-prm800k`, `build-math-shepherd`, `build-stepwise`, `build-grid`, `export` or `select-raft`.",
            "metavar": "FOLDER",
            "positional": True,
        }
    )
    repo_id: str = field(
        metadata={"help": "Dataset repository, such as me/prm800k. It is created if it does not exist."}
    )
    private: bool | None = field(
        default=None,
        metadata={
            "help": "Whether the repository must be private. If an existing repository does not match, the push fails before anything is "
            "uploaded. By default, the Hub decides for a new repository, and an existing one keeps its visibility.",
            "nargs": "?",
            "const": True,
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Name of the dataset configuration. Only for a single folder (default: its view, such as hrm)."
        },
    )
    revision: str = field(default="main", metadata={"help": "Branch to push to. It is created if it does not exist."})
    max_shard_size: str = field(
        default="500MB",
        metadata={"help": "Maximum size of a shard. Larger files are split between row groups."},
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Only check the folders and print the files and the card that would be uploaded. The Hub is not contacted."
        },
    )
