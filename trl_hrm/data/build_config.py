"""Options that all dataset builders share."""

from dataclasses import dataclass, field
from typing import ClassVar


VIEWS = ("tree", "hrm", "prm", "orm")


@dataclass
class BuildConfig:
    r"""
    Options that all dataset builders share.

    Args:
        output_dir (`str`):
            Directory to create, with one Parquet file per split, a dataset card and `build_report.json`.
        view (`str`, *optional*, defaults to `"tree"`):
            What a row is: `"tree"` for a problem with its judged steps as a tree, `"hrm"` for the tree with merged
            steps, `"prm"` for one root-to-leaf path, `"orm"` for one with a label on its last step only.
        merge_separator (`str`, *optional*, defaults to `"\n"`):
            Text between the steps of a merged step, for `view="hrm"`.
        max_merge (`int`, *optional*, defaults to `2`):
            Longest run of steps that is merged, for `view="hrm"`.
        test_size (`float`, *optional*, defaults to `0.1`):
            Share of problems that form the test split, from 0 (no test split) to below 1.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the split.
        exclude (`list[str]`, *optional*):
            JSON files of test sets; their problems are dropped.
        num_proc (`int`, *optional*):
            Number of processes. `None` is one per core, and no more than there are chunks of 4 MB to read.
        overwrite (`bool`, *optional*, defaults to `False`):
            Replace `output_dir` if it is an earlier build.
        columns (`dict[str, str]`, *optional*):
            New names of columns, such as `{"completions": "steps"}`. See [`~data.sources.rename_columns`].
        strict (`bool`, *optional*, defaults to `False`):
            Stop at the first record with a fault instead of leaving such records out.

    Raises:
        `ValueError`: If an option is out of range.
    """

    views: ClassVar[tuple[str, ...]] = VIEWS

    output_dir: str
    view: str = "tree"
    merge_separator: str = "\n"
    max_merge: int = 2
    test_size: float = 0.1
    seed: int = 42
    exclude: list[str] = field(default_factory=list)
    num_proc: int | None = None
    overwrite: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self):
        if self.view not in self.views:
            raise ValueError(f"view is {self.view!r}, expected one of {', '.join(self.views)}.")
        if not self.merge_separator:
            raise ValueError("merge_separator is empty, expected a text that tells a merged step from a single one.")
        if self.max_merge < 2:
            raise ValueError(f"max_merge is {self.max_merge}, expected 2 (pairs, as in the paper) or more.")
        if not 0 <= self.test_size < 1:
            raise ValueError(f"test_size is {self.test_size}, expected a share from 0 (no test split) to below 1.")
        if self.num_proc is not None and self.num_proc < 1:
            raise ValueError(f"num_proc is {self.num_proc}, expected 1 or more.")
