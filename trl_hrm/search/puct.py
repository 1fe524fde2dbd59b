"""Search for the first error where the value is uncertain (OmegaPRM): selection by PUCT, then bisection of a rollout."""

import math
from dataclasses import dataclass
from typing import Any

from .open_tree import OpenTree, Request
from .rollouts import check_rollouts
from .tree import ROOT


@dataclass(frozen=True)
class PUCT:
    r"""
    Spends a budget where it tells most: on wrong rollouts of prefixes that are neither always nor never solved
    ([OmegaPRM](https://huggingface.co/papers/2406.06592), section 3.3).

    The prompt gets `num_completions` rollouts. Then, again and again, one wrong rollout \\(r\\) of a judged prefix \\(s\\) with
    \\(0 < MC(s) < 1\\) is chosen by the highest \\(Q(s, r) + U(s)\\),

    \\[Q(s, r) = \alpha^{1 - MC(s)} \beta^{len(r) / L}, \qquad U(s) = c \frac{\sqrt{\sum_i N(s_i)}}{1 + N(s)}\\]

    with \\(N\\) the number of times that a prefix was chosen and \\(len\\) in tokens, and its first error is found by
    bisection: the prefix in the middle gets `num_completions` rollouts; if any of them is right the error comes later, else it
    is there or before. Every prefix that was judged joins the pool. The search ends when the budget is spent or no rollout is
    left.

    Requests of a problem follow one another, since each depends on the grades of the one before it; many problems are
    searched at a time.

    Args:
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        num_completions (`int`, *optional*, defaults to `8`):
            Rollouts from a prefix, \\(k\\).
        max_selections (`int`, *optional*, defaults to `20`):
            Most rollouts of a problem that are bisected.
        c_puct (`float`, *optional*, defaults to `0.125`):
            Weight of exploration, \\(c\\).
        alpha (`float`, *optional*, defaults to `0.5`):
            Preference for prefixes that are solved often, in (0, 1].
        beta (`float`, *optional*, defaults to `0.9`):
            Preference for short rollouts, in (0, 1].
        length_scale (`float`, *optional*, defaults to `500.0`):
            Tokens for which `beta` counts once, \\(L\\).
        max_solution_tokens, max_sequences, max_tokens:
            As in [`Rollouts`].
    """

    stop: tuple[str, ...]
    num_completions: int = 8
    max_selections: int = 20
    c_puct: float = 0.125
    alpha: float = 0.5
    beta: float = 0.9
    length_scale: float = 500.0
    max_solution_tokens: int = 2048
    max_sequences: int = 1024
    max_tokens: int | None = None

    def __post_init__(self):
        check_rollouts(self, first="num_completions")
        if self.max_selections < 1 or self.length_scale <= 0 or self.c_puct < 0:
            raise ValueError(
                f"max_selections is {self.max_selections}, length_scale {self.length_scale} and c_puct {self.c_puct}, expected "
                "1 or more, above 0, and 0 or more."
            )
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0, up to 1.")

    @property
    def first(self) -> Request:
        """The request that every problem starts with."""
        return self._request(ROOT)

    @property
    def max_samples(self) -> int:
        """Most samples of a request."""
        return self.num_completions

    def start(self, opened: OpenTree) -> list[Request]:
        """Requests to begin a problem with."""
        return [self.first]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """The next request, decided by all grades so far."""
        found = _Pool(self, opened).next()
        if found is None:
            return []
        request = self._request(found)
        asked = (opened.node_id(request), request.round) in opened.brought  # by a run that was stopped: it is paid for
        return [request] if asked or self._affords(opened) else []

    def _affords(self, opened: OpenTree) -> bool:
        # those of a root filter, whose rounds are negative, come on top
        rollouts = [node for node in opened.tree.nodes if node.role == "rollout" and node.round >= 0]
        if len(rollouts) + self.num_completions > self.max_sequences:
            return False
        tokens = sum(len(node.token_ids) for node in rollouts)
        return self.max_tokens is None or tokens + self.num_completions * self.max_solution_tokens <= self.max_tokens

    def _request(self, node: int) -> Request:
        return Request(
            node,
            self.num_completions,
            "rollout",
            self.stop,
            self.max_solution_tokens,
            cut=True,  # the right ones too: exports of wrong rollouts alone would be one-sided
        )

    def describe(self) -> dict[str, Any]:
        """Settings, for the manifest."""
        return {"search": "puct"} | vars(self)


class _Pool:
    """
    Judged prefixes and their wrong rollouts. Selection and bisection are replayed from the grades alone, so that the search
    keeps no state beside the tree.
    """

    def __init__(self, search: PUCT, opened: OpenTree):
        self.search = search
        self.opened = opened
        self.visits: dict[str, int] = {}
        self.used: set[int] = set()

    def next(self) -> int | None:
        """The node to continue from, or `None` if nothing is left to learn."""
        judged = [self.opened.root_id]
        for _ in range(self.search.max_selections):
            chosen = self._select(judged)
            if chosen is None:
                return None
            prefix, rollout = chosen
            self.visits[prefix] = self.visits.get(prefix, 0) + 1
            self.used.add(rollout)
            low, high = 0, len(self.opened.cuts[rollout])
            while high - low > 1:  # right after `low` steps, wrong after `high`
                middle = (low + high) // 2
                node = self.opened.segment(rollout, middle)
                node_id = self.opened.tree.nodes[node].node_id
                if (node_id, 0) not in self.opened.graded:
                    return node
                judged.append(node_id)
                share = self._share(node_id)
                if share is None:  # none of its rollouts came to an answer: nothing can be told
                    break
                low, high = (middle, high) if share else (low, middle)
        return None

    def _select(self, judged: list[str]) -> tuple[str, int] | None:
        total = sum(self.visits.values())
        best, found = -math.inf, None
        for prefix in judged:
            share = self._share(prefix)
            if share is None or not 0 < share < 1:
                continue
            explore = self.search.c_puct * math.sqrt(total) / (1 + self.visits.get(prefix, 0))
            for rollout in self.opened.brought[prefix, 0]:
                node = self.opened.tree.nodes[rollout]
                if node.correct is not False or rollout in self.used:
                    continue
                short = self.search.beta ** (len(node.token_ids) / self.search.length_scale)
                score = self.search.alpha ** (1 - share) * short + explore
                if score > best:
                    best, found = score, (prefix, rollout)
        return found

    def _share(self, node_id: str) -> float | None:
        """Share of right rollouts among those that were answered."""
        grades = [self.opened.tree.nodes[i].correct for i in self.opened.brought[node_id, 0]]
        answered = [correct for correct in grades if correct is not None]
        return sum(answered) / len(answered) if answered else None
