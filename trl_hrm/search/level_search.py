"""A search led by step scores, depth by depth: all open problems are sampled together, then scored together."""

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

from ..grading import DEFAULT_EXTRACTORS
from ..step_tree import StepTree
from .asking import Asking
from .engine import Engine
from .log import EventLog
from .open_tree import OpenTree, Request
from .progress import Progress
from .prompts import Prompt
from .scheduler import SchedulerConfig
from .step_search import Beam, StepSearch, is_step
from .tree import ROOT, Problem


Score = Callable[[list[StepTree]], list[list[float | None]]]


@dataclass
class LevelProgress(Progress):
    """
    What a run did so far. Beside what [`Progress`] has: depths and calls of the scorer, steps it scored, and the seconds that the
    engine had work and that the scorer took. All others are the rest.
    """

    num_levels: int = 0
    num_calls: int = 0
    num_steps: int = 0
    policy_seconds: float = 0.0
    scorer_seconds: float = 0.0

    def count_in_flight(self, change: int) -> None:
        """Sequences go to the engine or come back."""
        had_work, since = self.in_flight > 0, self._changed
        super().count_in_flight(change)
        if had_work:
            self.policy_seconds += self._changed - since


class LevelSearch:
    """
    Runs a search led by step scores over many problems and logs every event.

    At each depth the requests of all open problems are sampled together; then one call of the scorer judges all new steps, while
    those that end a solution are graded. What stands in the log is neither sampled nor scored again: a run that was killed and
    resumed ends as one that was not. A solution also ends where a step states its answer after `# Answer`, in
    `<answer>` tags or in a box.

    A problem with a prefix is searched from the end of it. The steps that it gives are neither sampled nor judged, but they stand
    before the others in the trees that the scorer is shown, and count for `max_depth`.

    Args:
        engine ([`Engine`]):
            The policy.
        search ([`StepSearch`]):
            What to sample: [`GreedyStepSearch`], [`BeamSearch`] or [`DiverseTreeSearch`].
        score (`Callable[[list[StepTree]], list[list[float | None]]]`):
            The reward model: one score per step of each tree, as [`StepScorer.score_trees`] gives it. A tree has the steps of a
            problem that are to be judged, and those before them. `None` for a step that it has no room for: the path ends there.
        grader, prompt, log, seed, extractors:
            See [`Scheduler`].
        config ([`SchedulerConfig`], *optional*):
            How the search runs.
        on_progress (`Callable[[LevelProgress], None]`, *optional*):
            Called after each request and at the end of each depth.

    Raises:
        `ValueError`: If a request of the search is larger than `max_in_flight`, if the search cannot go on after the prefix of a
        problem (see [`StepSearch.prefix_fault`]), or if the scorer returns anything but one number per step.
    """

    def __init__(
        self,
        engine: Engine,
        search: StepSearch,
        score: Score,
        grader: Any,
        prompt: Prompt,
        log: EventLog,
        seed: int = 42,
        extractors: tuple[str, ...] = DEFAULT_EXTRACTORS,
        config: SchedulerConfig | None = None,
        on_progress: Callable[[LevelProgress], None] | None = None,
    ):
        self.search = search
        self.score = score
        self.config = config or SchedulerConfig()
        failures = self.config.max_failures
        self.asking = Asking(engine, grader, prompt, search.rule, log, seed, extractors, failures, answer_ends=True)
        self.on_progress = on_progress or (lambda progress: None)

    async def run(self, problems: Iterable[tuple[int, Problem]]) -> LevelProgress:
        """
        Search every problem that the log does not show as ended.

        Args:
            problems (`Iterable[tuple[int, Problem]]`):
                Problems, each with its place among those given to all shards.

        Returns:
            [`LevelProgress`]: What was done.

        Raises:
            `EngineFatal`: If the engine cannot serve any request, or failed `max_failures` times in a row. Everything up to
                then is in the log.
        """
        search, limit = self.search, self.config.max_in_flight
        fault = partial(search.prefix_fault, ending=self.asking.ending)
        waiting = self.asking.waiting(problems, search.max_samples, limit, fault)
        self.progress = LevelProgress(num_problems=len(waiting))
        queue, live = iter(waiting), []
        while live := await self._fill(live, queue):
            await self._sample(live)
            await asyncio.gather(self._score(live), self._grade(live))
            live = [problem for problem in live if not self._has_ended(problem)]
            self.progress.num_levels += 1
            self.on_progress(self.progress)
        return self.progress

    async def _fill(self, live: list["_OpenProblem"], queue: Iterator[tuple[int, Problem]]) -> list["_OpenProblem"]:
        """The open problems, and as many new ones as there is room for."""
        while new := list(islice(queue, self.config.max_open_problems - len(live))):
            opened = await asyncio.gather(*(self._open(place, problem) for place, problem in new))
            live = live + [problem for problem in opened if problem is not None]
        return live

    async def _open(self, position: int, problem: Problem) -> "_OpenProblem | None":
        opened = self.asking.open_tree(position, problem)
        if not opened.sampled:  # before any token is spent on it
            status = await self.asking.check_reference(problem.answer)
            if status is not None:
                self.asking.close(opened, status, self.progress)
                return None
        return _OpenProblem(opened, [self.search.advance(opened, beam) for beam in self.search.start(opened)])

    async def _sample(self, live: list["_OpenProblem"]) -> None:
        """Answer every request of this depth, as many at a time as the engine may have."""
        tasks: set[asyncio.Task] = set()
        try:
            for problem, request in _requests(live):
                while self.progress.in_flight + request.n > self.config.max_in_flight:
                    tasks = await _first_done(tasks)
                self.progress.count_in_flight(request.n)
                tasks.add(asyncio.create_task(self._ask(problem, request)))
            while tasks:
                tasks = await _first_done(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, problem: "_OpenProblem", request: Request) -> None:
        if not await self.asking.ask(problem.opened, request, self.progress):
            problem.failed = True
        self.on_progress(self.progress)

    async def _score(self, live: list["_OpenProblem"]) -> None:
        """Score every step that has no score yet, in one call."""
        asked = [problem for problem in live if problem.unscored()]
        trees, places = [], []
        for problem in asked:
            nodes = [i for _, brought in problem.unscored() for i in brought if is_step(problem.opened, i)]
            tree, place = _step_tree(problem.opened, nodes)
            trees.append(tree)
            places.append({i: place[i] for i in nodes})
        found = await self._call([tree for tree in trees if tree.completions])
        answers = iter(found)
        for problem, tree, place in zip(asked, trees, places, strict=True):
            scores = next(answers) if tree.completions else []
            _check_scores(scores, tree, problem.opened.tree.problem)
            for (above, round), brought in problem.unscored():
                event = {
                    "event": "scores",
                    "problem_id": problem.opened.tree.problem.problem_id,
                    "above": above,
                    "round": round,
                    "scores": [scores[place[i]] if i in place else None for i in brought],
                }
                self.asking.tell(problem.opened, event)
            self.progress.num_steps += len(place)

    async def _call(self, trees: list[StepTree]) -> list[list[float | None]]:
        if not trees:
            return []
        began = time.perf_counter()
        found = await asyncio.to_thread(self.score, trees)
        self.progress.scorer_seconds += time.perf_counter() - began
        self.progress.num_calls += 1
        if len(found) != len(trees):
            raise ValueError(f"the reward model returned scores of {len(found)} trees, expected {len(trees)}.")
        return found

    async def _grade(self, live: list["_OpenProblem"]) -> None:
        opened = [problem.opened for problem in live]
        ungraded = [(tree, key) for tree in opened for key in tree.brought if key not in tree.graded]
        await asyncio.gather(*(self.asking.grade(tree, key) for tree, key in ungraded))

    def _has_ended(self, problem: "_OpenProblem") -> bool:
        """Let the beams go on; close a problem none of whose beams does, or whose requests failed again."""
        problem.beams = [self.search.advance(problem.opened, beam) for beam in problem.beams]
        if problem.failed:
            problem.failed = False
            problem.attempts += 1
            status = "error" if problem.attempts == self.config.problem_attempts else None
        elif any(beam.requests for beam in problem.beams):
            status = None
        else:
            status = "done" if problem.opened.sampled else "prompt_too_long"
        if status is not None:
            self.asking.close(problem.opened, status, self.progress)
        return status is not None


@dataclass(eq=False)
class _OpenProblem:
    opened: OpenTree
    beams: list[Beam] = field(default_factory=list)
    attempts: int = 0
    failed: bool = False

    def unanswered(self) -> list[Request]:
        """Requests of this depth that the log does not answer."""
        requests = [request for beam in self.beams for request in beam.requests]
        return [r for r in requests if (self.opened.node_id(r), r.round) not in self.opened.brought]

    def unscored(self) -> list[tuple[tuple[str, int], list[int]]]:
        """What requests brought that no scorer has seen."""
        scores = self.opened.scores
        return [
            (key, brought) for key, brought in self.opened.brought.items() if any(i not in scores for i in brought)
        ]


def _requests(live: list[_OpenProblem]) -> list[tuple[_OpenProblem, Request]]:
    """What is to be sampled at this depth."""
    return [(problem, request) for problem in live for request in problem.unanswered()]


async def _first_done(tasks: set[asyncio.Task]) -> set[asyncio.Task]:
    """Wait for a task, and return those that are left."""
    done, left = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()  # raises what it raised
    return left


def _step_tree(opened: OpenTree, nodes: list[int]) -> tuple[StepTree, dict[int, int]]:
    """The paths to some nodes as a tree of step texts, and the place of each node in it."""
    places: dict[int, int] = {ROOT: -1}
    parents = []
    for node in nodes:
        for i in opened.tree.path(node):
            if i not in places:
                places[i] = len(parents)
                parents.append(places[opened.tree.nodes[i].parent])
    texts = [opened.tree.step_text(i) for i in places if i != ROOT]
    return StepTree(opened.tree.problem.prompt, texts, [None] * len(texts), parents), places


def _check_scores(scores: list[float | None], tree: StepTree, problem: Problem) -> None:
    if len(scores) != len(tree.completions):
        raise ValueError(
            f"problem {problem.problem_id!r}: the reward model returned {len(scores)} scores, expected {len(tree.completions)}, "
            "one per step."
        )
    for text, score in zip(tree.completions, scores, strict=True):
        if score is not None and not math.isfinite(score):
            raise ValueError(
                f"problem {problem.problem_id!r}: the reward model scored the step {text[:80]!r} as {score}, expected a number. "
                "Steps cannot be compared with it: look at the checkpoint and its dtype."
            )
