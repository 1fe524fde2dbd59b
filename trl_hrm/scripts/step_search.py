"""
Search solutions step by step with a reward model, for several N: greedily, with beams, or in several trees.

```bash
trl-hrm step-search --problems test.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --reward_model me/my-hrm --n 1 4 16
```

Stop it at will and start it again with the same command: it goes on where it was.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from ..data.problems_config import ProblemsConfig
from ..grading import DEFAULT_EXTRACTORS
from ..scoring.reward_model_config import RewardModelConfig
from ..search.policy_config import PolicyConfig, PromptConfig, RunConfig
from .annotate import make_manifest
from .best_of_n import NUMBERS, own_shard


if TYPE_CHECKING:
    from ..evaluation.results import Results


@dataclass(kw_only=True)
class StepSearchConfig(RunConfig, RewardModelConfig, PromptConfig, PolicyConfig, ProblemsConfig):
    """
    Settings of [`step_search`]: those of [`ProblemsConfig`], [`PolicyConfig`], [`PromptConfig`], [`RewardModelConfig`] and
    [`RunConfig`], and

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/step-search"`):
            Folder of the results.
        strategy (`str`, *optional*, defaults to `"step_search"`):
            `"step_search"` takes the best of N next steps (what the HRM paper calls best-of-N), `"beam_search"` keeps several paths,
            `"diverse_tree_search"` (DVTS) searches in several trees.
        n (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16, 32, 64]`):
            Numbers of next steps to choose from: a search for each.
        branching (`int`, *optional*):
            Next steps of a path, for beam_search (N / branching paths) and diverse_tree_search (N / branching trees). By default 4.
        max_depth (`int`, *optional*, defaults to `40`):
            Largest number of steps of a solution, prefix included.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Largest number of tokens of a step.
        aggregate (`str`, *optional*, defaults to `"last"`):
            How the scores of its steps become that of a path. See [`~scoring.aggregate.aggregate`].
        prefix_column (`str`, *optional*):
            Column with the beginning of each solution, raw text up to the end of a step, from which the searches continue. By
            default they begin at the problem.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace results and parts of them.

    Raises:
        `ValueError`: If `problems` or `policy` is missing, or options contradict each other.
    """

    output_dir: str = field(default="outputs/step-search", metadata={"help": "Folder of the results."})
    strategy: Literal["step_search", "beam_search", "diverse_tree_search"] = field(
        default="step_search",
        metadata={
            "help": "step_search takes the best of N next steps (what the HRM paper calls best-of-N), beam_search keeps "
            "several paths, diverse_tree_search (DVTS) searches in several trees."
        },
    )
    n: list[int] = field(
        default_factory=lambda: list(NUMBERS),
        metadata={"help": "Numbers of next steps to choose from: a search for each."},
    )
    branching: int | None = field(
        default=None,
        metadata={
            "help": "Next steps of a path, for beam_search (N / branching paths) and diverse_tree_search (N / branching "
            "trees) (default: 4)."
        },
    )
    max_depth: int = field(default=40, metadata={"help": "Largest number of steps of a solution, prefix included."})
    max_step_tokens: int = field(default=512, metadata={"help": "Largest number of tokens of a step."})
    aggregate: Literal["min", "prod", "last", "mean", "max"] = field(
        default="last", metadata={"help": "How the scores of its steps become that of a path."}
    )
    prefix_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the beginning of each solution, raw text up to the end of a step, from which the searches "
            "continue (default: none, they begin at the problem).",
            "metavar": "NAME",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace results and parts of them."})

    def __post_init__(self):
        super().__post_init__()
        for name in ("problems", "policy"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing.")
        self.extractors = self.extractors or list(DEFAULT_EXTRACTORS)


def step_search(config: StepSearchConfig) -> "Results | None":
    """
    Search solutions step by step with a reward model, for several N.

    With several processes (`accelerate launch`) each takes a part of the problems, and the one that ends last makes one result of all.

    Args:
        config ([`StepSearchConfig`]):
            Problems, policy, reward model, and how to search.

    Returns:
        [`~evaluation.results.Results`]: The curve over N, which is in `config.output_dir` too. `None` in the other processes.

    Raises:
        `FileExistsError`: If the folder has results of something else.
        `ValueError`: If the input is damaged, the reward model does not fit, or an N is no number for the strategy.
    """
    from pathlib import Path

    from ..evaluation.results import check_results
    from ..evaluation.step_search import StepSearchSettings, run_step_search
    from ..grading import AnswerGrader
    from ..scoring.scoring_config import ScoringConfig
    from ..search.step_search import ending_extractors

    check_results(Path(config.output_dir), config.overwrite)
    shard = own_shard()
    names = ("output_dir", "n", "strategy", "branching", "max_depth", "max_step_tokens", "aggregate")
    names += ("extractors", "seed", "max_in_flight", "max_open_problems")
    settings = StepSearchSettings(
        **{name: getattr(config, name) for name in names}, scoring=ScoringConfig(config.spans, config.combine)
    )
    prompt, rule = config.make_prompt()
    search = next(iter(settings.searches(prompt, rule).values()))  # prefixes are the same to all N
    fault = partial(search.prefix_fault, ending=ending_extractors(config.extractors))
    problems = config.read_problems(config.prefix_column, fault)
    print(problems.describe())
    scorer = config.load_scorer()
    with AnswerGrader(num_workers=config.grader_workers, timeout=config.grader_timeout) as grader:
        engine = config.load_engine(shard)
        manifest = make_manifest(config, engine, prompt, rule, grader, shard.count)
        if config.prefix_column is not None:
            manifest["started_with"]["prefix_column"] = config.prefix_column
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
        )
    if results is None:
        print(f"part {shard.index} of {shard.count} is done; another process makes the results.")
    return results
