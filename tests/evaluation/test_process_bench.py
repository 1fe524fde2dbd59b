"""ProcessBench: which step is found, F1 by hand, both averages, the tuned threshold, and errors."""

import gzip
import json
import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from scipy.stats import beta

from trl_hrm.data.problems import problem_split
from trl_hrm.evaluation.benchmarks.measures import format_results, measure
from trl_hrm.evaluation.benchmarks.prm_bench import PRM_BENCH
from trl_hrm.evaluation.benchmarks.process_bench import (
    PROCESS_BENCH,
    predict_first_error,
    process_bench_f1,
    summarize,
    tally_first_error,
)
from trl_hrm.evaluation.benchmarks.run import score_solutions
from trl_hrm.evaluation.benchmarks.suite import Solution, read_suites
from trl_hrm.intervals import bootstrap_sums
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..fakes import write_rows
from .benchmark_rows import SayingScorer, knows, process_row


def read(*sources, **options):
    return read_suites([PROCESS_BENCH], list(map(str, sources)), **options)["processbench"]


def solution(number: int, label: int, subset: str = "gsm8k", num_steps: int = 3) -> Solution:
    labels = [1] * num_steps if label < 0 else [1] * label + [0] + [None] * (num_steps - label - 1)
    problem = f"{subset} {number}"
    return Solution("by hand", subset, f"{subset}-{number}", problem, ["x"] * num_steps, labels, problem)


@pytest.mark.parametrize(
    ("scores", "threshold", "expected"),
    [
        ([0.9, 0.4, 0.1], 0.5, 1),  # the first step, not the lowest
        ([0.9, 0.5, 0.49], 0.5, 2),  # a score equal to the threshold is right
        ([0.9, 0.6], 0.5, -1),
        ([0.0], 0.0, -1),
        ([1.0, 1.0], 1.0, -1),
        ([0.99, 1.0], 1.0, 0),
    ],
)
def test_the_first_step_below_the_threshold(scores, threshold, expected):
    """Choosing the lowest step, or using `<=`, would change F1 by points and look just as plausible."""
    assert predict_first_error(scores, threshold) == expected


def test_f1_by_hand():
    """
    Three of five rows with an error are found, and one of four rows without an error: accuracies 3/5 and 1/4, and
    F1 = 2 · (3/5) · (1/4) / (3/5 + 1/4) = (3/10) / (17/20) = 6/17. The usual F1, from precision and recall of rows with an
    error, would be a different number.
    """
    pairs = [(0, 0), (2, 2), (1, 1), (0, 1), (-1, 1), (-1, -1), (0, -1), (2, -1), (1, -1)]
    metrics = process_bench_f1(np.sum([tally_first_error(*pair) for pair in pairs], axis=0))
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {
            "f1": 6 / 17,
            "error_accuracy": 3 / 5,
            "correct_accuracy": 1 / 4,
            "accuracy": 4 / 9,
            "num_with_error": 5,
            "num_without": 4,
        }
    )


@pytest.mark.parametrize(
    ("sums", "f1"),
    [
        ((0, 5, 4, 4), 0.0),  # a model that calls everything right
        ((0, 5, 0, 4), 0.0),  # 0/0 in the formula
        ((5, 5, 0, 0), math.nan),
        ((0, 0, 4, 4), math.nan),
        ((5, 5, 4, 4), 1.0),
    ],
)
def test_f1_at_the_edges(sums, f1):
    """Rows of only one kind have no F1. Using 0 or the accuracy instead would distort the average."""
    assert process_bench_f1(sums)["f1"] == pytest.approx(f1, nan_ok=True)


def test_averages_both_ways_by_hand():
    """F1 is 1 on two rows, 0 on six and undefined on three: (1 + 0) / 2, and (2 · 1 + 6 · 0) / 8."""
    sums = {"gsm8k": np.array([1, 1, 1, 1]), "math": np.array([0, 3, 3, 3]), "omnimath": np.array([2, 3, 0, 0])}
    averages = summarize(sums)["averages"]
    assert averages["unweighted"]["f1"] == pytest.approx(0.5)
    assert averages["weighted by rows"]["f1"] == pytest.approx(0.25)


def test_published_averages():
    """HF's 1.5B PRM was published with four F1 and their row-weighted mean, 40.38. The paper's average is 39.81."""
    f1 = {"gsm8k": 36.56, "math": 49.61, "olympiadbench": 36.07, "omnimath": 37.00}
    rows = {"gsm8k": 400, "math": 1000, "olympiadbench": 1000, "omnimath": 1000}
    # F1 is x if both accuracies are x
    sums = {name: np.array([f1[name] / 100 * rows[name] / 2, rows[name] / 2] * 2) for name in f1}
    averages = summarize(sums)["averages"]
    assert 100 * averages["unweighted"]["f1"] == pytest.approx(39.81)
    assert 100 * averages["weighted by rows"]["f1"] == pytest.approx(40.38, abs=0.01)


def test_subsets_by_file_column_and_split(tmp_path):
    """The published files are named after the subsets. A single file with all subsets must not become one subset."""
    rows = {
        "gsm8k": [process_row(1, 0)],
        "math": [process_row(1, -1, subset="math"), process_row(2, 2, subset="math")],
    }
    files = [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in rows.items()]
    by_file = [(one.subset, one.id, one.labels) for one in read(*files).solutions]
    assert by_file == [
        ("gsm8k", "gsm8k-1", [0, None, None]),
        ("math", "math-1", [1, 1, 1]),
        ("math", "math-2", [1, 1, 0]),
    ]
    together = [row | {"subset": name} for name, part in rows.items() for row in part]
    (tmp_path / "array.json").write_text("\n " + json.dumps(together, indent=1))
    found = read(tmp_path / "array.json").solutions
    assert [(one.subset, one.id, one.labels) for one in found] == by_file
    assert found[1].where == f"{tmp_path / 'array.json'}, row 1"
    (tmp_path / "marked.json").write_bytes(
        b"\xef\xbb\xbf" + json.dumps(together).encode()
    )  # some editors write this mark
    (tmp_path / "folder").mkdir()
    for file in files:  # which `load_dataset` reads as one split
        shutil.copy(file, tmp_path / "folder")
    (tmp_path / "folder" / "LICENSE").write_text("Apache 2.0")
    assert [(one.subset, one.id, one.labels) for one in read(tmp_path / "folder").solutions] == by_file
    (tmp_path / "splits").mkdir()
    shutil.copy(files[0], tmp_path / "splits" / "test.jsonl")
    assert [one.subset for one in read(tmp_path / "splits").solutions] == ["test"]
    assert [one.labels for one in read(tmp_path / "marked.json").solutions] == [labels for *_, labels in by_file]
    splits = DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})
    for name, dataset in splits.items():
        dataset.to_parquet(tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    card = "".join(f"  - split: {name}\n    path: {name}-*\n" for name in splits)
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{card}---\n")
    found = read(tmp_path / "hub").solutions
    assert [(one.subset, one.id, one.labels) for one in found] == by_file
    assert found[1].where == f"{tmp_path / 'hub'}, split math: dataset row 0"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 3}, "`label` is 3, expected the index of the first wrong step of 3 steps, or -1"),
        ({"label": -2}, "`label` is -2"),
        ({"label": None}, "`label` is None"),
        ({"label": True}, "`label` is True"),
        ({"steps": []}, r"`steps` is \[\], expected a list of steps"),
        ({"steps": ["a", " "]}, r"`steps\[1\]` is ' ', expected a non-empty string"),
        ({"problem": ""}, "`problem` is ''"),
        ({"id": "gsm8k-1"}, "the id 'gsm8k-1' of rows already occurs at .*rows.jsonl:1"),
    ],
)
def test_bad_rows_with_strict(tmp_path, change, message):
    """A label past the end can never be found, so it would lower accuracy for every model."""
    rows = [process_row(1, 0), process_row(2, -1) | change]
    message = message.replace("`steps\\[1\\]`", "step 1 of 'gsm8k-2'")
    with pytest.raises(ValueError, match=f"rows.jsonl:2: {message}"):
        read(write_rows(tmp_path / "rows.jsonl", rows), strict=True)


def test_one_bad_row_does_not_stop_a_benchmark(tmp_path):
    """All bad rows are counted and named together. What can be scored is kept, and no index moves."""
    bad = [
        {"label": 3},
        {"label": None},
        {"steps": []},
        {"steps": ["a", 7, "c"]},
        {"problem": " "},
        {"steps": ["a", " ", "c"], "label": 2},
        {"id": "gsm8k-0"},
        {"id": "gsm8k-0", "label": 0},
    ]
    rows = [process_row(0, 1), *(process_row(i, 1) | change for i, change in enumerate(bad, 1)), process_row(9, -1)]
    rows = [{name: value for name, value in rows[0].items() if name != "label"} | {"id": "first"}, *rows]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    found = read(path)
    assert found.faults.left_out == {
        "missing_columns": [f"{path}:1"],
        "bad_label": [f"{path}:3", f"{path}:4"],
        "no_steps": [f"{path}:5"],
        "bad_step": [f"{path}:6"],
        "no_problem": [f"{path}:7"],
    }
    assert found.faults.kept == {"blank_step": [f"{path}:8"], "repeated_id": [f"{path}:9", f"{path}:10"]}
    assert [(one.where, one.first_error) for one in found.solutions] == [
        (f"{path}:2", 1),
        (f"{path}:8", 2),
        (f"{path}:9", 1),
        (f"{path}:10", 0),
        (f"{path}:11", -1),
    ]
    assert found.solutions[1].steps == ["a", " ", "c"]
    assert found.num_rows == len(rows) == len(found.solutions) + found.faults.num_left_out
    assert f"2 rows dropped (bad label): {path}:3, {path}:4" in found.warnings()
    assert found.counts()["rows_left_out_bad_label"] == 2 and found.counts()["rows_kept_blank_step"] == 1


def test_a_compressed_file_is_the_same_subset(tmp_path):
    rows = [process_row(i, i % 3) for i in range(4)]
    plain = write_rows(tmp_path / "gsm8k.jsonl", rows)
    (tmp_path / "z").mkdir()
    packed = tmp_path / "z" / "gsm8k.jsonl.gz"
    packed.write_bytes(gzip.compress(Path(plain).read_bytes()))
    found = read(packed).solutions
    assert [(one.subset, one.id, one.labels) for one in found] == [
        (one.subset, one.id, one.labels) for one in read(plain).solutions
    ]
    assert found[2].where == f"{packed}:3"


def test_a_source_without_a_usable_row_is_an_error(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [process_row(i, 0) | {"label": 7} for i in range(3)])
    with pytest.raises(ValueError, match="rows.jsonl: .*rows.jsonl:1: `label` is 7"):
        read(path)


def test_rows_of_two_sources_count_once(tmp_path):
    """A file, and a copy of a part of it. Both have the same subset column."""
    rows = [process_row(i, 0) | {"subset": "gsm8k"} for i in range(4)]
    paths = [write_rows(tmp_path / "all.jsonl", rows), write_rows(tmp_path / "part.jsonl", rows[:3])]
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(ValueError, match="part.jsonl: "):
        read(*paths)
    write_rows(tmp_path / "part.jsonl", [*rows[:3], process_row(9, 0) | {"subset": "gsm8k"}])
    found = read(*paths)
    assert [one.id for one in found.solutions] == [f"gsm8k-{i}" for i in (0, 1, 2, 3, 9)]
    assert len(found.faults.left_out["in_an_earlier_source"]) == 3
    with pytest.raises(ValueError, match="twice"):
        read(paths[0], tmp_path / "." / "all.jsonl")


@pytest.mark.parametrize(("label", "first_error"), [(1, 0), (3, 2), (0, -1), (-1, -1), (2.0, 1)])
def test_labels_that_count_from_1(tmp_path, label, first_error):
    """Read as counting from 0, every error would be expected one step too late."""
    path = write_rows(tmp_path / "rows.jsonl", [process_row(1, -1) | {"label": label}])
    assert read(path, first_step=1).solutions[0].first_error == first_error


def test_empty_ids_and_subsets(tmp_path):
    """In a table of several datasets, some have none. They get the place of the row."""
    rows = [process_row(i, -1) | {"id": None, "subset": None} for i in range(2)]
    found = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert [(one.subset, one.id) for one in found.solutions] == [("rows", "rows-0"), ("rows", "rows-1")]
    assert not found.warnings()


def test_a_label_of_the_number_of_steps_asks_where_labels_begin(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [process_row(1, -1) | {"label": 3}])
    with pytest.raises(ValueError, match="first_step 1"):
        read(path)
    with pytest.raises(ValueError, match="counted from 1"):
        read(write_rows(tmp_path / "rows.jsonl", [process_row(1, -1) | {"label": 4}]), first_step=1)


def mr_row(number: int, step, correctness="wrong", **more) -> dict:
    return {
        "uuid": f"u{number}",
        "question": f"What is {number} + {number}?",
        "ground_truth_answer": "1",
        "model_output_steps": ["a", "b", "c"],
        "model_output_answer_correctness": correctness,
        "model_output_solution_correctness": correctness,
        "model_output_solution_first_error_step": step,
    } | more


@pytest.mark.parametrize(
    ("row", "labels"),
    [
        (mr_row(1, 1), [0, None, None]),
        (mr_row(1, "3"), [1, 1, 0]),
        (mr_row(1, 2, "incorrect"), [1, 0, None]),
        (mr_row(1, "N/A", "correct"), [1, 1, 1]),
        (mr_row(1, None, "correct"), [1, 1, 1]),
        (mr_row(1, 0, "correct"), [1, 1, 1]),
        (mr_row(1, 2, model_output_step_format=[["1. a"], ["2. b"]]), [1, 0]),
    ],
)
def test_rows_of_mr_gsm8k(tmp_path, row, labels):
    """MR-GSM8K counts steps from 1, whatever `first_step` is."""
    path = write_rows(tmp_path / "mr.jsonl", [row])
    for first_step in (0, 1):
        (one,) = read(path, first_step=first_step).solutions
        assert (one.labels, one.problem, one.id, one.subset) == (labels, "What is 1 + 1?", "u1", "mr")
    assert all(isinstance(step, str) for step in one.steps)


@pytest.mark.parametrize(("step", "correctness"), [("N/A", "wrong"), (2, "correct"), (0, "incorrect")])
def test_rows_of_mr_gsm8k_that_contradict_themselves(tmp_path, step, correctness):
    """Read as free of errors, a wrong solution without a wrong step would count against every model."""
    path = write_rows(tmp_path / "mr.jsonl", [mr_row(1, 1), mr_row(2, step, correctness)])
    found = read(path)
    assert len(found.solutions) == 1
    assert found.faults.left_out == {"label_contradicts_correctness": [f"{path}:2"]}


def test_columns_under_other_names_and_columns_that_are_not_used(tmp_path):
    rows = [{"q": f"{i}?", "chain": ["a", "b"], "first": 1, "image": "x.png"} for i in range(3)]
    path = write_rows(tmp_path / "mine.jsonl", rows)
    found = read(path, columns={"problem": "q", "steps": "chain", "label": "first"})
    assert [(one.problem, one.id, one.first_error) for one in found.solutions] == [
        (f"{i}?", f"mine-{i}", 1) for i in range(3)
    ]
    assert "3 rows have a column `image`" in found.warnings()[0]


@pytest.mark.parametrize(("file", "rows", "errors"), [("gsm8k", 400, 207), ("olympiadbench", 1000, 661)])
def test_real_files_are_read_whole(shared_data, file, rows, errors):
    """The files are JSON arrays. A missing row or a shifted index would be a different benchmark with the same name."""
    path = shared_data / "processbench" / f"{file}.json"
    found = read(path)
    assert len(found.solutions) == found.num_rows == rows and not found.faults.left_out and not found.faults.kept
    assert sum(one.first_error >= 0 for one in found.solutions) == errors
    plain = json.loads(path.read_text(encoding="utf-8"))
    assert [(one.steps, one.first_error) for one in found.solutions] == [(row["steps"], row["label"]) for row in plain]


def test_other_columns(tmp_path):
    row = process_row(1, 0)
    del row["label"]
    path = write_rows(tmp_path / "rows.jsonl", [process_row(2, 0), row])
    with pytest.raises(ValueError, match=r"rows.jsonl:2: .*'steps'\].*\['label'\]"):
        read(path, strict=True)
    path = write_rows(tmp_path / "first.jsonl", [row])
    with pytest.raises(ValueError, match=r"first.jsonl:1: .* processbench: problem, steps"):
        read(path)
    with pytest.raises(ValueError, match="empty.jsonl"):
        read(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nothing.jsonl")


def test_an_array_of_something_else(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([process_row(1, 0), 7]))
    with pytest.raises(ValueError, match="rows.json, row 1: .* int"):
        read(tmp_path / "rows.json")
    (tmp_path / "torn.json").write_text(json.dumps([process_row(1, 0)])[:-5])
    with pytest.raises(ValueError, match=r"torn.json, row 0: .*JSON"):
        read(tmp_path / "torn.json")


def make_rows(rng: random.Random, count: int, subset: str) -> list[dict]:
    rows = []
    for number in range(count):
        steps = rng.randint(1, 5)
        rows.append(process_row(number, rng.choice([-1, rng.randrange(steps)]), steps, subset))
    return rows


def test_planted_blind_and_suspicious_models(tmp_path):
    """The benchmark must distinguish a model that knows the truth from models with a constant answer."""
    rng = random.Random(0)
    files = [write_rows(tmp_path / f"{name}.jsonl", make_rows(rng, 60, name)) for name in ("gsm8k", "math")]
    solutions = read(*files).solutions

    def unweighted(score_of):
        scores = score_solutions(SayingScorer(score_of), solutions, ScoringConfig())
        return measure(PROCESS_BENCH, solutions, scores)["averages"]["unweighted"]["f1"]

    assert unweighted(knows) == 1
    assert unweighted(lambda step: 0.9) == 0
    noise = random.Random(1)
    assert 0 < unweighted(lambda step: noise.random()) < 0.6
    assert unweighted(lambda step: 1 - knows(step)) < 0.2


class TestResults:
    def test_intervals_hold_the_value_and_narrow_with_rows(self):
        """An interval over rows of one problem, or of fixed width, would be meaningless."""
        width = {}
        for count in (40, 640):
            solutions = [solution(i, -1 if i % 2 else 0) for i in range(count)]
            scores = [[0.9] * 3 if i % 4 < 2 else [0.1] * 3 for i in range(count)]  # half of each kind is right
            part = measure(PROCESS_BENCH, solutions, scores)["subsets"]["gsm8k"]
            assert part["f1"] == 0.5 and part["low"] < 0.5 < part["high"]
            width[count] = part["high"] - part["low"]
        assert width[640] == pytest.approx(width[40] / 4, rel=0.25)

    def test_solutions_of_one_problem_are_drawn_together(self):
        """Eight solutions of one problem are not eight independent observations."""
        single = [solution(i, -1 if i % 2 else 0) for i in range(40)]
        scores = [[0.9] * 3 if i % 4 < 2 else [0.1] * 3 for i in range(40)]
        copies = [replace(one, id=f"{one.id}.{k}") for one in single for k in range(8)]
        found = measure(PROCESS_BENCH, single, scores)["subsets"]["gsm8k"]
        repeated = measure(PROCESS_BENCH, copies, [one for one in scores for _ in range(8)])["subsets"]["gsm8k"]
        assert (repeated["low"], repeated["high"]) == pytest.approx((found["low"], found["high"]))

    def test_interval_against_draws_of_the_four_accuracies(self):
        """A 90 % interval, or draws that omit a subset, would look just as plausible."""
        rng = np.random.default_rng(0)
        solutions = [solution(i, i % 2 - 1, "math" if i % 3 else "gsm8k") for i in range(120)]
        scores = rng.choice([0.2, 0.8, 0.9], (120, 3)).tolist()
        hits = [predict_first_error(row, 0.5) == one.first_error for one, row in zip(solutions, scores, strict=True)]
        kinds = [
            [i for i in range(120) if bool(i % 3) == math_ and i % 2 == odd] for math_ in (0, 1) for odd in (0, 1)
        ]
        # one solution per problem: the accuracies are independent, each drawn from its posterior under Jeffreys' prior
        right = [(sum(hits[i] for i in kind), len(kind)) for kind in kinds]
        a, b, c, d = (rng.beta(k + 0.5, n - k + 0.5, 200_000) for k, n in right)
        found = np.percentile((2 * a * b / (a + b) + 2 * c * d / (c + d)) / 2, [2.5, 97.5])
        average = measure(PROCESS_BENCH, solutions, scores)["averages"]["unweighted"]
        assert (average["low"], average["high"]) == pytest.approx(tuple(found), abs=0.015)
        assert average["low"] < average["f1"] < average["high"]

    @pytest.mark.parametrize("number", [1, 10, 100])
    @pytest.mark.parametrize(("right", "f1"), [("all", 1), ("none", 0), ("without an error", 0), ("with an error", 0)])
    def test_intervals_at_the_ends_have_a_width(self, number, right, f1):
        """Resampling equal rows always gives equal rows. The bound of one accuracy follows Jeffreys' prior: about 1 - 0.025^(1/n)."""
        solutions = [solution(i, -1 if i % 2 else 0) for i in range(2 * number)]
        knows = {
            "all": (True, True),
            "none": (False, False),
            "without an error": (True, False),
            "with an error": (False, True),
        }
        scores = [
            [0.9] * 3 if knows[right][one.first_error >= 0] == (one.first_error < 0) else [0.1] * 3
            for one in solutions
        ]
        part = measure(PROCESS_BENCH, solutions, scores, validation_size=0)["subsets"]["gsm8k"]
        assert part["f1"] == f1 and part["low"] <= f1 <= part["high"]
        assert 0.5 / number < part["high"] - part["low"] < 1 - 0.02 ** (1 / number) + 4 / number

    def test_intervals_cover_the_truth(self):
        """Also for F1 near its end: at least 92 % of the intervals hold it."""
        rng = np.random.default_rng(0)
        for a, c in ((0.97, 0.95), (0.05, 0.6), (0.5, 0.5)):
            covered = 0
            for _ in range(100):
                tallies = np.zeros((60, 4))
                tallies[:30, 0], tallies[:30, 1] = rng.random(30) < a, 1
                tallies[30:, 2], tallies[30:, 3] = rng.random(30) < c, 1
                drawn = process_bench_f1(bootstrap_sums({"x": tallies}, PROCESS_BENCH.outcomes, 0)["x"])["f1"]
                low, high = np.percentile(drawn, [2.5, 97.5])
                covered += low <= 2 * a * c / (a + c) <= high
            assert covered >= 90

    def test_an_average_has_the_prior_of_one_subset(self):
        """With a prior for each of its subsets, an average of right solutions would be drawn as if many were wrong."""
        tallies = {str(i): np.zeros((160, 4)) for i in range(8)}
        for i, values in enumerate(tallies.values()):
            values[20 * i : 20 * i + 20] = PRM_BENCH.outcomes[1][0]  # one right step each, judged as right
        low = {}
        for shared in (False, True):
            tp, _, _, fn = sum(bootstrap_sums(tallies, PRM_BENCH.outcomes, 0, shared).values()).T
            low[shared] = np.percentile(tp / (tp + fn), 2.5)
        assert low[True] == pytest.approx(beta(160.5, 0.5).ppf(0.025), abs=0.004)
        assert low[False] == pytest.approx(beta(164, 4).ppf(0.025), abs=0.006)

    def test_tallies_are_sums_of_the_outcomes(self):
        """The prior adds outcomes, so wrong counts would turn right solutions into errors."""
        rng = random.Random(0)
        for suite in (PROCESS_BENCH, PRM_BENCH):
            basis = np.array(suite.outcomes).reshape(4, 4)
            for _ in range(30):
                one = solution(0, rng.randrange(-1, 3))
                one = replace(one, labels=[label or 0 for label in one.labels]) if suite is PRM_BENCH else one
                counts = np.linalg.solve(basis.T, suite.tally(one, [rng.random() for _ in range(3)], 0.5))
                assert (counts >= 0).all() and (counts == counts.round()).all()
                judged = counts.reshape(2, 2).sum(axis=1)  # with an error, and without
                assert judged.sum() == (3 if suite is PRM_BENCH else 1)

    def test_same_seed_same_results(self):
        solutions = [solution(i, i % 4 - 1) for i in range(50)]
        rng = np.random.default_rng(0)
        scores = rng.random((50, 3)).tolist()
        results = [measure(PROCESS_BENCH, solutions, scores, seed=seed) for seed in (1, 1, 2)]
        assert results[0] == results[1] != results[2]

    def test_too_long_solutions_count_for_nothing_and_are_listed(self):
        """A solution without scores is neither a wrong nor a right prediction."""
        solutions = [solution(0, 0), solution(1, -1), solution(2, 1)]
        results = measure(PROCESS_BENCH, solutions, [[0.1, 0.9, 0.9], [0.9] * 3, None])
        assert results["averages"]["unweighted"]["f1"] == 1
        assert results["counts"] == {"num_solutions": 3, "num_scored": 2, "num_too_long": 1}
        assert results["too_long"] == [{"subset": "gsm8k", "id": "gsm8k-2", "where": "by hand"}]
        assert "1 dropped because they are too long" in format_results("processbench", results)
        with pytest.raises(ValueError, match="3 solutions"):
            measure(PROCESS_BENCH, solutions, [None] * 3)

    def test_a_subset_that_is_too_long_is_listed(self):
        """If it were missing from the table, the average would silently cover fewer subsets."""
        solutions = [solution(0, 0), solution(1, -1), solution(2, 1, "omnimath")]
        results = measure(PROCESS_BENCH, solutions, [[0.1] * 3, [0.9] * 3, None])
        lost = results["subsets"]["omnimath"]
        assert (lost["f1"], lost["num_with_error"], lost["num_not_scored"]) == (None, 0, 1)
        assert results["averages"]["unweighted"]["f1"] == 1
        assert "undefined for omnimath" in format_results("processbench", results)

    def test_metrics_of_steps_leave_out_what_follows_the_first_error(self):
        """The benchmark does not label steps after the first error. Counting them as wrong would reward models whose scores stay low."""
        results = measure(PROCESS_BENCH, [solution(0, 1), solution(1, -1)], [[0.9, 0.2, 0.9], [0.9, 0.9, 0.1]])
        assert results["steps"]["num_steps"] == 5
        assert results["steps"]["accuracy"] == pytest.approx(4 / 5)

    def test_threshold_applies_to_steps(self):
        """`accuracy` and `error_f1` of all steps were those of 0.5, whatever the threshold."""
        scores = [[0.9, 0.2, 0.9], [0.9, 0.7, 0.6]]
        steps = measure(PROCESS_BENCH, [solution(0, 1), solution(1, -1)], scores, threshold=0.75)["steps"]
        labelled = [(0.9, 1), (0.2, 0), (0.9, 1), (0.7, 1), (0.6, 1)]  # 2 of the 3 steps below 0.75 are correct
        assert steps["accuracy"] == sum((score >= 0.75) == label for score, label in labelled) / 5 == 3 / 5
        assert steps["error_f1"] == 2 * 1 / (1 + 3)
        assert steps["balanced_accuracy"] == (2 / 4 + 1) / 2

    def test_not_defined_is_null(self):
        results = measure(PROCESS_BENCH, [solution(0, -1)], [[0.9] * 3])
        part = results["subsets"]["gsm8k"]
        assert part["f1"] is part["low"] is part["error_accuracy"] is None and part["correct_accuracy"] == 1
        assert results["tuned"]["threshold"] is None
        assert "threshold not tuned" in format_results("processbench", results)
        json.dumps(results, allow_nan=False)

    @pytest.mark.parametrize("options", [{"threshold": 1.5}, {"threshold": math.nan}, {"validation_size": 1}])
    def test_options_out_of_range(self, options):
        with pytest.raises(ValueError, match=f"`{next(iter(options))}` is"):
            measure(PROCESS_BENCH, [solution(0, 0)], [[0.5] * 3], **options)


class TestTunedThreshold:
    def scored(self, count=200):
        """A model whose scores are separable at 0.8: wrong steps score 0.7, right steps 0.85."""
        solutions = [solution(i, i % 4 - 1) for i in range(count)]
        scores = [[0.7 if label == 0 else 0.85 for label in one.labels] for one in solutions]
        return solutions, scores

    def test_finds_the_threshold_and_reports_the_rest(self):
        """At 0.5 this model finds no error, so F1 is 0. Between 0.7 and 0.85 it is perfect."""
        solutions, scores = self.scored()
        results = measure(PROCESS_BENCH, solutions, scores, validation_size=0.3)
        tuned = results["tuned"]
        assert 0.7 < tuned["threshold"] <= 0.85
        assert (tuned["validation"], tuned["rest"], tuned["rest_untuned"]) == (1, 1, 0)
        assert results["averages"]["unweighted"]["f1"] == 0  # the headline stays at the given threshold
        assert tuned["num_validation"] + tuned["num_rest"] == 200 and 40 < tuned["num_validation"] < 80
        assert "gives 100.0 on the other" in format_results("processbench", results)

    @pytest.mark.parametrize(("threshold", "nearest"), [(0.5, 0.7), (0.95, 0.85)])
    def test_ties_choose_the_nearest_to_the_given_threshold(self, threshold, nearest):
        """All thresholds between the two scores are equally good, and the steps after an error score in between."""
        solutions, _ = self.scored()
        between = iter(np.linspace(0.701, 0.849, 600).tolist())
        said = {0: lambda: 0.7, 1: lambda: 0.85, None: lambda: next(between)}
        scores = [[said[label]() for label in one.labels] for one in solutions]
        tuned = measure(PROCESS_BENCH, solutions, scores, threshold, 0.3)["tuned"]
        assert tuned["validation"] == 1 and tuned["threshold"] == pytest.approx(nearest, abs=0.01)

    def test_the_threshold_is_chosen_on_validation_rows_only(self):
        """A threshold chosen on the rows that it is reported on gives an upper bound, not a result."""
        solutions, scores = self.scored()
        first = measure(PROCESS_BENCH, solutions, scores, validation_size=0.3)["tuned"]
        turned = [
            values if problem_split(one.origin, 0.3, 42) == "test" else [1 - value for value in values]
            for one, values in zip(solutions, scores, strict=True)
        ]
        second = measure(PROCESS_BENCH, solutions, turned, validation_size=0.3)["tuned"]
        assert second["threshold"] == first["threshold"] and second["validation"] == 1
        rest = [i for i, one in enumerate(solutions) if problem_split(one.origin, 0.3, 42) == "train"]
        for found, part in ((first, scores), (second, turned)):
            alone = measure(
                PROCESS_BENCH, [solutions[i] for i in rest], [part[i] for i in rest], found["threshold"], 0
            )
            assert found["rest"] == alone["averages"]["unweighted"]["f1"]
        assert second["rest"] < first["rest"] and second["num_rest"] == len(rest)

    @pytest.mark.parametrize("threshold", [0.3, 0.5, 0.61])
    def test_never_worse_on_validation_than_the_given_threshold(self, threshold):
        """The given threshold is one of the candidates, even if it is not a percentile of these scores."""
        solutions = [solution(i, i % 4 - 1) for i in range(60)]
        scores = np.random.default_rng(0).random((60, 3)).tolist()
        tuned = measure(PROCESS_BENCH, solutions, scores, threshold, 0.5)["tuned"]
        validation = [i for i, one in enumerate(solutions) if problem_split(one.origin, 0.5, 42) == "test"]
        part = measure(PROCESS_BENCH, [solutions[i] for i in validation], [scores[i] for i in validation], threshold)
        assert tuned["num_validation"] == len(validation)
        assert tuned["validation"] >= part["averages"]["unweighted"]["f1"]

    def test_the_given_threshold_is_tried(self):
        """Every percentile of these scores is above the lowest score of a right solution, and finds errors in all of them."""
        solutions = [solution(i, -(i % 2), num_steps=200) for i in range(40)]
        scores = np.random.default_rng(0).uniform(0.6, 0.9, (40, 200))
        scores[::2, 0] = 0.1
        tuned = measure(PROCESS_BENCH, solutions, scores.tolist(), 0.5, 0.5)["tuned"]
        assert (tuned["threshold"], tuned["validation"]) == (0.5, 1)

    def test_no_tuned_threshold_without_validation_rows(self):
        solutions, scores = self.scored(8)
        assert measure(PROCESS_BENCH, solutions, scores, validation_size=0)["tuned"] is None
