"""Mixtures of several inputs: sources, counts, weights, and what happens to a problem of two inputs."""

import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from datasets import Dataset, load_dataset

from trl_hrm.data import sources
from trl_hrm.data.build import GROUPED_ROWS, sampling_limits
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.problems import problem_order, problem_split
from trl_hrm.data.stepwise import build_stepwise


def make_row(name: str, i: int, num_steps: int = 2, **columns) -> dict:
    """A problem whose steps are all labelled."""
    steps = [f"{name} step {j} of {i}" for j in range(num_steps)]
    return {"prompt": f"{name} problem {i}?", "completions": steps, "labels": [1.0] * num_steps} | columns


def write_file(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_folder(path, rows) -> str:
    Dataset.from_list(rows).to_parquet(path / "train.parquet")
    return str(path)


def build(tmp_path, inputs, name="out", **options):
    """Return the rows of each split, and the report."""
    options = {"test_size": 0.0} | options
    report = build_stepwise(BuildStepwiseConfig(inputs=inputs, output_dir=str(tmp_path / name), **options))
    splits = load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / f"cache-{name}"))
    return {split: rows.to_list() for split, rows in splits.items()}, report


def labels_by_source(rows) -> Counter:
    found = Counter()
    for row in rows:
        found[row["source"]] += sum(label is not None for label in row["labels"])
    return found


@pytest.fixture
def three(tmp_path):
    """Three files with 100, 60 and 30 labelled steps, in problems of 1 to 3 steps."""
    return [
        write_file(tmp_path / f"{name}.jsonl", [make_row(name, i, 1 + i % 3) for i in range(number)])
        for name, number in (("a", 50), ("b", 30), ("c", 15))
    ]


@pytest.mark.parametrize("kinds", [*itertools.product(("file", "folder"), repeat=2)])
@pytest.mark.parametrize("view", ["tree", "prm"])
def test_every_combination_of_files_and_datasets(tmp_path, kinds, view):
    """Each row names its input. A column of only one input is null in the rows of the other."""
    writers = {"file": write_file, "folder": write_folder}
    first = writers[kinds[0]](tmp_path / "first", [make_row("a", i, level=i) for i in range(3)])
    second = writers[kinds[1]](tmp_path / "second", [make_row("b", i, year=2000 + i) for i in range(2)])
    splits, report = build(tmp_path, [first, second], view=view)
    assert [(row["source"], row["level"], row["year"], row["prompt"]) for row in splits["train"]] == [
        *((first, i, None, f"a problem {i}?") for i in range(3)),
        *((second, None, 2000 + i, f"b problem {i}?") for i in range(2)),
    ]
    assert report["sources"] == {
        first: {"records_in": 3, "records_kept": 3, "rows": {"train": 3}, "labelled_steps": {"train": 6}},
        second: {"records_in": 2, "records_kept": 2, "rows": {"train": 2}, "labelled_steps": {"train": 4}},
    }
    assert (report["labelled_steps"], report["records_in"]) == (10, 5)
    assert "/second: labelled steps, train" in str(report) or "/second.jsonl: labelled steps, train" in str(report)
    assert ("--split train" in report["command"]) == ("folder" in kinds)


def test_one_input_has_no_source(tmp_path):
    splits, report = build(tmp_path, [write_file(tmp_path / "a.jsonl", [make_row("a", 0)])])
    assert "source" not in splits["train"][0] and "sources" not in report


def test_ids_of_different_types(tmp_path):
    """The ids of a mixture are strings, and rows without one get a hash."""
    rows = {"a": [make_row("a", 0, problem_id=7)], "b": [make_row("b", 0)], "c": [make_row("c", 0, problem_id=None)]}
    files = [write_file(tmp_path / f"{name}.jsonl", found) for name, found in rows.items()]
    splits, _ = build(tmp_path, [*files, write_folder(tmp_path / "d", [make_row("d", 0, problem_id=8)])])
    ids = [row["problem_id"] for row in splits["train"]]
    assert (ids[0], ids[3]) == ("7", "8") and [len(one) for one in ids[1:3]] == [32, 32]


def test_dropped_rows_are_counted_for_their_input(tmp_path):
    inputs = [
        write_file(tmp_path / "a.jsonl", [make_row("a", 0), make_row("a", 1) | {"prompt": " "}]),
        write_file(tmp_path / "b.jsonl", [make_row("b", 0), make_row("b", 1), make_row("a", 5)]),
    ]
    exclude = write_file(tmp_path / "test.jsonl", [{"problem": "B PROBLEM  1?"}, {"problem": "a problem 5?"}])
    _, report = build(tmp_path, inputs, exclude=[exclude])
    assert report["dropped"] == {"blank_prompt": 1, "excluded": 2}
    assert [(one["records_in"], one["records_kept"]) for one in report["sources"].values()] == [(2, 1), (3, 1)]


@pytest.mark.parametrize("view", ["tree", "hrm", "prm"])
def test_a_problem_of_two_inputs(tmp_path, view):
    """
    Its rows are joined within an input and keep their source, so that a label is never counted for another input. All of them are in
    the same split, also if the text differs in whitespace.
    """
    shared = {"completions": ["x", "y"], "labels": [1.0, 0.0]}
    inputs = []
    for name in ("a", "b"):
        rows = [shared | {"prompt": f"Problem {i}?"} for i in range(40)]
        rows += [shared | {"prompt": f"Problem {i}?", "completions": ["x", "z"]} for i in range(40)]
        rows += [shared | {"prompt": f"Problem  {i}? "} for i in range(2)]
        inputs.append(write_file(tmp_path / f"{name}.jsonl", rows))
    splits, report = build(tmp_path, inputs, view=view, test_size=0.3)
    rows = splits["train"] + splits["test"]
    splits_of = defaultdict(set)
    for split in splits:
        for row in splits[split]:
            splits_of[" ".join(row["prompt"].split())].add(split)
    assert len(splits_of) == 40 and all(len(found) == 1 for found in splits_of.values())
    assert report["notes"]["problems_in_several_inputs"] == 40
    found = [
        (row["source"], row["completions"][: 2 if view == "prm" else 3])
        for row in rows
        if row["prompt"] == "Problem 0?"
    ]
    trees = [["x", "y"], ["x", "z"]] if view == "prm" else [["x", "y", "z"]]
    assert found == [(source, tree) for source in inputs for tree in trees]
    assert labels_by_source(splits["train"]) == {
        source: one["labelled_steps"]["train"] for source, one in report["sources"].items()
    }


def test_a_column_named_source_is_kept(tmp_path):
    inputs = [
        write_file(tmp_path / "a.jsonl", [make_row("a", 0, source="tree")]),
        write_folder(tmp_path / "b", [make_row("b", 0, source="hnc", original_source="mine"), make_row("b", 1)]),
    ]
    splits, report = build(tmp_path, inputs)
    found = [(row["source"], row["original_source"]) for row in splits["train"]]
    assert found == [(inputs[0], "tree"), (inputs[1], "hnc"), (inputs[1], None)]
    assert report["notes"]["replaced_original_sources"] == 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the input that the row comes from" in card


def test_types_of_columns(tmp_path):
    """Numbers are promoted. Other differences are named with the input, since the build could not write one column."""
    first = write_folder(tmp_path / "first", [make_row("a", 0, year=1)])
    second = write_folder(tmp_path / "second", [make_row("b", 0, year=1.5)])
    third = write_folder(tmp_path / "third", [make_row("c", 0, year="2000")])
    splits, _ = build(tmp_path, [first, second])
    assert [row["year"] for row in splits["train"]] == [1.0, 1.5]
    with pytest.raises(ValueError, match=f"^{third}: the column `year` has the type string, and int64 in an earlier"):
        build(tmp_path, [first, third], "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_input_given_twice(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    writer = {"file": write_file, "folder": write_folder}[kind]
    writer(tmp_path / "rows", [make_row("a", 0)])
    with pytest.raises(ValueError, match="^./rows is given twice"):
        build(tmp_path, ["rows", "./rows"])


def test_empty_inputs_are_named(tmp_path):
    good = write_file(tmp_path / "good.jsonl", [make_row("a", 0)])
    empty = str(tmp_path / "empty")
    Dataset.from_list([make_row("a", 0)]).select([]).to_parquet(tmp_path / "empty" / "train.parquet")
    with pytest.raises(ValueError, match=f"^{empty}: "):
        build(tmp_path, [good, empty])


# Weights


def test_limits_of_a_planted_mixture():
    """Source a has 12 labels, b has 6: weights of 1 and 1 keep 6 of a, in the order of its problems, which are kept whole."""
    a = np.array([[40, 3], [10, 2], [20, 2], [30, 2], [10, 1], [50, 2]], dtype=np.uint64)
    b = np.array([[40, 3], [7, 3]], dtype=np.uint64)
    assert sampling_limits([a, b], [1, 1], "ab") == [20, 40]  # 3 of problem 10, 2 of 20; 2 of 30 would exceed 6
    assert sampling_limits([a, b], [2, 1], "ab") == [50, 40]  # all 12 of a
    assert sampling_limits([a, b], [4, 1], "ab") == [50, 7]  # a runs out first: 3 of b
    assert sampling_limits([a, b], [1000, 1], "ab") == [50, 7]  # at least one problem
    assert sampling_limits([a, b], [0.2, 0.1], "ab") == sampling_limits([a, b], [2, 1], "ab")


def test_shares_are_exact_decimals():
    """In binary, 3 * 0.1 is not 0.3, and a problem of the exact share would be lost."""
    rows = np.array([[i, 1] for i in range(30)], dtype=np.uint64)
    assert sampling_limits([rows, rows[:10]], [0.3, 0.1], "ab") == [29, 9]
    assert sampling_limits([rows[:10], rows], [0.1, 0.3], "ab") == [9, 29]


@pytest.mark.parametrize("view", ["tree", "hrm", "prm"])
def test_weights_give_the_largest_mixture(tmp_path, three, view):
    """The result is compared with a mixture that is selected here from the rows of a build without weights."""
    weights = [2, 2, 1]
    everything, _ = build(tmp_path, three, "all", view=view, test_size=0.2)
    splits, report = build(tmp_path, three, view=view, test_size=0.2, weights=weights)
    assert splits["test"] == everything["test"]
    totals = labels_by_source(everything["train"])
    unit = min(totals[name] / weight for name, weight in zip(three, weights, strict=True))
    expected = []
    for name, weight in zip(three, weights, strict=True):
        rows = [row for row in everything["train"] if row["source"] == name]
        used, kept = 0, set()
        for row in sorted(rows, key=lambda row: problem_order(row["prompt"], 42)):
            used += len(row["labels"])
            if used > unit * weight + 1e-9:
                break
            kept.add(row["prompt"])
        expected += [row for row in rows if row["prompt"] in kept]
    assert splits["train"] == expected
    found = labels_by_source(splits["train"])
    assert {name: one["labelled_steps"]["train"] for name, one in report["sources"].items()} == found
    scarce = min(three, key=lambda name: totals[name] / weights[three.index(name)])
    assert found[scarce] == totals[scarce] and "left_out_by_weights" not in report["sources"][scarce]
    largest = {"tree": 3, "hrm": 5, "prm": 3}[view]  # labels of a problem of three steps
    for name, weight in zip(three, weights, strict=True):
        assert unit * weight - largest < found[name] <= unit * weight
    left_out = len(everything["train"]) - len(splits["train"])
    assert report["dropped"] == {"left_out_by_weights": left_out} and left_out > 0
    assert sum(one.get("left_out_by_weights", 0) for one in report["sources"].values()) == left_out
    assert report["records_in"] == report["records_kept"] + left_out
    assert "--weights 2 2 1" in report["command"]


@pytest.mark.parametrize("view", ["tree", "prm"])
def test_the_choice_depends_on_the_seed_alone(tmp_path, three, monkeypatch, view):
    """Not on the order of the inputs, the number of processes, or the sizes of chunks and batches."""
    reference, _ = build(tmp_path, three, view=view, weights=[1, 1, 1])
    prompts = {row["prompt"] for row in reference["train"]}
    monkeypatch.setattr(sources, "CHUNK_BYTES", 500)
    monkeypatch.setattr("trl_hrm.data.build.GROUPED_ROWS", 7)
    assert GROUPED_ROWS > 100
    again, _ = build(tmp_path, three, "again", view=view, weights=[1, 1, 1], num_proc=2)
    assert again == reference
    backwards, _ = build(tmp_path, three[::-1], "backwards", view=view, weights=[1, 1, 1])
    assert {row["prompt"] for row in backwards["train"]} == prompts
    other, _ = build(tmp_path, three, "other", view=view, weights=[1, 1, 1], seed=7)
    assert {row["prompt"] for row in other["train"]} != prompts
    counts = labels_by_source(other["train"])
    assert max(counts.values()) - min(counts.values()) < 3


def test_the_sample_is_independent_of_the_split():
    """With one hash for both, a mixture would have the problems next to the test problems only."""
    names = [f"Problem {i}?" for i in range(2000)]
    train = [problem_order(name, 1) / 2**64 for name in names if problem_split(name, 0.5, 1) == "train"]
    assert abs(np.mean(train) - 0.5) < 0.03 and min(train) < 0.02 and max(train) > 0.98


def test_a_source_without_training_labels(tmp_path):
    inputs = [
        write_file(tmp_path / "a.jsonl", [make_row("a", 0)]),
        write_file(tmp_path / "b.jsonl", [make_row("b", 0) | {"labels": [None, None]}]),
    ]
    with pytest.raises(ValueError, match="b.jsonl: no labelled step is in the train split"):
        build(tmp_path, inputs, weights=[1, 1])


@pytest.mark.parametrize(
    ("inputs", "weights", "message"),
    [
        (["a"], [1.0], "`weights` has no effect with one input"),
        (["a", "b"], [1.0], "`weights` has 1 values for 2 inputs"),
        (["a", "b"], [1.0, 0.0], "`weights` is 0.0. It must be greater than 0"),
    ],
)
def test_wrong_weights(inputs, weights, message):
    with pytest.raises(ValueError, match=message):
        BuildStepwiseConfig(inputs=inputs, output_dir="out", weights=weights)
