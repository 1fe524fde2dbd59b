"""Step searches with a scripted policy and a reward model that is a function of the path."""

import json
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

from trl_hrm import StepFormat
from trl_hrm.evaluation.step_search import ALONE, StepSearchSettings, run_step_search
from trl_hrm.search.engines.base import ScriptedEngine

from ..helpers import tiny_tokenizer
from ..search.scripted import PROMPT, RULE, ExactGrader, make_problems, write_coins


@dataclass
class PathScores:
    """A reward model that is a function of the path; as a `TreeScorer`, without limit of length."""

    score: object
    max_positions: None = None
    num_calls: int = 0
    tokenizer: object = field(default_factory=tiny_tokenizer)
    step_format: StepFormat = field(default_factory=StepFormat)

    def score_trees(self, trees, spans=(1,), combine="max"):
        self.num_calls += 1
        return [
            [self.score([tree.completions[j] for j in tree.path(i)]) for i in range(len(tree.completions))]
            for tree in trees
        ]


class Grader(ExactGrader):
    """Equal strings are right, also for those who wait."""

    def grade(self, answer, reference, is_reference=True):
        if answer in self.unreadable:
            return SimpleNamespace(correct=None, status="unparseable")
        return SimpleNamespace(correct=answer == reference, status="graded")


def is_good(path: list[str]) -> float:
    return float(not any("bad" in step for step in path))


def search(
    folder,
    score=is_good,
    engine=None,
    scorer=None,
    grader=None,
    shard=ALONE,
    problems=None,
    reward_model="planted",
    **given,
):
    config = StepSearchSettings(
        str(folder), **{"n": [1, 2, 4], "max_depth": 5, "max_step_tokens": 60, "max_in_flight": 64} | given
    )
    manifest = {
        "engine": {"engine": "scripted"},
        "prompt": asdict(PROMPT),
        "steps": asdict(RULE),
        "grader": {"timeout": 1.0},
        "started_with": {"problems": "coins.jsonl"},
        "seed": config.seed,
        "num_shards": shard.count,
        "versions": {"trl_hrm": "1"},
    }
    return run_step_search(
        config,
        [problem for _, problem in make_problems(40)] if problems is None else problems,
        engine or ScriptedEngine(write_coins),
        scorer or PathScores(score),
        grader or Grader(),
        PROMPT,
        RULE,
        manifest,
        {"model": reward_model},
        shard,
    )


def numbers(folder) -> dict:
    """Everything in the results that may not depend on when and how often the search was started."""
    found = json.loads((folder / "results.json").read_text())
    del found["date"]
    for point in found["curves"]["step_search"]:
        for name in [
            name for name in point if name.endswith("seconds") or name in ("scorer_num_calls", "scorer_num_tokens")
        ]:
            del point[name]
    del found["cost"]["policy"]["seconds"], found["cost"]["scorer"], found["cost"]["rest_seconds"]
    found["rows"] = {path.name: path.read_text() for path in sorted(folder.glob("candidates-n*.jsonl"))}
    return found
