"""Scores and grades of a pool of candidates, a block of problems at a time."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from ..scoring.candidate_scores import solution_lengths
from ..scoring.paths import TreeScorer
from .answer_classes import judge_problems
from .pool import Candidate, PoolProblem
from .results import Part, judged_row


BLOCK = 16  # problems of a block


def judge_pool(
    problems: Sequence[tuple[int, PoolProblem]],
    scorer: TreeScorer,
    grader: Any,
    part: Part,
    spans: Sequence[int] = (1,),
    combine: Literal["max", "mean"] = "max",
    num_graders: int = 1,
    progress: bool = False,
) -> None:
    """
    Score and grade the candidates of problems, where this was not done before.

    Args:
        problems (`Sequence[tuple[int, PoolProblem]]`):
            Problems, each with its place among all.
        scorer ([`~scoring.paths.TreeScorer`]):
            The reward model. Anything with its `score`, `tokenizer`, `step_format` and `max_positions`.
        grader ([`~grading.AnswerGrader`]):
            Compares answers. Anything with its `grade`.
        part ([`Part`]):
            Where the blocks are written. Those that are there are not made again.
        spans, combine:
            How steps are scored. See [`~scoring.paths.TreeScorer.score`].
        num_graders (`int`, *optional*, defaults to `1`):
            Number of the grader's processes.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: If the reward model returns a score that is not a number, or not one for each step.
    """
    done = part.num_blocks * BLOCK
    with tqdm(
        total=len(problems),
        initial=min(done, len(problems)),
        desc="Scoring and grading",
        unit="problem",
        disable=not progress,
    ) as bar:
        for start in range(done, len(problems), BLOCK):
            block = problems[start : start + BLOCK]
            part.append(_judge_block(block, scorer, grader, spans, combine, num_graders))
            bar.update(len(block))
    part.finish()


def pool_digest(problems: Sequence[PoolProblem]) -> str:
    """16 hex digits that stand for the problems, their answers and their candidates."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in problems:
        digest.update(repr((problem.problem_id, problem.problem, problem.answer)).encode())
        for candidate in problem.candidates:
            digest.update(repr((candidate.text, candidate.steps, candidate.answer)).encode())
            if problem.graded:
                digest.update(repr(candidate.correct).encode())
    return digest.hexdigest()


def files_digest(folder: str) -> str | None:
    """16 hex digits that change when a file of the folder is written anew. `None` if there is no such folder."""
    if not Path(folder).is_dir():
        return None
    files = sorted(path for path in Path(folder).iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()


def _judge_block(
    block: Sequence[tuple[int, PoolProblem]],
    scorer: TreeScorer,
    grader: Any,
    spans: Sequence[int],
    combine: Literal["max", "mean"],
    num_graders: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    counts: Counter = Counter()
    answers = [[candidate.answer for candidate in problem.candidates] for _, problem in block]
    grades = [[candidate.correct for candidate in one.candidates] if one.graded else None for _, one in block]
    judged = judge_problems(answers, [problem.answer for _, problem in block], grader, num_graders, grades)
    kept = [
        (place, problem, found) for (place, problem), found in zip(block, judged, strict=True) if found is not None
    ]
    counts["problems_ungradable"] = len(block) - len(kept)
    unreadable = [
        {"problem_id": problem.where or problem.problem_id, "answer": problem.answer}
        for (_, problem), found in zip(block, judged, strict=True)
        if found is None
    ]
    scores = _score([problem for _, problem, _ in kept], scorer, spans, combine, counts)
    rows = []
    for (place, problem, found), values in zip(kept, scores, strict=True):
        candidates = [
            replace(candidate, correct=correct, scores=value)
            for candidate, correct, value in zip(problem.candidates, found.correct, values, strict=True)
        ]
        counts["candidates_unreadable"] += found.num_unreadable
        _count(candidates, problem.graded, counts)
        rows.append(judged_row(place, replace(problem, candidates=candidates), found.classes))
    counts["rest_seconds"] = time.perf_counter() - began - counts["scorer_seconds"]
    return {"rows": rows, "counts": counts, "unreadable_references": unreadable}


def _score(
    problems: Sequence[PoolProblem],
    scorer: TreeScorer,
    spans: Sequence[int],
    combine: Literal["max", "mean"],
    counts: Counter,
) -> list[list[list[float] | None]]:
    """Step scores of all candidates, `None` for those without steps and those that the model cannot read to the end."""
    judged: list[list[int]] = []
    for problem in problems:
        judged.append([])
        for i, candidate in enumerate(problem.candidates):
            if not candidate.steps:
                counts["candidates_without_steps"] += 1
                continue
            num_tokens, longest = solution_lengths(scorer, problem.problem, candidate.steps, spans)
            if scorer.max_positions is not None and longest > scorer.max_positions:
                counts["candidates_too_long"] += 1
                continue
            counts["scorer_tokens"] += num_tokens
            counts["scorer_steps"] += len(candidate.steps)
            judged[-1].append(i)
    some = [place for place, indices in enumerate(judged) if indices]
    found: list[list[list[float] | None]] = [[None] * len(problem.candidates) for problem in problems]
    if not some:
        return found
    began = time.perf_counter()
    scores = scorer.score(
        [problems[place].problem for place in some],
        [[problems[place].candidates[i].steps for i in judged[place]] for place in some],
        spans=spans,
        combine=combine,
    )
    counts["scorer_seconds"] += time.perf_counter() - began
    counts["scorer_calls"] += 1
    for place, values in zip(some, scores, strict=True):
        for i, steps in zip(judged[place], values, strict=True):
            _check_scores(steps, problems[place].candidates[i], problems[place])
            found[place][i] = steps
    return found


def _check_scores(scores: Sequence[float], candidate: Candidate, problem: PoolProblem) -> None:
    if len(scores) != len(candidate.steps) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{problem.where or problem.problem_id}: the reward model scores {len(candidate.steps)} steps with {list(scores)}, "
            "expected one finite number each."
        )


def _count(candidates: Sequence[Candidate], graded: bool, counts: Counter) -> None:
    for candidate in candidates:
        counts["num_candidates"] += 1
        counts["candidates_without_answer"] += candidate.answer is None
        counts["candidates_cut_off"] += candidate.finish == "length"
        counts["not_graded"] += (graded or candidate.answer is not None) and candidate.correct is None
        counts["policy_tokens"] += candidate.num_tokens or 0
