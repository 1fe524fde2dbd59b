"""Readers of the solutions that `trl-hrm judge` judges: from runs, step-tree datasets and candidates."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..grading import thinking_spans
from ..io import shown
from ..messages import plain_row
from ..search.run_folder import node_files
from ..search.tree import SearchTree, make_id
from ..step_tree import StepTree
from .candidate_sources import is_run, opened_rows, read_candidates, refuse_options
from .candidates import CAST_NUMBERS, THINKING
from .candidates_config import CandidatesConfig
from .problems import problem_key
from .solutions import check_answers, count_answers, leave_out_thinking
from .sources import all_rows
from .step_labels import solution_ends, unite_steps
from .tree_files import NodeFiles


# Columns about the labels of the input, which describe other labels than the judge's. `hrm_view` would compute labels from some of them
OF_LABELS = ("labels", "label_weights", "label_kind", "mc_scores", "prompt_mc_score", "estimator", "eta", "truncated")


@dataclass(frozen=True)
class JudgedSolution:
    """
    A complete solution to judge.

    Args:
        steps (`list[str]`):
            S step texts.
        node_ids (`list[str]`):
            S ids. For a run, the `node_ids` of an export. Equal beginnings of the solutions of a problem have equal ids.
        place (`int`):
            Index among the solutions of the problem.
        columns (`dict[str, Any]`, *optional*, defaults to `{}`):
            Other columns of the input, which are kept.
    """

    steps: list[str]
    node_ids: list[str]
    place: int
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class JudgedProblem:
    """
    A problem with its different complete solutions.

    Args:
        problem_id (`str`):
            Id of the problem.
        prompt (`str`):
            Text of the problem.
        answer (`str`, *optional*):
            Reference answer.
        where (`str`):
            Location of the problem, for error messages.
        solutions (`list[JudgedSolution]`, *optional*, defaults to `[]`):
            Solutions in the order of the input.
    """

    problem_id: str
    prompt: str
    answer: str | None
    where: str
    solutions: list[JudgedSolution] = field(default_factory=list)


def read_solutions(config: CandidatesConfig, notes: Counter) -> Iterator[JudgedProblem]:
    """
    Read the solutions of a run of `trl-hrm annotate`, of a dataset of step trees (rows with `completions` and `labels` or `parents`), or
    of candidates. The problems of a run are read one by one.

    Args:
        config ([`CandidatesConfig`]):
            Input, as `candidates`, and options of its columns and steps.
        notes (`Counter`):
            Counter of the problems and solutions that are left out, by reason. It is updated in place.

    Yields:
        [`JudgedProblem`]: The problems with at least one solution, in the order in which they first appear.

    Raises:
        `FileNotFoundError`: If the input does not exist.
        `ValueError`: If a row is invalid, or an option has no effect on this input.
    """
    if is_run(config):
        refuse_options(
            config, ("segmentation", "step_pattern", "keep_thinking"), "a run, whose steps are judged as exported"
        )
        source = NodeFiles([str(file) for file in node_files(config.candidates)])
        for chunk in source.chunks():
            for where, _, tree in source.read(chunk):
                if tree.status != "done":
                    notes[f"problems_{tree.status}"] += 1
                    continue
                problem = JudgedProblem(tree.problem.problem_id, tree.problem.prompt, tree.problem.answer, where)
                problem.solutions += finished_paths(tree, notes)
                if problem.solutions:
                    yield problem
                else:
                    notes["problems_without_a_finished_solution"] += 1
        return
    if not Path(config.candidates).exists():
        raise FileNotFoundError(
            f"{config.candidates}: file not found. Expected a folder of `trl-hrm annotate`, a dataset folder, or a JSON Lines file."
        )
    with opened_rows(config) as (rows, before):
        first = next(all_rows(rows), None)
        if first is not None and _is_step_tree(first[1], before + first[0]):
            refuse_options(config, ("segmentation", "step_pattern", "join_steps"), "a dataset of steps")
            found = ((before + where, row) for where, row in all_rows(rows))
            yield from _read_step_trees(found, config, notes)
            return
    for problem in read_candidates(config, notes, answers=True):
        judged = JudgedProblem(problem.problem_id, problem.problem, problem.answer, problem.where)
        for candidate in problem.candidates:
            _add(judged, candidate.steps, None, {}, notes)
        if judged.solutions:
            yield judged
        else:
            notes["problems_without_a_finished_solution"] += 1


def finished_paths(tree: SearchTree, notes: Counter) -> list[JudgedSolution]:
    """
    Return the different complete solutions of a search tree, as paths of the steps that [`unite_steps`] returns.

    Args:
        tree ([`SearchTree`]):
            Search tree.
        notes (`Counter`):
            Counter of solutions with equal steps, and with a blank step. It is updated in place.
    """
    steps = unite_steps(tree, Counter())
    ends = solution_ends(tree, steps)
    num_final = sum(node.is_final and node.role != "rollout" for node in tree.nodes)
    num_found = sum(map(len, ends.values()))
    notes["solutions_with_a_blank_step"] += num_final - num_found
    notes["equal_solutions"] += num_found - len(ends)
    solutions = []
    for place, end in enumerate(ends):
        path = steps.path(end)
        ids = [tree.nodes[steps.members[step][0]].node_id for step in path]
        solutions.append(JudgedSolution([steps.texts[step] for step in path], ids, place))
    return solutions


def _is_step_tree(row: dict[str, Any], where: str) -> bool:
    has_labels = any(row.get(name) is not None for name in ("labels", "parents"))
    return (
        has_labels
        and isinstance(row.get("completions"), list)
        and isinstance(plain_row(row, where).get("prompt"), str)
    )


def _read_step_trees(
    rows: Iterable[tuple[str, dict[str, Any]]], config: CandidatesConfig, notes: Counter
) -> Iterator[JudgedProblem]:
    """
    Yield the paths of step trees, grouped by problem. Their labels are kept as `source_labels`, and the columns about them
    with the same prefix. Paths with merged steps are left out: they repeat the text of other paths, or only a part of it.
    """
    problems: dict[str, JudgedProblem] = {}
    number = 0
    for where, row in rows:
        number += 1
        labels = {"labels": [None] * len(row.get("completions") or [])} if row.get("labels") is None else {}
        tree = StepTree.from_row(row | labels, where)
        count_answers(tree.completions, notes, tree.parents)
        notes[THINKING] += any(map(thinking_spans, tree.completions)) and not config.keep_thinking
        tree, _ = leave_out_thinking(tree, where, config.keep_thinking)
        problem_id, answer = tree.extra.pop("problem_id", None), tree.extra.pop("answer", None)
        for name, value in (("problem_id", problem_id), ("answer", answer)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: `{name}` is {shown(value)}, expected a string. {CAST_NUMBERS}")
        new = JudgedProblem(problem_id or problem_key(tree.prompt).hex(), tree.prompt, answer, where)
        problem = problems.setdefault(new.problem_id, new)
        same_prompt = problem_key(problem.prompt) == problem_key(new.prompt)
        for name, is_same in (("prompt", same_prompt), ("answer", problem.answer == new.answer)):
            if not is_same:
                raise ValueError(
                    f"{where}: `{name}` is {shown(getattr(new, name))}, but {problem.where} has {shown(getattr(problem, name))} for the "
                    "same problem. Correct the rows, or give the problems different `problem_id`."
                )
        kept = {name: value for name, value in tree.extra.items() if not name.startswith("judge_")}
        for name, value in (kept | tree.step_columns).items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise ValueError(
                    f"{where}: `{name}` is {shown(value)}, which JSON cannot represent. Remove or convert the column."
                ) from None
        notes["solutions_without_steps"] += not tree.completions
        for path in tree.chains():
            if any(count > 1 for count in path.num_merged or ()):  # the single steps are another path
                notes["solutions_with_merged_steps"] += 1
                continue
            columns = dict(path.step_columns)
            node_ids = columns.pop("node_ids", None)
            if node_ids is not None and not all(isinstance(one, str) for one in node_ids):
                raise ValueError(f"{where}: `node_ids` is {shown(node_ids)}, expected a string per step.")
            columns = kept | columns | {"labels": path.labels}
            columns = {f"source_{name}" if name in OF_LABELS else name: value for name, value in columns.items()}
            _add(problem, path.completions, node_ids, columns, notes)
    check_answers(notes, number, config.candidates)
    for problem in problems.values():
        if problem.solutions:
            yield problem
        else:
            notes["problems_without_a_finished_solution"] += 1


def _add(
    problem: JudgedProblem, steps: list[str], node_ids: list[str] | None, columns: dict[str, Any], notes: Counter
) -> None:
    """Add a solution to its problem, unless it has no steps, or the problem has it already."""
    if not steps:
        notes["solutions_without_steps"] += 1
    elif any(solution.steps == steps for solution in problem.solutions):
        notes["equal_solutions"] += 1
    else:
        if node_ids is None:
            node_ids = [make_id("judge", problem.problem_id, json.dumps(steps[: i + 1])) for i in range(len(steps))]
        problem.solutions.append(JudgedSolution(steps, node_ids, len(problem.solutions), columns))
