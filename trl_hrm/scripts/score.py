"""Score the steps of solutions with a trained step reward model."""

import argparse

from .score_options import add_score_arguments, load_scorer


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
    add_score_arguments(parser)


def run(args: argparse.Namespace) -> None:
    trees = _read(args.input)
    scorer = load_scorer(args.model, args)
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
