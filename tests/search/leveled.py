"""
Step searches with a scripted policy and reward models that are functions of the path. Also a program, so that
tests can kill it:

    python -m tests.search.leveled FOLDER SEARCH NUM_PROBLEMS LATENCY
"""

import asyncio
import hashlib
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.open_tree import OpenTree
from trl_hrm.search.run_folder import shard_name
from trl_hrm.search.scheduler import Progress, Scheduler, SchedulerConfig
from trl_hrm.search.step_search import BeamSearch, DiverseTreeSearch, GreedyStepSearch, StepSearch
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Problem
from trl_hrm.step_tree import StepTree

from .scripted import FINAL, PROMPT, RULE, ExactGrader, make_problems, write_solution


LIMITS = {"rule": RULE, "final_stops": FINAL, "max_depth": 5, "max_step_tokens": 60}
SEARCHES = {
    "greedy": GreedyStepSearch(num_candidates=4, **LIMITS),
    "beam": BeamSearch(width=3, expansion=2, **LIMITS),
    "trees": DiverseTreeSearch(num_trees=3, width=2, **LIMITS),
}

# for searches with a [`LetterEngine`]
PLAIN = replace(PROMPT, template="{question}\n\n", rule="blank_line", final_stops=("# END!",))
LETTER_LIMITS = {"rule": RULES["blank_line"], "final_stops": ("# END!",), "max_depth": 4, "max_step_tokens": 30}
PROBLEMS = [(0, Problem("p", "Q", "7"))]


class LetterEngine(ScriptedEngine):
    """
    Sample number i writes the i-th text of the table for the path so far: a word is a step, `=x` the answer x, `...` a step
    that does not end, and an empty text EOS.
    """

    def __init__(self, table: dict[str, list[str]]):
        super().__init__(self._script)
        self.table = table

    def _script(self, prefix: str, number: int) -> str:
        path = "/".join(prefix.removeprefix("Q\n\n").split("\n\n")[:-1])
        text = self.table[path][number]
        if text == "...":
            return "on and " * 10
        if text.startswith("="):
            return f"so \\boxed{{{text[1:]}}}\n# END!"
        return text and f"{text}\n\n"

    @staticmethod
    def _rng(prefix: str, seed: int, use: str) -> int:
        return seed % 2**16  # the sample's number, because a request's seed ends in 16 zero bits


class PathScorer:
    """Score a step by the texts up to it, and record the calls."""

    def __init__(self, score: Callable[[list[str]], float | None]):
        self.score = score
        self.calls: list[list[StepTree]] = []

    def __call__(self, trees: list[StepTree]) -> list[list[float | None]]:
        self.calls.append(trees)
        return [
            [self.score([tree.completions[i] for i in tree.path(step)]) for step in range(len(tree.completions))]
            for tree in trees
        ]


def any_score(path: list[str]) -> float:
    """Return a meaningless number in [0, 1): a hash of the path."""
    return int.from_bytes(hashlib.blake2b("/".join(path).encode(), digest_size=4).digest(), "big") / 2**32


def run_levels(
    folder: Path,
    search: StepSearch = SEARCHES["greedy"],
    problems: list[tuple[int, Problem]] | None = None,
    score: Callable = any_score,
    script: Callable = write_solution,
    latency: Callable[[random.Random], float] | None = None,
    engine: Any = None,
    grader: Any = None,
    scorer: Any = None,
    seed: int = 42,
    extractors: tuple[str, ...] = ("marker", "boxed", "hash"),
    prompt: Any = PROMPT,
    on_progress: Callable[[Progress], None] | None = None,
    **config: int,
) -> Progress:
    """Run or resume a search, and leave its log in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with EventLog(log_of(folder), write=True) as log:
        scheduler = Scheduler(
            engine or ScriptedEngine(script, latency),
            search,
            grader or ExactGrader(),
            prompt,
            search.rule,
            log,
            seed=seed,
            extractors=extractors,
            config=SchedulerConfig(**config),
            on_progress=on_progress,
            score=scorer or PathScorer(score),
        )
        return asyncio.run(scheduler.run(make_problems(6) if problems is None else problems))


def log_of(folder: Path) -> Path:
    return folder / shard_name("log", 0, 1, "jsonl")


def open_trees(folder: Path) -> dict[str, OpenTree]:
    with EventLog(log_of(folder)) as log:
        return {problem_id: log.read(problem_id) for problem_id in log.problems}


def results(folder: Path, search: StepSearch) -> dict[str, list[tuple]]:
    """Return how each path ended (reason, step texts, scores, answer and grade), with the selected path first."""
    found = {}
    for problem_id, opened in open_trees(folder).items():
        tree = opened.tree
        found[problem_id] = [
            (
                ending.reason,
                [tree.step_text(i) for i in tree.path(ending.node)],
                ending.scores,
                tree.nodes[ending.node].answer if ending.reason == "final" else None,
                tree.nodes[ending.node].correct if ending.reason == "final" else None,
            )
            for ending in search.endings(opened)
        ]
    return found


def everything(folder: Path) -> dict:
    """Return trees in canonical order, with each node's score by its id."""
    found = {}
    for problem_id, opened in open_trees(folder).items():
        scores = {opened.tree.nodes[i].node_id: score for i, score in opened.scores.items()}
        found[problem_id] = opened.tree.canonical(), scores
    return found


if __name__ == "__main__":
    _, name, search, number, latency = sys.argv
    run_levels(
        Path(name),
        SEARCHES[search],
        make_problems(int(number)),
        latency=lambda rng: rng.uniform(0, 2 * float(latency)),
        max_in_flight=12,
    )
