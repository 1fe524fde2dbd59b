"""Options of the commands that score steps with a trained reward model."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..scoring.paths import TreeScorer
    from ..step_format import StepFormat

# What each scorer takes, and what it takes if nothing is given
SCORER_OPTIONS: dict[str, dict[str, Any]] = {
    "transformers": {"revision": None, "dtype": "float32", "max_length": 2048, "batch_size": 8},
    "vllm": {"revision": None, "dtype": "float32", "scorer_args": None},
    "URL": {"revision": None, "served_model_name": None},
}
# Arguments of vLLM's engine that have a word of their own here
_OWN_OPTIONS = {
    "model": "the reward model",
    "revision": "--revision",
    "dtype": "--dtype",
    "runner": 'always "pooling"',
}


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
    parser.add_argument(
        "--scorer",
        default="transformers",
        metavar="transformers|vllm|URL",
        help="what runs the reward model: transformers (candidates share their prefix), vLLM in this process, or the "
        "address of a server that runs `vllm serve MODEL --runner pooling`",
    )
    parser.add_argument("--batch_size", type=int, help="rows of a forward pass, for transformers (default: 8)")
    parser.add_argument("--max_length", type=int, help="tokens of a row, for transformers (default: 2048)")
    parser.add_argument(
        "--dtype",
        help="dtype of the model, for transformers and vllm: float32, bfloat16, float16 or auto (default: float32)",
    )
    parser.add_argument(
        "--scorer_args",
        type=_engine_args,
        metavar="JSON",
        help="""more arguments of vLLM's engine, for vllm, as in '{"gpu_memory_utilization": 0.8}' (default: none)""",
    )
    parser.add_argument(
        "--served_model_name",
        metavar="NAME",
        help="name of the reward model at the server, for a URL (default: the folder or Hub id)",
    )
    parser.add_argument("--revision", help="revision of the model on the Hub (default: main)")
    parser.add_argument(
        "--step_format",
        metavar="FILE",
        help="a step_format.json, for a model that was saved without one (default: the model's own)",
    )


def _engine_args(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text} is no JSON object, such as '{{\"max_model_len\": 4096}}'")
    for name, own in _OWN_OPTIONS.items():
        if name in value:
            raise argparse.ArgumentTypeError(f"{name} is {own}. Leave it out")
    return value


def check_score_options(args: argparse.Namespace) -> None:
    """
    Refuse options that cannot work, before anything is loaded.

    Raises:
        `FileNotFoundError`: If there is no such format.
        `ValueError`: If an option goes with another scorer, or has no meaning beside another option.
    """
    _settings(args)
    if args.combine != "max" and set(args.spans) == {1}:
        raise ValueError(
            f"--combine {args.combine} makes one score of those of several spans, and --spans is 1. Give --spans 1 2, or "
            "leave it out."
        )
    if args.step_format is not None and not Path(args.step_format).is_file():
        raise FileNotFoundError(
            f"--step_format: there is no file {args.step_format}, expected a step_format.json, as the trainer saves one "
            "with every checkpoint."
        )


def check_reward_model(model: str, args: argparse.Namespace) -> None:
    """
    Refuse a reward model whose format or weights do not fit, without loading it.

    Raises:
        `FileNotFoundError`, `ValueError`: See [`~step_format.StepFormat.from_pretrained`] and
        [`~loading.check_checkpoint`].
    """
    from ..loading import check_checkpoint
    from ..step_format import StepFormat

    step_format = _step_format(args) or StepFormat.from_pretrained(model, revision=args.revision)
    check_checkpoint(model, step_format, args.revision)


def load_scorer(model: str, args: argparse.Namespace) -> "TreeScorer":
    """
    The reward model, as the options ask for it.

    Raises:
        `FileNotFoundError`, `ValueError`: See [`check_score_options`], and the scorers.
    """
    from transformers.utils import logging

    check_score_options(args)
    settings = _settings(args)
    step_format = _step_format(args)
    logging.disable_progress_bar()  # loading takes a moment; the bar of scoring is the one to watch
    if args.scorer == "transformers":
        from ..scoring.scorer import StepScorer

        return StepScorer.from_pretrained(model, step_format=step_format, **settings)
    if args.scorer == "vllm":
        from ..scoring.vllm_scorer import VLLMScorer

        settings |= settings.pop("scorer_args") or {}
        return VLLMScorer.from_pretrained(model, step_format=step_format, **settings)
    from ..scoring.http_scorer import ServerScorer

    return ServerScorer.from_pretrained(model, args.scorer, step_format=step_format, **settings)


def _step_format(args: argparse.Namespace) -> "StepFormat | None":
    """The format of --step_format, if it is given."""
    from ..step_format import StepFormat

    if args.step_format is None:
        return None
    return StepFormat.from_json(Path(args.step_format).read_bytes(), where=args.step_format)


def describe_scoring(args: argparse.Namespace) -> dict[str, Any]:
    """
    The options that decide the scores, as the command line takes them, for reports.

    Reports are published: the address of a server is left out, and so is a token for the Hub.
    """
    options = {"scorer": _kind(args.scorer), **_settings(args)}
    if options.get("scorer_args"):
        engine_args = {name: value for name, value in options["scorer_args"].items() if name != "hf_token"}
        options["scorer_args"] = json.dumps(engine_args)
    options |= {"step_format": args.step_format, "spans": args.spans, "combine": args.combine}
    return {name: value for name, value in options.items() if value is not None}


def _kind(scorer: str) -> str:
    if scorer.startswith(("http://", "https://")):
        return "URL"
    if scorer not in ("transformers", "vllm"):
        raise ValueError(
            f"--scorer is {scorer!r}, expected transformers, vllm, or the address of a server such as "
            "http://localhost:8000."
        )
    return scorer


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the chosen scorer takes. An option of another one is an error: it would do nothing."""
    kind = _kind(args.scorer)
    settings = dict(SCORER_OPTIONS[kind])
    for name in dict.fromkeys(name for options in SCORER_OPTIONS.values() for name in options):
        value = getattr(args, name)
        if value is None:
            continue
        if name not in settings:
            others = " and ".join(key for key, options in SCORER_OPTIONS.items() if name in options)
            raise ValueError(f"--{name} goes with --scorer {others}, and --scorer is {args.scorer}. Leave it out.")
        settings[name] = value
    return settings
