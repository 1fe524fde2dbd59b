"""
Searches: each decides what to sample next in the tree of a problem.

[`FullTree`] expands every node (HRM, section 3.2). [`Rollouts`] samples whole solutions and estimates each step with rollouts
(Math-Shepherd, ER-PRM). [`PUCT`] looks for the first error below prefixes with uncertain MC scores (OmegaPRM). [`RootFilter`] runs
a cheap test before any of them. Searches guided by a reward model are in `step_search.py`.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from .open_tree import OpenTree, Request
from .steps import StepRule
from .tree import ROOT


T = TypeVar("T")

FILTER_ROUND = -1  # round of the requests of a root filter


class Search(Protocol):
    """
    Interface between the scheduler and a search.

    A search keeps no state other than the tree, which is rebuilt from the log when a run is resumed. It does not sample. Results
    may arrive in any order.
    """

    @property
    def max_samples(self) -> int:
        """Maximum number of samples per request."""
        ...

    def start(self, opened: OpenTree) -> list[Request]:
        """Return the first requests of a problem."""
        ...

    def tell(self, opened: OpenTree, request: Request, brought: list[int]) -> list[Request]:
        """
        Return the next requests after the results of a request have arrived.

        Args:
            opened ([`OpenTree`]):
                The tree of the problem. The new nodes are graded and, in a search guided by a reward model, scored.
            request ([`Request`]):
                The request that has been answered.
            brought (`list[int]`):
                Indices of the nodes that it added. Empty if the policy's context was full.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """Return the settings for the manifest, without the step rule."""
        ...


def check_in_flight(search: Search, max_in_flight: int) -> None:
    """Raise `ValueError` if a request of the search has more samples than may be in flight."""
    if search.max_samples > max_in_flight:
        raise ValueError(
            f"`max_in_flight` is {max_in_flight}. It must be at least {search.max_samples}, the maximum number of samples per request "
            "of this search."
        )


@dataclass(frozen=True)
class FullTree:
    """
    Samples `num_children` next steps of every unfinished node, down to `max_depth`
    ([HRM](https://huggingface.co/papers/2503.13551), section 4.2: 5 to 6 children, depth 7).

    A full tree with 6 children and depth 7 has 335,922 nodes. If that exceeds the budget of a problem, only a random subset of
    the unfinished siblings is continued. Each is weighted by the number of siblings it represents (`Node.weight`), so the expected
    mean over children does not change. The budget is split from parent to children. The tree therefore does not depend on the
    order in which samples arrive, and every continued branch can reach `max_depth`.

    Args:
        rule ([`StepRule`]):
            Rule that decides where steps end.
        final_stops (`tuple[str, ...]`, *optional*, defaults to `()`):
            Strings that end a solution.
        num_children (`int`, *optional*, defaults to `5`):
            Number of children per unfinished node.
        max_depth (`int`, *optional*, defaults to `7`):
            Maximum number of steps per solution.
        max_step_tokens (`int`, *optional*, defaults to `512`):
            Maximum number of tokens per step.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Maximum number of samples per problem.
        max_tokens (`int`, *optional*):
            Maximum number of sampled tokens per problem. Defaults to `max_sequences * max_step_tokens`, which means no extra limit.
        seed (`int`, *optional*, defaults to `42`):
            Random seed for choosing nodes when the budget is too small for all.

    Raises:
        `ValueError`: If a number is out of range, if the rule has no stop strings, or if the budget is too small for one branch
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
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be at least 1.")
        least = self.num_children * self.max_depth
        if self.max_sequences < least:
            raise ValueError(
                f"`max_sequences` is {self.max_sequences}. It must be at least {least}, because one branch down to max_depth="
                f"{self.max_depth} takes {self.num_children} samples at each depth."
            )
        if self.max_tokens is not None and self.max_tokens < least * self.max_step_tokens:
            raise ValueError(
                f"`max_tokens` is {self.max_tokens}. It must be at least {least * self.max_step_tokens}, because one branch down "
                f"to max_depth={self.max_depth} may take {least} samples of max_step_tokens={self.max_step_tokens}."
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
    Samples `num_solutions` whole solutions, splits them into steps, and samples `num_completions` rollouts after each step except
    the last ([Math-Shepherd](https://huggingface.co/papers/2312.08935); [ER-PRM](https://huggingface.co/papers/2412.11006),
    section 4: 15 solutions, 16 rollouts). The label of the last step comes from the answer of the solution itself.

    If the budget of a problem is too small for rollouts after every step, a random subset of steps gets them. The other steps
    have no label.

    Args:
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        num_solutions (`int`, *optional*, defaults to `15`):
            Number of solutions per problem.
        num_completions (`int`, *optional*, defaults to `16`):
            Number of rollouts per step. 0 samples only the solutions, for example as candidates for a selection.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per solution or rollout.
        max_sequences (`int`, *optional*, defaults to `4096`):
            Maximum number of samples per problem.
        max_tokens (`int`, *optional*):
            Maximum number of sampled tokens per problem. Defaults to `max_sequences * max_solution_tokens`, which means no extra
            limit.
        seed (`int`, *optional*, defaults to `42`):
            Random seed for choosing steps when the budget is too small for all.

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
    """Check the settings of a search that samples whole solutions. `first` is the name of the setting for the first samples."""
    for name in (first, "max_solution_tokens"):
        if getattr(search, name) < 1:
            raise ValueError(f"`{name}` is {getattr(search, name)}. It must be at least 1.")
    if search.num_completions < 0:
        raise ValueError(f"`num_completions` is {search.num_completions}. It must be at least 0.")
    least = getattr(search, first)
    if search.max_sequences < least:
        raise ValueError(
            f"`max_sequences` is {search.max_sequences}. It must be at least `{first}`, which is {least}."
        )
    if search.max_tokens is not None and search.max_tokens < least * search.max_solution_tokens:
        raise ValueError(
            f"`max_tokens` is {search.max_tokens}. It must be at least {least * search.max_solution_tokens}, because the search "
            f"starts with {least} solutions of up to max_solution_tokens={search.max_solution_tokens}."
        )


@dataclass(frozen=True)
class PUCT:
    r"""
    Finds the first error of wrong rollouts by bisection, starting from prefixes with uncertain MC scores
    ([OmegaPRM](https://huggingface.co/papers/2406.06592), section 3.3).

    The search first samples `num_completions` rollouts of the prompt. It then repeats two steps. First, among the prefixes
    \\(s\\) with an MC score \\(0 < MC(s) < 1\\), it selects the wrong rollout \\(r\\) with the highest \\(Q(s, r) + U(s)\\),

    \\[Q(s, r) = \alpha^{1 - MC(s)} \beta^{len(r) / L}, \qquad U(s) = c \frac{\sqrt{\sum_i N(s_i)}}{1 + N(s)}\\]

    where \\(N\\) is the number of times a prefix has been selected and \\(len\\) is measured in tokens. Second, it finds the first
    error of \\(r\\) by bisection: it samples `num_completions` rollouts of the middle prefix. If any of them is right, the error
    comes later; otherwise it is there or earlier. Every prefix with an MC score can be selected later. The search ends when the
    budget is used up or no wrong rollout is left.

    The requests of one problem run one after another, because each depends on the grades of the previous one. Problems run in
    parallel.

    Args:
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        num_completions (`int`, *optional*, defaults to `8`):
            Number of rollouts per prefix, \\(k\\).
        max_selections (`int`, *optional*, defaults to `20`):
            Maximum number of bisected rollouts per problem.
        c_puct (`float`, *optional*, defaults to `0.125`):
            Exploration constant, \\(c\\).
        alpha (`float`, *optional*, defaults to `0.5`):
            Preference for prefixes with a high MC score, in (0, 1]. Smaller values are stronger.
        beta (`float`, *optional*, defaults to `0.9`):
            Preference for short rollouts, in (0, 1]. Smaller values are stronger.
        length_scale (`float`, *optional*, defaults to `500.0`):
            Length scale of `beta` in tokens, \\(L\\).
        max_solution_tokens, max_sequences, max_tokens:
            See [`Rollouts`].

    Raises:
        `ValueError`: If a number is out of range.
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
                f"`max_selections` is {self.max_selections}, `length_scale` is {self.length_scale} and `c_puct` is {self.c_puct}. "
                "They must be at least 1, greater than 0, and at least 0."
            )
        for name in ("alpha", "beta"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It must be in (0, 1].")

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
        if (opened.node_id(request), request.round) in opened.brought:  # sampled by an interrupted run
            return [request]
        # samples of a root filter have negative rounds and a separate budget
        spent = [len(node.token_ids) for node in opened.tree.nodes if node.role == "rollout" and node.round >= 0]
        if len(spent) + self.num_completions > self.max_sequences:
            return []
        most = sum(spent) + self.num_completions * self.max_solution_tokens
        return [request] if self.max_tokens is None or most <= self.max_tokens else []

    def describe(self) -> dict[str, Any]:
        return {"search": "puct"} | vars(self)

    def _request(self, node: int) -> Request:
        # right rollouts are also split into steps, because exports need both kinds
        return Request(node, self.num_completions, "rollout", self.stop, self.max_solution_tokens, cut=True)


class _Pool:
    """
    Prefixes with MC scores and their wrong rollouts. The search keeps no state: all selections and bisections are recomputed from
    the grades.
    """

    def __init__(self, search: PUCT, opened: OpenTree):
        self.search = search
        self.opened = opened
        self.visits: dict[str, int] = {}
        self.used: set[int] = set()

    def next(self) -> int | None:
        """Return the node to sample rollouts from, or `None` if the search has ended."""
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
                if share is None:  # none of its rollouts has an answer
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
        """Return MC(s), the fraction of rollouts with an answer that are right."""
        grades = [self.opened.tree.nodes[i].correct for i in self.opened.brought[node_id, 0]]
        answered = [correct for correct in grades if correct is not None]
        return sum(answered) / len(answered) if answered else None


@dataclass(frozen=True)
class RootFilter:
    """
    Skips problems that the policy always or never solves, because all their steps would have the same label. It samples
    `num_samples` solutions and starts `search` only if some are right and some are wrong.

    Args:
        search ([`FullTree`], [`Rollouts`] or [`PUCT`]):
            Search to run on the remaining problems.
        num_samples (`int`):
            Number of solutions to sample for the decision.
        stop (`tuple[str, ...]`):
            Strings that end a solution.
        max_solution_tokens (`int`, *optional*, defaults to `2048`):
            Maximum number of tokens per solution.
    """

    search: Search
    num_samples: int
    stop: tuple[str, ...]
    max_solution_tokens: int = 2048

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"The root filter has {self.num_samples} samples. It must have at least 2.")

    @property
    def rule(self) -> StepRule:
        """Step rule of the search, if it has one."""
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
    Return `"always_solved"` or `"never_solved"` if a root filter drops the problem, otherwise `None`. A solution without an answer
    counts as wrong. A solution with an answer that could not be graded may be right.
    """
    brought = [opened.tree.nodes[i] for i in opened.brought.get((opened.root_id, FILTER_ROUND), ())]
    if brought and all(node.correct for node in brought):
        return "always_solved"
    if brought and not any(node.correct or (node.answer is not None and node.correct is None) for node in brought):
        return "never_solved"
    return None


def choose(items: list[T], number: int, seed: int, node_id: str) -> list[T]:
    """Return `number` random items in their original order. The choice depends only on the seed and the node."""
    if number >= len(items):
        return items
    rng = random.Random(f"{seed}/{node_id}")
    return [items[i] for i in sorted(rng.sample(range(len(items)), number))]


def share(total: int, number: int) -> list[int]:
    """Split `total` into `number` parts that differ by at most one."""
    return [total // number + (i < total % number) for i in range(number)]
