"""Settings of a command in a YAML file: `--config FILE`, named as its options. What the command line says itself wins."""

import argparse
import json
from collections.abc import Sequence
from typing import Any


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of settings, named as the options; options given beside it win, but for switches that it turns on",
    )


def with_settings(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """
    The words of a command line, before them those of the file that its `--config` names.

    Args:
        parser (`argparse.ArgumentParser`):
            Parser of the command.
        argv (`Sequence[str]`):
            Words after the command.

    Raises:
        `OSError`: If the file cannot be read.
        `ValueError`: If it holds no settings, or one that is no option of the command.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    if path is None:
        return list(argv)
    settings = read_settings(path)
    known = {word.removeprefix("--") for action in parser._actions for word in action.option_strings} - {"config"}
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ValueError(
            f"{path}: {', '.join(map(str, unknown))}: no such option, expected some of {', '.join(sorted(known))}."
        )
    # a list at the end of the file must not take the words that follow it
    return [*words_of(settings), f"--config={path}", *argv]


def read_settings(path: str) -> dict[str, Any]:
    """What a YAML file of settings holds."""
    import yaml

    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: found {settings!r}, expected settings, one a line, as in `output_dir: runs/best-of-n`."
        )
    return settings


def words_of(settings: dict[str, Any]) -> list[str]:
    """Settings as the words of a command line."""
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        elif value is True:
            words.append(f"--{name}")
        elif value is not False and value is not None:
            words.append(f"--{name}={value}")
    return words
