"""
The card of a repository with several configurations.

The generated text of each configuration is between two comments. Pushing a configuration again replaces its text and its metadata,
and keeps everything else: the other configurations and what people wrote.
"""

import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath, PureWindowsPath

import yaml
from datasets import DatasetInfo
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..io import parse_yaml
from ..terminal import plain
from .output import LOAD_FOLDER, REPORT_FILE
from .publish_shards import CARD_FILE, Build


logger = logging.getLogger(__name__)

BEGIN = "<!-- trl_hrm: config {} begins. The next push of this configuration replaces everything up to its end. -->"
END = "<!-- trl_hrm: config {} ends. -->"
OTHER_KINDS = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".arrow",
    ".txt",
    ".gz",
    ".zip",
    ".zst",
)  # also read by `load_dataset`
OWN = ("configs", "dataset_info", "tags")  # metadata of a folder's card that is merged separately
MARK = r"^<!-- trl_hrm: config {} {}\b.*-->[ \t]*$"


@dataclass
class Config:
    """A build, with the metadata of its configuration."""

    build: Build
    info: DatasetInfo

    @property
    def metadata(self) -> dict:
        """Data files of each split."""
        name = self.build.name
        return {"data_files": [{"split": split, "path": f"{name}/{split}-*.parquet"} for split in self.build.splits]}


def merge_card(existing: str | None, repo_id: str, configs: Sequence[Config]) -> str:
    """
    Return the card of a repository after a push.

    Args:
        existing (`str`, *optional*):
            Current card of the repository.
        repo_id (`str`):
            Dataset repository.
        configs (`Sequence[Config]`):
            Pushed configurations.

    Returns:
        `str`: The new card.

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
        if name not in there:  # add the license, language, name and tags that the card does not have yet
            other_license = card.data.get("license") not in (None, own.data.get("license"))
            for key, value in own.data.to_dict().items():
                if key in OWN or card.data.get(key) or (other_license and key.startswith("license_")):
                    continue
                view = f" ({config.build.report['view']})"
                card.data[key] = str(value).removesuffix(view) if key == "pretty_name" else value
            tags = _listed(card.data.get("tags"))
            card.data["tags"] = tags + [tag for tag in _listed(own.data.get("tags")) if tag not in tags]
        card.text = _replace_part(card.text, name, _generated(own.text, config.build, repo_id), repo_id)
        # Keep `default`, which people set for the configuration that `load_dataset` loads when none is named
        default = {"default": True} if there.get(name, {}).get("default") else {}
        MetadataConfigs({name: default | config.metadata}).to_dataset_card_data(card.data)
        DatasetInfosDict({name: config.info}).to_dataset_card_data(card.data)
    return str(card)


def warn_of_licenses(card: str, repo_id: str, configs: Sequence[Config]) -> None:
    """
    Warn about configurations whose source has a different license than the card of the repository.

    Args:
        card (`str`):
            Card of the repository after the push.
        repo_id (`str`):
            Dataset repository.
        configs (`Sequence[Config]`):
            Pushed configurations.
    """
    license = DatasetCard(card).data.get("license")
    for config in configs:
        own = _own_card(config.build).data.get("license")
        if own and own != license:
            logger.warning(
                f"the card of {repo_id} has {f'the license {plain(str(license))}' if license else 'no license'}, but the source of "
                f"{config.build.name} has the license {plain(str(own))}. The card was not changed. Set a license on the Hub that is right for "
                "all configurations."
            )


def warn_of_paths(build: Build) -> None:
    """Warn about the absolute paths in the card and the report of a build, which may contain the name of a user."""
    words = [word.rpartition("=")[2] for word in shlex.split(build.report.get("command", ""))]
    paths = [word.removeprefix("file://") for word in [*build.report.get("inputs", []), *words]]
    found = [path for path in paths if PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()]
    # `/n` and `/^Step/` are more likely a separator and an expression
    if found := dict.fromkeys(path for path in found if re.search(r"[/\\]", path.strip("/\\"))):
        logger.warning(
            f"{build.folder}: its card and {REPORT_FILE} have absolute paths, which everyone who can read the repository will see: "
            f"{', '.join(map(plain, found))}. To leave them out, build the dataset again with relative paths."
        )


def check_others(existing: str | None, repo_id: str, paths: Sequence[str], names: Sequence[str]) -> None:
    """
    Raise an error if the push would make existing data of the repository impossible to load.

    If the card lists no configurations, `load_dataset` reads all data files. If it lists some, only these can be loaded. All
    configurations must have the same file format, since `load_dataset` uses the format of the first one for all of them.

    Args:
        existing (`str`, *optional*):
            Current card of the repository.
        repo_id (`str`):
            Dataset repository.
        paths (`Sequence[str]`):
            Files of the repository, without those that the push writes or deletes.
        names (`Sequence[str]`):
            Names of the pushed configurations.

    Raises:
        `ValueError`: If the repository has such data.
    """
    configs = MetadataConfigs.from_dataset_card_data(DatasetCard(existing).data) if existing else {}
    remedy = (
        "Push to another repository, or first convert this data to Parquet and list it as a configuration in the card."
    )
    for path in paths:
        if not configs and path.endswith((*OTHER_KINDS, ".parquet")):
            raise ValueError(
                f"{repo_id} has data that is in no configuration of its card, such as {path}. It could not be loaded after the push. "
                f"{remedy} If earlier pushed configurations are missing from the card, push all of them in one call."
            )
        for name, config in configs.items():
            patterns = _patterns(config.get("data_files"), config.get("data_dir"))
            if not any(fnmatch(path, pattern) for pattern in patterns):
                continue
            if name in names and path.endswith((*OTHER_KINDS, ".parquet")):
                raise ValueError(
                    f"{repo_id} already has a configuration {name} with other files, such as {path}. They could not be loaded after "
                    "the push. Push to another repository, or use another --config_name (`config_name=`)."
                )
            if name not in names and path.endswith(OTHER_KINDS):
                raise ValueError(
                    f"{repo_id} has a configuration {name} with files such as {path}, but `load_dataset` requires the same file "
                    f"format for all configurations of a repository. {remedy}"
                )


def _patterns(data_files: str | dict | list | None, folder: str | None) -> list[str]:
    """Return the file patterns of a configuration, for any format of `data_files` in the metadata."""
    if data_files is None:
        return [f"{folder}/*" if folder else "*"]
    if isinstance(data_files, str):
        return [data_files.replace("**/", "*")]  # in fnmatch, `*` also matches `/`
    if isinstance(data_files, dict):
        return _patterns(data_files.get("path"), folder)
    return [pattern for item in data_files for pattern in _patterns(item, folder)]


def _parse(text: str, where: str) -> DatasetCard:
    try:
        if header := REGEX_YAML_BLOCK.search(text):
            parse_yaml(header[1] + header[2], CARD_FILE)
        card = DatasetCard(text, ignore_metadata_errors=False)
        names = list(MetadataConfigs.from_dataset_card_data(card.data))
        infos = card.data.get("dataset_info")
        names += [info.get("config_name") for info in infos] if isinstance(infos, list) else []
        if not all(isinstance(name, str) for name in names):
            raise ValueError(f"each config_name must be a string, found {names}")
        return card
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: invalid metadata ({reason}). Correct it, then push again.") from error


def _own_card(build: Build) -> DatasetCard:
    """Return the card of a built folder."""
    where = str(build.folder / CARD_FILE)
    card = _parse(build.card, where)
    if mark := re.search(MARK.format(".*", "(begins|ends)"), card.text, flags=re.MULTILINE):
        raise ValueError(
            f"{where}: found the comment {mark[0]!r}, which is reserved for the card of a repository. A push would treat the text after "
            "it as generated. Remove the comment."
        )
    return card


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _replace_part(text: str, name: str, generated: str, repo_id: str) -> str:
    """Replace the generated part of a configuration in the text, or append it if it is missing."""
    part = f"{BEGIN.format(name)}\n\n{generated}\n\n{END.format(name)}"
    begin, end = (
        list(re.finditer(MARK.format(re.escape(name), which), text, flags=re.MULTILINE))
        for which in ("begins", "ends")
    )
    if not begin and not end:
        return f"{text.rstrip()}\n\n{part}\n" if text.strip() else f"\n{part}\n"
    if len(begin) != 1 or len(end) != 1 or begin[0].start() > end[0].start():
        raise ValueError(
            f"{CARD_FILE} of {repo_id}: found {len(begin)} comments {BEGIN.format(name)!r} and {len(end)} comments "
            f"{END.format(name)!r}, expected one of each, in this order. Restore them, or remove both with the text between them, then "
            "push again."
        )
    return text[: begin[0].start()] + part + text[end[0].end() :]


def _generated(text: str, build: Build, repo_id: str) -> str:
    """Adapt the card of a folder to the card of the repository: lower its headings, and load data and pictures from the Hub."""
    text = text.strip().replace(LOAD_FOLDER, f'load_dataset("{repo_id}", "{build.name}")')
    shown = "\n".join(f"#{line}" if is_text and re.match("#+ ", line) else line for line, is_text in _lines(text))
    if "picture" in build.report:
        file = build.report["picture"]["file"]
        shown = shown.replace(f"]({file})", f"]({build.name}/{file})")
    return shown


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the lines of a Markdown text, and whether each is text rather than part of a fenced code block."""
    fence = ""
    for line in text.split("\n"):
        mark = re.match(" {0,3}(`{3,}(?!.*`)|~{3,})", line)
        yield line, not fence and not mark
        if mark and not fence:
            fence = mark[1]
        elif mark and line.strip() == mark[1] and mark[1].startswith(fence):
            fence = ""
