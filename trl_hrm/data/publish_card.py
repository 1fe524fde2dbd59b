"""
The card of a repository with several configurations. What was generated for each stands between two comments; pushing it again
replaces that part and its metadata, and keeps everything else: what people wrote, and the other configurations.
"""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch

import yaml
from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard

from .card import LOAD_TITLE, load_section
from .publish_shards import CARD_FILE, Build


logger = logging.getLogger(__name__)

BEGIN = "<!-- trl_hrm: config {} begins. The next push of it replaces what follows, up to its end. -->"
END = "<!-- trl_hrm: config {} ends. -->"
OTHER_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".txt", ".gz", ".zip", ".zst")  # that `load_dataset` reads
KEPT = ("license", "language", "pretty_name")  # metadata that a new configuration gives a card that has none of it


@dataclass
class Config:
    """A build as the card shows it."""

    build: Build
    info: DatasetInfo

    @property
    def metadata(self) -> dict:
        """Which files hold which split."""
        name = self.build.name
        return {"data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in self.build.splits]}


def merge_card(existing: str | None, repo_id: str, configs: Sequence[Config]) -> str:
    """
    The card of a repository after a push.

    Args:
        existing (`str`, *optional*):
            The card that is there.
        repo_id (`str`):
            The repository.
        configs (`Sequence[Config]`):
            What is pushed.

    Returns:
        `str`: The card.

    Raises:
        `ValueError`: If the existing card cannot be read.
    """
    if existing is None:
        existing = f"---\n\n---\n\n# {repo_id.split('/')[-1]}\n"
    card = _parse(existing.replace("\r\n", "\n"), f"{CARD_FILE} of {repo_id}")
    there = MetadataConfigs.from_dataset_card_data(card.data)
    for config in configs:
        name = config.build.name
        own = _parse(config.build.card, str(config.build.folder / CARD_FILE))
        if name not in there:
            _give_metadata(card, own, config.build)
        _warn_of_license(card, own, repo_id, config.build)
        card.text = _replace_part(card.text, name, _generated(own.text, config.build, repo_id), repo_id)
        MetadataConfigs({name: config.metadata}).to_dataset_card_data(card.data)
        DatasetInfosDict({name: config.info}).to_dataset_card_data(card.data)
    return str(card)


def check_others(existing: str | None, repo_id: str, paths: Sequence[str], names: Sequence[str]) -> None:
    """
    Refuse a repository with data that nobody could load any more once the card lists the pushed configurations.

    Without configurations in the card, `load_dataset` reads whatever data it finds; with them, it reads those alone. And it
    reads all configurations of a repository as files of one kind, that of the first by name.

    Args:
        existing (`str`, *optional*):
            The card that is there.
        repo_id (`str`):
            The repository.
        paths (`Sequence[str]`):
            Its files, without the rows of the pushed configurations.
        names (`Sequence[str]`):
            The pushed configurations.
    """
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard(existing).data) if existing else {}
    remedy = "Push to another repository, or make that data Parquet files of a configuration of the card first."
    for path in paths:
        if not configs and path.endswith((*OTHER_KINDS, ".parquet")):
            raise ValueError(
                f"{repo_id} holds data that its card does not name, as {path}: it could not be loaded. {remedy}"
            )
        for name, config in configs.items():
            patterns = _patterns(config.get("data_files"), config.get("data_dir"))
            if name not in names and path.endswith(OTHER_KINDS) and any(fnmatch(path, other) for other in patterns):
                raise ValueError(
                    f"{repo_id} has a configuration {name} of files such as {path}, and `load_dataset` reads all configurations of "
                    f"a repository as files of one kind. {remedy}"
                )


def _patterns(data_files: str | dict | list | None, folder: str | None) -> list[str]:
    """The patterns of the files of a configuration, in any of the forms that the metadata may have."""
    if data_files is None:
        return [f"{folder}/*" if folder else "*"]
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        return _patterns(data_files["path"], folder)
    return [pattern for item in data_files for pattern in _patterns(item, folder)]


def _parse(text: str, where: str) -> DatasetCard:
    try:
        card = DatasetCard(text, ignore_metadata_errors=False)
        MetadataConfigs.from_dataset_card_data(card.data)
        return card
    except (yaml.YAMLError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: its metadata cannot be read ({reason}). Mend it, then push again.") from error


def _give_metadata(card: DatasetCard, own: DatasetCard, build: Build) -> None:
    """License, language, name and tags of a configuration that is new to the card."""
    for key in KEPT:
        value = own.data.get(key)
        if key == "pretty_name" and value:
            value = value.removesuffix(f" ({build.report['view']})")
        if value and not card.data.get(key):
            card.data[key] = value
    tags = list(card.data.get("tags") or [])
    card.data["tags"] = tags + [tag for tag in own.data.get("tags") or [] if tag not in tags]


def _warn_of_license(card: DatasetCard, own: DatasetCard, repo_id: str, build: Build) -> None:
    license = own.data.get("license")
    if license and license != card.data.get("license"):
        logger.warning(
            f"the card of {repo_id} has the license {card.data.get('license')}, the source of {build.name} {license}. The card "
            "keeps its own; set on the Hub what is right for all of it."
        )


def _replace_part(text: str, name: str, generated: str, repo_id: str) -> str:
    """The text with the generated part of a configuration replaced, or put at the end if there is none."""
    part = f"{BEGIN.format(name)}\n\n{generated}\n\n{END.format(name)}"
    begin = list(re.finditer(rf"^<!-- trl_hrm: config {re.escape(name)} begins\b.*-->$", text, flags=re.MULTILINE))
    end = list(re.finditer(rf"^<!-- trl_hrm: config {re.escape(name)} ends\b.*-->$", text, flags=re.MULTILINE))
    if not begin and not end:
        return f"{text.rstrip()}\n\n{part}\n" if text.strip() else f"\n{part}\n"
    if len(begin) != 1 or len(end) != 1 or begin[0].start() > end[0].start():
        raise ValueError(
            f"{CARD_FILE} of {repo_id}: expected one comment {BEGIN.format(name)!r} and below it one {END.format(name)!r}, found "
            f"{len(begin)} and {len(end)}. Put them back, or remove both with what is between them, then push again."
        )
    return text[: begin[0].start()] + part + text[end[0].end() :]


def _generated(text: str, build: Build, repo_id: str) -> str:
    """The card of the folder as a part of the repository's: one level down, links and loading from the Hub."""
    lines, skipping = [], False
    for line, is_text in _lines(text.strip()):
        if is_text and line.startswith("## "):
            skipping = line == f"## {LOAD_TITLE}"
            if skipping:
                lines += [*load_section(repo_id, build.name).replace("## ", "### ", 1).split("\n"), ""]
        if not skipping:
            lines.append(f"#{line}" if is_text and re.match("#+ ", line) else line)
    shown = "\n".join(lines).strip()
    if "picture" in build.report:
        file = build.report["picture"]["file"]
        shown = shown.replace(f"]({file})", f"]({build.name}/{file})")
    return shown


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a Markdown text, and whether each is text, not code between fences."""
    fence = ""
    for line in text.split("\n"):
        mark = re.match("`{3,}|~{3,}", line)
        yield line, not fence and not mark
        if mark and not fence:
            fence = mark[0]
        elif mark and line.strip() == mark[0] and mark[0].startswith(fence):
            fence = ""
