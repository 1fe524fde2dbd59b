"""Data, measures and report of the study of real labels. Its trainings use the trainer, which has its own tests."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from sklearn.metrics import roc_auc_score

from trl_hrm import StepFormat, StepScorer, StepTree
from trl_hrm.io import read_json
from trl_hrm.tiny_model import make_tiny_model


sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import evidence  # noqa: E402
import real_labels  # noqa: E402
import real_labels_jobs  # noqa: E402
from real_labels import ARMS, DIFFERENCES, Aurocs  # noqa: E402
from real_labels_jobs import PROFILES, Job  # noqa: E402


ROW = {
    "prompt": "1+1+1?",
    "problem": "1+1+1?",
    "completions": ["1+1=3.", "1+1=2.", "1+1=4.", "2+1=3.", "2+1=5."],
    "labels": [0.0, 1.0, 0.0, None, 0.0],
    "parents": [-1, -1, -1, 1, 1],
}


def test_jobs_have_different_names_and_the_main_ones_come_first():
    jobs = real_labels_jobs.make_jobs(3)
    assert len({job.name for job in jobs}) == len(jobs) == 37
    assert [job.name for job in jobs[:3]] == ["prm-full-0", "hrm-full-0", "orm-full-0"]
    assert {arm.title for arm in map(real_labels.arm_of, jobs)} == {arm.title for arm in ARMS if arm.spans == 1}
    titles = [arm.title for arm in ARMS]
    assert len(set(titles)) == len(titles)
    assert {title for pair in DIFFERENCES for title in pair} <= set(titles)


def test_steps_are_added_after_the_wrong_steps_that_they_replaced():
    row = real_labels_jobs.with_corrections(ROW, {("1+1+1?", "1+1=2."), ("other", "2+1=3.")})
    assert row["completions"][5:] == ["1+1=2.", "1+1=2.", "1+1=4."]
    assert row["parents"][5:] == [0, 2, 0]
    assert row["labels"][5:] == [1.0, 1.0, 0.0]
    assert row["is_added"] == [False] * 5 + [True] * 3
    assert ROW["labels"] == [0.0, 1.0, 0.0, None, 0.0]  # unchanged
    _, labels, _ = real_labels_jobs.flat([row], real_labels_jobs.every_step)
    assert labels.tolist() == [0.0, 1.0, 0.0, 0.0]
    _, labels, _ = real_labels_jobs.flat([row], real_labels_jobs.after_an_error)
    assert labels.tolist() == [1.0, 1.0, 0.0]


def test_outcomes_of_paths():
    tree = StepTree.from_row({name: ROW[name] for name in ("prompt", "completions", "labels", "parents")})
    rows = list(real_labels_jobs.outcome_rows(tree))
    # the path to "2+1=3." has a step without a label, so its outcome is unknown
    assert [(row["completions"], row["labels"]) for row in rows] == [
        (["1+1=3."], [0.0]),
        (["1+1=4."], [0.0]),
        (["1+1=2.", "2+1=5."], [None, 0.0]),
    ]
    right = StepTree("p", ["a", "b"], [1.0, 1.0], [-1, 0])
    assert [row["labels"] for row in real_labels_jobs.outcome_rows(right)] == [[None, 1.0]]


@pytest.mark.parametrize("spans", [1, 2, 3])
def test_merged_steps_have_the_scores_of_spans(tmp_path, spans):
    row = ROW | {
        "completions": [*ROW["completions"], "So 3."],
        "labels": [*ROW["labels"], 1.0],
        "parents": [-1, -1, -1, 1, 1, 3],
    }
    make_tiny_model(row["completions"], tmp_path)
    StepFormat().save(tmp_path)
    scorer = StepScorer.from_pretrained(str(tmp_path))
    tree, owners = real_labels_jobs.with_merged_steps(row, 3)
    [values] = scorer.score_trees([tree])
    given = StepTree(row["prompt"], row["completions"], [None] * 6, row["parents"])
    [expected] = scorer.score_trees([given], spans=list(range(1, spans + 1)))
    assert [max(values[i] for i in own[:spans]) for own in owners] == pytest.approx(expected, abs=1e-6)


def test_auroc_and_differences():
    generator = np.random.default_rng(0)
    tests = [{"problem": str(i), "labels": [float(i % 2), 1.0, 0.0], "parents": [-1, 0, 1]} for i in range(20)]
    scores = {
        "good": {
            seed: [[0.9 * label + 0.05 * generator.random() for label in row["labels"]] for row in tests]
            for seed in (0, 1, 2)
        },
        "random": {seed: [[generator.random() for _ in range(3)] for _ in tests] for seed in (0, 1)},
    }
    found = Aurocs(tests, scores, real_labels_jobs.every_step, seed=0)
    labels = [label for row in tests for label in row["labels"]]
    for seed in (0, 1):
        expected = roc_auc_score(labels, [score for row in scores["random"][seed] for score in row])
        assert found.values["random", seed] == pytest.approx(expected)
    assert found.mean("good") == "1.000 ± 0.000 [1.00, 1.00]"
    text, is_settled = found.difference("good", "random")
    mean = np.mean([1 - found.values["random", seed] for seed in (0, 1)])
    assert text.startswith(f"+{mean:.3f} [")
    low, high = real_labels.t_interval([1 - found.values["random", seed] for seed in (0, 1)])
    assert f"({low:+.2f}, {high:+.2f})".replace("-", "−") in text
    assert is_settled == (low > 0)
    assert found.difference("good", "missing") is None
    assert real_labels.t_interval([0.3]) == (-np.inf, np.inf)


def test_an_overlap_of_training_and_test_problems_is_an_error(tmp_path, monkeypatch):
    tests = {"gsm8k": [{"prompt": "1 +  1?", "problem": "1 + 1?"}]}
    monkeypatch.setattr(
        real_labels_jobs, "load", lambda folder: [{"prompt": "2?", "original_prompt": "1 + 1?"}, {"prompt": "3?"}]
    )
    with pytest.raises(RuntimeError, match="1 test problems are in the training mixture"):
        real_labels_jobs.check_overlap(tmp_path, tests)
    monkeypatch.setattr(real_labels_jobs, "load", lambda folder: [{"prompt": "2?", "original_prompt": None}])
    assert real_labels_jobs.check_overlap(tmp_path, tests) == {"trained": 1, "tested": 1, "both": 0}


def test_report_has_what_is_finished_and_says_what_is_missing(tmp_path):
    generator = np.random.default_rng(0)
    rows = [
        ROW | {"problem": str(i), "subset": "all", "labels": [1.0, 1.0, 0.0, None, None], "parents": [-1, 0, 1, 2, 3]}
        for i in range(8)
    ]
    trees = [real_labels_jobs.with_corrections(ROW | {"problem": str(i)}, {("1+1+1?", "1+1=2.")}) for i in range(4)]
    right = [row | {"labels": [1.0, 0.0, 1.0, 0.0, None]} for row in rows]
    tests = {"prm800k": trees, "gsm8k": rows, "prmbench": right, "bbm": rows}
    (tmp_path / "tests.json").write_text(json.dumps(tests))
    counts = {"problems": 8, "steps": 24, "wrong": 8}
    source = {"a/prm800k.jsonl": {"labelled_steps": {"train": 1234}}}
    mixture = {"sources": source, "dropped": {"excluded": 5}}
    overlap = {"trained": 7, "tested": 6, "both": 0}
    counts = {
        "mixture": mixture,
        "different_steps": {"PRM800K": 1111},
        "tests": dict.fromkeys(tests, counts),
        "overlap": overlap,
    }
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    results = tmp_path / "results"
    results.mkdir()
    settings = {"profile": asdict(PROFILES["quick"]), "versions": {"torch": "2"}, "bf16": True}
    (results / "settings.json").write_text(json.dumps(settings))

    def scores(most):
        return {
            name: [
                [[generator.random() for _ in own] for own in real_labels_jobs.with_merged_steps(row, most)[1]]
                for row in test
            ]
            for name, test in tests.items()
        }

    for name in real_labels.BASELINES:
        given = {"scores": scores(1)}
        real_labels_jobs.write_result(results / f"{name}.json", given)
        assert read_json(results / f"{name}.json") == given
    result = {"tokens_per_row": 100.0, "labels_per_row": 10.0}
    finished = {
        Job("prm", "full", 0): result | {"scores": scores(1), "date": "2026-01-02"},
        Job("hrm", "full", 0): result | {"scores": scores(2), "date": "2026-01-01"},
    }
    args = SimpleNamespace(seed=1, docs=None, output_dir=str(tmp_path), results=None)
    text = real_labels.report(args, tmp_path, finished, 33)
    assert "\n\n2026-01-01 to 2026-01-02, one core for each training, " in text
    assert "2 of the 33 trainings of the study are finished" in text
    missing = "Missing: ORM; PRM, a quarter of the tokens; PRM, 3 times the tokens; HRM 3, single steps; PRM, LoRA; HRM, single steps, LoRA;"
    assert missing in text
    assert "1,234 labelled steps of PRM800K (1,111 different ones)" in text
    assert "5 rows were excluded" in text
    assert "PRM 200 tokens with 20 labels" in text
    assert "| HRM, spans 1 and 2 − PRM |" in text
    assert "ORM |" not in text
    assert (tmp_path / "real-labels.png").exists()


def test_results_of_another_study_are_refused(tmp_path):
    model, folder, results = (tmp_path / name for name in ("model", "out", "results"))
    make_tiny_model(["a"], model)
    folder.mkdir()
    (folder / "tests.json").write_text("{}")
    Dataset.from_list([{"prompt": "1+1?", "completions": ["2"], "labels": [1.0], "source": "here"}]).to_parquet(
        folder / "mixture" / "train.parquet"
    )
    args = SimpleNamespace(model=str(model), seed=1, only_report=False)

    def check(profile="quick"):
        real_labels.check_settings(args, folder, results, PROFILES[profile])

    check()
    check()
    written = (results / "settings.json").read_text()
    with pytest.raises(ValueError, match="profile.rows was 2 and is 80"):
        check("short")
    (folder / "tests.json").write_text('{"gsm8k": []}')
    with pytest.raises(
        ValueError, match="tests was .* Use the same settings, or choose another folder with --results"
    ):
        check()
    (folder / "tests.json").write_text("{}")
    Dataset.from_list([{"prompt": "1+2?", "completions": ["2"], "labels": [1.0], "source": "here"}]).to_parquet(
        folder / "mixture" / "train.parquet"
    )
    with pytest.raises(ValueError, match="mixture was "):
        check()
    assert (results / "settings.json").read_text() == written
    assert str(tmp_path) not in written


def test_the_section_is_kept():
    """`benchmarks/evidence.py` writes the page again, and deletes the pictures of the demo."""
    page = (Path(real_labels.__file__).parents[1] / "docs" / "evidence.md").read_text(encoding="utf-8")
    [title] = [one for one in evidence.KEPT if real_labels.HEADING in evidence.find_section(page, f"## {one}")]
    assert title == "Real labels and a real model"
    assert not real_labels.PICTURE.startswith(evidence.PICTURES)
