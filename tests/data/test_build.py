"""Features shared by all builders: splits, exclusion, processes, and complete output."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard

from trl_hrm.data import sources
from trl_hrm.data.build_config import BuildConfig, BuildStepwiseConfig
from trl_hrm.data.card import build_command
from trl_hrm.data.stepwise import build_stepwise


@pytest.fixture
def rows_file(tmp_path):
    """Write 600 rows of 200 problems whose prompts differ in whitespace and case."""
    file = tmp_path / "rows.jsonl"
    with open(file, "w") as lines:
        for i in range(600):
            prompt = [f"What is {i % 200}?", f"what  is {i % 200}?", f"WHAT IS\n{i % 200}?"][i // 200]
            row = {"prompt": prompt, "completions": [f"It is {i % 200}.", "Done."], "labels": [True, i % 3 == 0]}
            lines.write(json.dumps(row) + "\n")
    return str(file)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 2000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("view", ["tree", "prm"])
def test_no_problem_is_in_two_splits(tmp_path, rows_file, small_chunks, view):
    """Splitting by row or by exact text would put one problem in both splits."""
    report = build_stepwise(
        BuildStepwiseConfig(
            inputs=[rows_file], output_dir=str(tmp_path / "out"), view=view, test_size=0.25, num_proc=2
        )
    )
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    problems = {name: {" ".join(text.split()).lower() for text in dataset[name]["prompt"]} for name in dataset}
    assert not problems["train"] & problems["test"]
    assert len(problems["train"]) + len(problems["test"]) == 200
    assert report["rows"] == {"train": len(dataset["train"]), "test": len(dataset["test"])}
    assert sum(report["rows"].values()) == 600
    ids = {name: set(dataset[name]["problem_id"]) for name in dataset}
    assert not ids["train"] & ids["test"]
    texts = {" ".join(text.split()) for name in dataset for text in dataset[name]["prompt"]}
    assert len(ids["train"] | ids["test"]) == len(texts) == 600  # a different letter case is a different problem


@pytest.mark.parametrize("view", ["tree", "hrm", "prm", "orm"])
def test_number_of_processes_does_not_matter(tmp_path, monkeypatch, rows_file, small_chunks, view):
    """The same seed must give the same bytes."""
    monkeypatch.chdir(tmp_path)
    found = []
    for num_proc in (1, 2, 3):
        build_stepwise(
            BuildStepwiseConfig(inputs=[rows_file], output_dir="out", view=view, num_proc=num_proc, overwrite=True)
        )
        found.append(contents(tmp_path / "out"))
    assert found[0] == found[1] == found[2]
    assert sorted(found[0]) == [
        "README.md",
        "build_report.json",
        "data/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    ]


def test_rows_keep_the_order_of_the_file(tmp_path, rows_file, small_chunks):
    build_stepwise(
        BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"), view="prm", test_size=0, num_proc=2)
    )
    rows = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    with open(rows_file) as lines:
        assert rows["prompt"] == [json.loads(line)["prompt"] for line in lines]


def test_excluded_problems_are_dropped(tmp_path, rows_file):
    exclude = tmp_path / "test.jsonl"
    exclude.write_text('{"question": "what is 7?"}\n{"question": "What is\\n8?"}\n{"question": "Who?"}\n')
    config = BuildStepwiseConfig(
        inputs=[rows_file], output_dir=str(tmp_path / "out"), view="prm", exclude=[str(exclude)], test_size=0
    )
    report = build_stepwise(config)
    assert report["dropped"] == {"excluded": 6}
    assert (report["records_in"], report["records_kept"]) == (600, 594)
    prompts = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))["prompt"]
    assert not {text.split()[-1] for text in prompts} & {"7?", "8?"}


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("view", ["tree", "prm"])
def test_fault_in_a_late_chunk(tmp_path, rows_file, small_chunks, num_proc, view):
    """An error in a worker process must keep its message, and no rows written before it may stay."""
    with open(rows_file, "a") as lines:
        lines.write('{"prompt": "q", "completions": ["a"], "labels": [2]}\n')
    with pytest.raises(ValueError) as error:
        build_stepwise(
            BuildStepwiseConfig(
                inputs=[rows_file], output_dir=str(tmp_path / "a" / "out"), view=view, num_proc=num_proc
            )
        )
    assert str(error.value).startswith(f"{rows_file}:601: `labels[0]` is 2, expected a boolean, a probability")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_existing_output(tmp_path, rows_file):
    config = BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"))
    build_stepwise(config)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out: .*--overwrite"):
        build_stepwise(config)
    # A failed build does not change the earlier one.
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(ValueError, match="bad.jsonl:1: .*`prompt`"):
        build_stepwise(BuildStepwiseConfig(inputs=[str(bad)], output_dir=str(tmp_path / "out"), overwrite=True))
    assert contents(tmp_path / "out") == before
    build_stepwise(
        BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"), view="prm", overwrite=True)
    )
    assert json.loads((tmp_path / "out" / "build_report.json").read_text())["view"] == "prm"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "out", "rows.jsonl"]


def test_overwrite_spares_other_folders(tmp_path, rows_file):
    """`--overwrite` with a mistyped path must not delete a user's work."""
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.txt").write_text("1")
    with pytest.raises(FileExistsError, match="--overwrite only replaces earlier builds"):
        build_stepwise(BuildStepwiseConfig(inputs=[rows_file], output_dir=str(folder), overwrite=True))
    assert (folder / "chapter.txt").read_text() == "1"


def test_load_dataset_sees_a_rebuild(tmp_path, rows_file):
    """`load_dataset` caches a local directory by its name and card, so it could return old rows with new counts."""
    config = BuildStepwiseConfig(
        inputs=[rows_file], output_dir=str(tmp_path / "out"), view="prm", test_size=0, overwrite=True
    )
    labels = []
    for label in (True, False):
        row = {"prompt": "What is 1?", "completions": ["It is 1."], "labels": [label]}
        Path(rows_file).write_text(json.dumps(row) + "\n")
        build_stepwise(config)
        dataset = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
        labels.append(dataset[0]["labels"])
    assert labels == [[1.0], [0.0]]


def test_empty_splits(tmp_path, rows_file):
    one = tmp_path / "one.jsonl"
    one.write_text(Path(rows_file).read_text().split("\n")[0] + "\n")
    report = build_stepwise(BuildStepwiseConfig(inputs=[str(one)], output_dir=str(tmp_path / "out"), test_size=0.01))
    assert report["rows"] == {"train": 1}
    assert "no test split was written" in report["warnings"][0]
    assert "warning: no test split was written" in str(report)
    with pytest.raises(ValueError, match="the train split is empty: .* all 1 rows"):
        build_stepwise(BuildStepwiseConfig(inputs=[str(one)], output_dir=str(tmp_path / "no"), test_size=0.999))
    with pytest.raises(ValueError, match=r"0 of 1 records.*excluded: 1"):
        build_stepwise(BuildStepwiseConfig(inputs=[str(one)], output_dir=str(tmp_path / "no"), exclude=[str(one)]))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl: no records found"):
        build_stepwise(BuildStepwiseConfig(inputs=[str(tmp_path / "empty.jsonl")], output_dir=str(tmp_path / "no")))
    assert not (tmp_path / "no").exists()


def test_types(tmp_path, rows_file):
    build_stepwise(BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"), view="hrm"))
    schema = pq.read_schema(tmp_path / "out" / "data" / "train-00000-of-00001.parquet")
    assert {field.name: str(field.type).replace("element", "item") for field in schema} == {
        "prompt": "string",
        "completions": "list<item: string>",
        "labels": "list<item: float>",
        "parents": "list<item: int32>",
        "num_merged": "list<item: int32>",
        "problem_id": "string",
    }


def test_card(tmp_path, rows_file):
    report = build_stepwise(BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"), view="hrm"))
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.configs == [
        {
            "config_name": "default",
            "description": f"content {report['content']}",
            "data_files": [
                {"split": "train", "path": "data/train-*.parquet"},
                {"split": "test", "path": "data/test-*.parquet"},
            ],
        }
    ]
    assert report["command"] in card.text
    assert "| labels: train, merged, 1.00 |" in card.text
    assert json.loads((tmp_path / "out" / "build_report.json").read_text()) == report


def test_rebuild_command():
    config = BuildConfig(
        output_dir="my out", view="hrm", max_merge=3, exclude=["a.jsonl", "b.jsonl"], num_proc=2, overwrite=True
    )
    command = build_command(
        "build-prm800k", ["in.jsonl"], {"neutral": 0.5, "drop_screening": True, "split": None}, config
    )
    assert command == (
        "trl-hrm build-prm800k in.jsonl --output_dir 'my out' --view hrm '--merge_separator=\\n' --max_merge 3 "
        "--neutral 0.5 --drop_screening --test_size 0.1 --seed 42 --exclude a.jsonl b.jsonl"
    )


def test_report_table(tmp_path, rows_file):
    report = build_stepwise(
        BuildStepwiseConfig(inputs=[rows_file], output_dir=str(tmp_path / "out"), view="prm", test_size=0)
    )
    assert str(report) == "\n".join(
        [
            "records in                            600",
            "records kept                          600",
            "rows out: train                       600",
            "labelled steps                      1,200",
            "labels: train, single, 0.00           400",
            "labels: train, single, 1.00           800",
        ]
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"view": "flat"}, "`view` is 'flat'.*tree, hrm, prm, orm"),
        ({"merge_separator": ""}, "merge_separator"),
        ({"max_merge": 1}, "`max_merge` is 1"),
        ({"max_merge": 3}, "`max_merge` is 3, but has no effect with `view='tree'`"),
        ({"merge_separator": " "}, "`merge_separator` is ' ', but has no effect with `view='tree'`"),
        ({"test_size": 1.0}, "`test_size` is 1.0"),
        ({"num_proc": 0}, "`num_proc` is 0"),
    ],
)
def test_options_out_of_range(option, message):
    with pytest.raises(ValueError, match=message):
        BuildConfig(output_dir="out", **option)
