"""Leaves out problems that the policy always or never solves: their steps would all have the same label."""

from dataclasses import dataclass
from typing import Any

from .open_tree import OpenTree, Request
from .tree import ROOT


FILTER_ROUND = -1


@dataclass(frozen=True)
class RootFilter:
    """
    Samples `num_samples` solutions first and goes on with `search` only if some of them are right and some are not.

    Args:
        search ([`FullTree`], [`Rollouts`] or [`PUCT`]):
            The search of the problems that are kept.
        num_samples (`int`):
            Solutions to decide by.
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Most tokens of a solution.
    """

    search: Any
    num_samples: int
    stop: tuple[str, ...]
    max_solution_tokens: int = 2048

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"the root filter has {self.num_samples} samples, expected 2 or more.")

    @property
    def first(self) -> Request:
        """The request that every problem starts with."""
        return Request(ROOT, self.num_samples, "rollout", self.stop, self.max_solution_tokens, round=FILTER_ROUND)

    @property
    def max_samples(self) -> int:
        """Most samples of a request."""
        return max(self.num_samples, self.search.max_samples)

    def start(self, opened: OpenTree) -> list[Request]:
        """Requests to begin a problem with."""
        return [self.first]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """Requests that become possible with the nodes that a request brought."""
        if request.round != FILTER_ROUND:
            return self.search.tell(opened, request, brought)
        return [] if filter_status(opened) else self.search.start(opened)

    def describe(self) -> dict[str, Any]:
        """Settings, for the manifest."""
        return self.search.describe() | {
            "root_filter": {"num_samples": self.num_samples, "max_solution_tokens": self.max_solution_tokens}
        }


def filter_status(opened: OpenTree) -> str | None:
    """
    `"always_solved"` or `"never_solved"` if the root filter leaves the problem out. A solution without an answer is not
    solved; one that could not be graded may be.
    """
    brought = [opened.tree.nodes[i] for i in opened.brought.get((opened.root_id, FILTER_ROUND), ())]
    if brought and all(node.correct for node in brought):
        return "always_solved"
    if brought and not any(node.correct or (node.answer is not None and node.correct is None) for node in brought):
        return "never_solved"
    return None
