"""BIG-Bench Mistake as a ProcessBench-shaped set: the real files by exact counts, and what is refused."""

import pytest

from trl_hrm.evaluation.benchmarks.big_bench_mistake import BIG_BENCH_MISTAKE
from trl_hrm.evaluation.benchmarks.judging import score_solutions
from trl_hrm.evaluation.benchmarks.measuring import measure
from trl_hrm.evaluation.benchmarks.process_bench import PROCESS_BENCH
from trl_hrm.evaluation.benchmarks.reading import read_suites

from .benchmark_rows import SayingScorer, knows, mistake_row, process_row, write_rows


def read(*sources):
    return read_suites([BIG_BENCH_MISTAKE], list(map(str, sources)))["bigbenchmistake"]


def test_rows(tmp_path):
    """Null means no mistake, 0 the first step: a truth test would take one for the other."""
    path = write_rows(tmp_path / "word_sorting.jsonl", [mistake_row(1, 0), mistake_row(2, None), mistake_row(3, 2)])
    assert [(one.subset, one.id, one.first_error, one.labels) for one in read(path).solutions] == [
        ("word_sorting", "word_sorting-0", 0, [0, None, None]),
        ("word_sorting", "word_sorting-1", -1, [1, 1, 1]),
        ("word_sorting", "word_sorting-2", 2, [1, 1, 0]),
    ]


@pytest.mark.parametrize("index", [3, -1, "1", True])
def test_bad_index(tmp_path, index):
    path = write_rows(tmp_path / "rows.jsonl", [mistake_row(1, 0) | {"mistake_index": index}])
    with pytest.raises(ValueError, match="rows.jsonl:1: `mistake_index` is .* of 3 steps, or null for no error"):
        read(path)


def test_same_results_as_processbench(tmp_path):
    """The same solutions in the other shape have the same results."""
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
    ("file", "num_without", "first"), [("logical_deduction", 6, 2), ("multistep_arithmetic", 62, 3)]
)
def test_real_files(shared_data, file, num_without, first):
    """Every row is read, and a model that knows the mistakes finds every one of them."""
    path = shared_data / "samples" / f"bbm_{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    solutions = read(path).solutions
    assert len(solutions) == 300
    assert [one.first_error for one in solutions].count(-1) == num_without
    assert solutions[0].first_error == first
    told = {id(one): [0.1 if label == 0 else 0.9 for label in one.labels] for one in solutions}
    results = measure(BIG_BENCH_MISTAKE, solutions, [told[id(one)] for one in solutions])
    part = results["subsets"][f"bbm_{file}"]
    assert (part["f1"], part["accuracy"], part["num_without"]) == (1, 1, num_without)


def test_scoring_asks_for_every_solution(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [mistake_row(1, 0), mistake_row(2, None)])
    scorer = SayingScorer(knows)
    score_solutions(scorer, read(path).solutions)
    assert [steps for _, steps in scorer.asked] == [mistake_row(1, 0)["steps"], mistake_row(2, None)["steps"]]
