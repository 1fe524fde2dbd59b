"""Step searches on tables of scores, with the expected paths worked out by hand."""

import random
from dataclasses import replace

import pytest

from trl_hrm.search.step_search import BeamSearch, DiverseTreeSearch, GreedyStepSearch
from trl_hrm.search.steps import RULES, regex_rule

from .leveled import LETTER_LIMITS as LIMITS
from .leveled import PLAIN, PROBLEMS, LetterEngine, open_trees, results, run_levels


RULE = LIMITS["rule"]


def search_table(tmp_path, search, table: dict[str, list[str]], scores: dict[str, float]) -> list[tuple]:
    """Return endings as (reason, path, scores). `so` is the step with the answer."""

    def score(path: list[str]) -> float:
        return scores["/".join(step.split()[0] for step in path)]

    run_levels(tmp_path, search, PROBLEMS, score, engine=LetterEngine(table), prompt=PLAIN)
    return [
        (reason, "/".join(step and step.split()[0] for step in path), found)
        for reason, path, found, _, _ in results(tmp_path, search)["p"]
    ]


def test_greedy_takes_the_best_step(tmp_path):
    """The best first step leads to the worse solution. A search with look-ahead or sums would take `a`."""
    table = {"": ["a", "b", "c"], "b": ["d", "=8", "e"], "b/d": ["f", "=7", "=9"], "a": ["=7"] * 3}
    scores = {"a": 0.8, "b": 0.9, "c": 0.1, "b/d": 0.3, "b/so": 0.2, "b/e": 0.1, "b/d/f": 0.2, "b/d/so": 0.6}
    search = GreedyStepSearch(num_candidates=3, **LIMITS)
    assert search_table(tmp_path, search, table, scores) == [("final", "b/d/so", [0.9, 0.3, 0.6])]
    opened = open_trees(tmp_path)["p"]
    assert len(opened.tree.nodes) == 9 and search.n == 3
    # `=7` and `=9` have equal scores, so the smaller text wins
    assert results(tmp_path, search)["p"][0][3:] == ("7", True)


def test_larger_n_begins_with_the_samples_of_a_smaller_n(tmp_path):
    """Otherwise the curve over N would compare different samples."""
    small, large = (GreedyStepSearch(num_candidates=n, **LIMITS) for n in (8, 16))

    def script(prefix: str, rng: random.Random) -> str:
        return f"{rng.random()}\n\n"

    for name, search in (("8", small), ("16", large)):
        run_levels(tmp_path / name, search, PROBLEMS, lambda path: 0.5, script=script, prompt=PLAIN)
    few, many = (open_trees(tmp_path / name)["p"].tree.nodes for name in ("8", "16"))
    assert len(few) == 32 and len({node.text for node in many[:16]}) == 16
    assert few[:8] == many[:8]


@pytest.mark.parametrize("order", [("b", "a", "c"), ("c", "b", "a"), ("a", "c", "b")])
def test_ties_go_to_the_smallest_text(tmp_path, order):
    """If position decided, the winner would depend on which sample arrived first."""
    table = {"": list(order)} | {x: ["=7", "=7", "=7"] for x in order}
    scores = {"a": 0.5, "b": 0.5, "c": 0.4, "a/so": 1.0, "b/so": 1.0}
    search = GreedyStepSearch(num_candidates=3, **LIMITS)
    assert search_table(tmp_path, search, table, scores) == [("final", "a/so", [0.5, 1.0])]


def test_beam_keeps_the_best_paths_of_all(tmp_path):
    """
    Width 2, expansion 2: of four first steps, a and b stay. Both children of b beat the children of a. One of them ends
    the solution and keeps its place, so one path continues with two next steps.
    """
    table = {
        "": ["a", "b", "c", "d"],
        "a": ["e", "f"],
        "b": ["=8", "g"],
        "b/g": ["h", "i"],
        "b/g/i": ["=7", "j"],
    }
    scores = {"a": 0.9, "b": 0.8, "c": 0.7, "d": 0.1, "a/e": 0.3, "a/f": 0.2, "b/so": 0.5, "b/g": 0.4}
    scores |= {"b/g/h": 0.6, "b/g/i": 0.9, "b/g/i/so": 0.95, "b/g/i/j": 0.99}
    search = BeamSearch(width=2, expansion=2, **LIMITS)
    found = search_table(tmp_path / "a", search, table, scores)
    # at the depth limit the better path has no answer, so it is not a solution and comes last
    assert found == [("final", "b/so", [0.8, 0.5]), ("max_depth", "b/g/i/j", [0.8, 0.4, 0.9, 0.99])]
    nodes = open_trees(tmp_path / "a")["p"].tree.nodes
    assert [sum(node.parent == i for node in nodes) for i in (-1, 0, 1)] == [4, 2, 2] and len(nodes) == 12
    scores["b/g/i/j"] = 0.94
    found = search_table(tmp_path / "b", search, table, scores)
    assert found == [("final", "b/g/i/so", [0.8, 0.4, 0.9, 0.95]), ("final", "b/so", [0.8, 0.5])]


def test_beam_ranks_by_another_aggregate(tmp_path):
    """Ranked by its minimum, the child of the weak first step drops out, although its own score is the highest."""
    table = {"": ["a", "b"], "a": ["=1"], "b": ["=7"]}
    scores = {"a": 0.2, "b": 0.6, "a/so": 1.0, "b/so": 0.5}
    for rank, best in ((None, "a/so"), (min, "b/so")):
        search = BeamSearch(width=2, expansion=1, **LIMITS, **({"rank": rank} if rank else {}))
        found = search_table(tmp_path / best[0], search, table, scores)
        assert len(found) == 2 and found[0][1] == best


def test_equal_paths_take_one_place_in_a_beam(tmp_path):
    """A policy that repeats itself would fill the beam with one path, and the search would be greedy."""
    table = {"": ["a", "a", "b", "a"], "a": ["=8", "=8"], "b": ["=7", "=7"]}
    scores = {"a": 0.9, "b": 0.8, "a/so": 0.1, "b/so": 0.2}
    search = BeamSearch(width=2, expansion=2, **LIMITS)
    found = search_table(tmp_path, search, table, scores)
    assert found == [("final", "b/so", [0.8, 0.2]), ("final", "a/so", [0.9, 0.1])]


def test_trees_are_independent(tmp_path):
    """
    Two trees with two first steps each. The second tree continues its own best step, although it is worse than the one that the
    first tree dropped. A beam of the same N would keep both steps of the first.
    """

    class TwoTrees(LetterEngine):
        async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
            self.roots = getattr(self, "roots", [])
            if self.tokenizer.decode(prefix_ids) == "Q\n\n":
                self.roots.append(seed)
                self.table = self.table | {"": (["a", "b"], ["c", "d"])[len(self.roots) - 1]}
            return await super().sample(prefix_ids, n, stop, max_tokens, seed, key)

    table = {"a": ["=8", "e"], "d": ["f", "g"], "d/f": ["=7", "h"]}
    scores = {"a": 0.9, "b": 0.8, "c": 0.1, "d": 0.2, "a/so": 0.6, "a/e": 0.1}
    scores |= {"d/f": 0.4, "d/g": 0.3, "d/f/so": 0.7, "d/f/h": 0.5}
    search = DiverseTreeSearch(num_trees=2, width=2, **LIMITS)
    engine = TwoTrees(table)

    def score(path: list[str]) -> float:
        return scores["/".join(step.split()[0] for step in path)]

    run_levels(tmp_path, search, PROBLEMS, score, engine=engine, prompt=PLAIN, max_in_flight=2)
    found = [(reason, scores) for reason, _, scores, _, _ in results(tmp_path, search)["p"]]
    assert found == [("final", [0.2, 0.4, 0.7]), ("final", [0.9, 0.6])]
    assert search.n == 4 and len(set(engine.roots)) == 2
    assert [node.round for node in open_trees(tmp_path)["p"].tree.nodes if node.parent == -1] == [0, 0, 1, 1]


def test_steps_that_are_cut_off_or_blank_are_not_taken(tmp_path):
    """A step that is cut off must not be continued as if complete. A blank line before a step does not end it."""
    table = {"": ["...", "a", " "], " ": ["c"], "a": ["...", "...", "b"], "a/b": ["...", "...", "..."]}
    search = GreedyStepSearch(num_candidates=3, **LIMITS)
    found = search_table(tmp_path, search, table, {"a": 0.1, "c": 0.05, "a/b": 0.2})
    assert found == [("dead_end", "a/b", [0.1, 0.2])]
    texts = [node.text for node in open_trees(tmp_path)["p"].tree.nodes[:3]]
    assert texts == ["on and on and on and on and on", "a\n\n", " \n\nc\n\n"]
    search_table(tmp_path / "none", search, {"": ["..."] * 3}, {})
    assert results(tmp_path / "none", search) == {"p": [("dead_end", [], [], None, None)]}
    assert set(open_trees(tmp_path / "none")["p"].scores.values()) == {None}


def test_end_of_sequence_alone_is_not_a_step(tmp_path):
    """The previous step is the last one, and its score is the solution's."""
    table = {"": ["a", "b", ""], "a": ["", "c", "..."]}
    search = GreedyStepSearch(num_candidates=3, **LIMITS)
    found = search_table(tmp_path, search, table, {"a": 0.9, "b": 0.1, "a/c": 0.8})
    assert [(reason, scores) for reason, _, scores in found] == [("final", [0.9])]
    assert results(tmp_path, search)["p"][0][1] == ["a", ""]


def test_a_policy_that_never_answers(tmp_path):
    """The path stops at the depth limit with its own outcome, and is not a solution."""
    search = GreedyStepSearch(num_candidates=2, **LIMITS)

    def script(prefix: str, rng: random.Random) -> str:
        return f"{rng.random()}\n\n"

    progress = run_levels(tmp_path, search, PROBLEMS, lambda path: 0.5, script=script, prompt=PLAIN)
    (ending,) = results(tmp_path, search)["p"]
    assert ending[0] == "max_depth" and len(ending[1]) == 4 and ending[3:] == (None, None)
    assert progress.closed == {"done": 1} and progress.num_sequences == 8


def test_a_stated_answer_ends_the_solution(tmp_path):
    """Policies often continue after their answer. Following them would sample the next invented problem."""
    table = {"": ["a", "b"], "a": ["it is \\boxed{7}", "c"], "a/it is \\boxed{7}": ["=9", "=9"]}
    scores = {"a": 0.9, "b": 0.1, "a/it": 0.9, "a/c": 0.1}
    search = GreedyStepSearch(num_candidates=2, **LIMITS)
    assert search_table(tmp_path, search, table, scores) == [("final", "a/it", [0.9, 0.9])]
    assert results(tmp_path, search)["p"][0][3:] == ("7", True)


@pytest.mark.parametrize("first", ["1", "#### Plan"])
def test_numbers_and_headings_do_not_end_a_solution(tmp_path, first):
    """The extractor `last_number` would end the solution at every step with a number, and `hash` at every heading."""
    table = {"": [first, "2"], first: ["=7", "3"]}
    search = GreedyStepSearch(num_candidates=2, **LIMITS)

    def score(path: list[str]) -> float:
        return {first.split()[0]: 0.9, "2": 0.1, "so": 0.9, "3": 0.1}[path[-1].split()[0]]

    engine = LetterEngine(table)
    run_levels(
        tmp_path, search, PROBLEMS, score, engine=engine, prompt=PLAIN, extractors=("boxed", "hash", "last_number")
    )
    assert [ending[2:] for ending in results(tmp_path, search)["p"]] == [([0.9, 0.9], "7", True)]


def test_header_after_the_answer_is_not_part_of_it(tmp_path):
    """`# Step 3` ends the step with the answer. Otherwise `7 # Step 3` would be graded."""

    def script(prefix: str, rng: random.Random) -> str:
        return (
            "\n# Answer\n\n7\n\n# Step 3\n"
            if "# Step 2" in prefix.split("Q\n\n")[1]
            else "# Step 1\nAdd.\n\n# Step 2\n"
        )

    limits = LIMITS | {"rule": RULES["step_header"]}
    search = GreedyStepSearch(num_candidates=2, **limits)
    prompt = replace(PLAIN, rule="step_header")
    run_levels(tmp_path, search, PROBLEMS, lambda path: 0.5, script=script, prompt=prompt)
    expected = ("final", ["# Step 1\nAdd.", "# Step 2\n# Answer\n\n7"], [0.5, 0.5], "7", True)
    assert results(tmp_path, search)["p"] == [expected]


def test_invalid_settings_raise():
    with pytest.raises(ValueError, match="`num_candidates` is 0"):
        GreedyStepSearch(num_candidates=0, rule=RULE)
    with pytest.raises(ValueError, match="`max_depth` is 0"):
        BeamSearch(width=1, expansion=1, rule=RULE, max_depth=0)
    with pytest.raises(ValueError, match="no stop strings"):
        DiverseTreeSearch(num_trees=1, width=1, rule=regex_rule("x"))
    assert "rank" not in BeamSearch(width=2, expansion=2, rule=RULE).describe()
