"""Which solutions `trl-hrm judge` finds in runs, datasets of steps and candidates."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from trl_hrm.data.candidates_config import CandidatesConfig
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.data.hierarchy import hrm_view
from trl_hrm.data.judge_sources import finished_paths, read_solutions
from trl_hrm.data.step_labels import label_steps
from trl_hrm.search.tree import Node
from trl_hrm.step_tree import StepTree

from ..fakes import write_rows
from ..search.trees import random_search_tree, tree_of


def read(source, **options):
    notes = Counter()
    found = list(read_solutions(CandidatesConfig(candidates=str(source), **options), notes))
    return found, +notes


def paths_of(problem):
    return [solution.steps for solution in problem.solutions]


# Runs


def test_paths_of_a_tree():
    """Equal siblings are one step, a blank end ends the step before it, and rollouts are not solutions."""
    right = {"answer": "3", "correct": True}
    tree = tree_of(
        (-1, "One.\n\n", {}),  # 0
        (-1, "One.\n\n", {}),  # 1, united with 0
        (0, "Two.", right),  # 2
        (1, "Two.", right),  # 3, united with 2
        (1, "Three.", right),  # 4
        (1, "\n\n", right),  # 5, ends the solution at 0
        (-1, "A rollout.", {"role": "rollout", **right}),
        (-1, "\n\n", {}),  # 7
        (7, "After a blank step.", right),
        (-1, "Not finished.", {"finish": "length"}),
    )
    notes = Counter()
    found = finished_paths(tree, notes)
    assert [(one.steps, one.node_ids, one.place) for one in found] == [
        (["One."], [tree.nodes[0].node_id], 0),
        (["One.", "Two."], [tree.nodes[0].node_id, tree.nodes[2].node_id], 1),
        (["One.", "Three."], [tree.nodes[0].node_id, tree.nodes[4].node_id], 2),
    ]
    assert notes == {"equal_solutions": 1, "solutions_with_a_blank_step": 1}


@pytest.mark.parametrize("seed", range(20))
def test_node_ids_are_those_of_an_export(seed):
    """Every path is a path of the labelled tree, and each finished node that has a text ends one."""
    tree = random_search_tree(seed).canonical()
    exported, members = label_steps(tree, ExportConfig(inputs=["x"], output_dir="y", view="tree"), Counter())
    by_ids = {}
    for step in range(len(exported.completions)):
        path = exported.path(step)
        ids = tuple(exported.step_columns["node_ids"][i] for i in path)
        by_ids[ids] = [exported.completions[i] for i in path], members[step]
    found = finished_paths(tree, Counter())
    ends = set()
    for solution in found:
        steps, nodes = by_ids[tuple(solution.node_ids)]
        assert solution.steps == steps
        assert any(tree.nodes[i].is_final for i in nodes)
        ends.update(nodes)
    assert len({tuple(solution.node_ids) for solution in found}) == len(found)
    assert ends >= {i for i, node in enumerate(tree.nodes) if node.is_final and node.role != "rollout"}


@pytest.mark.parametrize("seed", range(5))
def test_more_rollouts_keep_the_solutions(seed):
    """So verdicts on a run hold for a run that continues it with `more_from`."""
    tree = random_search_tree(seed).canonical()
    found = finished_paths(tree, Counter())
    for i in [i for i, node in enumerate(tree.nodes) if not node.is_final and node.role != "rollout"]:
        rollout = {"role": "rollout", "finish": "eos", "is_final": True, "answer": "3", "correct": True}
        tree.nodes.append(Node(f"new {i}", i, 0, 9, [1], "One.", **rollout))
    assert finished_paths(tree.canonical(), Counter()) == found


def test_a_step_that_ends_one_sample_and_not_another():
    tree = tree_of((-1, "One.", {"answer": "3"}), (-1, "One.", {}), (1, "Two.", {"answer": "3"}))
    assert [one.steps for one in finished_paths(tree, Counter())] == [["One."], ["One.", "Two."]]
    tree.nodes.append(Node("x", -1, 3, 0, [1], "Two.", is_final=True, role="given"))
    assert [one.steps for one in finished_paths(tree, Counter())][-1] == ["Two."]


# Datasets of steps


ROWS = [
    {
        "prompt": "1+2?",
        "completions": ["a", "b", "c"],
        "labels": [1.0, 0.5, None],
        "parents": [-1, 0, 0],
        "mc_total": [8, 4, 4],
        "problem_id": "p1",
        "answer": "3",
        "source": "tree",
    },
    {"prompt": "2+2?", "completions": ["x"], "labels": [True]},
    {"prompt": "2+2?", "completions": ["x"], "labels": [False]},
    {"prompt": " 2+2?\n", "completions": ["y", "z"], "labels": [False, None]},
]


def test_step_trees(tmp_path):
    """Each path to a leaf is a solution. Labels and other columns of the rows stay."""
    [first, second], notes = read(write_rows(tmp_path / "rows.jsonl", ROWS))
    assert (first.problem_id, first.prompt, first.answer) == ("p1", "1+2?", "3")
    assert paths_of(first) == [["a", "b"], ["a", "c"]] and paths_of(second) == [["x"], ["y", "z"]]
    assert [one.columns for one in first.solutions] == [
        {"source": "tree", "mc_total": [8, 4], "source_labels": [1.0, 0.5]},
        {"source": "tree", "mc_total": [8, 4], "source_labels": [1.0, None]},
    ]
    assert second.answer is None and notes == {"equal_solutions": 1}
    ids = [one.node_ids for one in first.solutions]
    assert ids[0][0] == ids[1][0] and len({*ids[0], *ids[1], second.solutions[0].node_ids[0]}) == 4
    again, _ = read(write_rows(tmp_path / "again.jsonl", ROWS[::-1]))
    assert again[1].solutions[0].node_ids == ids[0]  # they depend on the problem and the steps only


def test_conversational_step_trees(tmp_path):
    """They have the solutions, labels and columns of the rows with their texts."""
    expected, _ = read(write_rows(tmp_path / "rows.jsonl", ROWS))
    rows = [
        {
            **row,
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completions": [[{"role": "assistant", "content": step}] for step in row["completions"]],
        }
        for row in ROWS
    ]
    found, _ = read(write_rows(tmp_path / "messages.jsonl", rows))
    assert [problem.solutions for problem in found] == [problem.solutions for problem in expected]


def test_ids_of_a_dataset_stay(tmp_path):
    row = {**ROWS[0], "node_ids": ["n1", "n2", "n3"], "judge_votes": [0]}
    [problem], _ = read(write_rows(tmp_path / "rows.jsonl", [row]))
    assert [one.node_ids for one in problem.solutions] == [["n1", "n2"], ["n1", "n3"]]
    assert "judge_votes" not in problem.solutions[0].columns


def test_merged_steps_are_not_judged(tmp_path):
    """A dataset for HRM has the same solutions as the tree that it was made from."""
    tree = StepTree("1+2?", ["a", "b", "c"], [1.0, 0.5, 1.0], [-1, 0, 0])
    [problem], notes = read(write_rows(tmp_path / "rows.jsonl", [hrm_view(tree).to_row()]))
    assert paths_of(problem) == [["a", "b"], ["a", "c"]]
    assert notes == {"solutions_with_merged_steps": 2}
    assert all("num_merged" not in solution.columns for solution in problem.solutions)


def test_dataset_folder(tmp_path):
    rows = [{"prompt": f"{i}?", "completions": ["a"], "labels": [1.0], "weight": i} for i in range(3)]
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    found, _ = read(tmp_path / "data")
    assert [problem.solutions[0].columns for problem in found] == [
        {"weight": i, "source_labels": [1.0]} for i in range(3)
    ]
    renamed, _ = read(tmp_path / "data", columns={"answer": "completions.0"})
    assert [problem.answer for problem in renamed] == ["a"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completions": ["a", "", "c"]}, r"rows\.jsonl:2: `completions\[1\]` is ''"),
        ({"problem_id": 3}, r"rows\.jsonl:2: `problem_id` is 3.*In JSON Lines, put the number in quotes"),
        ({"answer": 3}, r"rows\.jsonl:2: `answer` is 3.*In JSON Lines, put the number in quotes"),
        ({"node_ids": [1, 2, 3]}, r"rows\.jsonl:2: `node_ids`"),
        ({"prompt": "1+3?"}, r"rows\.jsonl:2: `prompt` is '1\+3\?', but .*rows\.jsonl:1 has '1\+2\?'"),
        ({"answer": "4"}, r"rows\.jsonl:2: `answer` is '4', but"),
        ({"weight": float("nan")}, r"rows\.jsonl:2: `weight` is nan, which JSON cannot represent"),
        ({"mc_total": [1, 2, float("inf")]}, r"rows\.jsonl:2: `mc_total`"),
        ({"labels": [2.0, 0, 0]}, r"rows\.jsonl:2: `labels\[0\]` is 2\.0"),
    ],
)
def test_wrong_rows(tmp_path, change, message):
    source = write_rows(tmp_path / "rows.jsonl", [ROWS[0], ROWS[0] | change])
    with pytest.raises(ValueError, match=message):
        read(source)


def test_whole_solutions_as_steps(tmp_path):
    rows = [{"prompt": "1+2?", "completions": ["It is \\boxed{3}.", "It is \\boxed{4}."], "labels": [1, 0]}]
    with pytest.raises(ValueError, match="These look like whole solutions"):
        read(write_rows(tmp_path / "rows.jsonl", rows))


def test_thinking_in_step_trees(tmp_path):
    rows = [{"prompt": "1+2?", "completions": ["<think>Hm.</think>", "It is 3."], "labels": [None, 1]}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    [problem], notes = read(source)
    assert paths_of(problem) == [["It is 3."]] and notes == {"candidates_with_thinking_left_out": 1}
    [problem], notes = read(source, keep_thinking=True)
    assert paths_of(problem) == [["Hm.", "It is 3."]] and not notes


# Candidates


def test_candidates(tmp_path):
    rows = [
        {"prompt": "1+2?", "answer": "3", "candidates": ["# Step 1\na\n\n# Step 2\nb", ["a", "b"], ["a", "b"], ""]},
        {"prompt": "2+2?", "completion": "", "problem_id": "q"},
    ]
    [problem], notes = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert problem.answer == "3" and paths_of(problem) == [["# Step 1\na", "# Step 2\nb"], ["a", "b"]]
    assert [one.place for one in problem.solutions] == [0, 1]
    assert notes["equal_solutions"] == 1 and notes["solutions_without_steps"] == 2
    assert notes["problems_without_a_finished_solution"] == 1


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        (ROWS[1], {"segmentation": "sentence"}, "`segmentation` is 'sentence', but has no effect"),
        (ROWS[1], {"join_steps": " "}, "`join_steps` is ' ', but has no effect"),
        (ROWS[1], {"split": "test"}, "`split` is 'test', but has no effect"),
        ({"prompt": "a", "completion": "b"}, {"join_steps": " "}, "`join_steps` has no effect"),
        ({"prompt": "a"}, {}, "found none of `completion`"),
    ],
)
def test_options_without_effect(tmp_path, row, options, message):
    with pytest.raises(ValueError, match=message):
        read(write_rows(tmp_path / "rows.jsonl", [row]), **options)


def test_missing_and_empty_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="Expected a folder of `trl-hrm annotate`"):
        read(tmp_path / "nothing")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no records found"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "log-00000-of-00001.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="found the log of a search"):
        read(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="`keep_thinking` is True, but has no effect"):
        read(tmp_path, keep_thinking=True)
