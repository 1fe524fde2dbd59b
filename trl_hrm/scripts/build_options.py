"""Options that the `build-*` commands share."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from ..data.build_config import VIEWS, BuildConfig
from ..data.sources import parse_columns


Config = TypeVar("Config", bound=BuildConfig)


def add_build_arguments(parser: argparse.ArgumentParser, views: Sequence[str] = VIEWS, strict: bool = True) -> None:
    """Add the options of [`BuildConfig`] to `parser`; without `strict` for sources whose faults are always errors."""
    parser.add_argument(
        "--output_dir",
        required=True,
        help="directory to create, with one Parquet file per split, a dataset card and build_report.json (required)",
    )
    parser.add_argument(
        "--view",
        choices=views,
        default=BuildConfig.view,
        help="what a row is: a problem with its judged steps as a tree; the tree with merged steps (hrm); one "
        "root-to-leaf path (prm); one with a label on its last step only (orm)"
        + ("; a right solution for fine-tuning (sft)" if "sft" in views else ""),
    )
    parser.add_argument(
        "--merge_separator",
        type=unescape,
        default=BuildConfig.merge_separator,
        help=r"text between the steps of a merged step, for --view hrm; \n and \t are read as newline and tab "
        r"(default: \n)",
    )
    parser.add_argument(
        "--max_merge",
        type=int,
        default=BuildConfig.max_merge,
        help="longest run of steps that is merged, for --view hrm",
    )
    parser.add_argument(
        "--num_proc",
        type=int,
        help="number of processes (default: one per core, and no more than there are chunks of 4 MB to read)",
    )
    add_output_arguments(parser)
    if strict:
        add_strict_argument(parser)


def add_output_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the split, the problems to leave out, and whether an earlier output may go."""
    parser.add_argument(
        "--test_size",
        type=float,
        default=BuildConfig.test_size,
        help="share of problems that form the test split, from 0 (no test split) to below 1",
    )
    parser.add_argument("--seed", type=int, default=BuildConfig.seed, help="seed of the split")
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON files of test sets, with the problem under problem, question or prompt; their problems are "
        "dropped (default: none)",
    )
    add_columns_argument(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it is an earlier build")


def add_columns_argument(parser: argparse._ActionsContainer) -> None:
    """Add the new names of columns."""
    parser.add_argument(
        "--columns",
        nargs="+",
        metavar="NAME=COLUMN",
        help="read COLUMN as NAME, for rows with other column names, as in problem=Question answer=reward_model.ground_truth "
        "(default: none)",
    )


def add_strict_argument(parser: argparse._ActionsContainer) -> None:
    """Add whether a fault of one row stops the command."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first row with a fault, such as a blank step, instead of leaving out and counting such rows",
    )


def build_config(args: argparse.Namespace, kind: type[Config] = BuildConfig) -> Config:
    """The [`BuildConfig`], or the `kind` of it, that the command line asks for."""
    given = vars(args) | {"columns": parse_columns(args.columns)}
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.init and field.name in given})


def unescape(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")
