"""
Build a dataset of judged steps from Math-Shepherd.

```bash
trl-hrm build-math-shepherd math-shepherd.jsonl --output_dir data/math-shepherd --exclude gsm8k_test.jsonl
```
"""

import argparse

from .build_options import add_build_arguments, build_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="files of Math-Shepherd, ER-PRM or RLHFlow, JSON Lines or JSON"
    )
    add_build_arguments(parser)


def run(args: argparse.Namespace) -> None:
    config = build_config(args)

    from ..data.math_shepherd import build_math_shepherd
    from ..data.report import format_report

    print(format_report(build_math_shepherd(args.files, config)))
