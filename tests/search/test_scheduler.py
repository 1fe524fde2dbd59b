"""Results must not depend on the order of answers, kills, shards or engine faults."""

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_hrm.search.engines.base import EngineFatal, PrefixTooLong, Sample, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.open_tree import OpenTree
from trl_hrm.search.policies import RootFilter
from trl_hrm.search.run_folder import Shard, launched_shard, problem_shard
from trl_hrm.search.step_search import GreedyStepSearch
from trl_hrm.search.tree import Problem

from .scripted import (
    FINAL,
    PROMPT,
    RULE,
    SEARCHES,
    ExactGrade,
    ExactGrader,
    FaultyEngine,
    make_problems,
    read_trees,
    run_scripted,
    some_latency,
    write_solution,
)


def no_latency(rng: random.Random) -> float:
    return 0.0


class LyingEngine(ScriptedEngine):
    """Change the returned samples."""

    def __init__(self, change):
        super().__init__(write_solution)
        self.change = change

    async def sample(self, *args, **kwargs):
        return self.change(await super().sample(*args, **kwargs))


@pytest.mark.parametrize("name", list(SEARCHES))
def test_the_order_of_answers_does_not_matter(tmp_path, name):
    """Trees that depend on which server was faster could not be reproduced."""
    plain = run_scripted(tmp_path / "plain", SEARCHES[name], latency=no_latency, max_in_flight=4)
    mixed = run_scripted(tmp_path / "mixed", SEARCHES[name], latency=some_latency, max_in_flight=64)
    assert read_trees(tmp_path / "plain") == read_trees(tmp_path / "mixed")
    assert plain.num_sequences == mixed.num_sequences >= 40


@pytest.mark.parametrize("name", list(SEARCHES))
def test_shards_make_the_same_trees(tmp_path, name):
    """One process or eight must give the same union, and search no problem twice."""
    problems = make_problems(12)
    run_scripted(tmp_path / "one", SEARCHES[name], problems)
    for shard in range(8):
        mine = [(i, p) for i, p in problems if problem_shard(p.problem_id, 8) == shard]
        run_scripted(tmp_path / "eight", SEARCHES[name], mine, shard=(shard, 8))
    assert read_trees(tmp_path / "one") == read_trees(tmp_path / "eight")


def test_another_seed_makes_other_trees(tmp_path):
    run_scripted(tmp_path / "a", seed=1)
    run_scripted(tmp_path / "b", seed=2)
    assert read_trees(tmp_path / "a") != read_trees(tmp_path / "b")


@pytest.mark.parametrize("name", list(SEARCHES))
def test_never_more_in_flight_than_allowed(tmp_path, name):
    engine = ScriptedEngine(write_solution, some_latency)
    progress = run_scripted(tmp_path, SEARCHES[name], make_problems(20), engine=engine, max_in_flight=13)
    assert 10 <= engine.most_in_flight <= 13
    assert progress.most_in_flight == engine.most_in_flight and progress.in_flight == engine.in_flight == 0


def test_billed_tokens_equal_the_nodes_tokens(tmp_path):
    """Segments are pieces of rollouts. Counting them would bill tokens twice."""
    for name, search in SEARCHES.items():
        progress = run_scripted(tmp_path / name, search)
        nodes = [n for tree in read_trees(tmp_path / name).values() for n in tree.nodes if n.role != "segment"]
        assert progress.generated_tokens == sum(len(n.token_ids) for n in nodes)
        assert progress.num_sequences == len(nodes)


def test_ids_and_seeds_are_unique(tmp_path):
    for name, search in SEARCHES.items():
        run_scripted(tmp_path / name, search)
        nodes = [n for tree in read_trees(tmp_path / name).values() for n in tree.nodes]
        assert len({n.node_id for n in nodes}) == len(nodes)
        sampled = [n for n in nodes if n.role != "segment"]
        assert len({n.seed for n in sampled}) == len(sampled)


def test_a_search_that_ended_asks_for_nothing(tmp_path):
    run_scripted(tmp_path)
    engine = ScriptedEngine(write_solution)
    progress = run_scripted(tmp_path, engine=engine)
    assert progress.num_problems == 0 and engine.most_in_flight == 0


def test_more_problems_may_follow(tmp_path):
    run_scripted(tmp_path / "a", problems=make_problems(3))
    assert run_scripted(tmp_path / "a", problems=make_problems(6)).num_problems == 3
    run_scripted(tmp_path / "b", problems=make_problems(6))
    assert read_trees(tmp_path / "a") == read_trees(tmp_path / "b")


@pytest.mark.parametrize("name", list(SEARCHES))
def test_cut_after_any_event_and_resumed(tmp_path, name):
    """A kill between any two events, or within a line, must change no row and repeat no request."""
    whole = tmp_path / "whole"
    run_scripted(whole, SEARCHES[name], make_problems(2), max_in_flight=20)
    expected, log = read_trees(whole), (whole / "log-00000-of-00001.jsonl").read_bytes()
    lines = log.splitlines(keepends=True)
    assert len(lines) > 10
    for kept in range(len(lines)):
        for half in (0, len(lines[kept]) // 2) if kept % 5 == 0 else (0,):
            folder = tmp_path / f"{kept}-{half}"
            folder.mkdir()
            torn = b"".join(lines[:kept]) + lines[kept][:half]
            (folder / "log-00000-of-00001.jsonl").write_bytes(torn)
            run_scripted(folder, SEARCHES[name], make_problems(2), max_in_flight=20)
            assert read_trees(folder) == expected
            resumed = (folder / "log-00000-of-00001.jsonl").read_bytes()
            assert sorted(map(len, resumed.splitlines())) == sorted(map(len, log.splitlines()))


@pytest.mark.parametrize(
    ("name", "num_kills"),
    [
        ("full_tree", 8),
        pytest.param("puct", 20, marks=pytest.mark.slow),  # the same log and replay
        pytest.param("rollouts", 8, marks=pytest.mark.slow),
        pytest.param("filtered", 8, marks=pytest.mark.slow),
    ],
)
def test_kills(tmp_path, name, num_kills):
    """Many SIGKILLs of a real process at random moments must give the rows of an uninterrupted run."""
    number = 2 * num_kills
    run_scripted(tmp_path / "whole", SEARCHES[name], make_problems(number))
    program = [sys.executable, "-m", "tests.search.scripted", str(tmp_path / "killed"), name, str(number), "0.05"]
    rng = random.Random(7)
    log = tmp_path / "killed" / "log-00000-of-00001.jsonl"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    kills, sizes = 0, []
    while kills < num_kills:
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while process.poll() is None and (not log.exists() or log.stat().st_size <= before):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode != -signal.SIGKILL:
            break
        kills += 1
        sizes.append(log.stat().st_size)
    assert kills == len(set(sizes)) == num_kills, "the run ended too early to be killed as often"
    done = Counter(problem.status for problem in EventLog(log).problems.values())
    assert done["open"], "every problem was done before the last kill"
    run_scripted(tmp_path / "killed", SEARCHES[name], make_problems(number))
    assert read_trees(tmp_path / "killed") == read_trees(tmp_path / "whole")


def test_faults_never_become_labels(tmp_path):
    """If a third of all requests fails, the trees must not change, and no failure may leave a node."""
    run_scripted(tmp_path / "flawless")
    progress = run_scripted(tmp_path / "faulty", engine=FaultyEngine(0.3), max_failures=50, problem_attempts=50)
    assert progress.num_failures > 5 and progress.closed == {"done": 6}
    assert read_trees(tmp_path / "faulty") == read_trees(tmp_path / "flawless")


def test_problems_with_faults_wait_for_the_next_start(tmp_path):
    """They are closed as errors and not exported. The next start requests only what is missing."""
    progress = run_scripted(tmp_path, engine=FaultyEngine(0.3), max_failures=50, problem_attempts=1)
    assert progress.closed["error"] >= 2
    missing = run_scripted(tmp_path)
    assert missing.num_problems == progress.closed["error"] and missing.closed == {"done": missing.num_problems}
    run_scripted(tmp_path / "whole")
    trees = read_trees(tmp_path / "whole")
    assert read_trees(tmp_path) == trees
    total = sum(n.role != "segment" for tree in trees.values() for n in tree.nodes)
    assert progress.num_sequences + missing.num_sequences == total


def test_an_engine_that_is_down_stops_the_run(tmp_path):
    """Otherwise a night of failures would look like a finished run without data."""
    with pytest.raises(EngineFatal, match="4 requests failed.*answered 500"):
        run_scripted(tmp_path, engine=FaultyEngine(1.0), max_failures=4)
    assert run_scripted(tmp_path).closed == {"done": 6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda samples: samples[:-1], "2 samples.*`n`"),
        (lambda samples: [*samples, samples[0]], "4 samples"),
        (lambda samples: [Sample([97], "a", "abort")] * 3, "'abort'.*stop, eos, length"),
        (lambda samples: [Sample([97], "a", "stop", "# Step 2")] * 3, "its text does not contain it"),
        (lambda samples: [Sample([97], "a", "stop")] * 3, "by None"),
        (lambda samples: [Sample([2**31], "a", "length")] * 3, "token ids are"),
        (lambda samples: [Sample([98], "a", "length")] * 3, "text is 'a', but its token ids are the text 'b'"),
    ],
)
def test_invalid_samples_never_reach_the_log(tmp_path, change, message):
    """More or fewer samples than requested would bias every value above them, and the log could never be exported."""
    with pytest.raises(EngineFatal, match=f"5 requests failed in a row.*{message}"):
        run_scripted(tmp_path, engine=LyingEngine(change), max_failures=5)
    assert all(not tree.nodes for tree in read_trees(tmp_path).values())
    run_scripted(tmp_path)
    run_scripted(tmp_path / "flawless")
    assert read_trees(tmp_path) == read_trees(tmp_path / "flawless")


def test_a_fault_of_the_grader_stops_the_run(tmp_path):
    """If the loop swallowed an exception in a task, it would wait forever."""

    class Broken:
        async def agrade(self, answer, reference):
            raise OSError("the grader is gone")

    with pytest.raises(OSError, match="the grader is gone"):
        run_scripted(tmp_path, grader=Broken())


def test_stopped_run_cancels_all_tasks(tmp_path):
    """On Ctrl-C, requests in flight must be cancelled, and the log must be resumable."""

    class Stopping(ScriptedEngine):
        async def sample(self, *args, **kwargs):
            if self.most_in_flight > 20:
                os.kill(os.getpid(), signal.SIGINT)
            return await super().sample(*args, **kwargs)

    engine = Stopping(write_solution, some_latency)
    with pytest.raises(KeyboardInterrupt):
        run_scripted(tmp_path / "a", engine=engine)
    assert engine.in_flight == 0
    run_scripted(tmp_path / "a")
    run_scripted(tmp_path / "b")
    assert read_trees(tmp_path / "a") == read_trees(tmp_path / "b")


def test_a_problem_that_changed_is_refused(tmp_path):
    """Labels for the old answer would be mixed with labels for the new one."""
    changed = [(i, Problem(p.problem_id, p.prompt, "9")) for i, p in make_problems(6)]
    for name, share in (("open", 0.3), ("closed", 0.0)):
        run_scripted(tmp_path / name, engine=FaultyEngine(share), max_failures=50, problem_attempts=1)
        with pytest.raises(ValueError, match='answer was "7" and is "9"'):
            run_scripted(tmp_path / name, problems=changed)


def test_a_request_larger_than_the_bound_is_refused(tmp_path):
    """It could never be sent, and the loop would end as if all were done."""
    with pytest.raises(ValueError, match="`max_in_flight` is 2.*3"):
        run_scripted(tmp_path, max_in_flight=2)


def test_a_step_search_needs_a_reward_model(tmp_path):
    """Without scores no beam would advance, and each problem would end after its first step."""
    with pytest.raises(ValueError, match="`score` is missing.*GreedyStepSearch"):
        run_scripted(tmp_path, GreedyStepSearch(num_candidates=2, rule=RULE))


def test_the_filter_does_not_hide_a_larger_request(tmp_path):
    """The first request fits and a later one does not. The run must fail before anything is sampled."""
    search = RootFilter(SEARCHES["rollouts"], 2, FINAL)
    with pytest.raises(ValueError, match="`max_in_flight` is 3.*4"):
        run_scripted(tmp_path, search, max_in_flight=3)


def test_fault_is_printed_once(tmp_path, capfd):
    """asyncio prints exceptions that are never read, such as those of the other failing requests."""

    class Refusing(ScriptedEngine):
        async def sample(self, *args, **kwargs):
            await asyncio.sleep(0.01)
            raise EngineFatal("401: no such key")

    with pytest.raises(EngineFatal, match="401"):
        run_scripted(tmp_path, problems=make_problems(40), engine=Refusing(write_solution))
    gc.collect()
    assert capfd.readouterr().err == ""


def test_full_context_is_a_cut_off_solution(tmp_path):
    """A full context is not an engine failure. Otherwise three such problems would stop the run."""

    class Short(ScriptedEngine):
        async def sample(self, prefix_ids, *args, **kwargs):
            if len(prefix_ids) > self.limit:
                raise PrefixTooLong("no room")
            return await super().sample(prefix_ids, *args, **kwargs)

    engine = Short(write_solution)
    engine.limit = len(PROMPT.encode(engine.tokenizer, "What is 5 - 5 + 7?")) + 30
    progress = run_scripted(tmp_path / "a", engine=engine, max_failures=1)
    assert progress.closed == {"done": 6} and progress.num_failures == 0
    trees = read_trees(tmp_path / "a")
    whole = run_scripted(tmp_path / "b") and read_trees(tmp_path / "b")
    assert sum(len(t.nodes) for t in trees.values()) < sum(len(t.nodes) for t in whole.values())
    assert run_scripted(tmp_path / "a").num_problems == 0
    engine.limit = 10
    assert run_scripted(tmp_path / "c", engine=engine, max_failures=1).closed == {"prompt_too_long": 6}


def test_references_are_checked_again_after_a_stop(tmp_path):
    """A run stopped between the first event and the check must check again. Otherwise no answer would be graded."""
    grader = ExactGrader(unreadable=("7",))
    run_scripted(tmp_path, grader=grader)
    log = tmp_path / "log-00000-of-00001.jsonl"
    log.write_bytes(b"".join(line for line in log.read_bytes().splitlines(keepends=True) if b'"close"' not in line))
    progress = run_scripted(tmp_path, grader=grader)
    assert progress.closed == {"ungradable": 6} and progress.num_sequences == 0


def test_grader_timeout_on_a_reference_is_retried(tmp_path):
    """A timeout says nothing about the reference, so the problem must wait for the next start."""

    class Slow(ExactGrader):
        async def agrade(self, answer, reference):
            return ExactGrade(None, "timeout")

    assert run_scripted(tmp_path, grader=Slow()).closed == {"error": 6}
    assert run_scripted(tmp_path).closed == {"done": 6}


def test_many_problems_share_the_engine(tmp_path):
    """A slow request of one problem must not block the others at a barrier between depths."""
    seen = []

    class Slow(ScriptedEngine):
        async def sample(self, prefix_ids, *args, **kwargs):
            is_slow = "What is 0 - 0" in self.tokenizer.decode(prefix_ids)
            await asyncio.sleep(0.5 if is_slow else 0)
            seen.append(is_slow)
            return await super().sample(prefix_ids, *args, **kwargs)

    run_scripted(tmp_path, problems=make_problems(6), engine=Slow(write_solution))
    assert seen.count(False) > 30 and not any(seen[:30])


def test_few_problems_are_open_at_a_time(tmp_path, monkeypatch):
    """Open problems bound the memory, so the deepest node of the oldest problem goes first."""
    opened: list[int] = []
    apply = OpenTree.apply

    def watch(self, event):
        apply(self, event)
        if event["event"] == "samples":
            opened.append(self.position)

    monkeypatch.setattr(OpenTree, "apply", watch)
    run_scripted(tmp_path, problems=make_problems(30), latency=some_latency, max_in_flight=6, max_open_problems=3)
    assert all(len({*opened[:k]} & {*opened[k:]}) <= 3 for k in range(len(opened)))
    assert len(set(opened)) == 30


def test_shards_by_id():
    """The expected values are fixed, so shards are stable across machines and Python's hash seed."""
    assert [problem_shard(f"p{i}", 4) for i in range(6)] == [problem_shard(f"p{i}", 4) for i in range(6)]
    assert Counter(problem_shard(str(i), 4) for i in range(4000)).most_common()[-1][1] > 900
    assert problem_shard("anything", 1) == 0


def test_shards_of_launched_processes(monkeypatch):
    """The processes of machine 1 of 2 are parts 4 to 7 of 8. An engine that sees WORLD_SIZE waits for the others."""
    assert launched_shard("3/16") == (3, 16, None)
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert launched_shard("1/2") == (6, 8, 2)
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & os.environ.keys()


@pytest.mark.parametrize("text", ["3", "3/3", "0/0", "-1/2", "1/2/3", "a/2", ""])
def test_bad_shards(text):
    """A shard that does not exist would search no problem and report success."""
    with pytest.raises(ValueError, match="must be I/N"):
        Shard.parse(text)
    assert Shard.parse("2/3") == (2, 3, None)
