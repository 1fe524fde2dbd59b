"""
Searches in which a reward model selects solutions step by step: `step_search`, `beam_search` and
`diverse_tree_search`. There is one search per N, and one result for all N.

The folder of each N, such as `n-8`, is a run folder as written by `trl-hrm annotate`, with a manifest and a log to
resume from.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from ..data.candidates import THINKING, Candidate, ProblemCandidates
from ..data.problem_sets import refuse_caseless_ids
from ..grading import DEFAULT_EXTRACTORS, thinking_spans
from ..io import read_json, shown, write_json
from ..schema import Amount, check_json
from ..scoring.aggregate import Aggregate, aggregate, aggregate_name
from ..scoring.candidate_scores import score_fitting
from ..scoring.scoring_config import ScoringConfig
from ..scoring.tree_scorer import TreeScorer
from ..search.coroutines import run_coroutine
from ..search.engines.base import Engine
from ..search.log import REMEDY, EventLog
from ..search.open_tree import OpenTree
from ..search.outcomes import ordered, outcome_of, outcome_warnings, reference_warnings
from ..search.prompts import Prompt
from ..search.run_folder import (
    Shard,
    check_manifests,
    finish_shard,
    mixture_warnings,
    problem_shard,
    read_manifest,
    read_summary,
    resumed_prompt,
    shard_name,
)
from ..search.scheduler import Progress, Scheduler, SchedulerConfig
from ..search.step_search import (
    STRATEGIES,
    BeamSearch,
    DiverseTreeSearch,
    Ending,
    GreedyStepSearch,
    StepSearch,
    is_step,
)
from ..search.steps import StepRule
from ..search.tree import Problem
from ..terminal import printable
from .answer_classes import grade_problems
from .curves import INTERVALS, curve_with_gap
from .results import Results, candidates_name, write_candidates, write_results


BRANCHING = 4
CURVE = "step_search"
ALONE = Shard(0, 1)
ENDINGS = {"max_depth": "paths_at_the_depth_limit", "dead_end": "dead_ends"}
SPENT = ("seconds", "policy_seconds", "scorer_seconds", "num_calls")
TOTALS = (
    "num_candidates",
    "problems_without_answer",
    "candidates_without_answer",
    "candidates_unreadable",
    "not_graded",
)


def n_folder(output_dir: str | Path, n: int) -> Path:
    """Return the run folder of one N."""
    return Path(output_dir, f"n-{n}")


@dataclass(frozen=True)
class StepSearchSettings:
    """
    Settings of a step search.

    Args:
        output_dir (`str`):
            Folder of the results.
        n (`Sequence[int]`):
            Numbers of next steps sampled per depth. Each N is a separate search.
        strategy (`str`, *optional*, defaults to `"step_search"`):
            `"step_search"`: one path with N next steps ([`GreedyStepSearch`]). `"beam_search"`: the best N /
            `branching` paths with `branching` next steps each ([`BeamSearch`]). `"diverse_tree_search"`: N /
            `branching` trees with `branching` next steps each ([`DiverseTreeSearch`]).
        branching (`int`, *optional*):
            Number of next steps per path, for beam search and diverse tree search. Defaults to 4, or to N if N is
            smaller. Every larger N must be a multiple of it.
        max_depth (`int`, *optional*, defaults to `40`):
            Maximum number of steps per solution.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens per step.
        aggregate (`str` or `Callable`, *optional*, defaults to `"last"`):
            How step scores are aggregated to the score of a path. See [`~scoring.aggregate.aggregate`].
        scoring ([`~scoring.scoring_config.ScoringConfig`], *optional*):
            How steps are scored. By default, each step is scored on its own, without merged steps.
        extractors (`Sequence[str]`, *optional*):
            How the answer is extracted from a solution. See [`extract_answer`].
        seed (`int`, *optional*, defaults to `42`):
            Seed for sampling.
        max_in_flight, max_open_problems:
            See [`SchedulerConfig`].

    Raises:
        `ValueError`: If the strategy is unknown, an N does not fit it, or an option is not supported by the strategy.
    """

    output_dir: str
    n: Sequence[int]
    strategy: Literal["step_search", "beam_search", "diverse_tree_search"] = "step_search"
    branching: int | None = None
    max_depth: int = 40
    max_step_tokens: int = 512
    aggregate: Aggregate = "last"
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    extractors: Sequence[str] = DEFAULT_EXTRACTORS
    seed: int = 42
    max_in_flight: int = 256
    max_open_problems: int = 256

    def __post_init__(self):
        if self.strategy not in STRATEGIES:
            raise ValueError(f"`strategy` is {shown(self.strategy)}. It must be one of {', '.join(STRATEGIES)}.")
        if self.strategy == "step_search" and self.branching is not None:
            raise ValueError(
                f"`branching` is {self.branching}, but step_search always samples N next steps of one path. Remove `branching`."
            )
        for name in ("branching", "max_depth", "max_step_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")
        if not self.n or min(self.n) < 1:
            raise ValueError(f"`n` is {list(self.n)}. Each number must be at least 1.")
        for n in self.n:
            if n % self.branching_at(n):
                raise ValueError(
                    f"`n` is {list(self.n)}, but {n} is not a multiple of `branching` ({self.branching_at(n)}). Remove {n}, or change "
                    "`branching`."
                )

    def branching_at(self, n: int) -> int:
        """Return the number of next steps per path for N = `n`."""
        return n if self.strategy == "step_search" else min(n, self.branching or BRANCHING)

    def searches(self, prompt: Prompt, rule: StepRule) -> dict[int, StepSearch]:
        """Return the search of each N, ordered by N."""
        limits = {
            "rule": rule,
            "final_stops": prompt.final_stops,
            "max_depth": self.max_depth,
            "max_step_tokens": self.max_step_tokens,
            "rank": partial(aggregate, name=self.aggregate),
        }
        found: dict[int, StepSearch] = {}
        for n in sorted(set(self.n)):
            branching = self.branching_at(n)
            if self.strategy == "step_search":
                found[n] = GreedyStepSearch(num_candidates=n, **limits)
            elif self.strategy == "beam_search":
                found[n] = BeamSearch(width=n // branching, expansion=branching, **limits)
            else:
                found[n] = DiverseTreeSearch(num_trees=n // branching, width=branching, **limits)
        return found

    def describe(self) -> dict[str, Any]:
        """Return the settings for the manifest that are the same for all N."""
        return {
            "aggregate": aggregate_name(self.aggregate),
            "spans": list(self.scoring.spans),
            "combine": self.scoring.combine,
            "extractors": list(self.extractors),
        }


def run_step_search(
    config: StepSearchSettings,
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
    accept: Sequence[str] = (),
) -> Results | None:
    """
    Run or resume the search of each N, and write `candidates-n8.jsonl` (for N = 8) and `results.json`.

    Args:
        config ([`StepSearchSettings`]):
            Settings of the search.
        problems (`Sequence[Problem]`):
            Problems of all shards. A problem with a prefix is searched from the end of the prefix.
        engine ([`Engine`]):
            Engine of the policy. It is closed at the end.
        scorer ([`~scoring.tree_scorer.TreeScorer`]):
            Reward model, or any object with the same `score_trees`, `tokenizer`, `step_format` and `max_positions`.
        grader ([`~grading.AnswerGrader`]):
            Grader that compares answers.
        prompt ([`Prompt`]), rule ([`StepRule`]):
            Prompt of the policy, and the rule that splits its text into steps.
        manifest (`dict[str, Any]`):
            All other settings that affect the results, such as `engine`, `prompt`, `steps` and `grader`, with
            `identity`, `versions` and `started_with`. See [`check_manifests`].
        reward_model (`dict[str, Any]`):
            Name and options of the reward model, for manifest and results.
        shard ([`Shard`], *optional*):
            Shard of this process. The process that finishes last writes the results.
        num_graders (`int`, *optional*, defaults to `1`):
            Number of processes of the grader.
        accept (`Sequence[str]`, *optional*):
            Names of changes to accept when a search is resumed. See [`check_manifests`].

    Returns:
        [`Results`] or `None`: `None` if other shards are not finished yet.

    Raises:
        `ValueError`: If the folder contains a search with other settings, a score is not a number, or no problem could
        be searched.
    """
    searches = config.searches(prompt, rule)
    prompt = resumed_prompt(prompt, *(n_folder(config.output_dir, n) for n in searches))
    for problem in problems[:1]:  # raise errors of the prompt before anything is written
        prompt.encode(engine.tokenizer, problem.prompt)
    note = prompt.describe_control_text(engine.tokenizer, (problem.prompt for problem in problems))
    if note is not None:
        tqdm.write(printable(note))
    manifest = manifest | {"prompt": asdict(prompt), "reward_model": reward_model} | config.describe()
    manifests = {
        n_folder(config.output_dir, n): manifest | {"search": {"search": config.strategy} | search.describe()}
        for n, search in searches.items()
    }
    for note in check_manifests(manifests, accept):
        tqdm.write(note)
    mine = [
        (place, problem)
        for place, problem in enumerate(problems)
        if problem_shard(problem.problem_id, shard.count) == shard.index
    ]
    run_coroutine(_search_all(config, searches, mine, prompt, engine, scorer, grader, shard))
    for n in searches:
        finish_shard(n_folder(config.output_dir, n), shard.index, shard.count)
    if any(read_summary(n_folder(config.output_dir, n))["shards_missing"] for n in searches):
        return None
    return _write_results(config, searches, problems, manifest, grader, num_graders)


async def _search_all(
    config: StepSearchSettings,
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
            folder, counts = n_folder(config.output_dir, n), Counter()
            score = partial(score_fitting, scorer, scoring=config.scoring, counts=counts)
            log_path = folder / shard_name("log", shard.index, shard.count, "jsonl")
            cost_path = folder / shard_name("cost", shard.index, shard.count, "json")
            with EventLog(log_path, write=True) as log, _Watch(cost_path, f"N={n}", counts) as watch:
                if log.torn:
                    watch.bar.write(
                        f"The log of N={n} ended with an incomplete event of {log.torn} bytes, which is dropped and repeated."
                    )
                refuse_caseless_ids((problem for _, problem in problems), log.problems, str(log.path))
                num_others = len(log.problems.keys() - {problem.problem_id for _, problem in problems})
                if num_others:
                    watch.bar.write(
                        f"The search of N={n} has {num_others:,} problems that are not among the given problems. They are not in the "
                        "results."
                    )
                scheduler = Scheduler(
                    engine,
                    search,
                    grader,
                    prompt,
                    search.rule,
                    log,
                    seed=config.seed,
                    extractors=tuple(config.extractors),
                    config=SchedulerConfig(config.max_in_flight, config.max_open_problems),
                    on_progress=watch.update,
                    score=score,
                )
                await scheduler.run(problems)
    finally:
        await engine.close()


def _read_cost(path: Path) -> dict[str, float]:
    remedy = "Delete the file. The results are then without the cost of earlier starts."
    found = read_json(path, remedy)
    check_json(found, dict[str, Amount], path, remedy)
    return found


class _Watch:
    """Progress bar of a search, and a file with its total cost over all starts: `counts`, seconds and calls."""

    def __init__(self, path: Path, name: str, counts: Counter):
        self.path = path
        self.name = name
        self.counts = counts
        self.before = Counter(_read_cost(path) if path.exists() else {})
        self.num_levels = 0

    def __enter__(self) -> "_Watch":
        self.bar = tqdm(desc=self.name, unit="problem", total=None, dynamic_ncols=True, mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, progress: Progress) -> None:
        """Update the progress bar, and save the cost after each depth. Called after each request and each depth."""
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


class SearchedProblems:
    """
    Problems with their paths, counts and cost, read from the logs of one N.

    The policy's output and the number of scored steps come from the logs and do not depend on the number of starts.
    Seconds, and the scorer's calls and tokens, are summed over all starts, but the last depth of a killed start is
    missing. Steps of a given prefix are part of the candidates, but have no scores and are not counted.

    Args:
        search ([`StepSearch`]):
            Search of this N.
        folder (`Path`):
            Folder of its logs.
        problems (`Sequence[Problem]`):
            Problems to read. Other problems in the logs, from earlier starts, are ignored.
    """

    def __init__(self, search: StepSearch, folder: Path, problems: Sequence[Problem]):
        self.search = search
        self.folder = folder
        self.places = {problem.problem_id: place for place, problem in enumerate(problems)}
        self.counts: Counter = Counter()
        self.outcomes: Counter = Counter()  # number of paths by the keys of `OUTCOMES`
        self.unreadable: list[dict[str, str]] = []  # problems with unreadable references
        self.policy: Counter = Counter(num_tokens=0, num_requests=0, num_sequences=0)
        self.num_steps = 0

    def grade(self, grader: Any, num_graders: int = 1) -> list[ProblemCandidates]:
        """
        Return the problems in order, with graded candidates. The first candidate is the one that the search selected.
        Unfinished candidates, which have no answer, come last.

        Args:
            grader ([`~grading.AnswerGrader`]):
                Grader that compares answers.
            num_graders (`int`, *optional*, defaults to `1`):
                Number of processes of the grader.
        """
        problems = sorted(self._read(), key=lambda problem: self.places[problem.problem_id])
        answers = [[candidate.answer for candidate in problem.candidates] for problem in problems]
        graded = grade_problems(answers, [problem.answer for problem in problems], grader, num_graders)
        kept = []
        for problem, grades in zip(problems, graded, strict=True):
            if grades is None:  # the grader could read the reference during the search, but timed out now
                self.counts["problems_ungradable"] += 1
                self.unreadable.append({"problem_id": problem.problem_id, "answer": problem.answer})
                continue
            self.counts["num_candidates"] += len(problem.candidates)
            self.counts["candidates_unreadable"] += grades.num_unreadable
            for candidate, correct in zip(problem.candidates, grades.correct, strict=True):
                candidate.correct = correct
                if candidate.answer is not None:
                    self.outcomes[outcome_of(candidate.answer, correct, candidate.finish)] += 1
                self.counts["candidates_without_answer"] += candidate.answer is None
                self.counts["not_graded"] += candidate.answer is not None and correct is None
            kept.append(problem)
            self.outcomes["wrong"] -= (
                grades.num_unreadable
            )  # they count as wrong in the curves, but are listed separately here
            self.outcomes["unreadable"] += grades.num_unreadable
        return kept

    def cost(self) -> dict[str, Any]:
        """Return the cost of this N in the format of [`~evaluation.results.Results`]. Call [`SearchedProblems.grade`] first."""
        spent: Counter = Counter()
        for path in sorted(self.folder.glob("cost-*.json")):
            spent.update(_read_cost(path))
        return {
            "policy": {"seconds": spent["policy_seconds"], **self.policy},
            "scorer": {
                "seconds": spent["scorer_seconds"],
                "num_calls": spent["num_calls"],
                "num_steps": self.num_steps,
                "num_tokens": spent["num_tokens"],
            },
            "rest_seconds": spent["seconds"] - spent["policy_seconds"] - spent["scorer_seconds"],
        }

    def _read(self) -> Iterator[ProblemCandidates]:
        """Read the problems with a finished search from the logs, and count all problems."""
        missing = set(self.places)
        for path in sorted(self.folder.glob("log-*.jsonl")):
            with EventLog(path) as log:
                for problem_id in log.problems.keys() & self.places.keys():
                    missing.discard(problem_id)
                    opened, status = log.read(problem_id), log.problems[problem_id].status
                    nodes, problem = opened.sampled, opened.tree.problem
                    scored = [score for i, score in opened.scores.items() if i > opened.start and is_step(opened, i)]
                    self.policy["num_tokens"] += sum(len(node.token_ids) for node in nodes)
                    self.policy["num_requests"] += len(opened.brought)
                    self.policy["num_sequences"] += len(nodes)
                    self.num_steps += sum(score is not None for score in scored)
                    self.counts["steps_cut_off"] += sum(node.finish == "length" for node in nodes)
                    self.counts["steps_too_long"] += sum(score is None for score in scored)
                    if status != "done":
                        self.counts[f"problems_{status}"] += 1
                        if status == "ungradable":
                            self.unreadable.append({"problem_id": problem_id, "answer": problem.answer})
                        continue
                    try:
                        endings = self.search.endings(opened)
                    except ValueError as error:
                        raise ValueError(f"{path}: problem {shown(problem_id)}: {error} {REMEDY}") from None
                    self.counts["problems_without_solution"] += all(ending.reason in ENDINGS for ending in endings)
                    self.counts.update(ENDINGS[ending.reason] for ending in endings if ending.reason in ENDINGS)
                    self.outcomes.update(filter(None, (_unfinished(opened, ending) for ending in endings)))
                    candidates = [_candidate(opened, ending) for ending in endings if ending.node != opened.start]
                    self.counts[THINKING] += sum(bool(thinking_spans(candidate.text)) for candidate in candidates)
                    where = f"{path}, problem {shown(problem_id)}"
                    yield ProblemCandidates(problem.problem_id, problem.prompt, problem.answer, candidates, where)
        self.counts["problems_not_searched"] += len(missing)  # another process has not started them yet


def _unfinished(opened: OpenTree, ending: Ending) -> str | None:
    """Return the outcome of a path without an answer, or `None` for a path with an answer."""
    if ending.reason == "final":
        return "without_answer" if opened.tree.nodes[ending.node].answer is None else None
    if ending.reason == "max_depth":
        return "cut_off_by_depth"
    tried = [node for node in opened.sampled if node.parent == ending.node]
    if not tried:
        return "cut_off_by_context"
    too_long = [node for node in tried if node.finish == "length"]
    if not too_long:
        return "without_answer"
    thinks = all(0 < len(node.text) == node.tail for node in too_long)
    return "cut_off_in_thinking" if thinks else "cut_off_by_tokens"


def _candidate(opened: OpenTree, ending: Ending) -> Candidate:
    tree, node = opened.tree, opened.tree.nodes[ending.node]
    path, text = tree.path(ending.node), tree.text(ending.node)
    steps = [tree.step_text(i) for i in path]
    return Candidate(
        text=text[: len(text) - node.tail],  # without a trailing header that has no step
        steps=[step for step in steps if step],
        answer=node.answer,
        finish=node.finish,
        num_tokens=sum(len(tree.nodes[i].token_ids) for i in path if i > opened.start),
        scores=ending.scores,
    )


def _write_results(
    config: StepSearchSettings,
    searches: dict[int, StepSearch],
    problems: Sequence[Problem],
    manifest: dict[str, Any],
    grader: Any,
    num_graders: int,
) -> Results:
    """Grade the solutions of all shards, and write the results."""
    folder = Path(config.output_dir)
    solved: list[dict[str, float]] = []
    costs: list[dict[str, Any]] = []
    counts = Counter(dict.fromkeys(TOTALS, 0))
    for n, search in searches.items():
        found = SearchedProblems(search, n_folder(config.output_dir, n), problems)
        rows = found.grade(grader, num_graders)
        write_candidates(folder, rows, candidates_name(n))
        solved.append({})
        for problem in rows:
            chosen = problem.candidates[0] if problem.candidates else None
            if chosen is None or chosen.answer is None:
                solved[-1][problem.problem_id] = 0.0
            else:  # `correct` is None if the grader timed out or crashed
                solved[-1][problem.problem_id] = np.nan if chosen.correct is None else float(chosen.correct)
        costs.append(found.cost())
        counts.update({name if name in TOTALS else f"{name}_at_n{n}": c for name, c in found.counts.items() if c})
    ids = list(dict.fromkeys(problem_id for of_n in solved for problem_id in of_n))
    # the warnings are about the largest N; all N have the same problems
    warnings = reference_warnings(len(found.unreadable), found.unreadable)
    warnings += outcome_warnings(found.outcomes, found.search.describe(), manifest)
    warnings += dict.fromkeys(
        one for n in searches for one in mixture_warnings(read_manifest(n_folder(config.output_dir, n)))
    )
    started_with = manifest["started_with"]
    if not ids:
        raise ValueError(
            f"{folder}: no search of the problems of {started_with['problems']} was finished: {dict(counts)}. `problems_error_at_n*` counts problems with failed requests. "
            f"{' '.join(warnings)}"
        )
    values = np.array([[of_n.get(problem_id, np.nan) for problem_id in ids] for of_n in solved])
    points, gap = curve_with_gap(CURVE, values, list(searches))
    for point, cost in zip(points, costs, strict=True):
        point |= {f"{part}_{name}": value for part in ("policy", "scorer") for name, value in cost[part].items()}
        point["rest_seconds"] = cost["rest_seconds"]
    total_cost: dict[str, Any] = {
        part: {name: sum(cost[part][name] for cost in costs) for name in costs[0][part]}
        for part in ("policy", "scorer")
    }
    settings = {
        "source": started_with["problems"],
        **{name: started_with[name] for name in ("prefix_column",) if name in started_with},
        **{name: manifest[name] for name in ("where",) if name in manifest},
        "segmentation": manifest["steps"]["name"],
        **config.describe(),
        "max_depth": config.max_depth,
        "max_step_tokens": config.max_step_tokens,
        "shape": {f"n{n}": search.shape._asdict() for n, search in searches.items()},
        "grader": manifest["grader"],
    }
    results = Results(
        strategy=config.strategy,
        reward_model=manifest["reward_model"],
        policy={**manifest["engine"], "prompt": manifest["prompt"]},
        settings=settings,
        versions=manifest["versions"],
        seed=config.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        num_problems=len(ids),
        counts=dict(counts),
        n=list(searches),
        curves={CURVE: points},
        hacking_gap={CURVE: gap},
        estimate={"method": "searches"},
        intervals=INTERVALS,
        solutions=ordered(found.outcomes),
        warnings=warnings,
        cost=total_cost | {"rest_seconds": sum(cost["rest_seconds"] for cost in costs)},
    )
    write_results(folder, results)
    return results
