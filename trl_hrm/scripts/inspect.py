"""
Look at the tree of a problem: in the terminal, and as one HTML page that works offline.

```bash
trl-hrm inspect runs/mcts
trl-hrm inspect runs/mcts --problem 17
trl-hrm inspect math-aps-tree.jsonl --format openr --problem 0 --html tree.html
```
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:
    from pathlib import Path

    from ..search.tree import SearchTree


class Entry(NamedTuple):
    """A problem of a run: its place among the problems given, its id, and how to read its tree."""

    place: int
    problem_id: str
    read: "Callable[[], SearchTree]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="RUN",
        help="folder of trl-hrm annotate, also while it runs, or a Parquet file of nodes from one; with --format openr, a "
        "JSON Lines file",
    )
    parser.add_argument("--format", choices=["run", "openr"], default="run", help="what the input is")
    parser.add_argument("--problem", help="id of a problem, or its place, from 0 (default: list all problems)")
    parser.add_argument(
        "--html",
        metavar="FILE",
        help="where to write the page (default: a file named after the problem, in inspect/ of the run's folder, or here for other inputs)",
    )
    parser.add_argument("--depth", type=int, help="levels to print (default: as many as fit 100 lines)")
    parser.add_argument("--breadth", type=int, default=8, help="most lines to print below one node")
    parser.add_argument("--rollouts", action="store_true", help="print each rollout, not one line for those of a node")
    parser.add_argument(
        "--estimator",
        choices=["child_mean", "leaf_share"],
        default="child_mean",
        help="MC score of a step: mean over its children, recursively; share of right leaves below it",
    )
    parser.add_argument(
        "--truncated",
        choices=["drop", "wrong"],
        default="drop",
        help="what a solution without an answer is: unknown, or wrong",
    )
    parser.add_argument(
        "--hnc", type=int, metavar="SEED", help="show the tree after node compression with this seed (default: off)"
    )


def run(args: argparse.Namespace) -> None:
    import os
    import shutil
    import sys

    from ..search.inspection_html import html_page
    from ..search.inspection_text import format_tree, problem_lines
    from ..search.values import mc_scores

    for name in ("depth", "breadth"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected 1 or more.")
    if args.problem is None and args.html is not None:
        raise ValueError("--html is given without --problem; name the problem whose tree the page shows.")
    sys.stdout.reconfigure(errors="replace")  # a policy writes what no terminal can show
    screen = {
        "width": shutil.get_terminal_size((120, 24)).columns,
        "color": sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb",
    }
    with ExitStack() as files:
        entries = _entries(args.input, args.format, files)
        if args.problem is None:
            trees = ((entry.place, entry.read()) for entry in entries)
            rows = ((place, tree, mc_scores(tree, args.estimator, args.truncated)[-1]) for place, tree in trees)
            for line in problem_lines(rows, **screen):
                print(line)
            return
        entry = _find(entries, args.problem, args.input)
        inspection = _inspect(entry.read(), args)
    print(format_tree(inspection, depth=args.depth, breadth=args.breadth, rollouts=args.rollouts, **screen))
    file = _page_path(args.input, args.html, entry.problem_id)
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_name(f".{file.name}.{os.getpid()}")
    fresh.write_text(html_page(inspection), encoding="utf-8")
    os.replace(fresh, file)
    print(f"\nPage: {file}")


def _entries(name: str, format: str, files: ExitStack) -> Iterator[Entry]:
    """
    The problems of the input. Those of a run come from its logs, which are there from the first moment on, and only the trees
    that are asked for are read.
    """
    from pathlib import Path

    from ..data.openr import OpenrFiles
    from ..search.log import EventLog
    from ..search.nodes import read_trees

    path = Path(name)
    if path.is_dir():
        logs = [files.enter_context(EventLog(log)) for log in sorted(path.glob("log-*.jsonl"))]
        if format == "openr" or not logs:
            expected = (
                "a JSON Lines file of openr" if format == "openr" else "log-00000-of-00001.jsonl or the like in it"
            )
            raise FileNotFoundError(f"{name}: found a folder without a log of a search, expected {expected}.")
        found = [
            Entry(problem.position, problem_id, partial(_read, log, problem_id))
            for log in logs
            for problem_id, problem in log.problems.items()
        ]
        yield from sorted(found, key=lambda entry: (entry.place, entry.problem_id))
        return
    if format == "openr":
        source = OpenrFiles([name])
        trees = (tree for chunk in source.chunks() for _, _, tree in source.read(chunk))
    else:
        trees = read_trees(path)
    for place, tree in enumerate(trees):
        yield Entry(place, tree.problem.problem_id, lambda tree=tree: tree)


def _read(log, problem_id: str) -> "SearchTree":
    return log.read(problem_id).tree.canonical()


def _find(entries: Iterator[Entry], problem: str, name: str) -> Entry:
    """The problem with this id, else the one at this place."""
    at_place, number, examples = None, 0, []
    for entry in entries:
        if entry.problem_id == problem:
            return entry
        if str(entry.place) == problem:
            at_place = entry
        number += 1
        examples = examples or [entry.problem_id]
    if at_place is None:
        known = f", such as {examples[0]!r}" if examples else ""
        raise ValueError(
            f"{name}: found no problem {problem!r} among {number}, expected an id{known}, or a place. Without --problem, all "
            "are listed."
        )
    return at_place


def _inspect(tree, args: argparse.Namespace):
    from ..search.compression import compress, count_moves
    from ..search.inspection import Inspection
    from ..search.nodes import tree_totals
    from ..search.values import leaf_counts, mc_scores

    totals = tree_totals(tree)  # of the search: nodes that compression makes repeat tokens
    basis = f"MC score: {args.estimator.replace('_', ' ')}, solutions without an answer: {args.truncated}"
    if any(node.value is not None for node in tree.nodes):
        basis = "values that the source recorded; of the prompt, their mean"
    if args.hnc is not None:
        tree = compress(tree, args.hnc)
        basis += f"; after node compression with seed {args.hnc}, which moved {count_moves(tree)}"
    scores = mc_scores(tree, args.estimator, args.truncated)
    return Inspection(tree, scores, leaf_counts(tree), totals, run=args.input, basis=basis)


def _page_path(name: str, html: str | None, problem_id: str) -> "Path":
    """Where the page goes. An id that is no file name gets a hash, so that no two problems share a page."""
    import re
    from pathlib import Path

    from ..search.tree import make_id

    if html is not None:
        return Path(html)
    safe = re.sub(r"[^\w-]+", "_", problem_id, flags=re.ASCII)[:60]
    if safe != problem_id:
        safe += f"-{make_id(problem_id)[:8]}"
    return (Path(name) / "inspect" if Path(name).is_dir() else Path()) / f"{safe}.html"
