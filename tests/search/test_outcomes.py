"""How solutions end: counts from the log for every search and start, and the option to change."""

import json
from dataclasses import asdict, replace

import pytest

from trl_hrm.search.engines.base import PrefixTooLong, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.nodes import tree_totals
from trl_hrm.search.outcomes import OUTCOMES, count_outcomes, describe_outcomes, outcome_warnings, reference_warnings
from trl_hrm.search.policies import FullTree, Rollouts
from trl_hrm.search.run_folder import check_manifest, finish_shard, node_files, read_summary, summary_warnings
from trl_hrm.search.tree import Problem

from .scripted import FINAL, PROMPT, RULE, SEARCHES, ExactGrade, ExactGrader, make_problems, read_trees, run_scripted


def always(text):
    return lambda prefix, rng: text


def finish(folder, search=SEARCHES["full_tree"], **options):
    """Search, and return the summary that `trl-hrm annotate` writes."""
    manifest = {"search": search.describe(), "extractors": ["marker", "boxed"], "grader": {"timeout": 10.0}}
    manifest |= {"prompt": asdict(PROMPT), "num_shards": 1}
    check_manifest(folder, manifest)
    run_scripted(folder, search, **options)
    summary = finish_shard(folder, 0, 1)
    return summary, summary_warnings(summary, manifest)


@pytest.mark.parametrize("name", list(SEARCHES))
def test_outcomes_match_the_leaf_counts(tmp_path, name):
    """Every leaf that labels count as unresolved must have a reason here."""
    summary, _ = finish(tmp_path, SEARCHES[name], problems=make_problems(8), grader=ExactGrader(unreadable=("8",)))
    totals = [tree_totals(tree) for tree in read_trees(tmp_path).values()]
    solutions = dict.fromkeys(OUTCOMES, 0) | summary["solutions"]
    assert solutions["right"] == sum(one["leaves_correct"] for one in totals) > 0
    assert solutions["right"] + solutions["wrong"] == sum(one["leaves_answered"] for one in totals)
    assert solutions["unreadable"] == sum(one["leaves_ungraded"] for one in totals) > 0
    unresolved = ("cut_off_by_tokens", "cut_off_by_context", "cut_off_by_depth", "without_answer")
    assert sum(solutions[one] for one in unresolved) == sum(one["leaves_unresolved"] for one in totals) > 0
    assert (solutions["cut_off_by_budget"] > 0) == (name == "narrow")
    assert (solutions["cut_off_by_depth"] > 0) == ("full_tree" in name or name == "narrow")


STEP, ANSWER = "# Step 1\nGo.\n\n# Step 2\n", "# Step 1\nGo.\n\n# Answer\n\n7\n# END!"
SHORT = FullTree(RULE, FINAL, num_children=2, max_depth=1, max_step_tokens=30)
WHOLE = Rollouts(FINAL, num_solutions=3, num_completions=0, max_solution_tokens=40)


@pytest.mark.parametrize(
    ("search", "text", "outcome", "advice"),
    [
        (SHORT, STEP, "cut_off_by_depth", "cut off. Most of them are cut off at the maximum depth. Raise --max_depth (now 1)"),
        (SHORT, "x" * 99, "cut_off_by_tokens", "at the maximum number of tokens. Raise --max_step_tokens (now 30)"),
        (WHOLE, "x" * 99, "cut_off_by_tokens", "Raise --max_solution_tokens (now 40) in a new --output_dir."),
        (
            WHOLE,
            "It is 7.",
            "without_answer",
            "have no answer. Check that --extractors (now 'marker' 'boxed') match the answers of the policy, that "
            "--final_stops (now '# END!') end a solution only after its answer, and that --prompt (now steps) asks for an answer.",
        ),
        (SHORT, "", "without_answer", "--extractors (now 'marker' 'boxed')"),
        (WHOLE, ANSWER.replace("7", "?"), "unreadable", "have an unreadable answer. Check that --extractors (now 'marker'"),
        (WHOLE, ANSWER, "right", None),
        (WHOLE, ANSWER.replace("7", "6"), "wrong", None),
    ],
)  # fmt: skip
def test_each_outcome_and_what_to_change(tmp_path, search, text, outcome, advice):
    grader = ExactGrader(unreadable=("?",))
    summary, warnings = finish(tmp_path, search, problems=make_problems(2), script=always(text), grader=grader)
    assert list(summary["solutions"]) == [outcome]
    if advice is None:
        assert warnings == []
    else:
        assert len(warnings) == 1 and warnings[0].startswith("100.0 % of the solutions ") and advice in warnings[0]


class Full(ScriptedEngine):
    """An engine whose context is limited to `length` characters."""

    def __init__(self, script, length):
        super().__init__(script)
        self.length = length

    async def sample(self, prefix_ids, n, stop, max_tokens, seed, key=""):
        left = self.length - len(prefix_ids)
        if left <= 0:
            raise PrefixTooLong("no room")
        return await super().sample(prefix_ids, n, stop, min(max_tokens, left), seed, key)


@pytest.mark.parametrize("room", [10, 21])
def test_context_limit_differs_from_token_limit(tmp_path, room):
    """If the policy's context is full, within a step or before it, raising --max_step_tokens would not help."""
    length = len(PROMPT.encode(ScriptedEngine(None).tokenizer, make_problems(1)[0][1].prompt)) + room
    search = replace(SHORT, max_depth=3)
    engine = Full(always(STEP), length)
    summary, warnings = finish(tmp_path, search, problems=make_problems(1), engine=engine)
    assert list(summary["solutions"]) == ["cut_off_by_context"]
    assert "Most of them reach the policy's context length." in warnings[0]


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, "--max_sequences (now 30) in"),
        ({"max_tokens": 700}, "--max_sequences (now 30) or --max_tokens (now 700) in"),
    ],
)
def test_budget_that_was_reached(changes, options):
    search = SEARCHES["narrow"].describe() | changes
    (warning,) = outcome_warnings({"right": 1, "cut_off_by_budget": 5, "cut_off_by_depth": 2}, search)
    assert warning.startswith("87.5 % of the solutions are cut off.") and f"Raise {options} a new" in warning


def test_no_warning_for_exactly_half():
    assert outcome_warnings({"right": 2, "cut_off_by_depth": 2}, {}) == outcome_warnings({}, {}) == []
    (warning,) = outcome_warnings({"right": 2, "cut_off_by_depth": 2, "cut_off_by_tokens": 1}, {"max_depth": 5})
    assert warning.startswith("60.0 % of the solutions are cut off.") and "--max_depth (now 5)" in warning


def test_shares_in_words():
    counts = {
        "right": 400,
        "wrong": 300,
        "cut_off_by_tokens": 150,
        "cut_off_by_depth": 50,
        "without_answer": 60,
        "unreadable": 40,
    }
    assert describe_outcomes(counts) == (
        "1,000 solutions: 40.0 % correct, 30.0 % wrong, 20.0 % cut off (15.0 % at the maximum number of tokens, 5.0 % at the maximum "
        "depth), 6.0 % without an answer, 4.0 % with an unreadable answer"
    )
    assert describe_outcomes({"right": 1, "not_graded": 1}).endswith(
        "0.0 % with an unreadable answer, 50.0 % not graded in time"
    )
    assert describe_outcomes({}) == "0 solutions"


class TimeoutGrader(ExactGrader):
    async def agrade(self, answer, reference):
        found = await super().agrade(answer, reference)
        return found if answer == reference else ExactGrade(None, "timeout")


def test_an_answer_that_timed_out_is_not_unreadable(tmp_path):
    text = ANSWER.replace("7", "6")
    summary, warnings = finish(tmp_path, WHOLE, problems=make_problems(1), script=always(text), grader=TimeoutGrader())
    assert summary["solutions"] == {"not_graded": 3} and "Raise --grader_timeout (now 10.0)." in warnings[0]


def test_earlier_starts_count(tmp_path):
    """The second start samples nothing for finished problems, and its summary must still include them."""
    whole, _ = finish(tmp_path / "whole", problems=make_problems(6))
    finish(tmp_path / "parts", problems=make_problems(2))
    parts, _ = finish(tmp_path / "parts", problems=make_problems(6))
    assert parts["solutions"] == whole["solutions"] and sum(whole["solutions"].values()) > 100
    assert read_summary(tmp_path / "parts")["solutions"] == whole["solutions"]


def test_runs_of_earlier_versions_are_read(tmp_path):
    """Their logs do not say why an answer was not graded, and their summaries have no outcomes."""
    grader = ExactGrader(unreadable=("8",))
    new, _ = finish(tmp_path, grader=grader)
    log = next(tmp_path.glob("log-*"))
    events = [json.loads(line) for line in log.read_text().splitlines()]
    statuses = [event.pop("status", None) for event in events if event["event"] == "grades"]
    assert any(statuses) and not all(statuses)
    log.write_text("".join(json.dumps(event) + "\n" for event in events))
    path = tmp_path / "summary-00000-of-00001.json"
    path.write_text(json.dumps({"problems": {"done": 6}, "failed_requests": 0, "log_bytes": log.stat().st_size}))
    assert read_summary(tmp_path)["solutions"] == {}
    node_files(tmp_path)
    found = read_summary(tmp_path)["solutions"]
    assert found["not_graded"] == new["solutions"]["unreadable"] > 0 and found["right"] == new["solutions"]["right"]


def test_summaries_of_shards_are_added(tmp_path):
    for shard in range(2):
        run_scripted(tmp_path, problems=make_problems(6)[shard::2], shard=(shard, 2))
        finish_shard(tmp_path, shard, 2)
    whole, _ = finish(tmp_path / "whole", problems=make_problems(6))
    assert read_summary(tmp_path)["solutions"] == whole["solutions"]


def test_problems_that_have_not_ended_do_not_count(tmp_path):
    """Leaves of an unfinished problem are not cut off, because the search will continue them."""
    finish(tmp_path, problems=make_problems(2))
    log = next(tmp_path.glob("log-*"))
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(keepends=True) if b'"close"' not in line))
    assert finish_shard(tmp_path, 0, 1)["solutions"] == {}


class TestReferences:
    def test_unreadable_ones_are_counted_and_named(self, tmp_path):
        problems = [(i, Problem(f"p{i}", f"{i}?", "???" if i % 2 else "7")) for i in range(16)]
        summary, warnings = finish(tmp_path, problems=problems, grader=ExactGrader(unreadable=("???",)))
        assert summary["problems"] == {"done": 8, "ungradable": 8}
        assert [one["problem_id"] for one in summary["unreadable_references"]] == ["p1", "p3", "p5", "p7", "p9"]
        assert warnings == [
            "8 problems have unreadable reference answers and were skipped: p1 ('???'), p3 ('???'), p5 ('???'), p7 ('???'), "
            "p9 ('???'), 3 more. Correct the answers, or remove these problems."
        ]
        assert read_summary(tmp_path)["unreadable_references"] == summary["unreadable_references"]

    def test_one_and_none(self):
        (warning,) = reference_warnings(1, [{"problem_id": "a", "answer": "x" * 99}])
        assert warning.startswith("1 problem has an unreadable reference answer and was skipped: a ('xxx")
        assert len(warning) < 210 and reference_warnings(0, []) == []


def test_token_limit_without_a_manifest(tmp_path):
    run_scripted(tmp_path, SHORT, make_problems(1), script=always("x" * 99))
    with EventLog(next(tmp_path.glob("log-*"))) as log:
        assert count_outcomes(log.read("p000"), {}) == {"cut_off_by_tokens": 2}
