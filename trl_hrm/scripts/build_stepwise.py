"""
Build a dataset of judged steps from rows in TRL's stepwise-supervision format, with or without `parents`.

```bash
trl-hrm build-stepwise rows.jsonl --output_dir data/rows-hrm --view hrm
```
"""

import argparse

from .build_options import add_build_arguments, build_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="JSON Lines or JSON files, or one directory or Hub name of a dataset",
    )
    add_build_arguments(parser)
    parser.add_argument("--split", default="train", help="split to read of a dataset; files have none")


def run(args: argparse.Namespace) -> None:
    config = build_config(args)

    from ..data.report import format_report
    from ..data.stepwise import build_stepwise

    print(format_report(build_stepwise(args.inputs, config, args.split)))
