"""Stepwise rows: errors with file and line or row, and rows that stay unchanged."""

import datetime
import decimal
import gzip
import io
import json
import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Audio, ClassLabel, Dataset, load_dataset
from packaging.version import Version
from PIL import Image

from trl_hrm import StepFormat
from trl_hrm.data import sources
from trl_hrm.data.build_config import BuildStepwiseConfig
from trl_hrm.data.problems import problem_key, problem_split
from trl_hrm.data.stepwise import build_stepwise
from trl_hrm.trainer.forest_dataset import ForestBuilder

from ..helpers import tiny_tokenizer


GOOD = {"prompt": "1+2+3?", "completions": ["1+2=3.", "3+3=6."], "labels": [True, None]}

FAULTS = [
    ('{"prompt": "1+2+3?", "comple', "invalid JSON (Unterminated string"),
    ({"prompt": "q", "completions": ["a"]}, "`labels` is missing"),
    (GOOD | {"labels": [True]}, "`labels` has 1 entries"),
    (GOOD | {"labels": [True, 1.5]}, "`labels[1]` is 1.5"),
    (GOOD | {"parents": [1, 0]}, "`parents[0]` is 1"),
    (GOOD | {"parents": [-1, 1]}, "`parents[1]` is 1"),
]
BLANK = [
    (GOOD | {"completions": ["a", ""]}, "blank_step", "`completions[1]` is ''"),
    (
        GOOD | {"completions": [" \n", "b"]},
        "blank_step",
        "`completions[0]` is ' \\n'",
    ),
    (GOOD | {"prompt": " "}, "blank_prompt", "column `prompt`"),
]


def write(file, *rows) -> str:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(file)


def build(tmp_path, inputs, view="tree", **options):
    """Return the rows of the train split, and the report."""
    split = options.pop("split", "train")
    report = build_stepwise(
        BuildStepwiseConfig(
            inputs=inputs, output_dir=str(tmp_path / view), view=view, test_size=0, **options, split=split
        )
    )
    return load_dataset(str(tmp_path / view), split="train", cache_dir=str(tmp_path / "cache")).to_list(), report


@pytest.mark.parametrize("view", ["tree", "prm"])
@pytest.mark.parametrize(("row", "message"), FAULTS)
def test_faults_name_file_and_line_and_leave_nothing(tmp_path, view, row, message):
    file = write(tmp_path / "rows.jsonl", GOOD, "", row)
    with pytest.raises(ValueError) as error:
        build_stepwise(BuildStepwiseConfig(inputs=[file], output_dir=str(tmp_path / "out"), view=view))
    assert str(error.value).startswith(f"{file}:3: ")
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize("view", ["tree", "prm"])
@pytest.mark.parametrize(("row", "reason", "message"), BLANK)
def test_rows_with_blank_texts_are_left_out_and_named(tmp_path, view, row, reason, message):
    """Public datasets have a few. Their labels must not move to other steps, and `strict` raises at the first."""
    file = write(tmp_path / "rows.jsonl", GOOD, row, GOOD | {"completions": []} | {"labels": []}, row)
    rows, report = build(tmp_path, [file], view)
    assert [one["completions"] for one in rows] == [GOOD["completions"]]
    assert report["dropped"] == {reason: 2, "no_labelled_step": 1} and report["records_in"] == 4
    [warning] = report["warnings"]
    start = f"2 rows dropped ({reason.replace('_', ' ')}): {file}:2, {file}:4. The first: {file}:2: {message}"
    assert warning.startswith(start)
    with pytest.raises(ValueError) as error:
        build_stepwise(BuildStepwiseConfig(inputs=[file], output_dir=str(tmp_path / "strict"), view=view, strict=True))
    assert str(error.value).startswith(f"{file}:2: {message}")


@pytest.mark.parametrize("num_proc", [1, 2])
def test_rows_in_are_rows_out_and_rows_dropped(tmp_path, monkeypatch, num_proc):
    """For many chunks and processes, the counts must add up, and line numbers must be in file order."""
    monkeypatch.setattr(sources, "CHUNK_BYTES", 300)
    rng = random.Random(0)
    kinds = [rng.choice([GOOD, GOOD, BLANK[0][0], BLANK[2][0]]) for _ in range(100)]
    file = write(tmp_path / "rows.jsonl", *kinds)
    report = build_stepwise(
        BuildStepwiseConfig(
            inputs=[file], output_dir=str(tmp_path / "out"), view="prm", test_size=0, num_proc=num_proc
        )
    )
    assert report["records_in"] == 100 == report["records_kept"] + sum(report["dropped"].values())
    blank = [i for i, kind in enumerate(kinds, 1) if kind is BLANK[0][0]]
    shown = ", ".join(f"{file}:{i}" for i in blank[:5])
    start = (
        f"{len(blank)} rows dropped (blank step): {shown} and {len(blank) - 5} more. The first: {file}:{blank[0]}: "
    )
    assert sum(warning.startswith(start) for warning in report["warnings"]) == 1
    first = next(i for i, kind in enumerate(kinds, 1) if kind is not GOOD)
    config = BuildStepwiseConfig(
        inputs=[file], output_dir=str(tmp_path / "strict"), view="prm", test_size=0, num_proc=num_proc, strict=True
    )
    with pytest.raises(ValueError, match=rf"rows.jsonl:{first if num_proc == 1 else '[0-9]+'}: "):
        build_stepwise(config)


@pytest.mark.parametrize("form", ["lines", "array", "gz"])
def test_arrays_compressed_files_and_other_columns(tmp_path, form):
    """Every file form must give the same dataset, and the card's command must rebuild it."""
    rows = [{"q": {"text": f"{i}?"}, "steps": ["a", "b"], "ok": [1, 0], "year": i} for i in range(3)]
    data = (json.dumps(rows) if form == "array" else "".join(json.dumps(row) + "\n" for row in rows)).encode()
    file = tmp_path / "rows.json"
    file.write_bytes(gzip.compress(data) if form == "gz" else data)
    columns = {"prompt": "q.text", "completions": "steps", "labels": "ok"}
    found, report = build(tmp_path, [str(file)], "prm", columns=columns)
    assert [(row["prompt"], row["completions"], row["labels"], row["year"]) for row in found] == [
        (f"{i}?", ["a", "b"], [1.0, 0.0], i) for i in range(3)
    ]
    assert "--columns prompt=q.text completions=steps labels=ok" in report["command"]
    Dataset.from_list(rows).to_parquet(tmp_path / "in" / "train.parquet")
    assert build(tmp_path, [str(tmp_path / "in")], "prm", columns=columns, overwrite=True)[0] == found


def test_a_column_that_may_carry_part_of_the_problem_is_named(tmp_path):
    file = write(tmp_path / "rows.jsonl", GOOD | {"image": "x.png", "choices": ["1", "2"]}, GOOD)
    _, report = build(tmp_path, [file], "prm")
    assert [warning.split(",")[0] for warning in report["warnings"]] == [
        "1 row has a column `choices`",
        "1 row has a column `image`",
    ]


@pytest.mark.parametrize(
    ("row", "remedy"),
    [
        ({"question": "q", "final_answer": "3", "reasoning_steps": {}}, "trl-hrm export FILE --format openr"),
        ({"question": {}, "label": {"finish_reason": "solution", "steps": []}}, "trl-hrm build-prm800k"),
        (
            {"question": "q", "final_answer": "3", "reasoning_steps": [{"solution_prefix": "q", "mc_value": 1.0}]},
            r"flat file.*math-aps-tree.*trl-hrm export FILE --format openr",
        ),
        ({"problem": "q", "steps": ["a"], "labels": [1]}, "--columns prompt=problem completions=steps"),
        ({"problem": "q", "steps": ["a"], "label": [1]}, "--columns prompt=problem completions=steps"),
        ({"question": "q", "reasoning_steps": ["a"], "labels": [1]}, r"completions=steps\.$"),
    ],
)
def test_rows_of_another_command_are_sent_there(tmp_path, row, remedy):
    with pytest.raises(ValueError, match=remedy):
        build_stepwise(
            BuildStepwiseConfig(inputs=[write(tmp_path / "rows.jsonl", row)], output_dir=str(tmp_path / "out"))
        )


@pytest.mark.parametrize("view", ["tree", "prm"])
@pytest.mark.parametrize(("row", "message"), FAULTS[2:])
def test_faults_of_a_dataset_name_the_row(tmp_path, view, row, message):
    good = GOOD | ({"parents": [-1, 0]} if "parents" in row else {})
    labels = [[None if x is None else float(x) for x in one["labels"]] for one in (good, row)]
    data = {name: [good[name], row[name]] for name in good} | {"labels": labels}
    (tmp_path / "in").mkdir()
    Dataset.from_dict(data).to_parquet(tmp_path / "in" / "train.parquet")
    with pytest.raises(ValueError) as error:
        build_stepwise(BuildStepwiseConfig(inputs=[str(tmp_path / "in")], output_dir=str(tmp_path / "out"), view=view))
    assert f"{tmp_path / 'in'}, dataset row 1: " in str(error.value)
    assert message in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_rows_of_a_prompt_are_one_tree(tmp_path):
    file = write(
        tmp_path / "rows.jsonl",
        GOOD | {"answer": "6"},
        {"prompt": "other?", "completions": ["x"], "labels": [0.25]},
        {"prompt": "1+2+3?", "completions": ["1+2=3.", "3+3=7."], "labels": [True, False]},
    )
    rows, report = build(tmp_path, [file])
    assert rows[0]["completions"] == ["1+2=3.", "3+3=6.", "3+3=7."]
    assert rows[0]["labels"] == [1.0, None, 0.0]
    assert rows[0]["parents"] == [-1, 0, 0]
    assert [row["answer"] for row in rows] == ["6", None]
    assert report["labels"] == {"train": {"single": {"0.00": 1, "0.25": 1, "1.00": 1, "null": 1}}}
    assert report["notes"] == {"joined_records": 1}


def test_flat_rows_do_not_change(tmp_path):
    rows = [GOOD, GOOD | {"completions": ["1+2=3.", " 3+3=7."], "labels": [0.75, 0.0]}]
    found, _ = build(tmp_path, [write(tmp_path / "rows.jsonl", *rows)], view="prm")
    assert [row["completions"] for row in found] == [["1+2=3.", "3+3=6."], ["1+2=3.", " 3+3=7."]]
    assert [row["labels"] for row in found] == [[1.0, None], [0.75, 0.0]]


def test_rows_without_label_are_counted(tmp_path):
    rows = [GOOD, GOOD | {"labels": [None, None]}, {"prompt": "q", "completions": [], "labels": []}]
    _, report = build(tmp_path, [write(tmp_path / "rows.jsonl", *rows)], view="prm")
    assert report["dropped"] == {"no_labelled_step": 2}


def test_other_columns_keep_their_types(tmp_path):
    """A column that first appears in a later chunk, or is null there, must not be lost or change its type."""
    rows = [
        GOOD | {"prompt": f"q{i}", "mc_total": 16 if i > 1 else None, "problem_id": i} | ({"tags": ["x"]} if i else {})
        for i in range(3)
    ]
    found, _ = build(tmp_path, [write(tmp_path / "rows.jsonl", *rows)], num_proc=1)
    assert [row["mc_total"] for row in found] == [None, None, 16]
    assert [row["tags"] for row in found] == [None, ["x"], ["x"]]
    assert [row["problem_id"] for row in found] == ["0", "1", "2"]


@pytest.mark.parametrize("is_folder", [False, True])
def test_ids_are_strings(tmp_path, is_folder):
    """Readers of solutions need an id for each row, all of one type. Rows without one get a hash."""
    ids = [3, None, 4] if is_folder else [3, "x", None]
    rows = [GOOD | {"prompt": f"q{i}", "labels": [1, 0], "problem_id": one} for i, one in enumerate(ids)]
    if is_folder:
        (tmp_path / "in").mkdir()
        Dataset.from_list(rows).to_parquet(tmp_path / "in" / "train.parquet")
        source = str(tmp_path / "in")
    else:
        del rows[2]["problem_id"]
        source = write(tmp_path / "rows.jsonl", *rows, GOOD | {"problem_id": None})
    found, _ = build(tmp_path, [source])
    expected = {row["prompt"]: problem_key(row["prompt"]).hex() for row in found}
    expected |= {f"q{i}": str(one) for i, one in enumerate(ids) if one is not None}
    assert {row["prompt"]: row["problem_id"] for row in found} == expected


def test_joined_rows_train_with_the_same_weights(tmp_path):
    """A joined step had the weight of its first row, so a label of another row could have the weight 0."""
    rows = [
        {"prompt": "q", "completions": ["a", "b"], "labels": [1.0, None], "label_weights": [0.5, 0]},
        {"prompt": "q", "completions": ["a", "b"], "labels": [0.5, 0.25], "label_weights": [1.5, 2]},
    ]
    joined, _ = build(tmp_path, [write(tmp_path / "rows.jsonl", *rows)])
    builder = ForestBuilder(tiny_tokenizer(), StepFormat(), 64, label_weighting="column")
    flat, tree = (builder(Dataset.from_list(one), "train_dataset")[0].to_list() for one in (rows, joined))
    assert flat == tree and flat[0]["label_weights"] == [1, 2] and flat[0]["labels"] == [0.625, 0.25]


@pytest.mark.parametrize("choices", [["3", "4"], {"label": ["A", "B"], "text": ["3", "4"]}])
def test_choices_belong_to_the_problem(tmp_path, choices):
    """A problem must have one split and be excluded, whether its choices are in a column or in its text."""
    row = {"completions": ["a"], "labels": [True]}
    columns = [row | {"prompt": f"Which {i}?", "choices": choices} for i in range(60)]
    texts = [row | {"prompt": f"Which {i}?\nA. 3\nB. 4"} for i in range(60)]
    inputs = [write(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("columns", columns), ("texts", texts))]
    test = [{"question": "Which 0?", "options": ["3", "4"], "answer": "A"}, {"question": "Which 1?\nA. 3\nB. 4"}]
    exclude = [write(tmp_path / "test.jsonl", *test)]
    config = BuildStepwiseConfig(inputs=inputs, output_dir=str(tmp_path / "out"), test_size=0.5, exclude=exclude)
    report = build_stepwise(config)
    assert report["dropped"] == {"excluded": 4}
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    train, test = ({text.split("?")[0] for text in dataset[split]["prompt"]} for split in ("train", "test"))
    assert len(train) + len(test) == 58 and not train & test


@pytest.mark.parametrize("order", [1, -1])
def test_a_prompt_with_several_choices_has_one_split(tmp_path, order):
    """The split of a tree must not depend on the order of the rows that it is joined from."""
    row = {"completions": ["a"], "labels": [True]}
    rows = [
        row | {"prompt": f"Which {i}?", "choices": choices} for i in range(30) for choices in (["5", "6"], ["3", "4"])
    ]
    file = write(tmp_path / "rows.jsonl", *rows[::order])
    build_stepwise(BuildStepwiseConfig(inputs=[file], output_dir=str(tmp_path / "out"), test_size=0.5))
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for split, found in dataset.items():
        for prompt in found["prompt"]:
            assert split == problem_split(f"{prompt}\nA. 3\nB. 4", 0.5, 42)


def test_an_original_prompt_of_messages_in_a_dataset(tmp_path):
    """It becomes a text, so the column cannot keep its type."""
    message = [{"role": "user", "content": "3+3?"}]
    (tmp_path / "in").mkdir()
    rows = [GOOD | {"prompt": message, "original_prompt": message}]
    Dataset.from_list(rows).to_parquet(tmp_path / "in" / "train.parquet")
    found, _ = build(tmp_path, [str(tmp_path / "in")])
    assert found[0]["original_prompt"] == "3+3?"


def test_column_of_two_types(tmp_path):
    file = write(tmp_path / "rows.jsonl", GOOD | {"year": 2024}, GOOD | {"year": "2024"})
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*`year`"):
        build_stepwise(BuildStepwiseConfig(inputs=[file], output_dir=str(tmp_path / "out"), view="prm"))


def test_hrm_of_an_hrm_dataset(tmp_path):
    """Merging merged steps again would repeat pairs, or label runs of three and four as pairs."""
    file = write(tmp_path / "rows.jsonl", GOOD | {"labels": [True, False]})
    first, _ = build(tmp_path / "1", [file], view="hrm")
    again, _ = build(tmp_path / "2", [str(tmp_path / "1" / "hrm")], view="hrm")
    assert again == first


def test_a_build_can_be_read_again(tmp_path):
    """The tree view of a tree dataset, or of its flat rows, must be the same dataset."""
    rows = [
        {"prompt": "q", "completions": ["a", "b", "c"], "labels": [1, 0, 0.5], "parents": [-1, 0, 0], "answer": "6"},
        {"prompt": "r", "completions": ["a"], "labels": [1], "parents": [-1]},
    ]
    first, _ = build(tmp_path / "1", [write(tmp_path / "rows.jsonl", *rows)])
    again, _ = build(tmp_path / "2", [str(tmp_path / "1" / "tree")])
    assert again == first
    flat, report = build(tmp_path / "3", [str(tmp_path / "1" / "tree")], view="prm")
    assert [row["completions"] for row in flat] == [["a", "b"], ["a", "c"], ["a"]]
    assert "--split train" in report["command"]
    from_flat, _ = build(tmp_path / "4", [str(tmp_path / "3" / "prm")])
    assert from_flat == first


def test_merged_steps_survive_in_flat_rows(tmp_path):
    file = write(tmp_path / "rows.jsonl", GOOD | {"labels": [True, False]})
    build(tmp_path, [file], view="hrm")
    flat, _ = build(tmp_path, [str(tmp_path / "hrm")], view="prm")
    assert [row["completions"] for row in flat] == [["1+2=3.", "3+3=6."], ["1+2=3.\n3+3=6."]]
    assert [row["num_merged"] for row in flat] == [[1, 1], [2]]
    config = BuildStepwiseConfig(inputs=[str(tmp_path / "hrm")], view="orm", output_dir=str(tmp_path / "orm"))
    with pytest.raises(ValueError, match="row 0: found merged steps .*, which would become solutions of their own"):
        build_stepwise(config)


def test_missing_inputs(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.jsonl: file not found"):
        build_stepwise(BuildStepwiseConfig(inputs=[str(tmp_path / "none.jsonl")], output_dir=str(tmp_path / "out")))


def typed_columns() -> dict[str, pa.Array]:
    """Return columns of two rows, one per Arrow type that `datasets` reads."""
    types = [
        *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Europe/Paris")),
        *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
        *(pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.date32()),
        *(pa.int8(), pa.int16(), pa.uint8(), pa.uint32(), pa.uint64(), pa.float16(), pa.float32(), pa.bool_()),
    ]
    columns = {}
    for kind in types:
        whole = pa.int32() if kind in (pa.time32("s"), pa.time32("ms"), pa.date32()) else pa.int64()
        columns[str(kind)] = pa.array([None, 1], whole).cast(kind)
    others = {
        pa.date64(): datetime.date(2024, 2, 29),
        pa.decimal128(10, 2): decimal.Decimal("1.25"),
        pa.decimal256(50, 2): decimal.Decimal("1.25"),
        pa.binary(): b"\xff",
        pa.large_binary(): b"\xff",
        pa.large_string(): "a",
        pa.dictionary(pa.int8(), pa.string()): "a",
        pa.struct({"a": pa.list_(pa.timestamp("ns"))}): {"a": [datetime.datetime(2024, 2, 29)]},
        pa.list_(pa.struct({"a": pa.date32()})): [{"a": datetime.date(2024, 2, 29)}],
        pa.large_list(pa.int8()): [1],
        pa.null(): None,
    }
    if Version(datasets.__version__) >= Version("5"):  # earlier versions cannot read them
        others |= {pa.binary(2): b"\xff\x00", pa.list_(pa.float32(), 2): [1.0, float("inf")]}
    return columns | {str(kind): pa.array([None, value], kind) for kind, value in others.items()}


@pytest.mark.parametrize("view", ["tree", "hrm", "prm", "orm"])
def test_columns_of_every_type_are_kept(tmp_path, view):
    """The card of a build once failed on a timestamp, after all rows were built."""
    picture = io.BytesIO()
    Image.new("RGB", (2, 2), (9, 0, 0)).save(picture, "PNG")
    rows = {"prompt": ["p", "q"], "completions": [["a"]] * 2, "labels": [[1.0], [0.0]]}
    extra = typed_columns()
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows | extra), tmp_path / "plain.parquet")
    dataset = Dataset.from_parquet(str(tmp_path / "plain.parquet"), cache_dir=str(tmp_path / "cache"))
    dataset = dataset.add_column("class", [0, 1]).cast_column("class", ClassLabel(names=["x", "y"]))
    for name, feature in (("image", datasets.Image()), ("audio", Audio())):
        stored = [{"bytes": picture.getvalue(), "path": None}] * 2
        dataset = dataset.add_column(name, stored).cast_column(name, feature)
    dataset.to_parquet(tmp_path / "in" / "train.parquet")
    build(tmp_path, [str(tmp_path / "in")], view=view)
    expected, built = (
        load_dataset(str(tmp_path / name), split="train", cache_dir=str(tmp_path / f"cache-{name}"))
        for name in ("in", view)
    )
    names = [*extra, "class", "image", "audio"]
    assert {name: built.features[name] for name in names} == {name: expected.features[name] for name in names}
    before, after = (one.with_format("arrow").select_columns(names)[:] for one in (expected, built))
    assert {name: after[name] for name in names if not after[name].equals(before[name])} == {}
    assert after["timestamp[ns]"].cast(pa.int64()).to_pylist() == [None, 1]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([2**62], pa.timestamp("us")), "in, dataset row 0: a value cannot be read .*out of range"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())), "in: .*map<string"),
        (pa.array([1], pa.time64("ns")), r"in, dataset rows: the column `extra` has the type time64\[ns\]"),
        (
            pa.array([{"a": 1}], pa.struct({"a": pa.time64("ns")})),
            r"in, dataset rows: the column `extra` .* nanoseconds",
        ),
    ],
)
def test_types_that_cannot_be_kept_are_refused_by_name(tmp_path, column, message):
    (tmp_path / "in").mkdir()
    table = pa.table({"prompt": ["q"], "completions": [["a"]], "labels": [[1.0]], "extra": column})
    pq.write_table(table, tmp_path / "in" / "train.parquet")
    with pytest.raises(ValueError, match=message):
        build(tmp_path, [str(tmp_path / "in")])
