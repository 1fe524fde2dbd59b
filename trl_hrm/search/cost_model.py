"""Expected cost of a search: requests, samples, tokens and labels per problem, before anything is sampled."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

from .policies import FullTree, Rollouts, RootFilter, Search, share


@dataclass(frozen=True)
class SearchCost:
    """
    Expected cost of a search per problem.

    Args:
        requests (`float`):
            Number of requests to the engine.
        samples (`float`):
            Number of sampled steps or solutions.
        tokens (`float`):
            Number of sampled tokens.
        prefix_tokens (`float`):
            Number of tokens in front of the samples, summed over requests, without the prompt. An engine with a prefix cache has
            computed them before.
        labels (`float`):
            Number of steps with a label.
    """

    requests: float
    samples: float
    tokens: float
    prefix_tokens: float
    labels: float


def expected_cost(search: Search, step_tokens: float, solution_steps: Sequence[int]) -> SearchCost:
    r"""
    Return the expected cost of a search for one problem, budgets included.

    Every step has \\(T\\) tokens, and the number of steps \\(K\\) of a solution is drawn from `solution_steps`. In a tree, each child ends
    its solution with the probability \\(P(K = d \mid K \ge d)\\) of its depth \\(d\\). Every solution that ends has an answer that can be
    graded, and equal steps are counted separately. Without a budget, this gives

    - for [`FullTree`] with \\(b\\) children and depth \\(D\\): \\(\sum_{d=1}^{D} b^d \, P(K \ge d)\\) samples of \\(T\\) tokens;
    - for [`Rollouts`] with \\(s\\) solutions and \\(c\\) completions: \\(s \, (1 + c \, E[K - 1])\\) samples,
      \\(s \, T \, (E[K] + c \, E[K (K - 1)] / 2)\\) tokens and \\(s \, E[K]\\) labels.

    A step of a tree has a label if a solution that ended goes through it. The samples of a [`RootFilter`] are added, and every problem
    is assumed to pass it.

    Args:
        search ([`FullTree`], [`Rollouts`] or [`RootFilter`]):
            The search.
        step_tokens (`float`):
            Mean number of tokens per step, \\(T\\).
        solution_steps (`Sequence[int]`):
            Numbers of steps of some solutions. Each is equally likely.

    Raises:
        `ValueError`: If a number is below 1 or above the limits of the search, or the requests of the search depend on the grades.
    """
    if not solution_steps or min(solution_steps) < 1 or not step_tokens >= 1:
        raise ValueError(
            f"`step_tokens` is {step_tokens} and `solution_steps` is {solution_steps}. They must be at least 1, with one number of steps or "
            "more."
        )
    steps, total = Counter(solution_steps), len(solution_steps)
    mean = sum(solution_steps) / total
    if isinstance(search, RootFilter):
        cost = expected_cost(search.search, step_tokens, solution_steps)
        return SearchCost(
            cost.requests + 1,
            cost.samples + search.num_samples,
            cost.tokens + search.num_samples * mean * step_tokens,
            cost.prefix_tokens,
            cost.labels,
        )
    if isinstance(search, FullTree):
        if step_tokens > search.max_step_tokens:
            raise ValueError(f"`step_tokens` is {step_tokens}, above the max_step_tokens of {search.max_step_tokens}.")
        reached = [count / total for count in accumulate(steps[d] for d in range(max(steps), 0, -1))][::-1]
        ends = [steps[d] / total / reached[d - 1] for d in range(1, max(steps) + 1)]
        return _tree_cost(search, step_tokens, ends)
    if isinstance(search, Rollouts):
        if step_tokens * max(steps) > search.max_solution_tokens:
            raise ValueError(
                f"Solutions of {max(steps)} steps with {step_tokens} tokens are above the max_solution_tokens of "
                f"{search.max_solution_tokens}."
            )
        return _rollouts_cost(search, step_tokens, {number: count / total for number, count in steps.items()})
    raise ValueError(
        "The requests of search puct depend on the grades, so its cost cannot be estimated from lengths. Estimate it from a run of some of "
        "the problems."
    )


def _tree_cost(search: FullTree, step_tokens: float, ends: list[float]) -> SearchCost:
    """`ends[d]` is the probability that a child of a node of depth d ends its solution."""

    @cache
    def below(depth: int, sequences: int, tokens: int) -> tuple[float, float, float, float]:
        """
        Return the expected requests, prefix steps and labels of a request for a node and of all requests below it, and the probability
        that no solution below it ends. See [`FullTree.tell`].
        """
        n, left = search.num_children, search.max_depth - depth - 1
        requests, prefix, labels, none = 1.0, float(depth), n * ends[depth], (1 - ends[depth]) ** n
        if left == 0:
            return requests, prefix, labels, none
        sequences, tokens, none = sequences - n, math.floor(tokens - n * step_tokens), 0.0
        affordable = min(sequences // (n * left), tokens // (n * left * search.max_step_tokens))
        for num_open in range(n + 1):
            chance = math.comb(n, num_open) * (1 - ends[depth]) ** num_open * ends[depth] ** (n - num_open)
            chosen = min(num_open, affordable)
            if not chance:
                continue
            budgets = zip(share(sequences, chosen), share(tokens, chosen), strict=True) if chosen else ()
            parts = [below(depth + 1, *budget) for budget in budgets]
            requests += chance * sum(part[0] for part in parts)
            prefix += chance * sum(part[1] for part in parts)
            labels += chance * sum(part[2] + 1 - part[3] for part in parts)
            none += chance * math.prod(part[3] for part in parts) * (num_open == n)
        return requests, prefix, labels, none

    limit = search.max_sequences * search.max_step_tokens if search.max_tokens is None else search.max_tokens
    requests, prefix, labels, _ = below(0, search.max_sequences, limit)
    samples = requests * search.num_children
    return SearchCost(requests, samples, samples * step_tokens, prefix * step_tokens, labels)


def _rollouts_cost(search: Rollouts, step_tokens: float, chances: dict[int, float]) -> SearchCost:
    """`chances` has the probability of each number of steps."""
    n, each = search.num_solutions, search.num_completions
    mean = sum(number * chance for number, chance in chances.items())
    after = [  # mean number of steps that follow a prefix of k steps
        sum((number - k) * chance for number, chance in chances.items() if number > k)
        / sum(chance for number, chance in chances.items() if number > k)
        for k in range(max(chances))
    ]
    others = {0: 1.0}  # distribution of the number of prefixes of all solutions but one
    for _ in range(n - 1):
        summed: dict[int, float] = {}
        for have, chance in others.items():
            for number, more in chances.items():
                summed[have + number - 1] = summed.get(have + number - 1, 0.0) + chance * more
        others = summed
    requests, sampled, prefix = 1.0, n * mean, 0.0
    for number, chance in chances.items() if each else ():
        for have, other in others.items():
            found = have + number - 1  # number of prefixes of all solutions. As many as possible get completions
            affordable = (search.max_sequences - n) // each
            if search.max_tokens is not None:
                spent = (found + n) * step_tokens
                affordable = min(affordable, int((search.max_tokens - spent) // (each * search.max_solution_tokens)))
            weight = n * chance * other * min(affordable, found) / found if found else 0.0
            requests += weight * (number - 1)
            sampled += weight * each * sum(after[1:number])
            prefix += weight * sum(range(1, number))
    return SearchCost(
        requests, n + (requests - 1) * each, sampled * step_tokens, prefix * step_tokens, n + requests - 1
    )
