"""The driver of step searches: one scorer call per depth, no repeated request, kills, faults, effect of scores."""

import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_hrm import StepFormat
from trl_hrm.scoring.scorer import StepScorer
from trl_hrm.search.engines.base import EngineFatal, PrefixTooLong, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.step_search import GreedyStepSearch, is_step
from trl_hrm.search.tree import Problem
from trl_hrm.step_tree import StepTree

from ..helpers import tiny_model, tiny_tokenizer
from .leveled import LIMITS, SEARCHES, PathScorer, any_score, everything, log_of, open_trees, results, run_levels
from .scripted import PROMPT, ExactGrader, FaultyEngine, make_problems, some_latency, write_coins, write_solution


@pytest.mark.parametrize("name", list(SEARCHES))
def test_one_call_of_the_scorer_per_depth(tmp_path, name):
    """A scorer call per request or per problem would lose the batches. No step may be scored twice."""
    scorer = PathScorer(any_score)
    progress = run_levels(tmp_path, SEARCHES[name], make_problems(8), scorer=scorer)
    trees = {problem_id: opened.tree for problem_id, opened in open_trees(tmp_path).items()}
    depths = [max(tree.depth(i) for i in range(len(tree.nodes))) for tree in trees.values()]
    assert len(scorer.calls) == progress.num_calls == max(depths) >= 4
    assert len({len(call) for call in scorer.calls}) > 1 and len(scorer.calls[0]) == 8  # some end before others
    for depth, call in enumerate(scorer.calls, start=1):
        assert all(max(map(len, map(tree.path, range(len(tree.completions))))) == depth for tree in call)
    scored = [
        score for opened in open_trees(tmp_path).values() for score in opened.scores.values() if score is not None
    ]
    assert progress.num_steps == len(scored)


def test_never_more_problems_open_than_allowed(tmp_path):
    """Opening all problems at once would hold a test set of thousands in memory."""
    scorer = PathScorer(any_score)
    run_levels(tmp_path, problems=make_problems(12), scorer=scorer, max_open_problems=3)
    assert max(map(len, scorer.calls)) == 3 and len({tree.prompt for call in scorer.calls for tree in call}) == 12


def test_paths_share_their_steps(tmp_path):
    """The siblings of a depth share one copy of the earlier steps."""
    scorer = PathScorer(any_score)
    run_levels(tmp_path, SEARCHES["greedy"], make_problems(8), scorer=scorer)
    for depth, trees in enumerate(scorer.calls, start=1):
        for tree in trees:
            assert tree.parents[: depth - 1] == list(range(-1, depth - 2))
            assert tree.parents[depth - 1 :] == [depth - 2] * (len(tree.parents) - depth + 1)
    assert depth >= 4


@pytest.mark.parametrize("name", list(SEARCHES))
def test_the_order_of_answers_does_not_matter(tmp_path, name):
    """Results must depend only on problem, position and seed, not on timing or the number of open problems."""
    run_levels(tmp_path / "a", SEARCHES[name])
    run_levels(tmp_path / "b", SEARCHES[name], latency=some_latency, max_in_flight=7, max_open_problems=2)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert results(tmp_path / "a", SEARCHES[name]) == results(tmp_path / "b", SEARCHES[name])
    run_levels(tmp_path / "c", SEARCHES[name], seed=1)
    assert results(tmp_path / "a", SEARCHES[name]) != results(tmp_path / "c", SEARCHES[name])


def test_never_more_in_flight_than_allowed(tmp_path):
    engine = ScriptedEngine(write_solution, some_latency)
    progress = run_levels(tmp_path, SEARCHES["beam"], make_problems(12), engine=engine, max_in_flight=13)
    assert 10 <= engine.most_in_flight <= 13
    assert progress.most_in_flight == engine.most_in_flight and progress.in_flight == engine.in_flight == 0
    assert 0 < progress.policy_seconds + progress.scorer_seconds <= progress.seconds


@pytest.mark.parametrize("name", list(SEARCHES))
def test_cut_after_any_event_and_resumed(tmp_path, name):
    """A kill between any two events, or within a line, must change no result and repeat no request."""
    whole = tmp_path / "whole"
    run_levels(whole, SEARCHES[name], make_problems(4))
    expected, chosen, log = everything(whole), results(whole, SEARCHES[name]), log_of(whole).read_bytes()
    lines = log.splitlines(keepends=True)
    assert len(lines) > 20
    for kept in range(len(lines)):
        for half in (0, len(lines[kept]) // 2) if kept % 5 == 0 else (0,):
            folder = tmp_path / f"{kept}-{half}"
            folder.mkdir()
            log_of(folder).write_bytes(b"".join(lines[:kept]) + lines[kept][:half])
            run_levels(folder, SEARCHES[name], make_problems(4))
            assert everything(folder) == expected and results(folder, SEARCHES[name]) == chosen
            resumed = log_of(folder).read_bytes()
            assert sorted(map(len, resumed.splitlines())) == sorted(map(len, log.splitlines()))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "beam" else pytest.mark.slow) for name in SEARCHES]
)
def test_ten_kills(tmp_path, name):
    """Ten SIGKILLs of a real process at random moments must give the results of an uninterrupted run."""
    number = 20
    run_levels(tmp_path / "whole", SEARCHES[name], make_problems(number))
    program = [sys.executable, "-m", "tests.search.leveled", str(tmp_path / "killed"), name, str(number), "0.05"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    log, rng, sizes = log_of(tmp_path / "killed"), random.Random(7), []
    for _ in range(10):
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL, "the run ended too early to be killed ten times"
        sizes.append(log.stat().st_size)
    assert len(set(sizes)) == 10
    with EventLog(log) as killed:
        assert Counter(problem.status for problem in killed.problems.values())["open"]
    run_levels(tmp_path / "killed", SEARCHES[name], make_problems(number))
    assert results(tmp_path / "killed", SEARCHES[name]) == results(tmp_path / "whole", SEARCHES[name])
    assert everything(tmp_path / "killed") == everything(tmp_path / "whole")


def test_a_search_that_ended_asks_for_nothing(tmp_path):
    run_levels(tmp_path)
    scorer, engine = PathScorer(any_score), ScriptedEngine(write_solution)
    assert run_levels(tmp_path, engine=engine, scorer=scorer).num_problems == 0
    assert not scorer.calls and not engine.most_in_flight


def test_billed_tokens_equal_the_nodes_tokens(tmp_path):
    for name, search in SEARCHES.items():
        progress = run_levels(tmp_path / name, search)
        nodes = [node for opened in open_trees(tmp_path / name).values() for node in opened.tree.nodes]
        assert progress.generated_tokens == sum(len(node.token_ids) for node in nodes)
        assert progress.num_sequences == len(nodes) == len({node.seed for node in nodes})


@pytest.mark.parametrize("name", list(SEARCHES))
def test_faults_change_nothing(tmp_path, name):
    """With a third of all requests failing, the results must equal those without faults."""
    run_levels(tmp_path / "flawless", SEARCHES[name], make_problems(20))
    engine = FaultyEngine(0.3)
    progress = run_levels(
        tmp_path / "faulty", SEARCHES[name], make_problems(20), engine=engine, max_failures=50, problem_attempts=50
    )
    assert progress.num_failures > 5 and progress.closed == {"done": 20}
    assert everything(tmp_path / "faulty") == everything(tmp_path / "flawless")


def test_problems_with_faults_wait_for_the_next_start(tmp_path):
    """They are tried twice and closed as errors. The next start requests only what is missing."""
    progress = run_levels(tmp_path / "a", SEARCHES["trees"], engine=FaultyEngine(0.5), max_failures=50)
    assert progress.closed["error"] >= 2
    missing = run_levels(tmp_path / "a", SEARCHES["trees"])
    assert missing.num_problems == progress.closed["error"] and missing.closed == {"done": missing.num_problems}
    run_levels(tmp_path / "b", SEARCHES["trees"])
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_an_engine_that_is_down_stops_the_run(tmp_path):
    """Otherwise a night of failures would look like a finished run whose problems have no solution."""
    with pytest.raises(EngineFatal, match="[4-6] requests failed.*answered 500"):
        run_levels(tmp_path, engine=FaultyEngine(1.0), max_failures=4)
    assert run_levels(tmp_path).closed == {"done": 6}


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.5, -0.1])
def test_nan_score_stops_the_run(tmp_path, bad):
    """NaN compares false with everything, so its step would be selected or not by its position."""

    def score(path: list[str]) -> float:
        return bad if len(path) == 2 else 0.5

    with pytest.raises(ValueError, match=r"problem 'p00\d'.*(nan|inf|1.5|-0.1)"):
        run_levels(tmp_path, score=score)
    depths = {len(opened.tree.path(i)) for opened in open_trees(tmp_path).values() for i in opened.scores}
    assert depths == {1}
    run_levels(tmp_path, score=lambda path: 0.5)
    with EventLog(log_of(tmp_path)) as log:
        assert [problem.status for problem in log.problems.values()] == ["done"] * 6


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda trees: [[0.5]] * len(trees), r"1 scores for \d steps"),
        (lambda trees: [], "0 trees.*6"),
    ],
)
def test_a_scorer_that_miscounts_stops_the_run(tmp_path, scorer, message):
    """Scores would be assigned to other steps."""
    with pytest.raises(ValueError, match=message):
        run_levels(tmp_path, scorer=scorer)


def test_path_too_long_for_the_reward_model_ends(tmp_path):
    """Such a path is a dead end of its problem. It must not stop the run or score 0."""
    run_levels(tmp_path, score=lambda path: 0.5 if len(path) < 3 else None)
    found = results(tmp_path, SEARCHES["greedy"])
    assert {len(path) for endings in found.values() for _, path, _, _, _ in endings} <= {1, 2}
    assert "dead_end" in {endings[0][0] for endings in found.values()}
    assert run_levels(tmp_path).num_problems == 0


def test_path_too_long_for_the_policy_ends(tmp_path):
    """A prefix that fills the policy's context is not a failure of the engine."""

    class Short(ScriptedEngine):
        async def sample(self, prefix_ids, *args, **kwargs):
            if len(prefix_ids) > self.limit:
                raise PrefixTooLong("no room")
            return await super().sample(prefix_ids, *args, **kwargs)

    engine = Short(write_solution)
    engine.limit = len(PROMPT.encode(engine.tokenizer, "What is 5 - 5 + 7?")) + 30
    assert run_levels(tmp_path / "a", problems=make_problems(20), engine=engine, max_failures=1).closed == {"done": 20}
    reasons = Counter(endings[0][0] for endings in results(tmp_path / "a", SEARCHES["greedy"]).values())
    assert reasons["dead_end"] > 2
    engine.limit = 10
    assert run_levels(tmp_path / "b", engine=engine, max_failures=1).closed == {"prompt_too_long": 6}


def test_references_are_checked_before_anything_is_sampled(tmp_path):
    """More problems wait than may be open. Those that cannot be graded must not end the run."""
    problems = [(i, Problem(p.problem_id, p.prompt, "7" if i > 3 else "?")) for i, p in make_problems(6)]
    grader = ExactGrader(unreadable=("?",))
    progress = run_levels(tmp_path, problems=problems, grader=grader, max_open_problems=2)
    assert progress.closed == {"ungradable": 4, "done": 2}


def test_a_problem_that_changed_is_refused(tmp_path):
    run_levels(tmp_path)
    changed = [(i, Problem(p.problem_id, p.prompt, "9")) for i, p in make_problems(6)]
    with pytest.raises(ValueError, match='answer was "7" and is "9"'):
        run_levels(tmp_path, problems=changed)


def test_a_request_larger_than_the_bound_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`max_in_flight` is 5.*6"):
        run_levels(tmp_path, SEARCHES["beam"], max_in_flight=5)


def test_accuracy_depends_on_the_scores(tmp_path):
    """
    A scorer that knows the truth solves all problems that have a good step at each depth, (1 - 2^-4)^3 = 0.82. One that
    knows nothing solves as many as a single solution, 2^-3. One that is always wrong solves almost none. A search that
    ignores the scores would give the same number for all three.
    """
    scorers = {
        "planted": lambda path: float(not any("bad" in step for step in path)),
        "random": any_score,
        "adversarial": lambda path: float(sum("bad" in step for step in path)) / 4,
    }
    search = GreedyStepSearch(num_candidates=4, **LIMITS)
    accuracy = {}
    for name, score in scorers.items():
        run_levels(tmp_path / name, search, make_problems(150), score, write_coins)
        endings = [found[0] for found in results(tmp_path / name, search).values()]
        assert {reason for reason, *_ in endings} == {"final"}
        accuracy[name] = sum(correct for *_, correct in endings) / len(endings)
    assert abs(accuracy["planted"] - (15 / 16) ** 3) < 0.1
    assert abs(accuracy["random"] - 1 / 8) < 0.1
    assert accuracy["adversarial"] < 0.03


@pytest.mark.parametrize("name", list(SEARCHES))
def test_scores_equal_the_reward_models(tmp_path, name):
    """Scoring a depth at a time with siblings, or each path alone, must give equal scores up to float rounding."""
    scorer = StepScorer(tiny_model(max_position_embeddings=1024), tiny_tokenizer(), StepFormat())
    run_levels(tmp_path, SEARCHES[name], make_problems(3), scorer=scorer.score_trees)
    compared = []
    for opened in open_trees(tmp_path).values():
        for i, score in opened.scores.items():
            assert (score is None) != is_step(opened, i)
            if score is not None:
                steps = [opened.tree.step_text(j) for j in opened.tree.path(i)]
                (((*_, alone),),) = scorer.score([opened.tree.problem.prompt], [[steps]])
                compared.append(score)
                assert score == pytest.approx(alone, abs=1e-5)
    assert len(set(compared)) > 20


def test_a_stop_while_the_scorer_works(tmp_path):
    """After Ctrl-C in the middle of a depth, the run must resume from its samples."""

    def stop(trees: list[StepTree]) -> list[list[float]]:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return PathScorer(any_score)(trees)

    with pytest.raises(KeyboardInterrupt):
        run_levels(tmp_path / "a", scorer=stop)
    sampled = sum(len(opened.tree.nodes) for opened in open_trees(tmp_path / "a").values())
    assert sampled == 24
    progress = run_levels(tmp_path / "a")
    run_levels(tmp_path / "b")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    total = sum(len(opened.tree.nodes) for opened in open_trees(tmp_path / "b").values())
    assert progress.num_sequences == total - sampled
