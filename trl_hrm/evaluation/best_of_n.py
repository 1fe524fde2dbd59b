"""
Best-of-N. [`score_pool`] scores and grades candidates, one block of problems at a time. [`collect_results`] computes the
curves from all blocks. The problems can be divided among several processes; the first process waits for the others and
writes the results.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from typing_extensions import TypedDict

from .. import __version__
from ..data.candidates import THINKING, ProblemCandidates
from ..data.problems import UNUSED
from ..grading import DEFAULT_EXTRACTORS, thinking_spans
from ..io import read_json, write_json
from ..schema import Amount, Count, check_json
from ..scoring.aggregate import Aggregate
from ..scoring.candidate_scores import score_steps, scorer_cost
from ..scoring.scoring_config import ScoringConfig
from ..scoring.tree_scorer import TreeScorer
from ..search.outcomes import ordered, outcome_of, outcome_warnings, reference_warnings, step_warnings
from ..search.run_folder import MANIFEST, Shard, mixture_warnings, read_manifest, read_summary, shard_name
from ..search.scheduler import Progress
from .answer_classes import grade_problems
from .curves import INTERVALS, ScoredProblem, make_curves, summarize
from .results import (
    Part,
    Results,
    compare_headers,
    read_header,
    read_parts,
    scored_row,
    write_candidates,
    write_results,
)


BLOCK = 16  # number of problems per block
# As outcomes without a grade: if more than half of the candidates have no score, most of the responses were wasted
MAX_WITHOUT_VERDICT = 0.5
COUNTED = (  # order of `counts` in the results
    "problems_without_answer",
    "problems_without_candidates",
    "problems_ungradable",
    "problems_with_given_grades",
    "problem_records_left_out",
    "blank_steps_left_out",
    "num_candidates",
    "candidates_without_answer",
    "candidates_without_steps",
    "candidates_cut_off",
    "candidates_too_long",
    "candidates_without_verdict",
    "candidates_with_thinking_left_out",
    "candidates_unreadable",
    "not_graded",
    "rows_of_whole_solutions",
    "rows_with_several_answers",
)
VERSIONS = ("torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")


def score_pool(
    problems: Sequence[tuple[int, ProblemCandidates]],
    scorer: TreeScorer | None,
    grader: Any,
    part: Part,
    scoring: ScoringConfig,
    num_graders: int = 1,
    progress: bool = False,
) -> None:
    """
    Score and grade the candidates of problems. Blocks that are already written are skipped.

    Args:
        problems (`Sequence[tuple[int, ProblemCandidates]]`):
            Problems with their index in the whole data set.
        scorer ([`~scoring.tree_scorer.TreeScorer`], *optional*):
            Reward model, or any object with the same `score`, `tokenizer`, `step_format` and `max_positions`. Without it, candidates
            are only graded.
        grader ([`~grading.AnswerGrader`]):
            Grader that compares answers, or any object with the same `grade` method.
        part ([`Part`]):
            File to which the blocks are written.
        scoring ([`~scoring.scoring_config.ScoringConfig`]):
            How steps are scored.
        num_graders (`int`, *optional*, defaults to `1`):
            Number of processes of the grader.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: If the reward model returns a score that is not finite, or not exactly one score per step.
    """
    done = part.num_blocks * BLOCK
    with tqdm(
        total=len(problems),
        initial=min(done, len(problems)),
        desc="Grading" if scorer is None else "Scoring and grading",
        unit="problem",
        disable=not progress,
    ) as bar:
        for start in range(done, len(problems), BLOCK):
            block = problems[start : start + BLOCK]
            part.append(_score_block(block, scorer, grader, scoring, num_graders))
            bar.update(len(block))
    part.finish()


def _score_block(
    block: Sequence[tuple[int, ProblemCandidates]],
    scorer: TreeScorer | None,
    grader: Any,
    scoring: ScoringConfig,
    num_graders: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    counts: Counter = Counter()
    graded = grade_problems(
        [[candidate.answer for candidate in problem.candidates] for _, problem in block],
        [problem.answer for _, problem in block],
        grader,
        num_graders,
        [[candidate.correct for candidate in one.candidates] if one.graded else None for _, one in block],
    )
    unreadable, kept = [], []
    for (place, problem), grades in zip(block, graded, strict=True):
        if grades is None:
            unreadable.append({"problem_id": problem.where or problem.problem_id, "answer": problem.answer})
        else:
            kept.append((place, problem, grades))
    counts["problems_ungradable"] = len(unreadable)
    with_steps = [[candidate.steps for candidate in one.candidates if candidate.steps] for _, one, _ in kept]
    if scorer is None:
        scores = [[None] * len(group) for group in with_steps]
    else:
        scores = score_steps(
            scorer,
            [problem.problem for _, problem, _ in kept],
            with_steps,
            scoring,
            [[one.where or one.problem_id] * len(group) for (_, one, _), group in zip(kept, with_steps, strict=True)],
            counts,
        )
    rows = []
    for (place, problem, grades), values in zip(kept, map(iter, scores), strict=True):
        candidates = []
        for candidate, correct in zip(problem.candidates, grades.correct, strict=True):
            scored = replace(candidate, correct=correct, scores=next(values) if candidate.steps else None)
            candidates.append(scored)
            counts["num_candidates"] += 1
            counts["candidates_without_steps"] += not candidate.steps
            counts["candidates_without_answer"] += candidate.answer is None
            counts["candidates_cut_off"] += candidate.finish == "length"
            counts["not_graded"] += (problem.graded or candidate.answer is not None) and correct is None
            counts["policy_tokens"] += candidate.num_tokens or 0
        counts["candidates_unreadable"] += grades.num_unreadable
        rows.append(scored_row(place, replace(problem, candidates=candidates), grades.classes))
    # the seconds of a judge include responses of an earlier start
    counts["rest_seconds"] = max(0.0, time.perf_counter() - began - counts["scorer_seconds"])
    return {"rows": rows, "counts": counts, "unreadable_references": unreadable}


def pool_digest(problems: Sequence[ProblemCandidates]) -> str:
    """Return 16 hex digits that identify the problems, their answers and their candidates."""
    digest = hashlib.blake2b(digest_size=8)
    for problem in problems:
        digest.update(repr((problem.problem_id, problem.problem, problem.answer)).encode())
        for candidate in problem.candidates:
            digest.update(repr((candidate.text, candidate.steps, candidate.answer)).encode())
            if problem.graded:
                digest.update(repr(candidate.correct).encode())
    return digest.hexdigest()


def wait_for_parts(parts: Sequence[Path], header: dict[str, Any]) -> None:
    """
    Wait for the other processes to finish. If one of them fails, `accelerate launch` stops this process too.

    Args:
        parts (`Sequence[Path]`):
            Files of the finished parts of all processes.
        header (`dict[str, Any]`):
            Header of this run. A part with a different header belongs to an earlier run.
    """

    def is_done(path: Path) -> bool:
        if not path.exists():
            return False
        found = read_header(path) or {}
        return not compare_headers(
            {**found, "candidates": None}, {**header, "candidates": None}
        ).changes  # own of each process

    told = False
    while missing := [path.name for path in parts if not is_done(path)]:
        if not told:
            tqdm.write(f"waiting for {len(missing)} other processes: {', '.join(missing[:4])}")
            told = True
        time.sleep(0.5)


def collect_results(
    folder: Path,
    parts: Sequence[Path],
    source: Path,
    reward_model: dict[str, Any] | None,
    settings: dict[str, Any],
    n: Sequence[int],
    aggregates: Sequence[Aggregate],
    num_draws: int,
    seed: int,
    counts: Counter,
    sampled: bool,
    strategy: str = "best_of_n",
) -> tuple[Results, list[ScoredProblem]]:
    """
    Compute the results of finished parts, and write `candidates.jsonl`. [`finish_results`] writes the results.

    Args:
        folder (`Path`):
            Folder of the results.
        parts (`Sequence[Path]`):
            Files of the finished parts of all processes. See [`wait_for_parts`].
        source (`Path`):
            Source of the candidates: a run folder, a file or a dataset.
        reward_model (`dict[str, Any]`, *optional*):
            Name and options of the reward model, saved in the results.
        settings (`dict[str, Any]`):
            All other settings that affect the numbers, saved in the results.
        n (`Sequence[int]`), num_draws (`int`), seed (`int`):
            See [`make_curves`].
        aggregates (`Sequence[Aggregate]`):
            How step scores are aggregated to the score of a solution. See [`~scoring.aggregate.aggregate`].
        counts (`Counter`):
            Counts from reading the candidates. Not modified.
        sampled (`bool`):
            Whether the run in `source` was sampled for these results. Results of an existing run may extract its
            answers differently.
        strategy (`str`, *optional*, defaults to `"best_of_n"`):
            Strategy saved in the results.

    Returns:
        `tuple[Results, list[ScoredProblem]]`: The results, and the scores and grades of each problem.

    Raises:
        `ValueError`: If no problem is left.
    """
    unreadable: list[dict[str, str]] = []
    rows, counted = read_parts(parts, unreadable)
    scored = []
    outcomes: Counter = Counter()
    extractors = settings.get("extractors", DEFAULT_EXTRACTORS)
    counts = Counter(counts)

    def problems():
        for problem, classes in rows:
            outcomes.update(outcome_of(c.answer, c.correct, c.finish, c.text, extractors) for c in problem.candidates)
            scored.append(summarize(problem, classes, aggregates))
            if sampled:
                counts[THINKING] += sum(bool(thinking_spans(candidate.text)) for candidate in problem.candidates)
            yield problem

    write_candidates(folder, problems())
    counts += counted

    policy, manifest, statuses = None, {}, Counter()
    if (source / MANIFEST).is_file():
        names = ("prompt", "search", "seed", "versions")
        manifest, summary = read_manifest(source, ["engine", *names]), read_summary(source)
        policy = {**manifest["engine"], **{name: manifest[name] for name in names}}
        statuses.update({f"problems_{s}": count for s, count in summary["problems"].items() if s != "done"})
        if summary["shards_missing"]:
            statuses["shards_missing"] = summary["shards_missing"]
        manifest = manifest | summary
        if not sampled:  # answers may be extracted differently, and not all solutions are candidates
            manifest |= {"solutions": None, "extractors": settings["extractors"]}

    # unreadable answers count as wrong in the curves, but are listed separately here
    solutions = {**outcomes, "wrong": outcomes["wrong"] - counts["candidates_unreadable"]}
    solutions["unreadable"] = counts["candidates_unreadable"]
    solutions = manifest.get("solutions") or solutions
    all_counts = counts + statuses
    warnings = [
        *reference_warnings(
            all_counts["problems_ungradable"], [*manifest.get("unreadable_references", ()), *unreadable]
        ),
        *outcome_warnings(solutions, manifest.get("search", {}), settings | manifest),
        *step_warnings(manifest.get("unsplit", {}), manifest),
        *mixture_warnings(manifest),
    ]
    if counts["candidates_without_verdict"] > MAX_WITHOUT_VERDICT * counts["num_candidates"]:
        warnings.append(
            f"{counts['candidates_without_verdict']:,} of {counts['num_candidates']:,} candidates have no score, because the judge has no "
            "readable verdict for one of their steps. Look at its responses in judgements*.jsonl. If they are cut off, raise "
            "--judge_max_tokens. If they have another form, use another --judge_template."
        )
    if not scored:
        problems_of = manifest.get("started_with", {}).get("problems")
        raise ValueError(
            f"{source}: no problem{f' of {problems_of}' if problems_of else ''} is left to select solutions for: {dict(all_counts)}. `problems_error` counts problems with "
            f"failed requests. {' '.join(warnings)}"
        )
    curves = make_curves(scored, n, num_draws, seed)
    names = [*COUNTED, *(name for name in counts if name.startswith(UNUSED)), *statuses]
    results = Results(
        strategy=strategy,
        reward_model=reward_model,
        policy=policy,
        settings=settings,
        versions={"trl_hrm": __version__, **{name: version(name) for name in VERSIONS}},
        seed=seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        num_problems=len(scored),
        counts={name: all_counts[name] for name in dict.fromkeys(names)},
        n=sorted(set(n)),
        curves=curves.curves,
        hacking_gap=curves.hacking_gap,
        calibration=curves.calibration,
        estimate=curves.estimate,
        intervals=INTERVALS,
        solutions=ordered(solutions),
        warnings=warnings,
        cost=total_cost(source if policy else None, counts),
    )
    return results, scored


def finish_results(folder: Path, results: Results) -> None:
    """Write `results.json`, and remove the parts in the folder and in its run folders."""
    write_results(folder, results)
    for pattern in ("part-*-of-*.jsonl", "partial-*-of-*.jsonl"):
        for path in [*folder.glob(pattern), *folder.glob(f"*/{pattern}")]:
            path.unlink()


class Costs(TypedDict):
    """Cost of sampling."""

    seconds: Amount
    num_tokens: Count
    num_requests: Count
    num_sequences: Count


class SavedCost(TypedDict):
    """Content of `cost-*.json`."""

    costs: Costs
    is_known: bool
    log_bytes: Count


def _read_cost(path: Path) -> dict[str, Any]:
    remedy = "Delete the file. The cost of sampling is then unknown."
    found = read_json(path, remedy)
    check_json(found, SavedCost, path, remedy)
    return found


class SampleCost:
    """
    Cost of sampling a shard, summed over all starts of its run, and saved next to the run's log. The cost is unknown
    after an interrupted start, because the log has grown since the last completed start.

    Args:
        folder (`Path`):
            Folder of the run.
        shard ([`Shard`]):
            Shard of this process.
    """

    def __init__(self, folder: Path, shard: Shard):
        self.path = folder / shard_name("cost", shard.index, shard.count, "json")
        self.log = folder / shard_name("log", shard.index, shard.count, "jsonl")
        names = ("seconds", "num_tokens", "num_requests", "num_sequences")
        before = {"costs": dict.fromkeys(names, 0), "is_known": True, "log_bytes": 0}
        if self.path.is_file():
            before = _read_cost(self.path)
        self.costs = before["costs"]
        self.is_known = before["is_known"] and before["log_bytes"] == self._log_bytes()

    def end(self, progress: Progress) -> None:
        """Add the cost of a completed start, and save it."""
        self.costs["seconds"] += progress.seconds
        self.costs["num_tokens"] += progress.generated_tokens
        self.costs["num_requests"] += progress.num_requests
        self.costs["num_sequences"] += progress.num_sequences
        write_json(self.path, {"costs": self.costs, "is_known": self.is_known, "log_bytes": self._log_bytes()})

    def _log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0


def total_cost(run: Path | None, counts: Counter) -> dict[str, Any]:
    """
    Return the `cost` of [`~evaluation.results.Results`].

    Args:
        run (`Path`, *optional*):
            Run folder of the candidates. If its [`SampleCost`] is unknown, only tokens and sequences are given.
        counts (`Counter`):
            Counts of the blocks of [`score_pool`].
    """
    policy = None
    if run is not None:
        found = [_read_cost(path) for path in sorted(run.glob("cost-*.json"))]
        if found and all(one["is_known"] for one in found):
            policy = {name: sum(one["costs"][name] for one in found) for name in found[0]["costs"]}
        else:
            counted = {"num_tokens": counts["policy_tokens"], "num_sequences": counts["num_candidates"]}
            policy = {"seconds": None, "num_requests": None} | counted
    return {
        "policy": policy,
        "scorer": scorer_cost(counts),
        "rest_seconds": counts["rest_seconds"],
    }
