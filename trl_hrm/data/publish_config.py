from dataclasses import dataclass, field

from ..config import Config


@dataclass(kw_only=True)
class PushDatasetConfig(Config):
    """
    Configuration class for [`push_dataset`].

    Args:
        inputs (`list[str]`):
            Folders that `build-prm800k`, `build-math-shepherd`, `build-stepwise`, `export` or `select-raft` wrote.
        repo_id (`str`):
            Repository, as in `"me/prm800k"`. It is created if it does not exist.
        private (`bool`, *optional*):
            Whether the repository is private. An existing repository that is not as requested is refused before anything is sent. By
            default a new one is what the Hub makes it, and an existing one stays as it is.
        config_name (`str`, *optional*):
            Name of the configuration, for a single folder. By default its view: `"tree"`, `"hrm"`, `"prm"`, `"orm"`, `"sft"` or
            `"raft"`.
        revision (`str`, *optional*, defaults to `"main"`):
            Branch. It is created if it does not exist.
        max_shard_size (`str`, *optional*, defaults to `"500MB"`):
            Size above which the file of a split is cut into shards, at its row groups.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to check the folders and return the files and the card that would be sent, without asking the Hub. What the
            repository holds, and whether it exists, is then unknown.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Folders that build-prm800k, build-math-shepherd, build-stepwise, export or select-raft wrote.",
            "metavar": "FOLDER",
            "positional": True,
        }
    )
    repo_id: str = field(metadata={"help": "Repository, as in me/prm800k. It is created if it does not exist."})
    private: bool | None = field(
        default=None,
        metadata={
            "help": "Create it as private, and refuse one that is public (default: as the Hub makes it, or as it is).",
            "nargs": "?",
            "const": True,
        },
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Name of the configuration, for a single folder (default: its view, as in hrm)."},
    )
    revision: str = field(default="main", metadata={"help": "Branch. It is created if it does not exist."})
    max_shard_size: str = field(
        default="500MB",
        metadata={"help": "Size above which the file of a split is cut into shards, at its row groups."},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "Print the files and the card that would be sent, without network, and send nothing."},
    )
