"""Math-Shepherd records: two texts that must agree, merged into one tree per problem."""

import json
from collections import Counter

import pytest
from datasets import load_dataset

from trl_hrm.data.build import Dropped
from trl_hrm.data.build_config import BuildMathShepherdConfig, BuildStepwiseConfig
from trl_hrm.data.math_shepherd import build_math_shepherd, parse_math_shepherd
from trl_hrm.data.stepwise import build_stepwise


def record(text: str, labels: str, task: str = "GSM8K") -> dict[str, str]:
    """Return a record from a text with `#` instead of the tags."""
    signs = iter(labels)
    label = "".join(next(signs) if letter == "#" else letter for letter in text)
    return {"input": text.replace("#", "ки"), "label": label, "task": task}


def write(file, *records) -> str:
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    return str(file)


def test_steps_and_labels():
    tree = parse_math_shepherd(record("1+2+3? Step 1: 1+2=3. #\nStep 2: 3+3=7. #", "+-"), "file:1", Counter())
    assert tree.prompt == "1+2+3?"
    assert tree.completions == ["Step 1: 1+2=3.", "Step 2: 3+3=7."]
    assert tree.labels == [1.0, 0.0]
    assert tree.parents == [-1, 0]
    assert tree.extra == {"task": "GSM8K"}


def test_arithmetic_signs_are_not_labels():
    """Reading `+` and `-` anywhere in the text would give five labels here."""
    tree = parse_math_shepherd(record("1+2-3? Step 1: 1+2 #\nStep 2: -3 + 3 = 0 #", "-+"), "file:1", Counter())
    assert tree.labels == [0.0, 1.0]


def test_question_that_mentions_step_1():
    tree = parse_math_shepherd(record("Do Step 1: add. What is 1+2? Step 1: 3 #", "+"), "file:1", Counter())
    assert tree.prompt == "Do Step 1: add. What is 1+2?"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (record("q Step 1: a", ""), "no_tag"),
        (record("q Step 1: a # more", "+"), "text_after_last_tag"),
        (record("q Step 1: a #", "?"), "unknown_label"),
        (record("q Step 1: a #", "+") | {"label": "q Step 1: b +"}, "texts_differ"),
        (record("q Step 1: a #", "+") | {"label": "q Step 1: a + more"}, "texts_differ"),
        (record("q Step 1: a #", "+") | {"label": "q Step 1: a "}, "texts_differ"),
        (record("q a #", "+"), "no_first_step"),
        (record("Step 1: a #", "+"), "no_first_step"),
        (record("q Step 1: a # #", "++"), "empty_step"),
    ],
)
def test_odd_records_are_dropped_by_reason(value, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        parse_math_shepherd(value, "file:1", Counter())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"input": "q"}, "file:1: the key `label` is missing, found ['input']"),
        ({"label": "q"}, "file:1: the key `input` is missing, found ['label']"),
        ({"input": "q", "label": None}, "file:1: `label` is None, expected a string"),
    ],
)
def test_faults_are_named(value, message):
    with pytest.raises(ValueError) as error:
        parse_math_shepherd(value, "file:1", Counter())
    assert message in str(error.value)


ER_PRM = {"text": "1+2? Step 1: a ки\nStep 2: b ки", "value": [0.9, 0.25]}
TURNS = [("user", "1+2? Step 1: a"), ("assistant", "+"), ("user", "Step 2: b"), ("assistant", "-")]


def conversation(turns) -> dict:
    return {"conversations": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(("value", "labels"), [(ER_PRM, [0.9, 0.25]), (conversation(TURNS), [1.0, 0.0])])
def test_other_formats_of_this_data(value, labels):
    """Formats are recognised by their keys. Values are soft labels, and rounding would lose information."""
    tree = parse_math_shepherd(value, "file:1", Counter())
    assert (tree.prompt, tree.completions) == ("1+2?", ["Step 1: a", "Step 2: b"])
    assert (tree.labels, tree.parents) == (labels, [-1, 0])


def test_header_of_the_first_step_is_not_part_of_the_question():
    turns = [("user", "1+2?\n\n## Step 1: a"), ("assistant", " + ")]
    tree = parse_math_shepherd(conversation(turns), "file:1", Counter())
    assert (tree.prompt, tree.completions) == ("1+2?", ["## Step 1: a"])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (ER_PRM | {"value": [0.9]}, "`value` has 1 values for 2 steps"),
        (ER_PRM | {"value": [0.9, 1.5]}, r"`value` is \[0.9, 1.5\]"),
        (ER_PRM | {"value": [0.9, None]}, "expected numbers from 0 to 1"),
        (ER_PRM | {"text": None}, "`text` is None, expected a string"),
        (conversation(TURNS[:3]), "expected messages with `role` and `content`"),
        (conversation(TURNS[1:]), "expected messages"),
        ({"conversations": "x"}, "messages"),
    ],
)
def test_faults_of_these_formats_are_named(value, message):
    with pytest.raises(ValueError, match=f"^file:1: .*{message}"):
        parse_math_shepherd(value, "file:1", Counter())


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (conversation([*TURNS[:3], ("assistant", "maybe")]), "unknown_label"),
        (conversation([("user", "1+2? It is 3."), ("assistant", "+")]), "no_first_step"),
        (conversation([*TURNS[:2], ("user", " "), ("assistant", "+")]), "empty_step"),
        (ER_PRM | {"text": "1+2? Step 1: a"}, "no_tag"),
    ],
)
def test_odd_records_of_these_formats_are_dropped_by_reason(value, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        parse_math_shepherd(value, "file:1", Counter())


def test_one_faulty_record_does_not_stop_a_build(tmp_path):
    good, bad = record("q Step 1: a #", "+"), {"input": "q Step 1: a ки", "label": None}
    file = write(tmp_path / "shepherd.jsonl", good, bad, {"input": "x"})
    report = build_math_shepherd(BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "out"), test_size=0))
    assert report["dropped"] == {"missing_key": 1, "not_a_string": 1} and report["records_in"] == 3
    start = f"1 row dropped (not a string): {file}:2. The first: {file}:2: `label` is None"
    assert any(warning.startswith(start) for warning in report["warnings"])
    with pytest.raises(ValueError, match="shepherd.jsonl:2: `label` is None"):
        build_math_shepherd(
            BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "strict"), test_size=0, strict=True)
        )


@pytest.mark.parametrize(
    ("build", "kind"), [(build_math_shepherd, BuildMathShepherdConfig), (build_stepwise, BuildStepwiseConfig)]
)
@pytest.mark.parametrize(
    ("records", "labels"),
    [
        ([ER_PRM, {"text": "4-1? Step 1: c ки\nStep 2: d ки", "value": [0.1, 0.0]}], [[0.9, 0.25], [0.1, 0.0]]),
        ([conversation(TURNS)], [[1.0, 0.0]]),
    ],
)
def test_files_of_these_formats(tmp_path, build, kind, records, labels):
    """Both the builder for this data and the general builder must read these files."""
    source = write(tmp_path / "rows.jsonl", *records)
    report = build(kind(inputs=source, output_dir=str(tmp_path / "out"), view="prm", test_size=0))
    assert report["records_kept"] == report["records_in"] == len(records) and report["warnings"] == []
    found = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["labels"] for row in found] == [pytest.approx(values) for values in labels]
    assert all(len(row["completions"]) == 2 and row["completions"][1].startswith("Step 2:") for row in found)
    assert all(row["prompt"].endswith("?") for row in found)


def test_solutions_of_a_problem_are_one_tree(tmp_path):
    """Records of one problem may be scattered over the file."""
    file = write(
        tmp_path / "shepherd.jsonl",
        record("q Step 1: a #\nStep 2: b #", "++"),
        record("r Step 1: a #", "-", task="MATH"),
        record("q Step 1: a #\nStep 2: c #", "+-"),
        record("q Step 1: a #\nStep 2: b #", "-+"),
        record("q Step 1: a", ""),
    )
    report = build_math_shepherd(
        BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "tree"), test_size=0)
    )
    rows = load_dataset(str(tmp_path / "tree"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["prompt"] for row in rows] == ["q", "r"]
    assert rows[0]["completions"] == ["Step 1: a", "Step 2: b", "Step 2: c"]
    assert rows[0]["labels"] == [pytest.approx(2 / 3), 1.0, 0.0]
    assert rows[0]["parents"] == [-1, 0, 0]
    assert [row["task"] for row in rows] == ["GSM8K", "MATH"]
    assert (report["records_in"], report["records_kept"], report["dropped"]) == (5, 4, {"no_tag": 1})
    assert report["notes"] == {"joined_records": 2, "contradicting_labels": 1}

    report = build_math_shepherd(
        BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "prm"), view="prm", test_size=0)
    )
    rows = load_dataset(str(tmp_path / "prm"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["labels"] for row in rows] == [[1.0, 1.0], [0.0], [1.0, 0.0], [0.0, 1.0]]
    assert "parents" not in rows[0]

    build_math_shepherd(
        BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "orm"), view="orm", test_size=0)
    )
    rows = load_dataset(str(tmp_path / "orm"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    assert [row["labels"] for row in rows] == [[None, 1.0], [0.0], [None, 0.0], [None, 1.0]]


def test_real_sample(tmp_path, shared_data):
    """Seven solutions of seven problems: 5 + 3 + 2 + 5 + 5 + 2 + 3 = 25 tags, so 25 labels and 25 - 7 = 18 pairs."""
    file = shared_data / "samples" / "math-shepherd.jsonl"
    report = build_math_shepherd(
        BuildMathShepherdConfig(inputs=[file], output_dir=str(tmp_path / "out"), view="hrm", test_size=0)
    )
    assert (report["records_in"], report["records_kept"], report["rows"]) == (7, 7, {"train": 7})
    labels = report["labels"]["train"]
    assert (sum(labels["single"].values()), sum(labels["merged"].values())) == (25, 18)
    text = file.read_text(encoding="utf-8")
    signs = Counter()
    for line in text.split("\n")[:-1]:
        signs.update(part[-1] for part in json.loads(line)["label"].split("\n"))
    assert labels["single"] == {"0.00": signs["-"], "1.00": signs["+"]}
