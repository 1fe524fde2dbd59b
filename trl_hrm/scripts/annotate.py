"""
Search solutions of problems with a policy, and grade them: the trees from which `trl-hrm export` makes labels.

```bash
trl-hrm annotate --problems train.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --engine vllm --search full_tree \\
    --output_dir runs/mcts
```

Stop it at will and start it again with the same command: it goes on where it was.
"""

import argparse
import json
import re
from typing import TYPE_CHECKING, Any

from ..grading import DEFAULT_EXTRACTORS, EXTRACTORS
from ..search.shards import Shard
from ..search.steps import RULES
from .annotate_options import ENGINE_OPTIONS, SEARCH_OPTIONS, make_engine, make_prompt, make_search


if TYPE_CHECKING:
    from ..data.problem_sets import ProblemSet
    from ..search.progress import Progress

VERSIONED = {"torch", "transformers", "vllm", "math-verify", "latex2sympy2_extended", "sympy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output_dir", required=True, help="folder of the run (required)")
    add_problem_arguments(parser.add_argument_group("problems"))
    add_engine_arguments(parser.add_argument_group("policy"))
    add_prompt_arguments(parser.add_argument_group("prompt and steps"))
    _add_search_arguments(parser.add_argument_group("search"))
    run_group = parser.add_argument_group("run")
    run_group.add_argument(
        "--shard", type=_shard, default=(0, 1), metavar="I/N", help="search the I-th of N parts, from 0"
    )
    add_run_arguments(run_group)


def add_problem_arguments(group: argparse._ArgumentGroup, help: str | None = None) -> None:
    """Add the problems. With a `help` of its own they need not be given."""
    group.add_argument(
        "--problems",
        required=help is None,
        help=help or "JSON Lines file, or directory or Hub name of a dataset (required)",
    )
    group.add_argument(
        "--problem_format",
        choices=["auto", "gsm8k", "math", "prm800k", "plain"],
        default="auto",
        help="columns of the problems; auto tells by the first one",
    )
    group.add_argument("--split", default="train", help="split to read of a dataset; files have none")
    group.add_argument("--limit", type=int, help="read this many problems at most (default: all)")
    group.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="FILE",
        help="JSON Lines files of test sets, whose problems are left out (default: none)",
    )


def add_engine_arguments(group: argparse._ArgumentGroup, required: bool = True, prefix: str = "") -> None:
    """Add the policy and what runs it. `prefix` goes before names that a reward model beside it has too."""
    group.add_argument(
        "--policy",
        required=required,
        help="folder or Hub id of the policy; for openai, its name there" + (" (required)" if required else ""),
    )
    group.add_argument("--engine", choices=list(ENGINE_OPTIONS), default="vllm", help="what runs the policy")
    group.add_argument(f"--{prefix}revision", help="revision of the policy on the Hub (default: main)")
    group.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    group.add_argument("--top_p", type=float, default=1.0, help="1 is off")
    group.add_argument("--top_k", type=int, default=0, help="0 is off")
    group.add_argument(
        f"--{prefix}dtype", help="dtype of the policy, for vllm and transformers (default: the checkpoint's)"
    )
    group.add_argument(
        f"--{prefix}batch_size", type=int, help="sequences of a forward pass, for transformers (default: 64)"
    )
    group.add_argument(
        "--engine_args",
        type=json.loads,
        metavar="JSON",
        help="""more arguments of vLLM's engine, for vllm, as in '{"gpu_memory_utilization": 0.8}' (default: none)""",
    )
    group.add_argument(
        "--base_urls",
        nargs="+",
        metavar="URL",
        help="addresses of OpenAI-compatible completions servers, as in http://host:8000/v1, for openai",
    )
    group.add_argument(
        "--api",
        choices=["vllm", "transformers", "text"],
        help="what the servers are, for openai: vllm takes and gives token ids; transformers serve; text is any other "
        "completions server (default: vllm)",
    )
    group.add_argument("--tokenizer", help="folder or Hub id of the tokenizer, for openai (default: the policy)")
    group.add_argument(
        "--request_timeout", type=float, help="seconds until a request has failed, for openai (default: 600)"
    )
    group.add_argument(
        "--max_retries", type=int, help="times that a failed request is repeated, for openai (default: 5)"
    )


def add_prompt_arguments(group: argparse._ArgumentGroup) -> None:
    """Add what the policy is asked, where steps end, and how answers are read."""
    group.add_argument(
        "--prompt",
        default="steps",
        help="steps (`# Step k` headers), formulas (steps end with formulas), question (nothing but the question), or a "
        "file with {question} in it",
    )
    group.add_argument(
        "--prompt_style", choices=["chat", "plain"], default="chat", help="chat template, or text alone"
    )
    group.add_argument("--system_prompt", help="system message, for the chat style (default: none)")
    group.add_argument(
        "--final_stops", nargs="*", help="strings that end a solution (default: the prompt's; for a file, none)"
    )
    group.add_argument(
        "--segmentation",
        choices=[*RULES, "regex"],
        help="where steps end (default: the prompt's; for a file, blank_line)",
    )
    group.add_argument("--step_pattern", help="regular expression whose matches end steps, for --segmentation regex")
    group.add_argument(
        "--extractors",
        nargs="+",
        default=list(DEFAULT_EXTRACTORS),
        choices=list(EXTRACTORS),
        help="how the answer is read from a solution; the first that finds one counts",
    )


def _add_search_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--search",
        choices=list(SEARCH_OPTIONS),
        default="full_tree",
        help="full_tree (HRM): children at each depth; rollouts (Math-Shepherd, ER-PRM): completions from each step of "
        "solutions; puct (OmegaPRM): bisection of wrong rollouts",
    )
    group.add_argument("--num_children", type=int, help="children of a node, for full_tree (default: 5)")
    group.add_argument("--max_depth", type=int, help="most steps of a solution, for full_tree (default: 7)")
    group.add_argument("--max_step_tokens", type=int, help="most tokens of a step, for full_tree (default: 512)")
    group.add_argument("--num_solutions", type=int, help="solutions of a problem, for rollouts (default: 15)")
    group.add_argument(
        "--num_completions", type=int, help="completions from a prefix, for rollouts and puct (default: 16 and 8)"
    )
    group.add_argument(
        "--max_solution_tokens",
        type=int,
        help="most tokens of a solution or completion, for rollouts, puct and --root_filter (default: 2048)",
    )
    group.add_argument(
        "--max_selections", type=int, help="most rollouts of a problem to bisect, for puct (default: 20)"
    )
    group.add_argument("--c_puct", type=float, help="weight of exploration, for puct (default: 0.125)")
    group.add_argument("--max_sequences", type=int, help="most samples of a problem (default: 4096, for puct 1024)")
    group.add_argument("--max_tokens", type=int, help="most tokens of a problem (default: what max_sequences allows)")
    group.add_argument(
        "--root_filter",
        type=int,
        metavar="K",
        help="skip problems that K samples always or never solve (default: search all)",
    )
    group.add_argument("--seed", type=int, default=42, help="seed of all samples")


def add_run_arguments(group: argparse._ArgumentGroup) -> None:
    """Add how much is done at a time. None of it changes the results."""
    group.add_argument(
        "--max_in_flight", type=int, default=256, help="most sequences that the engine works on at a time"
    )
    group.add_argument("--max_open_problems", type=int, default=256, help="most problems in memory")
    group.add_argument("--grader_workers", type=int, default=1, help="processes that compare answers")
    group.add_argument("--grader_timeout", type=float, default=10.0, help="seconds until a comparison is given up")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no part, expected I/N with I from 0 to N - 1, as in 3/16")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> None:
    from ..search.shards import launched_shard

    progress, summary, grades = search_problems(args, launched_shard(*args.shard), read_all(args))
    print(format_summary(progress, summary, grades))
    print(f"Next: trl-hrm export {args.output_dir} --labels soft --view hrm --output_dir DATASET")


def read_all(args: argparse.Namespace, **prefixes: Any) -> "ProblemSet":
    """The problems that the options name. See `read_problems` for those with prefixes."""
    from ..data.problem_sets import read_problems
    from ..data.problems import read_problem_keys

    return read_problems(
        args.problems,
        format=args.problem_format,
        split=args.split,
        limit=args.limit,
        exclude=read_problem_keys(args.exclude),
        **prefixes,
    )


def search_problems(
    args: argparse.Namespace, shard: Shard, problems: "ProblemSet"
) -> "tuple[Progress, dict[str, Any], dict[str, int]]":
    """
    Search the problems of a shard, or go on with it. The options are those of `trl-hrm annotate`.

    Returns:
        What was done by this start, the summary of the shard, and how many answers were graded how.
    """
    import asyncio
    from pathlib import Path

    from ..grading import AnswerGrader
    from ..search.log import EventLog, shard_name
    from ..search.manifest import check_manifest
    from ..search.run_folder import finish_shard
    from ..search.shards import problem_shard

    prompt, rule = make_prompt(args)
    search = make_search(args, prompt, rule)
    chosen = [
        (place, problem)
        for place, problem in enumerate(problems.problems)
        if problem_shard(problem.problem_id, shard.count) == shard.index
    ]
    folder = Path(args.output_dir)
    print(
        f"{problems.num_records:,} records: {len(problems.problems):,} problems, {problems.num_repeated:,} repeated, "
        f"{problems.num_excluded:,} excluded. Shard {shard.index}/{shard.count}: {len(chosen):,} problems."
    )
    with AnswerGrader(num_workers=args.grader_workers, timeout=args.grader_timeout) as grader:
        engine = make_engine(args, shard)
        for _, problem in chosen[:1]:  # what is wrong with the prompt shows before anything is written
            prompt.encode(engine.tokenizer, problem.prompt)
        manifest = make_manifest(args, engine, prompt, rule, grader, shard.count)
        check_manifest(folder, manifest | {"search": search.describe()})
        with EventLog(folder / shard_name("log", shard.index, shard.count, "jsonl"), write=True) as log:
            if log.torn:
                print(
                    f"The log ended in half an event ({log.torn} bytes), as after a kill: dropped, it will be made again."
                )
            try:
                progress = asyncio.run(_search(args, engine, search, grader, prompt, rule, log, chosen))
            except KeyboardInterrupt:
                raise SystemExit("stopped; start again with the same command to go on.") from None
        grades = grader.counts()
    return progress, finish_shard(folder, shard.index, shard.count), grades


async def _search(args, engine, search, grader, prompt, rule, log, problems):
    from ..search.scheduler import Scheduler, SchedulerConfig
    from .annotate_bar import ProgressBar

    config = SchedulerConfig(max_in_flight=args.max_in_flight, max_open_problems=args.max_open_problems)
    with ProgressBar() as bar:
        scheduler = Scheduler(
            engine,
            search,
            grader,
            prompt,
            rule,
            log,
            seed=args.seed,
            extractors=tuple(args.extractors),
            config=config,
            on_progress=bar.update,
        )
        try:
            return await scheduler.run(problems)
        finally:
            await engine.close()


def make_manifest(args: argparse.Namespace, engine, prompt, rule, grader, num_shards: int) -> dict[str, Any]:
    """
    What decides the trees, beside the search. Versions, and how the run was started, are told but may differ between starts.
    """
    from dataclasses import asdict

    from .. import __version__

    described, graded = engine.describe(), grader.describe()
    started_with = {"problems": args.problems, "split": args.split, "engine_args": described.pop("engine_args", None)}
    versions = {"trl_hrm": __version__}
    for settings in (described, graded):
        versions |= {name: settings.pop(name) for name in VERSIONED & settings.keys()}
    return {
        "engine": described,
        "prompt": asdict(prompt),
        "steps": asdict(rule),
        "extractors": args.extractors,
        "grader": graded,
        "started_with": started_with,
        "seed": args.seed,
        "num_shards": num_shards,
        "versions": dict(sorted(versions.items())),
    }


def format_summary(progress: "Progress", summary: dict[str, Any], grades: dict[str, int]) -> str:
    """What was done."""
    problems = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in summary["problems"].items())
    lines = [
        f"problems: {problems or 'none'}",
        f"this run: {progress.num_sequences:,} samples, {progress.generated_tokens:,} tokens in {progress.seconds:,.0f} s "
        f"({progress.generated_tokens / max(progress.seconds, 1e-9):,.0f} tokens/s), {progress.cached_share:.0%} of prefix "
        f"tokens cached, {progress.num_failures:,} failed requests",
        "answers: " + ", ".join(f"{count:,} {name.removeprefix('num_')}" for name, count in grades.items()),
    ]
    if summary["problems"].get("error"):
        lines.append(
            f"warning: {summary['problems']['error']:,} problems have failed requests and give no labels; start again with "
            "the same command to try them once more."
        )
    return "\n".join(lines)
