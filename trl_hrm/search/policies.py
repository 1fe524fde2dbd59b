"""
Search policies: what to sample next in the tree of a problem.

[`FullTree`] grows every node (HRM, section 3.2), [`Rollouts`] judges each step of whole solutions (Math-Shepherd, ER-PRM),
[`PUCT`] looks for the first error where the value is uncertain (OmegaPRM), and [`RootFilter`] puts a cheap test before any of
them. Searches led by the scores of a reward model are in `step_search.py`.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from .open_tree import OpenTree, Request
from .steps import StepRule
from .tree import ROOT


T = TypeVar("T")

FILTER_ROUND = -1  # of the requests of a root filter


class Search(Protocol):
    """
    What the scheduler asks of a search.

    A search decides by the tree alone, which is rebuilt from the log when a run is resumed. It never samples, and it can be told
    the answers in any order.
    """

    @property
    def max_samples(self) -> int:
        """Maximum number of samples of a request."""
        ...

    def start(self, opened: OpenTree) -> list[Request]:
        """Return the first requests of a problem."""
        ...

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """
        Return the requests that follow from the answer to a request.

        Args:
            opened ([`OpenTree`]):
                The tree of the problem, in which the answer is graded and, in a search led by step scores, scored.
            request ([`Request`]):
                The request that was answered.
            brought (`list[int]`):
                Indices of the nodes that it brought. Empty if the policy had no room for another token.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return the settings, for the manifest. The step rule is not one of them."""
        ...


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
            Tells where steps end.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution.
        num_children (`int`, *optional*, defaults to `5`):
            Number of children of an open node.
        max_depth (`int`, *optional*, defaults to `7`):
            Maximum number of steps of a solution.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens of a step.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Maximum number of samples of a problem.
        max_tokens (`int`, *optional*):
            Maximum number of tokens of a problem. The default is `max_sequences * max_step_tokens`, which is never reached first.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice under a budget.

    Raises:
        `ValueError`: If a number is out of range, if the rule has no stop strings, or if the budget does not allow one branch
        down to `max_depth`.
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
    def max_samples(self) -> int:
        return self.num_children

    def start(self, opened: OpenTree) -> list[Request]:
        tokens = self.max_sequences * self.max_step_tokens if self.max_tokens is None else self.max_tokens
        return [self._request(ROOT, None, 1.0, self.max_sequences, tokens)]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
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
            Number of solutions of a problem.
        num_completions (`int`, *optional*, defaults to `16`):
            Number of completions from a step. With 0 there are only the solutions, as candidates for a selection.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens of a solution or a completion.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Maximum number of samples of a problem.
        max_tokens (`int`, *optional*):
            Maximum number of tokens of a problem. The default is `max_sequences * max_solution_tokens`, which is
            never reached first.
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
        _check_rollouts(self, first="num_solutions")

    @property
    def max_samples(self) -> int:
        return max(self.num_solutions, self.num_completions)

    def start(self, opened: OpenTree) -> list[Request]:
        return [Request(ROOT, self.num_solutions, "rollout", self.stop, self.max_solution_tokens, cut=True)]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
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
        return {"search": "rollouts"} | vars(self)


def _check_rollouts(search: "Rollouts | PUCT", first: str) -> None:
    """Check the settings of a search that samples whole solutions. `first` names the number of samples that it begins with."""
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
            Number of rollouts from a prefix, \\(k\\).
        max_selections (`int`, *optional*, defaults to `20`):
            Maximum number of rollouts of a problem that are bisected.
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
        _check_rollouts(self, first="num_completions")
        if self.max_selections < 1 or self.length_scale <= 0 or self.c_puct < 0:
            raise ValueError(
                f"max_selections is {self.max_selections}, length_scale {self.length_scale} and c_puct {self.c_puct}, expected "
                "1 or more, above 0, and 0 or more."
            )
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number above 0, up to 1.")

    @property
    def max_samples(self) -> int:
        return self.num_completions

    def start(self, opened: OpenTree) -> list[Request]:
        return [self._request(ROOT)]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        node = _Pool(self, opened).next()
        if node is None:
            return []
        request = self._request(node)
        if (opened.node_id(request), request.round) in opened.brought:  # already paid for by a run that was stopped
            return [request]
        # the samples of a root filter, whose rounds are negative, have a budget of their own
        spent = [len(node.token_ids) for node in opened.tree.nodes if node.role == "rollout" and node.round >= 0]
        if len(spent) + self.num_completions > self.max_sequences:
            return []
        most = sum(spent) + self.num_completions * self.max_solution_tokens
        return [request] if self.max_tokens is None or most <= self.max_tokens else []

    def describe(self) -> dict[str, Any]:
        return {"search": "puct"} | vars(self)

    def _request(self, node: int) -> Request:
        # right rollouts are cut into steps too: exports of the wrong ones alone would be one-sided
        return Request(node, self.num_completions, "rollout", self.stop, self.max_solution_tokens, cut=True)


class _Pool:
    """
    Judged prefixes and their wrong rollouts. Selections and bisections are repeated from the grades, so that the search keeps no
    state of its own.
    """

    def __init__(self, search: PUCT, opened: OpenTree):
        self.search = search
        self.opened = opened
        self.visits: dict[str, int] = {}
        self.used: set[int] = set()

    def next(self) -> int | None:
        """Return the node to continue from, or `None` if nothing is left to learn."""
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
        """Return the prefix and the wrong rollout with the highest Q + U."""
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
        """MC(s): the share of right rollouts among those with an answer."""
        grades = [self.opened.tree.nodes[i].correct for i in self.opened.brought[node_id, 0]]
        answered = [correct for correct in grades if correct is not None]
        return sum(answered) / len(answered) if answered else None


@dataclass(frozen=True)
class RootFilter:
    """
    Samples `num_samples` solutions first, and starts `search` only if some of them are right and some are not. The steps of a
    problem that the policy always or never solves would all have the same label.

    Args:
        search ([`FullTree`], [`Rollouts`] or [`PUCT`]):
            The search of the problems that are kept.
        num_samples (`int`):
            Number of solutions to decide by.
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens of a solution.
    """

    search: Search
    num_samples: int
    stop: tuple[str, ...]
    max_solution_tokens: int = 2048

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"the root filter has {self.num_samples} samples, expected 2 or more.")

    @property
    def rule(self) -> StepRule:
        """The rule of the search, if it has one."""
        return self.search.rule

    @property
    def max_samples(self) -> int:
        return max(self.num_samples, self.search.max_samples)

    def start(self, opened: OpenTree) -> list[Request]:
        return [Request(ROOT, self.num_samples, "rollout", self.stop, self.max_solution_tokens, round=FILTER_ROUND)]

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        if request.round != FILTER_ROUND:
            return self.search.tell(opened, request, brought)
        return [] if filter_status(opened) else self.search.start(opened)

    def describe(self) -> dict[str, Any]:
        return self.search.describe() | {
            "root_filter": {"num_samples": self.num_samples, "max_solution_tokens": self.max_solution_tokens}
        }


def filter_status(opened: OpenTree) -> str | None:
    """
    Return `"always_solved"` or `"never_solved"` if a root filter drops the problem. A solution without an answer is wrong. One
    whose answer could not be graded may be right.
    """
    brought = [opened.tree.nodes[i] for i in opened.brought.get((opened.root_id, FILTER_ROUND), ())]
    if brought and all(node.correct for node in brought):
        return "always_solved"
    if brought and not any(node.correct or (node.answer is not None and node.correct is None) for node in brought):
        return "never_solved"
    return None


def choose(items: list[T], number: int, seed: int, node_id: str) -> list[T]:
    """Return `number` random items in their order. The choice depends on seed and node, not on the order of arrival."""
    if number >= len(items):
        return items
    rng = random.Random(f"{seed}/{node_id}")
    return [items[i] for i in sorted(rng.sample(range(len(items)), number))]


def share(total: int, number: int) -> list[int]:
    """Split `total` into `number` parts that differ by at most one."""
    return [total // number + (i < total % number) for i in range(number)]
