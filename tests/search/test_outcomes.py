"""How solutions end: counts from the log for every search and start, and the option to change."""

import json
from dataclasses import asdict, replace

import pytest

from trl_hrm.search.engines.base import PrefixTooLong, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.nodes import tree_totals
from trl_hrm.search.outcomes import (
    MIN_GRADED,
    OUTCOMES,
    count_outcomes,
    count_unsplit,
    describe_outcomes,
    outcome_of,
    outcome_warnings,
    reference_warnings,
    step_warnings,
)
from trl_hrm.search.policies import FullTree, Rollouts
from trl_hrm.search.run_folder import check_manifest, finish_shard, node_files, read_summary, summary_warnings
from trl_hrm.search.steps import RULES
from trl_hrm.search.tree import Problem

from .scripted import FINAL, PROMPT, RULE, SEARCHES, ExactGrade, ExactGrader, make_problems, read_trees, run_scripted


def always(text):
    return lambda prefix, rng: text


def finish(folder, search=SEARCHES["full_tree"], **options):
    """Search, and return the summary that `trl-hrm annotate` writes."""
    manifest = {"search": search.describe(), "extractors": ["marker", "boxed"], "grader": {"timeout": 10.0}}
    manifest |= {"prompt": asdict(PROMPT), "steps": asdict(RULE), "num_shards": 1}
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
    unresolved = [one for one in solutions if one.startswith("cut_off") and one != "cut_off_by_budget"] + [
        "without_answer"
    ]
    assert sum(solutions[one] for one in unresolved) == sum(one["leaves_unresolved"] for one in totals) > 0
    assert (solutions["cut_off_by_budget"] > 0) == (name == "narrow")
    assert (solutions["cut_off_by_depth"] > 0) == ("full_tree" in name or name == "narrow")


STEP, ANSWER = "# Step 1\nGo.\n\n# Step 2\n", "# Step 1\nGo.\n\n# Answer\n\n7\n# END!"
SHORT = FullTree(RULE, FINAL, num_children=2, max_depth=1, max_step_tokens=30)
WHOLE = Rollouts(FINAL, num_solutions=3, num_completions=0, max_solution_tokens=40)


NEW = "in a new --output_dir."
LONG = "# Step 1\nGo.\n" + "x" * 99
THINKING = "to the length of the thinking, or turn thinking off, for many models with --chat_template_kwargs '{\"enable_thinking\": false}',"
NO_ANSWER = (
    "without an answer. Check that --prompt (now steps) asks for an answer, that --extractors (now 'marker' 'boxed') match the answers "
    "of the policy, and that --final_stops (now '# END!') end a solution only after its answer."
)
FORMAT = (
    "with an unreadable answer. Check that --extractors (now 'marker' 'boxed') extract only the answer, and that the reference answers "
    "have the same format."
)


@pytest.mark.parametrize(
    ("search", "text", "outcome", "why"),
    [
        (SHORT, STEP, "cut_off_by_depth", f"at the maximum depth. Raise --max_depth (now 1) {NEW}"),
        (SHORT, LONG, "cut_off_by_tokens", f"at the maximum number of tokens. Raise --max_step_tokens (now 30) {NEW}"),
        (WHOLE, LONG, "cut_off_by_tokens", f"at the maximum number of tokens. Raise --max_solution_tokens (now 40) {NEW}"),
        (SHORT, f"<think>{LONG}", "cut_off_in_thinking", f"while thinking. Raise --max_step_tokens (now 30) {THINKING} {NEW}"),
        (
            WHOLE,
            f"It is.\n<think>{LONG}",
            "cut_off_in_thinking",
            f"while thinking. Raise --max_solution_tokens (now 40) {THINKING} {NEW}",
        ),
        (
            WHOLE,
            f"<think>no</think>\\boxed{{7}}\n{LONG}",
            "cut_off_after_answer",
            f"after an answer. Set --final_stops (now '# END!') to a text that the policy writes after its answer {NEW}",
        ),
        # an answer that may be incomplete
        (
            WHOLE,
            f"x = \\boxed{{7}} {LONG[14:]}",
            "cut_off_by_tokens",
            f"at the maximum number of tokens. Raise --max_solution_tokens (now 40) {NEW}",
        ),
        (WHOLE, "It is 7.", "without_answer", NO_ANSWER),
        (SHORT, "", "without_answer", NO_ANSWER),
        (WHOLE, ANSWER.replace("7", "?"), "unreadable", FORMAT),
        (WHOLE, ANSWER, "right", None),
        (WHOLE, ANSWER.replace("7", "6"), "wrong", None),
    ],
)  # fmt: skip
def test_each_outcome_and_what_to_change(tmp_path, search, text, outcome, why):
    grader = ExactGrader(unreadable=("?",))
    summary, warnings = finish(tmp_path, search, problems=make_problems(2), script=always(text), grader=grader)
    assert list(summary["solutions"]) == [outcome]
    total = summary["solutions"][outcome]
    if why is None:
        assert warnings == []
        return
    if outcome.startswith("cut_off"):
        why = f"cut off. Most of them ({total}) are cut off {why}"
    assert warnings == [f"{total} of {total} solutions (100.0 %) have no grade: {total} {why}"]


def test_thinking_that_the_prompt_opened(tmp_path):
    """DeepSeek-R1's template ends the prompt with the opening tag, so the text of the policy has none."""
    problems = [(0, Problem("a", "6 + 1?<think>", "7"))]
    for name, search in (("steps", SHORT), ("rollouts", WHOLE)):
        summary, _ = finish(tmp_path / name, search, problems=problems, script=always(LONG))
        assert list(summary["solutions"]) == ["cut_off_in_thinking"]


def test_several_causes_count_together():
    """Solutions without a grade may be most of all, although each cause alone is not. The advice is about the largest cause."""
    counts = {"right": 15, "wrong": 25, "cut_off_by_depth": 20, "cut_off_by_tokens": 10, "without_answer": 1_200}
    counts |= {"unreadable": 3, "not_graded": 2}
    settings = {"prompt": asdict(PROMPT), "extractors": ["hash"], "grader": {"timeout": 5}}
    (warning,) = outcome_warnings(counts, {"max_depth": 7}, settings)
    assert warning == (
        "1,235 of 1,275 solutions (96.9 %) have no grade: 30 cut off, 1,200 without an answer, 3 with an unreadable answer, 2 not graded "
        "in time. Check that --prompt (now steps) asks for an answer, that --extractors (now 'hash') match the answers of the policy, "
        "and that --final_stops (now '# END!') end a solution only after its answer."
    )
    (warning,) = outcome_warnings(
        {"right": 2, "wrong": 2, "cut_off_by_depth": 3, "without_answer": 2}, {"max_depth": 7}
    )
    assert warning == (
        "5 of 9 solutions (55.6 %) have no grade: 3 cut off, 2 without an answer. Most of them (3) are cut off at the maximum depth. "
        "Raise --max_depth (now 7) in a new --output_dir."
    )


def test_given_solutions_are_not_sampled_with_other_options():
    (warning,) = outcome_warnings({"right": 1, "cut_off_by_tokens": 2}, {})
    assert warning == (
        "2 of 3 solutions (66.7 %) have no grade: 2 cut off. Sample solutions with a larger maximum number of tokens."
    )
    (warning,) = outcome_warnings({"right": 1, "without_answer": 2}, {}, {"extractors": ["hash"]})
    assert warning == (
        "2 of 3 solutions (66.7 %) have no grade: 2 without an answer. Check that --extractors (now 'hash') match the solutions."
    )


def test_outcomes_of_whole_solutions():
    assert [outcome_of(None, correct, None) for correct in (True, False)] == ["right", "wrong"]
    assert [outcome_of(None, None, finish) for finish in ("length", "eos")] == ["cut_off_by_tokens", "without_answer"]
    assert [outcome_of("7", correct, "eos") for correct in (True, None)] == ["right", "not_graded"]
    texts = {
        "<think>a": "cut_off_in_thinking",
        "\\boxed{7}\na": "cut_off_after_answer",
        "\\boxed{7}": "cut_off_by_tokens",
    }
    assert {text: outcome_of(None, None, "length", text) for text in texts} == texts
    assert outcome_of(None, None, "length", "\\boxed{7}\na", ["hash"]) == "cut_off_by_tokens"
    assert outcome_of(None, None, "length", "1 + 6 = 7.\nSo", ["boxed", "last_number"]) == "cut_off_by_tokens"


def test_grades_that_are_all_the_same():
    assert outcome_warnings({"right": MIN_GRADED - 1}, {}) == outcome_warnings({"wrong": MIN_GRADED - 1}, {}) == []
    assert outcome_warnings({"right": MIN_GRADED, "wrong": 1}, {}) == []
    assert outcome_warnings({"right": 1_000, "without_answer": 1_000}, {}) == [
        "All 1,000 solutions with a grade are correct, so they do not show which steps are better. Use harder problems or a weaker "
        "policy."
    ]
    assert outcome_warnings({"wrong": 50}, {}, {"extractors": ["boxed"]}) == [
        "All 50 solutions with a grade are wrong, so they do not show which steps are better. Check that the reference answers belong to "
        "the problems, and that --extractors (now 'boxed') extract the answers of the policy. Otherwise, use easier problems or a "
        "stronger policy."
    ]
    both = outcome_warnings({"wrong": 50, "without_answer": 51}, {})
    assert [one.split()[0] for one in both] == ["51", "All"]


@pytest.mark.parametrize("search", [SHORT, WHOLE], ids=["steps", "rollouts"])
@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("Add.\nAdd.\n\nThe answer is 7.", {"long": 1, "unsplit": 1}),
        ("<think>\n# Step 1\n</think>Add.\nAdd.\nThe answer is 7.", {"long": 1, "unsplit": 1}),
        ("# Step 1\nAdd.\nThe answer is 7.", {"long": 1, "unsplit": 0}),
        ("Add.\n\nThe answer is 7.", {}),
    ],
)
def test_solutions_without_steps_are_counted(tmp_path, search, text, counts):
    search = replace(
        search, **{name: 99 for name in ("max_step_tokens", "max_solution_tokens") if hasattr(search, name)}
    )
    summary, warnings = finish(tmp_path, search, problems=make_problems(2), script=always(text))
    samples = 2 * search.max_samples
    assert summary["unsplit"] == {name: count * samples for name, count in counts.items()}
    assert read_summary(tmp_path)["unsplit"] == summary["unsplit"]
    found = [one for one in warnings if "are a single step" in one]
    assert len(found) == counts.get("unsplit", 0)
    if found:
        assert found == [
            f"{samples} of {samples} solutions with several lines (100.0 %) are a single step, because the rule --segmentation (now "
            "step_header) finds no steps in them. Use a rule that fits the solutions, such as blank_line, or a --prompt (now steps) that "
            "asks for such steps, in a new --output_dir."
        ]


def test_a_step_that_was_sampled_alone_is_split(tmp_path):
    """The blank line at its end is the only one."""
    rule = RULES["blank_line"]
    search = FullTree(rule, num_children=2, max_depth=1, max_step_tokens=30)
    run_scripted(tmp_path, search, make_problems(1), script=always("Add.\nAdd.\nAdd.\n\nThe answer is 7."), rule=rule)
    with EventLog(next(tmp_path.glob("log-*"))) as log:
        assert count_unsplit(log.read("p000"), rule.pattern) == {"long": 2, "unsplit": 0}


def test_no_warning_if_half_of_the_solutions_have_steps():
    assert step_warnings({"long": 4, "unsplit": 2}, {}) == step_warnings({}, {}) == []
    assert step_warnings({"long": 4, "unsplit": 3}, {})[0].startswith("3 of 4 solutions with several lines (75.0 %)")


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
    assert "are cut off at the policy's context length. Use a policy with" in warnings[0]


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
    assert (
        warning.startswith("7 of 8 solutions (87.5 %) have no grade: 7 cut off. Most of")
        and f"Raise {options} a new" in warning
    )


def test_no_warning_for_exactly_half():
    assert outcome_warnings({"right": 2, "cut_off_by_depth": 2}, {}) == outcome_warnings({}, {}) == []
    (warning,) = outcome_warnings({"right": 2, "cut_off_by_depth": 2, "cut_off_by_tokens": 1}, {"max_depth": 5})
    assert warning.startswith("3 of 5 solutions (60.0 %) have no grade") and "--max_depth (now 5)" in warning


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
        assert warnings[:1] == [
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
