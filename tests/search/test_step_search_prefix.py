"""Step searches that continue from a prefix: trees, tokens, scores, errors, and runs without a prefix."""

import json
import random
from dataclasses import replace
from functools import partial

import pytest

from trl_hrm import StepFormat
from trl_hrm.scoring.candidate_scores import score_fitting
from trl_hrm.scoring.scorer import StepScorer
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.search.engines.base import PrefixTooLong, ScriptedEngine
from trl_hrm.search.nodes import read_trees
from trl_hrm.search.run_folder import finish_shard
from trl_hrm.search.step_search import BeamSearch, DiverseTreeSearch, GreedyStepSearch, ending_extractors
from trl_hrm.search.steps import RULES, cut_prefix
from trl_hrm.search.tree import ROOT, Node, Problem, make_id
from trl_hrm.tiny_model import make_tokenizer

from ..helpers import tiny_model, tiny_tokenizer
from .leveled import LETTER_LIMITS as LIMITS
from .leveled import LIMITS as HEADER_LIMITS
from .leveled import (
    PLAIN,
    PROBLEMS,
    SEARCHES,
    LetterEngine,
    PathScorer,
    everything,
    log_of,
    open_trees,
    results,
    run_levels,
)
from .scripted import PROMPT, ExactGrader, make_problems, run_scripted, write_solution


GREEDY = GreedyStepSearch(num_candidates=2, **LIMITS)
HEADED = "# Step 1\nThe value is 3.\n\n# Step 2\nThe value is 4.\n\n# Step 3"


def problem_after(prefix: str, problem_id: str = "p") -> list[tuple[int, Problem]]:
    return [(0, Problem(problem_id, "Q", "7", prefix))]


def with_prefixes(number: int) -> list[tuple[int, Problem]]:
    return [(i, replace(problem, prefix=HEADED)) for i, problem in make_problems(number)]


def search_after(tmp_path, search, prefix: str, table: dict[str, list[str]], scores: dict[str, float]):
    """Return endings as (reason, path, scores), and the scorer with its recorded calls."""
    scorer = PathScorer(lambda path: scores.get("/".join(step.split()[0] for step in path), 0.0))
    run_levels(tmp_path, search, problem_after(prefix), engine=LetterEngine(table), prompt=PLAIN, scorer=scorer)
    found = [
        (reason, "/".join(step.split()[0] for step in path if step), given)
        for reason, path, given, _, _ in results(tmp_path, search)["p"]
    ]
    return found, scorer


# the trees


def test_log_without_a_prefix_is_unchanged(tmp_path):
    """
    Expected bytes from before prefixes existed. With other bytes, no run could be resumed. With other ids, every sample of every
    run would have another seed. Grades and scores come in either order.
    """
    search = GreedyStepSearch(num_candidates=2, **LIMITS)
    engine = LetterEngine({"": ["a", "b"], "a": ["=7", "c"]})
    run_levels(tmp_path, search, PROBLEMS, lambda path: 0.75 if "so" in path[-1] else 0.5, engine=engine, prompt=PLAIN)
    above = '"problem_id": "p", "above": "14c425b816d75694", "round": 0'
    below = '"problem_id": "p", "above": "a06cc0f7f219ba3f", "round": 0'
    step = '"num_cached": 0, "finish": "stop", "stop_reason": "\\n\\n", "is_final": false, "tail": 0}'
    assert sorted(log_of(tmp_path).read_text().splitlines()) == sorted(
        [
            '{"event": "problem", "problem_id": "p", "position": 0, "root_id": "14c425b816d75694", "prompt": "Q", "answer": "7", '
            '"prompt_ids": [81, 10, 10]}',
            f'{{"event": "samples", {above}, "role": "step", "cut": false, "weight": 1.0, "seed": 970877615931392, "samples": ['
            f'{{"token_ids": [97, 10, 10], "text": "a\\n\\n", {step}, {{"token_ids": [98, 10, 10], "text": "b\\n\\n", {step}]}}',
            f'{{"event": "grades", {above}, "correct": [null, null]}}',
            f'{{"event": "scores", {above}, "scores": [0.5, 0.5]}}',
            f'{{"event": "samples", {below}, "role": "step", "cut": false, "weight": 1.0, "seed": 2567781886263296, "samples": ['
            '{"token_ids": [115, 111, 32, 92, 98, 111, 120, 101, 100, 123, 55, 125, 10, 35, 32, 69, 78, 68, 33], '
            '"text": "so \\\\boxed{7}\\n# END!", "num_cached": 0, "finish": "stop", "stop_reason": "# END!", "is_final": true, '
            f'"answer": "7", "tail": 0}}, {{"token_ids": [99, 10, 10], "text": "c\\n\\n", {step}]}}',
            f'{{"event": "grades", {below}, "correct": [true, null]}}',
            f'{{"event": "scores", {below}, "scores": [0.75, 0.5]}}',
            '{"event": "close", "problem_id": "p", "status": "done"}',
        ]
    )


def test_the_tree_begins_with_the_given_steps(tmp_path):
    """
    Compare node by node. The reward model sees the given steps before the sampled ones, but their scores are not kept. They
    are the highest here, so with `max` as aggregate all paths would be equal, and the smallest text would win.
    """
    table = {"a/b": ["c", "d"], "a/b/d": ["=7", "e"]}
    scores = {"a": 1.0, "a/b": 1.0, "a/b/c": 0.1, "a/b/d": 0.4, "a/b/d/so": 0.5, "a/b/d/e": 0.2}
    search = GreedyStepSearch(num_candidates=2, rank=max, **LIMITS)
    found, scorer = search_after(tmp_path, search, "a\n\nb\n\n", table, scores)
    assert found == [("final", "a/b/d/so", [0.4, 0.5])]
    assert results(tmp_path, search)["p"][0][3:] == ("7", True)
    opened = open_trees(tmp_path)["p"]
    root = make_id("root", 42, "p")
    first, second = make_id("given", root, 0), make_id("given", root, 1)
    ids = [[ord(character) for character in text] for text in ("Q\n\n", "a\n\n", "b\n\n")]
    assert opened.tree.prompt_ids == ids[0] and opened.num_given == 2 and opened.start == 1
    assert opened.tree.nodes[:2] == [
        Node(first, ROOT, 0, 0, ids[1], "a\n\n", role="given"),
        Node(second, 0, 0, 0, ids[2], "b\n\n", role="given"),
    ]
    assert [(node.parent, node.text[:1], node.role) for node in opened.sampled] == [
        (1, "c", "step"),
        (1, "d", "step"),
        (3, "s", "step"),
        (3, "e", "step"),
    ]
    assert opened.scores == {0: None, 1: None, 2: 0.1, 3: 0.4, 4: 0.5, 5: 0.2}
    shown = [[(tree.completions, tree.parents) for tree in call] for call in scorer.calls]
    assert shown == [
        [(["a", "b", "c", "d"], [-1, 0, 1, 1])],
        [(["a", "b", "d", "so \\boxed{7}\n# END!", "e"], [-1, 0, 1, 2, 2])],
    ]
    event = json.loads(log_of(tmp_path).read_text().splitlines()[0])
    assert event["prefix"] == "a\n\nb\n\n" and event["prefix_ids"] == ids[1] + ids[2]
    assert event["prefix_cuts"] == [[3, 3, 0], [6, 6, 0]]


def test_a_beam_and_trees_begin_at_the_last_given_step(tmp_path):
    """Width 2, expansion 2: a beam samples four next steps of the prefix. Two trees request it once each."""
    table = {"a": ["b", "c", "d", "=8"], "a/b": ["e", "f"], "a/c": ["=7", "g"]}
    scores = {"a/b": 0.6, "a/c": 0.9, "a/d": 0.5, "a/so": 0.1, "a/b/e": 0.2, "a/b/f": 0.3}
    scores |= {"a/c/so": 0.8, "a/c/g": 0.1}
    beam = BeamSearch(width=2, expansion=2, **LIMITS | {"max_depth": 3})
    found, _ = search_after(tmp_path / "beam", beam, "a\n\n", table, scores)
    assert found == [("final", "a/c/so", [0.9, 0.8]), ("max_depth", "a/b/f", [0.6, 0.3])]
    nodes = open_trees(tmp_path / "beam")["p"].sampled
    assert [node.parent for node in nodes] == [0, 0, 0, 0, 2, 2, 1, 1]
    trees = DiverseTreeSearch(num_trees=2, width=2, **LIMITS)
    found, _ = search_after(tmp_path / "trees", trees, "a\n\n", table, scores)
    assert found == [("final", "a/c/so", [0.9, 0.8])] * 2
    nodes = open_trees(tmp_path / "trees")["p"].sampled
    assert [node.round for node in nodes if node.parent == 0] == [0, 0, 1, 1]
    assert len({node.seed for node in nodes}) == len(nodes)


class ByPrefix(ScriptedEngine):
    """Write depending on the previous text and the sample number, not on seeds or ids."""

    @staticmethod
    def _rng(prefix: str, seed: int, use: str) -> random.Random:
        return ScriptedEngine._rng(prefix, seed % 2**16, use)


def write_plain(prefix: str, rng: random.Random) -> str:
    """Write solutions without headers."""
    if prefix.count("\n\n") > 3 and rng.random() < 0.3:
        return f"So \\boxed{{{rng.choice((7, 8))}}}\n# END!"
    return f"The value is {rng.randrange(1000)}.\n\n"


KINDS = {"blank_line": (PLAIN, write_plain, LIMITS), "step_header": (PROMPT, write_solution, HEADER_LIMITS)}


@pytest.mark.parametrize("name", ["blank_line", "step_header"])
def test_continuation_equals_the_uncut_search(tmp_path, name):
    """
    Cut after each of its steps, a greedy search must continue with the same texts, scores, ids and answer. With headers, the stop
    strings must continue from the given header, and the next step must keep it.
    """
    prompt, script, limits = KINDS[name]
    search = GreedyStepSearch(num_candidates=3, **limits | {"max_depth": 8})
    given = {"engine": ByPrefix(script), "prompt": prompt}
    compared = 0
    for number in range(20):
        problem, folder = Problem("p", f"Question: Is it {number}?", "7"), tmp_path / f"{number}"
        run_levels(folder, search, [(0, problem)], **given)
        opened = open_trees(folder)["p"]
        (expected,) = results(folder, search)["p"]
        (ending,) = search.endings(opened)
        path = opened.tree.path(ending.node)
        for cut in range(1, len(path)):
            prefix = opened.tree.text(path[cut - 1])
            after = tmp_path / f"{number}-{cut}"
            run_levels(after, search, [(0, replace(problem, prefix=prefix))], **given)
            (found,) = results(after, search)["p"]
            assert found == (*expected[:2], expected[2][cut:], *expected[3:])
            again = open_trees(after)["p"]
            (there,) = search.endings(again)
            assert again.tree.prefix_ids(there.node) == opened.tree.prefix_ids(ending.node)
            assert again.num_given == cut and again.tree.problem.prefix == prefix
            compared += 1
    assert compared >= 12


def test_headers_count_on(tmp_path):
    """After `# Step 3`, a step ends at `# Step 3`, 4 or 5. Counting from the start would miss `# Step 4`."""
    asked = []

    class Asked(ScriptedEngine):
        async def sample(self, prefix_ids, n, stop, *args, **kwargs):
            asked.append((self.tokenizer.decode(prefix_ids).rpartition("Question: Q\n\n")[2], stop))
            return await super().sample(prefix_ids, n, stop, *args, **kwargs)

    search = GreedyStepSearch(num_candidates=2, **HEADER_LIMITS | {"max_depth": 3})
    problem = problem_after(HEADED)
    run_levels(tmp_path, search, problem, engine=Asked(lambda prefix, rng: "\nThe value is 5.\n\n# Step 4\nMore"))
    assert asked == [(HEADED, ("# Step 3", "# Step 4", "# Step 5", "# END!"))]
    (ending,) = results(tmp_path, search)["p"]
    assert ending[0] == "max_depth"
    assert ending[1] == [f"# Step {k}\nThe value is {k + 2}." for k in (1, 2, 3)]
    given = open_trees(tmp_path)["p"].tree.nodes[:2]
    assert [node.text for node in given] == [
        "# Step 1\nThe value is 3.\n\n",
        "# Step 2\nThe value is 4.\n\n# Step 3",
    ]
    assert [(node.tail, node.stop_reason) for node in given] == [(0, None), (8, "# Step 3")]


def test_given_steps_count_for_the_depth(tmp_path):
    """Two of four steps are given and two sampled. Counted separately, solutions from a prefix could be longer."""
    search = GreedyStepSearch(num_candidates=2, **LIMITS)
    run_levels(
        tmp_path, search, problem_after("a\n\nb\n\n"), script=lambda prefix, rng: f"{rng.random()}\n\n", prompt=PLAIN
    )
    (ending,) = results(tmp_path, search)["p"]
    assert ending[0] == "max_depth" and len(ending[1]) == 4 and len(ending[2]) == 2


def test_end_of_sequence_after_a_prefix_is_not_a_solution(tmp_path):
    """Nothing was written, so nothing can be judged. It must not beat a step with a low score."""
    search = GreedyStepSearch(num_candidates=3, **LIMITS)
    found, _ = search_after(tmp_path / "a", search, "a\n\n", {"a": ["", "=7", ""]}, {"a/so": 0.01})
    assert found == [("final", "a/so", [0.01])]
    found, _ = search_after(tmp_path / "b", search, "a\n\n", {"a": ["", "", ""]}, {})
    assert found == [("dead_end", "a", [])]


def test_prefix_that_fills_the_context(tmp_path):
    """Given nodes are not samples, so the problem is excluded from the accuracy like a prompt that is too long."""

    class Full(ScriptedEngine):
        async def sample(self, *args, **kwargs):
            raise PrefixTooLong("no room")

    progress = run_levels(tmp_path, problems=with_prefixes(2), engine=Full(write_solution), max_failures=1)
    assert progress.closed == {"prompt_too_long": 2}


def test_references_are_checked_before_anything_is_sampled(tmp_path):
    """The tree has nodes from the start. They do not mean that the reference was checked."""
    problems = [(i, replace(problem, answer="?")) for i, problem in with_prefixes(2)]
    progress = run_levels(tmp_path, problems=problems, grader=ExactGrader(unreadable=("?",)))
    assert progress.closed == {"ungradable": 2} and progress.num_sequences == 0


# logs and files


@pytest.mark.parametrize("name", list(SEARCHES))
def test_cut_after_any_event_and_resumed(tmp_path, name):
    """A kill between any two events, or while the prefix is stored, must change no tree, score or choice."""
    whole = tmp_path / "whole"
    run_levels(whole, SEARCHES[name], with_prefixes(3))
    expected, chosen, log = everything(whole), results(whole, SEARCHES[name]), log_of(whole).read_bytes()
    lines = log.splitlines(keepends=True)
    assert len(lines) > 14 and all(tree.problem.prefix for tree, _ in expected.values())
    for kept in range(len(lines)):
        for half in (0, len(lines[kept]) // 2) if kept % 4 == 0 else (0,):
            folder = tmp_path / f"{kept}-{half}"
            folder.mkdir()
            log_of(folder).write_bytes(b"".join(lines[:kept]) + lines[kept][:half])
            run_levels(folder, SEARCHES[name], with_prefixes(3))
            assert everything(folder) == expected and results(folder, SEARCHES[name]) == chosen
            assert sorted(log_of(folder).read_bytes().splitlines()) == sorted(log.splitlines())


def test_another_prefix_is_refused(tmp_path):
    """The samples in the log continue another text. Adding or removing a prefix under the same id must raise too."""
    run_levels(tmp_path / "a", problems=with_prefixes(2))
    other = [(i, replace(problem, prefix=HEADED.replace("3.", "5."))) for i, problem in make_problems(2)]
    for problems in (other, make_problems(2)):
        with pytest.raises(ValueError, match="problem 'p000' changed since it was started: prefix was \"# Step 1"):
            run_levels(tmp_path / "a", problems=problems)
    run_levels(tmp_path / "b", problems=make_problems(2))
    with pytest.raises(
        ValueError, match='problem \'p000\' changed since it was started: prefix was "" and is "# Step 1'
    ):
        run_levels(tmp_path / "b", problems=with_prefixes(2))


def test_node_files_distinguish_given_and_sampled_steps(tmp_path):
    """Otherwise every export of the run would present given steps as written by the policy."""
    run_levels(tmp_path, problems=with_prefixes(2))
    finish_shard(tmp_path, 0, 1)
    for tree in read_trees(tmp_path / "nodes-00000-of-00001.parquet"):
        assert [node.role for node in tree.nodes[:2]] == ["given"] * 2
        assert {node.role for node in tree.nodes[2:]} == {"step"}
        assert [node.is_sample for node in tree.nodes[:3]] == [False, False, True]


# tokens


class Tokenized(ScriptedEngine):
    """Use a real tokenizer, and record the ids to continue."""

    def __init__(self, script, tokenizer):
        super().__init__(script)
        self.tokenizer = tokenizer
        self.asked: list[list[int]] = []

    async def sample(self, prefix_ids, *args, **kwargs):
        self.asked.append(list(prefix_ids))
        return await super().sample(prefix_ids, *args, **kwargs)


@pytest.mark.parametrize(
    ("rule", "prefix", "steps"),
    [
        ("blank_line", "1+2=3.\n\nso add x\n\n", ["1+2=3.", "so add x"]),
        ("step_header", "# Step 1\n1+2=3.\n\n# Step 2\nsub\n\n# Step 3", ["# Step 1\n1+2=3.", "# Step 2\nsub"]),
        ("sentence", "add x. so y. then sub. ", ["add x.", "so y.", "then sub."]),  # tokens begin with the space
        ("formula", "add \\(x\\)\n\nso \\[y\\]\n\n", ["add \\(x\\)", "so \\[y\\]"]),
    ],
)
def test_prompt_and_prefix_are_encoded_separately(tmp_path, rule, prefix, steps):
    """Encoding both together would give other ids at the border. The nodes must hold all ids of the prefix."""
    tokenizer = tiny_tokenizer()
    engine = Tokenized(lambda prefix, rng: "thus\n# END!", tokenizer)
    limits = LIMITS | {"rule": RULES[rule]}
    search = GreedyStepSearch(num_candidates=1, **limits)
    run_levels(tmp_path, search, problem_after(prefix), engine=engine, prompt=replace(PLAIN, rule=rule))
    prompt_ids, ids = tokenizer.encode("Q\n\n"), tokenizer.encode(prefix, add_special_tokens=False)
    assert engine.asked == [prompt_ids + ids] and len(ids) < len(prefix)
    opened = open_trees(tmp_path)["p"]
    given = opened.tree.nodes[: opened.num_given]
    assert [token for node in given for token in node.token_ids] == ids
    assert "".join(node.text for node in given) == prefix
    for i, node in enumerate(given):
        assert tokenizer.decode(opened.tree.prefix_ids(i)) == "Q\n\n" + opened.tree.text(i)
        assert opened.tree.step_text(i) == steps[i] and node.token_ids
    assert len(given) == len(steps)
    last = opened.tree.step_text(len(given))
    assert last == ("# Step 3thus\n# END!" if rule == "step_header" else "thus\n# END!")


def test_a_token_across_the_end_of_a_step_stays_whole():
    """Its characters after the end belong to the next step, as in a solution that is cut."""
    ids, cuts = cut_prefix(RULES["sentence"], tiny_tokenizer(), [], "add x. so y. ")
    assert tiny_tokenizer().decode(ids[: cuts[0].tokens]) == "add x. so" and cuts[0][1:] == (9, 2)
    assert cuts[1] == (len(ids), 13, 0)


@pytest.mark.parametrize("text", ["cafe\u0301 au lait.\n\n", "add x<|endoftext|>.\n\n"])
def test_a_text_that_the_tokenizer_changes_is_refused(tmp_path, text):
    """With composed characters or special tokens, steps would be cut some characters off."""
    engine = Tokenized(write_plain, make_tokenizer(["add x"] * 3, 300))
    with pytest.raises(ValueError, match=r"decodes the prefix '.*' as '.*'"):
        run_levels(tmp_path, problems=problem_after(text), search=GREEDY, engine=engine, prompt=PLAIN)


# scores


def test_merged_spans_reach_into_the_prefix(tmp_path):
    """
    `spans=(1, 2)` also judges the first sampled step merged with the last given one. If a correction follows a given error,
    only this span can approve it.
    """
    step_format = StepFormat(merge_separator="\n")
    scorer = StepScorer(tiny_model(step_format, max_position_embeddings=1024), tiny_tokenizer(), step_format)
    spans = partial(score_fitting, scorer, scoring=ScoringConfig([1, 2], "mean"))
    search = SEARCHES["greedy"]
    run_levels(tmp_path, search, with_prefixes(3), scorer=spans)
    reached = 0
    for opened in open_trees(tmp_path).values():
        for i, score in opened.scores.items():
            if score is None:
                continue
            steps = [opened.tree.step_text(j) for j in opened.tree.path(i)]
            prompt = opened.tree.problem.prompt
            assert score == pytest.approx(scorer.score([prompt], [[steps]], (1, 2), "mean")[0][0][-1], abs=1e-5)
            if len(steps) == 3:  # the first after the prefix
                alone = scorer.score([prompt], [[steps]])[0][0][-1]
                merged = scorer.score([prompt], [[[steps[0], step_format.merge(steps[1:])]]])[0][0][-1]
                assert score == pytest.approx((alone + merged) / 2, abs=1e-5)
                reached += abs(alone - merged) > 1e-3
    assert reached >= 6


# errors


def fault(
    prefix: str, rule: str = "blank_line", max_depth: int = 4, extractors=("marker", "boxed", "hash")
) -> str | None:
    search = GreedyStepSearch(num_candidates=2, rule=RULES[rule], final_stops=("# END!",), max_depth=max_depth)
    return search.prefix_fault(prefix, ending_extractors(extractors))


@pytest.mark.parametrize(
    ("rule", "prefix"),
    [
        ("blank_line", "a\n\n"),
        ("blank_line", "a\n \n\nb\n\nc\n\n"),
        ("blank_line", "#### Plan\n\n"),  # a heading, not an answer
        ("sentence", "Is it 3? "),
        ("sentence", "It is 3.\n"),
        ("formula", "So \\(x\\)\n\n"),
        ("step_header", HEADED),
        ("step_header", "# Step 1\nA.\n# Step 12"),
    ],
)
def test_valid_prefixes(rule, prefix):
    assert fault(prefix, rule) is None


BAD = [
    (
        "blank_line",
        "a\n\nb",
        r"ends with 'a\\n\\nb'. It must end at the end of a step, which for the rule 'blank_line' is '\\n\\n'",
    ),
    ("blank_line", "a\n", "must end at the end of a step"),
    ("blank_line", "a\n\n# Answer\n\n", "must end at the end of a step"),  # the blank line within the answer
    (
        "sentence",
        "It is 3.",
        r"is '. ' or '.\\n' or '。'. Cut it there, or use another rule \(--segmentation\)",
    ),
    (
        "step_header",
        "# Step 1\nA.\n\n",
        "the rule 'step_header' is the header of the next step, such as '# Step 2'",
    ),
    ("step_header", HEADED + "\nThe", "must end at the end of a step"),
    ("step_header", HEADED + "\n", "must end at the end of a step"),
    ("step_header", "# Step 1", "the prefix is '# Step 1'. It must contain at least one step"),
    ("blank_line", "\n\n", r"the prefix is '\\n\\n'. It must contain at least one step"),
    (
        "blank_line",
        "a\n\n# END!\n\n",
        "the prefix contains '# END!', which ends a solution.* Cut it before the answer",
    ),
    ("blank_line", "a\n\nso \\boxed{7}\n\n", "the prefix states the answer '7', which ends a solution"),
    ("step_header", "# Step 1\nA.\n\n# Answer\n\n7\n\n# Step 2", "the prefix states the answer '7', which"),
    ("blank_line", "a\n\nb\n\nc\n\nd\n\n", "has 4 steps and max_depth is 4.* Raise --max_depth"),
]


@pytest.mark.parametrize(("rule", "prefix", "message"), BAD)
def test_invalid_prefixes_raise(tmp_path, rule, prefix, message):
    """Cut inside a step, its rest would be judged as a step. After an answer, nothing is left to search."""
    search = GreedyStepSearch(num_candidates=2, **LIMITS | {"rule": RULES[rule]})
    engine = ScriptedEngine(write_plain)
    with pytest.raises(ValueError, match=message) as error:
        run_levels(tmp_path, search, problem_after(prefix), engine=engine, prompt=PLAIN)
    assert str(error.value) == f"problem 'p': {fault(prefix, rule)}"
    assert not log_of(tmp_path).read_bytes() and not engine.most_in_flight


def test_only_step_searches_continue_from_a_prefix(tmp_path):
    """Other searches start at the prompt, and would annotate the problem without its prefix."""
    with pytest.raises(
        ValueError,
        match="problem 'p000'.*'# Step 1.*Remove the prefix",
    ):
        run_scripted(tmp_path, problems=with_prefixes(2))
    assert not log_of(tmp_path).read_bytes()
