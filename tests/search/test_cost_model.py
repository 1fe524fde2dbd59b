"""The expected cost of a search is the mean over everything that can happen, and over runs of the search."""

import random
from collections.abc import Callable
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest

from trl_hrm.search.cost_model import expected_cost
from trl_hrm.search.policies import PUCT, FullTree, Rollouts, RootFilter
from trl_hrm.search.tree import ROOT

from .scripted import FINAL, RULE, make_problems, read_trees, run_scripted


T = 10


def tree(num_children: int, max_depth: int, **budget: int) -> FullTree:
    return FullTree(RULE, FINAL, num_children, max_depth, max_step_tokens=T, **budget)


def grow(search: FullTree, ends: Callable[[int], bool]) -> np.ndarray:
    """
    Run a search whose children end if `ends(depth)` says so. Return requests, samples, tokens, prefix tokens and labels, counted one by one.
    """
    nodes: list[SimpleNamespace] = []
    depth = lambda i: 0 if i == ROOT else 1 + depth(nodes[i].parent)  # noqa: E731
    opened = SimpleNamespace(tree=SimpleNamespace(nodes=nodes, depth=depth), node_id=lambda request: str(request.node))
    waiting, num_requests, prefix = search.start(opened), 0, 0
    while waiting:
        request = waiting.pop(0)
        num_requests, prefix = num_requests + 1, prefix + depth(request.node) * T
        brought = []
        for _ in range(request.n):
            is_final = ends(depth(request.node) + 1)
            nodes.append(
                SimpleNamespace(
                    parent=request.node,
                    token_ids=[0] * T,
                    finish="stop",
                    is_final=is_final,
                    text="step",
                    stop_reason=None,
                )
            )
            brought.append(len(nodes) - 1)
        waiting += search.tell(opened, request, brought)
    labelled = set()
    for i, node in enumerate(nodes):
        while node.is_final and i != ROOT:
            labelled.add(i)
            i = nodes[i].parent
    return np.array([num_requests, len(nodes), len(nodes) * T, prefix, len(labelled)])


def mean_over_all_outcomes(search: FullTree, chances: dict[int, float]) -> np.ndarray:
    """Enumerate the outcomes of all draws that the search makes. `chances` has the probability of an end at each depth."""
    total, script = np.zeros(5), []
    summed = 0.0
    while True:
        drawn: list[tuple[bool, float]] = []  # each outcome and the probability of an end

        def ends(depth: int) -> bool:
            outcome = script[len(drawn)] if len(drawn) < len(script) else chances[depth] > 0  # noqa: B023
            drawn.append((outcome, chances[depth]))  # noqa: B023
            return outcome

        counted = grow(search, ends)
        chance = np.prod([end if outcome else 1 - end for outcome, end in drawn])
        total, summed = total + chance * counted, summed + chance
        while drawn and (not drawn[-1][0] or drawn[-1][1] == 1):  # has no other outcome left
            drawn.pop()
        if not drawn:
            assert summed == pytest.approx(1)
            return total
        script = [outcome for outcome, _ in drawn[:-1]] + [False]


def numbers(cost) -> np.ndarray:
    return np.array([cost.requests, cost.samples, cost.tokens, cost.prefix_tokens, cost.labels])


class TestFullTree:
    @pytest.mark.parametrize(
        ("search", "steps"),
        [
            (tree(2, 3), [1, 2, 2, 4]),
            (tree(2, 3), [2, 3]),
            (tree(3, 2), [1, 3]),
            (tree(2, 4), [2, 2, 3]),
            (tree(2, 3, max_sequences=8), [1, 2, 4]),  # one of two open children is continued
            (tree(2, 3, max_sequences=11), [1, 2, 4]),
            (tree(3, 2, max_sequences=10), [2, 4]),
            (tree(2, 3, max_tokens=80), [1, 2, 4]),
        ],
    )
    def test_mean_over_all_outcomes(self, search, steps):
        chances = {
            depth: steps.count(depth) / sum(number >= depth for number in steps) for depth in range(1, max(steps) + 1)
        }
        expected = mean_over_all_outcomes(search, chances)
        np.testing.assert_allclose(numbers(expected_cost(search, T, steps)), expected, rtol=1e-12)

    def test_size_of_the_papers_tree(self):
        """Six children down to depth 7 have 335,922 nodes. None has a label if every solution is cut off."""
        cost = expected_cost(tree(6, 7, max_sequences=10**6), T, [8])
        assert cost.samples == sum(6**depth for depth in range(1, 8)) == 335_922 and cost.labels == 0
        cost = expected_cost(tree(6, 7, max_sequences=10**6), T, [7])
        assert cost.labels == 335_922 and cost.tokens == 3_359_220

    def test_formula(self):
        steps = [2, 3, 3, 5, 7, 9]
        cost = expected_cost(tree(5, 7, max_sequences=10**6), T, steps)
        at_least = [sum(number >= depth for number in steps) / len(steps) for depth in range(1, 8)]
        assert cost.samples == pytest.approx(sum(5**d * share for d, share in enumerate(at_least, 1)))

    def test_mean_over_runs_of_the_scheduler(self, tmp_path):
        """Tokens and samples that a real run counts, with an engine whose lengths are drawn from the same list."""
        steps, search = [1, 2, 2, 4], FullTree(RULE, FINAL, 3, 4, max_step_tokens=60, max_sequences=40)

        def write(prefix: str, rng: random.Random) -> str:
            done = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1].count("# Step ")
            step = max(done, 1)
            ending = rng.random() < steps.count(step) / sum(number >= step for number in steps)
            return ("\n" if done else "# Step 1\n") + (
                "x\n\n# Answer\n\n7\n# END!" if ending else f"x\n\n# Step {step + 1}\n"
            )

        progress = run_scripted(tmp_path, search, make_problems(60), write)
        cost = expected_cost(search, 20, steps)
        counted = [len(tree.nodes) for tree in read_trees(tmp_path).values()]
        error = np.std(counted, ddof=1) / len(counted) ** 0.5
        print(f"samples per problem: {np.mean(counted):.2f} counted, {cost.samples:.2f} expected, error {error:.2f}")
        assert abs(np.mean(counted) - cost.samples) < 4 * error < 6
        assert abs(progress.num_requests / 60 - cost.requests) < 4 * error / 3


class TestRollouts:
    @pytest.mark.parametrize(
        ("budget", "steps"),
        [
            ({}, [1, 2, 4]),
            ({}, [3]),
            ({"max_sequences": 9}, [1, 2, 4]),  # completions of 3 prefixes at most
            ({"max_tokens": 380}, [1, 2, 3]),
            ({"num_completions": 0}, [1, 2, 4]),
        ],
    )
    def test_mean_over_all_outcomes(self, budget, steps):
        """Every length of every solution, and every choice of prefixes if the budget is too small for all."""
        search = Rollouts(FINAL, **({"num_solutions": 3, "num_completions": 2, "max_solution_tokens": 40} | budget))
        n, each = search.num_solutions, search.num_completions
        after = [np.mean([number - k for number in steps if number > k]) for k in range(max(steps))]
        total = np.zeros(5)
        outcomes = list(product(steps, repeat=n))
        for lengths in outcomes:
            prefixes = [k for length in lengths for k in range(1, length)] if each else []
            affordable = (search.max_sequences - n) // each if each else 0
            if search.max_tokens is not None:
                affordable = min(affordable, (search.max_tokens - T * sum(lengths)) // (each * 40))
            chosen = list(combinations(prefixes, min(affordable, len(prefixes))))
            for some in chosen:
                tokens = T * (sum(lengths) + each * sum(after[k] for k in some))
                counts = [1 + len(some), n + each * len(some), tokens, T * sum(some), n + len(some)]
                total += np.array(counts) / len(chosen) / len(outcomes)
        np.testing.assert_allclose(numbers(expected_cost(search, T, steps)), total, rtol=1e-12)

    def test_labels_of_the_paper(self):
        """ER-PRM has 1.5 million labels of 260,000 solutions: 5.8 steps per solution, each with a label."""
        steps = [5, 6, 6, 6]
        cost = expected_cost(Rollouts(FINAL), T, steps)
        assert cost.labels == pytest.approx(15 * 5.75) and cost.samples == pytest.approx(15 * (1 + 16 * 4.75))
        assert cost.tokens == pytest.approx(15 * T * (5.75 + 16 * np.mean([k * (k - 1) / 2 for k in steps])))

    def test_root_filter(self):
        search = Rollouts(FINAL, 3, 2)
        cost, filtered = (numbers(expected_cost(one, T, [2, 4])) for one in (search, RootFilter(search, 8, FINAL)))
        np.testing.assert_allclose(filtered - cost, [1, 8, 8 * 3 * T, 0, 0])


@pytest.mark.parametrize(
    ("search", "tokens", "steps", "message"),
    [
        (tree(2, 3), 10, [], "`solution_steps` is \\[\\]"),
        (tree(2, 3), 10, [0, 2], "at least 1"),
        (tree(2, 3), 0, [2], "`step_tokens` is 0"),
        (tree(2, 3), 11, [2], "above the max_step_tokens of 10"),
        (Rollouts(FINAL, max_solution_tokens=30), 10, [2, 4], "Solutions of 4 steps with 10 tokens"),
        (PUCT(FINAL), 10, [2], "depend on the grades"),
    ],
)
def test_impossible_numbers(search, tokens, steps, message):
    with pytest.raises(ValueError, match=message):
        expected_cost(search, tokens, steps)
