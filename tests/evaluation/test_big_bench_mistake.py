"""BIG-Bench Mistake as a ProcessBench-like suite: exact counts of the real files, and errors."""

import pytest

from trl_hrm.evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
from trl_hrm.evaluation.benchmarks.measures import measure
from trl_hrm.evaluation.benchmarks.process_bench import PROCESS_BENCH
from trl_hrm.evaluation.benchmarks.run import score_solutions
from trl_hrm.evaluation.benchmarks.suite import read_suites
from trl_hrm.scoring.scoring_config import ScoringConfig

from ..fakes import write_rows
from .benchmark_rows import SayingScorer, knows, mistake_row, process_row


def read(*sources, **options):
    return read_suites([BIG_BENCH_MISTAKE], list(map(str, sources)), **options)["bigbenchmistake"]


def test_rows(tmp_path):
    """Null means no mistake, and 0 the first step. A truth test would confuse them."""
    path = write_rows(tmp_path / "word_sorting.jsonl", [mistake_row(1, 0), mistake_row(2, None), mistake_row(3, 2)])
    assert [(one.subset, one.id, one.first_error, one.labels) for one in read(path).solutions] == [
        ("word_sorting", "word_sorting-0", 0, [0, None, None]),
        ("word_sorting", "word_sorting-1", -1, [1, 1, 1]),
        ("word_sorting", "word_sorting-2", 2, [1, 1, 0]),
    ]


@pytest.mark.parametrize("index", [3, -1, "1", True])
def test_bad_index(tmp_path, index):
    path = write_rows(tmp_path / "rows.jsonl", [mistake_row(1, 0) | {"mistake_index": index}])
    with pytest.raises(ValueError, match="rows.jsonl:1: `mistake_index` is "):
        read(path, strict=True)


def test_same_results_as_processbench(tmp_path):
    """The same solutions in ProcessBench's format must have the same results."""
    labels = [0, 1, -1, 2, -1, 1, -1, 0]
    mistakes = [mistake_row(i, None if label < 0 else label) for i, label in enumerate(labels)]
    path = write_rows(tmp_path / "mistakes.jsonl", mistakes)
    other = write_rows(tmp_path / "steps.jsonl", [process_row(i, label) for i, label in enumerate(labels)])
    solutions = [
        read(path).solutions,
        read_suites([PROCESS_BENCH], [other])["processbench"].solutions,
    ]
    said = {"ok": 0.6, "bad": 0.3, "after": 0.2}
    scores = [[said[step.split()[0]] if "1." not in step else 0.4 for step in one.steps] for one in solutions[0]]
    found = [
        measure(suite, part, scores) for suite, part in zip((BIG_BENCH_MISTAKE, PROCESS_BENCH), solutions, strict=True)
    ]
    assert found[0]["subsets"]["mistakes"] == found[1]["subsets"]["steps"]
    assert 0 < found[0]["averages"]["unweighted"]["f1"] < 1
    assert found[0]["averages"] == found[1]["averages"]


@pytest.mark.parametrize(
    ("file", "num_rows", "num_without", "first"),
    [
        ("dyck_languages", 986, 336, 12),
        ("logical_deduction", 300, 6, 2),
        ("multistep_arithmetic", 300, 62, 3),
        ("tracking_shuffled_objects", 300, 40, 3),
        ("word_sorting", 300, 34, 1),
    ],
)
def test_real_files(shared_data, file, num_rows, num_without, first):
    """Every row is read, and a model that knows the mistakes finds all of them."""
    path = shared_data / "samples" / f"bbm_{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = read(path)
    solutions = found.solutions
    assert len(solutions) == found.num_rows == num_rows and not found.faults.left_out
    blank = {"blank_step": [f"{path}:539"]} if file == "dyck_languages" else {}
    assert found.faults.kept == blank
    assert [one.first_error for one in solutions].count(-1) == num_without
    assert solutions[0].first_error == first
    told = {id(one): [0.1 if label == 0 else 0.9 for label in one.labels] for one in solutions}
    results = measure(BIG_BENCH_MISTAKE, solutions, [told[id(one)] for one in solutions])
    part = results["subsets"][f"bbm_{file}"]
    assert (part["f1"], part["accuracy"], part["num_without"]) == (1, 1, num_without)


def test_a_blank_step_moves_no_index(tmp_path):
    """Left out, the second step of line 2 would make every later index one too large. With `strict` it is an error."""
    rows = [mistake_row(1, None), mistake_row(2, 2) | {"steps": ["ok", "", "bad", "after"]}]
    path = write_rows(tmp_path / "dyck.jsonl", rows)
    one = read(path).solutions[1]
    assert (one.steps[1], len(one.steps), one.first_error) == ("", 4, 2)
    with pytest.raises(ValueError, match="dyck.jsonl:2: step 1 of 'dyck-1' is ''"):
        read(path, strict=True)


def test_missing_values_of_a_table(tmp_path):
    """In columns with gaps, Pandas turns integers into floats and gaps into NaN."""
    rows = [mistake_row(1, 0) | {"mistake_index": 1.0}, mistake_row(2, 0) | {"mistake_index": float("nan")}]
    found = read(write_rows(tmp_path / "rows.jsonl", rows))
    assert [one.first_error for one in found.solutions] == [1, -1]


def test_scoring_asks_for_every_solution(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [mistake_row(1, 0), mistake_row(2, None)])
    scorer = SayingScorer(knows)
    score_solutions(scorer, read(path).solutions, ScoringConfig())
    assert [steps for _, steps in scorer.asked] == [mistake_row(1, 0)["steps"], mistake_row(2, None)["steps"]]
