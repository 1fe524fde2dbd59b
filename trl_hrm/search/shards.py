"""Which problems are whose, when a search runs on many machines or processes."""

import os
from typing import NamedTuple

from .tree import make_id


class Shard(NamedTuple):
    """One of `count` parts. `local` is its number among the processes of this machine, `None` if it is alone."""

    index: int
    count: int
    local: int | None = None


def problem_shard(problem_id: str, num_shards: int) -> int:
    """The shard of a problem: by its id alone, so that machines agree without talking."""
    return int(make_id("shard", problem_id), 16) % num_shards


def show_own_gpu(local: int) -> None:
    """
    Leave this process the GPU of its number among the processes of this machine, for engines that take the first they see.

    Raises:
        `ValueError`: If `CUDA_VISIBLE_DEVICES` has no GPU left for it.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(local + 1)]
    if local >= len(devices):
        raise ValueError(
            f"CUDA_VISIBLE_DEVICES is {visible!r}, which has no GPU for process {local} (from 0) of this machine; expected "
            "one for each. Launch fewer processes, or name more GPUs."
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[local]


def launched_shard(index: int = 0, count: int = 1) -> Shard:
    """
    The shard of this process. Each process that `accelerate launch` or `torchrun` starts takes a part of shard `index`.

    The variables of the launcher are taken out of the environment: processes search on their own, and an engine that saw them
    would wait for the others.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = os.environ.get("LOCAL_RANK")
    if size == 1:
        return Shard(index, count)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return Shard(index * size + rank, count * size, int(local) if local is not None else None)
