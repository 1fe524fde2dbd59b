"""Score the steps of solutions with a trained step reward model."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder or Hub id of the reward model (required)")
    parser.add_argument(
        "--input",
        required=True,
        metavar="FILE",
        help="JSON Lines of solutions with `prompt` and `completions` (a list of steps), and optional `parents` "
        "(required)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the rows with a column `scores` here (default: print a table)"
    )
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


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from transformers.utils import logging

    from ..scoring.scorer import StepScorer
    from ..step_format import StepFormat

    trees = _read(args.input)
    step_format = None
    if args.step_format is not None:
        step_format = StepFormat.from_json(Path(args.step_format).read_text(encoding="utf-8"), where=args.step_format)
    logging.disable_progress_bar()  # loading takes a moment; the bar of scoring is the one to watch
    scorer = StepScorer.from_pretrained(
        args.model,
        step_format=step_format,
        revision=args.revision,
        dtype=args.dtype,
        max_length=args.max_length,
        batch_size=args.batch_size,
    )
    scores = scorer.score_trees(trees, spans=args.spans, combine=args.combine, progress=True)
    if args.output is None:
        print("\n\n".join(format_scores(tree, values) for tree, values in zip(trees, scores, strict=True)))
    else:
        _write(args.output, trees, scores)
        print(
            f"Scores of {sum(len(values) for values in scores)} steps of {len(trees)} rows written to {args.output}."
        )


def format_scores(tree, scores: list[float]) -> str:
    """The prompt of a tree, and below it its steps with their scores, indented by depth where the tree branches."""
    branches = any(parent != i - 1 for i, parent in enumerate(tree.parents))
    lines = [tree.prompt]
    for i, (text, score) in enumerate(zip(tree.completions, scores, strict=True)):
        indent = "  " * (len(tree.path(i)) - 1) if branches else ""
        lines.append(f"  {score:.3f}  {indent}{' '.join(text.split())}")
    return "\n".join(lines)


def _read(path: str) -> list:
    """Step trees of a JSON Lines file; labels are not needed and ignored."""
    import json

    from ..step_tree import StepTree

    trees = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not a complete JSON object ({error}). Each line holds one row.") from error
            if not isinstance(row, dict) or not isinstance(row.get("completions"), list):
                raise ValueError(
                    f"{where}: found {line.strip()[:60]!r}, expected an object with `prompt` and a list `completions`."
                )
            labels = row.pop("labels", None)
            tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where)
            if labels is not None:
                tree.extra["labels"] = labels
            trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: no row in it, expected JSON Lines with `prompt` and `completions`.")
    return trees


def _write(path: str, trees: list, scores: list[list[float]]) -> None:
    import json
    import os

    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for tree, values in zip(trees, scores, strict=True):
            row = tree.to_row()
            del row["labels"]
            file.write(json.dumps(row | tree.extra | {"scores": values}, ensure_ascii=False) + "\n")
    os.replace(partial, path)
