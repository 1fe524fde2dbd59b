"""Whole solutions, lists of steps, headers, thinking and dialogues in user files."""

import json
from collections import Counter
from pathlib import Path

import pytest

from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.candidate_sources import read_candidates, read_pool
from trl_hrm.data.candidates import ProblemCandidates
from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.data.problem_sets import read_problems
from trl_hrm.data.solutions import (
    ALL,
    SEVERAL,
    check_answers,
    count_answers,
    leave_out_thinking,
    read_whole_solutions,
    solution_warnings,
)
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.messages import problem_of
from trl_hrm.step_tree import StepTree


FIRST = "## Step 1: Add the pens\n3 + 4 = 7.\n\n## Step 2: Conclude\nTom has 7 pens.\n\nThe answer is: $\\boxed{7}$."
SECOND = "## Step 1: Subtract\n4 - 3 = 1.\n\nThe answer is: $\\boxed{1}$."
CUT_OFF = "## Step 1: Add\n3 + 4"
SAL = {"problem": "How many pens?", "answer": "7", "completions": [FIRST, SECOND]}


def write_rows(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(source: str, **options) -> tuple[list[ProblemCandidates], Counter]:
    counts = Counter()
    return read_candidates(CandidatesConfig(candidates=source, **options), counts), counts


def steps_of(problem: ProblemCandidates) -> list[list[str]]:
    return [candidate.steps for candidate in problem.candidates]


def test_headers_with_two_hashes_in_candidates(tmp_path):
    groups, _ = read(write_rows(tmp_path / "in.jsonl", {"prompt": "q", "candidates": [FIRST, SECOND]}))
    assert steps_of(groups[0]) == [
        [
            "## Step 1: Add the pens\n3 + 4 = 7.",
            "## Step 2: Conclude\nTom has 7 pens.\n\nThe answer is: $\\boxed{7}$.",
        ],
        [SECOND],
    ]
    assert [candidate.text for candidate in groups[0].candidates] == [FIRST, SECOND]


def test_outputs_of_search_and_learn_are_read_with_their_own_keys(tmp_path):
    """N whole solutions are each split into steps. A row whose solutions were all cut off is read like the others."""
    rows = [SAL, {"problem": "q", "answer": "1", "completions": [CUT_OFF, CUT_OFF]}]
    groups, counts = read(write_rows(tmp_path / "in.jsonl", *rows))
    assert [group.problem for group in groups] == [group.prompt for group in groups] == ["How many pens?", "q"]
    assert [list(map(len, steps_of(group))) for group in groups] == [[2, 1], [1, 1]]
    [warning] = solution_warnings(counts)
    assert warning.startswith("2 rows have `problem` and `completions`")


def test_rows_of_openmathinstruct_are_read_with_their_own_columns(tmp_path):
    """Each row has one solution, and the rows of a problem are its candidates."""
    row = {"problem": "3 + 4?", "expected_answer": "7", "problem_source": "augmented_gsm8k"}
    rows = [row | {"generated_solution": text} for text in ("3 + 4 = 7.\n\nSo \\boxed{7}.", "So \\boxed{8}.")]
    older = {"question": "1 + 1?", "expected_answer": "2", "is_correct": True, "generated_solution": "\\boxed{2}"}
    source = write_rows(tmp_path / "in.jsonl", *rows, older)
    config = CandidatesConfig(candidates=source, segmentation="blank_line")
    first, second = read_pool(config, None, None, Counter())
    assert (first.problem, first.prompt, first.answer) == ("3 + 4?", "3 + 4?", "7")
    assert steps_of(first) == [["3 + 4 = 7.", "So \\boxed{7}."], ["So \\boxed{8}."]]
    assert [candidate.answer for candidate in first.candidates] == ["7", "8"] and not first.graded
    assert (second.problem, second.answer, second.graded) == ("1 + 1?", "2", True)
    problems = read_problems(source).problems
    assert [(problem.prompt, problem.answer) for problem in problems] == [("3 + 4?", "7"), ("1 + 1?", "2")]


def test_other_answers_of_a_problem_of_openmathinstruct_are_refused(tmp_path):
    row = {"problem": "3 + 4?", "generated_solution": "\\boxed{7}", "expected_answer": "7"}
    source = write_rows(tmp_path / "in.jsonl", row, row | {"expected_answer": "8"})
    with pytest.raises(ValueError, match="in.jsonl:2: `answer` is '8', but .*in.jsonl:1 has '7'"):
        read_pool(CandidatesConfig(candidates=source), None, None, Counter())


@pytest.mark.parametrize("column", ["pred", "agg_scores", "completion_tokens"])
def test_search_and_learn_outputs_are_recognised_by_columns(tmp_path, column):
    rows = [{"problem": "q", "completions": [CUT_OFF, CUT_OFF], column: None}]
    [group], _ = read(write_rows(tmp_path / "in.jsonl", *rows))
    assert len([candidate.text for candidate in group.candidates]) == 2


def test_ambiguous_completions_raise(tmp_path):
    """They could be two steps, or two solutions that were cut off, so nothing is guessed."""
    source = write_rows(tmp_path / "in.jsonl", {"problem": "q", "completions": ["Add.", "So \\boxed{7}."]})
    with pytest.raises(ValueError, match="in.jsonl:1: .*`problem` and `completions`.*Rename"):
        read(source)


def test_whole_solutions_in_the_place_of_steps_are_refused(tmp_path):
    rows = [{"prompt": "q", "completions": [FIRST, SECOND]}, {"prompt": "r", "completions": ["Add.", FIRST]}]
    source = write_rows(tmp_path / "in.jsonl", *rows, rows[0] | {"prompt": "s"})
    with pytest.raises(ValueError, match="in.jsonl: .*2 of 3 rows.*`completions`"):
        read(source)


def test_some_rows_that_look_like_whole_solutions_are_counted(tmp_path):
    """A solution may repeat its answer, so these rows are read, and the report mentions them."""
    steps = ["Add.", "So \\boxed{7}.", "The answer is \\boxed{7}."]
    source = write_rows(tmp_path / "in.jsonl", {"prompt": "q", "completions": steps})
    [group], counts = read(source)
    assert steps_of(group) == [steps] and counts == {SEVERAL: 1}
    assert solution_warnings({SEVERAL: 1})[0].startswith(
        "in 1 rows, several items of `completions` each state an answer"
    )


@pytest.mark.parametrize(
    ("steps", "parents", "expected"),
    [
        (["Add.", "So \\boxed{7}."], None, {}),
        (["\\boxed{7}", "\\boxed{1}"], None, {SEVERAL: 1, ALL: 1}),
        (["#### 7", "# Answer\n\n1"], None, {SEVERAL: 1, ALL: 1}),
        (["a", "\\boxed{7}", "\\boxed{7}"], None, {SEVERAL: 1}),
        (["\\boxed{7}", "\\boxed{1}"], [-1, -1], {}),  # two solutions of one step each
        (["a", "\\boxed{7}", "\\boxed{1}"], [-1, 0, 0], {}),
        (["\\boxed{7}", "\\boxed{1}", "b"], [-1, 0, -1], {SEVERAL: 1, ALL: 1}),
        (["\\boxed{7}"], None, {}),
        ([], None, {}),
    ],
)
def test_answers_are_counted_along_paths(steps, parents, expected):
    notes = Counter()
    count_answers(steps, notes, parents)
    assert notes == expected
    if not expected.get(ALL):
        check_answers(notes, 1, "in")


def test_unambiguous_rows_are_not_changed():
    rows = [("1", {"prompt": "q", "completions": ["a"]}), ("2", {"prompt": "q", "problem": "q", "completion": "a"})]
    counts = Counter()
    assert read_whole_solutions(rows, counts) == rows and not counts


def test_build_stepwise_refuses_whole_solutions(tmp_path):
    row = {"prompt": "q", "completions": [FIRST, SECOND], "labels": [True, False]}
    with pytest.raises(ValueError, match="1 of 1 rows.*`completions`"):
        build_stepwise(
            BuildStepwiseConfig(inputs=[write_rows(tmp_path / "in.jsonl", row)], output_dir=str(tmp_path / "out"))
        )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    steps = {"prompt": "r", "completions": ["Add.", "So \\boxed{7}."], "labels": [True, True]}
    thought = {"prompt": "s", "completions": ["<think>\nHm.\n</think>", "So \\boxed{7}."], "labels": [True, True]}
    source = write_rows(tmp_path / "in.jsonl", row, steps, thought)
    report = build_stepwise(BuildStepwiseConfig(inputs=[source], output_dir=str(tmp_path / "out"), num_proc=1))
    assert report["notes"][SEVERAL] == report["notes"][ALL] == report["notes"]["rows_with_thinking"] == 1
    assert any("several items of `completions` each state an answer" in warning for warning in report["warnings"])
    assert any("1 rows have steps with the thinking of a reasoning model" in warning for warning in report["warnings"])


THOUGHT = "<think>\n# Step 1\nIs it \\boxed{1}?\n\n# Step 2\nNo.\n</think>\n\n"


def test_thinking_is_left_out_of_candidates(tmp_path):
    """Thinking is not a step. A solution cut off while thinking has no steps. The text does not change."""
    lists = [["<think>", "Is it 1?", "</think>", "Add.", "So 7."], ["<think>Hm.", "No.</think>\n\nAdd.", "So 7."]]
    texts = [THOUGHT + FIRST, THOUGHT.removeprefix("<think>\n") + FIRST, FIRST, "<think>\n" + FIRST]
    groups, counts = read(write_rows(tmp_path / "in.jsonl", {"prompt": "q", "candidates": [*texts, *lists]}))
    headed = ["## Step 1: Add the pens\n3 + 4 = 7.", FIRST[FIRST.index("## Step 2") :]]
    assert steps_of(groups[0]) == [headed, headed, headed, [], ["Add.", "So 7."], ["Add.", "So 7."]]
    assert [candidate.text for candidate in groups[0].candidates][:4] == texts
    assert counts == {"candidates_with_thinking_left_out": 5}


def test_thinking_is_kept_on_request(tmp_path):
    texts = [THOUGHT + FIRST, ["<think>", "Is it 1?", "</think>", "Add."]]
    groups, counts = read(write_rows(tmp_path / "in.jsonl", {"prompt": "q", "candidates": texts}), keep_thinking=True)
    assert [len(steps) for steps in steps_of(groups[0])] == [4, 2] and not counts
    assert steps_of(groups[0])[1] == ["Is it 1?", "Add."]
    assert not any("think>" in step for steps in steps_of(groups[0]) for step in steps)


def test_a_prompt_may_open_the_thinking(tmp_path):
    """DeepSeek-R1's chat template does this. Without an end tag, the whole candidate is thinking."""
    rows = [{"prompt": "q <think>\n", "candidates": ["Hm.\n</think>\n\n" + FIRST, "# Step 1\nIs it 7?"]}]
    groups, counts = read(write_rows(tmp_path / "in.jsonl", *rows))
    assert list(map(len, steps_of(groups[0]))) == [2, 0]
    assert counts["candidates_with_thinking_left_out"] == 2


def test_thinking_in_scored_rows():
    tree = StepTree("q", ["<think>", "a", "b</think> c", "d"], [None] * 4, [-1, 0, 1, 2])
    found, steps = leave_out_thinking(tree, "row 1")
    assert (found.completions, found.parents, steps) == (["c", "d"], [-1, 0], [2, 3])
    found, steps = leave_out_thinking(tree, "row 1", keep_thinking=True)
    assert (found.completions, steps) == (["a", "b c", "d"], [1, 2, 3])
    assert leave_out_thinking(StepTree("q", ["<think>a"], [None], [-1]), "row 1")[1] == []
    with pytest.raises(ValueError, match="row 1: .*thinking"):
        leave_out_thinking(StepTree("q", ["<think>", "a", "b"], [None] * 3, [-1, 0, 0]), "row 1")


USER, ASSISTANT = {"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2."}
AGAIN = {"role": "user", "content": "And twice that?"}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "messages", [[USER, ASSISTANT, AGAIN], [SYSTEM, USER, ASSISTANT], [USER, AGAIN], [SYSTEM], [ASSISTANT, AGAIN]]
)
def test_dialogues_of_several_turns_are_refused(tmp_path, messages):
    """ "And twice that?" alone is another problem. A column with the problem makes it clear."""
    row = {"prompt": messages, "completion": [{"role": "assistant", "content": FIRST}]}
    with pytest.raises(ValueError, match="in.jsonl:1: .*one user message"):
        read(write_rows(tmp_path / "in.jsonl", row))
    [group], _ = read(write_rows(tmp_path / "in.jsonl", row | {"problem": "Twice 1 + 1?"}))
    assert (group.problem, group.prompt) == ("Twice 1 + 1?", messages)


def test_the_message_of_the_user_is_the_problem():
    assert problem_of([USER], "") == problem_of([SYSTEM, USER], "") == "What is 1 + 1?"
    blocks = [{"type": "text", "text": "What is "}, {"type": "text", "text": "1 + 1?"}]
    assert (
        problem_of([{"role": "developer", "content": "x"}, {"role": "user", "content": blocks}], "")
        == "What is 1 + 1?"
    )
