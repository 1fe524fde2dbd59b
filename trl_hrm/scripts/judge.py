"""
Let a language model name the first wrong step of complete solutions, by several votes.

```bash
trl-hrm judge runs/mcts --judge Qwen/Qwen2.5-72B-Instruct --engine openai --base_urls http://a:8000/v1 --num_votes 3
```

The verdicts are added to the run. The same command resumes a judge that was stopped.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..config import COUNT, SEED, Dtype
from ..data.candidates_config import CandidatesConfig
from ..io import claimed_folder, dump_json, read_json, read_json_lines, replacing, shell_word, shown, write_json
from ..search.policy_config import ENGINE_ARGS, TOP_K, TOP_P, EngineConfig
from ..search.run_folder import Shard
from ..terminal import one_line, say


if TYPE_CHECKING:
    from ..data.judge_sources import JudgedProblem
    from ..scoring.generative_scorer import GenerativeScorer


SUMMARY = "summary.json"
# Settings that may change when a judge is resumed. Responses in the log are used again
SIZES = ("num_votes", "max_solutions", "max_sequences", "max_tokens")


@dataclass(kw_only=True)
class JudgeConfig(EngineConfig, CandidatesConfig):
    r"""
    Configuration of [`~scripts.judge.judge`]. It also has the fields of [`CandidatesConfig`] except `candidates`. They only apply to
    inputs that are not runs.

    Args:
        input (`str`):
            Solutions to judge: a folder of `trl-hrm annotate`; a dataset folder or JSON Lines file of step trees (`prompt`,
            `completions` and `labels`); or candidates, as in [`CandidatesConfig`].
        judge (`str`):
            Path or Hub id of the judge. With `engine="openai"`, the name of the model on the servers.
        engine (`str`, *optional*):
            Engine that runs the judge: `"vllm"`, `"transformers"`, or `"openai"` for servers. Defaults to `"openai"` if `base_urls` is
            set, otherwise to `"vllm"` if vLLM is installed, otherwise to `"transformers"`.
        base_urls (`list[str]`, *optional*):
            Base URLs of OpenAI-compatible completions servers, such as `http://host:8000/v1`.
        judge_revision (`str`, *optional*):
            Revision of the judge on the Hub.
        judge_dtype (`str`, *optional*):
            Dtype of the weights, for vllm and transformers. Defaults to the dtype of the checkpoint.
        judge_api (`str`, *optional*):
            Kind of server: `"vllm"` (exchanges token ids), `"transformers"` (`transformers serve`), or `"text"` (any other
            completions server). Defaults to `"vllm"`.
        judge_tokenizer (`str`, *optional*):
            Path or Hub id of the tokenizer, for servers. Defaults to `judge`.
        engine_args (`dict[str, Any]`, *optional*):
            Additional arguments of the engine. For vllm, any engine argument, such as `{"gpu_memory_utilization": 0.8}`; for
            transformers, `batch_size` and `attn_implementation`; for openai, `timeout`, `max_retries` and `backoff`.
        template (`str`, *optional*):
            Prompt and form of the verdict: `"first_error"`, `"first_error_reference"` (shows the reference answer), `"instruct"`,
            `"genprm"`, `"thinkprm"`, or the path of a file. See [`JudgeTemplate.load`]. Defaults to the template of a published judge,
            otherwise to `"first_error"`.
        num_votes (`int`, *optional*, defaults to `3`):
            Number of responses per prompt. It can be raised later: the earlier responses are used again.
        temperature (`float`, *optional*):
            Sampling temperature. 0 means greedy decoding. Defaults to the temperature of the template.
        top_p (`float`, *optional*, defaults to `1.0`):
            Cumulative probability of the tokens to sample from. 1 disables it.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most probable tokens to sample from. 0 disables it.
        max_response_tokens (`int`, *optional*):
            Maximum number of tokens of a response. Defaults to the `max_tokens` of the template.
        max_solutions (`int`, *optional*, defaults to `16`):
            Maximum number of different solutions to judge per problem. More are left out at random.
        max_sequences (`int`, *optional*):
            Maximum number of responses per problem. Defaults to no limit.
        max_tokens (`int`, *optional*):
            Maximum number of sampled tokens per problem. Each response counts as `max_response_tokens`. Defaults to no limit.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the responses, and of the choice of solutions.
        max_in_flight (`int`, *optional*, defaults to `256`):
            Maximum number of responses that the engine generates in parallel.
        shard (`str`, *optional*, defaults to `"0/1"`):
            Part of the problems to judge: `"I/N"` is the I-th of N parts, counted from 0.
        name (`str`, *optional*, defaults to `"judge"`):
            Name of the judge. The verdicts on a run are in the folder `judges/NAME` of the run.
        output_dir (`str`, *optional*):
            Output folder, only for inputs that are not runs.
        accept_changes (`list[str]`, *optional*):
            Names of changes to accept when a judge is resumed, such as `judge.weights`, as listed in the error message. The verdicts then
            mix both, which is recorded in the manifest.

    Raises:
        `ValueError`: If an option does not work with the engine or the template, or is too small for one solution.
    """

    input: str = field(
        metadata={
            "help": "Solutions to judge: a folder of `trl-hrm annotate`; a dataset folder or JSON Lines file of step trees (`prompt`, "
            "`completions` and `labels`); or candidates, with the columns `prompt` and either `completion` (a text), `completions` "
            "(a list of steps) or `candidates` (a list of either).",
            "positional": True,
        }
    )
    judge: str = field(
        metadata={"help": "Path or Hub id of the judge. For openai, the name of the model on the servers."}
    )
    engine: Literal["vllm", "transformers", "openai"] | None = field(
        default=None,
        metadata={
            "help": "Engine that runs the judge (default: openai if --base_urls is set, otherwise vllm if it is installed, otherwise "
            "transformers)."
        },
    )
    base_urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "Base URLs of OpenAI-compatible completions servers, such as http://host:8000/v1.",
            "metavar": "URL",
        },
    )
    judge_revision: str | None = field(
        default=None, metadata={"help": "Revision of the judge on the Hub.", "advanced": True}
    )
    judge_dtype: Dtype | None = field(
        default=None,
        metadata={"help": "Dtype of the weights, for vllm and transformers (default: the dtype of the checkpoint)."},
    )
    judge_api: Literal["vllm", "transformers", "text"] | None = field(
        default=None,
        metadata={
            "help": "Kind of server: vllm (exchanges token ids), transformers (`transformers serve`), or text (any other completions "
            "server) (default: vllm).",
            "advanced": True,
        },
    )
    judge_tokenizer: str | None = field(
        default=None,
        metadata={"help": "Path or Hub id of the tokenizer, for servers (default: the judge).", "advanced": True},
    )
    engine_args: dict[str, Any] | str | None = field(default=None, metadata=ENGINE_ARGS)
    template: str | None = field(
        default=None,
        metadata={
            "help": "Prompt and form of the verdict: first_error, first_error_reference (shows the reference answer), instruct (one prompt "
            "per step), genprm, thinkprm, or the path of a file (default: the template of a published judge, otherwise first_error).",
            "metavar": "NAME|FILE",
        },
    )
    num_votes: int = field(
        default=3,
        metadata={
            "help": "Number of responses per prompt. It can be raised later: the earlier responses are used again.",
            "range": "[1, 1024]",
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "help": "Sampling temperature. 0 means greedy decoding (default: the temperature of the template).",
            "range": "[0, inf)",
        },
    )
    top_p: float = field(default=1.0, metadata=TOP_P)
    top_k: int = field(default=0, metadata=TOP_K)
    max_response_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of a response (default: the value of the template).",
            "range": COUNT,
        },
    )
    max_solutions: int = field(
        default=16,
        metadata={
            "help": "Maximum number of different solutions to judge per problem. More are left out at random.",
            "range": COUNT,
        },
    )
    max_sequences: int | None = field(
        default=None,
        metadata={"help": "Maximum number of responses per problem (default: no limit).", "range": COUNT},
    )
    max_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of sampled tokens per problem. Each response counts as --max_response_tokens (default: no limit).",
            "advanced": True,
            "range": COUNT,
        },
    )
    seed: int = field(
        default=42,
        metadata={"help": "Random seed of the responses, and of the choice of solutions.", "range": SEED},
    )
    max_in_flight: int = field(
        default=256,
        metadata={"help": "Maximum number of responses that the engine generates in parallel.", "range": COUNT},
    )
    shard: str = field(
        default="0/1",
        metadata={"help": "Part of the problems to judge: the I-th of N parts, counted from 0.", "metavar": "I/N"},
    )
    name: str = field(
        default="judge",
        metadata={"help": "Name of the judge. The verdicts on a run are in the folder judges/NAME of the run."},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Output folder, only for inputs that are not runs."}
    )
    accept_changes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of changes to accept when a judge is resumed, such as judge.weights, as listed in the error message. The "
            "verdicts then mix both, which is recorded in the manifest.",
            "metavar": "NAME",
            "advanced": True,
        },
    )

    candidates: str = field(default="", init=False, metadata={"may_be_empty": True})  # is `input`

    MODEL_FIELDS: ClassVar[dict[str, str]] = {
        "model": "judge",
        "revision": "judge_revision",
        "dtype": "judge_dtype",
        "urls": "base_urls",
        "api": "judge_api",
        "tokenizer": "judge_tokenizer",
    }

    def __post_init__(self):
        from ..scoring.judge_templates import JudgeTemplate, published_template

        super().__post_init__()
        self.candidates = self.input
        self.template = self.template or published_template(self.judge) or "first_error"
        self.judge_template = JudgeTemplate.load(self.template)
        if self.temperature is None:
            self.temperature = self.judge_template.temperature
        if self.max_response_tokens is None:
            self.max_response_tokens = self.judge_template.max_tokens
        if self.temperature == 0 and self.num_votes > 1:
            raise ValueError(
                f"`num_votes` is {self.num_votes}, but `temperature` is 0, so all votes would be the same. Set `num_votes` to 1, or use a "
                "higher temperature."
            )
        Shard.parse(self.shard)
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(
                f"`name` is {shown(self.name)}. It must be a folder name of letters, digits, `-`, `_` and `.` that does not start with a dot."
            )
        most = self.num_votes * self.max_response_tokens
        for option, least, parts in (
            ("max_in_flight", self.num_votes, "`num_votes`"),
            ("max_sequences", self.num_votes, "`num_votes`"),
            ("max_tokens", most, "`num_votes` times `max_response_tokens`"),
        ):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"`{option}` is {value}. It must be at least {parts}, which is {least}.")


@dataclass(frozen=True)
class JudgeReport:
    """
    Result of [`judge`]. `str()` gives the text that the command prints.

    Args:
        output_dir (`Path`):
            Folder of the verdicts.
        summary (`dict[str, Any]`):
            Counts of problems, solutions and votes, as in `summary.json`. With several shards, only of this shard.
        cost (`dict[str, float]`):
            Cost of the responses. See [`GenerativeScorer`].
        unfinished_shards (`list[int]`):
            Shards that must still run before `verdicts.jsonl` is written.
        next_command (`str`):
            Command that uses the verdicts.
        warnings (`list[str]`):
            Warnings about the input and the judge.
    """

    output_dir: Path
    summary: dict[str, Any]
    cost: dict[str, float]
    unfinished_shards: list[int]
    next_command: str
    warnings: list[str]

    def __str__(self) -> str:
        from ..scoring.generative_scorer import format_judge_cost
        from ..scoring.judge_templates import FAULTS

        summary = self.summary
        solutions, votes = summary["solutions"], summary["votes"]
        readable = votes - sum(summary["unreadable"].values())
        lines = [
            f"judged {solutions:,} solutions of {summary['problems']:,} problems: {summary['without_error']:,} without an error, "
            f"{summary['with_error']:,} with a first wrong step, {summary['undecided']:,} undecided (several votes are the most "
            f"frequent), {summary['unreadable_solutions']:,} without a readable vote",
            f"votes: {votes:,}, {readable:,} readable ({readable / max(votes, 1):.1%})",
        ]
        lines += [f"  {count:,} responses {FAULTS[name]}" for name, count in summary["unreadable"].items()]
        for title, counts in (("not judged", summary["not_judged"]), ("input", summary["input"])):
            words = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items())
            lines += [f"{title}: {words}"] * bool(words)
        lines.append(format_judge_cost(self.cost))
        lines += [f"warning: {one_line(warning)}" for warning in self.warnings]
        if self.unfinished_shards:
            shards = ", ".join(map(str, self.unfinished_shards))
            lines.append(f"Next: judge the other shards ({shards}). The last one writes verdicts.jsonl.")
        else:
            lines.append(f"Next: {self.next_command}")
        return "\n".join(lines)


def judge(config: JudgeConfig) -> JudgeReport:
    """
    Let a language model judge complete solutions, and write its votes on the first wrong step. A judge that was stopped is resumed.

    The verdicts on a run are added to it, in `judges/NAME/verdicts.jsonl`. For other inputs, `verdicts.jsonl` is in `config.output_dir`.
    Each line is a solution in TRL's stepwise format, with the labels of the judge.

    Args:
        config ([`JudgeConfig`]):
            Solutions and judge.

    Returns:
        [`JudgeReport`]: Counts of solutions, votes and unreadable responses, and the cost.

    Raises:
        `BlockingIOError`: If another process is writing to the folder.
        `OSError`: If the folder cannot be written (this is checked first), or the engine fails. Responses until then are in the log.
        `ValueError`: If the input is invalid, has no reference answers for a template that shows them, or the folder has verdicts
            with other settings or, for an input that is not a run, on other solutions.

    Example:

    ```python
    from trl_hrm import JudgeConfig, judge

    report = judge(JudgeConfig(input="runs/mcts", judge="Qwen/Qwen2.5-72B-Instruct", engine="vllm", num_votes=3))
    print(report)
    ```
    """
    from ..data.candidate_sources import is_run
    from ..data.verdicts import JUDGES, VERDICTS
    from ..search.run_folder import MANIFEST, launched_shard

    shard = launched_shard(config.shard)
    if is_run(config):
        if config.output_dir is not None:
            raise ValueError(
                f"`output_dir` is {shown(config.output_dir)}, but the verdicts on the run {config.input} are added to it. Remove "
                "`output_dir`, and set `name` for another folder."
            )
        folder, option = Path(config.input, JUDGES, config.name), "name"
    elif config.output_dir is None:
        raise ValueError(
            f"`output_dir` is missing. Set it, because {config.input} is not a folder of `trl-hrm annotate`."
        )
    elif config.name != JudgeConfig.name:
        raise ValueError(
            f"`name` is {config.name}, but only names a folder in a run, and {config.input} is not a folder of `trl-hrm annotate`. Remove "
            "`name`."
        )
    else:
        folder, option = Path(config.output_dir), "output_dir"
        if Path(config.input).resolve() in (
            folder.resolve(),
            *((folder / name).resolve() for name in (VERDICTS, SUMMARY)),
        ):
            raise ValueError(
                f"`output_dir` is {config.output_dir}, where the input {config.input} would be replaced. Choose another `output_dir`."
            )
    names = [_file_of(shard, VERDICTS), _file_of(shard, SUMMARY)] + [MANIFEST] * (shard.count == 1)
    # other shards may write to the folder at the same time
    lock = ".lock" if shard.count == 1 else f".shard-{shard.index:05d}-of-{shard.count:05d}.lock"
    with claimed_folder(folder, option, names, lock) as claimed:
        return judge_shard(config, shard, claimed, option)


def _file_of(shard: Shard, name: str) -> str:
    """Return the name of a file of a shard. A judge with a single shard writes the whole file."""
    from ..search.run_folder import shard_name

    stem, _, suffix = name.partition(".")
    return name if shard.count == 1 else shard_name(stem, shard.index, shard.count, suffix)


def judge_shard(config: JudgeConfig, shard: Shard, folder: Path, option: str) -> JudgeReport:
    """
    Judge the solutions of a shard, or resume it, in a claimed folder. `option` is the option of the folder, for error messages.

    Bad options and inputs raise before anything is written.
    """
    from ..data.candidate_sources import is_run, source_warnings
    from ..data.solutions import solution_warnings
    from ..data.verdicts import VERDICTS
    from ..scoring.generative_scorer import GenerativeScorer
    from ..search.run_folder import check_manifest, mixture_warnings, read_manifest, shard_name

    notes: Counter = Counter()  # of the whole input
    beyond: Counter = Counter()  # solutions of this shard that are not judged
    problems, problem_ids, read = draw_solutions(config, shard, notes, beyond)
    template = config.judge_template
    if template.needs_answer and (unknown := [one for one in problems if one.answer is None]):
        raise ValueError(
            f"{unknown[0].where}: the problem has no reference answer, which the template {template.name} shows to the judge. "
            f"{len(unknown):,} of {len(problems):,} problems have none. Add a column `answer`, or use the template first_error."
        )
    engine = config.load_engine(shard)
    scorer = GenerativeScorer(
        engine,
        template,
        num_samples=config.num_votes,
        seed=config.seed,
        max_tokens=config.max_response_tokens,
        max_in_flight=config.max_in_flight,
        progress=True,
    )
    try:
        apply_budget(problems, config, scorer, beyond)
        manifest = make_manifest(config, scorer, shard.count)
        # A run may have grown. Another file is a mistake: its verdicts would replace those in the folder
        manifest |= {} if is_run(config) else {"input": read}
        for note in check_manifest(folder, manifest, config.accept_changes or (), option=option):
            say(note)
        scorer.open_log(folder / shard_name("judgements", shard.index, shard.count, "jsonl"), check=False)
        num_solutions = sum(len(problem.solutions) for problem in problems)
        say(f"Shard {shard.index}/{shard.count}: {num_solutions:,} solutions of {len(problems):,} problems to judge.")
        summary = write_verdicts(config, scorer, problems, folder / _file_of(shard, VERDICTS))
        cost = scorer.cost
    finally:
        scorer.close()
    summary |= {"not_judged": _positive(beyond), "input": _positive(notes)}
    summary["settings"] |= {"input": read}
    # without what a resumed judge counts differently
    summary["cost"] = {name: cost[name] for name in sorted(cost) if name not in ("seconds", "reused_samples")}
    write_json(folder / _file_of(shard, SUMMARY), summary)
    unfinished = [] if shard.count == 1 else join_shards(folder, shard.count, problem_ids, summary)
    run = shell_word(config.input)
    if is_run(config):
        name = "" if config.name == JudgeConfig.name else f" --judge_name {config.name}"
        command = f"trl-hrm export {run} --consensus{name} --view hrm --output_dir DATASET"
    else:
        command = f"trl-hrm build-stepwise {shell_word(str(folder / VERDICTS))} --view hrm --output_dir DATASET"
    warnings = source_warnings(config)
    warnings += [*solution_warnings(notes, config.step_rule().name), *mixture_warnings(read_manifest(folder))]
    unreadable = sum(summary["unreadable"].values())
    if 2 * unreadable > summary["votes"]:
        warnings.append(
            f"{unreadable:,} of {summary['votes']:,} responses are unreadable. See their texts in {folder / 'judgements-*.jsonl'}. Raise "
            "--max_response_tokens if they are cut off. Otherwise, use another judge, or a --template that fits it."
        )
    return JudgeReport(folder, summary, cost, unfinished, command, warnings)


def _positive(counts: Counter) -> dict[str, int]:
    return {name: count for name, count in sorted(counts.items()) if count}


def draw_solutions(
    config: JudgeConfig, shard: Shard, notes: Counter, beyond: Counter
) -> "tuple[list[JudgedProblem], list[str], dict[str, Any]]":
    """
    Return the problems of the shard with at most `max_solutions` solutions each, the ids of all problems, and what identifies all
    solutions.
    """
    from ..data.judge_sources import read_solutions
    from ..search.run_folder import problem_shard
    from ..search.tree import make_id

    problems, problem_ids, num_solutions, digest = [], [], 0, hashlib.blake2b(digest_size=16)
    for problem in read_solutions(config, notes):
        solutions = [(solution.node_ids, solution.steps) for solution in problem.solutions]
        content = [problem.problem_id, problem.prompt, problem.answer, solutions]
        digest.update(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        problem_ids.append(problem.problem_id)
        num_solutions += len(solutions)
        if problem_shard(problem.problem_id, shard.count) == shard.index:
            # a solution has the same place for every `max_solutions`
            drawn = [make_id("solution", config.seed, *solution.node_ids[-1:]) for solution in problem.solutions]
            best = sorted(range(len(drawn)), key=lambda i: (drawn[i], i))[: config.max_solutions]
            beyond["solutions_beyond_max_solutions"] += len(drawn) - len(best)
            problem.solutions = [problem.solutions[i] for i in best]
            problems.append(problem)
    if not problem_ids:
        counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in notes.items() if count)
        raise ValueError(
            f"{config.input}: no complete solution found ({counts or 'the input is empty'}). Check the input."
        )
    read = {"problems": len(problem_ids), "solutions": num_solutions, "digest": digest.hexdigest()}
    return problems, problem_ids, read


def apply_budget(
    problems: "list[JudgedProblem]", config: JudgeConfig, scorer: "GenerativeScorer", beyond: Counter
) -> None:
    """
    Keep the solutions of each problem that fit into its budget even if all responses have the maximum length. The first solution that
    does not fit ends the problem, so the choice does not depend on the responses.
    """
    is_whole = scorer.template.is_whole
    for problem in problems:
        prompts: set[tuple[str, ...]] = set()
        kept = 0
        for solution in problem.solutions:
            lengths = [len(solution.steps)] if is_whole else range(1, len(solution.steps) + 1)
            prompts |= {tuple(solution.steps[:length]) for length in lengths}
            samples = len(prompts) * config.num_votes
            tokens = samples * scorer.max_sample_tokens
            if samples > (config.max_sequences or samples) or tokens > (config.max_tokens or tokens):
                break
            kept += 1
        beyond["solutions_beyond_budget"] += len(problem.solutions) - kept
        # in the order of the input again
        problem.solutions = sorted(problem.solutions[:kept], key=lambda solution: solution.place)
    if problems and not any(problem.solutions for problem in problems):
        raise ValueError(
            f"`max_sequences` is {config.max_sequences} and `max_tokens` is {config.max_tokens}, but no solution fits: {config.num_votes} "
            f"votes of up to {scorer.max_sample_tokens} tokens per prompt{'' if is_whole else ', and a prompt per step'}. Set higher "
            "limits."
        )


def make_manifest(config: JudgeConfig, scorer: "GenerativeScorer", num_shards: int) -> dict[str, Any]:
    """Return the settings that determine the verdicts, as [`~scripts.annotate.make_manifest`] does for trees."""
    from .. import __version__
    from ..scoring.generative_scorer import VERSIONS

    described = scorer.engine.describe()
    identity = {"judge": config.model_identity()}
    if "identity" in described:  # what a server says about the model that it runs
        identity["judge_server"] = described.pop("identity")
    started_with = {"input": config.input, "engine_args": described.pop("engine_args", None)}
    versions = {name: described.pop(name) for name in VERSIONS if name in described}
    template = scorer.template.settings()
    for default in ("max_tokens", "temperature"):  # the values in use are recorded below and in `engine`
        del template[default]
    return {
        "identity": identity,
        "engine": described,
        "template": template,
        "max_response_tokens": config.max_response_tokens,
        "verdicts": scorer.describe()["verdicts"],
        "started_with": started_with | {name: getattr(config, name) for name in SIZES},
        "seed": config.seed,
        "num_shards": num_shards,
        "versions": dict(sorted((versions | {"trl_hrm": __version__}).items())),
    }


def write_verdicts(
    config: JudgeConfig, scorer: "GenerativeScorer", problems: "list[JudgedProblem]", path: Path
) -> dict[str, Any]:
    """Judge the solutions, write a row for each, and return the counts."""
    from ..data.verdicts import NO_ERROR, Verdict

    judged = scorer.judge_solutions(
        [problem.prompt for problem in problems],
        [[solution.steps for solution in problem.solutions] for problem in problems],
        [problem.answer for problem in problems],
    )
    counts: Counter = Counter()
    faults: Counter = Counter()
    with replacing(path) as file:
        for problem, group in zip(problems, judged, strict=True):
            for solution, judgement in zip(problem.solutions, group, strict=True):
                votes = tuple(vote.vote for vote in judgement.votes)
                verdict = Verdict(problem.problem_id, tuple(solution.node_ids), votes)
                labels = verdict.labels() if scorer.template.is_whole else [step.score for step in judgement.steps]
                row = {"prompt": problem.prompt, "completions": solution.steps, "labels": labels}
                row |= {} if problem.answer is None else {"answer": problem.answer}
                file.write(dump_json(row | solution.columns | verdict.columns(), path) + "\n")
                faults.update(vote.fault for vote in judgement.votes if vote.vote is None)
                counts["votes"] += len(votes)
                counts["solutions"] += 1
                kind = "undecided" if verdict.readable else "unreadable_solutions"
                if verdict.first_error is not None:
                    kind = "without_error" if verdict.first_error == NO_ERROR else "with_error"
                counts[kind] += 1
    names = ("solutions", "without_error", "with_error", "undecided", "unreadable_solutions", "votes")
    return {
        "settings": {name: getattr(config, name) for name in SIZES},
        "problems": sum(bool(problem.solutions) for problem in problems),
        **{name: counts[name] for name in names},
        "unreadable": _positive(faults),
    }


def join_shards(folder: Path, num_shards: int, problem_ids: list[str], summary: dict[str, Any]) -> list[int]:
    """
    Write the verdicts and the summary of all shards, in the order of the problems, if all shards have finished with the same settings.
    Return the indices of the others.
    """
    from ..data.verdicts import VERDICTS
    from ..search.run_folder import problem_shard

    shards = [Shard(i, num_shards) for i in range(num_shards)]
    paths = [folder / _file_of(one, SUMMARY) for one in shards]
    found = [read_json(path) if path.is_file() else {} for path in paths]
    unfinished = [i for i, one in enumerate(found) if one.get("settings") != summary["settings"]]
    if unfinished:
        return unfinished
    readers = [(row for _, row in read_json_lines(folder / _file_of(one, VERDICTS))) for one in shards]
    rows = [next(reader, None) for reader in readers]
    with replacing(folder / VERDICTS) as file:
        for problem_id in problem_ids:
            i = problem_shard(problem_id, num_shards)
            while rows[i] is not None and rows[i]["problem_id"] == problem_id:
                file.write(dump_json(rows[i], folder / VERDICTS) + "\n")
                rows[i] = next(readers[i], None)
    joined = dict(summary)
    for name, value in summary.items():
        if isinstance(value, int):
            joined[name] = sum(one[name] for one in found)
        elif name in ("unreadable", "not_judged", "cost"):
            names = sorted({key for one in found for key in one[name]})
            joined[name] = {key: sum(one[name].get(key, 0) for one in found) for key in names}
    write_json(folder / SUMMARY, joined)
    return []
