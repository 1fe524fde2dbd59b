"""One asyncio loop that keeps an engine busy: many problems open, no barrier between depths, a bound on what is in flight."""

import asyncio
import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..grading import extract_answer
from .engine import Engine, EngineError, EngineFatal, PrefixTooLong, Sample, check_samples
from .log import EventLog
from .open_tree import OpenTree, Request, request_seed
from .progress import Progress
from .prompts import Prompt
from .root_filter import filter_status
from .steps import StepRule, cut_steps
from .tree import Problem, make_id


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
            Tells steps apart.
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
        extractors: tuple[str, ...] = ("marker", "boxed", "hash"),
        config: SchedulerConfig | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        self.engine = engine
        self.search = search
        self.grader = grader
        self.prompt = prompt
        self.rule = rule
        self.log = log
        self.seed = seed
        self.extractors = extractors
        self.config = config or SchedulerConfig()
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
        if self.search.max_samples > self.config.max_in_flight:
            raise ValueError(
                f"max_in_flight is {self.config.max_in_flight}, expected {self.search.max_samples} or more: a request of this "
                f"search may have {self.search.max_samples} samples."
            )
        waiting = [(place, problem) for place, problem in problems if not self._is_closed(problem)]
        self.progress = Progress(num_problems=len(waiting))
        self._waiting = iter(waiting)
        self._again: list[tuple[int, Problem, int]] = []
        self._ready: list[tuple[tuple[int, int, int], Request, _OpenProblem]] = []
        self._open: set[str] = set()
        self._opening = 0
        self._failures = 0
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

    def _is_closed(self, problem: Problem) -> bool:
        known = self.log.problems.get(problem.problem_id)
        if known is None:
            return False
        before = self.log.problem(problem.problem_id)
        if before != problem:
            raise ValueError(
                f"{self.log.path}: problem {problem.problem_id!r} is {before} in the log and {problem} now. Start with the same "
                "problems to go on, or in another folder."
            )
        return known.status not in ("open", "error")

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
            opened = self._open_tree(position, problem)
            if not opened.tree.nodes:  # before any token is spent on it
                status = await self._check_reference(problem.answer)
                if status is not None:
                    self._end(opened, status)
                    return
        finally:
            self._opening -= 1
        self._open.add(problem.problem_id)
        await self._push(_OpenProblem(opened, attempts + 1), self.search.start(opened))

    async def _check_reference(self, answer: str) -> str | None:
        """Why a problem with this reference answer cannot be searched now, `None` if it can."""
        grade = await self.grader.agrade(answer, answer)
        if grade.correct:
            return None
        return "error" if grade.status in ("timeout", "died") else "ungradable"

    def _open_tree(self, position: int, problem: Problem) -> OpenTree:
        if problem.problem_id in self.log.problems:
            return self.log.read(problem.problem_id)
        event = {
            "event": "problem",
            "problem_id": problem.problem_id,
            "position": position,
            "root_id": make_id("root", self.seed, problem.problem_id),
            "prompt": problem.prompt,
            "answer": problem.answer,
            "prompt_ids": self.prompt.encode(self.engine.tokenizer, problem.prompt),
        }
        self.log.append(event)
        return OpenTree.from_event(event)

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
        opened = problem.opened
        node_id = opened.node_id(request)
        prefix_ids = opened.tree.prefix_ids(request.node)
        seed = request_seed(self.seed, node_id, request.round)
        try:
            samples = await self.engine.sample(
                prefix_ids, request.n, request.stop, request.max_tokens, seed, opened.tree.problem.problem_id
            )
            check_samples(samples, request.n)
        except PrefixTooLong:
            samples = []  # the solution is cut off here, as by any limit of length
        except EngineError as error:
            self._count_failure(problem, node_id, request, error)
            return
        finally:
            self.progress.count_in_flight(-request.n)
        self._failures = 0
        before = opened.tree.text(request.node)
        event = {
            "event": "samples",
            "problem_id": opened.tree.problem.problem_id,
            "above": node_id,
            "round": request.round,
            "role": request.role,
            "cut": request.cut,
            "weight": request.weight,
            "seed": seed,
            "samples": [self._record(request, before, prefix_ids, sample) for sample in samples],
        }
        self.log.append(event)
        opened.apply(event)
        self._count(prefix_ids, samples)
        self._fill()  # the engine need not wait for the grader
        await self._push(problem, await self._tell(problem, request))
        self.on_progress(self.progress)

    def _record(self, request: Request, before: str, prefix_ids: list[int], sample: Sample) -> dict[str, Any]:
        is_final = sample.finish == "eos" or sample.stop_reason in self.prompt.final_stops
        record = {
            "token_ids": list(sample.token_ids),
            "text": sample.text,
            "num_cached": sample.num_cached,
            "finish": sample.finish,
            "stop_reason": sample.stop_reason,
            "is_final": is_final,
        }
        if is_final:
            record["answer"] = extract_answer(before + sample.text, self.extractors)
        if request.cut:
            record["cuts"] = cut_steps(self.rule, self.engine.tokenizer, prefix_ids, sample.token_ids, sample.text)
        elif request.role == "step":
            record["tail"] = self.rule.tail(sample.text, sample.stop_reason)
        return record

    async def _tell(self, problem: "_OpenProblem", request: Request) -> list[Request]:
        """Grade what a request brought, unless the log has that too, and tell the search."""
        opened = problem.opened
        key = (opened.node_id(request), request.round)
        brought = opened.brought[key]
        if key not in opened.graded:
            answers = [opened.tree.nodes[i].answer for i in brought]
            grades = await asyncio.gather(*(self._grade(answer, opened.tree.problem.answer) for answer in answers))
            event = {
                "event": "grades",
                "problem_id": opened.tree.problem.problem_id,
                "above": key[0],
                "round": key[1],
                "correct": grades,
            }
            self.log.append(event)
            opened.apply(event)
        return self.search.tell(opened, request, brought)

    async def _grade(self, answer: str | None, reference: str) -> bool | None:
        return None if answer is None else (await self.grader.agrade(answer, reference)).correct

    def _count(self, prefix_ids: list[int], samples: list[Sample]) -> None:
        self.progress.num_requests += 1
        self.progress.num_sequences += len(samples)
        self.progress.generated_tokens += sum(len(sample.token_ids) for sample in samples)
        self.progress.cached_tokens += sum(sample.num_cached for sample in samples)
        self.progress.prefix_tokens += len(prefix_ids)

    def _count_failure(self, problem: "_OpenProblem", node_id: str, request: Request, error: EngineError) -> None:
        self.log.append(
            {
                "event": "error",
                "problem_id": problem.opened.tree.problem.problem_id,
                "above": node_id,
                "round": request.round,
                "message": str(error),
            }
        )
        self.progress.num_failures += 1
        self._failures += 1
        if self._failures >= self.config.max_failures:
            raise EngineFatal(
                f"{self._failures} requests failed in a row, the last one with: {error} Everything up to here is in the log; "
                "start again with the same command when the engine is back."
            )
        problem.failed = True
        self._release(problem)
        self.on_progress(self.progress)

    def _settle(self, problem: "_OpenProblem") -> None:
        """Nothing of the problem is pending: it has ended, or is put back to be tried again."""
        problem_id = problem.opened.tree.problem.problem_id
        self._open.discard(problem_id)
        if not problem.failed:
            status = filter_status(problem.opened) or ("done" if problem.opened.tree.nodes else "prompt_too_long")
            self._end(problem.opened, status)
        elif problem.attempts < self.config.problem_attempts:
            self._again.append((problem.opened.position, problem.opened.tree.problem, problem.attempts))
        else:
            self._end(problem.opened, "error")

    def _end(self, opened: OpenTree, status: str) -> None:
        self.log.append({"event": "close", "problem_id": opened.tree.problem.problem_id, "status": status})
        self.progress.closed[status] += 1


@dataclass(eq=False)
class _OpenProblem:
    opened: OpenTree
    attempts: int
    num_pending: int = 1  # held by the one that opens it
    failed: bool = False
