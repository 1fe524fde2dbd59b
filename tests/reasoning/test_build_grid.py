"""Datasets of grid puzzles: splits share no puzzle, counts are right, and the same seed gives the same bytes."""

import json
from collections import Counter
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from tqdm import tqdm

from trl_hrm.data.publish import push_dataset
from trl_hrm.data.publish_config import PushDatasetConfig
from trl_hrm.reasoning.data.sudoku import canonical_sudoku, check_sudoku, sudoku_rules
from trl_hrm.scripts.build_grid import BuildGridConfig, build_grid


def read(folder: Path, split: str) -> list[dict]:
    return pq.read_table(folder / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


def build(folder: Path, **options) -> dict:
    small = {"num_train": 30, "num_validation": 8, "num_test": 12, "num_proc": 1}
    return build_grid(BuildGridConfig(output_dir=str(folder), **small | options))


def form(row: dict) -> tuple[bytes, bytes]:
    boards = [np.array(row[name]) - 1 for name in ("puzzle", "solution")]
    return canonical_sudoku(sudoku_rules(row["height"]), *boards)


def test_sudoku(tmp_path):
    report = build(tmp_path / "made", family="sudoku", size=6, clues=12, num_few_blanks=10)
    sizes = {"train": 30, "validation": 8, "test": 12, "few_blanks": 10}
    assert report["rows"] == sizes
    rows = {split: read(tmp_path / "made", split) for split in sizes}
    for split, found in rows.items():
        for row in found:
            puzzle, solution = ((np.array(row[name]) - 1).tolist() for name in ("puzzle", "solution"))
            assert check_sudoku(sudoku_rules(6), puzzle) == solution
            assert (row["height"], row["width"], row["family"], row["puzzle_id"]) == (6, 6, "sudoku", "")
            if split != "few_blanks":
                assert puzzle.count(0) == 24
    assert Counter(row["puzzle"].count(1) for row in rows["few_blanks"]) == {1: 2, 2: 2, 3: 2, 4: 2, 5: 2}
    row = rows["train"][0]
    puzzle, solution = row["text"].split("\n\n")
    assert [".123456".index(symbol) + 1 for symbol in puzzle.replace("\n", "")] == row["puzzle"]
    assert [".123456".index(symbol) + 1 for symbol in solution.replace("\n", "")] == row["solution"]
    loaded = datasets.load_dataset(str(tmp_path / "made"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(loaded[split]) for split in loaded} == sizes
    assert loaded["train"].features["puzzle"] == datasets.List(datasets.Value("uint8"))


def test_splits_share_no_equivalent_puzzle(tmp_path):
    """With 8 clues, 4x4 Sudoku has few kinds of puzzles, so that most that are drawn are equivalent to an earlier one."""
    report = build(tmp_path / "made", family="sudoku", size=4, clues=5, num_train=40, num_validation=20, num_test=20)
    forms = {split: [form(row) for row in read(tmp_path / "made", split)] for split in ("train", "validation", "test")}
    assert len({one for found in forms.values() for one in found}) == 80
    groups = [row["group"] for split in forms for row in read(tmp_path / "made", split)]
    assert len(set(groups)) == 80
    assert report["dropped"]["equivalent to an earlier one"] > 20
    assert report["drawn"] == sum(report["rows"].values()) + sum(report["dropped"].values())
    seen = {grid for grid, _ in forms["train"]}
    for split in ("validation", "test"):
        facts = report["facts"][split]
        assert facts["equivalent to a training board, dropped"] > 0
        assert facts["kept, but the solution grids are known from training"] == sum(
            grid in seen for grid, _ in forms[split]
        )


@pytest.mark.parametrize("family", ["sudoku", "maze"])
def test_bytes_do_not_depend_on_processes(tmp_path, family):
    """Results of workers that arrive in another order would move puzzles between splits."""
    options = {"family": family, "size": {"sudoku": 4, "maze": 7}[family], "num_train": 120}
    if family == "sudoku":
        options |= {"clues": 6}
    contents = []
    for name, num_proc in (("one", 1), ("two", 2), ("again", 1)):
        report = build(tmp_path / name, num_proc=num_proc, **options)
        contents.append((report["content"], report["drawn"], report["dropped"]))
    assert contents[0] == contents[1] == contents[2]
    assert build(tmp_path / "other", seed=1, **options)["content"] != contents[0][0]


def test_more_test_puzzles_leave_the_training_split_as_it_is(tmp_path):
    """Results of two studies with the same training data can be compared."""
    for name, number in (("few", 5), ("many", 20)):
        build(tmp_path / name, family="maze", size=7, num_test=number)
    assert read(tmp_path / "few", "train") == read(tmp_path / "many", "train")


def test_too_few_puzzles(tmp_path):
    """There are 36 minimal 4x4 puzzles. The build must not run forever, and must leave nothing behind."""
    with pytest.raises(ValueError, match="after 3. of 50 boards"):
        build(tmp_path / "made", family="sudoku", size=4)
    assert list(tmp_path.iterdir()) == []


def write_csv(path: Path, rows: list[tuple[str, str]]) -> str:
    lines = [f"test,{question},{answer},{i}" for i, (question, answer) in enumerate(rows)]
    path.write_text("\n".join(["source,question,answer,rating", *lines, ""]))
    return str(path)


def as_text(row: dict) -> tuple[str, str]:
    puzzle, solution = row["text"].replace("\n\n", "/").replace("\n", "").split("/")
    return puzzle, solution


def test_csv(tmp_path):
    """A test puzzle that is a symmetric copy of a training puzzle must be found, also if it comes from another file."""
    build(tmp_path / "made", family="sudoku", size=6, num_train=40)
    rows = [as_text(row) for row in read(tmp_path / "made", "train")]
    rotated = [tuple(board.translate(str.maketrans("123456", "234561")) for board in row) for row in rows]
    train = write_csv(tmp_path / "train.csv", rows[:30])
    test = write_csv(tmp_path / "test.csv", rotated[25:])
    options = {"family": "sudoku", "train_csv": train, "test_csv": test, "num_few_blanks": 5}
    report = build(tmp_path / "read", num_train=30, num_validation=0, num_test=15, **options)
    assert report["rows"] == {"train": 30, "test": 10, "few_blanks": 5}
    assert report["dropped"] == {"equivalent to an earlier one": 5}
    assert report["facts"]["test"]["equivalent to a training board, dropped"] == 5
    assert any("10 puzzles instead of 15" in warning for warning in report["warnings"])
    found = read(tmp_path / "read", "train")
    assert sorted(map(as_text, found)) == sorted(rows[:30])
    assert {row["rating"] for row in found} == set(range(30))
    assert {row["source"] for row in found} == {"test"}
    with pytest.raises(ValueError, match="cannot be pushed: it was built from .*train.csv"):
        push_dataset(PushDatasetConfig(inputs=[str(tmp_path / "read")], repo_id="me/sudoku", dry_run=True))
    assert "Do not publish" in (tmp_path / "read" / "README.md").read_text()
    # Without a test file, the three splits come from the training file
    options = {"family": "sudoku", "train_csv": train, "num_few_blanks": 0}
    report = build(tmp_path / "one", num_train=20, num_validation=4, num_test=6, **options)
    assert report["rows"] == {"train": 20, "validation": 4, "test": 6}
    assert "few_blanks" not in (tmp_path / "one" / "README.md").read_text().partition("## Rebuild")[0]
    with pytest.raises(ValueError, match="the split test is empty"):
        build(tmp_path / "empty", num_train=30, num_validation=0, num_test=5, **options)


def test_equivalent_rows_of_a_csv_file_are_replaced(tmp_path):
    """A file with enough different puzzles must fill the splits, although some of the sampled rows are dropped."""
    build(tmp_path / "made", family="sudoku", size=6, num_train=60)
    rows = [as_text(row) for row in read(tmp_path / "made", "train")]
    rows += [tuple(board.translate(str.maketrans("123456", "234561")) for board in row) for row in rows[:15]]
    options = {"family": "sudoku", "train_csv": write_csv(tmp_path / "train.csv", rows), "num_few_blanks": 0}
    report = build(tmp_path / "read", num_train=40, num_validation=5, num_test=5, **options)
    assert report["rows"] == {"train": 40, "validation": 5, "test": 5} and report["warnings"] == []
    assert report["dropped"]["equivalent to an earlier one"] == report["drawn"] - 50 > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda puzzle, answer: ("." * 16, answer), "several solutions"),
        (lambda puzzle, answer: ("11" + "." * 14, answer), "row 1, column"),
        (lambda puzzle, answer: (puzzle, answer[::-1]), "but the puzzle has"),
    ],
)
def test_invalid_csv(tmp_path, change, message):
    build(tmp_path / "made", family="sudoku", size=4, clues=6, num_few_blanks=0)
    rows = [as_text(row) for row in read(tmp_path / "made", "train")]
    rows[3] = change(*rows[3])
    train = write_csv(tmp_path / "train.csv", rows)
    with pytest.raises(ValueError, match=message) as error:
        build(tmp_path / "read", family="sudoku", train_csv=train, num_few_blanks=0)
    assert f"{train}:5: " in str(error.value)
    assert not (tmp_path / "read").exists()


def test_csv_of_mazes(tmp_path):
    """A mirrored maze in the test file is the same maze. Mazes with several shortest paths are kept: their files say which one is right."""
    loop = ("#####" "#S  #" "# # #" "#  G#" "#####", "#####" "#Soo#" "# #o#" "#  G#" "#####")  # fmt: skip
    straight = ("#####" "#S G#" "#####" "#####" "#####", "#####" "#SoG#" "#####" "#####" "#####")  # fmt: skip
    mirrored = tuple(board[::-1] for board in straight)
    train = write_csv(tmp_path / "train.csv", [loop, straight])
    test = write_csv(tmp_path / "test.csv", [mirrored, ("#####" "#S  #" "###G#" "#####" "#####", "#####" "#Soo#" "###G#" "#####" "#####")])  # fmt: skip
    options = {"family": "maze", "train_csv": train, "num_train": 2, "num_validation": 0, "num_test": 2}
    report = build(tmp_path / "read", test_csv=test, **options)
    assert report["rows"] == {"train": 2, "test": 1}
    assert report["facts"]["test"]["equivalent to a training board, dropped"] == 1
    assert sorted(map(as_text, read(tmp_path / "read", "train"))) == sorted([loop, straight])
    larger = write_csv(tmp_path / "larger.csv", [("#" * 7 + "#S   G#" + "#" * 35, "#" * 7 + "#SoooG#" + "#" * 35)])
    with pytest.raises(ValueError, match="boards of 7 rows, but .* 5 rows"):
        build(tmp_path / "sizes", test_csv=larger, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "chess"}, "`family` is 'chess'"),
        ({"family": "sudoku", "size": 5}, "must be 4, 6 or 9"),
        ({"family": "sudoku", "size": 4, "clues": 16}, "below the number of cells, 16"),
        ({"family": "sudoku", "loops": 0.1}, "`loops` has no effect"),
        ({"family": "maze", "size": 8}, "must be odd"),
        ({"family": "maze", "clues": 12}, "`clues` has no effect"),
        ({"family": "maze", "num_few_blanks": 12}, "`num_few_blanks` has no effect"),
        ({"family": "sudoku", "test_csv": "a.csv"}, "without `train_csv`"),
        ({"family": "sudoku", "test_csv": "a.csv", "train_csv": "./a.csv"}, "are the same file"),
        ({"family": "sudoku", "test_csv": "a.csv", "train_csv": "b.csv", "num_test": 0}, "`num_test` is 0"),
        ({"family": "sudoku", "train_csv": "a.csv", "clues": 3}, "`clues` is for puzzles that are made"),
        ({"family": "sudoku", "num_train": 0}, "`num_train` is 0"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        BuildGridConfig(output_dir="x", **options)


def test_overwrite(tmp_path):
    """A second build must replace all splits of the first one, but no file that it has not written."""
    folder = tmp_path / "made"
    build(folder, family="sudoku", size=4, clues=6)
    with pytest.raises(FileExistsError, match="already exists"):
        build(folder, family="maze", size=7)
    build(folder, family="maze", size=7, overwrite=True)
    report = json.loads((folder / "build_report.json").read_text())
    assert sorted(path.name.split("-")[0] for path in (folder / "data").iterdir()) == ["test", "train", "validation"]
    assert (
        report["command"]
        == f"trl-hrm build-grid maze --output_dir {folder} --size 7 --num_train 30 --num_validation 8 --num_test 12 --seed 42"
    )
    (folder / "data" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        build(folder, family="maze", size=7, overwrite=True)


def test_without_progress_bars(tmp_path, monkeypatch):
    """A disabled bar does not count. The splits must not depend on it."""
    contents = [build(tmp_path / "shown", family="maze", size=7)["content"]]
    monkeypatch.setattr("trl_hrm.reasoning.data.build.tqdm", partial(tqdm, disable=True))
    contents.append(build(tmp_path / "hidden", family="maze", size=7)["content"])
    assert contents[0] == contents[1]
