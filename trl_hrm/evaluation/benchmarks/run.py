"""Run benchmarks: score the solutions of each suite, compute the metrics, and write the results."""

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ... import __version__
from ...data.problems import group_equal, text_key
from ...io import dump_json, read_json, read_json_lines, write_or_keep
from ...scoring.candidate_scores import score_steps, scorer_cost
from ...scoring.generative_scorer import GenerativeScorer
from ...scoring.scoring_config import ScoringConfig
from ...scoring.tree_scorer import TreeScorer
from .big_bench_mistake import BIG_BENCH_MISTAKE
from .measures import INTERVALS, measure
from .prm_bench import PRM_BENCH
from .process_bench import PROCESS_BENCH
from .suite import Solution, Suite, SuiteData


SUITES = {suite.name: suite for suite in (PROCESS_BENCH, PRM_BENCH, BIG_BENCH_MISTAKE)}
RESULTS = "results.json"
SCORES = "scores.jsonl"
JUDGEMENTS = "judgements.jsonl"  # log of a judge
BLOCK = 32  # number of problems encoded at a time


def run_suite(
    suite: Suite,
    data: SuiteData,
    scorer: TreeScorer,
    scoring: ScoringConfig,
    threshold: float = 0.5,
    validation_size: float = 0.2,
    seed: int = 42,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Score the solutions of a suite and compute its metrics.

    Args:
        suite ([`Suite`]):
            Suite to evaluate, one of `SUITES`.
        data ([`SuiteData`]):
            Solutions of the suite. See [`~evaluation.benchmarks.suite.read_suites`].
        scorer ([`~scoring.tree_scorer.TreeScorer`]):
            Reward model.
        scoring ([`~scoring.scoring_config.ScoringConfig`]):
            How steps are scored.
        threshold, validation_size, seed:
            See [`measure`].

    Returns:
        `tuple[dict[str, Any], list[dict[str, Any]]]`: The results of [`measure`] with `sources`, `faults` of rows,
        `seconds` and, for a judge, `cost`; and a row for each solution with its `labels` (`None` for an unlabelled step) and `scores` (`None`
        if the solution is too long).
    """
    began = time.perf_counter()
    counts: Counter = Counter()
    scores = score_solutions(scorer, data.solutions, scoring, progress=True, counts=counts)
    seconds = time.perf_counter() - began
    unjudged = counts["candidates_without_verdict"]
    results = {
        "sources": data.sources,
        **measure(suite, data.solutions, scores, threshold, validation_size, seed, unjudged),
    }
    if isinstance(scorer, GenerativeScorer):
        results["cost"] = scorer_cost(counts)
    results["counts"] |= data.counts()
    results["faults"] = {"left_out": data.faults.left_out, "kept": data.faults.kept}
    rows = [
        {
            "suite": suite.name,
            "subset": solution.subset,
            "id": solution.id,
            # ids can be missing or repeated
            "solution": text_key("\n".join([solution.problem, *solution.steps])).hex(),
            "where": solution.where,
            "labels": solution.labels,
            "scores": values,
        }
        for solution, values in zip(data.solutions, scores, strict=True)
    ]
    return results | {"seconds": seconds}, rows


def score_solutions(
    scorer: TreeScorer,
    solutions: Sequence[Solution],
    scoring: ScoringConfig,
    progress: bool = False,
    counts: Counter | None = None,
) -> list[list[float] | None]:
    """
    Score the steps of solutions.

    Args:
        scorer ([`~scoring.tree_scorer.TreeScorer`]):
            Reward model.
        solutions (`Sequence[Solution]`):
            Solutions to score. Solutions to the same problem are scored together, so that the scorer can share their
            common prefix.
        scoring ([`~scoring.scoring_config.ScoringConfig`]):
            How steps are scored.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        counts (`Counter`, *optional*):
            Counter to add to. See [`~scoring.candidate_scores.score_steps`].

    Returns:
        `list[list[float] | None]`: Scores of the S steps of each solution in `[0, 1]`. `None` for solutions with more
        tokens than the model has positions, and for solutions that a judge has not judged.

    Raises:
        `ValueError`: If a score is not finite, or there is not exactly one score per step.
    """
    scores: list[list[float] | None] = [None] * len(solutions)
    problems = group_equal(solution.problem for solution in solutions)
    with tqdm(total=len(solutions), desc="Scoring", unit="solution", disable=not progress) as bar:
        for start in range(0, len(problems), BLOCK):
            block = problems[start : start + BLOCK]
            found = score_steps(
                scorer,
                [solutions[members[0]].problem for members in block],
                [[solutions[i].steps for i in members] for members in block],
                scoring,
                [[solutions[i].where for i in members] for members in block],
                counts,
            )
            for members, values in zip(block, found, strict=True):
                for i, step_scores in zip(members, values, strict=True):
                    scores[i] = step_scores
            bar.update(sum(map(len, block)))
    return scores


def check_output(folder: Path, overwrite: bool) -> None:
    """
    Raise `FileExistsError` if the folder already has results, unless `overwrite` is set, or if it has other files with their names.

    An interrupted run can leave scores without results. They are replaced.
    """
    results, scores = folder / RESULTS, folder / SCORES
    if results.exists() and not overwrite:
        raise FileExistsError(f"{results} exists. Choose another --output_dir, or pass --overwrite to replace it.")
    if results.exists():
        path, is_own = results, read_json(results).get("kind") == "benchmark"
    else:
        path, is_own = scores, True
        for _, row in islice(read_json_lines(scores), 1) if scores.exists() else ():
            is_own = row.keys() >= {"suite", "labels", "scores"}
    if not is_own:
        raise FileExistsError(f"{path} exists, and was not written by `benchmark`. Choose another --output_dir.")


def write_results(
    folder: Path,
    suites: dict[str, dict[str, Any]],
    rows: Iterable[dict[str, Any]],
    reward_model: dict[str, Any],
    settings: dict[str, Any],
    seed: int,
) -> None:
    """
    Write `results.json`, and `scores.jsonl` with the scores of all steps.

    Args:
        folder (`Path`):
            Folder of the results.
        suites (`dict[str, dict[str, Any]]`), rows (`Iterable[dict[str, Any]]`):
            Results of each suite, and rows of all suites. See [`run_suite`].
        reward_model (`dict[str, Any]`):
            Name and options of the reward model.
        settings (`dict[str, Any]`):
            All other settings that affect the numbers.
        seed (`int`):
            Seed of the run.
    """
    versions = {"trl_hrm": __version__} | {name: version(name) for name in ("numpy", "torch", "transformers")}
    report = {
        "kind": "benchmark",
        "reward_model": reward_model,
        "settings": settings,
        "suites": suites,
        "intervals": INTERVALS,
        "seed": seed,
        "versions": versions,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_or_keep(
        folder,
        {
            SCORES: "".join(dump_json(row, folder / SCORES) + "\n" for row in rows),
            RESULTS: dump_json(report, folder / RESULTS, indent=2) + "\n",
        },
    )
