"""What samples and scores cost: seconds, tokens, calls."""

from collections import Counter
from pathlib import Path
from typing import Any

from ..io import write_json
from ..search.log import shard_name
from ..search.progress import Progress
from ..search.run_folder import read_json
from ..search.shards import Shard


class SampleCost:
    """
    What the samples of a shard cost, over all starts, in a file beside the log of its run. It is not known any more once a start
    was cut short: the log has grown since the last one that came to its end.

    Args:
        folder (`Path`):
            Folder of the run.
        shard ([`Shard`]):
            The shard.
    """

    def __init__(self, folder: Path, shard: Shard):
        self.path = folder / shard_name("cost", shard.index, shard.count, "json")
        self.log = folder / shard_name("log", shard.index, shard.count, "jsonl")
        names = ("seconds", "num_tokens", "num_requests", "num_sequences")
        before = {"costs": dict.fromkeys(names, 0), "is_known": True, "log_bytes": 0}
        if self.path.is_file():
            before = read_json(self.path)
        self.costs = before["costs"]
        self.is_known = before["is_known"] and before["log_bytes"] == self._log_bytes()

    def end(self, progress: Progress) -> None:
        """A start has come to its end."""
        self.costs["seconds"] += progress.seconds
        self.costs["num_tokens"] += progress.generated_tokens
        self.costs["num_requests"] += progress.num_requests
        self.costs["num_sequences"] += progress.num_sequences
        write_json(self.path, {"costs": self.costs, "is_known": self.is_known, "log_bytes": self._log_bytes()})

    def _log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0


def total_cost(run: Path | None, counts: Counter) -> dict[str, Any]:
    """
    The `cost` of results.

    Args:
        run (`Path`, *optional*):
            The run folder that the candidates are of. Where [`SampleCost`] does not know what it cost, there are only the counts.
        counts (`Counter`):
            What the blocks of [`judge_pool`] count.
    """
    return {
        "policy": None if run is None else _policy_cost(run, counts),
        "scorer": {
            "seconds": counts["scorer_seconds"],
            "num_calls": counts["scorer_calls"],
            "num_steps": counts["scorer_steps"],
            "num_tokens": counts["scorer_tokens"],
        },
        "rest_seconds": counts["rest_seconds"],
    }


def _policy_cost(run: Path, counts: Counter) -> dict[str, Any]:
    found = [read_json(path) for path in sorted(run.glob("cost-*.json"))]
    if found and all(one["is_known"] for one in found):
        return {name: sum(one["costs"][name] for one in found) for name in found[0]["costs"]}
    counted = {"num_tokens": counts["policy_tokens"], "num_sequences": counts["num_candidates"]}
    return {"seconds": None, "num_requests": None} | counted
