"""
Pools of candidate solutions to choose from: problems with their reference answers, and for each of them the solutions that a
policy sampled, in their order.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.candidates import THINKING, cut_again, is_run, read_candidates, rule_of
from ..data.candidates_config import CandidatesConfig
from ..data.problem_sets import ProblemSet
from ..data.problems import problem_key
from ..grading import (
    DEFAULT_EXTRACTORS,
    extract_answer,
    opens_thinking,
    thinking_spans,
    visible_text,
    without_thinking_tags,
)
from ..search.nodes import read_trees
from ..search.run_folder import node_files, read_manifest
from ..search.steps import StepRule, cut_text
from ..search.tree import ROOT, SearchTree


@dataclass
class Candidate:
    """
    One solution.

    Args:
        text (`str`):
            What the policy wrote.
        steps (`list[str]`):
            Texts of its S steps. None for a blank solution.
        answer (`str`, *optional*):
            The answer that it states.
        finish (`str`, *optional*):
            Why sampling ended: `"stop"`, `"eos"` or `"length"`. `None` where that is not known.
        num_tokens (`int`, *optional*):
            Number of tokens that the policy wrote. `None` where that is not known.
        correct (`bool`, *optional*):
            Whether the answer is right, once it was graded. `None` for no answer, and for one that the grader gave up.
        scores (`list[float]`, *optional*):
            Scores of its steps, once it was scored. `None` for a solution without steps, and for one that is too long.
    """

    text: str
    steps: list[str]
    answer: str | None = None
    finish: str | None = None
    num_tokens: int | None = None
    correct: bool | None = None
    scores: list[float] | None = None


@dataclass
class PoolProblem:
    """
    A problem and its candidates.

    Args:
        problem_id (`str`):
            Key of the problem.
        problem (`str`):
            The problem, as the reward model is shown it.
        answer (`str`, *optional*):
            The reference answer.
        candidates (`list[Candidate]`):
            Its solutions, in the order in which they were sampled.
        where (`str`, *optional*, defaults to `""`):
            Place of the problem, for error messages.
        graded (`bool`, *optional*, defaults to `False`):
            Whether `correct` of the candidates was given with them. It is not graded again then.
    """

    problem_id: str
    problem: str
    answer: str | None
    candidates: list[Candidate]
    where: str = ""
    graded: bool = False


def reading_of(config: CandidatesConfig, extractors: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Return how candidates are read: with the given options and, where they are missing, with the settings of the run that the
    candidates come from, or the defaults.

    Args:
        config ([`CandidatesConfig`]):
            The candidates.
        extractors (`Sequence[str]`, *optional*):
            How an answer is read from a solution. By default as in the run, or [`extract_answer`]'s default.

    Returns:
        `dict[str, Any]`: `extractors`, `segmentation`, `step_pattern` if the segmentation is `"regex"`, `keep_thinking` and, for a
        run, `prompt_style`.
    """
    manifest = read_manifest(config.candidates) if is_run(config) else {}
    found: dict[str, Any] = {"extractors": list(extractors or manifest.get("extractors") or DEFAULT_EXTRACTORS)}
    rule = rule_of(config)
    if rule is not None:
        found["segmentation"] = rule.name
        if rule.name == "regex":
            found["step_pattern"] = rule.pattern
    if "prompt" in manifest:
        found["prompt_style"] = manifest["prompt"]["style"]
    return found | {"keep_thinking": config.keep_thinking}


def read_pool(
    config: CandidatesConfig, extractors: Sequence[str] | None, problems: ProblemSet | None, counts: Counter
) -> list[PoolProblem]:
    """
    Read candidates and the reference answers of their problems.

    Args:
        config ([`CandidatesConfig`]):
            What to read: a run folder of `trl-hrm annotate --search rollouts`, whose trees have the answers, or JSON Lines or a
            dataset, whose rows have them in a column `answer`, or have the grades of the candidates.
        extractors (`Sequence[str]`, *optional*):
            How an answer is read from a solution. By default as [`reading_of`] says.
        problems ([`ProblemSet`], *optional*):
            Problems with their answers, for rows without them. They are found by the text of the problem.
        counts (`Counter`):
            Counts `problems_without_answer`, which are left out, `problems_without_candidates`, `problems_with_given_grades`,
            `blank_steps_left_out`, columns that may carry a part of the problem and are not used, candidates whose thinking is
            left out, and rows that are or look like whole solutions.

    Returns:
        `list[PoolProblem]`: Each with an answer or with grades, in the order in which the problems first appear.

    Raises:
        `FileNotFoundError`: If there is no such file or folder.
        `ValueError`: If a row is faulty, the run is no sample of whole solutions, or no problem has an answer.
    """
    extractors = reading_of(config, extractors)["extractors"]
    if is_run(config):
        if problems is not None:
            raise ValueError(
                f"{config.candidates} is a run, which has the answers of its problems. Leave the problems out."
            )
        check_run(config.candidates)
        found = list(read_run(node_files(config.candidates), extractors, cut_again(config), config.keep_thinking))
        if not config.keep_thinking:
            texts = (candidate.text for problem in found for candidate in problem.candidates)
            counts[THINKING] += sum(bool(thinking_spans(text)) for text in texts)
        return found
    notes: Counter = Counter()
    groups = read_candidates(config, notes, answers=problems is None, grades=True)
    counts.update({key[-1]: count for key, count in notes.items()})
    found = [
        PoolProblem(
            group.problem_id,
            group.problem,
            group.answer,
            [
                Candidate(text, steps, _answer(text, group.prompt, extractors, config.keep_thinking), correct=correct)
                for text, steps, correct in zip(
                    group.texts, group.steps, group.grades or [None] * len(group.texts), strict=True
                )
            ],
            group.where,
            graded=group.grades is not None,
        )
        for group in groups
    ]
    empty = [problem for problem in found if not problem.candidates]
    if len(empty) == len(found):
        raise ValueError(
            f"{found[0].where}: found no candidates for this problem, nor for any other of {len(found):,}."
        )
    if empty:
        counts["problems_without_candidates"] += len(empty)
        found = [problem for problem in found if problem.candidates]
    if problems is not None:
        known = {problem_key(problem.prompt): problem.answer for problem in problems.problems}
        keys = [problem_key(problem.problem) for problem in found]
        counts["problems_without_candidates"] += len(known.keys() - set(keys))
        found = [replace(problem, answer=known.get(key)) for problem, key in zip(found, keys, strict=True)]
    answered = [problem for problem in found if problem.answer is not None or problem.graded]
    if any(problem.graded for problem in answered):
        counts["problems_with_given_grades"] += sum(problem.graded for problem in answered)
    counts["problems_without_answer"] += len(found) - len(answered)
    if not answered:
        raise ValueError(
            f"{found[0].where}: no reference answer for this problem, nor for any other of {len(found):,}. "
            + (
                "Give them in a column `answer`, give grades in a column `correct`, or name a file of problems with their answers (--problems)."
                if problems is None
                else "The problems and those of the candidates must have the same text, up to whitespace: where the "
                "prompts hold more than the problem, give the problem alone in a column `problem`."
            )
        )
    return answered


def check_run(folder: str | Path) -> None:
    """
    Check that a run sampled whole solutions of every problem, independent of each other.

    Raises:
        `ValueError`: If it did not: the leaves of a searched tree share their beginnings, and a root filter leaves out problems
            by how hard they are.
    """
    search = read_manifest(folder)["search"]
    if search["search"] != "rollouts" or "root_filter" in search:
        found = f"--search {search['search']}" + (" with --root_filter" if "root_filter" in search else "")
        raise ValueError(
            f"{folder}: a run of {found}, expected one of --search rollouts without --root_filter, whose solutions are "
            "independent samples for every problem. Sample them with: trl-hrm annotate ... --search rollouts "
            "--num_solutions N --num_completions 0"
        )


def read_run(
    files: Sequence[Path], extractors: Sequence[str], rule: StepRule | None = None, keep_thinking: bool = False
) -> Iterator[PoolProblem]:
    """
    The problems of a run whose search ended, with all their solutions, cut off ones too. See [`read_pool`]. With a `rule` the
    solutions are cut into steps again.
    """
    for file in files:
        for tree in read_trees(file):
            if tree.status == "done":
                problem = tree.problem
                where = f"{file}, problem {problem.problem_id!r}"
                candidates = list(_solutions(tree, extractors, rule, keep_thinking))
                yield PoolProblem(problem.problem_id, problem.prompt, problem.answer, candidates, where)


def take_first(problems: Sequence[PoolProblem], number: int, all_beyond: bool = False) -> list[PoolProblem]:
    """
    The problems with their first `number` candidates, or with all of them.

    Raises:
        `ValueError`: If a problem has fewer candidates.
    """
    if not problems:
        raise ValueError("there is no problem with candidates, expected one at least.")
    short = min(problems, key=lambda problem: len(problem.candidates))
    if len(short.candidates) < number:
        raise ValueError(
            f"{short.where}: problem {short.problem_id!r} has {len(short.candidates)} candidates, and the largest N is {number}. "
            f"Give it more candidates, leave it out, or ask for a smaller --n (up to {len(short.candidates)})."
        )
    return list(problems) if all_beyond else [replace(p, candidates=p.candidates[:number]) for p in problems]


def _answer(text: str, prompt: Any, extractors: Sequence[str], keep_thinking: bool) -> str | None:
    """The answer that a solution states, in its thinking only if that is kept."""
    if keep_thinking:
        return extract_answer(without_thinking_tags(text), extractors)
    opened = "<think>" if isinstance(prompt, str) and opens_thinking(prompt) else ""
    return extract_answer(visible_text(opened + text), extractors)


def _solutions(
    tree: SearchTree, extractors: Sequence[str], rule: StepRule | None, keep_thinking: bool
) -> Iterator[Candidate]:
    """The solutions that a tree of rollouts begins with; each stands whole beside the chain of its steps."""
    firsts, below = {}, {}
    for i, node in enumerate(tree.nodes):
        if node.role == "segment":
            if node.parent == ROOT:
                firsts[node.round, node.child_index] = i
            else:
                below[node.parent] = i
    for node in tree.nodes:
        if node.parent == ROOT and node.role == "rollout":
            steps, i = [], firsts.get((node.round, node.child_index))
            while i is not None:
                steps.append(tree.step_text(i))
                i = below.get(i)
            steps = [text for text in steps if text]
            has_answer = node.is_final and (steps or keep_thinking)  # a solution that only thinks has none
            answer = _answer(node.text, None, extractors, keep_thinking) if has_answer else None
            if rule is not None:
                steps = cut_text(node.text, rule, keep_thinking)
            yield Candidate(node.text, steps, answer, node.finish, len(node.token_ids))


def to_row(problem: PoolProblem) -> dict[str, Any]:
    """The row of a problem in `candidates.jsonl`."""
    names = ("text", "steps", "answer", "correct", "finish", "scores", "num_tokens")
    candidates = [{name: getattr(candidate, name) for name in names} for candidate in problem.candidates]
    row = {
        "problem_id": problem.problem_id,
        "problem": problem.problem,
        "answer": problem.answer,
        "candidates": candidates,
    }
    return row | {"graded": True} if problem.graded else row


def from_row(row: dict[str, Any], where: str = "") -> PoolProblem:
    """The problem of a row of `candidates.jsonl`."""
    candidates = [Candidate(**candidate) for candidate in row["candidates"]]
    return PoolProblem(row["problem_id"], row["problem"], row["answer"], candidates, where, row.get("graded", False))
