"""
Search for solutions step by step with a reward model, for several N: greedy step search, beam search or diverse tree search.

```bash
trl-hrm step-search --problems test.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --reward_model me/my-hrm --n 1 4 16
```

A run can be stopped at any time. The same command resumes it.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..config import COUNT
from ..data.problems_config import ProblemsConfig
from ..grading import DEFAULT_EXTRACTORS
from ..scoring.reward_model_config import RewardModelConfig
from ..search.policy_config import PolicyConfig, PromptConfig, RunConfig, TrackingConfig
from ..terminal import say
from .annotate import make_manifest
from .best_of_n import NUMBERS, own_shard


if TYPE_CHECKING:
    from ..evaluation.results import Results
    from ..search.run_folder import Shard


@dataclass(kw_only=True)
class StepSearchConfig(TrackingConfig, RunConfig, RewardModelConfig, PromptConfig, PolicyConfig, ProblemsConfig):
    """
    Configuration of [`step_search`]. It also has the fields of [`ProblemsConfig`], [`PolicyConfig`], [`PromptConfig`],
    [`RewardModelConfig`], [`RunConfig`] and [`TrackingConfig`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/step-search"`):
            Output folder.
        strategy (`str`, *optional*, defaults to `"step_search"`):
            `"step_search"` selects the best of N next steps (the HRM paper calls this best-of-N), `"beam_search"` keeps several paths,
            and `"diverse_tree_search"` (DVTS) searches several trees independently.
        n (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16, 32, 64]`):
            Numbers of next steps to select from. One search is run for each.
        branching (`int`, *optional*):
            Number of next steps per path, for `beam_search` (N / branching paths) and `diverse_tree_search` (N / branching trees).
            Defaults to 4.
        max_depth (`int`, *optional*, defaults to `40`):
            Maximum number of steps per solution, including the prefix.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens per step.
        aggregate (`str`, *optional*, defaults to `"last"`):
            How to aggregate the step scores into the score of a path. See [`~scoring.aggregate.aggregate`].
        prefix_column (`str`, *optional*):
            Column with the beginning of each solution, as raw text up to the end of a step. The searches continue from there. By
            default, they start from the problem.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace existing results of the same search. A search with different settings requires another `output_dir`.

    Raises:
        `ValueError`: If `problems` or `policy` is missing, or options contradict each other.
    """

    output_dir: str = field(default="outputs/step-search", metadata={"help": "Output folder."})
    strategy: Literal["step_search", "beam_search", "diverse_tree_search"] = field(
        default="step_search",
        metadata={
            "help": "step_search selects the best of N next steps (the HRM paper calls this best-of-N), beam_search keeps "
            "several paths, and diverse_tree_search (DVTS) searches several trees independently."
        },
    )
    n: list[int] = field(
        default_factory=lambda: list(NUMBERS),
        metadata={"help": "Numbers of next steps to select from. One search is run for each.", "range": COUNT},
    )
    branching: int | None = field(
        default=None,
        metadata={
            "help": "Number of next steps per path, for beam_search (N / branching paths) and diverse_tree_search (N / "
            "branching trees) (default: 4).",
            "range": COUNT,
        },
    )
    max_depth: int = field(
        default=40, metadata={"help": "Maximum number of steps per solution, including the prefix.", "range": COUNT}
    )
    max_step_tokens: int = field(default=512, metadata={"help": "Maximum number of tokens per step.", "range": COUNT})
    aggregate: Literal["min", "prod", "last", "mean", "max"] = field(
        default="last", metadata={"help": "How to aggregate the step scores into the score of a path."}
    )
    prefix_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the beginning of each solution, as raw text up to the end of a step. The searches continue "
            "from there (default: start from the problem).",
            "metavar": "NAME",
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace existing results of the same search. A search with different settings requires another --output_dir."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.judge_template is not None:
            raise ValueError(
                "`judge_template` does not work with a step search, which scores many short steps while it samples. Use a step reward "
                "model, or `trl-hrm best-of-n`."
            )
        for name in ("problems", "policy"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is missing. Set `problems` and `policy`.")
        self.extractors = self.extractors or list(DEFAULT_EXTRACTORS)


def step_search(config: StepSearchConfig) -> "Results | None":
    """
    Search for solutions step by step with a reward model, and measure the accuracy for several N.

    With several processes (`accelerate launch`), the problems are split between them, and the last process to finish merges the
    results.

    Args:
        config ([`StepSearchConfig`]):
            Problems, policy, reward model and search options.

    Returns:
        [`~evaluation.results.Results`]: The curve over N, also saved in `config.output_dir`. `None` in the other processes.

    Raises:
        `FileExistsError`: If `output_dir` already has results and `overwrite` is not set.
        `ImportError`: If a tracker of `report_to` is not installed.
        `ValueError`: If the input is invalid, the reward model is incompatible, an N is invalid for the strategy, or `output_dir` has
            a search with different settings.
    """
    from pathlib import Path

    from ..evaluation.results import RESULTS, candidates_name, check_results
    from ..evaluation.step_search import n_folder
    from ..search.run_folder import claimed_run
    from ..search.tree_table import log_trees
    from ..tracking import check_trackers

    check_trackers(config.report_to or ())
    shard = own_shard()
    with claimed_run(config.output_dir, shard, [RESULTS, *map(candidates_name, config.n)]):
        check_results(Path(config.output_dir), config.overwrite)
        results = _step_search(config, shard)
    if results is not None and config.report_to:
        folders = {f"n-{n}/": n_folder(config.output_dir, n) for n in sorted(set(config.n))}
        log_trees(folders, config.report_to, config.project, config.run_name)
    return results


def _step_search(config: StepSearchConfig, shard: "Shard") -> "Results | None":
    from ..evaluation.step_search import StepSearchSettings, run_step_search
    from ..grading import AnswerGrader
    from ..scoring.scoring_config import ScoringConfig
    from ..search.policies import check_in_flight
    from ..search.prompts import NO_SYSTEM_NOTE
    from ..search.step_search import ending_extractors

    names = ("output_dir", "n", "strategy", "branching", "max_depth", "max_step_tokens", "aggregate")
    names += ("extractors", "seed", "max_in_flight", "max_open_problems")
    settings = StepSearchSettings(
        **{name: getattr(config, name) for name in names}, scoring=ScoringConfig(config.spans, config.combine)
    )
    prompt, rule = config.make_prompt()
    for search in settings.searches(prompt, rule).values():
        check_in_flight(search, config.max_in_flight)
    # the check of prefixes does not depend on N
    fault = partial(search.prefix_fault, ending=ending_extractors(config.extractors))
    problems = config.read_problems(config.prefix_column, fault)
    say(problems.describe())
    scorer = config.load_scorer()
    with AnswerGrader(num_workers=config.grader_workers, timeout=config.grader_timeout) as grader:
        engine = config.load_engine(shard)
        prompt = prompt.for_tokenizer(engine.tokenizer)
        if config.system_prompt is not None and prompt.system_prompt is None:
            say(NO_SYSTEM_NOTE)
        manifest = make_manifest(config, engine, prompt, rule, grader, shard.count)
        if config.prefix_column is not None:
            manifest["started_with"]["prefix_column"] = config.prefix_column
        manifest["identity"] |= config.describe_identity(scorer)
        results = run_step_search(
            settings,
            problems.problems,
            engine,
            scorer,
            grader,
            prompt,
            rule,
            manifest,
            {"model": config.reward_model, **config.describe_scoring()},
            shard,
            config.grader_workers,
            config.accept_changes or (),
        )
    if results is None:
        say(f"Part {shard.index} of {shard.count} is done. The last process to finish merges the results.")
    return results
