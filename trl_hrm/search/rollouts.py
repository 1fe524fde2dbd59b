"""Solutions cut into steps, each prefix judged by fresh completions (Math-Shepherd; ER-PRM, section 4)."""

from dataclasses import dataclass
from typing import Any

from .budget import choose
from .open_tree import OpenTree, Request
from .tree import ROOT


@dataclass(frozen=True)
class Rollouts:
    """
    `num_solutions` whole solutions, cut into steps, and from each step but the last `num_completions` completions to the end
    ([Math-Shepherd](https://huggingface.co/papers/2312.08935); [ER-PRM](https://huggingface.co/papers/2412.11006), section 4:
    15 and 16). The last step of a solution is judged by the solution's own answer.

    Where the budget of a problem does not allow completions from every step, they are taken from a random part of them; the
    other steps stay without a label.

    Args:
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        num_solutions (`int`, *optional*, defaults to `15`):
            Solutions of a problem.
        num_completions (`int`, *optional*, defaults to `16`):
            Completions from a step. 0 for solutions alone: candidates of a selection.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Most tokens of a solution or a completion.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Most samples of a problem.
        max_tokens (`int`, *optional*):
            Most tokens of a problem. By default `max_sequences * max_solution_tokens`, which never binds.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice under a budget.

    Raises:
        `ValueError`: If a number is out of range.
    """

    stop: tuple[str, ...]
    num_solutions: int = 15
    num_completions: int = 16
    max_solution_tokens: int = 2048
    max_sequences: int = 4096
    max_tokens: int | None = None
    seed: int = 42

    def __post_init__(self):
        check_rollouts(self, first="num_solutions")

    @property
    def first(self) -> Request:
        """The request that every problem starts with."""
        return Request(ROOT, self.num_solutions, "rollout", self.stop, self.max_solution_tokens, cut=True)

    @property
    def max_samples(self) -> int:
        """Most samples of a request."""
        return max(self.num_solutions, self.num_completions)

    def start(self, opened: OpenTree) -> list[Request]:
        """Requests to begin a problem with."""
        return [self.first]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """Requests that become possible with the nodes that a request brought."""
        if request.node != ROOT or not self.num_completions:
            return []
        prefixes = [opened.segment(i, number) for i in brought for number in range(1, len(opened.cuts[i]))]
        spent = sum(len(opened.tree.nodes[i].token_ids) for i in brought)
        affordable = (self.max_sequences - request.n) // self.num_completions
        if self.max_tokens is not None:
            affordable = min(
                affordable, (self.max_tokens - spent) // (self.num_completions * self.max_solution_tokens)
            )
        return [
            Request(prefix, self.num_completions, "rollout", self.stop, self.max_solution_tokens)
            for prefix in choose(prefixes, affordable, self.seed, opened.root_id)
        ]

    def describe(self) -> dict[str, Any]:
        """Settings, for the manifest."""
        return {"search": "rollouts"} | vars(self)


def check_rollouts(search: Any, first: str) -> None:
    """Check the numbers of a search that samples whole solutions. `first` names how many of them come first."""
    for name in (first, "max_solution_tokens"):
        if getattr(search, name) < 1:
            raise ValueError(f"{name} is {getattr(search, name)}, expected 1 or more.")
    if search.num_completions < 0:
        raise ValueError(f"num_completions is {search.num_completions}, expected 0 or more.")
    least = getattr(search, first)
    if search.max_sequences < least:
        raise ValueError(f"max_sequences is {search.max_sequences}, expected {least} ({first}) or more.")
    if search.max_tokens is not None and search.max_tokens < least * search.max_solution_tokens:
        raise ValueError(
            f"max_tokens is {search.max_tokens}, expected {least * search.max_solution_tokens} or more: {least} solutions of "
            f"up to max_solution_tokens={search.max_solution_tokens} come first."
        )
