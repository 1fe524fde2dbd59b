"""Rows of benchmarks as training data: their labels, and which split and exclusion they belong to."""

import json

import pytest
from datasets import load_dataset

from trl_hrm import BuildStepwiseConfig, build_stepwise
from trl_hrm.data.problems import problem_split


PRMBENCH = {
    "idx": "a",
    "classification": "missing_condition",
    "original_question": "1+2+3?",
    "modified_question": "1+2?",
    "question": "1+2+3?",
    "original_process": ["1+2=3.", "3+3=6."],
    "modified_process": ["1+2=3.", "3+3=7.", "Done."],
    "error_steps": [2],
}
PROCESSBENCH = {"id": "b", "problem": "2+2?", "steps": ["2+2=5.", "So 5."], "label": 0, "final_answer_correct": False}
MISTAKE = {"input": "3+3?", "steps": ["3+3=6."], "target": "6", "answer": "6", "mistake_index": None}


def build(tmp_path, *rows, **options):
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"test_size": 0, "output_dir": str(tmp_path / "out"), "overwrite": True} | options
    report = build_stepwise(BuildStepwiseConfig(inputs=[str(source)], **options))
    return load_dataset(options["output_dir"], cache_dir=str(tmp_path / "cache")), report


def test_labels_of_each_benchmark(tmp_path):
    dataset, report = build(tmp_path, PRMBENCH, PROCESSBENCH, MISTAKE)
    found = {row["prompt"]: (row["completions"], row["labels"], row["original_prompt"]) for row in dataset["train"]}
    assert found == {
        "1+2?": (["1+2=3.", "3+3=7.", "Done."], [1.0, 0.0, 1.0], "1+2+3?"),
        "1+2+3?": (["1+2=3.", "3+3=6."], [1.0, 1.0], "1+2+3?"),
        "2+2?": (["2+2=5.", "So 5."], [0.0, None], None),
        "3+3?": (["3+3=6."], [1.0], None),
    }
    assert report["warnings"] == [
        "rows of benchmarks become training data (1 of bigbenchmistake, 1 of prmbench, 1 of processbench). Do not measure on these "
        "files, and pass the files that you measure on to --exclude."
    ]


def test_both_solutions_of_a_row_share_their_steps_if_the_problem_is_the_same(tmp_path):
    row = PRMBENCH | {"modified_question": "1+2+3?", "classification": "redundency"}
    dataset, report = build(tmp_path, row, row | {"idx": "c", "modified_process": ["1+2=4."], "error_steps": [1]})
    [tree] = dataset["train"]
    assert tree["completions"] == ["1+2=3.", "3+3=7.", "Done.", "3+3=6.", "1+2=4."]
    assert tree["parents"] == [-1, 0, 1, 0, -1]
    assert tree["labels"] == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert report["notes"]["joined_records"] == 1


@pytest.mark.parametrize("excluded", [{"problem": "1+2+3?"}, {"problem": "1 + 2?"}, PRMBENCH])
def test_a_problem_is_excluded_with_the_problem_that_it_was_changed_from(tmp_path, excluded):
    """Every spelling differs only where the problem itself does: `1 + 2?` is not `1+2?`."""
    (tmp_path / "test.jsonl").write_text(json.dumps(excluded))
    dataset, report = build(tmp_path, PRMBENCH, MISTAKE, exclude=[str(tmp_path / "test.jsonl")])
    is_kept = excluded == {"problem": "1 + 2?"}
    assert report["dropped"] == ({} if is_kept else {"excluded": 1})
    assert ("1+2?" in dataset["train"]["prompt"]) == is_kept


def test_a_changed_problem_is_in_the_split_of_the_original(tmp_path):
    rows = [
        PRMBENCH
        | {"idx": f"{spelling}{i}", "question": f"What is {i} + 1?", "original_question": f"What is {i}{spelling}1?"}
        | {"modified_question": f"What is {i}{spelling}?"}
        for i in range(40)
        for spelling in (" + ", " {+} ")  # each class spells the formulas of the original problem in its own way
    ]
    dataset, _ = build(tmp_path, *rows, test_size=0.5)
    for split in dataset.values():
        numbers = [prompt.split()[2].strip("?") for prompt in split["prompt"]]
        assert all(numbers.count(number) == 4 for number in numbers)
        assert all(row["original_prompt"] == f"What is {row['prompt'].split()[2].strip('?')} + 1?" for row in split)
    assert len(dataset["train"]) + len(dataset["test"]) == 160
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[1]))
    _, report = build(tmp_path, *rows, exclude=[str(tmp_path / "test.jsonl")], output_dir=str(tmp_path / "rest"))
    assert report["dropped"] == {"excluded": 2}


def test_outcomes(tmp_path):
    """A solution with a wrong step is wrong, although the label of its last step is 1 in PRMBench and missing in ProcessBench."""
    dataset, _ = build(tmp_path, PRMBENCH, PROCESSBENCH, MISTAKE, view="orm")
    found = {row["prompt"]: row["labels"] for row in dataset["train"]}
    assert found == {"1+2?": [None, None, 0.0], "1+2+3?": [None, 1.0], "2+2?": [None, 0.0], "3+3?": [1.0]}


def test_labels_from_one(tmp_path):
    """The only sign that ProcessBench labels count from 1, which moves every label to the next step."""
    rows = [PROCESSBENCH | {"problem": f"{i}?", "label": i} for i in (1, 2)]
    _, report = build(tmp_path, *rows)
    assert any("If the labels count from 1, subtract 1 from them" in warning for warning in report["warnings"])


def test_rows_of_mr_gsm8k_are_counted_by_name(tmp_path):
    """The documentation names MR-GSM8K next to ProcessBench, and so must the warning."""
    row = {
        "question": "2+2?",
        "model_output_steps": ["2+2=5.", "So 5."],
        "model_output_solution_correctness": "wrong",
        "model_output_solution_first_error_step": 1,
    }
    dataset, report = build(tmp_path, row, PROCESSBENCH | {"problem": "1+1?"})
    assert dataset["train"]["labels"] == [[0.0, None], [0.0, None]]
    assert "(1 of mrgsm8k, 1 of processbench)" in report["warnings"][0]


def test_a_row_of_a_table_with_empty_columns(tmp_path):
    """In a table of several datasets, a row has null under the columns of the others."""
    dataset, _ = build(tmp_path, PROCESSBENCH | {"completions": None, "labels": None})
    assert dataset["train"]["labels"] == [[0.0, None]]


def test_rows_with_an_original_prompt_exclude_it(tmp_path):
    given = {"prompt": [{"role": "user", "content": "4?"}], "original_prompt": [{"role": "user", "content": "3+3?"}]}
    (tmp_path / "test.jsonl").write_text(json.dumps(given))
    _, report = build(tmp_path, MISTAKE, PROCESSBENCH, exclude=[str(tmp_path / "test.jsonl")])
    assert report["dropped"] == {"excluded": 1}
    row = {"completions": ["4"], "labels": [True], **given}
    dataset, _ = build(tmp_path, row)
    assert dataset["train"]["original_prompt"] == ["3+3?"]


def test_a_blank_step_drops_the_row(tmp_path):
    _, report = build(tmp_path, PROCESSBENCH | {"steps": ["2+2=5.", " "]}, MISTAKE)
    assert report["dropped"] == {"blank_step": 1}


@pytest.mark.parametrize("value", [["x"], "", 3])
def test_an_original_prompt_that_is_no_text_drops_the_row(tmp_path, value):
    row = {"prompt": "1?", "completions": ["1"], "labels": [True], "original_prompt": value}
    with pytest.raises(ValueError, match=r"rows.jsonl:1: column `original_prompt` is .*, expected the problem"):
        build(tmp_path, row, strict=True)


@pytest.mark.parametrize("order", [1, -1])
def test_the_split_of_joined_rows_does_not_depend_on_their_order(tmp_path, order):
    rows = [
        {"prompt": f"{i}?", "completions": [step], "labels": [True], **origin}
        for i in range(30)
        for step, origin in (("a", {}), ("b", {"original_prompt": f"y{i}"}), ("c", {"original_prompt": f"x{i}"}))
    ]
    dataset, report = build(tmp_path, *rows[::order], test_size=0.5)
    found = {row["prompt"]: (split, row["original_prompt"]) for split, rows in dataset.items() for row in rows}
    assert found == {f"{i}?": (problem_split(f"x{i}", 0.5, 42), f"x{i}") for i in range(30)}
    assert report["notes"]["rows_with_original_prompt"] == 60


def test_problems_of_big_bench_mistake_are_excluded(tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps(MISTAKE))
    _, report = build(tmp_path, MISTAKE, PROCESSBENCH, exclude=[str(tmp_path / "test.jsonl")])
    assert report["dropped"] == {"excluded": 1}


def test_a_row_with_a_part_of_the_columns_is_not_a_row_of_a_benchmark(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl:1: `prompt` and `completions` and `labels` are missing"):
        build(tmp_path, {name: PRMBENCH[name] for name in ("modified_process", "error_steps", "original_question")})
