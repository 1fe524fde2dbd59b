"""PRMBench: the score computed by hand, its averages, exact counts of the real rows, and errors."""

import json
import math
from collections import Counter

import numpy as np
import pytest

from trl_hrm.evaluation.benchmarks.measures import format_results, measure
from trl_hrm.evaluation.benchmarks.prm_bench import CATEGORIES, CLASSES, PRM_BENCH, prm_score, summarize, tally
from trl_hrm.evaluation.benchmarks.run import score_solutions
from trl_hrm.evaluation.benchmarks.suite import Solution, read_suites
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..fakes import write_rows
from .benchmark_rows import SayingScorer, knows, prm_row


def read(path, **options):
    return read_suites([PRM_BENCH], [str(path)], **options)["prmbench"]


def solution(labels: list[int], kind: str = "confidence") -> Solution:
    return Solution("by hand", kind, "1", "p", ["x"] * len(labels), labels, "p")


def test_score_by_hand():
    """
    Four of six right steps are called right, and two of three wrong steps are called wrong: TP 4, FN 2, TN 2, FP 1.
    F1 = 8 / (8 + 1 + 2) = 8/11, F1_neg = 4 / (4 + 1 + 2) = 4/7, the score (8/11 + 4/7) / 2 = 50/77. Accuracy is 6/9.
    """
    labels = [1, 1, 1, 0, 1, 0, 1, 1, 0]
    scores = [0.9, 0.5, 0.2, 0.1, 0.8, 0.4, 0.49, 0.7, 0.6]
    sums = tally(solution(labels), scores, 0.5)
    assert sums == (4, 1, 2, 2)
    metrics = {name: float(value) for name, value in prm_score(sums).items()}
    assert metrics == pytest.approx(
        {
            "prm_score": 50 / 77,
            "f1": 8 / 11,
            "negative_f1": 4 / 7,
            "accuracy": 6 / 9,
            "num_right_steps": 6,
            "num_wrong_steps": 3,
        }
    )
    assert prm_score(sums, without_errors=True)["prm_score"] == pytest.approx(8 / 11)


@pytest.mark.parametrize("seed", range(3))
def test_against_scikit_learn(seed):
    """Also with many scores exactly at the threshold."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 2, 100), np.round(rng.random(100), 1)
    metrics = prm_score(tally(solution(labels.tolist()), scores.tolist(), 0.5))
    f1 = [sklearn_metrics.f1_score(labels, scores >= 0.5, pos_label=kind) for kind in (1, 0)]
    assert (metrics["f1"], metrics["negative_f1"]) == pytest.approx(tuple(f1))
    assert metrics["prm_score"] == pytest.approx(sum(f1) / 2)


def test_a_model_that_calls_everything_right():
    """Its F1 looks good because wrong steps are rare. The other half of the score exposes it."""
    metrics = prm_score((9, 1, 0, 0))
    assert metrics["f1"] == pytest.approx(18 / 19) and metrics["negative_f1"] == 0
    assert math.isnan(prm_score((5, 0, 0, 0))["negative_f1"])  # nothing is wrong, and nothing is called wrong


def test_averages_by_hand():
    """
    Categories are means of classes, whatever their numbers of steps. Overall is one score over all steps of the nine classes.
    """
    sums = {name: np.array([1, 0, 1, 0]) for name in CLASSES}  # score 1
    sums["circular"] = np.array([30, 30, 0, 0])  # F1 2/3, F1_neg 0: 1/3
    sums["multi_solutions"] = np.array([1, 0, 0, 1])  # F1 2/3
    sums["correct"] = np.array([0, 0, 0, 50])  # F1 0, and excluded from every average
    found = summarize(sums)
    assert {name: float(values["prm_score"]) for name, values in found["averages"].items()} == pytest.approx(
        {
            "simplicity": (1 + 1 / 3) / 2,
            "soundness": 1,
            "sensitivity": (1 + 1 + 2 / 3) / 3,
            # TP 7 + 30 + 1, FP 30, TN 7, FN 1
            "overall": (76 / 107 + 14 / 45) / 2,
        }
    )
    assert found["subsets"]["multi_solutions"]["prm_score"] == pytest.approx(2 / 3)
    assert found["subsets"]["correct"]["prm_score"] == 0
    assert np.isnan(found["subsets"]["multi_solutions"]["negative_f1"])


def test_a_category_without_one_of_its_classes_has_no_average():
    """The mean of fewer classes would be a different number with the same name."""
    found = summarize({name: np.array([1, 0, 1, 0]) for name in CLASSES if name != "confidence"})
    assert list(found["averages"]) == ["simplicity", "sensitivity", "overall"]


def test_a_validation_part_with_original_processes_only():
    """If the modified solutions are too long, hours of scoring must not end in an error of numpy."""
    solutions, scores = [], []
    for i in range(30):
        for kind, labels, values in (("redundency", [1, 0], [0.9, 0.1]), ("correct", [1, 1], [0.9, 0.8])):
            solutions.append(Solution("by hand", kind, str(i), f"{kind} {i}", ["x", "y"], labels, f"p{i}"))
            scores.append(None if kind == "redundency" and i != 29 else values)
    results = measure(PRM_BENCH, solutions, scores)
    assert results["averages"]["overall"]["prm_score"] == 1
    assert results["tuned"]["threshold"] is None and results["tuned"]["num_validation"] > 0


def test_rows(tmp_path):
    """Steps are counted from 1, the modified question is the prompt, and one class also gives the original solution."""
    rows = [prm_row(1, "redundency", [2, 9]), prm_row(1, "confidence", [1, 3])]
    found = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert [(one.subset, one.id, one.problem, one.labels) for one in found.solutions] == [
        ("redundency", "prm_test_p1_1", "What is 1 + 1, please?", [1, 0, 1]),
        ("correct", "prm_test_p1_1", "What is 1 + 1?", [1, 1, 1]),
        ("confidence", "prm_test_p1_1", "What is 1 + 1, please?", [0, 1, 0]),
    ]
    assert {one.origin for one in found.solutions} == {"What is 1 + 1?"}
    assert found.notes == {"error_steps_past_the_end": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classification": "other"}, "`classification` is 'other', expected one of redundency, circular"),
        ({"error_steps": [0]}, r"`error_steps` is \[0\], expected a list of numbers from 1"),
        ({"error_steps": "2"}, "`error_steps` is '2'"),
        ({"error_steps": ["2"]}, r"`error_steps` is \['2'\]"),
        ({"modified_process": ["a", ""]}, "step 1 of 'prm_test_p1_2' is ''"),
    ],
)
def test_bad_rows(tmp_path, change, message):
    """Bad rows are skipped, or kept if only a step is blank. With `strict` they are errors."""
    rows = [prm_row(1, "confidence", [1]), prm_row(2, "confidence", [1]) | change]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        read(path, strict=True)
    found = read(path)
    is_kept = "modified_process" in change
    assert len(found.solutions) == 1 + is_kept
    assert list((found.faults.kept if is_kept else found.faults.left_out).values()) == [[f"{path}:2"]]


def test_a_planted_model(tmp_path):
    """A model that knows the wrong steps scores 1 in every class, and a model that says the opposite 0."""
    rows = [prm_row(i, kind, [] if kind == "multi_solutions" else [2]) for kind in CLASSES for i in range(3)]
    solutions = read(write_rows(tmp_path / "rows.jsonl", rows)).solutions
    results = measure(PRM_BENCH, solutions, score_solutions(SayingScorer(knows), solutions, ScoringConfig()))
    assert {part["prm_score"] for kind in ("subsets", "averages") for part in results[kind].values()} == {1.0}
    assert list(results["averages"]) == [*CATEGORIES, "overall"]
    scorer = SayingScorer(lambda step: 1 - knows(step))
    opposite = measure(PRM_BENCH, solutions, score_solutions(scorer, solutions, ScoringConfig()))
    assert opposite["averages"]["overall"]["prm_score"] == 0
    json.dumps(results, allow_nan=False)
    assert format_results("prmbench", results).splitlines()[0].split()[:3] == ["prmbench", "prm_score", "95"]


@pytest.mark.parametrize("is_real", [False, True])
def test_overall_score_against_a_plain_count(tmp_path, request, is_real):
    """From the file to the overall score, compared with ten independent lines."""
    rng = np.random.default_rng(0)
    if is_real:
        path = request.getfixturevalue("shared_data") / "prmbench" / "subset400.jsonl"
    else:
        rows = []
        for i in range(6):
            for kind in CLASSES:
                wrong = [] if kind == "multi_solutions" else sorted({2, int(rng.integers(1, 5))})
                rows.append(prm_row(i, kind, wrong, num_steps=4))
        path = tmp_path / "rows.jsonl"
        write_rows(path, rows)
    reading = read(path)
    scores = [rng.random(len(one.steps)).tolist() for one in reading.solutions]
    results = measure(PRM_BENCH, reading.solutions, scores, threshold=0.3)
    of_row = {(one.subset, one.id): values for one, values in zip(reading.solutions, scores, strict=True)}
    tp = fp = tn = fn = 0
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        for number, score in enumerate(of_row[row["classification"], row["idx"]], start=1):
            wrong, called_wrong = number in row["error_steps"], score < 0.3
            tp += not wrong and not called_wrong
            fp += wrong and not called_wrong
            tn += wrong and called_wrong
            fn += not wrong and called_wrong
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    negative_precision, negative_recall = tn / (tn + fn), tn / (tn + fp)
    f1 = 2 * precision * recall / (precision + recall)
    negative_f1 = 2 * negative_precision * negative_recall / (negative_precision + negative_recall)
    assert results["averages"]["overall"]["prm_score"] == pytest.approx(0.5 * f1 + 0.5 * negative_f1)
    assert results["averages"]["overall"]["low"] < results["averages"]["overall"]["prm_score"]


@pytest.fixture(scope="module")
def reading(shared_data):
    return read(shared_data / "prmbench" / "subset400.jsonl")


class TestRealRows:
    def test_exact_counts(self, reading):
        """A reader that silently drops rows would measure a different benchmark."""
        counts = Counter(one.subset for one in reading.solutions)
        assert counts == dict.fromkeys(CLASSES, 48) | {"multi_solutions": 10, "correct": 48}
        judged = [one for one in reading.solutions if one.subset != "correct"]
        assert sum(len(one.labels) for one in judged) == 5738
        # the rows hold 880 numbers, and no row repeats one
        assert reading.notes == {"error_steps_past_the_end": 12}
        assert sum(one.labels.count(0) for one in judged) == 880 - 12

    def test_first_row(self, reading):
        """Steps 5 and 6 say p = 0.58 where p is 0.29. Counted from 0, the nonexistent seventh step would be wrong."""
        first = reading.solutions[0]
        assert (first.subset, first.labels) == ("confidence", [1, 1, 1, 1, 0, 0])
        assert "$p=0.58$" in first.steps[4] and "58 cents" in first.steps[5]
