"""One asyncio loop that keeps an engine busy: many problems open, no barrier between depths, a bound on what is in flight."""

import asyncio
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..grading import DEFAULT_EXTRACTORS
from .asking import Asking
from .engine import Engine
from .log import EventLog
from .open_tree import OpenTree, Request
from .progress import Progress
from .prompts import Prompt
from .root_filter import filter_status
from .steps import StepRule
from .tree import Problem


@dataclass
class SchedulerConfig:
    """
    How a search runs. None of it changes the trees.

    Args:
        max_in_flight (`int`, *optional*, defaults to `256`):
            Most sequences that the engine works on at a time.
        max_open_problems (`int`, *optional*, defaults to `256`):
            Most problems whose trees are in memory.
        max_failures (`int`, *optional*, defaults to `20`):
            Failed requests in a row after which the run stops: the engine is down.
        problem_attempts (`int`, *optional*, defaults to `2`):
            How often a problem with failed requests is tried before it is left for the next start.
    """

    max_in_flight: int = 256
    max_open_problems: int = 256
    max_failures: int = 20
    problem_attempts: int = 2

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more.")


class Scheduler:
    """
    Runs a search over many problems and logs every event.

    What is sampled depends on problem, place in the tree and seed alone, never on what else runs or when an answer comes: a
    run that was killed and resumed ends in the rows of one that was not.

    Args:
        engine ([`Engine`]):
            The policy.
        search ([`FullTree`], [`Rollouts`], [`PUCT`] or [`RootFilter`]):
            What to sample. Anything with `first`, `max_samples`, `start` and `tell` as these have them.
        grader ([`AnswerGrader`]):
            Compares answers. Anything with an `agrade` that gives `correct` and `status`.
        prompt ([`Prompt`]):
            What the policy is asked.
        rule ([`StepRule`]):
            Tells steps apart. A search that samples one step at a time has a rule of its own, which counts instead.
        log ([`EventLog`]):
            Log of this shard, open for writing. What stands in it is not asked again.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the samples.
        extractors (`tuple[str, ...]`, *optional*):
            Names of the answer extractors, in order. See [`extract_answer`].
        config ([`SchedulerConfig`], *optional*):
            How the search runs.
        on_progress (`Callable[[Progress], None]`, *optional*):
            Called after each request.

    Raises:
        `ValueError`: If a request of the search is larger than `max_in_flight`.
    """

    def __init__(
        self,
        engine: Engine,
        search: Any,
        grader: Any,
        prompt: Prompt,
        rule: StepRule,
        log: EventLog,
        seed: int = 42,
        extractors: tuple[str, ...] = DEFAULT_EXTRACTORS,
        config: SchedulerConfig | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.search = search
        self.config = config or SchedulerConfig()
        rule = getattr(getattr(search, "search", search), "rule", rule)  # of the search behind a root filter
        self.asking = Asking(engine, grader, prompt, rule, log, seed, extractors, self.config.max_failures)
        self.on_progress = on_progress or (lambda progress: None)

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
        """
        waiting = self.asking.waiting(problems, self.search.max_samples, self.config.max_in_flight)
        self.progress = Progress(num_problems=len(waiting))
        self._waiting = iter(waiting)
        self._again: list[tuple[int, Problem, int]] = []
        self._ready: list[tuple[tuple[int, int, int], Request, _OpenProblem]] = []
        self._open: set[str] = set()
        self._opening = 0
        self._order = 0
        self._done: asyncio.Future = asyncio.get_running_loop().create_future()
        self._tasks: set[asyncio.Task] = set()
        try:
            self._fill()
            await self._done
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.progress.count_in_flight(0)
        return self.progress

    def _fill(self) -> None:
        """Give the engine as much as it may have: the deepest node of the oldest problem first, then new problems."""
        while self._ready and self._ready[0][1].n <= self._free():
            _, request, problem = heapq.heappop(self._ready)
            self.progress.count_in_flight(request.n)
            self._start(self._sample(problem, request))
        while not self._ready and self._may_open():
            problem = self._next_problem()
            if problem is None:
                break
            self._opening += 1
            self._start(self._begin(*problem))
        if not self._tasks and not self._done.done():
            self._done.set_result(None)

    def _free(self) -> int:
        return self.config.max_in_flight - self.progress.in_flight

    def _may_open(self) -> bool:
        size = self.search.first.n
        room = self._free() - self._opening * size >= size
        return room and len(self._open) + self._opening < self.config.max_open_problems

    def _next_problem(self) -> tuple[int, Problem, int] | None:
        """Place, problem, and how often it was tried: new problems first, then those whose requests failed."""
        found = next(self._waiting, None)
        if found is not None:
            return *found, 0
        return self._again.pop(0) if self._again else None

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()  # read in any case: asyncio prints those that nobody has read
        if self._done.done():
            return
        if error is not None:
            self._done.set_exception(error)
            return
        try:
            self._fill()
        except Exception as error:
            self._done.set_exception(error)

    async def _begin(self, position: int, problem: Problem, attempts: int) -> None:
        """Open a problem, from the log if it is there, and ask for what its search begins with."""
        try:
            opened = self.asking.open_tree(position, problem)
            if not opened.tree.nodes:  # before any token is spent on it
                status = await self.asking.check_reference(problem.answer)
                if status is not None:
                    self.asking.close(opened, status, self.progress)
                    return
        finally:
            self._opening -= 1
        self._open.add(problem.problem_id)
        await self._push(_OpenProblem(opened, attempts + 1), self.search.start(opened))

    async def _push(self, problem: "_OpenProblem", requests: list[Request]) -> None:
        """
        Put requests on the heap; those that the log answers are told at once. The caller holds the problem open by one pending
        count, which is released at the end.
        """
        pending = list(requests)
        while pending:
            request = pending.pop()
            key = (problem.opened.node_id(request), request.round)
            if key in problem.opened.brought:
                pending += await self._tell(problem, request)
                continue
            assert request.n <= self.search.max_samples
            depth = problem.opened.tree.depth(request.node)
            self._order += 1
            problem.num_pending += 1
            heapq.heappush(self._ready, ((problem.opened.position, -depth, self._order), request, problem))
        self._release(problem)

    def _release(self, problem: "_OpenProblem") -> None:
        problem.num_pending -= 1
        if problem.num_pending == 0:
            self._settle(problem)

    async def _sample(self, problem: "_OpenProblem", request: Request) -> None:
        if await self.asking.ask(problem.opened, request, self.progress):
            self._fill()  # the engine need not wait for the grader
            await self._push(problem, await self._tell(problem, request))
        else:
            problem.failed = True
            self._release(problem)
        self.on_progress(self.progress)

    async def _tell(self, problem: "_OpenProblem", request: Request) -> list[Request]:
        """Grade what a request brought, and tell the search."""
        key = (problem.opened.node_id(request), request.round)
        await self.asking.grade(problem.opened, key)
        return self.search.tell(problem.opened, request, problem.opened.brought[key])

    def _settle(self, problem: "_OpenProblem") -> None:
        """Nothing of the problem is pending: it has ended, or is put back to be tried again."""
        problem_id = problem.opened.tree.problem.problem_id
        self._open.discard(problem_id)
        if not problem.failed:
            status = filter_status(problem.opened) or ("done" if problem.opened.tree.nodes else "prompt_too_long")
            self.asking.close(problem.opened, status, self.progress)
        elif problem.attempts < self.config.problem_attempts:
            self._again.append((problem.opened.position, problem.opened.tree.problem, problem.attempts))
        else:
            self.asking.close(problem.opened, "error", self.progress)


@dataclass(eq=False)
class _OpenProblem:
    opened: OpenTree
    attempts: int
    num_pending: int = 1  # held by the one that opens it
    failed: bool = False
