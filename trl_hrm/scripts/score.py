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
    parser.add_argument(
        "--keep_thinking",
        action="store_true",
        help="score the steps of a reasoning model's thinking too (default: they get null)",
    )
    add_score_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from collections import Counter

    from ..data.solutions import check_answers, count_answers, leave_out_thinking, solution_warnings

    notes = Counter()
    trees = _read(args.input)
    for tree in trees:
        count_answers(tree.completions, notes, tree.parents)
    check_answers(notes, len(trees), args.input)
    shown = [leave_out_thinking(tree, f"{args.input}, row {i}", args.keep_thinking) for i, tree in enumerate(trees, 1)]
    scorer = load_scorer(args.model, args)
    visible = [tree for tree, steps in shown if steps]
    found = iter(scorer.score_trees(visible, spans=args.spans, combine=args.combine, progress=True))
    scores = []
    for tree, (_, steps) in zip(trees, shown, strict=True):
        score_of = dict(zip(steps, next(found) if steps else (), strict=True))
        scores.append([score_of.get(step) for step in range(len(tree.completions))])
    for warning in solution_warnings(notes):
        print(f"warning: {warning}")
    num_thinking = sum(None in values for values in scores)
    if num_thinking:
        print(f"{num_thinking:,} rows have steps of thinking, which are not scored. --keep_thinking scores them.")
    if args.output is None:
        print("\n\n".join(format_scores(tree, values) for tree, values in zip(trees, scores, strict=True)))
    else:
        _write(args.output, trees, scores)
        print(
            f"Scores of {sum(value is not None for values in scores for value in values)} steps of {len(trees)} rows written to "
            f"{args.output}."
        )


def format_scores(tree, scores: list[float | None]) -> str:
    """
    The prompt of a tree, and below it its steps with their scores, indented by depth where the tree branches. Steps without a
    score have a dash.
    """
    branches = any(parent != i - 1 for i, parent in enumerate(tree.parents))
    lines = [tree.prompt]
    for i, (text, score) in enumerate(zip(tree.completions, scores, strict=True)):
        indent = "  " * (len(tree.path(i)) - 1) if branches else ""
        shown = "    -" if score is None else f"{score:.3f}"
        lines.append(f"  {shown}  {indent}{' '.join(text.split())}")
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
            if row.get("prompt") is None and row.get("problem") is not None:
                raise ValueError(
                    f"{where}: found `problem` and `completions` without `prompt`, as search-and-learn writes whole solutions, expected "
                    "the steps of one solution. trl-hrm best-of-n and select-raft read such files. If the completions are steps, "
                    "rename `problem` to `prompt`."
                )
            labels = row.pop("labels", None)
            tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where)
            if labels is not None:
                tree.extra["labels"] = labels
            trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: no row in it, expected JSON Lines with `prompt` and `completions`.")
    return trees


def _write(path: str, trees: list, scores: list[list[float | None]]) -> None:
    import json
    import os

    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for tree, values in zip(trees, scores, strict=True):
            row = tree.to_row()
            del row["labels"]
            file.write(json.dumps(row | tree.extra | {"scores": values}, ensure_ascii=False) + "\n")
    os.replace(partial, path)
