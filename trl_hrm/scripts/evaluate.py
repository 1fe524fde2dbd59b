"""
Measure the accuracy of policies without a reward model: greedy decoding, pass@N and majority vote.

```bash
trl-hrm evaluate --policy Qwen/Qwen2.5-Math-7B-Instruct --problems math500 --n 1 8 64 --output_dir runs/policy
trl-hrm evaluate --policy base outputs/kl-self --problems test.jsonl --n 1 8 --output_dir runs/before-after
```

A run can be stopped at any time. The same command resumes it.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import COUNT
from ..data.problems_config import ProblemsConfig
from ..grading import DEFAULT_EXTRACTORS
from ..io import shell_word, shown
from ..search.policy_config import PolicyConfig, PromptConfig, RunConfig
from ..terminal import one_line, plain, say
from .annotate import VERSIONED
from .benchmark import folder_name
from .best_of_n import NUMBERS, own_shard, sample_pool


if TYPE_CHECKING:
    from ..data.candidates import ProblemCandidates
    from ..data.problem_sets import ProblemSet
    from ..evaluation.policy_evaluation import PolicyResults
    from ..search.run_folder import Shard


@dataclass(kw_only=True)
class EvaluateConfig(RunConfig, PromptConfig, PolicyConfig, ProblemsConfig):
    """
    Configuration of [`evaluate`]. It also has the fields of [`ProblemsConfig`], [`PolicyConfig`], [`PromptConfig`] and
    [`RunConfig`].

    Args:
        policy (`list[str]`):
            Paths or Hub ids of the policies. With `engine="openai"`, names of models on the servers. The other options apply to all of
            them.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluate"`):
            Output folder. With several policies, it has one folder for each of them, and their comparison.
        n (`list[int]`, *optional*, defaults to `[1, 2, 4, 8, 16, 32, 64]`):
            Numbers of solutions for pass@N and majority vote. The largest one is the number of samples per problem. pass@1 is always
            measured.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per solution.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace existing results. Samples are kept.

    Raises:
        `ValueError`: If `problems` or `policy` is missing, if `temperature` is 0, or if two policies have the same folder name.
    """

    policy: list[str] = field(
        metadata={
            "help": "Paths or Hub ids of the policies. For openai, names of models on the servers. The other options apply to "
            "all of them.",
            "metavar": "MODEL",
        }
    )
    output_dir: str = field(
        default="outputs/evaluate",
        metadata={
            "help": "Output folder. With several policies, it has one folder for each of them, and their comparison."
        },
    )
    n: list[int] = field(
        default_factory=lambda: list(NUMBERS),
        metadata={
            "help": "Numbers of solutions for pass@N and majority vote. The largest one is the number of samples per problem. "
            "pass@1 is always measured.",
            "range": COUNT,
        },
    )
    max_solution_tokens: int = field(
        default=2048, metadata={"help": "Maximum number of tokens per solution.", "range": COUNT}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace existing results. Samples are kept."})

    def __post_init__(self):
        super().__post_init__()
        if self.problems is None:
            raise ValueError("`problems` is missing. Set the problems that the policies solve.")
        if self.temperature == 0:
            raise ValueError(
                "`temperature` is 0, so all samples of a problem would be the same. Set a temperature above 0 for the samples. Greedy "
                "decoding is always measured too."
            )
        self.n = sorted({1, *self.n})
        self.extractors = self.extractors or list(DEFAULT_EXTRACTORS)
        names = list(map(folder_name, self.policy))
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"`policy` has several policies whose results would be saved in the folder {shown(name)}. Run the command once for "
                    "each of them."
                )

    def folders(self) -> dict[str, Path]:
        """Return the folder of each policy: `output_dir`, or one folder in it for each of several."""
        root = Path(self.output_dir)
        return {policy: root / folder_name(policy) if len(self.policy) > 1 else root for policy in self.policy}


@dataclass(frozen=True)
class Evaluation:
    """
    Result of [`evaluate`]. `str()` gives the text that the command prints.

    Args:
        policies (`list[PolicyResults]`):
            Results of each policy. See [`~evaluation.policy_evaluation.PolicyResults`].
        comparison (`dict[str, Any]`, *optional*):
            Differences to the first policy, if there are several. See [`~evaluation.policy_evaluation.comparison_of`].
        output_dir (`str`):
            Folder of the results.
    """

    policies: "list[PolicyResults]"
    comparison: dict[str, Any] | None
    output_dir: str

    def __str__(self) -> str:
        from ..evaluation.policy_evaluation import COMPARISON, PICTURE, SAMPLES, format_policies, notes_of

        folder = plain(self.output_dir)
        first = Path(self.policies[0].results.output_dir, SAMPLES)
        files = f"results.json, {PICTURE}" if self.comparison is None else f"*/results.json, {', '.join(COMPARISON)}"
        return "\n".join(
            [
                *notes_of(self.policies, self.comparison),
                "",
                format_policies(self.policies, self.comparison),
                "",
                f"Results: {folder}: {files}",
                f"Next: trl-hrm best-of-n --candidates {shell_word(str(first))} --reward_model MODEL",
            ]
        )


def evaluate(config: EvaluateConfig) -> Evaluation | None:
    """
    Measure the accuracy of policies without a reward model: greedy decoding, pass@N and majority vote.

    For each policy, the samples are saved in the run folder `samples`, which `trl-hrm best-of-n --candidates` reads, and one greedy
    solution per problem in `greedy`. With several processes (`accelerate launch`), the problems are split between them, and the first
    process merges the results.

    Args:
        config ([`EvaluateConfig`]):
            Policies, problems, and what to measure.

    Returns:
        [`~scripts.evaluate.Evaluation`]: The accuracies of each policy, and for several policies the paired differences to the first
        one. They are also saved in `config.output_dir`. `None` in the other processes.

    Raises:
        `FileExistsError`: If `output_dir` already has results and `overwrite` is not set.
        `ValueError`: If the input is invalid, a policy does not fit (before anything is sampled), or `output_dir` has a stopped run
            with different settings.

    Example:

    ```python
    from trl_hrm import EvaluateConfig, evaluate

    found = evaluate(EvaluateConfig(policy=["base", "outputs/kl-self"], problems="test.jsonl", n=[1, 8], output_dir="runs/compared"))
    print(found)
    ```
    """
    from ..evaluation.best_of_n import finish_results, wait_for_parts
    from ..evaluation.policy_evaluation import (
        COMPARISON,
        GREEDY,
        PICTURE,
        SAMPLES,
        collect_policy,
        comparison_of,
        write_comparison,
        write_curves,
    )
    from ..evaluation.results import CANDIDATES, RESULTS, check_results, reopen_part
    from ..search.run_folder import claimed_run, shard_name

    shard, folders = own_shard(), config.folders()
    with ExitStack() as stack:
        if len(folders) > 1:
            root = stack.enter_context(claimed_run(config.output_dir, shard, COMPARISON))
            existing = next((root / name for name in COMPARISON if (root / name).exists()), None)
            is_stopped = any(any(folder.glob("part*-of-*.jsonl")) for folder in folders.values())
            if existing is not None and not config.overwrite and not is_stopped:
                raise FileExistsError(
                    f"{existing} exists. Choose another --output_dir, or pass --overwrite to replace it."
                )
        for folder in folders.values():
            stack.enter_context(claimed_run(folder, shard, [RESULTS, CANDIDATES, PICTURE]))
            check_results(folder, config.overwrite)
            for pool in (folder, folder / GREEDY):
                reopen_part(pool, shard.index, shard.count)
        problems = config.read_problems()
        if len(folders) > 1:  # one that does not fit would be found only after the others are sampled
            for policy in folders:
                _check_policy(config, policy, problems)
        pools = []
        for policy, folder in folders.items():
            if len(folders) > 1:
                say(f"\n{one_line(policy)}")
            samples = sample_pool(config, shard, problems, folder / SAMPLES, config.n[-1], policy=policy)
            say("Greedy decoding:")
            changes = {"policy": policy, "temperature": 0.0, "top_p": 1.0, "top_k": 0}
            greedy = sample_pool(config, shard, problems, folder / GREEDY, 1, **changes)
            pools += [(folder, *samples), (folder / GREEDY, *greedy)]
        settings, headers = _grade(config, shard, pools)
        if shard.index > 0:
            say(f"Part {shard.index} of {shard.count} is done. The first process merges the results.")
            return None
        parts = {}
        for pool, header in headers.items():
            parts[pool] = [pool / shard_name("part", i, shard.count, "jsonl") for i in range(shard.count)]
            wait_for_parts(parts[pool], header)
        found = [
            collect_policy(policy, folder, parts[folder], parts[folder / GREEDY], settings, config.n, config.seed)
            for policy, folder in folders.items()
        ]
        comparison = comparison_of(found) if len(found) > 1 else None
        for policy, folder in zip(found, folders.values(), strict=True):
            write_curves(policy, folder / PICTURE)
        if comparison is not None:
            write_comparison(found, comparison, root)
        for policy, folder in zip(found, folders.values(), strict=True):  # last, since results end the run
            finish_results(folder, policy.results)
    return Evaluation(found, comparison, config.output_dir)


def _check_policy(config: EvaluateConfig, policy: str, problems: "ProblemSet") -> None:
    """Check the files of a policy and its prompt without loading it or, for servers, that they run it."""
    from ..loading import check_policy
    from ..search.coroutines import run_coroutine

    one = PolicyConfig(
        **{field.name: getattr(config, field.name) for field in fields(PolicyConfig)} | {"policy": policy}
    )
    tokenizer = one.load_tokenizer()
    prompt, _ = config.make_prompt()
    prompt.for_tokenizer(tokenizer).encode(tokenizer, problems.problems[0].prompt)
    if one.engine == "openai":
        run_coroutine(one.load_engine().close())
    else:
        check_policy(policy, config.policy_revision)


def _grade(
    config: EvaluateConfig, shard: "Shard", pools: "list[tuple[Path, list[tuple[int, ProblemCandidates]], str]]"
) -> tuple[dict[str, Any], dict[Path, dict[str, Any]]]:
    """
    Grade the solutions of this shard, or resume grading. A pool is a folder, its problems with their positions, and their digest.

    Return the settings of the results, and the header of the parts of each pool.
    """
    from ..evaluation.best_of_n import BLOCK, score_pool
    from ..evaluation.results import Part
    from ..grading import AnswerGrader
    from ..scoring.scoring_config import ScoringConfig

    settings = {"source": config.problems, "n": config.n, "extractors": config.extractors, "seed": config.seed}
    if config.where is not None:
        settings["where"] = config.where
    headers = {}
    with AnswerGrader(num_workers=config.grader_workers, timeout=config.grader_timeout) as grader:
        described = grader.describe()
        compared = {name: value for name, value in described.items() if name not in VERSIONED}
        for folder, pool, digest in pools:
            header = {**settings, "problems of a block": BLOCK, "candidates": digest, "grader": compared}
            with Part(folder, header, shard.index, shard.count, config.overwrite) as part:
                for note in part.notes:
                    say(note)
                score_pool(pool, None, grader, part, ScoringConfig(), config.grader_workers, progress=True)
            headers[folder] = part.header
    return settings | {"grader": described}, headers
