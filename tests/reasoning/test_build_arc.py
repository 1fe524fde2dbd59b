"""`build-grid arc`: from JSON files to a dataset, and from the dataset to a score."""

from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from trl_hrm.reasoning import ARC_VOCAB, HrmGridConfig, HRMReasoningConfig, HRMReasoningTrainer
from trl_hrm.reasoning.arc_score import ArcVotes, evaluate_arc, score_arc
from trl_hrm.reasoning.data.arc import arc_rows, plan_arc
from trl_hrm.reasoning.evaluate import fixed, predict
from trl_hrm.scripts.build_grid import BuildGridConfig, build_grid


FIXTURE = str(Path(__file__).parents[1] / "fixtures" / "arc")


def build(folder, **options):
    options = {"family": "arc", "sources": [FIXTURE], "num_augmentations": 5, "num_proc": 1} | options
    return build_grid(BuildGridConfig(output_dir=str(folder), **options))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder and report of a dataset with five copies of each task."""
    folder = tmp_path_factory.mktemp("arc") / "data"
    return folder, build(folder)


def rows_of(folder, tmp_path):
    return load_dataset(str(folder), cache_dir=str(tmp_path))


def test_rows(built, tmp_path):
    """The dataset has exactly the rows of [`arc_rows`], in order."""
    folder, report = built
    data = rows_of(folder, tmp_path)
    assert report["rows"] == {"train": 8 * 6, "test": 3 * 6} == {split: len(rows) for split, rows in data.items()}
    tasks = plan_arc([FIXTURE]).tasks
    for split, rows in data.items():
        expected = [row for task in tasks for row in arc_rows(task, split, num_augmentations=5, seed=42)]
        assert rows["puzzle_id"][:] == [row["puzzle_id"] for row in expected]
        for name in ("puzzle", "solution"):
            assert rows[name][:] == [row[name].tolist() for row in expected]
        assert rows["text"][:] == [row["text"] for row in expected]


def test_report_and_card(built):
    """The dropped pairs are in the report, on the terminal and in the card."""
    folder, report = built
    assert report["drawn"] == 13
    assert report["dropped"] == {"equal to a held-out pair": 1, "copy of a held-out pair of another task": 1}
    assert report["facts"]["train"] == {"tasks": 4, "pairs": 8, "boards": 48, "puzzle ids": 24}
    assert report["facts"]["test"] == {"tasks": 2, "pairs": 3, "boards": 18, "puzzle ids": 12}
    assert "2 pairs were dropped because they contain the solution of a held-out pair" in str(report)
    card = (folder / "README.md").read_text()
    assert "2 pairs were dropped" in card and "test pairs are the test split" in card
    assert "--sources" in card and "licence is not known" in card
    assert report["not_for_publication"]


def test_number_of_processes_and_seed(built, tmp_path):
    """The same seed gives the same files, with any number of processes."""
    folder, _ = built
    build(tmp_path / "two", num_proc=2)
    build(tmp_path / "other", seed=1)
    same, other = [
        [file.read_bytes() for file in sorted((tmp_path / name / "data").iterdir())] for name in ("two", "other")
    ]
    expected = [file.read_bytes() for file in sorted((folder / "data").iterdir())]
    assert same == expected != other


def test_from_the_dataset_to_a_score(built, tmp_path):
    """Right answers to all rows of the test split solve all tasks."""
    rows = rows_of(built[0], tmp_path)["test"]
    votes = ArcVotes()
    votes.add(rows, np.array(rows["solution"][:]), np.zeros(len(rows)))
    score = score_arc(votes.ranked(), rows, attempts=1)
    assert (score.tasks_solved, score.num_tasks, score.num_test_inputs) == (1, 2, 3)


def test_training(built, tmp_path):
    """A model gets an embedding for each copy, trains on moved grids, and answers the test rows."""
    data = rows_of(built[0], tmp_path)
    config = HrmGridConfig(
        vocab=ARC_VOCAB.to_dict(), height=30, width=30, hidden_size=32, num_attention_heads=2, intermediate_size=32,
        H_layers=1, L_layers=1, halt_max_steps=2,
    )  # fmt: skip
    args = HRMReasoningConfig(
        str(tmp_path / "model"),
        max_steps=3,
        per_device_train_batch_size=4,
        warmup_steps=1,
        augment=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = HRMReasoningTrainer(config, args, train_dataset=data["train"], eval_dataset=data["test"])
    before = trainer.model.puzzle_emb.weight.clone()
    trainer.train()
    changed = (trainer.model.puzzle_emb.weight != before).any(1)
    assert len(changed) == 24 + 1 and 4 <= changed.sum() <= 12 and not changed[0]
    assert 0 <= trainer.evaluate()["eval_exact_accuracy"] <= 1
    found = evaluate_arc(trainer.model, data["test"])
    predictions = predict(trainer.model, data["test"], puzzle_index=trainer.model.puzzle_index)
    votes = ArcVotes()
    votes.add(data["test"], fixed(predictions)[0], predictions.q_halt[-1])
    assert found == score_arc(votes.ranked(), data["test"]) and found.num_test_inputs == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 9}, "`size` has no effect on the family 'arc'"),
        ({"num_train": 10}, "`num_train` has no effect on the family 'arc'"),
        ({"num_validation": 10}, "`num_validation` has no effect on the family 'arc'"),
        ({"family": "maze"}, "`sources` has no effect on the family 'maze'"),
        ({"num_augmentations": -1}, "`num_augmentations` is -1"),
    ],
)
def test_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "data", **options)
    assert not (tmp_path / "data").exists()


def test_damaged_tasks_leave_nothing(tmp_path):
    (tmp_path / "arc" / "evaluation").mkdir(parents=True)
    (tmp_path / "arc" / "evaluation" / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="bad.json: `train` is None"):
        build(tmp_path / "data", sources=[str(tmp_path / "arc")])
    assert [path.name for path in tmp_path.iterdir()] == ["arc"]
