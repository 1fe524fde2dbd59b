"""Results of searches that start after given steps: what is counted, and what the candidates contain."""

import json
from dataclasses import replace

import pytest

from trl_hrm.evaluation.results import load_candidates
from trl_hrm.search.engines.base import ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.run_folder import Shard

from ..search.leveled import any_score
from ..search.scripted import make_problems, write_coins
from .step_searches import PathScores, numbers, search


GIVEN = "# Step 1\nbad 1\n\n# Step 2"  # three steps; any bad one makes the answer wrong
PROBLEMS = [replace(problem, prefix=GIVEN) for _, problem in make_problems(30)]


def forgiving(prefix, rng):
    """`write_coins`, but a good step after an error makes up for it."""
    return write_coins(prefix.replace("bad 1\n\n# Step 2\ngood", "good 1\n\n# Step 2\ngood"), rng)


def approves_corrections(path):
    return float("good" in path[-1])


def test_given_steps_are_shown_and_not_counted(tmp_path):
    """
    Sampled tokens, sequences and judged steps are counted after the prefix, while candidates include the prefix's text and steps.
    If given steps were counted, a search from a long prefix would seem as expensive as one from the problem.
    """
    scorer = PathScores(any_score)
    results = search(tmp_path, scorer=scorer, problems=PROBLEMS, n=[2, 4])
    points = results.curves["step_search"]
    assert [point["policy_num_sequences"] for point in points] == [30 * 3 * n for n in (2, 4)]
    assert [point["scorer_num_steps"] for point in points] == [30 * 3 * n for n in (2, 4)]
    assert "steps_too_long_at_n4" not in results.counts  # given steps have no score, but not because of their length
    with EventLog(tmp_path / "n-4" / "log-00000-of-00001.jsonl") as log:
        trees = [log.read(problem_id) for problem_id in log.problems]
    assert points[-1]["policy_num_tokens"] == sum(len(node.token_ids) for one in trees for node in one.sampled)
    for row in load_candidates(tmp_path, "candidates-n4.jsonl"):
        (candidate,) = row.candidates
        assert candidate.text.startswith(GIVEN + "\n") and candidate.steps[0] == "# Step 1\nbad 1"
        assert len(candidate.steps) == 4 and len(candidate.scores) == 3  # the last three steps
        assert candidate.num_tokens == len(candidate.text) - len(GIVEN)
        assert candidate.correct is False


def test_a_search_from_an_error_shows_self_correction(tmp_path):
    """A scorer that approves the step after the error finds the right answer. A scorer that rejects it finds none."""
    accuracy = {}
    for name, score in {
        "forgives": approves_corrections,
        "does not": lambda path: 1 - approves_corrections(path),
    }.items():
        engine = ScriptedEngine(forgiving)
        results = search(tmp_path / name, score, engine=engine, problems=PROBLEMS, n=[4])
        accuracy[name] = results.curves["step_search"][0]["accuracy"]
    assert accuracy["forgives"] > 0.7 and accuracy["does not"] < 0.05


def test_a_prefix_without_sampled_steps_is_not_a_candidate(tmp_path):
    """Otherwise the prefix itself would be the chosen solution, without a score."""
    engine = ScriptedEngine(lambda prefix, rng: "on and " * 40)
    results = search(tmp_path, any_score, engine=engine, problems=PROBLEMS[:3], n=[2])
    assert results.counts["num_candidates"] == 0 and results.counts["problems_without_solution_at_n2"] == 3
    assert results.counts["steps_cut_off_at_n2"] == 6 and results.num_problems == 3


def test_shards_make_the_same_results(tmp_path):
    """Problems that differ only in the prefix may be in different shards."""
    other = [replace(p, problem_id=p.problem_id + "-b", prefix=GIVEN.replace("bad 1", "good 1")) for p in PROBLEMS]
    search(tmp_path / "one", problems=PROBLEMS + other)
    for index in range(3):
        search(tmp_path / "three", problems=PROBLEMS + other, shard=Shard(index, 3))
    one, three = numbers(tmp_path / "one"), numbers(tmp_path / "three")
    assert one["rows"] == three["rows"] and one["curves"] == three["curves"]
    rows = [json.loads(line) for line in one["rows"]["candidates-n4.jsonl"].splitlines()]
    chosen = [row["candidates"][0]["correct"] for row in rows]
    assert not any(chosen[:30]) and sum(chosen[30:]) > 20


def test_a_fault_in_a_prefix_stops_the_run_before_anything_is_sampled(tmp_path):
    faulty = [*PROBLEMS[:3], replace(PROBLEMS[4], prefix="# Step 1\nbad 1")]
    engine = ScriptedEngine(write_coins)
    with pytest.raises(ValueError, match="'p004': .*bad 1'"):
        search(tmp_path, engine=engine, problems=faulty)
    assert engine.most_in_flight == 0 and not (tmp_path / "results.json").exists()
