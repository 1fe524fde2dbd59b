"""
`trl-hrm best-of-n` with the strategies `step_search`, `beam_search` and `diverse_tree_search`: a search for each N, and one result.

The folder of each N, such as `n-8`, is a run like those of `trl-hrm annotate`, with a manifest and a log to go on from.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.problem_sets import refuse_caseless_ids
from ..io import write_json
from ..scoring.paths import TreeScorer
from ..search.engine import Engine
from ..search.level_search import LevelProgress, LevelSearch
from ..search.log import EventLog, shard_name
from ..search.manifest import check_manifest, resumed_prompt
from ..search.outcomes import ordered, outcome_warnings, reference_warnings
from ..search.prompts import Prompt
from ..search.run_folder import finish_shard, read_json, read_summary
from ..search.scheduler import SchedulerConfig
from ..search.shards import Shard, problem_shard
from ..search.step_search import StepSearch
from ..search.steps import StepRule
from ..search.tree import Problem
from .curves import INTERVALS, curve_with_gap
from .pool import PoolProblem
from .results import Results, candidates_name, write_candidates, write_results
from .step_search_config import StepSearchConfig
from .step_search_results import SearchedProblems
from .tree_scores import score_fitting


CURVE = "step_search"
ALONE = Shard(0, 1)
SPENT = ("seconds", "policy_seconds", "scorer_seconds", "num_calls")
TOTALS = (
    "num_candidates",
    "problems_without_answer",
    "candidates_without_answer",
    "candidates_unreadable",
    "not_graded",
)


def run_step_search(
    config: StepSearchConfig,
    problems: Sequence[Problem],
    engine: Engine,
    scorer: TreeScorer,
    grader: Any,
    prompt: Prompt,
    rule: StepRule,
    manifest: dict[str, Any],
    reward_model: dict[str, Any],
    shard: Shard = ALONE,
    num_graders: int = 1,
) -> Results | None:
    """
    Search solutions of problems for each N, or go on with it, and write `candidates-n8.jsonl` and the like, and `results.json`.

    Args:
        config ([`StepSearchConfig`]):
            How to search.
        problems (`Sequence[Problem]`):
            All problems; those of other shards are left to them. One with a prefix is searched from the end of it.
        engine ([`Engine`]):
            The policy. It is closed at the end.
        scorer ([`~scoring.paths.TreeScorer`]):
            The reward model. Anything with its `score_trees`, `tokenizer`, `step_format` and `max_positions`.
        grader ([`~grading.AnswerGrader`]):
            Compares answers.
        prompt ([`Prompt`]), rule ([`StepRule`]):
            What the policy is asked, and what tells its steps apart.
        manifest (`dict[str, Any]`):
            What decides the results beside search and reward model: `engine`, `prompt`, `steps`, `grader` and so on, with
            `versions` and `started_with`. See [`check_manifest`].
        reward_model (`dict[str, Any]`):
            The reward model and how it is run, for manifest and results.
        shard ([`Shard`], *optional*):
            Which of several processes this is. The one that ends last writes the results.
        num_graders (`int`, *optional*, defaults to `1`):
            Number of the grader's processes.

    Returns:
        [`Results`] or `None`: `None` while other shards are not done.

    Raises:
        `ValueError`: If the folder holds a search with other settings, a score is not a number, or no problem could be searched.
    """
    searches = config.searches(prompt, rule)
    prompt = resumed_prompt(prompt, *(_folder_of(config, n) for n in searches))
    for problem in problems[:1]:  # what is wrong with the prompt shows before anything is written
        prompt.encode(engine.tokenizer, problem.prompt)
    note = prompt.describe_control_text(engine.tokenizer, (problem.prompt for problem in problems))
    if note is not None:
        tqdm.write(note)
    manifest = manifest | {"prompt": asdict(prompt), "reward_model": reward_model} | config.describe()
    for n, search in searches.items():
        check_manifest(_folder_of(config, n), manifest | {"search": {"search": config.strategy} | search.describe()})
    mine = [
        (place, problem)
        for place, problem in enumerate(problems)
        if problem_shard(problem.problem_id, shard.count) == shard.index
    ]
    try:
        asyncio.run(_search_all(config, searches, mine, prompt, engine, scorer, grader, shard))
    except KeyboardInterrupt:
        raise SystemExit("stopped; start again with the same command to go on.") from None
    for n in searches:
        finish_shard(_folder_of(config, n), shard.index, shard.count)
    if any(read_summary(_folder_of(config, n))["shards_missing"] for n in searches):
        return None
    return _write(config, searches, problems, manifest, grader, num_graders)


async def _search_all(
    config: StepSearchConfig,
    searches: dict[int, StepSearch],
    problems: list[tuple[int, Problem]],
    prompt: Prompt,
    engine: Engine,
    scorer: TreeScorer,
    grader: Any,
    shard: Shard,
) -> None:
    try:
        for n, search in searches.items():
            folder, counts = _folder_of(config, n), Counter()
            score = partial(score_fitting, scorer, spans=config.spans, combine=config.combine, counts=counts)
            log_path = folder / shard_name("log", shard.index, shard.count, "jsonl")
            cost_path = folder / shard_name("cost", shard.index, shard.count, "json")
            with EventLog(log_path, write=True) as log, _Watch(cost_path, f"N={n}", counts) as watch:
                if log.torn:
                    watch.bar.write(
                        f"The log of N={n} ended in half an event ({log.torn} bytes), as after a kill: it will be made again."
                    )
                refuse_caseless_ids((problem for _, problem in problems), log.problems, str(log.path))
                level = LevelSearch(
                    engine,
                    search,
                    score,
                    grader,
                    prompt,
                    log,
                    seed=config.seed,
                    extractors=tuple(config.extractors),
                    config=SchedulerConfig(config.max_in_flight, config.max_open_problems),
                    on_progress=watch.update,
                )
                await level.run(problems)
    finally:
        await engine.close()


class _Watch:
    """The live line of a search, and the file that adds up what all its starts have spent: `counts`, and seconds and calls."""

    def __init__(self, path: Path, name: str, counts: Counter):
        self.path = path
        self.name = name
        self.counts = counts
        self.before = Counter(read_json(path) if path.exists() else {})
        self.num_levels = 0

    def __enter__(self) -> "_Watch":
        self.bar = tqdm(desc=self.name, unit="problem", total=None, dynamic_ncols=True, mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, progress: LevelProgress) -> None:
        """Show where the run is, and write down what it spent. Called after each request and each depth."""
        seconds = progress.seconds
        if progress.num_levels > self.num_levels:
            self.num_levels = progress.num_levels
            now = Counter({name: getattr(progress, name) for name in SPENT})
            write_json(self.path, now + self.counts + self.before)
        self.bar.total = progress.num_problems
        self.bar.set_postfix(
            {
                "depth": self.num_levels + 1,
                "tok/s": f"{progress.generated_tokens / seconds:,.0f}",
                "policy": f"{progress.policy_seconds / seconds:.0%}",
                "scorer": f"{progress.scorer_seconds / seconds:.0%}",
                "errors": progress.num_failures,
            },
            refresh=False,
        )
        self.bar.update(sum(progress.closed.values()) - self.bar.n)


def _write(
    config: StepSearchConfig,
    searches: dict[int, StepSearch],
    problems: Sequence[Problem],
    manifest: dict[str, Any],
    grader: Any,
    num_graders: int,
) -> Results:
    """Judge what all shards found, and write the results."""
    folder = Path(config.output_dir)
    solved: list[dict[str, float]] = []
    spent: list[dict[str, Any]] = []
    counts = Counter(dict.fromkeys(TOTALS, 0))
    for n, search in searches.items():
        found = SearchedProblems(search, _folder_of(config, n), problems)
        rows = found.judge(grader, num_graders)
        write_candidates(folder, rows, candidates_name(n))
        solved.append({problem.problem_id: _is_solved(problem) for problem in rows})
        spent.append(found.cost())
        counts.update({name if name in TOTALS else f"{name}_at_n{n}": c for name, c in found.counts.items() if c})
    ids = list(dict.fromkeys(problem_id for values in solved for problem_id in values))
    # problems are the same at each N, and the last one is the largest
    warnings = reference_warnings(len(found.unreadable), found.unreadable)
    warnings += outcome_warnings(found.outcomes, found.search.describe(), manifest)
    if not ids:
        raise ValueError(
            f"{folder}: no problem was searched to its end: {dict(counts)}. Problems with failed requests are errors. "
            f"{' '.join(warnings)}"
        )
    values = np.array([[of_n.get(problem_id, np.nan) for problem_id in ids] for of_n in solved])
    points, gap = curve_with_gap(CURVE, values, list(searches))
    results = Results(
        strategy=config.strategy,
        reward_model=manifest["reward_model"],
        policy={**manifest["engine"], "prompt": manifest["prompt"]},
        settings=_settings(config, searches, manifest),
        versions=manifest["versions"],
        seed=config.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        num_problems=len(ids),
        counts=dict(counts),
        n=list(searches),
        curves={CURVE: [point | _flat(cost) for point, cost in zip(points, spent, strict=True)]},
        hacking_gap={CURVE: gap},
        intervals=INTERVALS,
        solutions=ordered(found.outcomes),
        warnings=warnings,
        cost=_total(spent),
    )
    write_results(folder, results)
    return results


def _is_solved(problem: PoolProblem) -> float:
    """1 or 0, NaN where the grader gave up on the solution that was chosen. What is no solution has no answer."""
    chosen = problem.candidates[0] if problem.candidates else None
    if chosen is None or chosen.answer is None:
        return 0.0
    return np.nan if chosen.correct is None else float(chosen.correct)


def _settings(config: StepSearchConfig, searches: dict[int, StepSearch], manifest: dict[str, Any]) -> dict[str, Any]:
    started_with = manifest["started_with"]
    return {
        "source": started_with["problems"],
        **{name: started_with[name] for name in ("prefix_column",) if name in started_with},
        "segmentation": manifest["steps"]["name"],
        **config.describe(),
        "max_depth": config.max_depth,
        "max_step_tokens": config.max_step_tokens,
        "shape": {f"n{n}": search.shape._asdict() for n, search in searches.items()},
        "grader": manifest["grader"],
    }


def _total(spent: list[dict[str, Any]]) -> dict[str, Any]:
    parts = {
        part: {name: sum(cost[part][name] for cost in spent) for name in spent[0][part]}
        for part in ("policy", "scorer")
    }
    return parts | {"rest_seconds": sum(cost["rest_seconds"] for cost in spent)}


def _flat(cost: dict[str, Any]) -> dict[str, float]:
    """The cost of one N, beside its accuracy."""
    parts = {f"{part}_{name}": value for part in ("policy", "scorer") for name, value in cost[part].items()}
    return parts | {"rest_seconds": cost["rest_seconds"]}


def _folder_of(config: StepSearchConfig, n: int) -> Path:
    return Path(config.output_dir, f"n-{n}")
