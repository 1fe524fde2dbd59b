"""Options of the commands that score steps with a trained reward model."""

import argparse
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..scoring.scorer import StepScorer


def add_score_arguments(parser: argparse._ActionsContainer) -> None:
    """Add how the reward model is loaded, and how it judges steps."""
    parser.add_argument(
        "--spans",
        type=int,
        nargs="+",
        default=[1],
        help="how many steps are judged as one; `1 2` also judges each step merged with the one before it",
    )
    parser.add_argument(
        "--combine", choices=["max", "mean"], default="max", help="how the scores of several spans become one"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a forward pass")
    parser.add_argument("--max_length", type=int, default=2048, help="tokens of a row")
    parser.add_argument("--dtype", default="float32", help="dtype of the model: float32, bfloat16, float16 or auto")
    parser.add_argument("--revision", help="revision of the model on the Hub (default: main)")
    parser.add_argument(
        "--step_format",
        metavar="FILE",
        help="a step_format.json, for a model that was saved without one (default: the model's own)",
    )


def load_scorer(model: str, args: argparse.Namespace) -> "StepScorer":
    """
    The reward model, as the options ask for it.

    Raises:
        `FileNotFoundError`: If there is no such format.
        `ValueError`: If an option has no meaning beside another.
    """
    from pathlib import Path

    from transformers.utils import logging

    from ..scoring.scorer import StepScorer
    from ..step_format import StepFormat

    if args.combine != "max" and set(args.spans) == {1}:
        raise ValueError(
            f"--combine {args.combine} makes one score of those of several spans, and --spans is 1. Give --spans 1 2, or "
            "leave it out."
        )
    step_format = None
    if args.step_format is not None:
        if not Path(args.step_format).is_file():
            raise FileNotFoundError(
                f"--step_format: there is no file {args.step_format}, expected a step_format.json, as the trainer saves one "
                "with every checkpoint."
            )
        step_format = StepFormat.from_json(Path(args.step_format).read_text(encoding="utf-8"), where=args.step_format)
    logging.disable_progress_bar()  # loading takes a moment; the bar of scoring is the one to watch
    return StepScorer.from_pretrained(
        model,
        step_format=step_format,
        revision=args.revision,
        dtype=args.dtype,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
