"""Compare MC scores with slow references, and entropy labels with high-precision arithmetic."""

import itertools
import math
import random

import mpmath
import pytest

from trl_hrm.search.tree import ROOT, Node, Problem, SearchTree
from trl_hrm.search.values import ESTIMATORS, TRUNCATED, LeafCounts, entropy_label, leaf_counts, make_label, mc_scores

from .random_trees import add_node, end, full_tree, random_tree, rollout_tree, slow_leaves, slow_score


def many_trees(number: int) -> list[SearchTree]:
    rng = random.Random(0)
    return [rng.choice([random_tree, rollout_tree])(rng, f"{i}") for i in range(number)]


def grow(*nodes: tuple) -> SearchTree:
    """Build a tree from nodes (parent, correct). `None` means that the node does not end with an answer."""
    tree = SearchTree(Problem("p", "p?", "7"))
    for place, (parent, correct) in enumerate(nodes):
        add_node(tree, parent, place, f"{place}")
        if correct is not None:
            end(tree.nodes[-1], correct)
    return tree


def test_counts_equal_the_leaves():
    """Counting a leaf twice, as a rollout and as its steps, would change shares without an error."""
    found = set()
    for tree in many_trees(60):
        counts = leaf_counts(tree)
        assert len(counts) == len(tree.nodes) + 1
        for i in [*range(len(tree.nodes)), ROOT]:
            node = None if i == ROOT else tree.nodes[i]
            if node and node.role == "segment" and not any(other.parent == i for other in tree.nodes):
                assert sum(counts[i][1:]) <= 1  # the last step of a cut rollout ends like the rollout
            leaves = slow_leaves(tree, i)
            right, wrong, unresolved = (leaves.count(kind) for kind in ("right", "wrong", "unresolved"))
            assert counts[i] == LeafCounts(right, right + wrong, unresolved)
            found |= set(leaves)
    assert found == {"right", "wrong", "ungraded", "skipped", "unresolved"}


def test_counts_of_a_node_are_the_sums_over_its_children():
    for tree in many_trees(60):
        counts = leaf_counts(tree)
        children = tree.children()
        for i in [*range(len(tree.nodes)), ROOT]:
            below = [counts[j] for j in children[i] if tree.nodes[j].role != "segment"]
            if below:
                assert counts[i] == LeafCounts(*map(sum, zip(*below, strict=True)))
        if all(node.role == "step" for node in tree.nodes):
            answered = [node.correct for node in tree.nodes if node.correct is not None]
            assert (counts[ROOT].correct, counts[ROOT].answered) == (sum(answered), len(answered))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("truncated", TRUNCATED)
def test_scores_follow_the_definition(estimator, truncated):
    for tree in many_trees(60):
        rng = random.Random(len(tree.nodes))
        for node in tree.nodes:
            node.value = rng.random() if rng.random() < 0.05 else None
        scores = mc_scores(tree, estimator, truncated)
        expected = [slow_score(tree, i, estimator, truncated) for i in [*range(len(tree.nodes)), ROOT]]
        assert [score is None for score in scores] == [score is None for score in expected]
        assert [s for s in scores if s is not None] == pytest.approx([s for s in expected if s is not None], abs=1e-12)


def test_estimators_by_hand():
    """Of a branch with one leaf and one with three, child mean weights branches equally, leaf share weights leaves."""
    tree = grow((ROOT, True), (ROOT, None), (1, False), (1, False), (1, True))
    assert mc_scores(tree, "child_mean") == pytest.approx([1, 1 / 3, 0, 0, 1, 2 / 3])
    assert mc_scores(tree, "leaf_share") == pytest.approx([1, 1 / 3, 0, 0, 1, 1 / 2])
    assert leaf_counts(tree)[ROOT] == LeafCounts(2, 4, 0)


def test_child_mean_is_unbiased_where_leaf_share_is_not():
    """Right solutions end early, so over all trees of such a policy the leaf share is below P(right)."""
    means = {"child_mean": 0.0, "leaf_share": 0.0}
    for first in itertools.product([True, False], repeat=2):  # each child of the prompt ends right or continues
        nodes = [(ROOT, True if ends else None) for ends in first]
        nodes += [(i, False) for i, ends in enumerate(first) if not ends for _ in range(2)]
        for estimator in means:
            means[estimator] += mc_scores(grow(*nodes), estimator)[ROOT] / 4
    assert means["child_mean"] == pytest.approx(0.5, abs=1e-12)
    assert means["leaf_share"] == pytest.approx((1 + 1 / 3 + 1 / 3 + 0) / 4)


def test_weights_keep_the_mean():
    """Continuing one of two open siblings on behalf of both must not change the parent's expected value."""
    scores = []
    for chosen in (1, 2):
        tree = grow((ROOT, True), (ROOT, None), (ROOT, None), (chosen, chosen == 1))
        tree.nodes[chosen].weight = 2.0
        assert leaf_counts(tree)[3 - chosen] == LeafCounts(0, 0, 0)
        assert mc_scores(tree, truncated="wrong")[3 - chosen] is None
        scores.append(mc_scores(tree, truncated="wrong")[ROOT])
    assert scores == pytest.approx([1, 1 / 3])
    assert sum(scores) / 2 == pytest.approx(
        mc_scores(grow((ROOT, True), (ROOT, None), (ROOT, None), (1, True), (2, False)))[ROOT]
    )


def test_step_without_text_is_not_weighted():
    """It could not have been continued, so its siblings do not represent it."""
    tree = grow((ROOT, None), (ROOT, None), (ROOT, None), (0, True))
    tree.nodes[0].weight, tree.nodes[1].text = 2.0, " \n"
    assert leaf_counts(tree)[1:3] == [LeafCounts(0, 0, 1), LeafCounts(0, 0, 0)]


def test_truncated_matters_only_where_a_leaf_is_unresolved():
    num_differing = 0
    for tree in many_trees(80):
        counts = leaf_counts(tree)
        for estimator in ESTIMATORS:
            drop, wrong = (mc_scores(tree, estimator, truncated) for truncated in TRUNCATED)
            for i, count in enumerate(counts):
                if count.unresolved == 0:
                    assert drop[i] == wrong[i]
                elif drop[i] != wrong[i]:
                    num_differing += 1
                    assert drop[i] is None or wrong[i] <= drop[i]
    assert num_differing > 100


def test_ungraded_answer_is_not_a_label():
    """Reading a grader timeout as wrong would lower the score of every step above it."""
    tree = grow((ROOT, None), (0, True), (0, None))
    end(tree.nodes[2], None, ungraded=True)
    for estimator, truncated in itertools.product(ESTIMATORS, TRUNCATED):
        assert mc_scores(tree, estimator, truncated) == [1, 1, None, 1]
    assert leaf_counts(tree)[2] == LeafCounts(0, 0, 0)


def test_steps_of_a_rollout():
    """Inner steps are judged only by their own rollouts. The last one ends like its rollout."""
    tree = SearchTree(Problem("p", "p?", "7"))
    add_node(tree, ROOT, 0, "whole", role="rollout")
    end(tree.nodes[0], False)
    for above, role in ((ROOT, "segment"), (1, "segment"), (2, "segment"), (1, "rollout"), (1, "rollout")):
        add_node(tree, above, 0, "x", role=role)
    for i, correct in ((3, False), (4, True), (5, False)):
        end(tree.nodes[i], correct)
    assert mc_scores(tree) == mc_scores(tree, "leaf_share") == [0, 1 / 2, None, 0, 1, 0, 0]
    assert leaf_counts(tree)[1:4] == [LeafCounts(1, 2, 0), LeafCounts(0, 0, 0), LeafCounts(0, 1, 0)]
    assert leaf_counts(tree)[ROOT] == LeafCounts(0, 1, 0)


def test_deep_trees():
    """Recursion would fail at a depth of a thousand, or take seconds on a long chain."""
    chain = SearchTree(Problem("p", "p?", "7"))
    chain.nodes = [Node(f"{i}", i - 1, 0, 0, [], "x") for i in range(10_000)]
    end(chain.nodes[-1], True)
    assert mc_scores(chain) == [1.0] * 10_001
    assert leaf_counts(chain)[ROOT] == LeafCounts(1, 1, 0)


def test_unknown_options():
    tree = full_tree(random.Random(0))
    with pytest.raises(ValueError, match="`estimator` is 'mean'.*child_mean, leaf_share"):
        mc_scores(tree, "mean")
    with pytest.raises(ValueError, match="`truncated` is 'keep'.*drop, wrong"):
        mc_scores(tree, truncated="keep")
    with pytest.raises(ValueError, match="'er'.*soft, hard, entropy"):
        make_label(0.5, "er", 1.0)


ETAS = [0.001, 0.1, 0.5, 1, 2, 5, 20, 100, 300, 699.9, 700, 710, 800, 5000]


def exact_entropy_label(p: float, eta: float) -> mpmath.mpf:
    """Compute equation 1 of ER-PRM directly."""
    with mpmath.workdps(60 + int(abs(eta) / 2)):
        p, eta = mpmath.mpf(p), mpmath.mpf(eta)
        return mpmath.log(p * mpmath.exp(eta) + (1 - p)) / eta


@pytest.mark.parametrize("eta", [sign * eta for eta in ETAS for sign in (1, -1)])
def test_entropy_labels_are_exact(eta):
    """The plain formula overflows at 710, and loses all digits near 0 and for p near 1 with negative eta."""
    grid = {
        correct / total
        for total in (1, 2, 3, 5, 16, 125, 3125)
        for correct in range(0, total + 1, max(1, total // 16))
    }
    for p in sorted(grid | {1e-9, 1 - 1e-9, 1 - 2**-53}):
        label = entropy_label(p, eta)
        assert abs(label - exact_entropy_label(p, eta)) <= 1e-12
        assert 0 <= label <= 1


def test_entropy_labels_at_the_limits():
    shares = [i / 16 for i in range(17)]
    for p in shares:
        assert entropy_label(p, 0) == p
        for eta in (1e-6, -1e-6):
            assert abs(entropy_label(p, eta) - p) < 1e-6
        assert entropy_label(p, 1e-320) == entropy_label(p, -1e-320) == p  # not a quotient of subnormal numbers
        assert entropy_label(p, math.inf) == make_label(p, "hard")
        assert entropy_label(p, -math.inf) == float(p == 1)
    for eta in (1e-6, 1, 300, 800, -1e-6, -1, -300, -800):
        assert (entropy_label(0, eta), entropy_label(1, eta)) == (0, 1)
        assert math.isfinite(entropy_label(0.5, eta))
    assert round(entropy_label(4 / 16, 1), 3) == 0.357
    assert entropy_label(1 / 16, 20) == pytest.approx(0.861, abs=1e-3)  # convergence to the hard label is slow


def test_entropy_labels_are_monotone():
    shares, etas = [i / 64 for i in range(65)], [-300, -20, -3, -1, -0.01, 0, 1e-3, 0.5, 1, 4, 50, 300, 1000]
    for eta in etas:
        labels = [entropy_label(p, eta) for p in shares]
        assert all(a < b for a, b in itertools.pairwise(labels))
    for p in shares[1:-1]:
        labels = [entropy_label(p, eta) for eta in etas]
        assert all(a < b for a, b in itertools.pairwise(labels))


def test_make_label():
    assert [make_label(p) for p in (0.0, 0.25, 1.0)] == [0.0, 0.25, 1.0]
    assert [make_label(p, "hard") for p in (0.0, 1e-9, 1.0)] == [0.0, 1.0, 1.0]
    assert make_label(0.25, "entropy", 1.0) == entropy_label(0.25, 1.0)
