"""What each search samples from scripted policies."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from trl_hrm.data.candidate_sources import finished_solutions
from trl_hrm.search.open_tree import request_seed
from trl_hrm.search.policies import PUCT, FullTree, Rollouts, RootFilter
from trl_hrm.search.steps import regex_rule
from trl_hrm.search.tree import ROOT

from .scripted import FINAL, RULE, SEARCHES, ExactGrader, make_problems, read_trees, run_scripted


def by_rate(rates):
    """Return a policy of three steps that is right with probability `rates[k]` after k steps, decided step by step."""

    def script(prefix, rng):
        written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
        number = written.count("# Step ")
        good = "bad" not in written
        text = "\n" if number else "# Step 1\n"
        for k in range(max(number, 1), 4):
            good = good and rng.random() < rates[k - 1]
            text += "good\n\n" if good else "bad\n\n"
            text += f"# Step {k + 1}\n" if k < 3 else ""
        return text + f"# Answer\n\n{7 if good else 8}\n# END!"

    return script


def test_full_tree_is_full(tmp_path):
    """Without a binding budget, every open node must have all its children, and no other node may have any."""
    run_scripted(tmp_path)
    search = SEARCHES["full_tree"]
    sizes = Counter()
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        for i, node in enumerate(tree.nodes):
            goes_on = node.finish == "stop" and not node.is_final and tree.depth(i) < search.max_depth
            assert len(children[i]) == (search.num_children if goes_on else 0)
            assert tree.depth(i) <= search.max_depth and node.weight == 1
            sizes[tree.depth(i), goes_on] += 1
        assert len(children[ROOT]) == search.num_children
    assert sizes[search.max_depth, False] and sizes[1, True] and sizes[1, False]  # all kinds occurred


def test_budget_samples_siblings_and_weights_them(tmp_path):
    """Continued siblings must represent the skipped ones by weight, and every branch must still reach the bottom."""
    search = SEARCHES["narrow"]
    run_scripted(tmp_path, search, make_problems(40))
    thinned = 0
    for tree in read_trees(tmp_path).values():
        assert len(tree.nodes) <= search.max_sequences
        children = tree.children()
        for below in children:
            could = [
                i
                for i in below
                if tree.nodes[i].finish == "stop" and not tree.nodes[i].is_final and tree.depth(i) < search.max_depth
            ]
            did = [i for i in below if children[i]]
            assert set(did) <= set(could) and bool(did) == bool(could)
            assert sum(tree.nodes[i].weight for i in did) == pytest.approx(len(could))
            thinned += len(did) < len(could)
    assert thinned > 5


def test_a_token_budget_holds(tmp_path):
    """Each request must reserve its worst case first, so that no problem exceeds its budget."""
    least = 3 * 4 * 60
    search = FullTree(RULE, FINAL, 3, 4, max_step_tokens=60, max_tokens=2 * least)
    run_scripted(tmp_path, search, make_problems(40))
    spent = [sum(len(node.token_ids) for node in tree.nodes) for tree in read_trees(tmp_path).values()]
    assert max(spent) <= 2 * least and max(spent) > least / 2


def test_child_mean_under_a_budget_is_unbiased(tmp_path):
    """A subsample without weights would favour solutions that end early, because all of those are kept."""

    def ragged(prefix, rng):
        """End at once with a wrong answer half of the time. Otherwise write three more steps and a right answer."""
        written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
        number = written.count("# Step ")
        if not number and rng.random() < 0.5:
            return "# Step 1\nbad\n\n# Answer\n\n8\n# END!"
        text = "\n" if number else "# Step 1\n"
        for k in range(max(number, 1), 4):
            text += "good\n\n" + (f"# Step {k + 1}\n" if k < 3 else "")
        return text + "# Answer\n\n7\n# END!"

    search = FullTree(RULE, FINAL, 4, 4, max_step_tokens=60, max_sequences=16)
    run_scripted(tmp_path, search, make_problems(400), script=ragged)

    def mean(tree, below, children):
        total = weights = 0
        for i in below:
            node = tree.nodes[i]
            if not children[i] and not node.is_final:
                continue  # skipped by the budget
            value = node.correct if node.is_final else mean(tree, children[i], children)
            total, weights = total + node.weight * value, weights + node.weight
        return total / weights

    found = [mean(tree, tree.children()[ROOT], tree.children()) for tree in read_trees(tmp_path).values()]
    assert sum(found) / len(found) == pytest.approx(0.5, abs=0.04)  # 3 standard errors


def test_rollouts_judge_every_prefix(tmp_path):
    """Each step of a solution except the last needs its own completions. The last has the solution's outcome."""
    search = SEARCHES["rollouts"]
    run_scripted(tmp_path, search)
    seen = 0
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        solutions = [i for i in children[ROOT] if tree.nodes[i].role == "rollout"]
        chains = [i for i in children[ROOT] if tree.nodes[i].role == "segment"]
        assert len(solutions) == len(chains) == search.num_solutions
        for solution, step in zip(solutions, chains, strict=True):
            whole = tree.nodes[solution]
            ids, text = [], ""
            while True:
                node = tree.nodes[step]
                ids, text = ids + node.token_ids, text + node.text
                below = [i for i in children[step] if tree.nodes[i].role == "segment"]
                judging = [i for i in children[step] if tree.nodes[i].role == "rollout"]
                assert len(judging) == (search.num_completions if below else 0)
                seen += len(judging)
                if not below:
                    break
                (step,) = below
            assert (ids, text) == (whole.token_ids, whole.text)
            last = tree.nodes[step]
            assert (last.is_final, last.answer, last.correct) == (whole.is_final, whole.answer, whole.correct)
    assert seen > 50


def test_rollouts_without_completions_are_solutions_in_steps(tmp_path):
    """Such rollouts are best-of-N candidates. They need steps for a reward model, but no other samples."""
    search = replace(SEARCHES["rollouts"], num_completions=0)
    run_scripted(tmp_path, search)
    num_steps = 0
    for tree in read_trees(tmp_path).values():
        assert Counter(node.role for node in tree.nodes)["rollout"] == search.num_solutions
        found = list(finished_solutions(tree))
        final = [node.text for node in tree.nodes if node.role == "rollout" and node.is_final]
        assert [text for text, _ in found] == final
        num_steps += sum(len(steps) for _, steps in found)
    assert num_steps > 2 * search.num_solutions


def test_rollouts_under_a_budget(tmp_path):
    """A prefix judged by fewer completions than requested would look as certain as the rest."""
    search = replace(SEARCHES["rollouts"], max_sequences=10)
    run_scripted(tmp_path, search, make_problems(20))
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        counts = Counter(
            sum(tree.nodes[i].role == "rollout" for i in children[step])
            for step, node in enumerate(tree.nodes)
            if node.role == "segment" and not node.is_final
        )
        assert set(counts) <= {0, search.num_completions}
        assert sum(node.role == "rollout" for node in tree.nodes) <= 10


def test_puct_finds_the_first_error(tmp_path):
    """Bisecting a wrong rollout must end at its first bad step: only the prefix before it is solvable."""
    search = PUCT(FINAL, num_completions=12, max_selections=3, max_solution_tokens=300)
    run_scripted(tmp_path, search, make_problems(10), script=by_rate([0.7, 0.7, 0.7]))
    found = 0
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        for step in range(len(tree.nodes)):
            judging = [i for i in children[step] if tree.nodes[i].role == "rollout"]
            if judging:
                solved = any(tree.nodes[i].correct for i in judging)
                assert solved == ("bad" not in tree.text(step)), tree.text(step)
                found += not solved
    assert found >= 5


def test_puct_spends_where_the_value_is_uncertain(tmp_path):
    """Problems that are always or never solved must only cost their first rollouts."""
    search = PUCT(FINAL, num_completions=4, max_selections=10, max_solution_tokens=300)
    for rate, more in ((1.0, False), (0.0, False), (0.6, True)):
        folder = tmp_path / str(rate)
        run_scripted(folder, search, make_problems(8), script=by_rate([rate] * 3))
        spent = [sum(n.role == "rollout" for n in tree.nodes) for tree in read_trees(folder).values()]
        assert (max(spent) > 4) == more


def test_puct_prefers_by_the_formula(tmp_path):
    """Recompute the first choice by hand. All rollouts share MC and visits, so the shortest wrong one wins."""
    search = PUCT(FINAL, num_completions=6, max_selections=1, max_solution_tokens=300)
    run_scripted(tmp_path, search, make_problems(30))
    chosen = 0
    for tree in read_trees(tmp_path).values():
        children = tree.children()
        first = [i for i in children[ROOT] if tree.nodes[i].role == "rollout"]
        answered = [i for i in first if tree.nodes[i].correct is not None]
        wrong = [i for i in first if tree.nodes[i].correct is False]
        judged = [i for i, below in enumerate(children[:-1]) if any(tree.nodes[k].role == "rollout" for k in below)]
        if wrong and len(wrong) < len(answered):
            shortest = min(wrong, key=lambda i: (len(tree.nodes[i].token_ids), i))
            steps = len(RULE.ends(tree.nodes[shortest].text))
            assert bool(judged) == (steps > 1)
            if judged:
                middle = RULE.ends(tree.nodes[shortest].text)[steps // 2 - 1]
                assert tree.nodes[shortest].text[:middle] in {tree.text(i) for i in judged}
                chosen += 1
        else:
            assert not judged
    assert chosen >= 3


def test_puct_shows_right_solutions_too(tmp_path):
    """With only wrong rollouts, an outcome reward model would train on zeros alone."""
    run_scripted(tmp_path, SEARCHES["puct"], make_problems(20))
    outcomes = Counter(
        node.correct
        for tree in read_trees(tmp_path).values()
        for node in tree.nodes
        if node.role == "segment" and node.is_final
    )
    assert outcomes[True] > 20 and outcomes[False] > 10


@pytest.mark.parametrize("budget", [4, 8, 40])
def test_puct_keeps_its_budget(tmp_path, budget):
    search = replace(SEARCHES["puct"], max_sequences=budget, max_selections=50)
    run_scripted(tmp_path, search, make_problems(10))
    assert all(sum(node.role == "rollout" for node in tree.nodes) <= budget for tree in read_trees(tmp_path).values())


def test_root_filter_does_not_use_the_budget(tmp_path):
    """If its samples counted, a small budget would leave nothing for the search."""
    search = RootFilter(replace(SEARCHES["puct"], max_sequences=8), 6, FINAL)
    run_scripted(tmp_path, search, make_problems(20), script=by_rate([0.8] * 3))
    spent = [sum(n.role == "rollout" for n in tree.nodes) for tree in read_trees(tmp_path).values()]
    assert max(spent) == 6 + 8


def test_root_filter(tmp_path):
    """Problems that are always or never solved are closed with their own reasons. The others get a full search."""
    for rate, status in ((1.0, "always_solved"), (0.0, "never_solved")):
        folder = tmp_path / status
        search = RootFilter(SEARCHES["full_tree"], 5, FINAL)
        progress = run_scripted(folder, search, script=by_rate([rate] * 3))
        assert progress.closed == {status: 6}
        assert all(len(tree.nodes) == 5 and tree.status == status for tree in read_trees(folder).values())
    progress = run_scripted(tmp_path / "mixed", search, make_problems(12), script=by_rate([0.8] * 3))
    assert progress.closed["done"] >= 6
    for tree in read_trees(tmp_path / "mixed").values():
        assert (len(tree.nodes) > 5) == (tree.status == "done")


def test_root_filter_does_not_judge_what_the_grader_could_not(tmp_path):
    """Ungraded answers are not wrong. "never solved" would drop the problem because of a fault."""
    search = RootFilter(SEARCHES["full_tree"], 5, FINAL)
    progress = run_scripted(tmp_path, search, script=by_rate([0.0] * 3), grader=ExactGrader(unreadable=("8",)))
    assert progress.closed == {"done": 6}


def test_steps_end_where_numbers_drift(tmp_path):
    """Policies skip and repeat numbers, so the next header must follow the written one, not the depth."""

    def drifting(prefix, rng):
        written = prefix.rsplit("Question:", 1)[1].split("\n\n", 1)[1]
        numbers = [1, 3, 3, 4, 6, 7]
        done = written.count("# Step ")
        text = "\n" if done else "# Step 1\n"
        for k in range(max(done, 1), 6):
            text += f"go\n\n# Step {numbers[k]}\n"
        return text + "# Answer\n\n7\n# END!"

    search = FullTree(RULE, FINAL, num_children=2, max_depth=7, max_step_tokens=60, max_sequences=300)
    run_scripted(tmp_path, search, make_problems(1), script=drifting)
    (tree,) = read_trees(tmp_path).values()
    assert max(map(tree.depth, range(len(tree.nodes)))) == 6
    assert all(tree.step_text(i).count("# Step ") == 1 for i in range(len(tree.nodes)))


def test_ungraded_answer_is_not_wrong(tmp_path):
    """Casting `None` to bool between the grader and the tree would make it wrong."""
    run_scripted(tmp_path, grader=ExactGrader(unreadable=("8",)))
    grades = {n.correct for tree in read_trees(tmp_path).values() for n in tree.nodes if n.answer == "8"}
    assert grades == {None}
    assert {n.correct for tree in read_trees(tmp_path).values() for n in tree.nodes if n.answer == "7"} == {True}


def test_a_reference_that_cannot_be_graded_costs_nothing(tmp_path):
    progress = run_scripted(tmp_path, grader=ExactGrader(unreadable=("7",)))
    assert progress.closed == {"ungradable": 6} and progress.num_sequences == 0


def test_every_text_is_a_prefix_of_its_childrens(tmp_path):
    for name, search in SEARCHES.items():
        run_scripted(tmp_path / name, search)
        for tree in read_trees(tmp_path / name).values():
            for i, node in enumerate(tree.nodes):
                assert tree.text(i) == tree.text(node.parent) + node.text
                assert tree.prefix_ids(i) == tree.prefix_ids(node.parent) + node.token_ids
                assert "".join(map(chr, node.token_ids)).rstrip("\0") == node.text


def test_step_texts_have_one_header_each(tmp_path):
    """The header that ends a node belongs to the next step."""
    run_scripted(tmp_path)
    for tree in read_trees(tmp_path).values():
        for i in range(len(tree.nodes)):
            text = tree.step_text(i)
            assert text.count("# Step ") == 1 and text.startswith(f"# Step {tree.depth(i)}")


def test_seeds_of_two_requests_never_overlap():
    """vLLM gives sample i the seed + i, so neighbouring seeds would share all samples except one."""
    rng = random.Random(0)
    ids = [f"{rng.randrange(2**64):016x}" for _ in range(2000)]
    starts = sorted(request_seed(42, name, round) for name in ids for round in (-1, 0, 1, 2))
    assert all(b - a >= 2**16 for a, b in zip(starts, starts[1:], strict=False))
    assert 0 <= starts[0] and starts[-1] + 2**16 < 2**53  # exact in every JSON reader


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FullTree(RULE, num_children=0), "`num_children` is 0"),
        (lambda: FullTree(RULE, (), 5, 7, max_sequences=34), "`max_sequences` is 34.*35"),
        (lambda: FullTree(RULE, (), 5, 7, 10, max_tokens=349), "`max_tokens` is 349.*350"),
        (lambda: FullTree(regex_rule("x")), "one at a time"),
        (
            lambda: Rollouts((), num_solutions=9, max_sequences=8),
            "`max_sequences` is 8.*num_solutions.*9",
        ),
        (lambda: Rollouts((), num_solutions=0), "`num_solutions` is 0"),
        (lambda: Rollouts((), num_completions=-1), "`num_completions` is -1"),
        (lambda: PUCT((), alpha=0), "`alpha` is 0"),
        (lambda: PUCT((), max_tokens=5), "`max_tokens` is 5"),
        (lambda: PUCT((), max_selections=0), "`max_selections` is 0"),
        (lambda: PUCT((), length_scale=0), "`length_scale` is 0"),
        (lambda: RootFilter(None, 1, ()), "1 samples.*2"),
    ],
)
def test_invalid_settings_raise(make, message):
    with pytest.raises(ValueError, match=message):
        make()
