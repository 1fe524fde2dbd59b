"""
Choose among N solutions with a reward model, and see how accuracy grows with N: best-of-N and votes beside majority and pass@N,
or a search that chooses step by step.

```bash
trl-hrm best-of-n --problems test.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --reward_model me/my-hrm --output_dir runs/bon
trl-hrm best-of-n --candidates samples.jsonl --reward_model me/my-hrm --aggregate min last
```

Stop it at will and start it again with the same command: it goes on where it was.
"""

import argparse
from datetime import UTC
from typing import TYPE_CHECKING, Any

from ..grading import DEFAULT_EXTRACTORS, thinking_spans
from .annotate import format_summary, make_manifest, read_all, search_problems
from .annotate_options import make_engine, make_prompt
from .best_of_n_options import (
    AGGREGATES_OF_SOLUTIONS,
    NUMBERS,
    SAMPLES,
    STEP_OPTIONS,
    add_arguments,
    check_options,
    policy_options,
)
from .score_options import check_reward_model, check_score_options, describe_scoring, load_scorer


if TYPE_CHECKING:
    from collections import Counter
    from pathlib import Path

    from ..evaluation.pool import PoolProblem
    from ..evaluation.results import Results
    from ..search.shards import Shard


__all__ = ["add_arguments", "run"]

COUNTED = (
    "problems_without_answer",
    "problems_without_candidates",
    "problems_ungradable",
    "problems_with_given_grades",
    "problem_records_left_out",
    "blank_steps_left_out",
    "num_candidates",
    "candidates_beyond_n",
    "candidates_without_answer",
    "candidates_without_steps",
    "candidates_cut_off",
    "candidates_too_long",
    "candidates_with_thinking_left_out",
    "candidates_unreadable",
    "not_graded",
    "rows_of_whole_solutions",
    "rows_with_several_answers",
)


def run(args: argparse.Namespace) -> None:
    import os
    from pathlib import Path

    from ..evaluation.results import check_results
    from ..search.shards import launched_shard, show_own_gpu

    check_options(args)
    check_score_options(args)
    check_results(Path(args.output_dir), args.overwrite)
    shard = launched_shard()
    if shard.local is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # "" hides all GPUs
        show_own_gpu(shard.local)  # policy and reward model both take the one they see
    shard = shard._replace(local=None)
    if args.policy is not None:
        args.n = args.n or NUMBERS
        args.extractors = args.extractors or list(DEFAULT_EXTRACTORS)
    if args.strategy == "best_of_n":
        _best_of_n(args, shard)
    else:
        _step_search(args, shard)


def _step_search(args: argparse.Namespace, shard: "Shard") -> None:
    from functools import partial

    from ..evaluation.step_search_run import StepSearchConfig, run_step_search
    from ..grading import AnswerGrader
    from ..search.asking import ending_extractors

    same = (
        "output_dir",
        "n",
        "strategy",
        "spans",
        "combine",
        "extractors",
        "seed",
        "max_in_flight",
        "max_open_problems",
    )
    given = {name: getattr(args, name) for name in STEP_OPTIONS if getattr(args, name) is not None}
    if args.aggregate is not None:
        given["aggregate"] = args.aggregate[0]
    config = StepSearchConfig(**{name: getattr(args, name) for name in same}, **given)
    options = policy_options(args)
    prompt, rule = make_prompt(options)
    search = next(iter(config.searches(prompt, rule).values()))  # prefixes are the same to all N
    fault = partial(search.prefix_fault, ending=ending_extractors(config.extractors))
    problems = read_all(args, prefix_column=args.prefix_column, prefix_fault=fault)
    print(problems.describe())
    scorer = load_scorer(args.reward_model, args)
    with AnswerGrader(num_workers=args.grader_workers, timeout=args.grader_timeout) as grader:
        engine = make_engine(options, shard)
        manifest = make_manifest(options, engine, prompt, rule, grader, shard.count)
        if args.prefix_column is not None:
            manifest["started_with"]["prefix_column"] = args.prefix_column
        results = run_step_search(
            config,
            problems.problems,
            engine,
            scorer,
            grader,
            prompt,
            rule,
            manifest,
            _reward_model(args),
            shard,
            args.grader_workers,
        )
    _tell(args, shard, results)


def _best_of_n(args: argparse.Namespace, shard: "Shard") -> None:
    from collections import Counter
    from pathlib import Path

    from ..evaluation.judged_pool import BLOCK, files_digest, judge_pool
    from ..evaluation.results import Part, reopen_part
    from ..grading import AnswerGrader
    from ..search.log import shard_name

    folder = Path(args.output_dir)
    reopen_part(folder, shard.index, shard.count)
    args.aggregate = args.aggregate or AGGREGATES_OF_SOLUTIONS
    counts: Counter = Counter()
    problems, digest, reading = _sampled(args, shard) if args.policy else _given(args, shard, counts)
    settings = _settings(args) | reading
    header = {
        **settings,
        "reward_model": _reward_model(args),
        "files of the reward model": files_digest(args.reward_model),
        "problems of a block": BLOCK,
        "candidates": digest,
    }
    scorer = None
    if problems and not (folder / shard_name("partial", shard.index, shard.count, "jsonl")).exists():
        scorer = load_scorer(args.reward_model, args)  # before the folder is made: a refused model leaves no files
    with (
        AnswerGrader(num_workers=args.grader_workers, timeout=args.grader_timeout) as grader,
        Part(folder, header, shard.index, shard.count, args.overwrite) as part,
    ):
        settings["grader"] = grader.describe()
        if scorer is None and part.num_blocks * BLOCK < len(problems):
            scorer = load_scorer(args.reward_model, args)
        judge_pool(problems, scorer, grader, part, args.spans, args.combine, args.grader_workers, progress=True)
    _tell(args, shard, None if shard.index > 0 else _finish(args, shard, part.header, settings, counts))


def _tell(args: argparse.Namespace, shard: "Shard", results: "Results | None") -> None:
    if results is None:
        print(f"part {shard.index} of {shard.count} is done; another process makes the results.")
        return
    print(format_results(results))
    print(f"Next: trl-hrm report {args.output_dir} --output report.html")


def _reward_model(args: argparse.Namespace) -> dict[str, Any]:
    return {"model": args.reward_model, **describe_scoring(args)}


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What decides the numbers beside models and seed."""
    names = ("aggregate", "spans", "combine", "num_draws", "segmentation", "step_pattern", "join_steps")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {"source": args.candidates or args.problems, "n": sorted(set(args.n)), **settings, "seed": args.seed}


def _given(
    args: argparse.Namespace, shard: "Shard", counts: "Counter"
) -> tuple[list[tuple[int, "PoolProblem"]], str, dict[str, Any]]:
    """Candidates that are there, those of this shard with their places, a digest of all, and how they were read."""
    from pathlib import Path

    from ..data.candidates_config import CandidatesConfig
    from ..data.solutions import solution_warnings
    from ..data.sources import parse_columns
    from ..evaluation.judged_pool import pool_digest
    from ..evaluation.pool import read_pool, reading_of, take_first
    from ..evaluation.results import CANDIDATES
    from ..search.shards import problem_shard

    if Path(args.candidates).resolve() == Path(args.output_dir, CANDIDATES).resolve():
        raise ValueError(
            f"{args.candidates}: the results would take the place of this file. Name another --output_dir."
        )
    names = ("candidates", "segmentation", "step_pattern", "join_steps", "keep_thinking")
    of_candidates = args.columns if args.problems is None else args.candidates_columns
    columns = parse_columns(of_candidates)
    given = {name: getattr(args, name) for name in names}
    config = CandidatesConfig(split=args.candidates_split, columns=columns, **given)
    answers = None
    if args.problems is not None:
        answers = read_all(args)
        print(answers.describe())
        counts["problem_records_left_out"] = answers.faults.num_left_out
    reading = reading_of(config, args.extractors)
    pool = read_pool(config, args.extractors, answers, counts)
    if shard.index == 0:
        shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in reading.items()}
        print(f"Candidates are read with {', '.join(f'{name} {value}' for name, value in shown.items())}.")
        for warning in solution_warnings(counts):
            print(f"warning: {warning}")
    if args.n is None:
        fewest = min((len(problem.candidates) for problem in pool), default=0)
        largest = min(max(fewest, 1), max(NUMBERS))
        args.n = [*(n for n in NUMBERS if n < largest), largest]
        print(f"N is {' '.join(map(str, args.n))}: every problem has {fewest:,} candidates or more.")
    counts["candidates_beyond_n"] += sum(len(problem.candidates) for problem in pool)
    pool = take_first(pool, max(args.n), args.num_draws is not None)
    counts["candidates_beyond_n"] -= sum(len(problem.candidates) for problem in pool)
    chosen = [(i, p) for i, p in enumerate(pool) if problem_shard(p.problem_id, shard.count) == shard.index]
    return chosen, pool_digest(pool), reading


def _sampled(args: argparse.Namespace, shard: "Shard") -> tuple[list[tuple[int, "PoolProblem"]], str, dict[str, Any]]:
    """
    Candidates that the policy samples now, or sampled before: those of this shard with their places, a digest of them, and how
    they were read.
    """
    from pathlib import Path

    from ..evaluation.cost import SampleCost
    from ..evaluation.judged_pool import pool_digest
    from ..evaluation.pool import read_run, take_first
    from ..search.log import shard_name

    check_reward_model(args.reward_model, args)  # before anything is sampled
    problems = read_all(args)
    folder = Path(args.output_dir, SAMPLES)
    cost = SampleCost(folder, shard)
    progress, summary = search_problems(policy_options(args), shard, problems)
    cost.end(progress)
    print(format_summary(progress, summary, folder))
    places = {problem.problem_id: place for place, problem in enumerate(problems.problems)}
    nodes = folder / shard_name("nodes", shard.index, shard.count, "parquet")
    pool = [problem for problem in read_run([nodes], args.extractors) if problem.problem_id in places]
    pool = take_first(pool, max(args.n)) if pool else []
    pool_of_shard = [(places[problem.problem_id], problem) for problem in pool]
    return pool_of_shard, pool_digest(pool), {"extractors": args.extractors}


def _finish(
    args: argparse.Namespace, shard: "Shard", header: dict[str, Any], settings: dict[str, Any], counts: "Counter"
) -> "Results":
    """Wait for the parts of all processes, and make results of them."""
    from collections import Counter
    from datetime import datetime
    from pathlib import Path

    from ..data.candidates import THINKING
    from ..data.problems import UNUSED
    from ..evaluation.cost import total_cost
    from ..evaluation.curves import INTERVALS, make_curves, summarize
    from ..evaluation.results import Results, read_parts, write_candidates, write_results
    from ..search.log import shard_name
    from ..search.outcomes import outcome_of
    from ..search.run_folder import read_manifest, read_summary

    folder = Path(args.output_dir)
    parts = [folder / shard_name("part", i, shard.count, "jsonl") for i in range(shard.count)]
    _wait(parts, header)
    unreadable: list[dict[str, str]] = []
    rows, counted = read_parts(parts, unreadable)
    judged = []
    outcomes: Counter = Counter()

    def problems():
        for problem, classes in rows:
            outcomes.update(outcome_of(c.answer, c.correct, c.finish) for c in problem.candidates)
            judged.append(summarize(problem, classes, args.aggregate))
            if args.policy is not None:
                counts[THINKING] += sum(bool(thinking_spans(candidate.text)) for candidate in problem.candidates)
            yield problem

    write_candidates(folder, problems())
    counts += counted
    run = Path(folder, SAMPLES) if args.policy else Path(args.candidates)
    policy, statuses = _policy(run)
    manifest = read_manifest(run) | read_summary(run) if policy else {}
    if policy and not args.policy:  # a run may be read in another way, and not all of its solutions are candidates
        manifest |= {"solutions": None, "extractors": settings["extractors"]}
    solutions, warnings = _outcomes(manifest, outcomes, counts + statuses, unreadable)
    if not judged:
        raise ValueError(
            f"{run}: no problem is left to choose solutions of: {dict(counts + statuses)}. Problems with failed requests are "
            f"errors. {' '.join(warnings)}"
        )
    unused = [name for name in counts if name.startswith(UNUSED)]
    made = make_curves(judged, args.n, args.num_draws, args.seed)
    results = Results(
        strategy=args.strategy,
        reward_model=_reward_model(args),
        policy=policy,
        settings=settings,
        versions=_versions(),
        seed=args.seed,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        num_problems=len(judged),
        counts={name: counts[name] + statuses[name] for name in dict.fromkeys([*COUNTED, *unused, *statuses])},
        n=settings["n"],
        curves=made.curves,
        hacking_gap=made.hacking_gap,
        calibration=made.calibration,
        intervals=INTERVALS,
        solutions=solutions,
        warnings=warnings,
        cost=total_cost(run if policy else None, counts),
    )
    write_results(folder, results)
    for path in [*folder.glob("part-*-of-*.jsonl"), *folder.glob("partial-*-of-*.jsonl")]:
        path.unlink()
    return results


def _wait(parts: list["Path"], header: dict[str, Any]) -> None:
    """Wait until the other processes are done. `accelerate launch` ends this one if one of them fails."""
    import time

    from ..evaluation.results import read_header

    def is_done(path) -> bool:
        if not path.exists():
            return False
        found = read_header(path) or {}
        return {**found, "candidates": None} == {**header, "candidates": None}  # each has candidates of its own

    told = False
    while missing := [path.name for path in parts if not is_done(path)]:
        if not told:
            print(f"waiting for {len(missing)} other processes: {', '.join(missing[:4])}")
            told = True
        time.sleep(0.5)


def _policy(run: "Path") -> tuple[dict[str, Any] | None, "Counter"]:
    """What a run was started with, and how many of its problems ended without solutions, by status."""
    from collections import Counter

    from ..search.manifest import MANIFEST
    from ..search.run_folder import read_manifest, read_summary

    if not (run / MANIFEST).is_file():
        return None, Counter()
    manifest, summary = read_manifest(run), read_summary(run)
    policy = {**manifest["engine"], **{name: manifest[name] for name in ("prompt", "search", "seed", "versions")}}
    statuses = Counter({f"problems_{s}": count for s, count in summary["problems"].items() if s != "done"})
    if summary["shards_missing"]:
        statuses["shards_missing"] = summary["shards_missing"]
    return policy, statuses


def _outcomes(
    run: dict[str, Any], found: "Counter", counts: "Counter", unreadable: list[dict[str, str]]
) -> tuple[dict[str, int], list[str]]:
    """How the solutions end, as the summary of a run says or else as they were graded here, and what to warn of."""
    from ..search.outcomes import ordered, outcome_warnings, reference_warnings

    # unreadable ones are wrong where they are chosen
    solutions = {**found, "wrong": found["wrong"] - counts["candidates_unreadable"]}
    solutions["unreadable"] = counts["candidates_unreadable"]
    solutions = run.get("solutions") or solutions
    unreadable = [*run.get("unreadable_references", ()), *unreadable]
    return ordered(solutions), [
        *reference_warnings(counts["problems_ungradable"], unreadable),
        *outcome_warnings(solutions, run.get("search", {}), run),
    ]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    from .. import __version__

    names = ("torch", "transformers", "math-verify", "latex2sympy2_extended", "sympy")
    return {"trl_hrm": __version__, **{name: version(name) for name in names}}


def format_results(results: "Results") -> str:
    """The curves as a table in percent, their intervals below, the verdicts on hacking, and what was left out."""
    from ..evaluation.hacking import gap_words, hacking_verdict
    from ..search.outcomes import describe_outcomes

    width = max(map(len, results.curves)) + 2
    lines = [
        f"accuracy in percent and 95 % intervals over {results.num_problems:,} problems",
        "N".ljust(width) + "".join(f"{n:>12}" for n in results.n),
    ]
    for name, points in results.curves.items():
        lines.append(name.ljust(width) + "".join(f"{100 * point['accuracy']:>12.1f}" for point in points))
        intervals = (f"{100 * point['low']:.1f}-{100 * point['high']:.1f}" for point in points)
        lines.append(" " * width + "".join(f"{interval:>12}" for interval in intervals))
    for name, gap in results.hacking_gap.items():
        verdict = hacking_verdict(gap, results.curves[name])
        lines.append(f"hacking gap of {name}: {gap_words(gap)}. {verdict.words}")
    counted = {name: count for name, count in results.counts.items() if count and name != "num_candidates"}
    if counted:
        lines.append("counted: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counted.items()))
    given = results.counts.get("problems_with_given_grades")
    if given:
        lines.append(f"the grades of {given:,} problems were given with their candidates and are used as they are")
    if results.solutions:
        lines.append(describe_outcomes(results.solutions))
    lines += [f"warning: {warning}" for warning in results.warnings]
    if not given and results.counts["candidates_without_answer"] == results.counts.get("num_candidates"):
        lines.append(
            "warning: no solution states an answer, so that all accuracies are 0. Do --extractors read what the policy writes, and "
            "does it have the tokens to come to an end?"
        )
    return "\n".join(lines)
