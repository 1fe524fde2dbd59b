"""Node compression: what it keeps, how it changes mean and variance, and that it never changes the stored tree."""

import copy
import itertools
import random
from collections import Counter
from dataclasses import replace
from statistics import mean, pvariance

import pytest

from trl_hrm.search import compression
from trl_hrm.search.compression import choose_moves, compress, count_moves, move_up
from trl_hrm.search.tree import ROOT, SearchTree, walk
from trl_hrm.search.values import leaf_counts, mc_scores

from .random_trees import add_node, empty_tree, end, full_tree, random_tree, rollout_tree, slow_leaves
from .scripted import SEARCHES, make_problems, run_scripted
from .scripted import read_trees as read_scripted


def many_trees(number: int, **options) -> list[SearchTree]:
    rng = random.Random(0)
    return [random_tree(rng, f"{i}", **options) for i in range(number)]


def movable(tree: SearchTree) -> dict[int, list[int]]:
    """Return the sampled steps that can move, by parent."""
    return {
        parent: steps for parent, steps in families(tree).items() if len({tree.nodes[i].weight for i in steps}) == 1
    }


def families(tree: SearchTree) -> dict[int, list[int]]:
    found = {}
    for i, node in enumerate(tree.nodes):
        if node.parent != ROOT and node.role == "step" and node.is_sample and tree.nodes[node.parent].role == "step":
            found.setdefault(node.parent, []).append(i)
    return {parent: steps for parent, steps in found.items() if len(steps) >= 2}


def test_what_one_move_changes():
    """A lost leaf or subtree raises no error. Labels would only be slightly wrong."""
    num_moves = 0
    for tree in many_trees(40, num_children=4):
        before, scores = leaf_counts(tree), mc_scores(tree)
        for parent, steps in movable(tree).items():
            above = tree.nodes[parent].parent
            for chosen in steps:
                view = move_up(tree, [chosen])
                num_moves += 1
                assert len(view.nodes) == len(tree.nodes)
                assert [i for i, node in enumerate(view.nodes) if node.parent != tree.nodes[i].parent] == [chosen]
                assert view.nodes[chosen].parent == above
                assert mc_scores(view)[chosen] == scores[chosen]
                assert leaf_counts(view)[chosen] == before[chosen]
                for ancestor in [*tree.path(above), ROOT]:
                    assert Counter(slow_leaves(view, ancestor)) == Counter(slow_leaves(tree, ancestor))
                    assert leaf_counts(view)[ancestor] == before[ancestor]
                    assert mc_scores(view, "leaf_share")[ancestor] == mc_scores(tree, "leaf_share")[ancestor]
                lost = tuple(a - b for a, b in zip(before[parent], leaf_counts(view)[parent], strict=True))
                assert lost == before[chosen]
    assert num_moves > 300


def test_texts_and_ids_join():
    """The authors' code keeps the old text in the subtree: 56 of 310 nodes did not continue their parent's text."""
    num_moves = 0
    for seed, tree in enumerate(many_trees(40)):
        view = compress(tree, seed, probability=0.7, min_children=2, num_passes=1 + seed % 3)
        num_moves += count_moves(view)
        assert len({node.node_id for node in view.nodes}) == len(view.nodes)
        for i, node in enumerate(view.nodes):
            assert view.text(i) == tree.text(i)
            assert view.prefix_ids(i) == tree.prefix_ids(i)
            assert node.parent < i
            if node.parent != ROOT:
                assert view.text(i).startswith(view.text(node.parent))
            pieces = [tree.step_text(j) for j in tree.path(i)][-node.num_merged :]
            assert view.step_text(i, " | ") == " | ".join(pieces)
            if node.merged_from is None:
                assert (node.text, node.token_ids, node.cuts) == (tree.nodes[i].text, tree.nodes[i].token_ids, ())
    assert num_moves > 100


def test_merged_text_by_hand():
    tree = full_tree(random.Random(0))
    child = next(i for i, node in enumerate(tree.nodes) if node.parent == 0)
    grandchild = next(i for i, node in enumerate(tree.nodes) if node.parent == child)
    view = move_up(tree, [child])
    moved = view.nodes[child]
    assert moved.text == f"\nStep 0\n\n# Step 2\nStep {child}\n\n# Step 3"
    assert moved.token_ids == tree.nodes[0].token_ids + tree.nodes[child].token_ids
    assert moved.merged_from == (tree.nodes[0].node_id, tree.nodes[child].node_id)
    assert (moved.parent, moved.child_index, moved.num_merged, moved.tail) == (ROOT, 3, 2, len("# Step 3"))
    assert view.step_text(child) == f"Step 0\n# Step 2\nStep {child}"
    assert view.step_text(grandchild) == f"# Step 3\nStep {grandchild}"
    assert view.nodes[grandchild].node_id != tree.nodes[grandchild].node_id
    assert view.nodes[0] is tree.nodes[0]


def test_a_node_and_its_child_both_move():
    """The child moves with its parent, and the three steps become one."""
    tree = full_tree(random.Random(0))
    child = next(i for i, node in enumerate(tree.nodes) if node.parent == 0)
    grandchild = next(i for i, node in enumerate(tree.nodes) if node.parent == child)
    view = move_up(tree, [grandchild, child])
    assert (view.nodes[grandchild].parent, view.nodes[grandchild].num_merged) == (ROOT, 3)
    assert view.step_text(grandchild, "+") == f"Step 0+# Step 2\nStep {child}+# Step 3\nStep {grandchild}"
    assert view.nodes[grandchild].merged_from == (tree.nodes[child].node_id, tree.nodes[grandchild].node_id)
    assert view.text(grandchild) == tree.text(grandchild)


def test_depths():
    for seed, tree in enumerate(many_trees(30)):
        view = compress(tree, seed, min_children=2, num_passes=2)
        depths = [depth for _, _, depth in walk(view)]
        steps = [sum(view.nodes[j].num_merged for j in view.path(i)) for i in range(len(view.nodes))]
        for i, (node, depth) in enumerate(zip(view.nodes, depths, strict=True)):
            assert depth == (1 if node.parent == ROOT else depths[node.parent] + 1) == view.depth(i)
            assert steps[i] == tree.depth(i)  # no original step is lost or counted twice
            place = (node.round, node.child_index)
            assert [(n.round, n.child_index) for n in view.nodes if n.parent == node.parent].count(place) == 1


def test_mean_over_all_choices_is_the_parents_score():
    """With child mean, removing one of N children at random keeps the expectation, whatever the scores."""
    num_parents = 0
    for tree in many_trees(40):
        scores = mc_scores(tree)
        for parent, steps in movable(tree).items():
            known = [scores[i] for i in steps if scores[i] is not None]
            if len(known) < 2:
                continue
            found = [mc_scores(move_up(tree, [chosen]))[parent] for chosen in steps]
            assert mean(found) == pytest.approx(scores[parent], abs=1e-12)
            num_parents += 1
    assert num_parents > 50


@pytest.mark.parametrize(("size", "num_rollouts"), [(2, 0), (3, 0), (5, 0), (3, 2)])
def test_variance_of_the_child_mean(size, num_rollouts):
    """
    Over all outcomes of N equal children and all N choices, the variance goes from s^2/N to s^2/(N-1), exactly. Rollouts of the node, as
    in a continued run, count as children that never move.
    """
    p = 0.3
    tree = full_tree(random.Random(0), num_children=size, depth=2)
    steps = movable(tree)[0]
    for place in range(num_rollouts):
        add_node(tree, 0, place, "the rest", role="rollout")
    samples = [i for i, node in enumerate(tree.nodes) if node.parent == 0]
    number = size + num_rollouts
    before, after = [], []  # (probability, child mean)
    for outcomes in itertools.product([True, False], repeat=number):
        for i, correct in zip(samples, outcomes, strict=True):
            end(tree.nodes[i], correct)
        chance = p ** sum(outcomes) * (1 - p) ** (number - sum(outcomes))
        before.append((chance, mc_scores(tree)[0]))
        after += [(chance / size, mc_scores(move_up(tree, [chosen]))[0]) for chosen in steps]
    assert sum(chance * x for chance, x in before) == pytest.approx(p, abs=1e-12)
    assert sum(chance * x for chance, x in after) == pytest.approx(p, abs=1e-12)
    assert sum(chance * (x - p) ** 2 for chance, x in before) == pytest.approx(p * (1 - p) / number, abs=1e-12)
    assert sum(chance * (x - p) ** 2 for chance, x in after) == pytest.approx(p * (1 - p) / (number - 1), abs=1e-12)


def test_rollouts_of_a_node_weigh_more_after_a_move():
    """As the docstring says: two of four steps and all of four rollouts are right."""
    tree = empty_tree()
    add_node(tree, ROOT, 0, "A", header=2)
    for place, correct in enumerate([True, True, False, False, True, True, True, True]):
        add_node(tree, 0, place, f"B{place}", role="step" if place < 4 else "rollout")
        end(tree.nodes[-1], correct)
    assert mc_scores(tree)[0] == 6 / 8
    assert mean(mc_scores(move_up(tree, [i]))[0] for i in range(1, 5)) == pytest.approx((3 / 4 * 2 + 4) / 7)
    assert len(choose_moves(tree, (0,), 1.0, 4)) == 1  # a continued tree is still compressed


def test_blank_children():
    """A node with only blank children, such as ends after a last step, would lose a sample for a merged step without text."""
    for texts, movable_children in ((["", "", ""], set()), (["", "so", ""], {1, 2, 3})):
        tree = empty_tree()
        add_node(tree, ROOT, 0, "It is 7.")
        for place, text in enumerate(texts):
            add_node(tree, 0, place, text)
            end(tree.nodes[-1], True)
        chosen = {i for seed in range(30) for i in choose_moves(tree, (seed,), 1.0, 3)}
        assert chosen == movable_children  # a blank child next to others can move, or the mean would be biased


def test_sampled_variance():
    """The enumeration above would not notice a seeded choice that prefers one position."""
    rng = random.Random(0)
    before, after, places = [], [], Counter()
    for seed in range(4000):
        tree = full_tree(rng, name=f"{seed}", num_children=5, depth=2)
        view = compress(tree, seed, probability=1)
        before.append(mc_scores(tree)[0])
        after.append(mc_scores(view)[0])
        places[
            next(n.child_index for i, n in enumerate(tree.nodes) if n.parent == 0 and view.nodes[i].parent != 0)
        ] += 1
    assert mean(after) == pytest.approx(0.5, abs=0.02)
    assert pvariance(after) / pvariance(before) == pytest.approx(5 / 4, rel=0.08)
    assert all(abs(places[i] - 800) < 4 * (4000 * 0.2 * 0.8) ** 0.5 for i in range(5))


def test_probability_and_least_number_of_children():
    tree = full_tree(random.Random(0), num_children=4, depth=5)
    parents = len(movable(tree))
    assert count_moves(compress(tree, 0, probability=0)) == 0
    assert count_moves(compress(tree, 0, probability=1)) == parents == 4 + 16 + 64 + 256
    assert count_moves(compress(tree, 0, probability=1, min_children=5)) == 0
    assert abs(count_moves(compress(tree, 0)) - parents / 2) < 4 * (parents / 4) ** 0.5
    # moved nodes are not samples: a second pass finds three children instead of four
    assert count_moves(compress(tree, 0, probability=1, num_passes=2)) == parents
    assert count_moves(compress(tree, 0, probability=1, min_children=3, num_passes=2)) == 2 * parents


def share_of_parents(rule: str, size: int) -> float:
    """Return the probability that a node with `size` children loses one, as stated in docs/search.md."""
    return 0.5 if rule == "per_parent" else 1 - 0.5**size


def branch(tree: SearchTree, depth: int) -> SearchTree:
    """Return the part of a tree that begins with its first step, down to `depth`."""
    kept = [i for i in range(len(tree.nodes)) if tree.path(i)[0] == 0 and tree.depth(i) <= depth]
    place = {ROOT: ROOT} | {old: new for new, old in enumerate(kept)}
    nodes = [replace(tree.nodes[i], parent=place[tree.nodes[i].parent]) for i in kept]
    return SearchTree(tree.problem, nodes, tree.prompt_ids, tree.status)


def moves_of_all_coins(monkeypatch, tree: SearchTree, rule: str) -> list[list[int]]:
    """Return the moves for each outcome of the coins of a tree, which are equally likely with probability 0.5."""
    owners = families(tree) if rule == "per_parent" else [i for steps in families(tree).values() for i in steps]
    found = []
    for coins in itertools.product([0, 2**64 - 1], repeat=len(owners)):
        drawn = {tree.nodes[i].node_id: coin for i, coin in zip(owners, coins, strict=True)}
        monkeypatch.setattr(compression, "draws", lambda key, node_id, drawn=drawn: (drawn[node_id], 0))
        found.append(choose_moves(tree, (0,), 0.5, 2, rule))
    return found


@pytest.mark.parametrize("rule", compression.RULES)
def test_share_of_moved_children_by_enumeration(monkeypatch, rule):
    """Over all outcomes of the coins of one family of a 5-ary tree. docs/search.md states the same shares."""
    outcomes = moves_of_all_coins(monkeypatch, branch(full_tree(random.Random(0), num_children=5, depth=2), 2), rule)
    assert len(outcomes) == {"per_parent": 2, "per_child": 32}[rule]
    lost = sum(map(bool, outcomes)) / len(outcomes)
    assert lost == share_of_parents(rule, 5) == {"per_parent": 1 / 2, "per_child": 31 / 32}[rule]
    moved = sum(map(len, outcomes)) / len(outcomes) / 5
    assert moved == {"per_parent": 0.1, "per_child": 0.19375}[rule]
    if rule == "per_child":  # the first one whose coin succeeds
        found = Counter(moves[0] for moves in outcomes if moves)
        assert [found[i] / len(outcomes) for i in range(1, 6)] == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_children_of_a_moved_node_stay(monkeypatch):
    """With `per_child`, over all coins of three families. With `per_parent`, a node and its child can both move."""
    tree = branch(full_tree(random.Random(0), num_children=2, depth=3), 3)
    outcomes = moves_of_all_coins(monkeypatch, tree, "per_child")
    assert len(outcomes) == 2**6
    assert not any(tree.nodes[i].parent in moves for moves in outcomes for i in moves)
    depths = Counter(tree.depth(i) for moves in outcomes for i in moves)
    first = 3 / 8  # share of the children that move below a node that stays: (1 - 0.5^2) / 2
    assert depths[2] / len(outcomes) / 2 == first
    assert depths[3] / len(outcomes) / 4 == (1 - first) * first
    outcomes = moves_of_all_coins(monkeypatch, tree, "per_parent")
    assert any(tree.nodes[i].parent in moves for moves in outcomes for i in moves)


@pytest.mark.parametrize("rule", compression.RULES)
def test_share_of_moved_children_in_sampled_trees(rule):
    """The shares of docs/search.md in 5-ary trees of depth 5: parents that lose a child, and children that move."""
    num_moved, num_children, num_lost, num_staying = 0, 0, 0, 0
    tree = full_tree(random.Random(0), num_children=5, depth=5)
    for seed in range(8):
        moves = set(choose_moves(tree, (seed, 0), 0.5, 4, rule))
        num_moved += len(moves)
        for parent, steps in families(tree).items():
            num_children += len(steps)
            if rule == "per_parent" or parent not in moves:
                num_staying += 1
                num_lost += any(i in moves for i in steps)
    lost = share_of_parents(rule, 5)
    below, by_depth = lost / 5, [lost / 5]
    while rule == "per_child" and len(by_depth) < 4:
        by_depth.append((1 - by_depth[-1]) * below)
    shares = by_depth if rule == "per_child" else [below] * 4
    expected = sum(share * 5**depth for depth, share in enumerate(shares)) / sum(5**depth for depth in range(4))
    assert [round(share, 3) for share in shares] == {
        "per_parent": [0.1] * 4,
        "per_child": [0.194, 0.156, 0.163, 0.162],
    }[rule]
    assert round(expected, 3) == {"per_parent": 0.1, "per_child": 0.162}[rule]
    assert num_children == 8 * 5 * (5 + 25 + 125 + 625)
    assert num_moved / num_children == pytest.approx(expected, abs=4 * (0.2 * 0.8 / num_children) ** 0.5)
    assert num_lost / num_staying == pytest.approx(lost, abs=4 * (lost * (1 - lost) / num_staying) ** 0.5)


def test_first_siblings_move_more_often_with_per_child():
    """So the average over the coins is not the child mean of the tree, but over the samples of the policy it is."""
    p, size = 0.3, 4
    places = [0.5**i for i in range(1, size + 1)]  # no child moves with the remaining probability
    tree = full_tree(random.Random(0), num_children=size, depth=2)
    steps = movable(tree)[0]
    total = square = 0.0
    for outcomes in itertools.product([True, False], repeat=size):
        for i, correct in zip(steps, outcomes, strict=True):
            end(tree.nodes[i], correct)
        chance = p ** sum(outcomes) * (1 - p) ** (size - sum(outcomes))
        found = [mc_scores(move_up(tree, [i]))[0] for i in steps]
        over_coins = sum(place * value for place, value in zip(places, found, strict=True)) + mc_scores(tree)[0] / 16
        if outcomes == (True, False, False, False):
            assert mc_scores(tree)[0] == 1 / 4
            assert over_coins == pytest.approx((1 / 4 + 1 / 8 + 1 / 16) * 1 / 3 + 1 / 16 * 1 / 4)
        total += chance * over_coins
        square += sum(chance * place * (x - p) ** 2 for place, x in zip(places, found, strict=True)) / sum(places)
    assert total == pytest.approx(p, abs=1e-12)
    assert square == pytest.approx(p * (1 - p) / (size - 1), abs=1e-12)


def test_per_child_follows_the_order_of_sampling():
    """Nodes arrive in any order. Their position among their siblings decides."""
    num_late = 0
    for seed in range(40):
        tree = full_tree(random.Random(seed), name=f"{seed}", num_children=5, depth=2)
        moved = {tree.nodes[i].node_id for i in choose_moves(tree, (seed, 0), 0.5, 4, "per_child")}
        first = [i for i, node in enumerate(tree.nodes) if node.parent == ROOT]
        nodes = [tree.nodes[i] for i in first]
        for parent, steps in families(tree).items():
            drawn = [compression.draws((seed, 0), tree.nodes[i].node_id)[0] < 2**63 for i in steps]
            expected = [tree.nodes[steps[drawn.index(True)]].node_id] if any(drawn) else []
            assert [tree.nodes[i].node_id for i in steps if tree.nodes[i].node_id in moved] == expected
            num_late += sum(drawn) > 1
            nodes += [replace(tree.nodes[i], parent=first.index(parent)) for i in reversed(steps)]
        turned = SearchTree(tree.problem, nodes, tree.prompt_ids, tree.status)
        assert {nodes[i].node_id for i in choose_moves(turned, (seed, 0), 0.5, 4, "per_child")} == moved
    assert num_late > 100


def test_siblings_of_a_full_tree_are_sampled_together(tmp_path):
    """If a search added siblings after it has seen outcomes, their positions would tell outcomes, and `per_child` would bias."""
    run_scripted(tmp_path / "run", SEARCHES["full_tree"], make_problems(3))
    rounds = [
        {tree.nodes[i].round for i in steps}
        for tree in read_scripted(tmp_path / "run").values()
        for steps in families(tree).values()
    ]
    assert len(rounds) > 5 and all(len(found) == 1 for found in rounds)


def test_one_seed_one_view():
    """With one generator for all nodes, the view would depend on the order in which nodes arrived."""
    for tree in many_trees(20):
        before = copy.deepcopy(tree)
        view = compress(tree, 7, min_children=2)
        assert tree == before
        assert compress(tree, 7, min_children=2) == view
        order = [i for i, node in enumerate(tree.nodes) if node.parent == ROOT]
        other = SearchTree(tree.problem, status=tree.status, prompt_ids=tree.prompt_ids)
        for first in reversed(order):  # the same tree with its branches in another order
            index = {ROOT: ROOT}
            for i, node in enumerate(tree.nodes):
                if tree.path(i)[0] == first:
                    index[i] = len(other.nodes)
                    other.nodes.append(replace(node, parent=index[node.parent]))
        assert compress(other, 7, min_children=2).canonical() == view.canonical()
    assert compress(tree, 8, min_children=2) != view


def test_families_under_a_budget_are_left_alone():
    """If children have unequal weights, the mean without one of them is not the parent's mean on average."""
    num_unequal = 0
    for tree in many_trees(40):
        view = compress(tree, 0, probability=1, min_children=2)
        for steps in families(tree).values():
            unequal = len({tree.nodes[i].weight for i in steps}) > 1
            num_unequal += unequal
            assert sum(view.nodes[i].merged_from is not None for i in steps) == (not unequal)
            if unequal:
                with pytest.raises(ValueError, match="same weight"):
                    move_up(tree, steps[:1])
    assert num_unequal > 10


def test_leaves_keep_their_outcome():
    """A truncated leaf that moves next to continued siblings must not count as skipped by their budget."""
    for seed, tree in enumerate(many_trees(60)):
        view = compress(tree, seed, probability=1, min_children=2)
        followed = {node.parent for node in tree.nodes}
        for i in set(range(len(tree.nodes))) - followed:
            assert slow_leaves(view, i) == slow_leaves(tree, i)
            assert leaf_counts(view)[i] == leaf_counts(tree)[i]


def test_rollouts_are_not_merged():
    rng = random.Random(0)
    for i in range(20):
        tree = rollout_tree(rng, f"{i}")
        assert choose_moves(tree, (0,), 1.0, 2) == []
        assert compress(tree, 0, probability=1, min_children=2) == tree


def test_errors():
    tree = full_tree(random.Random(0), num_children=2, depth=2)
    first, second = (i for i, node in enumerate(tree.nodes) if node.parent == 0)
    with pytest.raises(ValueError, match="Node 0 cannot be merged"):
        move_up(tree, [0])
    with pytest.raises(ValueError, match="all of its 2 sampled children"):
        move_up(tree, [first, second])
    only = full_tree(random.Random(0), num_children=1, depth=2)
    with pytest.raises(ValueError, match="Node 1 .*node 0.*1 sampled children"):
        move_up(only, [1])
    moved = move_up(tree, [first])
    with pytest.raises(ValueError, match=f"Node {first} cannot be merged"):
        move_up(moved, [first])
    for options, message in (
        ({"min_children": 1}, "`min_children` is 1. It must be at least 2"),
        ({"probability": 1.5}, "probability of node compression is 1.5"),
        ({"num_passes": 0}, "number of passes of node compression is 0"),
        ({"rule": "coin"}, "rule of node compression is 'coin'. It must be one of per_parent, per_child"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(tree, 0, **options)
