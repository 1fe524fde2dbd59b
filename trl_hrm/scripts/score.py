"""Score the steps of solutions with a trained step reward model."""

import argparse

from .build_options import add_columns_argument
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
    add_columns_argument(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the rows with a column `scores` here, null for solutions that are too long for the model (default: print a "
        "table)",
    )
    parser.add_argument(
        "--keep_thinking",
        action="store_true",
        help="score the steps of a reasoning model's thinking too (default: they get null)",
    )
    add_score_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from collections import Counter

    from ..data.faults import format_places
    from ..data.solutions import check_answers, count_answers, leave_out_thinking, solution_warnings
    from ..data.sources import parse_columns
    from ..scoring.candidate_scores import tree_fits

    notes = Counter()
    places, trees = _read(args.input, parse_columns(args.columns))
    for tree in trees:
        count_answers(tree.completions, notes, tree.parents)
    check_answers(notes, len(trees), args.input)
    shown = [leave_out_thinking(tree, where, args.keep_thinking) for where, tree in zip(places, trees, strict=True)]
    scorer = load_scorer(args.model, args)
    fitting = [tree_fits(scorer, tree, args.spans) for tree, _ in shown]
    judged = [tree for (tree, steps), fits in zip(shown, fitting, strict=True) if fits and steps]
    found = iter(scorer.score_trees(judged, spans=args.spans, combine=args.combine, progress=True))
    scores = []
    for tree, (_, steps), fits in zip(trees, shown, fitting, strict=True):
        score_of = dict(zip(steps, next(found), strict=True)) if fits and steps else {}
        scores.append([score_of.get(step) for step in range(len(tree.completions))] if fits else None)
    scored = [values for values in scores if values is not None]
    if args.output is None:
        print("\n\n".join(format_scores(tree, values) for tree, values in zip(trees, scores, strict=True)))
    else:
        _write(args.output, trees, scores)
        num_scored = sum(value is not None for values in scored for value in values)
        print(f"Scores of {num_scored} steps of {len(scored)} rows written to {args.output}.")
    for warning in solution_warnings(notes):
        print(f"warning: {warning}")
    num_thinking = sum(None in values for values in scored)
    if num_thinking:
        print(f"{num_thinking:,} rows have steps of thinking, which are not scored. --keep_thinking scores them.")
    for reason, verb, odd in (
        (f"more tokens than the {scorer.max_positions} positions of the model", "not scored", _where(places, fitting)),
        ("a blank step", "scored as given", _where(places, [all(map(str.strip, t.completions)) for t in trees])),
        ("no steps", "without scores", _where(places, [tree.completions for tree in trees])),
    ):
        if odd:
            print(f"warning: {format_places(reason, odd, verb)}")


def _where(places: list[str], are_fine: list) -> list[str]:
    return [place for place, is_fine in zip(places, are_fine, strict=True) if not is_fine]


def format_scores(tree, scores: list[float | None] | None) -> str:
    """
    The prompt of a tree, and below it its steps with their scores, indented by depth where the tree branches. Steps without a
    score have a dash. Without scores, why there are none.
    """
    if scores is None:
        return f"{tree.prompt}\n  too long for the model"
    branches = any(parent != i - 1 for i, parent in enumerate(tree.parents))
    lines = [tree.prompt]
    for i, (text, score) in enumerate(zip(tree.completions, scores, strict=True)):
        indent = "  " * (len(tree.path(i)) - 1) if branches else ""
        shown = "    -" if score is None else f"{score:.3f}"
        lines.append(f"  {shown}  {indent}{' '.join(text.split())}")
    return "\n".join(lines)


def _read(path: str, columns: dict[str, str]) -> tuple[list[str], list]:
    """Places and step trees of the rows of a file; labels are not needed and ignored."""
    from ..data.sources import JsonLines, all_rows
    from ..step_tree import StepTree

    places, trees = [], []
    for where, row in all_rows(JsonLines([path], columns)):
        if not isinstance(row.get("completions"), list):
            raise ValueError(
                f"{where}: found {repr(row)[:60]}, expected an object with `prompt` and a list `completions`. Name other columns "
                "with --columns, such as --columns prompt=question completions=steps."
            )
        if row.get("prompt") is None and row.get("problem") is not None:
            raise ValueError(
                f"{where}: found `problem` and `completions` without `prompt`, as search-and-learn writes whole solutions, expected "
                "the steps of one solution. trl-hrm best-of-n and select-raft read such files. If the completions are steps, "
                "add --columns prompt=problem."
            )
        labels = row.pop("labels", None)
        tree = StepTree.from_row(row | {"labels": [None] * len(row["completions"])}, where, blank_steps=True)
        if labels is not None:
            tree.extra["labels"] = labels
        places.append(where)
        trees.append(tree)
    if not trees:
        raise ValueError(f"{path}: no row in it, expected JSON Lines with `prompt` and `completions`.")
    return places, trees


def _write(path: str, trees: list, scores: list[list[float | None] | None]) -> None:
    import json
    import os

    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for tree, values in zip(trees, scores, strict=True):
            row = tree.to_row()
            del row["labels"]
            file.write(json.dumps(row | tree.extra | {"scores": values}, ensure_ascii=False) + "\n")
    os.replace(partial, path)
