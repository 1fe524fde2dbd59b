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

from .card import LOAD_FOLDER
from .publish_shards import CARD_FILE, Build


logger = logging.getLogger(__name__)

BEGIN = "<!-- trl_hrm: config {} begins. The next push of it replaces what follows, up to its end. -->"
END = "<!-- trl_hrm: config {} ends. -->"
OTHER_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".arrow", ".txt", ".gz", ".zip", ".zst")  # that `load_dataset` reads
OWN = ("configs", "dataset_info", "tags")  # metadata of a configuration that the card does not take over as it is
MARK = r"^<!-- trl_hrm: config {} {}\b.*-->[ \t]*$"


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
        own = _own_card(config.build)
        if name not in there:  # license, language, name, tags and more, where the card has none
            other_license = card.data.get("license") not in (None, own.data.get("license"))
            for key, value in own.data.to_dict().items():
                if key in OWN or card.data.get(key) or (other_license and key.startswith("license_")):
                    continue
                view = f" ({config.build.report['view']})"
                card.data[key] = str(value).removesuffix(view) if key == "pretty_name" else value
            tags = _listed(card.data.get("tags"))
            card.data["tags"] = tags + [tag for tag in _listed(own.data.get("tags")) if tag not in tags]
        card.text = _replace_part(card.text, name, _generated(own.text, config.build, repo_id), repo_id)
        # whether `load_dataset` takes it when none is named is for people to say
        default = {"default": True} if there.get(name, {}).get("default") else {}
        MetadataConfigs({name: default | config.metadata}).to_dataset_card_data(card.data)
        DatasetInfosDict({name: config.info}).to_dataset_card_data(card.data)
    return str(card)


def warn_of_licenses(card: str, repo_id: str, configs: Sequence[Config]) -> None:
    """
    Tell of sources with another license than that of the repository's card.

    Args:
        card (`str`):
            The card after the push.
        repo_id (`str`):
            The repository.
        configs (`Sequence[Config]`):
            What is pushed.
    """
    license = DatasetCard(card).data.get("license")
    for config in configs:
        own = _own_card(config.build).data.get("license")
        if own and own != license:
            logger.warning(
                f"the card of {repo_id} has {f'the license {license}' if license else 'no license'}, the source of "
                f"{config.build.name} {own}. The card keeps its own; set on the Hub what is right for all of it."
            )


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
            Its files, without those that the push writes or deletes.
        names (`Sequence[str]`):
            The pushed configurations.
    """
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard(existing).data) if existing else {}
    remedy = "Push to another repository, or make that data Parquet files of a configuration of the card first."
    for path in paths:
        if not configs and path.endswith((*OTHER_KINDS, ".parquet")):
            raise ValueError(
                f"{repo_id} holds data that its card does not name, as {path}: it could not be loaded. {remedy} If its card has lost "
                "configurations that were pushed from here, push them all in one call."
            )
        for name, config in configs.items():
            patterns = _patterns(config.get("data_files"), config.get("data_dir"))
            if not any(fnmatch(path, pattern) for pattern in patterns):
                continue
            if name in names and path.endswith((*OTHER_KINDS, ".parquet")):
                raise ValueError(
                    f"{repo_id} has a configuration {name} of files such as {path}, which the pushed one would put out of reach. "
                    "Push to another repository, or under another name with --config_name (`config_name=`)."
                )
            if name not in names and path.endswith(OTHER_KINDS):
                raise ValueError(
                    f"{repo_id} has a configuration {name} of files such as {path}, and `load_dataset` reads all configurations of "
                    f"a repository as files of one kind. {remedy}"
                )


def _patterns(data_files: str | dict | list | None, folder: str | None) -> list[str]:
    """The patterns of the files of a configuration, in any of the forms that the metadata may have."""
    if data_files is None:
        return [f"{folder}/*" if folder else "*"]
    if isinstance(data_files, str):
        return [data_files.replace("**/", "*")]  # `*` of fnmatch goes across folders
    if isinstance(data_files, dict):
        return _patterns(data_files["path"], folder)
    return [pattern for item in data_files for pattern in _patterns(item, folder)]


def _parse(text: str, where: str) -> DatasetCard:
    try:
        card = DatasetCard(text, ignore_metadata_errors=False)
        names = list(MetadataConfigs.from_dataset_card_data(card.data))
        infos = card.data.get("dataset_info")
        names += [info.get("config_name") for info in infos] if isinstance(infos, list) else []
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"expected a text as each config_name, found {names}")
        return card
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{where}: its metadata cannot be read ({reason}). Mend it, then push again.") from error


def _own_card(build: Build) -> DatasetCard:
    """The card of a folder."""
    where = str(build.folder / CARD_FILE)
    card = _parse(build.card, where)
    if mark := re.search(MARK.format(".*", "(begins|ends)"), card.text, flags=re.MULTILINE):
        raise ValueError(
            f"{where}: the comment {mark[0]!r} belongs into the card of a repository, where the next push would take what follows "
            "for its own. Remove it."
        )
    return card


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _replace_part(text: str, name: str, generated: str, repo_id: str) -> str:
    """The text with the generated part of a configuration replaced, or put at the end if there is none."""
    part = f"{BEGIN.format(name)}\n\n{generated}\n\n{END.format(name)}"
    begin, end = (
        list(re.finditer(MARK.format(re.escape(name), which), text, flags=re.MULTILINE))
        for which in ("begins", "ends")
    )
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
    text = text.strip().replace(LOAD_FOLDER, f'load_dataset("{repo_id}", "{build.name}")')
    shown = "\n".join(f"#{line}" if is_text and re.match("#+ ", line) else line for line, is_text in _lines(text))
    if "picture" in build.report:
        file = build.report["picture"]["file"]
        shown = shown.replace(f"]({file})", f"]({build.name}/{file})")
    return shown


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a Markdown text, and whether each is text, not code between fences."""
    fence = ""
    for line in text.split("\n"):
        mark = re.match(" {0,3}(`{3,}(?!.*`)|~{3,})", line)
        yield line, not fence and not mark
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == mark[1] and mark[1].startswith(fence):
            fence = ""
