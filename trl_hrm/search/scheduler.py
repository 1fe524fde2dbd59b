"""
Runs a search over many problems, keeps the engine busy, and logs every event.

The search selects nodes, the policy expands them, and the grader evaluates the new nodes (in a search led by step scores, a reward
model does too). Then the search is told, and selects again, until it wants nothing more.
"""

import asyncio
import heapq
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..grading import DEFAULT_EXTRACTORS
from .engines.base import Engine, EngineError, EngineFatal, Sample
from .expansion import Expander
from .log import EventLog
from .open_tree import OpenTree, Request
from .policies import Search, filter_status
from .prompts import Prompt
from .step_search import Score, StepSearch, check_scores, ending_extractors, is_step, step_tree
from .steps import StepRule, cut_prefix
from .tree import Problem, make_id


class Grade(Protocol):
    """Whether an answer is right, `None` if that could not be decided, and why."""

    correct: bool | None
    status: str


class Grader(Protocol):
    """Compares answers. See [`AnswerGrader`]."""

    async def agrade(self, answer: str, reference: str) -> Grade: ...


@dataclass
class SchedulerConfig:
    """
    How a search runs. None of it changes the trees.

    Args:
        max_in_flight (`int`, *optional*, defaults to `256`):
            Maximum number of sequences that the engine works on at a time.
        max_open_problems (`int`, *optional*, defaults to `256`):
            Maximum number of problems whose trees are in memory.
        max_failures (`int`, *optional*, defaults to `20`):
            Number of requests that fail in a row after which the run stops, because the engine is down.
        problem_attempts (`int`, *optional*, defaults to `2`):
            Maximum number of attempts at a problem with failed requests. After that it is left for the next start.
    """

    max_in_flight: int = 256
    max_open_problems: int = 256
    max_failures: int = 20
    problem_attempts: int = 2

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")


@dataclass
class Progress:
    """
    What a run did so far: problems, sequences, tokens, and how busy the engine was. Times are in seconds.

    Searches led by step scores also count depths (`num_levels`), calls of the reward model (`num_calls`), the steps that it scored
    (`num_steps`), and its time (`scorer_seconds`). `policy_seconds` is the time in which the engine had work.
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
        """Count sequences that go to the engine or come back."""
        now = time.perf_counter()
        elapsed = now - self._changed
        self.busy += self.in_flight * elapsed
        self.policy_seconds += elapsed if self.in_flight else 0.0
        self._changed = now
        self.in_flight += change
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    def count_samples(self, prefix_ids: list[int], samples: list[Sample]) -> None:
        """Count a request that the engine has answered."""
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
        """Share of prefix tokens that engines took from their caches."""
        return self.cached_tokens / self.prefix_tokens if self.prefix_tokens else 0.0


@dataclass(eq=False)
class _OpenProblem:
    opened: OpenTree
    attempts: int
    num_pending: int = 1  # requests without an evaluated answer, and the opening itself
    failed: bool = False


class Scheduler:
    """
    Runs a search over many problems and logs every event.

    What is sampled depends on problem, place in the tree and seed alone, never on what else runs or when an answer comes. What
    the log holds is neither sampled nor scored again. So a run that was killed and resumed gives the same trees as one that was
    not.

    A search led by step scores runs depth by depth: the requests of all open problems are sampled together, and one call of the
    reward model scores all new steps while the grader compares the answers. There a solution also ends where a step states its
    answer after `# Answer`, in `<answer>` tags or in a box. A problem with a prefix is searched from the end of it. The given
    steps are neither sampled nor scored, but the reward model sees them, and they count for `max_depth`.

    Args:
        engine ([`Engine`]):
            The policy.
        search ([`Search`]):
            What to sample: [`FullTree`], [`Rollouts`], [`PUCT`], [`~search.policies.RootFilter`] or, with `score`, a [`StepSearch`].
        grader ([`Grader`]):
            Compares answers, such as an [`AnswerGrader`].
        prompt ([`Prompt`]):
            What the policy is asked.
        rule ([`StepRule`]):
            Tells where steps end. The rule of a search that samples one step at a time takes precedence.
        log ([`EventLog`]):
            Log of this shard, open for writing.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        extractors (`tuple[str, ...]`, *optional*):
            Names of the answer extractors, in order. See [`extract_answer`].
        config ([`SchedulerConfig`], *optional*):
            How the search runs.
        on_progress (`Callable[[Progress], None]`, *optional*):
            Called after each request and at the end of each depth.
        score (`Callable[[list[StepTree]], list[list[float | None]]]`, *optional*):
            The reward model that leads a [`StepSearch`]: one score per step of each tree, as [`StepScorer.score_trees`] gives it. A
            tree has the steps of a problem that are to be scored, and the steps before them. `None` for a step that does not fit
            into the model; the path ends there.

    Raises:
        `ValueError`: If `score` is given without a [`StepSearch`], or the other way round.
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
            raise ValueError(f"{given}, and the search is {type(search).__name__}. Only a StepSearch needs a `score`.")
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
        Search every problem that the log does not show as ended.

        Args:
            problems (`Iterable[tuple[int, Problem]]`):
                Problems, each with its place among those given to all shards.

        Returns:
            [`Progress`]: What was done.

        Raises:
            `EngineFatal`: If the engine cannot serve any request, or failed `max_failures` times in a row. Everything up to
                then is in the log.
            `ValueError`: If a request of the search is larger than `max_in_flight`, if a problem differs from the one in the log,
                if the search cannot continue from the prefix of a problem, or if the reward model returns anything but one number
                per step.
        """
        if self.search.max_samples > self.config.max_in_flight:
            raise ValueError(
                f"max_in_flight is {self.config.max_in_flight}, expected {self.search.max_samples} or more: a request of this "
                f"search may have {self.search.max_samples} samples."
            )
        self._waiting = deque((place, problem, 0) for place, problem in self._unfinished(problems))
        self._ready: list[tuple[tuple[int, int, int], Request, _OpenProblem]] = []  # a heap
        self._depth: list[tuple[_OpenProblem, Request]] = []  # answered requests whose steps are to be scored
        self._num_open = self._num_opening = self._num_running = self._num_pushed = self._num_failures = 0
        self.progress = Progress(num_problems=len(self._waiting))
        try:
            async with asyncio.TaskGroup() as self._tasks:
                self._select()
        except ExceptionGroup as failures:
            first = failures.exceptions[0]  # the one that stopped the run
            raise first from first.__cause__
        finally:
            self.progress.count_in_flight(0)
        return self.progress

    # The loop: select, expand, evaluate

    def _select(self) -> None:
        """Give the engine as much work as it may have: the deepest node of the oldest problem first, then new problems."""
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
        except EngineError as error:  # the problem is tried again later, and the run stops if all requests fail
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
                    f"{self._num_failures} requests failed in a row, the last one with: {error} Everything up to here is in the "
                    "log; start again with the same command when the engine is back."
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
        """Grade the new nodes of a request, and tell the search."""
        key = problem.opened.node_id(request), request.round
        await self._grade(problem.opened, key)
        self._push(problem, self.search.tell(problem.opened, request, problem.opened.brought[key]))

    async def _evaluate_depth(self, depth: list[tuple[_OpenProblem, Request]]) -> None:
        """Score and grade the new nodes of a depth, of all problems together, and tell the search."""
        depth.sort(key=lambda answered: answered[0].opened.position)
        trees = [problem.opened for problem in dict.fromkeys(problem for problem, _ in depth)]
        await asyncio.gather(self._score(trees), *(self._grade(tree, key) for tree in trees for key in tree.brought))
        for problem, request in depth:
            brought = problem.opened.brought[problem.opened.node_id(request), request.round]
            self._push(problem, self.search.tell(problem.opened, request, brought))
        self.progress.num_levels += 1

    def _push(self, problem: _OpenProblem, requests: list[Request]) -> None:
        """Queue what the search wants after a request (or after the opening), which is thereby done."""
        for request in requests:
            problem.num_pending += 1
            if (problem.opened.node_id(request), request.round) not in problem.opened.brought:
                depth = problem.opened.tree.depth(request.node)
                self._num_pushed += 1
                place = (problem.opened.position, -depth, self._num_pushed)
                heapq.heappush(self._ready, (place, request, problem))
            elif self.score is None:  # the log has the answer
                self._start(self._evaluate, problem, request)
            else:
                self._depth.append((problem, request))
        self._release(problem)

    def _start(self, work: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Do some work next to all other. At its end there may be more to select."""

        async def run() -> None:
            await work(*args)
            self._num_running -= 1
            self.on_progress(self.progress)
            self._select()

        self._num_running += 1
        self._tasks.create_task(run())

    # How a problem begins and ends

    def _unfinished(self, problems: Iterable[tuple[int, Problem]]) -> Iterator[tuple[int, Problem]]:
        """The problems that have not ended, each with its place. All are checked before the first is searched."""
        for place, problem in problems:
            known = self.log.problems.get(problem.problem_id)
            if known is not None and (before := self.log.problem(problem.problem_id)) != problem:
                raise ValueError(
                    f"{self.log.path}: problem {problem.problem_id!r} is {before} in the log and {problem} now. Start with the "
                    "same problems to resume, or use another folder."
                )
            if known is not None and known.status not in ("open", "error"):
                continue
            if problem.prefix:
                fault = (
                    f"this search cannot continue from a prefix, and the prefix is {problem.prefix[:80]!r}. Leave the prefix out, or "
                    "use a step search (`trl-hrm step-search`)."
                )
                if isinstance(self.search, StepSearch):
                    fault = self.search.prefix_fault(problem.prefix, self.ending)
                if fault is not None:
                    raise ValueError(f"problem {problem.problem_id!r}: {fault}")
            yield place, problem

    async def _open(self, position: int, problem: Problem, attempts: int) -> None:
        """Open a problem, from the log if it is there, and ask the search for its first requests."""
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
            if problem.prefix:
                ids, cuts = cut_prefix(self.rule, tokenizer, prompt_ids, problem.prefix)
                event |= {"prefix": problem.prefix, "prefix_ids": ids, "prefix_cuts": cuts}
            self.log.append(event)
            opened = OpenTree.from_event(event)
        status = None
        if not opened.sampled:  # before any token is spent on it: can the reference answer be read?
            grade = await self.grader.agrade(problem.answer, problem.answer)
            if not grade.correct:
                status = "error" if grade.status in ("timeout", "died") else "ungradable"
        self._num_opening -= 1
        if status is not None:
            self._close(opened, status)
        else:
            self._push(_OpenProblem(opened, attempts + 1), self.search.start(opened))

    def _release(self, problem: _OpenProblem) -> None:
        """A request is done. After the last one the problem has ended or, if some have failed, is tried again."""
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
        """The search of a problem has ended."""
        self._num_open -= 1
        self.log.append({"event": "close", "problem_id": opened.tree.problem.problem_id, "status": status})
        self.progress.closed[status] += 1

    # Events

    def _tell(self, opened: OpenTree, event: dict[str, Any]) -> None:
        """Log an event, then let the tree grow by it."""
        self.log.append(event)
        opened.apply(event)

    async def _grade(self, opened: OpenTree, key: tuple[str, int]) -> None:
        """Grade what a request brought, by the id of the node that it continued and its round, unless the log has the grades."""
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
        """Score all steps that have no score yet, in one call."""
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
            raise ValueError(f"the reward model returned scores of {len(found)} trees, expected {len(asked)}.")
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
