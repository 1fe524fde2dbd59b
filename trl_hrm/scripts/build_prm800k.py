"""
Build a dataset of judged steps from PRM800K.

```bash
trl-hrm build-prm800k phase2_train.jsonl --output_dir data/prm800k-hrm --view hrm --exclude math500.jsonl
```
"""

import argparse

from .build_options import add_build_arguments, build_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help="PRM800K files of phase 1 or 2, JSON Lines or JSON")
    add_build_arguments(parser)
    parser.add_argument(
        "--neutral",
        default="negative",
        help="label of a step rated 0: negative, positive, drop (context only), or a probability from 0 to 1",
    )
    parser.add_argument(
        "--drop_screening",
        action="store_true",
        help="drop the records that served to screen annotators or to control their quality",
    )


def run(args: argparse.Namespace) -> None:
    config = build_config(args)

    from ..data.prm800k import build_prm800k
    from ..data.report import format_report

    print(format_report(build_prm800k(args.files, config, args.neutral, args.drop_screening)))
