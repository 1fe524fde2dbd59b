"""
Sample search trees of solutions from a policy, and grade the answers. `trl-hrm export` builds datasets from the trees.

```bash
trl-hrm annotate --problems train.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --engine vllm --search full_tree \\
    --output_dir runs/mcts
```

A run can be stopped at any time. The same command resumes it. A finished run can be continued in a new folder, with more rollouts where its labels
are most uncertain:

```bash
trl-hrm annotate --more_from runs/mcts --where uncertain --more_samples 10000 --policy Qwen/Qwen2.5-Math-7B-Instruct --engine vllm \\
    --output_dir runs/mcts-more
```
"""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..config import COUNT
from ..data.problems_config import ProblemsConfig
from ..grading import DEFAULT_EXTRACTORS
from ..io import read_json_lines, shell_word, shown
from ..search.more_rollouts import WHERE, FinishedRun, MoreRollouts, describe_plan, histogram
from ..search.policy_config import PolicyConfig, PromptConfig, RunConfig, TrackingConfig
from ..search.run_folder import Shard
from ..terminal import one_line, say


if TYPE_CHECKING:
    from ..data.problem_sets import ProblemSet
    from ..grading import AnswerGrader
    from ..search.prompts import Prompt
    from ..search.scheduler import Progress
    from ..search.steps import StepRule


_BUDGET = ("max_sequences", "max_tokens")
SEARCH_SETTINGS = {
    "full_tree": ("num_children", "max_depth", "max_step_tokens", *_BUDGET),
    "rollouts": ("num_solutions", "num_completions", "max_solution_tokens", *_BUDGET),
    "puct": ("num_completions", "max_selections", "c_puct", "max_solution_tokens", *_BUDGET),
}
SEARCH_OPTIONS = tuple(dict.fromkeys(name for names in SEARCH_SETTINGS.values() for name in names))
VERSIONED = {"torch", "transformers", "vllm", "math-verify", "latex2sympy2_extended", "sympy"}


@dataclass(kw_only=True)
class AnnotateConfig(TrackingConfig, RunConfig, PromptConfig, PolicyConfig, ProblemsConfig):
    """
    Configuration of [`annotate`]. It also has the fields of [`ProblemsConfig`], [`PolicyConfig`], [`PromptConfig`],
    [`RunConfig`] and [`TrackingConfig`].

    Args:
        search (`str`, *optional*):
            `"full_tree"` ([`FullTree`], HRM paper) samples several next steps at each depth. `"rollouts"` ([`Rollouts`],
            Math-Shepherd and ER-PRM) samples rollouts from each step of a solution. `"puct"` ([`PUCT`], OmegaPRM) finds the first
            wrong step of wrong rollouts by bisection. Defaults to `"full_tree"`. With `more_from`, it is the search of that run.
        num_children (`int`, *optional*):
            Number of next steps to sample per node, for `full_tree`. Defaults to 5.
        max_depth (`int`, *optional*):
            Maximum number of steps per solution, for `full_tree`. Defaults to 7.
        max_step_tokens (`int`, *optional*):
            Maximum number of tokens per step, for `full_tree`. Defaults to 512.
        num_solutions (`int`, *optional*):
            Number of solutions per problem, for `rollouts`. Defaults to 15.
        num_completions (`int`, *optional*):
            Number of rollouts per prefix, for `rollouts` (defaults to 16) and `puct` (defaults to 8). With `more_from`, number of
            rollouts per request, which defaults to the number of that run, or to 8.
        max_solution_tokens (`int`, *optional*):
            Maximum number of tokens per solution or rollout, for `rollouts`, `puct` and `root_filter`. Defaults to 2048. With
            `more_from`, it can only be set if that run is a full tree.
        max_selections (`int`, *optional*):
            Maximum number of rollouts to bisect per problem, for `puct`. Defaults to 20.
        c_puct (`float`, *optional*):
            Exploration constant, for `puct`. Defaults to 0.125.
        max_sequences (`int`, *optional*):
            Maximum number of samples per problem. Defaults to 4096, or 1024 for `puct`.
        max_tokens (`int`, *optional*):
            Maximum number of sampled tokens per problem. Defaults to no limit.
        root_filter (`int`, *optional*):
            Number of solutions to sample before the search, at least 2. Problems that all or none of them solve are skipped. By
            default, all problems are searched.
        more_from (`str`, *optional*):
            Folder of a finished run to continue with more rollouts below its steps. The new run has all of its trees; the finished run
            is not changed. Policy, prompt, steps, extractors and grader must be the same. The problems and the search are those
            of that run, so their options are not accepted. See [`~search.more_rollouts.FinishedRun`].
        more_samples (`int`, *optional*):
            Maximum number of additional rollouts in all shards together. Required for `more_from`.
        where (`dict[str, str]` or `str`, *optional*):
            With `more_from`, `"uncertain"` (the default) adds rollouts to the labels whose posterior variance they are expected to
            reduce most, and `"uniform"` adds the same number to each label. Otherwise, see [`ProblemsConfig`].
        shard (`str`, *optional*, defaults to `"0/1"`):
            Part of the problems to search: `"I/N"` is the I-th of N parts, counted from 0.
        dry_run (`bool`, *optional*, defaults to `False`):
            Whether to print the first prompt and the maximum number of samples and tokens, without sampling. The options below add the
            expected numbers. See [`~search.cost_model.expected_cost`]. With `more_from`, it prints which labels get more rollouts.
        step_tokens (`float`, *optional*):
            Mean number of tokens per step, for `dry_run`. Requires `solution_steps`.
        solution_steps (`list[int]`, *optional*):
            Numbers of steps of some solutions, for `dry_run`. Each is equally likely. Requires `step_tokens`.
        pilot (`str`, *optional*):
            Folder of a finished run with the same search and prompt, for `dry_run`. Its tokens per problem are extrapolated.
        tokens_per_second (`float`, *optional*):
            Number of tokens that one GPU samples per second, for `dry_run`, to compute GPU hours. `annotate` prints it at the end of a run.

    Raises:
        `ValueError`: If `problems` or `policy` is missing, if `temperature` is 0 and the search samples the same prefix more than once,
            or if an option does not apply to this search or requires another one.
    """

    search: Literal["full_tree", "rollouts", "puct"] | None = field(
        default=None,
        metadata={
            "help": "full_tree (HRM paper) samples several next steps at each depth. rollouts (Math-Shepherd, ER-PRM) "
            "samples rollouts from each step of a solution. puct (OmegaPRM) finds the first wrong step of wrong "
            "rollouts by bisection (default: full_tree)."
        },
    )
    num_children: int | None = field(
        default=None,
        metadata={"help": "Number of next steps to sample per node, for full_tree (default: 5).", "range": COUNT},
    )
    max_depth: int | None = field(
        default=None,
        metadata={"help": "Maximum number of steps per solution, for full_tree (default: 7).", "range": COUNT},
    )
    max_step_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens per step, for full_tree (default: 512).", "range": COUNT},
    )
    num_solutions: int | None = field(
        default=None, metadata={"help": "Number of solutions per problem, for rollouts (default: 15).", "range": COUNT}
    )
    num_completions: int | None = field(
        default=None,
        metadata={
            "help": "Number of rollouts per prefix, for rollouts and puct (default: 16 and 8), or per request, for --more_from.",
            "range": "[0, inf)",
        },
    )
    max_solution_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens per solution or rollout, for rollouts, puct and --root_filter "
            "(default: 2048).",
            "range": COUNT,
        },
    )
    max_selections: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of rollouts to bisect per problem, for puct (default: 20).",
            "advanced": True,
            "range": COUNT,
        },
    )
    c_puct: float | None = field(
        default=None,
        metadata={"help": "Exploration constant, for puct (default: 0.125).", "advanced": True, "range": "[0, inf)"},
    )
    max_sequences: int | None = field(
        default=None,
        metadata={"help": "Maximum number of samples per problem (default: 4096, or 1024 for puct).", "range": COUNT},
    )
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of sampled tokens per problem (default: no limit).",
            "advanced": True,
            "range": COUNT,
        },
    )
    root_filter: int | None = field(
        default=None,
        metadata={
            "help": "Number of solutions to sample before the search. Problems that all or none of them solve are skipped "
            "(default: search all problems).",
            "metavar": "K",
            "range": "[2, inf)",
        },
    )
    more_from: str | None = field(
        default=None,
        metadata={
            "help": "Finished run to continue with more rollouts below its steps, in a new --output_dir. Requires --more_samples.",
            "metavar": "RUN",
        },
    )
    more_samples: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of additional rollouts in all shards together, for --more_from.",
            "range": COUNT,
            "metavar": "N",
        },
    )
    where: dict[str, str] | str | None = field(
        default=None,
        metadata={
            "help": "With --more_from, uncertain (default: rollouts for the labels that they are expected to change most) or uniform. "
            "Otherwise, keep only problems with these values, such as level=5. Use dots for nested columns. Numbers, true, false and "
            "null are compared as in JSON.",
            "nargs": "+",
            "metavar": "NAME=VALUE",
            "parse": str,
            "advanced": True,
        },
    )
    shard: str = field(
        default="0/1",
        metadata={
            "help": "Part of the problems to search: the I-th of N parts, counted from 0.",
            "metavar": "I/N",
        },
    )
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Print the first prompt and the maximum number of samples and tokens, without sampling. The options below add "
            "the expected numbers."
        },
    )
    step_tokens: float | None = field(
        default=None,
        metadata={"help": "Mean number of tokens per step, for --dry_run.", "range": "[1, inf)", "advanced": True},
    )
    solution_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of steps of some solutions, for --dry_run. Each is equally likely.",
            "range": COUNT,
            "metavar": "STEPS",
            "advanced": True,
        },
    )
    pilot: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a finished run with the same search and prompt, for --dry_run. Its tokens per problem are extrapolated.",
            "metavar": "RUN",
            "advanced": True,
        },
    )
    tokens_per_second: float | None = field(
        default=None,
        metadata={
            "help": "Number of tokens that one GPU samples per second, for --dry_run, to compute GPU hours. It is printed at the end of a "
            "run.",
            "range": "(0, inf)",
            "advanced": True,
        },
    )

    def __post_init__(self):
        where = self.where[0] if isinstance(self.where, list) and len(self.where) == 1 else self.where
        if where in WHERE and self.more_from is None:
            raise ValueError(f"`where` is {where}, which requires `more_from`. Set `more_from` to a finished run.")
        if self.more_from is not None:
            self.where = None  # not a filter of problems
        super().__post_init__()
        if self.more_from is not None:
            self.where = "uncertain" if where is None else where
            self._check_more_from()
        elif self.more_samples is not None:
            raise ValueError("`more_samples` requires `more_from`. Set `more_from` to a finished run.")
        else:
            self.search = self.search or "full_tree"
        for name in ("problems", "policy") if self.more_from is None else ("policy",):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is missing. Set `problems` and `policy`.")
        self.extractors = self.extractors or list(DEFAULT_EXTRACTORS)
        Shard.parse(self.shard)
        for name in ("step_tokens", "solution_steps", "pilot", "tokens_per_second"):
            if getattr(self, name) is not None and not self.dry_run:
                raise ValueError(f"`{name}` is set, but `dry_run` is false. Set `dry_run`, or remove `{name}`.")
        if (self.step_tokens is None) != (self.solution_steps is None) or (self.step_tokens and self.pilot):
            raise ValueError(
                f"`step_tokens` is {self.step_tokens}, `solution_steps` is {self.solution_steps} and `pilot` is {shown(self.pilot)}. Set "
                "the first two, or only `pilot`."
            )
        for name in SEARCH_OPTIONS:
            if self.more_from is not None or getattr(self, name) is None:
                continue
            is_filter = name == "max_solution_tokens" and self.root_filter is not None
            if name not in SEARCH_SETTINGS[self.search] and not is_filter:
                others = " and ".join(search for search, names in SEARCH_SETTINGS.items() if name in names)
                raise ValueError(
                    f"`{name}` only applies to search {others}, but `search` is {self.search}. Remove `{name}`."
                )
        has_one_sample = {
            "full_tree": self.num_children == 1,
            "rollouts": self.num_solutions == 1 and self.num_completions == 0,
        }
        is_once = self.more_from is None and self.root_filter is None and has_one_sample.get(self.search, False)
        if self.temperature == 0 and not is_once:
            raise ValueError(
                "`temperature` is 0, so all samples after the same prefix would be the same, and the MC scores would be 0 or 1. Set a "
                "temperature above 0. For one solution per problem, use `search='rollouts'`, `num_solutions=1` and `num_completions=0`."
            )

    def _check_more_from(self) -> None:
        """Check the options that continue a finished run."""
        if self.where not in WHERE:
            raise ValueError(
                f"`where` is {shown(self.where)}. With `more_from`, it must be one of {', '.join(WHERE)}."
            )
        if self.more_samples is None:
            raise ValueError(
                "`more_from` requires `more_samples`. Set it to the maximum number of additional rollouts."
            )
        if os.path.realpath(self.more_from) == os.path.realpath(self.output_dir):
            raise ValueError(f"`output_dir` is {self.output_dir}, the run `more_from`. Set it to a new folder.")
        if self.num_completions == 0:
            raise ValueError("`num_completions` is 0. With `more_from`, it must be at least 1.")
        defaults = {field.name: field.default for field in fields(self)} | {"exclude": []}
        of_the_run = {field.name for field in fields(ProblemsConfig)} | set(SEARCH_OPTIONS)
        of_the_run |= {"search", "root_filter", "step_tokens", "solution_steps", "pilot"}
        for name in sorted(of_the_run - {"where", "num_completions", "max_solution_tokens"}):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"`{name}` is {shown(getattr(self, name))}, but `more_from` has the problems and the search. Remove "
                    f"`{name}`."
                )

    def make_search(self, prompt: "Prompt", rule: "StepRule") -> Any:
        """Return the search, wrapped in a root filter if `root_filter` is set."""
        from ..search.policies import PUCT, FullTree, Rollouts, RootFilter

        given = {name: getattr(self, name) for name in SEARCH_SETTINGS[self.search] if getattr(self, name) is not None}
        if self.search == "full_tree":
            search = FullTree(rule, prompt.final_stops, seed=self.seed, **given)
        elif self.search == "rollouts":
            search = Rollouts(prompt.final_stops, seed=self.seed, **given)
        else:
            search = PUCT(prompt.final_stops, **given)
        if self.root_filter is None:
            return search
        filtered = {} if self.max_solution_tokens is None else {"max_solution_tokens": self.max_solution_tokens}
        return RootFilter(search, self.root_filter, prompt.final_stops, **filtered)


@dataclass(frozen=True)
class Annotation:
    """
    Result of [`annotate`]. `str()` gives the text that the command prints.

    Args:
        output_dir (`Path`):
            Folder of the run.
        progress ([`~search.scheduler.Progress`]):
            Work done since the last start or resume.
        summary (`dict[str, Any]`):
            Counts of problems and solutions by outcome, for the whole shard. See [`~search.run_folder.finish_shard`].
    """

    output_dir: Path
    progress: "Progress"
    summary: dict[str, Any]

    def __str__(self) -> str:
        return (
            f"{format_summary(self.progress, self.summary, self.output_dir)}\n"
            f"Next: trl-hrm export {shell_word(str(self.output_dir))} --labels soft --view hrm --output_dir DATASET"
        )


def annotate(config: AnnotateConfig) -> "Annotation | str":
    """
    Sample search trees of solutions from a policy, and grade the answers. A run that was stopped is resumed.

    Args:
        config ([`AnnotateConfig`]):
            Configuration of the run.

    Returns:
        [`Annotation`]: Progress and summary of the run. The trees are in `config.output_dir`. With `dry_run`, the first prompt and
        the maximum number of samples and tokens, as text.

    Raises:
        `BlockingIOError`: If another process is writing to the folder.
        `ImportError`: If a tracker of `report_to` is not installed.
        `OSError`: If the folder cannot be written. This is checked first.
        `ValueError`: If the input is invalid, the folder holds a run with different settings, or no problem could be searched.

    Example:

    ```python
    from trl_hrm import AnnotateConfig, annotate

    run = annotate(AnnotateConfig(problems="train.jsonl", policy="Qwen/Qwen2.5-Math-7B-Instruct", output_dir="runs/mcts"))
    print(run)
    ```
    """
    from ..search.run_folder import MANIFEST, claimed_run, launched_shard, unfinished_shards
    from ..tracking import check_trackers

    check_trackers(config.report_to or ())
    run = None if config.more_from is None else FinishedRun(config.more_from)
    if config.dry_run:
        return describe_dry_run(config, config.read_problems()) if run is None else describe_more(config, run)
    shard = launched_shard(config.shard)
    with claimed_run(config.output_dir, shard, [MANIFEST]):
        progress, summary = search_problems(config, shard, config.read_problems() if run is None else run)
    if summary["problems"] and summary["problems"].keys() <= {"error", "ungradable"}:
        say(format_summary(progress, summary, config.output_dir))
        raise ValueError(f"{config.output_dir}: no problem could be searched. {first_failure(config, shard)}")
    if config.report_to:
        if missing := unfinished_shards(config.output_dir):
            say(f"Trees are logged when all shards are finished. Missing: {', '.join(map(str, missing))}.")
        else:
            log_once(config)
    return Annotation(Path(config.output_dir), progress, summary)


def log_once(config: AnnotateConfig) -> None:
    """
    Log the trees of a finished run, unless they are already logged in this state and to these trackers. Shards that finish at the same
    time, or start again to retry errors, would otherwise each log all trees. If logging fails, the next start tries again.
    """
    from ..search.tree import make_id
    from ..search.tree_table import log_trees

    sizes = sorted((log.name, log.stat().st_size) for log in Path(config.output_dir).glob("log-*.jsonl"))
    state = json.dumps([sizes, sorted(config.report_to), config.project, config.run_name])
    marker = Path(config.output_dir, f".logged-{make_id(state)}")
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        say("The trees of this run are already logged.")
        return
    try:
        log_trees({"": config.output_dir}, config.report_to, config.project, config.run_name)
    except BaseException:
        marker.unlink()
        raise


def first_failure(config: AnnotateConfig, shard: Shard) -> str:
    """Return why the first request of a shard failed and what to do, or advice on the reference answers if no request failed."""
    from ..search.run_folder import shard_name

    log = Path(config.output_dir, shard_name("log", shard.index, shard.count, "jsonl"))
    for where, event in read_json_lines(log):
        if event["event"] == "error":
            return f"The first failed request, {where}: {event['message']} Run the same command again to retry."
    return "All reference answers are unreadable. Correct them."


def describe_dry_run(config: AnnotateConfig, problems: "ProblemSet") -> str:
    """Return the first prompt and the maximum number of samples and tokens of a run, as text."""
    from ..search.run_folder import problem_shard

    prompt, rule = config.make_prompt()
    search = config.make_search(prompt, rule)
    tokenizer = config.load_tokenizer()
    prompt = prompt.for_tokenizer(tokenizer)
    shard = Shard.parse(config.shard)
    chosen = [p for p in problems.problems if problem_shard(p.problem_id, shard.count) == shard.index]
    lines = [problems.describe(), f"Shard {config.shard}: {len(chosen):,} problems."]
    if not chosen:
        return "\n".join(lines)
    ids = [prompt.encode(tokenizer, problem.prompt) for problem in chosen]
    stops = [*prompt.final_stops, *rule.stop_strings()] if config.search == "full_tree" else prompt.final_stops
    samples, tokens = most_asked(search)
    lines += [
        f"The first prompt ({len(ids[0]):,} tokens; the longest has {max(map(len, ids)):,}):",
        tokenizer.decode(ids[0]),
        f"Samples stop at {', '.join(map(repr, stops)) or 'the end of the sequence'}.",
        f"At most {samples:,} samples and {tokens:,} sampled tokens per problem, {samples * len(chosen):,} and "
        f"{tokens * len(chosen):,} in total{format_hours(tokens * len(chosen), config.tokens_per_second)}.",
    ]
    if config.step_tokens is not None:
        lines += describe_expected(config, search, len(chosen), sum(map(len, ids)))
    if config.pilot is not None:
        lines += describe_pilot(config, search, prompt, len(chosen))
    return "\n".join(lines)


def describe_more(config: AnnotateConfig, run: FinishedRun) -> str:
    """Return which labels of a finished run get more rollouts, and the maximum number of tokens, as text."""
    unit, max_solution_tokens = more_settings(config, run)
    units = run.plan(config.more_samples, unit, config.where, config.seed)
    tokens = sum(units) * unit * max_solution_tokens
    return (
        f"{describe_plan(run, units, unit, config.more_samples)}\n{histogram(run, units, unit)}\n"
        f"At most {tokens:,} sampled tokens in total{format_hours(tokens, config.tokens_per_second)}."
    )


def more_settings(config: AnnotateConfig, run: FinishedRun) -> tuple[int, int]:
    """
    Return the number of rollouts per request, and the maximum number of tokens per rollout, of a continued run.

    Raises:
        `ValueError`: If the run samples rollouts with another maximum number of tokens, or `more_samples` is below one request.
    """
    from ..search.policies import Rollouts

    searched = run.manifest["search"]
    unit = config.num_completions or searched.get("num_completions") or 8
    length = searched.get("max_solution_tokens")
    if length is not None and config.max_solution_tokens not in (None, length):
        raise ValueError(
            f"`max_solution_tokens` is {config.max_solution_tokens}, but the rollouts of {run.folder} have at most {length} tokens. Remove "
            "`max_solution_tokens`."
        )
    if config.more_samples < unit:
        raise ValueError(
            f"`more_samples` is {config.more_samples}. It must be at least {unit}, the number of rollouts per request (`num_completions`)."
        )
    return unit, length or config.max_solution_tokens or Rollouts.max_solution_tokens


def format_hours(tokens: float, tokens_per_second: float | None) -> str:
    """Return the GPU hours that sampling takes, as the end of a sentence, or nothing if the speed is unknown."""
    return "" if tokens_per_second is None else f": {tokens / tokens_per_second / 3600:,.2f} GPU hours"


def describe_expected(config: AnnotateConfig, search: Any, num_problems: int, prompt_tokens: int) -> list[str]:
    """Return lines about the expected cost of a run whose solutions have the given lengths."""
    from ..search.cost_model import expected_cost

    cost = expected_cost(search, config.step_tokens, config.solution_steps)
    total = cost.tokens * num_problems
    again = cost.requests * prompt_tokens + cost.prefix_tokens * num_problems
    lengths = ", ".join(map(str, config.solution_steps))
    return [
        f"Expected for steps of {config.step_tokens:,g} tokens and solutions of {lengths} steps: {cost.requests:,.1f} requests, "
        f"{cost.samples:,.1f} samples, {cost.tokens:,.0f} sampled tokens and {cost.labels:,.1f} labels per problem.",
        f"In total {cost.requests * num_problems:,.0f} requests, {prompt_tokens:,} prompt tokens ({again:,.0f} tokens of prompts and "
        f"prefixes without a prefix cache), {cost.labels * num_problems:,.0f} labels ({1000 * cost.labels / cost.tokens:,.2f} per 1,000 "
        f"sampled tokens), {total:,.0f} sampled tokens{format_hours(total, config.tokens_per_second)}.",
    ]


def describe_pilot(config: AnnotateConfig, search: Any, prompt: "Prompt", num_problems: int) -> list[str]:
    """
    Return lines about the tokens that are extrapolated from a finished run.

    Raises:
        `FileNotFoundError`: If the folder has no run.
        `ValueError`: If the run has not finished, has another search or prompt, or fewer than 2 problems.
    """
    import statistics

    from ..search.nodes import read_problem_tokens
    from ..search.run_folder import node_files, read_manifest, read_summary, unfinished_shards

    found = read_manifest(config.pilot, ["search", "prompt", "engine"])
    asked = json.loads(json.dumps({"search": search.describe(), "prompt": asdict(prompt)}))
    different = [
        f"{part}.{name} was {shown(found[part].get(name))} and is {shown(asked[part].get(name))}"
        for part in asked
        for name in sorted(found[part].keys() | asked[part].keys())
        if found[part].get(name) != asked[part].get(name)
    ]
    if different:
        raise ValueError(
            f"{config.pilot}: the run has other settings than this one: {', '.join(different)}. Use the same."
        )
    if shards := unfinished_shards(config.pilot):
        raise ValueError(
            f"{config.pilot}: shards {', '.join(map(str, shards))} have not finished. Finish the run first."
        )
    if "more_from" in found:
        raise ValueError(
            f"{config.pilot}: the run has additional rollouts (`more_from`), so it has more tokens per problem than this search. Use the run "
            "that it continues."
        )
    tokens = read_problem_tokens(node_files(config.pilot))
    if len(tokens) < 2:
        raise ValueError(f"{config.pilot} has {len(tokens)} searched problems. At least 2 are needed.")
    mean, error = statistics.mean(tokens), statistics.stdev(tokens) / len(tokens) ** 0.5
    total = mean * num_problems
    failed = read_summary(config.pilot)["problems"].get("error", 0)
    return [
        f"Extrapolated from {len(tokens):,} problems of {config.pilot}, sampled from {found['engine']['model']}: "
        f"{mean:,.0f} sampled tokens per problem (standard error {error:,.0f}), {total:,.0f} in "
        f"total{format_hours(total, config.tokens_per_second)}.",
        *[f"warning: {failed:,} problems of {config.pilot} have failed requests and are left out."] * (failed > 0),
    ]


def most_asked(search: Any) -> tuple[int, int]:
    """Return the maximum number of samples and of sampled tokens per problem."""
    from ..search.policies import FullTree, RootFilter

    if isinstance(search, RootFilter):
        samples, tokens = most_asked(search.search)
        return search.num_samples + samples, search.num_samples * search.max_solution_tokens + tokens
    samples, length = search.max_sequences, None
    if isinstance(search, FullTree):
        samples = min(samples, sum(search.num_children**depth for depth in range(1, search.max_depth + 1)))
        length = search.max_step_tokens
    elif search.num_completions == 0:
        samples = search.num_solutions
    tokens = samples * (length or search.max_solution_tokens)
    return samples, tokens if search.max_tokens is None else min(tokens, search.max_tokens)


def search_problems(
    config: AnnotateConfig, shard: Shard, problems: "ProblemSet | FinishedRun"
) -> "tuple[Progress, dict[str, Any]]":
    """
    Search the problems of a shard, or resume it. Problems that the shard has started are kept if they are not given any more.

    Args:
        config ([`AnnotateConfig`]):
            Configuration of the run.
        shard ([`Shard`]):
            Part of the problems to search.
        problems ([`ProblemSet`] or [`~search.more_rollouts.FinishedRun`]):
            Problems to search, or the run to continue with more rollouts.

    Returns:
        The work done since this start, and the summary of the whole shard. See [`~search.run_folder.finish_shard`].
    """
    from ..data.problem_sets import refuse_caseless_ids
    from ..grading import AnswerGrader
    from ..search.coroutines import run_coroutine
    from ..search.log import EventLog
    from ..search.policies import check_in_flight
    from ..search.prompts import NO_SYSTEM_NOTE
    from ..search.run_folder import check_manifest, finish_shard, problem_shard, resumed_prompt, shard_name
    from ..search.scheduler import Scheduler, SchedulerConfig
    from .progress_bar import ProgressBar

    folder = Path(config.output_dir)
    source = problems.folder if isinstance(problems, FinishedRun) else None
    prompt, rule = config.make_prompt()
    prompt = resumed_prompt(prompt, *([folder] if source is None else [source, folder]))
    more: dict[str, Any] = {}  # settings of a continued run
    if isinstance(problems, FinishedRun):
        search, more = more_search(config, problems, prompt)
        kept = problems.problems(shard.index, shard.count)
        chosen = [(place, problem) for place, problem in kept if problem.problem_id in search.rounds]
        say(f"Shard {shard.index}/{shard.count}: more rollouts for {len(chosen):,} of {len(kept):,} problems.")
    else:
        search = config.make_search(prompt, rule)
        chosen = [
            (place, problem)
            for place, problem in enumerate(problems.problems)
            if problem_shard(problem.problem_id, shard.count) == shard.index
        ]
        say(f"{problems.describe()}\nShard {shard.index}/{shard.count}: {len(chosen):,} problems.")
    check_in_flight(search, config.max_in_flight)  # before the engine is loaded

    async def run(log: EventLog) -> "Progress":
        with ProgressBar() as bar:
            scheduler = Scheduler(
                engine,
                search,
                grader,
                prompt,
                rule,
                log,
                seed=config.seed,
                extractors=tuple(config.extractors),
                config=SchedulerConfig(config.max_in_flight, config.max_open_problems),
                on_progress=bar.update,
            )
            try:
                return await scheduler.run(chosen)
            finally:
                await engine.close()

    with AnswerGrader(num_workers=config.grader_workers, timeout=config.grader_timeout) as grader:
        engine = config.load_engine(shard)
        prompt = prompt.for_tokenizer(engine.tokenizer)
        if config.system_prompt is not None and prompt.system_prompt is None:
            say(NO_SYSTEM_NOTE)
        for _, problem in chosen[:1]:  # an invalid prompt raises before anything is written
            prompt.encode(engine.tokenizer, problem.prompt)
        note = prompt.describe_control_text(engine.tokenizer, (problem.prompt for _, problem in chosen))
        if note is not None:
            say(note)
        manifest = make_manifest(config, engine, prompt, rule, grader, shard.count)
        manifest |= {"search": search.describe()} | more
        manifest["started_with"] |= {"more_from": config.more_from} if more else {}
        for note in check_manifest(folder, manifest, config.accept_changes or (), source):
            say(note)
        path = folder / shard_name("log", shard.index, shard.count, "jsonl")
        if isinstance(problems, FinishedRun) and not path.exists():
            problems.copy(path, kept, search.rounds)
        with EventLog(path, write=True) as log:
            if log.torn:
                say(
                    f"Dropped an incomplete event of {log.torn} bytes at the end of the log, left by an interrupted run. It "
                    "will be sampled again."
                )
            if isinstance(problems, FinishedRun):
                progress = run_coroutine(run(log))
                if missing := search.num_missing(log):
                    say(f"{missing:,} rollouts were not sampled, because the policy's context is full after the step.")
            else:
                refuse_caseless_ids((problem for _, problem in chosen), log.problems, str(log.path))
                num_others = len(log.problems.keys() - {problem.problem_id for _, problem in chosen})
                if num_others:
                    say(
                        f"The run has {num_others:,} problems that are not among the given problems. They stay in the run."
                    )
                progress = run_coroutine(run(log))
    return progress, finish_shard(folder, shard.index, shard.count)


def more_search(config: AnnotateConfig, run: FinishedRun, prompt: "Prompt") -> tuple[MoreRollouts, dict[str, Any]]:
    """Return the search that adds rollouts to a finished run, and its settings for the manifest."""
    unit, max_solution_tokens = more_settings(config, run)
    units = run.plan(config.more_samples, unit, config.where, config.seed)
    say(describe_plan(run, units, unit, config.more_samples))
    if run.manifest["search"]["search"] == "full_tree":
        say(
            "The run is a full tree. Export it with --estimator child_mean, because leaf_share counts a step with more rollouts more "
            "often in the scores of the steps before it."
        )
    rounds = run.rounds(units, unit)
    search = MoreRollouts(run.manifest["search"], tuple(prompt.final_stops), max_solution_tokens, unit, rounds)
    settings = {"where": config.where, "more_samples": config.more_samples, "num_completions": unit}
    filtered = {name: run.manifest[name] for name in ("where",) if name in run.manifest}
    return search, filtered | {"more_from": run.identity | settings}


def make_manifest(
    config: Any, engine: Any, prompt: "Prompt", rule: "StepRule", grader: "AnswerGrader", num_shards: int
) -> dict[str, Any]:
    """
    Return the settings that determine the trees, without the search settings, and the `identity` of the policy. `versions` and
    `started_with` are recorded too, but may change when a run is resumed.

    Args:
        config ([`AnnotateConfig`] or another config with problems and `extractors`):
            Configuration of the run.
    """
    from .. import __version__

    described, graded = engine.describe(), grader.describe()
    started_with = {
        "problems": config.problems,
        "problems_config": config.problems_config,
        "split": config.split,
        "engine_args": described.pop("engine_args", None),
    }
    versions = {"trl_hrm": __version__}
    for settings in (described, graded):
        versions |= {name: settings.pop(name) for name in VERSIONED & settings.keys()}
    identity = {"policy": config.model_identity()}
    if "identity" in described:  # what a server says about the model that it runs
        identity["policy_server"] = described.pop("identity")
    filtered = {"where": config.where} if isinstance(config.where, dict) else {}  # older manifests do not have it
    return {
        "identity": identity,
        **filtered,
        "engine": described,
        "prompt": asdict(prompt),
        "steps": asdict(rule),
        "extractors": config.extractors,
        "grader": graded,
        "started_with": started_with,
        "seed": config.seed,
        "num_shards": num_shards,
        "versions": dict(sorted(versions.items())),
    }


def format_summary(progress: "Progress", summary: dict[str, Any], folder: "str | Path") -> str:
    """Return a text with the outcomes of all problems and solutions, and the work done since this start."""
    from ..search.outcomes import describe_outcomes
    from ..search.run_folder import read_manifest, summary_warnings

    problems = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in summary["problems"].items())
    lines = [
        f"problems: {problems or 'none'}",
        describe_outcomes(summary["solutions"]),
        f"this run: {progress.num_sequences:,} samples, {progress.generated_tokens:,} tokens in {progress.seconds:,.0f} s "
        f"({progress.generated_tokens / max(progress.seconds, 1e-9):,.0f} tokens/s), {progress.cached_share:.0%} of prefix "
        f"tokens cached, {progress.num_failures:,} failed requests",
    ]
    if summary["problems"].get("error"):
        lines.append(
            f"warning: {summary['problems']['error']:,} problems have failed requests and get no labels. Run the same command "
            "again to retry them."
        )
    lines += [f"warning: {one_line(warning)}" for warning in summary_warnings(summary, read_manifest(folder))]
    return "\n".join(lines)
