"""
A scripted policy, an exact grader, and one call that runs a search with them. Also a program, so that tests can kill it:

    python tests/search/scripted.py FOLDER SEARCH NUM_PROBLEMS LATENCY
"""

import asyncio
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_hrm.search.engines.base import EngineError, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.policies import PUCT, FullTree, Rollouts, RootFilter
from trl_hrm.search.prompts import PROMPTS
from trl_hrm.search.run_folder import shard_name
from trl_hrm.search.scheduler import Progress, Scheduler, SchedulerConfig
from trl_hrm.search.steps import RULES, StepRule
from trl_hrm.search.tree import Problem, SearchTree


PROMPT = replace(PROMPTS["steps"], style="plain")
RULE = RULES["step_header"]
FINAL = PROMPT.final_stops
SEARCHES = {
    "full_tree": FullTree(RULE, FINAL, num_children=3, max_depth=4, max_step_tokens=60),
    "narrow": FullTree(RULE, FINAL, num_children=3, max_depth=4, max_step_tokens=60, max_sequences=30),
    "rollouts": Rollouts(FINAL, num_solutions=4, num_completions=3, max_solution_tokens=200),
    "puct": PUCT(FINAL, num_completions=4, max_selections=5, max_solution_tokens=200),
    "puct_bound": PUCT(FINAL, num_completions=4, max_solution_tokens=200, max_sequences=12),
    "filtered": RootFilter(Rollouts(FINAL, 3, 2, max_solution_tokens=200), 3, FINAL, max_solution_tokens=200),
}


def write_solution(prefix: str, rng: random.Random) -> str:
    """
    Write steps with random values, up to an answer, which is correct (7) two times in three. Sometimes there is no answer, or a step
    that does not end.
    """
    written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
    number = written.count("# Step ")
    text = "\n" if number else "# Step 1\n"
    number = max(number, 1)
    while True:
        text += f"The value is {rng.randrange(10)}.\n\n"
        chance = rng.random()
        if chance < 0.35:
            return text + f"# Answer\n\n{rng.choice((7, 7, 8))}\n# END!"
        if chance < 0.40:
            return text
        if chance < 0.45:
            return text + "and so on " * 40
        number += 1
        text += f"# Step {number}\n"


def write_coins(prefix: str, rng: random.Random) -> str:
    """Write three steps, each good or bad at random. The answer is right if all are good."""
    written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
    number = written.count("# Step ")
    if number == 4:
        return f"\n# Answer\n\n{8 if 'bad' in written else 7}\n# END!"
    toss = f"{rng.choice(('good', 'bad'))} {rng.randrange(1000)}\n\n# Step {max(number, 1) + 1}\n"
    return f"\n{toss}" if number else f"# Step 1\n{toss}"


def some_latency(rng: random.Random) -> float:
    return rng.uniform(0, 0.004)


class FaultyEngine(ScriptedEngine):
    """Fail a random share of all requests, drawn again for each try."""

    def __init__(self, share: float, seed: int = 0):
        super().__init__(write_solution)
        self.share = share
        self.rng = random.Random(seed)

    async def sample(self, *args, **kwargs):
        if self.rng.random() < self.share:
            raise EngineError("the server answered 500.")
        return await super().sample(*args, **kwargs)


@dataclass
class ExactGrade:
    correct: bool | None
    status: str = "graded"


class ExactGrader:
    """Equal strings are right. An answer listed as unreadable cannot be graded."""

    def __init__(self, unreadable: tuple[str, ...] = ()):
        self.unreadable = unreadable

    async def agrade(self, answer: str, reference: str) -> ExactGrade:
        await asyncio.sleep(0)
        if answer in self.unreadable:
            return ExactGrade(None, "unparseable")
        return ExactGrade(answer == reference)


def make_problems(number: int) -> list[tuple[int, Problem]]:
    return [(i, Problem(f"p{i:03d}", f"What is {i} - {i} + 7?", "7")) for i in range(number)]


def run_scripted(
    folder: Path,
    search: Any = SEARCHES["full_tree"],
    problems: list[tuple[int, Problem]] | None = None,
    script: Callable[[str, random.Random], str] = write_solution,
    latency: Callable[[random.Random], float] | None = None,
    engine: Any = None,
    grader: Any = None,
    shard: tuple[int, int] = (0, 1),
    seed: int = 42,
    rule: StepRule = RULE,
    **config: int,
) -> Progress:
    """Run or resume a search, and leave its log in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with EventLog(folder / shard_name("log", *shard, "jsonl"), write=True) as log:
        scheduler = Scheduler(
            engine or ScriptedEngine(script, latency),
            search,
            grader or ExactGrader(),
            PROMPT,
            rule,
            log,
            seed=seed,
            config=SchedulerConfig(**config),
        )
        return asyncio.run(scheduler.run(make_problems(6) if problems is None else problems))


def read_trees(folder: Path) -> dict[str, SearchTree]:
    """Return all trees of all logs, with their nodes in canonical order."""
    found: dict[str, SearchTree] = {}
    for path in sorted(folder.glob("log-*.jsonl")):
        log = EventLog(path)
        for problem_id in log.problems:
            assert problem_id not in found
            found[problem_id] = log.read(problem_id).tree.canonical()
        log.close()
    return found


if __name__ == "__main__":
    _, name, search, number, latency = sys.argv
    run_scripted(
        Path(name),
        SEARCHES[search],
        make_problems(int(number)),
        latency=lambda rng: rng.uniform(0, 2 * float(latency)),
        max_in_flight=24,
    )
