"""
Measure how accuracy grows with N when a reward model selects one of N solutions: best-of-N and weighted votes, compared with
majority vote and pass@N.

```bash
trl-hrm best-of-n --problems test.jsonl --policy Qwen/Qwen2.5-Math-7B-Instruct --reward_model me/my-hrm --output_dir runs/bon
trl-hrm best-of-n --candidates samples.jsonl --reward_model me/my-hrm --aggregate min last
```

A run can be stopped at any time. The same command resumes it.
"""

from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import COUNT
from ..data.build_config import unescape
from ..data.problems_config import ProblemsConfig
from ..data.sources import parse_columns
from ..grading import DEFAULT_EXTRACTORS
from ..scoring.aggregate import AGGREGATES
from ..scoring.reward_model_config import RewardModelConfig
from ..search.policy_config import PolicyConfig, PromptConfig, RunConfig
from ..search.segmentation_config import SegmentationConfig
from ..terminal import one_line, say
from .annotate import VERSIONED, AnnotateConfig, format_summary, search_problems


if TYPE_CHECKING:
    from ..data.candidates import ProblemCandidates
    from ..data.problem_sets import ProblemSet
    from ..evaluation.results import Results
    from ..search.run_folder import Shard


NUMBERS = [1, 2, 4, 8, 16, 32, 64]
SAMPLES = "samples"  # folder of the sampled solutions, in the results folder
# Fields of `PromptConfig` that also apply to given candidates. The others only apply to sampling.
_SEGMENTATION = [field.name for field in fields(SegmentationConfig)]
_READING = (*_SEGMENTATION, "extractors")
_OF_CANDIDATES = ("candidates_split", "candidates_columns", "join_steps", "keep_thinking")


@dataclass(kw_only=True)
class BestOfNConfig(RunConfig, RewardModelConfig, PromptConfig, PolicyConfig, ProblemsConfig):
    r"""
    Configuration of [`best_of_n`]. It also has the fields of [`ProblemsConfig`], [`PolicyConfig`], [`PromptConfig`],
    [`RewardModelConfig`] and [`RunConfig`].

    Args:
        output_dir (`str`, *optional*, defaults to `"outputs/best-of-n"`):
            Output folder.
        n (`list[int]`, *optional*):
            Numbers of solutions to select from. Defaults to 1, 2, 4, 8, 16, 32 and 64. With `candidates`, limited to the number of
            candidates that every problem has.
        aggregate (`list[str]`, *optional*, defaults to `["min", "last", "prod", "mean"]`):
            How to aggregate the step scores into the score of a solution. See [`~scoring.aggregate.aggregate`].
        num_draws (`int`, *optional*, defaults to `200`):
            Number of random subsets of N candidates over which votes are averaged, if there are more subsets. All other accuracies are
            exact means over all subsets. See [`~evaluation.curves.make_curves`].
        max_solution_tokens (`int`, *optional*):
            Maximum number of tokens per sampled solution. Defaults to 2048.
        candidates (`str`, *optional*):
            Solutions to select from, instead of sampling them: a JSON Lines or JSON file, or a dataset folder, with the columns
            `prompt`, `answer` and either `completion` (a text), `completions` (a list of steps) or `candidates` (a list of either); an output
            of search-and-learn; or a folder of `trl-hrm annotate` with `search="rollouts"`. Reference answers can also come from
            `problems`.
        candidates_split (`str`, *optional*):
            Split of the candidates dataset. Defaults to `"train"`.
        candidates_columns (`dict[str, str]`, *optional*):
            Like `columns`, for the candidates. Needed only with `problems`, because `columns` then applies to the problems.
        join_steps (`str`, *optional*):
            Separator used to join the steps of a candidate that is given as a list. Defaults to `"\n\n"`.
        keep_thinking (`bool`, *optional*):
            Whether to keep the thinking of a reasoning model in `candidates`. By default, it is removed before they are scored, except
            with `segmentation="thinking"`, which always keeps it.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace existing results, also partial ones.

    Raises:
        `ValueError`: If options contradict each other, or have no effect with the other options.
    """

    output_dir: str = field(default="outputs/best-of-n", metadata={"help": "Output folder."})
    n: list[int] | None = field(
        default=None,
        metadata={
            "help": "Numbers of solutions to select from (default: 1 2 4 8 16 32 64; with --candidates, limited to the "
            "number of candidates that every problem has).",
            "range": COUNT,
        },
    )
    aggregate: list[str] = field(
        default_factory=lambda: ["min", "last", "prod", "mean"],
        metadata={
            "help": "How to aggregate the step scores into the score of a solution.",
            "choices": list(AGGREGATES),
        },
    )
    num_draws: int = field(
        default=200,
        metadata={
            "help": "Number of random subsets of N candidates over which votes are averaged, if there are more subsets. All other "
            "accuracies are exact means over all subsets.",
            "metavar": "R",
            "range": "[1, 1000000]",
            "advanced": True,
        },
    )
    max_solution_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens per sampled solution (default: 2048).", "range": COUNT},
    )
    candidates: str | None = field(
        default=None,
        metadata={
            "help": "Solutions to select from, instead of sampling them: a JSON Lines or JSON file, or a dataset folder, with the "
            "columns `prompt`, `answer` and either `completion` (a text), `completions` (a list of steps) or `candidates` "
            "(a list of either); an output of search-and-learn; or a folder of `trl-hrm annotate --search rollouts`. "
            "Reference answers can also come from --problems.",
            "metavar": "INPUT",
        },
    )
    candidates_split: str | None = field(
        default=None, metadata={"help": "Split of the candidates dataset (default: train).", "advanced": True}
    )
    candidates_columns: dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "Like --columns, for the candidates. Needed only with --problems, because --columns then applies to "
            "the problems.",
            "nargs": "+",
            "metavar": "NAME=COLUMN",
            "parse": str,
            "advanced": True,
        },
    )
    join_steps: str | None = field(
        default=None,
        metadata={
            "help": r"Separator used to join the steps of a candidate that is given as a list. \n and \t are read as a newline "
            r"and a tab (default: \n\n).",
            "metavar": "TEXT",
            "parse": unescape,
            "may_be_empty": True,
            "advanced": True,
        },
    )
    keep_thinking: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",  # `--keep_thinking` alone means true
            "const": True,
            "help": "Keep the thinking of a reasoning model. By default, it is removed before candidates are scored, except with "
            "--segmentation thinking, which always keeps it.",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace existing results, also partial ones."})

    def __post_init__(self):
        if self.candidates_columns is not None:
            self.candidates_columns = parse_columns(self.candidates_columns)
        super().__post_init__()
        self.aggregate = list(dict.fromkeys(self.aggregate))
        if (self.candidates is None) == (self.policy is None):
            raise ValueError(
                "Set either `candidates`, to select from existing solutions, or `policy` and `problems`, to sample them."
            )
        if self.policy is not None:
            if self.problems is None:
                raise ValueError("`problems` is missing. Set the problems that `policy` solves.")
            refuse(self, _OF_CANDIDATES, "only applies to `candidates`, but solutions are sampled from `policy`.")
            self.n = self.n or NUMBERS
            self.extractors = self.extractors or list(DEFAULT_EXTRACTORS)
        else:
            sampling = [field.name for group in (PolicyConfig, PromptConfig) for field in fields(group)]
            sampling = [name for name in sampling if name not in _READING]
            sampling += ["max_solution_tokens", "max_in_flight", "max_open_problems", "accept_changes"]
            refuse(self, sampling, "only applies to sampling from `policy`, but `candidates` is set.")
        if self.problems is None:
            names = [field.name for field in fields(ProblemsConfig) if field.name != "columns"]
            refuse(self, [*names, "candidates_columns"], "has no effect without `problems`.")


def refuse(config: Any, names: "list[str] | tuple[str, ...]", why: str) -> None:
    """
    Raise an error if one of the settings in `names` is set, because it has no effect.

    Raises:
        `ValueError`: If one of `names` is not at its default.
    """
    defaults = {field.name: field for field in fields(config)}
    for name in names:
        default = defaults[name]
        made = default.default_factory() if callable(default.default_factory) else default.default
        if getattr(config, name) != made:
            raise ValueError(f"`{name}` {why} Remove `{name}`.")


def best_of_n(config: BestOfNConfig) -> "Results | None":
    """
    Select one of N solutions per problem with a reward model, and measure the accuracy for several N.

    With several processes (`accelerate launch`), the problems are split between them, and the first process merges the results.

    Args:
        config ([`BestOfNConfig`]):
            Solutions or a policy to sample them, the reward model, and what to measure.

    Returns:
        [`~evaluation.results.Results`]: The curves over N, also saved in `config.output_dir`. `None` in the other processes.

    Raises:
        `FileExistsError`: If `output_dir` already has results and `overwrite` is not set.
        `ValueError`: If the input is invalid, the reward model is incompatible, or `output_dir` has a stopped run with different
            settings.

    Example:

    ```python
    from trl_hrm import BestOfNConfig, best_of_n

    results = best_of_n(BestOfNConfig(candidates="samples.jsonl", reward_model="me/my-hrm", n=[1, 4, 16], output_dir="runs/bon"))
    print(results.curves["best_of_n/min"])
    ```
    """
    from ..evaluation.results import CANDIDATES, RESULTS, check_results
    from ..search.run_folder import claimed_run

    shard = own_shard()
    with claimed_run(config.output_dir, shard, [RESULTS, CANDIDATES]):
        check_results(Path(config.output_dir), config.overwrite)
        return _best_of_n(config, shard)


def _best_of_n(config: BestOfNConfig, shard: "Shard") -> "Results | None":
    from ..evaluation.best_of_n import BLOCK, collect_results, finish_results, score_pool, wait_for_parts
    from ..evaluation.results import Part, reopen_part
    from ..grading import AnswerGrader
    from ..search.run_folder import shard_name

    folder = Path(config.output_dir)
    reopen_part(folder, shard.index, shard.count)
    counts: Counter = Counter()
    if config.policy is not None:
        problems, digest, reading, n = _sampled(config, shard)
    else:
        problems, digest, reading, n = _given(config, shard, counts)
    reward_model = {"model": config.reward_model, **config.describe_scoring()}
    names = ("where", "aggregate", "spans", "combine", "num_draws", *_SEGMENTATION, "join_steps")
    settings = {
        "source": config.candidates or config.problems,
        "n": sorted(set(n)),
        **{name: getattr(config, name) for name in names if getattr(config, name) is not None},
        "seed": config.seed,
        **reading,
    }
    scorer = None
    judge_log = folder / shard_name("judgements", shard.index, shard.count, "jsonl")
    is_new = not (folder / shard_name("partial", shard.index, shard.count, "jsonl")).exists()
    if problems and (is_new or config.is_served()):  # a server says which model it runs
        scorer = config.load_scorer(
            judge_log, config.overwrite
        )  # before the folder is made, so that an incompatible model leaves no files
    with AnswerGrader(num_workers=config.grader_workers, timeout=config.grader_timeout) as grader:
        described = grader.describe()
        header = {
            **settings,
            "identity": config.describe_identity(scorer),
            "reward_model": reward_model,
            "problems of a block": BLOCK,
            "candidates": digest,
            "grader": {name: value for name, value in described.items() if name not in VERSIONED},
        }
        settings["grader"] = described
        with Part(folder, header, shard.index, shard.count, config.overwrite) as part:
            for note in part.notes:
                say(note)
            if scorer is None and part.num_blocks * BLOCK < len(problems):
                scorer = config.load_scorer(judge_log, config.overwrite)
            score_pool(problems, scorer, grader, part, config, config.grader_workers, progress=True)
    if shard.index > 0:
        say(f"Part {shard.index} of {shard.count} is done. The first process merges the results.")
        return None
    parts = [folder / shard_name("part", i, shard.count, "jsonl") for i in range(shard.count)]
    wait_for_parts(parts, part.header)
    results, _ = collect_results(
        folder,
        parts,
        Path(config.candidates or folder / SAMPLES),
        reward_model,
        settings,
        n,
        config.aggregate,
        config.num_draws,
        config.seed,
        counts,
        sampled=config.policy is not None,
    )
    finish_results(folder, results)
    return results


def own_shard() -> "Shard":
    """
    Return the shard of this process, and hide the GPUs of the other processes.

    Policy and reward model both use the first visible GPU.
    """
    import os

    from ..search.run_folder import launched_shard, show_own_gpu

    shard = launched_shard()
    if shard.local is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # "" hides all GPUs
        show_own_gpu(shard.local)
    return shard._replace(local=None)


def _given(
    config: BestOfNConfig, shard: "Shard", counts: Counter
) -> "tuple[list[tuple[int, ProblemCandidates]], str, dict[str, Any], list[int]]":
    """Read the candidates. Return this shard's problems with their positions, a digest of all, the reading settings, and N."""
    from ..data.candidate_sources import check_sizes, read_pool, reading_settings, refuse_options
    from ..data.candidates_config import CandidatesConfig
    from ..data.solutions import solution_warnings
    from ..evaluation.best_of_n import pool_digest
    from ..evaluation.results import CANDIDATES
    from ..search.run_folder import MANIFEST, problem_shard

    if Path(config.candidates).resolve() == Path(config.output_dir, CANDIDATES).resolve():
        raise ValueError(f"{config.candidates} would be overwritten by the results. Set another `output_dir`.")
    names = ("candidates", *_SEGMENTATION, "join_steps", "keep_thinking")
    columns = config.columns if config.problems is None else config.candidates_columns
    given = {name: getattr(config, name) for name in names}
    reader = CandidatesConfig(split=config.candidates_split, columns=columns or {}, **given)
    # The same checks of `reader` would name its fields, not the options of this command
    if Path(config.candidates, MANIFEST).is_file():
        refuse_options(config, ("candidates_split", "candidates_columns"), "a run")
    elif Path(config.candidates).is_file():
        refuse_options(config, ("candidates_split",), "a file")
    answers = None
    if config.problems is not None:
        answers = config.read_problems()
        say(answers.describe())
        counts["problem_records_left_out"] = answers.faults.num_left_out
    reading = reading_settings(reader, config.extractors)
    pool = read_pool(reader, config.extractors, answers, counts)
    if shard.index == 0:
        shown = {name: " ".join(value) if isinstance(value, list) else value for name, value in reading.items()}
        say(f"Reading candidates with {', '.join(f'{name} {value}' for name, value in shown.items())}.")
        for warning in solution_warnings(counts, config.step_rule().name):
            say(f"warning: {one_line(warning)}")
    n = config.n
    if n is None:
        fewest = min((len(problem.candidates) for problem in pool), default=0)
        largest = min(max(fewest, 1), max(NUMBERS))
        n = [*(number for number in NUMBERS if number < largest), largest]
        say(f"N is {' '.join(map(str, n))}: every problem has at least {fewest:,} candidates.")
    check_sizes(pool, max(n))
    chosen = [(i, p) for i, p in enumerate(pool) if problem_shard(p.problem_id, shard.count) == shard.index]
    return chosen, pool_digest(pool), reading, n


def _sampled(
    config: BestOfNConfig, shard: "Shard"
) -> "tuple[list[tuple[int, ProblemCandidates]], str, dict[str, Any], list[int]]":
    """
    Sample candidates from the policy, or resume sampling.

    Return this shard's problems with their positions, a digest of them, the reading settings, and N.
    """
    config.check_reward_model()  # before anything is sampled
    pool, digest = sample_pool(config, shard, config.read_problems(), Path(config.output_dir, SAMPLES), max(config.n))
    return pool, digest, {"extractors": config.extractors}, config.n


def sample_pool(
    config: Any, shard: "Shard", problems: "ProblemSet", folder: Path, number: int, **changes: Any
) -> "tuple[list[tuple[int, ProblemCandidates]], str]":
    """
    Sample whole solutions from a policy, or resume sampling.

    Args:
        config ([`BestOfNConfig`] or another config with a policy, a prompt, problems and `max_solution_tokens`):
            Configuration of the run.
        shard ([`Shard`]):
            Shard of this process.
        problems ([`~data.problem_sets.ProblemSet`]):
            All problems.
        folder (`Path`):
            Folder of the run.
        number (`int`):
            Number of solutions per problem.
        **changes:
            Options of [`AnnotateConfig`] that differ from `config`.

    Returns:
        The problems of this shard with their positions and solutions, and a digest of them.
    """
    from ..data.candidate_sources import check_sizes, read_run
    from ..evaluation.best_of_n import SampleCost, pool_digest
    from ..search.run_folder import shard_name

    cost = SampleCost(folder, shard)
    groups = (PolicyConfig, PromptConfig, ProblemsConfig, RunConfig)
    shared = {field.name: getattr(config, field.name) for group in groups for field in fields(group)}
    settings = {
        "output_dir": str(folder),
        "search": "rollouts",
        "num_solutions": number,
        "num_completions": 0,
        "max_sequences": number,
        "max_solution_tokens": config.max_solution_tokens,
    }
    progress, summary = search_problems(AnnotateConfig(**shared | settings | changes), shard, problems)
    cost.end(progress)
    say(format_summary(progress, summary, folder))
    places = {problem.problem_id: place for place, problem in enumerate(problems.problems)}
    nodes = folder / shard_name("nodes", shard.index, shard.count, "parquet")
    pool = [problem for problem in read_run([nodes], config.extractors) if problem.problem_id in places]
    if pool:
        check_sizes(pool, number)
    return [(places[problem.problem_id], problem) for problem in pool], pool_digest(pool)
