"""
Scheduler that runs a search over many problems in parallel and logs every event.

For each problem, it repeats three steps until the search returns no more requests: the search selects nodes, the policy expands them,
and the grader (and, in a step search, the reward model) evaluates the new nodes.
"""

import asyncio
import heapq
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..grading import DEFAULT_EXTRACTORS, opens_thinking
from ..identity import changed_settings
from ..io import shown
from .engines.base import Engine, EngineError, EngineFatal, Sample
from .expansion import Expander
from .log import EventLog
from .open_tree import OpenTree, Request
from .policies import Search, check_in_flight, filter_status
from .prompts import Prompt
from .step_search import Score, StepSearch, check_scores, ending_extractors, is_step, step_tree
from .steps import StepRule, cut_prefix
from .tree import Problem, make_id


class Grade(Protocol):
    """Whether an answer is right (`None` if undecided), and the reason."""

    correct: bool | None
    status: str


class Grader(Protocol):
    """Compares answers. See [`AnswerGrader`]."""

    async def agrade(self, answer: str, reference: str) -> Grade: ...


@dataclass
class SchedulerConfig:
    """
    Configuration of the [`Scheduler`]. These options do not change the trees.

    Args:
        max_in_flight (`int`, *optional*, defaults to `256`):
            Maximum number of sequences that the engine generates in parallel.
        max_open_problems (`int`, *optional*, defaults to `256`):
            Maximum number of problems in memory.
        max_failures (`int`, *optional*, defaults to `20`):
            Number of consecutive failed requests after which the run stops.
        problem_attempts (`int`, *optional*, defaults to `2`):
            Maximum number of attempts at a problem with failed requests. After that, it is only retried by the next run.
    """

    max_in_flight: int = 256
    max_open_problems: int = 256
    max_failures: int = 20
    problem_attempts: int = 2

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")


@dataclass
class Progress:
    """
    Statistics of a run: problems, sequences, tokens, and engine load. Times are in seconds.

    Step searches also count depths (`num_levels`), calls of the reward model (`num_calls`), scored steps (`num_steps`), and the time
    of the reward model (`scorer_seconds`). `policy_seconds` is the time during which the engine was busy.
    """

    num_problems: int
    closed: Counter = field(default_factory=Counter)
    num_requests: int = 0
    num_sequences: int = 0
    num_failures: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    num_levels: int = 0
    num_calls: int = 0
    num_steps: int = 0
    busy: float = 0.0
    policy_seconds: float = 0.0
    scorer_seconds: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    _changed: float = field(default_factory=time.perf_counter)

    def count_in_flight(self, change: int) -> None:
        """Update the number of sequences that the engine is generating."""
        now = time.perf_counter()
        elapsed = now - self._changed
        self.busy += self.in_flight * elapsed
        self.policy_seconds += elapsed if self.in_flight else 0.0
        self._changed = now
        self.in_flight += change
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def count_samples(self, prefix_ids: list[int], samples: list[Sample]) -> None:
        """Count a finished request."""
        self.num_requests += 1
        self.generated_tokens += sum(len(sample.token_ids) for sample in samples)
        self.cached_tokens += sum(sample.num_cached for sample in samples)
        self.prefix_tokens += len(prefix_ids)

    @property
    def seconds(self) -> float:
        """Seconds since the run began."""
        return time.perf_counter() - self.began

    @property
    def cached_share(self) -> float:
        """Fraction of prefix tokens that engines took from their caches."""
        return self.cached_tokens / self.prefix_tokens if self.prefix_tokens else 0.0


@dataclass(eq=False)
class _OpenProblem:
    opened: OpenTree
    attempts: int
    num_pending: int = 1  # requests that are not evaluated yet, and the opening itself
    failed: bool = False


class Scheduler:
    """
    Runs a search over many problems and logs every event.

    Samples depend only on the problem, the position in the tree and the seed, not on other requests or on timing. Everything in the
    log is neither sampled nor scored again. A run that was killed and resumed therefore produces the same trees as an uninterrupted
    run.

    A step search runs depth by depth. The requests of all open problems are sampled together, and one call of the reward model
    scores all new steps while the grader compares the answers. In a step search, a solution also ends when a step states its answer
    after `# Answer`, in `<answer>` tags or in a box. If a problem has a prefix, the search starts at its end. Given steps are neither
    sampled nor scored, but the reward model sees them, and they count towards `max_depth`.

    Args:
        engine ([`Engine`]):
            Engine of the policy.
        search ([`Search`]):
            Search to run: [`FullTree`], [`Rollouts`], [`PUCT`], [`~search.policies.RootFilter`] or, with `score`, a [`StepSearch`].
        grader ([`Grader`]):
            Grader that compares answers, such as an [`AnswerGrader`].
        prompt ([`Prompt`]):
            Prompt of the policy.
        rule ([`StepRule`]):
            Rule that decides where steps end. The rule of a search that samples one step at a time takes precedence.
        log ([`EventLog`]):
            Log of this shard, open for writing.
        seed (`int`, *optional*, defaults to `42`):
            Random seed of the samples.
        extractors (`tuple[str, ...]`, *optional*):
            Names of the answer extractors, in order. See [`extract_answer`].
        config ([`SchedulerConfig`], *optional*):
            Concurrency and retries.
        on_progress (`Callable[[Progress], None]`, *optional*):
            Function that is called after each request and at the end of each depth.
        score (`Callable[[list[StepTree]], list[list[float | None]]]`, *optional*):
            Reward model that guides a [`StepSearch`], such as [`StepScorer.score_trees`]. It returns one score per step of each
            tree. A tree contains the steps of a problem to score, and the steps before them. The score is `None` for a step that
            exceeds the model's context; the path ends there.

    Raises:
        `ValueError`: If `score` is given without a [`StepSearch`], or a [`StepSearch`] without `score`.
    """

    def __init__(
        self,
        engine: Engine,
        search: Search,
        grader: Grader,
        prompt: Prompt,
        rule: StepRule,
        log: EventLog,
        seed: int = 42,
        extractors: tuple[str, ...] = DEFAULT_EXTRACTORS,
        config: SchedulerConfig | None = None,
        on_progress: Callable[[Progress], None] | None = None,
        score: Score | None = None,
    ):
        if (score is not None) != isinstance(search, StepSearch):
            given = "`score` is given" if score is not None else "`score` is missing"
            raise ValueError(
                f"{given}, but the search is {type(search).__name__}. A StepSearch requires `score`; other searches do not use it."
            )
        self.engine = engine
        self.search = search
        self.grader = grader
        self.prompt = prompt
        self.rule = getattr(search, "rule", rule)
        self.log = log
        self.seed = seed
        self.config = config or SchedulerConfig()
        self.on_progress = on_progress or (lambda progress: None)
        self.score = score
        self.ending = ending_extractors(extractors) if score is not None else ()
        self.expander = Expander(engine, prompt, self.rule, seed, extractors, self.ending)

    async def run(self, problems: Iterable[tuple[int, Problem]]) -> Progress:
        """
        Search all problems that are not finished in the log.

        Args:
            problems (`Iterable[tuple[int, Problem]]`):
                Problems, each with its index among the problems of all shards.

        Returns:
            [`Progress`]: Statistics of the run.

        Raises:
            `EngineFatal`: If the engine cannot serve any request, or failed `max_failures` times in a row. All events up to then
                are in the log.
            `ValueError`: If a request of the search has more samples than `max_in_flight`, if a problem differs from the one in
                the log, if the search cannot continue from the prefix of a problem, or if the reward model does not return one
                finite score or `None` per step.
        """
        check_in_flight(self.search, self.config.max_in_flight)
        self._waiting = deque((place, problem, 0) for place, problem in self._unfinished(problems))
        self._ready: list[tuple[tuple[int, int, int], Request, _OpenProblem]] = []  # a heap
        self._depth: list[tuple[_OpenProblem, Request]] = []  # finished requests with steps to score
        self._num_open = self._num_opening = self._num_running = self._num_pushed = self._num_failures = 0
        self.progress = Progress(num_problems=len(self._waiting))
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._select()
        except ExceptionGroup as failures:
            first = failures.exceptions[0]  # this one stopped the run
            raise first from first.__cause__
        finally:
            self.progress.count_in_flight(0)
        return self.progress

    # The loop: select, expand, evaluate

    def _select(self) -> None:
        """Start requests up to `max_in_flight`: first the deepest nodes of the oldest problem, then new problems."""
        while self._ready and self._ready[0][1].n <= self.config.max_in_flight - self.progress.in_flight:
            _, request, problem = heapq.heappop(self._ready)
            self.progress.count_in_flight(request.n)
            self._start(self._expand, problem, request)
        while self._waiting and not self._ready and self._num_open < self.config.max_open_problems:
            free = self.config.max_in_flight - self.progress.in_flight
            if free < (self._num_opening + 1) * self.search.max_samples:
                break
            self._num_open += 1
            self._num_opening += 1
            self._start(self._open, *self._waiting.popleft())
        if self._depth and not self._num_running:
            depth, self._depth = self._depth, []
            self._start(self._evaluate_depth, depth)

    async def _expand(self, problem: _OpenProblem, request: Request) -> None:
        """Sample the children of a node."""
        try:
            event = await self.expander.expand(problem.opened, request, self.progress)
        except EngineError as error:  # the problem is retried later, and the run stops if all requests fail
            self.log.append(
                {
                    "event": "error",
                    "problem_id": problem.opened.tree.problem.problem_id,
                    "above": problem.opened.node_id(request),
                    "round": request.round,
                    "message": str(error),
                }
            )
            self.progress.num_failures += 1
            self._num_failures += 1
            if self._num_failures >= self.config.max_failures:
                raise EngineFatal(
                    f"{self._num_failures} requests failed in a row. Last error: {error} All finished requests are in the log. Run "
                    "the same command to resume when the engine works again."
                ) from error
            problem.failed = True
            self._release(problem)
            return
        finally:
            self.progress.count_in_flight(-request.n)
        self._num_failures = 0
        self._tell(problem.opened, event)
        if self.score is not None:
            self._depth.append((problem, request))
            return
        self._select()  # the engine need not wait for the grader
        await self._evaluate(problem, request)

    async def _evaluate(self, problem: _OpenProblem, request: Request) -> None:
        """Grade the new nodes of a request, and queue the next requests of the search."""
        key = problem.opened.node_id(request), request.round
        await self._grade(problem.opened, key)
        self._push(problem, self.search.tell(problem.opened, request, problem.opened.brought[key]))

    async def _evaluate_depth(self, depth: list[tuple[_OpenProblem, Request]]) -> None:
        """Score and grade the new nodes of all problems at a depth, and queue the next requests of the search."""
        depth.sort(key=lambda answered: answered[0].opened.position)
        trees = [problem.opened for problem in dict.fromkeys(problem for problem, _ in depth)]
        await asyncio.gather(self._score(trees), *(self._grade(tree, key) for tree in trees for key in tree.brought))
        for problem, request in depth:
            brought = problem.opened.brought[problem.opened.node_id(request), request.round]
            self._push(problem, self.search.tell(problem.opened, request, brought))
        self.progress.num_levels += 1

    def _push(self, problem: _OpenProblem, requests: list[Request]) -> None:
        """Queue the next requests of the search, and release the request (or the opening) that led to them."""
        for request in requests:
            problem.num_pending += 1
            if (problem.opened.node_id(request), request.round) not in problem.opened.brought:
                depth = problem.opened.tree.depth(request.node)
                self._num_pushed += 1
                place = (problem.opened.position, -depth, self._num_pushed)
                heapq.heappush(self._ready, (place, request, problem))
            elif self.score is None:  # the log has the samples
                self._start(self._evaluate, problem, request)
            else:
                self._depth.append((problem, request))
        self._release(problem)

    def _start(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Start a task. When it ends, select more work."""

        async def run() -> None:
            await work(*args)
            self._num_running -= 1
            self.on_progress(self.progress)
            self._select()

        self._num_running += 1
        self._tasks.create_task(run())

    # How a problem begins and ends

    def _unfinished(self, problems: Iterable[tuple[int, Problem]]) -> Iterator[tuple[int, Problem]]:
        """Yield the unfinished problems with their indices. All problems are checked before the first search starts."""
        for place, problem in problems:
            known = self.log.problems.get(problem.problem_id)
            changed = changed_settings(asdict(self.log.problem(problem.problem_id)), asdict(problem)) if known else []
            if changed:
                raise ValueError(
                    f"{self.log.path}: problem {shown(problem.problem_id)} changed since it was started: {'; '.join(changed)}. Use the "
                    "same problems to resume, give the changed problem a new id, or use another --output_dir to start a new run."
                )
            if known is not None and known.status not in ("open", "error"):
                continue
            if problem.prefix:
                fault = (
                    f"this search cannot continue from a prefix, but the prefix is {problem.prefix[:80]!r}. Remove the prefix, or "
                    "use a step search (`trl-hrm step-search`)."
                )
                if isinstance(self.search, StepSearch):
                    fault = self.search.prefix_fault(problem.prefix, self.ending)
                if fault is not None:
                    raise ValueError(f"problem {shown(problem.problem_id)}: {fault}")
            yield place, problem

    async def _open(self, position: int, problem: Problem, attempts: int) -> None:
        """Open a problem, from the log if possible, and queue the first requests of the search."""
        if problem.problem_id in self.log.problems:
            opened = self.log.read(problem.problem_id)
        else:
            tokenizer = self.engine.tokenizer
            prompt_ids = self.prompt.encode(tokenizer, problem.prompt)
            event = {
                "event": "problem",
                "problem_id": problem.problem_id,
                "position": position,
                "root_id": make_id("root", self.seed, problem.problem_id),
                "prompt": problem.prompt,
                "answer": problem.answer,
                "prompt_ids": prompt_ids,
            }
            if self.rule.keeps_thinking:
                end_of_prompt = tokenizer.decode(prompt_ids[-16:], skip_special_tokens=True)
                event["thinking"] = "opened" if opens_thinking(end_of_prompt) else "kept"
            if problem.prefix:
                ids, cuts = cut_prefix(self.rule, tokenizer, prompt_ids, problem.prefix)
                event |= {"prefix": problem.prefix, "prefix_ids": ids, "prefix_cuts": cuts}
            self.log.append(event)
            opened = OpenTree.from_event(event)
        status = None
        if not opened.sampled:  # check that the reference answer is readable before any token is spent
            grade = await self.grader.agrade(problem.answer, problem.answer)
            if not grade.correct:
                status = "error" if grade.status in ("timeout", "died") else "ungradable"
        self._num_opening -= 1
        if status is not None:
            self._close(opened, status)
        else:
            self._push(_OpenProblem(opened, attempts + 1), self.search.start(opened))

    def _release(self, problem: _OpenProblem) -> None:
        """Mark a request as done. After the last one, close the problem, or retry it if some requests have failed."""
        problem.num_pending -= 1
        if problem.num_pending:
            return
        opened = problem.opened
        if not problem.failed:
            self._close(opened, filter_status(opened) or ("done" if opened.sampled else "prompt_too_long"))
        elif problem.attempts == self.config.problem_attempts:
            self._close(opened, "error")
        else:
            self._num_open -= 1
            self._waiting.append((opened.position, opened.tree.problem, problem.attempts))

    def _close(self, opened: OpenTree, status: str) -> None:
        """Mark a problem as finished."""
        self._num_open -= 1
        self.log.append({"event": "close", "problem_id": opened.tree.problem.problem_id, "status": status})
        self.progress.closed[status] += 1

    # Events

    def _tell(self, opened: OpenTree, event: dict[str, Any]) -> None:
        """Log an event and apply it to the tree."""
        self.log.append(event)
        opened.apply(event)

    async def _grade(self, opened: OpenTree, key: tuple[str, int]) -> None:
        """Grade the new nodes of a request, unless the log has the grades. `key` is the id of its node and its round."""
        if key in opened.graded:
            return
        answers = [opened.tree.nodes[i].answer for i in opened.brought[key]]
        reference = opened.tree.problem.answer
        asked = (self.grader.agrade(answer, reference) for answer in answers if answer is not None)
        found = iter(await asyncio.gather(*asked))
        grades = [None if answer is None else next(found) for answer in answers]
        event = {
            "event": "grades",
            "problem_id": opened.tree.problem.problem_id,
            "above": key[0],
            "round": key[1],
            "correct": [None if grade is None else grade.correct for grade in grades],
        }
        if any(grade is not None and grade.correct is None for grade in grades):
            event["status"] = [None if grade is None else grade.status for grade in grades]
        self._tell(opened, event)

    async def _score(self, opened: list[OpenTree]) -> None:
        """Score all unscored steps in one call."""
        shown = []
        for tree in opened:
            keys = [key for key, brought in tree.brought.items() if any(i not in tree.scores for i in brought)]
            nodes = [i for key in keys for i in tree.brought[key] if is_step(tree, i)]
            shown.append((tree, keys, nodes, *step_tree(tree, nodes)))
        asked = [steps for *_, steps, _ in shown if steps.completions]
        found: list[list[float | None]] = []
        if asked:
            began = time.perf_counter()
            found = await asyncio.to_thread(self.score, asked)
            self.progress.scorer_seconds += time.perf_counter() - began
            self.progress.num_calls += 1
        if len(found) != len(asked):
            raise ValueError(f"The reward model returned scores for {len(found)} trees, expected {len(asked)}.")
        answers = iter(found)
        for tree, keys, nodes, steps, places in shown:
            scores = next(answers) if steps.completions else []
            check_scores(scores, steps, tree.tree.problem)
            by_node = {i: scores[places[i]] for i in nodes}
            for above, round in keys:
                event = {
                    "event": "scores",
                    "problem_id": tree.tree.problem.problem_id,
                    "above": above,
                    "round": round,
                    "scores": [by_node.get(i) for i in tree.brought[above, round]],
                }
                self._tell(tree, event)
            self.progress.num_steps += len(nodes)
