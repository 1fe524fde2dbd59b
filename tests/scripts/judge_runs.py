"""
A run with solutions whose first wrong step is known, and a judge with a known error rate. Also a program, so that tests can kill it:

    python -m tests.scripts.judge_runs RUN LATENCY MAX_IN_FLIGHT
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trl_hrm import JudgeConfig
from trl_hrm.cli import main

from ..scoring.judges import Judge
from ..search.scripted import SEARCHES, make_problems, run_scripted, write_coins


def make_run(folder: Path, search: str = "full_tree", num_problems: int = 4) -> Path:
    """Search problems whose steps are `good` or `bad`, and write a manifest."""
    run_scripted(folder, SEARCHES[search], make_problems(num_problems), write_coins)
    manifest = {"search": SEARCHES[search].describe(), "num_shards": 1, "engine": {}, "seed": 42}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def first_bad(steps: list[str]) -> int:
    """Return the index of the first wrong step, or -1."""
    return next((i for i, step in enumerate(steps) if "bad" in step), -1)


def coin_judge(error: float = 0.2, unreadable: float = 0.1) -> Callable[[str, Any], str]:
    """Return a judge that names the first bad step or, with probability `error`, another place with equal probability."""

    def write(prompt: str, rng: Any) -> str:
        steps = re.findall(r"^Step (\d+): (.*)", prompt.partition("# Solution")[2], re.MULTILINE)
        true = first_bad([text for _, text in steps])
        others = [place for place in range(-1, len(steps)) if place != true]
        vote = rng.choice(others) if rng.random() < error else true
        text = f"I have checked {'all' * rng.randrange(20)} steps.\n"
        return text if rng.random() < unreadable else f"{text}\\boxed{{{-1 if vote == -1 else vote + 1}}}"

    return write


def use_engine(engine: Any, weights: str = "w1", patch: Callable[[type, str, Any], None] = setattr) -> Any:
    """Let all judges use an engine, as if their weights had this hash."""
    patch(JudgeConfig, "load_engine", lambda self, shard=None: engine)
    patch(JudgeConfig, "model_identity", lambda self: {"weights": weights})
    return engine


if __name__ == "__main__":
    _, run, latency, in_flight = sys.argv
    use_engine(Judge(coin_judge(), latency=lambda rng: rng.uniform(0, 2 * float(latency))))
    sys.exit(main(["judge", run, "--judge", "coins", "--engine", "transformers", "--max_in_flight", in_flight]))
