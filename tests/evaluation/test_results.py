"""The results folder: parts that survive a kill, and files that are either complete or absent."""

import json
import math
import random
from collections import Counter
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from trl_hrm import StepFormat
from trl_hrm.data.candidates import Candidate, ProblemCandidates
from trl_hrm.evaluation import best_of_n
from trl_hrm.evaluation.best_of_n import collect_results, finish_results, pool_digest, score_pool
from trl_hrm.evaluation.results import (
    Part,
    Results,
    check_results,
    load_candidates,
    load_results,
    read_parts,
    scored_row,
    write_candidates,
    write_results,
)
from trl_hrm.grading import Grade
from trl_hrm.scoring import candidate_scores
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.search.prompts import PROMPTS

from ..helpers import tiny_tokenizer


HEADER = {"n": [1, 2], "reward_model": {"model": "m"}, "candidates": "abc"}


class Equal:
    """Equal texts are right. `x` cannot be read, also as a reference, and `hang` times out."""

    def grade(self, answer: str, reference: str, is_reference: bool = True) -> Grade:
        if "x" in (answer, reference):
            return Grade(None, "ungradable" if reference == "x" else "unparseable")
        return Grade(None, "timeout") if answer == "hang" else Grade(answer == reference, "graded")


class Scorer:
    """Scores a step by the number in its text. Counts its calls, and stops after a given number."""

    def __init__(self, stop_after: int | None = None, max_positions: int | None = None):
        self.tokenizer, self.step_format, self.max_positions = tiny_tokenizer(), StepFormat(), max_positions
        self.stop_after = stop_after
        self.num_calls = 0

    def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
        if self.num_calls == self.stop_after:
            raise KeyboardInterrupt
        self.num_calls += 1
        return [[[float(step.split()[-1]) for step in steps] for steps in solutions] for solutions in candidates]


def make_problems(number: int, seed: int = 0) -> list[tuple[int, ProblemCandidates]]:
    rng = random.Random(seed)
    problems = []
    for i in range(number):
        candidates = []
        for _ in range(3):
            steps = [f"so {rng.randrange(1, 10) / 10}" for _ in range(rng.randint(1, 3))]
            candidates.append(
                Candidate("\n\n".join(steps), steps, rng.choice(["1", "2", "hang", "x", None]), "eos", 4)
            )
        problems.append((i, ProblemCandidates(f"p{i}", f"{i}?", "1", candidates, f"here {i}")))
    return problems


def judge(folder, problems, scorer=None, header=HEADER, **options):
    """Judge problems in one process and read the results."""
    with Part(folder, header, **options) as part:
        score_pool(problems, scorer or Scorer(), Equal(), part, ScoringConfig())
    rows, counts = read_parts([part.finished])
    return list(rows), counts


def without_seconds(counts: Counter) -> dict:
    return {name: value for name, value in counts.items() if not name.endswith("seconds")}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(best_of_n, "BLOCK", 4)


def test_scores_and_grades(tmp_path):
    problems = make_problems(10)
    rows, counts = judge(tmp_path, problems)
    assert len(rows) == 10
    for (_, before), (after, classes) in zip(problems, rows, strict=True):
        for old, new, group in zip(before.candidates, after.candidates, classes, strict=True):
            assert (new.text, new.steps, new.answer, new.finish, new.num_tokens) == (
                old.text,
                old.steps,
                old.answer,
                old.finish,
                old.num_tokens,
            )
            assert new.scores == [float(step.split()[-1]) for step in old.steps]
            assert new.correct == {"1": True, "2": False, "x": False, "hang": None, None: None}[old.answer]
            assert (group is None) == (old.answer is None)
    answers = Counter(candidate.answer for _, problem in problems for candidate in problem.candidates)
    assert min(answers.values()) > 2
    assert counts["not_graded"] == answers["hang"] and counts["candidates_unreadable"] == answers["x"]
    assert counts["candidates_without_answer"] == answers[None] and counts["num_candidates"] == 30
    assert counts["scorer_calls"] == 3 and counts["policy_tokens"] == 120
    assert counts["scorer_steps"] == sum(len(c.steps) for _, p in problems for c in p.candidates)
    prompt_ids, step_ids = StepFormat().encode(tiny_tokenizer(), "0?", problems[0][1].candidates[0].steps)
    alone = len(prompt_ids) + sum(map(len, step_ids))
    assert judge(tmp_path / "one", [_first_alone(problems[0])])[1]["scorer_tokens"] == alone


def test_seconds(tmp_path, monkeypatch):
    """With a clock that only scorer and grader advance, neither may include the other's seconds."""
    clock = [0.0]

    class Slow(Scorer):
        def score(self, *args, **options):
            clock[0] += 5
            return super().score(*args, **options)

    class SlowGrader(Equal):
        def grade(self, answer, reference, is_reference=True):
            clock[0] += 0.25
            return super().grade(answer, reference)

    for module in (best_of_n, candidate_scores):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    with Part(tmp_path, HEADER) as part:
        score_pool(make_problems(10), Slow(), SlowGrader(), part, ScoringConfig())
    rows, counts = read_parts([part.finished])
    list(rows)
    assert counts["scorer_seconds"] == 15 and counts["rest_seconds"] == clock[0] - 15 > 2


def _first_alone(pair):
    place, problem = pair
    return place, ProblemCandidates(problem.problem_id, problem.problem, "1", problem.candidates[:1])


def test_killed_after_each_block(tmp_path):
    """Ctrl-C costs only the current block. Restarted until done, the result equals an uninterrupted run."""
    problems = make_problems(18)
    whole, counts = judge(tmp_path / "whole", problems)
    num_calls = []
    for _ in range(10):
        scorer = Scorer(stop_after=1)
        num_calls.append(scorer)
        try:
            rows, found = judge(tmp_path / "parts", problems, scorer)
            break
        except KeyboardInterrupt:
            continue
    assert rows == whole and without_seconds(found) == without_seconds(counts)
    assert [scorer.num_calls for scorer in num_calls] == [1, 1, 1, 1, 1]


@pytest.mark.parametrize("cut", [1, 7, 40, 900])
def test_a_torn_line_is_computed_again(tmp_path, cut):
    problems = make_problems(8)
    whole, _ = judge(tmp_path / "whole", problems)
    with pytest.raises(KeyboardInterrupt):
        judge(tmp_path / "torn", problems, Scorer(stop_after=1))
    path = tmp_path / "torn" / "partial-00000-of-00001.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    scorer = Scorer()
    assert judge(tmp_path / "torn", problems, scorer)[0] == whole
    assert scorer.num_calls == 2


def test_torn_header(tmp_path):
    (tmp_path / "partial-00000-of-00001.jsonl").write_text('{"n": [1')
    assert len(judge(tmp_path, make_problems(2))[0]) == 2


def test_finished_parts_are_not_scored_again(tmp_path):
    first, _ = judge(tmp_path, make_problems(6))
    assert [path.name for path in tmp_path.iterdir()] == ["part-00000-of-00001.jsonl"]
    assert judge(tmp_path, make_problems(6), Scorer(stop_after=0))[0] == first


@pytest.mark.parametrize("stop_after", [None, 1])
def test_other_settings(tmp_path, stop_after):
    """Scores of two reward models in one file would be a result of neither."""
    try:
        judge(tmp_path, make_problems(6), Scorer(stop_after))
    except KeyboardInterrupt:
        pass
    other = HEADER | {"reward_model": {"model": "other"}}
    with pytest.raises(ValueError, match='reward_model.model was "m" .*--overwrite'):
        judge(tmp_path, make_problems(6), header=other)
    assert len(judge(tmp_path, make_problems(6), header=other, overwrite=True)[0]) == 6
    scorer = Scorer()
    judge(tmp_path, make_problems(6), scorer, header=other, overwrite=True)
    assert scorer.num_calls == 0  # parts started with the same settings are resumed


def test_a_start_without_scores_fixes_no_settings(tmp_path):
    """For example, after a reward model failed to load, the next start may use a different one."""
    with pytest.raises(KeyboardInterrupt):
        judge(tmp_path, make_problems(6), Scorer(stop_after=0))
    assert len(judge(tmp_path, make_problems(6), header=HEADER | {"reward_model": {"model": "other"}})[0]) == 6


def test_two_processes_on_one_part(tmp_path):
    with Part(tmp_path, HEADER):
        with pytest.raises(BlockingIOError, match="another process is writing to this file"):
            Part(tmp_path, HEADER)


def test_parts_of_several_processes_are_one(tmp_path):
    problems = make_problems(11)
    whole, counts = judge(tmp_path / "one", problems)
    for shard in range(3):
        judge(tmp_path / "three", problems[shard::3], shard=shard, num_shards=3)
    rows, found = read_parts(sorted((tmp_path / "three").iterdir(), reverse=True))
    assert list(rows) == whole
    assert found["num_candidates"] == counts["num_candidates"] == 33
    judge(tmp_path / "empty", [], shard=1, num_shards=2)
    assert list(read_parts(list((tmp_path / "empty").iterdir()))[0]) == []


def test_what_cannot_be_judged(tmp_path):
    """An unreadable reference, blank and long candidates are counted, and none of them shifts other scores."""
    long = ["so " * 200 + "0.9"]
    problems = make_problems(4)
    problems[1][1].answer = "x"
    problems[2][1].candidates[0] = Candidate(" ", [], None)
    problems[2][1].candidates[1] = Candidate(long[0], long, "1", "length", 9)
    problems[3][1].candidates[:] = [Candidate("", [])] * 3
    rows, counts = judge(tmp_path, problems, Scorer(max_positions=100))
    assert [problem.problem_id for problem, _ in rows] == ["p0", "p2", "p3"]
    first, second, third = rows[1][0].candidates
    assert first.scores is second.scores is None and third.scores == [float(s.split()[-1]) for s in third.steps]
    assert first.correct is None and second.correct is True
    assert all(candidate.scores is None for candidate in rows[2][0].candidates)
    assert counts["problems_ungradable"] == 1 and counts["candidates_without_steps"] == 4
    assert counts["candidates_too_long"] == 1 and counts["candidates_cut_off"] == 1
    blank = [(0, ProblemCandidates("p", "?", "1", [Candidate("", [])]))]
    scorer = Scorer(stop_after=0)
    assert judge(tmp_path / "blank", blank, scorer)[1]["scorer_calls"] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, 1.5, -0.1])
def test_scores_that_are_not_numbers(tmp_path, bad):
    """Comparing with NaN is always false, so the choice would depend on the order."""

    class Broken(Scorer):
        def score(self, prompts, candidates, **options):
            scores = super().score(prompts, candidates)
            scores[1][2] = scores[1][2][:-1] + ([] if bad is None else [bad])
            return scores

    with pytest.raises(
        ValueError,
        match="here 1: the reward model returned .* for . steps. It must return one finite number from 0 to 1 per step",
    ):
        judge(tmp_path, make_problems(3), Broken())


def test_problems_missing_from_a_run_are_counted(tmp_path):
    """Problems that cannot be graded now are added to those that the run's search could not grade."""
    run = tmp_path / "run"
    run.mkdir()
    search = {"search": "rollouts"}
    manifest = {"engine": {"model": "p"}, "prompt": asdict(PROMPTS["steps"]), "search": search, "seed": 1}
    manifest |= {"versions": {}, "extractors": []}
    (run / "manifest.json").write_text(json.dumps(manifest))
    unreadable = [{"problem_id": name, "answer": "x"} for name in ("a", "b")]
    statuses = {"done": 4, "error": 4, "ungradable": 2}
    summary = {"problems": statuses, "solutions": {}, "unreadable_references": unreadable, "failed_requests": 4}
    (run / "summary-00000-of-00001.json").write_text(json.dumps(summary))
    problems = make_problems(4)
    problems[1][1].answer = "x"
    with Part(tmp_path, HEADER) as part:
        score_pool(problems, Scorer(), Equal(), part, ScoringConfig())
    settings = {"extractors": ["boxed"]}
    found, _ = collect_results(
        tmp_path, [part.finished], run, {}, settings, [1, 2], ["min"], 200, 42, Counter(), sampled=False
    )
    finish_results(tmp_path, found)
    assert (found.counts["problems_ungradable"], found.counts["problems_error"], found.num_problems) == (3, 4, 3)
    assert found.policy["model"] == "p" and "3 problems have unreadable reference answers" in found.warnings[0]
    assert load_results(tmp_path) == found and len(list(load_candidates(tmp_path))) == 3
    assert not part.finished.exists()


def test_the_digest_of_candidates():
    problems = [problem for _, problem in make_problems(3)]
    assert pool_digest(problems) == pool_digest([problem for _, problem in make_problems(3)])
    other = [problem for _, problem in make_problems(3)]
    other[2].candidates[1].steps[-1] += " "
    assert pool_digest(problems) != pool_digest(other)


def results(**changes) -> Results:
    values = {
        "strategy": "best_of_n",
        "reward_model": {"model": "m"},
        "policy": None,
        "settings": {"n": [1]},
        "versions": {"trl_hrm": "0"},
        "seed": 1,
        "date": "2026-01-01T00:00:00+00:00",
        "num_problems": 1,
        "counts": {},
        "n": [1],
        "curves": {"majority_vote": [{"n": 1, "accuracy": 0.5, "low": 0.0, "high": 1.0}]},
    }
    return Results(**(values | changes))


def test_files(tmp_path):
    """Earlier results are deleted before candidates are replaced, so a kill cannot leave files that do not match."""
    problems = [problem for _, problem in make_problems(3)]
    write_candidates(tmp_path, problems)
    write_results(tmp_path, results())
    assert load_results(tmp_path) == results()
    assert [p.candidates for p in load_candidates(tmp_path)] == [p.candidates for p in problems]
    assert list(json.loads((tmp_path / "results.json").read_text()))[:3] == ["strategy", "reward_model", "policy"]

    def fails():
        yield problems[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_candidates(tmp_path, fails())
    assert len(list(load_candidates(tmp_path))) == 3 and load_results(tmp_path) == results()
    write_candidates(tmp_path, problems[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["candidates.jsonl"]
    with pytest.raises(FileNotFoundError, match="results.json does not exist"):
        load_results(tmp_path)


@pytest.mark.parametrize(("strategy", "kept"), [("best_of_n", ""), ("beam_search", "-n1")])
def test_candidates_of_earlier_results_are_deleted(tmp_path, strategy, kept):
    """Otherwise a report would show the earlier candidates with the largest N, and compare their problems."""
    for name in ("", "-n1", "-n16", "-mine", "-n1.old"):
        (tmp_path / f"candidates{name}.jsonl").write_text("")
    write_results(tmp_path, results(strategy=strategy))
    left = {f"candidates{name}.jsonl" for name in (kept, "-mine", "-n1.old")} | {"results.json"}
    assert {path.name for path in tmp_path.iterdir()} == left


def test_results_are_not_replaced_unasked(tmp_path):
    check_results(tmp_path, overwrite=False)
    write_results(tmp_path, results())
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_results(tmp_path, overwrite=False)
    check_results(tmp_path, overwrite=True)


def test_rows_of_blocks():
    row = scored_row(3, make_problems(1)[0][1], [0, None, 1])
    assert row["place"] == 3 and row["classes"] == [0, None, 1] and row["problem"]["problem_id"] == "p0"


def test_damaged_parts(tmp_path):
    """Blocks that are missing, repeated or of other problems would be results on other problems. They are noticed on resume."""
    problems = make_problems(40)
    with Part(tmp_path, HEADER) as part, pytest.raises(KeyboardInterrupt):
        score_pool(problems, Scorer(stop_after=2), Equal(), part, ScoringConfig())
    path = tmp_path / "partial-00000-of-00001.jsonl"
    lines = path.read_text().splitlines()
    header, first, second = lines

    def edited(line, edit):
        block = json.loads(line)
        edit(block)
        return json.dumps(block)

    for damaged, words in (
        ([header, second], "2: found block 1, expected block 0"),
        ([header, first, first], "3: found block 0, expected block 1"),
        ([header, first, edited(second, lambda b: b.pop("counts"))], "3: `counts` is missing"),
        ([header, edited(first, lambda b: b["rows"][0].update(place=-1))], r"2: `rows\[0\].place` is -1"),
        ([header, edited(first, lambda b: b["rows"].reverse())], r"2: problem \d+ follows problem \d+"),
        ([header, edited(first, lambda b: b["rows"][0]["classes"].pop())], r"2: problem \d+ has not one class per candidate"),
        ([header, edited(first, lambda b: b["counts"].update(num_candidates=-1))], "2: `counts.num_candidates` is -1"),
        (
            [header, edited(first, lambda b: b["rows"][0]["problem"]["candidates"][0].update(scores=[]))],
            r"2: `rows\[0\].problem.candidates\[0\].scores` is \[\]",
        ),
        (["[]", first], "1: the value is ... It must be an object"),
    ):  # fmt: skip
        path.write_text("\n".join(damaged) + "\n")
        with pytest.raises(ValueError, match=f"^{path}:{words}.*Delete the file"):
            Part(tmp_path, HEADER)
    # a file of an earlier version has no numbers
    path.write_text("\n".join([header, *(edited(line, lambda b: b.pop("number")) for line in (first, second))]) + "\n")
    rows, _ = judge(tmp_path, problems)
    assert rows == judge(tmp_path / "whole", problems)[0]
