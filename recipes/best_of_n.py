"""
Choose among N solutions with a reward model, with the settings of a YAML file: `trl-hrm best-of-n` on one or several processes.

    accelerate launch recipes/best_of_n.py --config recipes/tiny/best_of_n.yaml

Each process samples and scores a part of the problems, and the first one makes one result of all parts. Every setting of the
YAML can be overridden on the command line, for example `--n 1 4 16`.
"""

import argparse
import json
import sys
from collections.abc import Sequence


def main(args: argparse.Namespace) -> None:
    from trl_hrm.scripts.best_of_n import run

    run(args)


def make_parser() -> argparse.ArgumentParser:
    from trl_hrm.cli import HelpFormatter
    from trl_hrm.scripts.best_of_n import add_arguments

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1], formatter_class=HelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings, named as the options below")
    add_arguments(parser)
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The options of the command line, and before them those of the file: both are read, and refused, by one parser."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    path = first.parse_known_args(argv)[0].config
    return make_parser().parse_args([*(words_of(path) if path else ()), *argv])


def words_of(path: str) -> list[str]:
    """A YAML file as the words of a command line."""
    import yaml

    with open(path, encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    if not isinstance(settings, dict):
        raise ValueError(
            f"{path}: found {settings!r}, expected settings, one a line, as in `output_dir: runs/best-of-n`."
        )
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


if __name__ == "__main__":
    try:
        main(parse_args(sys.argv[1:]))
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")
