"""Breadth-first search of all trees of a given width: each open node gets the same number of children (HRM, section 3.2)."""

from dataclasses import asdict, dataclass
from typing import Any

from .budget import choose, share
from .open_tree import OpenTree, Request
from .steps import StepRule
from .tree import ROOT


@dataclass(frozen=True)
class FullTree:
    """
    Every node that does not end a solution gets `num_children` children, down to `max_depth`
    ([HRM](https://huggingface.co/papers/2503.13551), section 4.2: 5 to 6 children, depth 7).

    Full breadth at 6 children and depth 7 is 335,922 nodes: where the budget of a problem does not allow it, a random part of
    the open siblings is continued, and each stands for as many as were open (`Node.weight`), so that the mean over children
    keeps its expectation. The budget is handed down from parent to children, so that the tree does not depend on the order in
    which samples arrive, and every branch that is continued can reach `max_depth`.

    Args:
        rule ([`StepRule`]):
            Gives the strings that end a step.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution.
        num_children (`int`, *optional*, defaults to `5`):
            Children of an open node.
        max_depth (`int`, *optional*, defaults to `7`):
            Most steps of a solution.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Most tokens of a step.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Most samples of a problem.
        max_tokens (`int`, *optional*):
            Most tokens of a problem. By default `max_sequences * max_step_tokens`, which never binds.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice under a budget.

    Raises:
        `ValueError`: If a number is out of range, if the rule has no stop strings, or if the budget does not allow one branch down to `max_depth`.
    """

    rule: StepRule
    final_stops: tuple[str, ...] = ()
    num_children: int = 5
    max_depth: int = 7
    max_step_tokens: int = 512
    max_sequences: int = 4096
    max_tokens: int | None = None
    seed: int = 42

    def __post_init__(self):
        self.rule.stop_strings()  # raises if steps cannot be sampled one at a time
        for name in ("num_children", "max_depth", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more.")
        least = self.num_children * self.max_depth
        if self.max_sequences < least:
            raise ValueError(
                f"max_sequences is {self.max_sequences}, expected {least} or more: one branch down to max_depth="
                f"{self.max_depth} takes {self.num_children} samples at each depth."
            )
        if self.max_tokens is not None and self.max_tokens < least * self.max_step_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}, expected {least * self.max_step_tokens} or more: one branch down to "
                f"max_depth={self.max_depth} may take {least} samples of max_step_tokens={self.max_step_tokens}."
            )

    @property
    def first(self) -> Request:
        """The request that every problem starts with."""
        tokens = self.max_sequences * self.max_step_tokens if self.max_tokens is None else self.max_tokens
        return self._request(ROOT, None, 1.0, self.max_sequences, tokens)

    @property
    def max_samples(self) -> int:
        """Most samples of a request."""
        return self.num_children

    def start(self, opened: OpenTree) -> list[Request]:
        """Requests to begin a problem with."""
        return [self.first]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """Requests that become possible with the nodes that a request brought."""
        nodes = opened.tree.nodes
        depth = opened.tree.depth(request.node) + 1
        if depth == self.max_depth:
            return []
        open_nodes = [
            i for i in brought if nodes[i].finish == "stop" and not nodes[i].is_final and nodes[i].text.strip()
        ]
        sequences = request.sequences - request.n
        tokens = request.tokens - sum(len(nodes[i].token_ids) for i in brought)
        least = self.num_children * (self.max_depth - depth)  # samples of one branch from here to max_depth
        affordable = min(sequences // least, tokens // (least * self.max_step_tokens))
        chosen = choose(open_nodes, affordable, self.seed, opened.node_id(request))
        if not chosen:
            return []
        weight = len(open_nodes) / len(chosen)
        return [
            self._request(node, nodes[node].stop_reason, weight, *budget)
            for node, *budget in zip(chosen, share(sequences, len(chosen)), share(tokens, len(chosen)), strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        """Settings, for the manifest, which has the rule by itself."""
        return {"search": "full_tree"} | {name: value for name, value in asdict(self).items() if name != "rule"}

    def _request(self, node: int, header: str | None, weight: float, sequences: int, tokens: int) -> Request:
        return Request(
            node=node,
            n=self.num_children,
            role="step",
            stop=self.rule.stop_strings(header) + self.final_stops,
            max_tokens=self.max_step_tokens,
            weight=weight,
            sequences=sequences,
            tokens=tokens,
        )
