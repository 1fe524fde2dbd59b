"""Show the search trees of a run in trackio and Weights & Biases: a table of the problems, and pages of some trees."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..terminal import one_line, say
from ..tracking import TrackedPage, TrackedTable, log_to_trackers, tracked_run
from .inspection import Inspection, render_tree
from .nodes import read_trees, tree_totals
from .run_folder import node_files, read_manifest
from .tree import ROOT, SearchTree
from .values import leaf_counts, mc_scores


MAX_PROBLEMS = 1000  # rows of a table in a browser
NUM_PAGES = 5
MAX_CHARACTERS = 200


class TreeRow(NamedTuple):
    """
    A searched problem. The fields are the columns of the logged table.

    Args:
        problem_id (`str`):
            Id of the problem.
        problem (`str`):
            Text of the problem, shortened.
        status (`str`):
            Why its search ended. See [`~search.tree.SearchTree`].
        solved_share (`float` or `None`):
            Share of the graded solutions that are correct. `None` without a graded solution.
        num_solutions (`int`):
            Number of graded solutions.
        num_steps (`int`):
            Number of steps of the tree. Rollouts are not steps.
        num_tokens (`int`):
            Number of sampled tokens.
        first_steps (`str`):
            MC scores of the first steps, in the order of the tree, such as `"0.25 1.00 –"`. `–` is a step without a graded solution.
        page (`str`):
            Name of the logged page of the tree, or an empty string.
    """

    problem_id: str
    problem: str
    status: str
    solved_share: float | None
    num_solutions: int
    num_steps: int
    num_tokens: int
    first_steps: str
    page: str


def tree_row(tree: SearchTree, page: str = "") -> TreeRow:
    """Return the row of a tree. MC scores are means over the children, and solutions without an answer are not counted."""
    counts, scores = leaf_counts(tree)[ROOT], mc_scores(tree)
    is_step = [node.role != "rollout" for node in tree.nodes]
    first = (scores[i] for i in tree.children()[ROOT] if is_step[i])
    return TreeRow(
        problem_id=tree.problem.problem_id,
        problem=one_line(tree.problem.prompt, MAX_CHARACTERS),
        status=tree.status,
        solved_share=counts.correct / counts.answered if counts.answered else None,
        num_solutions=counts.answered,
        num_steps=sum(is_step),
        num_tokens=tree_totals(tree)["num_tokens"],
        first_steps=" ".join("–" if score is None else f"{score:.2f}" for score in first),
        page=page,
    )


def log_trees(
    folders: Mapping[str, str | Path], report_to: Sequence[str], project: str, run_name: str | None = None
) -> None:
    """
    Log the trees of finished runs to trackio and Weights & Biases.

    For each run, `trees` is a table with a [`~search.tree_table.TreeRow`] for each of the first 1,000 problems, and `tree_1` to
    `tree_5` are the pages of `trl-hrm inspect` of the problems whose solved share is closest to one half: the search found correct and
    wrong steps there.

    Args:
        folders (`Mapping[str, str or Path]`):
            Folders of `trl-hrm annotate`, or of one N of `trl-hrm step-search`. The key is added before the logged names: `""`, or for
            example `"n-8/"`.
        report_to (`Sequence[str]`):
            `"trackio"` and `"wandb"`. See [`~tracking.tracked_run`].
        project (`str`):
            Name of the project.
        run_name (`str`, *optional*):
            Name of the run. By default, the tracker chooses it.

    Raises:
        `FileNotFoundError`: If a folder contains no run.
    """
    values: dict[str, Any] = {}
    for prefix, folder in folders.items():
        rows, num_problems = [], 0
        for file in node_files(folder):
            for tree in read_trees(file):
                num_problems += 1
                if len(rows) < MAX_PROBLEMS:
                    rows.append(tree_row(tree))
        if num_problems > len(rows):
            say(f"{folder}: the logged table has the first {len(rows):,} of {num_problems:,} problems.")
        graded = [i for i, row in enumerate(rows) if row.solved_share is not None]
        chosen = sorted(sorted(graded, key=lambda i: abs(rows[i].solved_share - 0.5))[:NUM_PAGES])
        names = {rows[i].problem_id: f"{prefix}tree_{number}" for number, i in enumerate(chosen, 1)}
        rows = [row._replace(page=names.get(row.problem_id, "")) for row in rows]
        values[f"{prefix}trees"] = TrackedTable(TreeRow._fields, rows)
        for file in node_files(folder):
            for tree in read_trees(file):
                if name := names.get(tree.problem.problem_id):
                    found = Inspection(
                        tree,
                        mc_scores(tree),
                        leaf_counts(tree),
                        tree_totals(tree),
                        run=str(folder),
                        basis="child mean, solutions without an answer dropped",
                    )
                    values[name] = TrackedPage(render_tree(found))
    with tracked_run(report_to, project, run_name, read_manifest(folder)):
        log_to_trackers(report_to, values)
