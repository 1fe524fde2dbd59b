"""Score the steps of solutions with a language model that writes a critique and a verdict for each step."""

import asyncio
import hashlib
import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

from tqdm.auto import tqdm
from typing_extensions import TypedDict

from .. import __version__
from ..grading import opens_thinking
from ..identity import checkpoint_identity, compare_runs, describe_changes
from ..intervals import wilson_interval
from ..io import AppendedLines, read_json_lines, shown
from ..schema import Count, Share, check_json
from ..search.engines.base import Engine, EngineError, EngineFatal, PrefixTooLong, Sample, check_samples, num_token_ids
from ..step_tree import StepTree
from .judge_templates import FAULTS, FirstError, JudgeTemplate, published_template
from .scoring_config import ScoringConfig, checkpoint_name, plain_candidates


MAX_SEED = 2**31  # servers may use 32-bit seeds
MAX_SAMPLES = 2**16
ENGINES = ("transformers", "vllm")
# Counts in the cost of a judge
JUDGE_COUNTS = ("prompts", "samples", "prompt_tokens", "generated_tokens", "unreadable", "too_long", "reused_samples")
VERSIONS = ("torch", "transformers", "vllm")  # in the description of an engine


class SavedSample(TypedDict):
    """
    Response of the judge. `p_yes` is `None` without a readable verdict, for the reason `fault` (see `FAULTS`). `steps` are the verdicts of
    the steps of a solution.
    """

    text: str
    finish: Literal["stop", "eos", "length"]
    stop_reason: str | None
    num_tokens: Count
    p_yes: Share | None
    steps: list[bool]
    fault: NotRequired[Literal[tuple(FAULTS)]]


class SavedJudgement(TypedDict):
    """Line of the log of a judge: the samples of a request, from number `first`. `seconds` is the time since the previous line."""

    key: str
    problem: str
    step: Count
    first: Count
    prompt_tokens: Count
    seconds: float
    samples: list[SavedSample]


@dataclass(frozen=True)
class StepJudgement:
    """
    Judgement of one step.

    Args:
        score (`float`, *optional*):
            Probability that the step is correct, averaged over the samples with a readable verdict. `None` if no sample has one, or
            the prompt is too long.
        low (`float`, *optional*), high (`float`, *optional*):
            Bounds of the 95 % interval of the score over the samples. See [`~intervals.wilson_interval`].
        num_readable (`int`):
            Number of samples with a readable verdict.
    """

    score: float | None
    low: float | None
    high: float | None
    num_readable: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "StepJudgement":
        """Return the judgement of the samples whose verdicts have these probabilities of being yes."""
        if not values:
            return cls(None, None, None, 0)
        total = math.fsum(values)
        return cls(min(total / len(values), 1.0), *wilson_interval(min(total, len(values)), len(values)), len(values))


@dataclass(frozen=True)
class SolutionJudgement:
    """
    Judgement of a solution.

    Args:
        steps (`list[StepJudgement]`):
            Judgement of each of the S steps.
        votes (`list[FirstError]`):
            Vote of each response on the first wrong step. If each step has its own prompt, vote `i` is the first step whose response `i`
            says no, and it is unreadable if response `i` of a step before it is.
    """

    steps: list[StepJudgement]
    votes: list[FirstError]


class _Sample(NamedTuple):
    """Response, without its text. See [`SavedSample`]."""

    p_yes: float | None
    steps: list[bool]
    num_tokens: int
    fault: str | None = None

    def vote(self) -> FirstError:
        """Return the first wrong step, for a response that judges a whole solution."""
        if self.p_yes is None:
            return FirstError(None, self.fault)
        first = self.steps.index(False) if False in self.steps else -1
        is_right = self.p_yes >= 0.5
        return FirstError(first) if is_right == (first == -1) else FirstError(None, "contradiction")


@dataclass
class _Prompt:
    """
    Samples of one prompt. `reply` is the number and the text of the first response with a readable verdict, for the prompt of the next
    step.
    """

    prompt_tokens: int
    seconds: float = 0.0
    samples: list[_Sample] = field(default_factory=list)
    reply: tuple[int, str] | None = None

    def judgement(self) -> StepJudgement:
        """Return the judgement of the step, or of the whole solution."""
        return StepJudgement.of([sample.p_yes for sample in self.samples if sample.p_yes is not None])


class GenerativeScorer:
    """
    Scores every step of candidate solutions with a language model that writes a critique and a verdict.

    The score of a step is the probability of the judge's positive verdict, averaged over `num_samples` responses. If the engine
    returns log-probabilities (transformers, vLLM, and vLLM servers), this is the probability of the positive word against the negative
    word where the verdict stands. Otherwise it is the share of responses with the positive word.

    A response without a readable verdict is counted and never used. If no response of a step has a verdict, or its prompt and the
    response do not fit into the context of the model, its score is `None`.

    With `scope="solution"` (ThinkPRM) and `scope="first_error"`, one prompt asks about all steps. The score of a step is then the share
    of responses that find no error up to this step, and the score of the last step is the probability that the whole solution is correct.

    Example:

    ```python
    >>> scorer = GenerativeScorer.from_pretrained("Qwen/Qwen2.5-7B-Instruct", engine="vllm", num_samples=4, log="judgements.jsonl")
    >>> scorer.score(["1+2+3 = ?"], [[["1+2 = 3.", "3+3 = 7."]]])
    [[[0.97, 0.04]]]
    >>> scorer.cost["samples"]
    8
    ```

    Args:
        engine ([`~search.engines.base.Engine`]):
            Engine that runs the judge. `GenerativeScorer.close()` closes it.
        template (`str` or [`JudgeTemplate`], *optional*, defaults to `"instruct"`):
            Prompt and form of the verdict: `"instruct"` (any instruction model, one prompt per step), `"first_error"` (any instruction
            model, one prompt per solution), `"genprm"`, `"thinkprm"`, or the path of a file. See [`JudgeTemplate.load`].
        num_samples (`int`, *optional*, defaults to `4`):
            Number of responses per prompt.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the responses.
        max_tokens (`int`, *optional*):
            Maximum number of tokens of a response. Defaults to the `max_tokens` of the template.
        log (`str` or `Path`, *optional*):
            JSON Lines file with all responses. Responses that are already in it are not sampled again.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to clear a log that was written with other settings. By default, this is an error.
        identity (`dict[str, Any]`, *optional*):
            Content of the judge's checkpoint, to refuse a log of another checkpoint. See
            [`~identity.checkpoint_identity`].
        max_in_flight (`int`, *optional*, defaults to `256`):
            Maximum number of responses that the engine generates in parallel.
        progress (`bool`, *optional*, defaults to `False`):
            Whether every call shows a progress bar.

    Attributes:
        cost (`dict[str, float]`):
            Cost of all scores so far: `prompts` (each counts once, also if several candidates share it), `samples`, `prompt_tokens`,
            `generated_tokens`, `unreadable` (samples without a readable verdict), `too_long` (prompts that do not fit into the context),
            `reused_samples` (read from the log) and `seconds`. Samples from the log are included in all others.
        max_sample_tokens (`int`):
            Maximum number of tokens that the judge generates per response, with its verdict.

    Raises:
        `ValueError`: If an option is out of range, the template is invalid, or `log` was written with other settings.
        `BlockingIOError`: If another process is writing to `log`.
    """

    step_format = None
    max_positions = None  # the length of a prompt depends on the template and on earlier responses

    def __init__(
        self,
        engine: Engine,
        template: str | JudgeTemplate = "instruct",
        num_samples: int = 4,
        seed: int = 42,
        max_tokens: int | None = None,
        log: str | Path | None = None,
        overwrite: bool = False,
        identity: dict[str, Any] | None = None,
        max_in_flight: int = 256,
        progress: bool = False,
    ):
        self.template = template if isinstance(template, JudgeTemplate) else JudgeTemplate.load(template)
        self.max_tokens = self.template.max_tokens if max_tokens is None else max_tokens
        for name, value in (
            ("num_samples", num_samples),
            ("max_tokens", self.max_tokens),
            ("max_in_flight", max_in_flight),
        ):
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")
        if num_samples > MAX_SAMPLES:
            raise ValueError(f"`num_samples` is {num_samples}. It must be at most {MAX_SAMPLES}.")
        sampling = getattr(engine, "sampling", None)
        if num_samples > 1 and sampling is not None and sampling.is_greedy:
            raise ValueError(
                f"`num_samples` is {num_samples}, but the temperature is 0, so all samples would be the same. Set `num_samples` to 1, or "
                "use a higher temperature."
            )
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.num_samples = num_samples
        self.seed = seed
        self.progress = progress
        self.has_logprobs = getattr(engine, "has_logprobs", False)
        self.max_in_flight = max_in_flight
        shortest = len(self.template.encode(self.tokenizer, "", [""], answer=""))  # also checks the chat template
        num_closing = self._word_tokens = 0
        if self.template.scope != "first_error":
            closing = self.template.closing or self.template.marker + " "
            self.template.verdict_tokens(self.tokenizer, closing)  # checks the words
            words = (closing, self.template.yes, self.template.no)
            num_closing, *num_words = (len(self.tokenizer.encode(word, add_special_tokens=False)) for word in words)
            self._word_tokens = max(num_words) + 1
        is_sampled = self.template.closing is not None and not self.has_logprobs
        self.max_sample_tokens = self.max_tokens + (self._word_tokens if is_sampled else 0)
        max_length = getattr(engine, "max_length", None)
        # maximum number of tokens of a prompt
        self._room = math.inf if max_length is None else max_length - self.max_tokens - num_closing - self._word_tokens
        if shortest > self._room:
            raise ValueError(
                f"The prompt of the judge without a problem has {shortest} tokens and a response up to {self.max_tokens}, but the model has "
                f"a context of {max_length} tokens. Allow shorter responses (`max_tokens`; `judge_max_tokens` or `max_response_tokens` of a "
                "command), or use a model with a longer context."
            )
        self._num_ids = num_token_ids(self.tokenizer)
        # by the key of the log and the number of steps, see `_entry`
        self._prompts: dict[tuple[str, int], _Prompt] = {}
        self._used: set[tuple[str, int]] = set()
        self._too_long: set[tuple[str, int]] = set()
        self._reused = 0
        self._tasks: dict[tuple[str, int], asyncio.Task] = {}
        self._log: AppendedLines | None = None
        self._opened: list[AppendedLines] = []  # the log, for the finalizer
        if log is not None:
            self.open_log(log, overwrite, identity)
        # one event loop for all calls, as engines keep connections and processes that belong to a loop
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        thread.start()
        self._call = threading.Lock()  # one call at a time, because the end of a call cancels what still runs
        self._slots = asyncio.Semaphore(max(1, max_in_flight // num_samples))
        self.close: Callable[[], None] = weakref.finalize(self, _close, self._loop, thread, engine, self._opened)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        engine: str = "transformers",
        template: str | JudgeTemplate | None = None,
        temperature: float | None = None,
        revision: str | None = None,
        served_model_name: str | None = None,
        engine_args: dict[str, Any] | None = None,
        **options: Any,
    ) -> "GenerativeScorer":
        """
        Load a judge, or connect to a server that runs it.

        Args:
            path_or_repo (`str` or `Path`):
                Path or Hub id of the judge. For a server, its tokenizer is loaded from here.
            engine (`str`, *optional*, defaults to `"transformers"`):
                `"transformers"`, `"vllm"` (in this process), or the URL of a server that runs `vllm serve MODEL`.
            template (`str` or [`JudgeTemplate`], *optional*):
                See [`GenerativeScorer`]. Defaults to the template of a published model (`GenPRM/GenPRM-*`, `launch/ThinkPRM-*`),
                otherwise to `"instruct"`.
            temperature (`float`, *optional*):
                Sampling temperature. Defaults to the `temperature` of the template.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            served_model_name (`str`, *optional*):
                Name of the judge on the server. Defaults to `path_or_repo`.
            engine_args (`dict[str, Any]`, *optional*):
                Other arguments of the engine, such as `{"dtype": "bfloat16"}`.
            **options:
                Other arguments of [`GenerativeScorer`].

        Raises:
            `ValueError`: If the engine is unknown, the checkpoint is damaged, or an option is invalid.
            `OSError`: If the server cannot be used.
        """
        path_or_repo = checkpoint_name(path_or_repo, f"{cls.__name__}(engine, ...)")
        template = template or published_template(path_or_repo) or "instruct"
        if not isinstance(template, JudgeTemplate):
            template = JudgeTemplate.load(template)
        given: dict[str, Any] = {"temperature": template.temperature if temperature is None else temperature}
        given |= {"revision": revision, **(engine_args or {})}
        if engine.startswith(("http://", "https://")):
            from ..loading import load_tokenizer
            from ..search.engines.openai import OpenAIEngine

            base_url = engine.rstrip("/").removesuffix("/v1") + "/v1"
            tokenizer = load_tokenizer(path_or_repo, revision)
            made: Any = OpenAIEngine([base_url], served_model_name or path_or_repo, tokenizer, **given)
            made.connect()
        elif engine not in ENGINES:
            raise ValueError(f"`engine` is {shown(engine)}. It must be transformers, vllm, or the URL of a server.")
        elif served_model_name is not None:
            raise ValueError(f"`served_model_name` only applies to servers, but `engine` is {engine}. Remove it.")
        elif engine == "vllm":
            from ..search.engines.vllm import VLLMEngine

            made = VLLMEngine.from_pretrained(path_or_repo, **given)
        else:
            from ..search.engines.transformers import TransformersEngine

            made = TransformersEngine.from_pretrained(path_or_repo, **given)
        if options.get("log") is not None:
            options.setdefault("identity", checkpoint_identity(path_or_repo, revision))
        return cls(made, template, **options)

    @property
    def cost(self) -> dict[str, float]:
        used = [self._prompts[key] for key in self._used]
        samples = [sample for prompt in used for sample in prompt.samples[: self.num_samples]]
        return {
            "prompts": len(used),
            "samples": len(samples),
            "prompt_tokens": sum(prompt.prompt_tokens for prompt in used),
            "generated_tokens": sum(sample.num_tokens for sample in samples),
            "unreadable": sum(sample.p_yes is None for sample in samples),
            "too_long": len(self._too_long),
            "reused_samples": self._reused,
            "seconds": math.fsum(prompt.seconds for prompt in used),
        }

    @property
    def _verdicts(self) -> str:
        """What the verdicts of the responses are."""
        if self.template.scope == "first_error":
            return "votes"
        return "probabilities" if self.has_logprobs else "shares"

    def describe(self) -> dict[str, Any]:
        """Return the settings of the judge, and the description of its engine, with its `identity` for a server."""
        return {
            "template": self.template.name,
            "num_samples": self.num_samples,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "verdicts": self._verdicts,
            **self.engine.describe(),
        }

    def score(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[Sequence[str]]],
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[list[float | None]]]:
        """
        Score the steps of candidate solutions.

        Args:
            prompts (`Sequence[str]`):
                B problems.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                N candidates for each prompt, each a list of S step texts.
            spans (`Sequence[int]`, *optional*, defaults to `(1,)`):
                Must be `(1,)`, because a judge sees each step with the steps before it.
            combine (`str`, *optional*, defaults to `"max"`):
                Has no effect without spans.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[list[list[float | None]]]`: Scores in `[0, 1]`, prompts × candidates × steps. `None` for a step without a readable
            verdict.

        Raises:
            `ValueError`: If `spans` has other numbers than 1, or the lists have different lengths.
            `OSError`: If the engine fails. Responses until then are in the log.
        """
        _check_spans(spans, combine)
        judged = self.judge(prompts, candidates, progress)
        return [[[step.score for step in steps] for steps in group] for group in judged]

    def judge(
        self, prompts: Sequence[str], candidates: Sequence[Sequence[Sequence[str]]], progress: bool = False
    ) -> list[list[list[StepJudgement]]]:
        """Judge the steps of candidate solutions. Return their scores with intervals. See [`GenerativeScorer.score`]."""
        judged = self.judge_solutions(prompts, candidates, progress=progress)
        return [[solution.steps for solution in group] for group in judged]

    def judge_solutions(
        self,
        prompts: Sequence[str],
        candidates: Sequence[Sequence[Sequence[str]]],
        answers: Sequence[str | None] | None = None,
        progress: bool = False,
    ) -> list[list[SolutionJudgement]]:
        """
        Judge candidate solutions. Return the scores of their steps, and the first wrong step that each response finds.

        Args:
            prompts (`Sequence[str]`):
                B problems.
            candidates (`Sequence[Sequence[Sequence[str]]]`):
                N candidates for each prompt, each a list of S step texts.
            answers (`Sequence[str | None]`, *optional*):
                B reference answers, for a template that shows them.
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Raises:
            `ValueError`: If the lists have different lengths, or a reference answer that the template shows is missing.
            `OSError`: If the engine fails. Responses until then are in the log.
        """
        prompts, candidates = plain_candidates(prompts, candidates)
        answers = [None] * len(prompts) if answers is None else answers
        if len(answers) != len(prompts):
            raise ValueError(
                f"Got {len(answers)} answers for {len(prompts)} prompts. Pass one per prompt, `None` if it is unknown, or no `answers`."
            )
        paths = [
            (prompt, answer, steps)
            for prompt, answer, group in zip(prompts, answers, candidates, strict=True)
            for steps in group
            if steps
        ]
        judged = iter(self._run(self._judge_all(paths, progress or self.progress)) if paths else ())
        none = SolutionJudgement([], [])
        return [[next(judged) if steps else none for steps in group] for group in candidates]

    def score_trees(
        self,
        trees: Sequence[StepTree],
        spans: Sequence[int] = (1,),
        combine: Literal["max", "mean"] = "max",
        progress: bool = False,
    ) -> list[list[float | None]]:
        """
        Score every step of step trees. Return one list per tree, in order of its steps. See [`GenerativeScorer.score`].

        Raises:
            `ValueError`: If a tree has branches and the template asks about whole solutions.
        """
        _check_spans(spans, combine)
        leaves: list[list[list[int]]] = []
        for i, tree in enumerate(trees):
            tree.validate(f"prompt {i}", blank_steps=True)
            inner = set(tree.parents)
            leaves.append([tree.path(step) for step in range(len(tree.completions)) if step not in inner])
            if self.template.is_whole and len(leaves[-1]) > 1:
                raise ValueError(
                    f"prompt {i}: the tree has {len(leaves[-1])} solutions with common steps, but the template {self.template.name} judges "
                    "the steps of a solution together. Pass each solution separately, or use another template."
                )
        judged = self.judge(
            [tree.prompt for tree in trees],
            [
                [[tree.completions[step] for step in path] for path in paths]
                for tree, paths in zip(trees, leaves, strict=True)
            ],
            progress,
        )
        scores = []
        for tree, paths, group in zip(trees, leaves, judged, strict=True):
            # a step before a branch has the same prompt, and so the same judgement, on all paths
            found = {
                step: one.score
                for path, steps in zip(paths, group, strict=True)
                for step, one in zip(path, steps, strict=True)
            }
            scores.append([found[step] for step in range(len(tree.completions))])
        return scores

    def path_lengths(self, problem: str, steps: Sequence[str], parents: Sequence[int]) -> dict[int, int]:
        """Return the number of tokens from the start of the problem to the end of each step, and of the problem at `-1`."""
        ends = {-1: len(self.tokenizer.encode(problem, add_special_tokens=False))}
        for i, parent in enumerate(parents):
            ends[i] = ends[parent] + len(self.tokenizer.encode(steps[i], add_special_tokens=False))
        return ends

    # The event loop

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the event loop of the scorer. If this thread is interrupted, it is cancelled."""
        if not self.close.alive:
            coroutine.close()
            raise ValueError("The scorer is closed. Create a new one.")
        with self._call:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
            try:
                return future.result()
            except (EngineError, EngineFatal) as error:
                kept = f" Finished responses are in {self._log.path}. Run again to resume." if self._log else ""
                raise OSError(f"The engine of the judge failed. {error}{kept}") from error
            except BaseException:
                future.cancel()
                raise

    async def _judge_all(
        self, paths: list[tuple[str, str | None, list[str]]], progress: bool
    ) -> list[SolutionJudgement]:
        self._since = time.perf_counter()
        places = asyncio.Semaphore(self.max_in_flight)  # the prompts of all solutions may not fit into memory

        async def judge(problem: str, answer: str | None, steps: list[str]) -> SolutionJudgement:
            async with places:
                return await self._judge_path(problem, answer, steps, bar)

        with tqdm(
            total=sum(len(steps) for _, _, steps in paths),
            desc="Judging",
            unit="step",
            disable=not progress,
            leave=False,
        ) as bar:
            tasks = [asyncio.ensure_future(judge(*path)) for path in paths]
            try:
                return await asyncio.gather(*tasks)
            finally:
                running = [*tasks, *self._tasks.values()]
                for task in running:  # if one failed, the others are not needed
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
                self._tasks.clear()

    async def _judge_path(self, problem: str, answer: str | None, steps: list[str], bar: tqdm) -> SolutionJudgement:
        """Return the judgements of the steps of a solution, and the votes on its first wrong step."""
        template = self.template

        async def ask(number: int, replies: list[str]) -> _Prompt:
            ids = template.encode(self.tokenizer, problem, steps[:number], replies, answer)
            prompt = await self._ask(ids, problem, number)
            bar.update(len(steps) if template.is_whole else 1)
            return prompt

        if template.is_whole:
            prompt = await ask(len(steps), [])
            read = [sample.steps for sample in prompt.samples if sample.p_yes is not None]
            judged = [StepJudgement.of([float(all(one[: i + 1])) for one in read]) for i in range(len(steps) - 1)]
            return SolutionJudgement([*judged, prompt.judgement()], [sample.vote() for sample in prompt.samples])
        if template.scope == "step":
            prompts = await asyncio.gather(*(ask(number, []) for number in range(1, len(steps) + 1)))
        else:
            prompts, replies = [], []
            for number in range(1, len(steps) + 1):
                prompts.append(await ask(number, replies))
                if prompts[-1].reply is None:  # the later prompts would need it
                    bar.update(len(steps) - number)
                    break
                replies.append(prompts[-1].reply[1])
        judged = [prompt.judgement() for prompt in prompts]
        judged += [StepJudgement.of([])] * (len(steps) - len(judged))
        votes = []
        for samples in zip(*(prompt.samples for prompt in prompts), strict=True):
            ends = [i for i, sample in enumerate(samples) if sample.p_yes is None or sample.p_yes < 0.5]
            first = ends[0] if ends else -1
            is_readable = not ends or samples[first].p_yes is not None
            votes.append(FirstError(first) if is_readable else FirstError(None, samples[first].fault))
        return SolutionJudgement(judged, votes)

    async def _ask(self, prompt_ids: list[int], problem: str, number: int) -> _Prompt:
        """Return the samples of a prompt, which are unreadable if it is too long. Equal prompts are asked once."""
        key = hashlib.blake2b(repr((self.seed, prompt_ids)).encode(), digest_size=16).hexdigest()
        entry = self._entry(key, number)
        if entry not in self._tasks:
            self._tasks[entry] = asyncio.ensure_future(self._sample(key, prompt_ids, problem, number))
        return await self._tasks[entry]

    def _entry(self, key: str, number: int) -> tuple[str, int]:
        """
        Return what identifies the samples of a prompt. A response about a whole solution is read as verdicts on `number` steps, and two
        solutions with another number of steps can have the same prompt.
        """
        return key, number if self.template.is_whole else 0

    async def _sample(self, key: str, prompt_ids: list[int], problem: str, number: int) -> _Prompt:
        entry = self._entry(key, number)
        unsampled = _Prompt(len(prompt_ids), samples=[_Sample(None, [], 0, "too_long")] * self.num_samples)
        if len(prompt_ids) > self._room:
            self._too_long.add(entry)
            return unsampled
        first = len(self._prompts[entry].samples) if entry in self._prompts else 0
        if entry not in self._used:
            self._reused += min(first, self.num_samples)
        if first < self.num_samples:
            seed = int(key[:12], 16) % (MAX_SEED - MAX_SAMPLES)  # the same for every number of samples
            async with self._slots:
                try:
                    samples = await self.engine.sample(
                        prompt_ids, self.num_samples - first, self.template.stop, self.max_tokens, seed + first, key
                    )
                except PrefixTooLong:  # of an engine that does not tell its context length
                    self._too_long.add(entry)
                    return unsampled
                check_samples(
                    samples,
                    self.tokenizer,
                    prompt_ids,
                    self.num_samples - first,
                    self.template.stop,
                    self.max_tokens,
                    self._num_ids,
                )
                read = [
                    self._read(prompt_ids, sample, number, seed + first + i, key) for i, sample in enumerate(samples)
                ]
                saved = list(await asyncio.gather(*read))
            now = time.perf_counter()
            line: SavedJudgement = {
                "key": key,
                "problem": problem,
                "step": number,
                "first": first,
                "prompt_tokens": len(prompt_ids),
                "seconds": now - self._since,
                "samples": saved,
            }
            self._since = now
            if self._log is not None:
                self._log.append(line)
            self._enter(line)
        self._used.add(entry)
        prompt = self._prompts[entry]
        if len(prompt.samples) > self.num_samples:  # the log is of a run with more samples
            reply = None if prompt.reply is None or prompt.reply[0] >= self.num_samples else prompt.reply
            return replace(prompt, samples=prompt.samples[: self.num_samples], reply=reply)
        return prompt

    async def _read(self, prompt_ids: list[int], sample: Sample, number: int, seed: int, key: str) -> SavedSample:
        """Read the verdict of a sample. Its probability, or a word that is missing after the closing text, comes from the engine."""
        template, num_tokens, p_yes, steps, fault = self.template, len(sample.token_ids), None, [], None
        if template.scope == "first_error":
            is_opened = opens_thinking(self.tokenizer.decode(prompt_ids[-16:]))
            text = "<think>" + sample.text if is_opened else sample.text
            vote, fault = template.read_first_error(text, sample.finish, number)
            if vote is not None:
                p_yes, steps = float(vote == -1), [True] * number if vote == -1 else [True] * vote + [False]
        else:
            reading = template.read(sample.text, sample.finish, sample.stop_reason, number)
            steps = [] if reading is None else list(reading.steps)
            try:
                if reading is None:
                    pass
                elif self.has_logprobs:
                    before, yes, no = template.verdict_tokens(self.tokenizer, reading.before)
                    yes_logprob, no_logprob = await self.engine.next_logprobs([*prompt_ids, *before], [yes, no], key)
                    p_yes = 1 / (1 + math.exp(min(no_logprob - yes_logprob, 700.0)))
                elif reading.verdict is not None:
                    p_yes = float(reading.verdict)
                else:
                    before = template.encode_response(self.tokenizer, reading.before)
                    [word] = await self.engine.sample([*prompt_ids, *before], 1, [], self._word_tokens, seed, key)
                    num_tokens += len(word.token_ids)
                    found = re.match(rf"\s*({re.escape(template.yes)}|{re.escape(template.no)})(?!\w)", word.text)
                    p_yes = None if found is None else float(found[1] == template.yes)
                if p_yes is None:
                    fault = "cut_off" if sample.finish == "length" else "no_verdict"
            except PrefixTooLong:  # the response fills the context
                fault = "no_room"
        saved: SavedSample = {
            "text": sample.text,
            "finish": sample.finish,
            "stop_reason": sample.stop_reason,
            "num_tokens": num_tokens,
            "p_yes": p_yes,
            "steps": steps,
        }
        return saved if fault is None else saved | {"fault": fault}

    # The log

    def _enter(self, line: SavedJudgement) -> None:
        """Add the samples of a line. Only the verdicts are kept in memory, and a response that later prompts need."""
        prompt = self._prompts.setdefault(self._entry(line["key"], line["step"]), _Prompt(line["prompt_tokens"]))
        if line["first"] != len(prompt.samples):
            raise ValueError(f"it has the samples from {line['first']}, expected {len(prompt.samples)}.")
        prompt.seconds += line["seconds"]
        for sample in line["samples"]:
            if len(sample["steps"]) > line["step"]:
                raise ValueError(f"it has verdicts on {len(sample['steps'])} steps of a prompt with {line['step']}.")
            fault = sample.get("fault", "no_verdict") if sample["p_yes"] is None else None
            prompt.samples.append(_Sample(sample["p_yes"], sample["steps"], sample["num_tokens"], fault))
            if self.template.scope == "turns" and prompt.reply is None and sample["p_yes"] is not None:
                reading = self.template.read(sample["text"], sample["finish"], sample["stop_reason"], line["step"])
                if reading is None:
                    raise ValueError("it has a verdict that cannot be read in its text.")
                text = self.template.reply(reading, sample["p_yes"] >= 0.5, line["step"])
                prompt.reply = len(prompt.samples) - 1, text

    def open_log(
        self,
        path: str | Path,
        overwrite: bool = False,
        identity: dict[str, Any] | None = None,
        check: bool = True,
    ) -> None:
        """
        Read the responses in a log, and append new ones to it.

        Args:
            path (`str` or `Path`), overwrite (`bool`, *optional*, defaults to `False`), identity (`dict[str, Any]`, *optional*):
                See `log`, `overwrite` and `identity` of [`GenerativeScorer`].
            check (`bool`, *optional*, defaults to `True`):
                Whether to refuse a log that was written with other settings. `trl-hrm judge` compares them in its manifest, where a
                change can be accepted.

        Raises:
            `ValueError`: If the log was written with other settings, or is damaged.
            `BlockingIOError`: If another process is writing to the log.
        """
        path = Path(path)
        engine = {
            name: value for name, value in self.engine.describe().items() if name not in ("engine_args", *VERSIONS)
        }
        header = {
            "kind": "judgements",
            "engine": engine,
            "template": self.template.settings(),
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "verdicts": self._verdicts,
            **({"identity": {"policy": identity}} if identity else {}),
            "versions": {"trl_hrm": __version__},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:  # before it is opened, which removes an incomplete last line
            with open(path, "rb") as file:
                line, start = file.readline(1000), b'{"kind": "judgements", '
                if not start.startswith(line[: len(start)]):  # a kill may have cut the first line
                    raise FileExistsError(f"{path} exists and is not a log of a judge. Choose another file.")
        lines = AppendedLines(path)
        try:
            remedy = "Remove this line. Its responses will be sampled again."
            found = None
            for where, line in read_json_lines(path, remedy) if lines.size else ():
                if found is None:
                    found = line
                    changes = compare_runs(found, header).changes if check else {}
                    if changes and overwrite:
                        lines.clear()
                        break
                    if changes:
                        raise ValueError(
                            f"{path} was written with other settings: {describe_changes(changes)} Choose another file or folder, or delete "
                            "this file to judge everything again."
                        )
                    continue
                check_json(line, SavedJudgement, where, remedy)
                try:
                    self._enter(line)
                except ValueError as error:
                    raise ValueError(f"{where}: {error} {remedy}") from None
            if not lines.size:
                lines.append(header)
        except BaseException:
            lines.close()
            raise
        self._log = lines
        self._opened.append(lines)


def format_judge_cost(cost: Mapping[str, float]) -> str:
    """Return a line with the `cost` of a [`GenerativeScorer`]."""
    samples, unreadable = cost["samples"], cost["unreadable"]
    return (
        f"judge: {cost['prompts']:,} prompts, {samples:,} responses ({cost['reused_samples']:,} from the log), "
        f"{cost['generated_tokens']:,} tokens, {cost['seconds']:,.0f} s; {unreadable:,} responses "
        f"({100 * unreadable / max(samples, 1):.1f} %) without a readable verdict, {cost['too_long']:,} prompts too long"
    )


def _close(
    loop: asyncio.AbstractEventLoop, thread: threading.Thread, engine: Engine, logs: list[AppendedLines]
) -> None:
    """Close the engine and the log, and stop the event loop. This also runs at the exit of the process."""
    try:
        asyncio.run_coroutine_threadsafe(engine.close(), loop).result(timeout=60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=60)
        for log in logs:
            log.close()


def _check_spans(spans: Sequence[int], combine: Literal["max", "mean"]) -> None:
    spans = ScoringConfig(spans, combine).spans
    if set(spans) != {1}:
        raise ValueError(
            f"`spans` is {spans}, but a judge sees each step with the steps before it, so steps are not merged. Set `spans` to 1."
        )
