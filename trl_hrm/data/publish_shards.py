"""Prepare the files of a built dataset for the Hub: check that the build is complete, and split large files into shards."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo
from typing_extensions import TypedDict

from ..io import read_json, shown
from ..schema import Count, check_json
from .output import REPORT_FILE, digest_of


CARD_FILE = "README.md"
BLOCK = 1 << 20


class SavedPicture(TypedDict):
    """Picture of the card."""

    file: str
    shows: NotRequired[str]


class SavedReport(TypedDict):
    """Content of `build_report.json` that a push needs. It has more."""

    view: str
    rows: dict[str, Count]
    content: str
    inputs: NotRequired[list[str]]
    command: NotRequired[str]
    not_for_publication: NotRequired[str]
    picture: NotRequired[SavedPicture]


@dataclass
class File:
    """
    A file to publish.

    Args:
        path (`str`):
            Path in the repository.
        local (`Path`):
            Path on disk.
    """

    path: str
    local: Path

    @cached_property
    def size(self) -> int:
        return self.local.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """SHA-256 hash, by which the Hub identifies a large file."""
        return self._digest(hashlib.sha256())

    @cached_property
    def blob(self) -> str:
        """Git blob hash, by which the Hub identifies a small file."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False))

    def _digest(self, digest) -> str:
        with open(self.local, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()


@dataclass
class Build:
    """
    A folder written by a builder.

    Args:
        folder (`Path`):
            Path of the folder.
        name (`str`):
            Name of its configuration on the Hub.
        report (`dict[str, Any]`):
            Content of its `build_report.json`.
    """

    folder: Path
    name: str
    report: dict[str, Any]

    @property
    def splits(self) -> list[str]:
        return list(self.report["rows"])

    def parquet(self, split: str) -> Path:
        return self.folder / "data" / f"{split}-00000-of-00001.parquet"

    @property
    def card(self) -> str:
        """Text of the dataset card."""
        path = self.folder / CARD_FILE
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}: not valid UTF-8 ({error.reason} at byte {error.start}). Build the dataset again."
            ) from None


def read_build(folder: str | Path, config_name: str | None = None) -> Build:
    """
    Read a folder written by a builder, and check that it is complete.

    Args:
        folder (`str` or `Path`):
            Path of the folder.
        config_name (`str`, *optional*):
            Name of its configuration on the Hub. Defaults to its view.

    Returns:
        [`Build`]: The build.

    Raises:
        `ValueError`: If a file is missing, or the rows do not match the report.
    """
    folder = Path(folder)
    path = folder / REPORT_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder}: {REPORT_FILE} not found. Expected a folder written by trl-hrm build-prm800k, build-math-shepherd, "
            "build-stepwise, build-grid, export or select-raft."
        )
    remedy = "Build the dataset again."
    report = read_json(path, remedy)
    check_json(report, SavedReport, path, remedy, more=True)
    if "not_for_publication" in report:
        raise ValueError(
            f"{folder}: this dataset cannot be pushed: {report['not_for_publication']}. Push a dataset of puzzles that build-grid makes itself."
        )
    names = [*report["rows"], *([report["picture"]["file"]] if "picture" in report else [])]
    if not report["rows"] or not all(re.fullmatch(r"[^\W_][\w.-]*", name) for name in names):
        raise ValueError(f"{path}: found {shown(names)}, expected the names of splits and of a picture. {remedy}")
    build = Build(folder, report["view"] if config_name is None else config_name, report)
    if not re.fullmatch(r"[^\W_][\w.-]*", build.name) or build.name == CARD_FILE:
        raise ValueError(
            f"`config_name` is {shown(build.name)}. It is also a folder name in the repository, so it may only contain letters, digits, `_`, "
            f"`-` and `.`, must begin with a letter or digit, and must not be {CARD_FILE}."
        )
    for path in (folder / CARD_FILE, *map(build.parquet, build.splits), *_assets(build)):
        if not path.is_file():
            raise ValueError(
                f"{folder}: {path.relative_to(folder)} is missing, so the build is incomplete. Build the dataset again."
            )
    content = digest_of(folder / "data")
    if content != report["content"]:
        raise ValueError(
            f"{folder}: the files in data were changed after the build (their content is {content}, but {REPORT_FILE} has "
            f"{report['content']}). Build the dataset again."
        )
    for split, expected in report["rows"].items():
        found = pq.read_metadata(build.parquet(split)).num_rows
        if found != expected:
            raise ValueError(
                f"{build.parquet(split)}: found {found} rows, but {REPORT_FILE} has {expected}. Build the dataset again."
            )
    return build


def _assets(build: Build) -> list[Path]:
    """Return the pictures of the card."""
    return [build.folder / build.report["picture"]["file"]] if "picture" in build.report else []


def published_files(build: Build, max_shard_size: int, work: Path) -> list[File]:
    """
    Return the files to publish for a build, in the folder of its configuration.

    Args:
        build ([`Build`]):
            The build.
        max_shard_size (`int`):
            Maximum size of a shard in bytes. Larger splits are split between row groups. Shards of the same file are always
            identical byte for byte.
        work (`Path`):
            Empty folder for the shards.
    """
    files = []
    for split in build.splits:
        shards = list(_write_shards(build.parquet(split), max_shard_size, work / split))
        for i, shard in enumerate(shards):
            files.append(File(f"{build.name}/{split}-{i:05d}-of-{len(shards):05d}.parquet", shard))
    files += [File(f"{build.name}/{path.name}", path) for path in (build.folder / REPORT_FILE, *_assets(build))]
    return files


def _write_shards(source: Path, max_bytes: int, folder: Path) -> Iterator[Path]:
    file = pq.ParquetFile(source)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [sum(group.column(j).total_compressed_size for j in range(group.num_columns)) for group in groups]
    shards = group_sizes(sizes, max_bytes)
    if source.stat().st_size <= max_bytes or len(shards) < 2:
        yield source
        return
    folder.mkdir(parents=True)
    for i, groups in enumerate(shards):
        path = folder / f"{i:05d}.parquet"
        with pq.ParquetWriter(path, file.schema_arrow) as writer:
            for group in groups:
                writer.write_table(file.read_row_group(group))
        yield path


def group_sizes(sizes: list[int], max_sum: int) -> list[list[int]]:
    """Return groups of indices of consecutive sizes whose sum is at most `max_sum`. A larger size forms its own group."""
    groups, total = [], 0
    for i, size in enumerate(sizes):
        if not groups or total + size > max_sum:
            groups.append([])
            total = 0
        groups[-1].append(i)
        total += size
    return groups


def dataset_info(build: Build, files: list[File]) -> DatasetInfo:
    """Return the features and sizes of a build, for the metadata of the card."""
    splits = SplitDict()
    for split in build.splits:
        file = pq.ParquetFile(build.parquet(split))
        num_bytes = sum(batch.nbytes for batch in file.iter_batches())
        splits.add(SplitInfo(split, num_bytes=num_bytes, num_examples=file.metadata.num_rows))
    return DatasetInfo(
        features=Features.from_arrow_schema(pq.read_schema(build.parquet(build.splits[0]))),
        splits=splits,
        download_size=sum(file.size for file in files if file.path.endswith(".parquet")),
        dataset_size=sum(split.num_bytes for split in splits.values()),
    )
