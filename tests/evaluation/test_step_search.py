"""Step searches for several N, from problems to `results.json`: outputs, errors, and what an interruption must not change."""

import json
import math
import random
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest

from trl_hrm import StepFormat
from trl_hrm.cli import main
from trl_hrm.data.export import export
from trl_hrm.data.export_config import ExportConfig
from trl_hrm.evaluation.curves import curve_with_gap
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.evaluation.step_search import StepSearchSettings
from trl_hrm.scoring.candidate_scores import score_fitting
from trl_hrm.scoring.scorer import StepScorer
from trl_hrm.scoring.scoring_config import ScoringConfig
from trl_hrm.search.engines.base import EngineError, EngineFatal, PrefixTooLong, ScriptedEngine
from trl_hrm.search.log import EventLog
from trl_hrm.search.run_folder import Shard
from trl_hrm.step_tree import StepTree

from ..helpers import tiny_model, tiny_tokenizer
from ..search.leveled import any_score
from ..search.policies import KNOWN
from ..search.scripted import PROMPT, RULE, make_problems, write_coins, write_solution
from .step_searches import Grader, PathScores, is_good, numbers, search


@pytest.mark.parametrize("strategy", ["step_search", "beam_search", "diverse_tree_search"])
def test_accuracy_counts_the_chosen_candidates(tmp_path, strategy):
    """Recounted from the rows: the first candidate is the chosen one, and none in its row has a higher score."""
    branching = None if strategy == "step_search" else 2
    results = search(tmp_path, strategy=strategy, n=[4, 2, 8, 1], branching=branching, seed=7)
    right = []
    assert json.loads(json.dumps(asdict(results))) == asdict(load_results(tmp_path))
    assert results.strategy == strategy and results.num_problems == 40
    assert results.n == [1, 2, 4, 8] == [point["n"] for point in results.curves["step_search"]]
    for point in results.curves["step_search"]:
        rows = list(load_candidates(tmp_path, f"candidates-n{point['n']}.jsonl"))
        assert [row.problem_id for row in rows] == [problem.problem_id for _, problem in make_problems(40)]
        right.append([float(row.candidates[0].correct) for row in rows])
        assert point["accuracy"] == pytest.approx(sum(right[-1]) / 40)
        assert point["low"] <= point["accuracy"] <= point["high"]
        for row in rows:
            scores = [candidate.scores[-1] for candidate in row.candidates]
            assert scores == sorted(scores, reverse=True)
            for candidate in row.candidates:
                assert len(candidate.steps) == len(candidate.scores) == 4 and candidate.finish == "stop"
                assert candidate.correct == (candidate.answer == "7") == ("bad" not in candidate.text)
    expected, gap = curve_with_gap("step_search", np.array(right), results.n)
    assert [{name: point[name] for name in expected[0]} for point in results.curves["step_search"]] == expected
    accuracies = [point["accuracy"] for point in results.curves["step_search"]]
    assert accuracies[-1] > 0.8 > 0.4 > accuracies[0]
    assert results.hacking_gap["step_search"] == gap
    assert gap["gap"] == pytest.approx(max(accuracies) - accuracies[-1]) and gap["largest_n"] == 8
    assert results.intervals["accuracy"] == "Wilson score interval over problems"
    answers = Counter(candidate.correct for row in rows for candidate in row.candidates)
    assert results.solutions == {"right": answers[True]} | ({"wrong": answers[False]} if answers[False] else {})
    assert max(len(row.candidates) for row in rows) == (1 if strategy == "step_search" else 4)


def test_cost_equals_the_logs(tmp_path):
    """Each N has its own cost next to its accuracy, and the sum is the cost of the run."""
    scorer = PathScores(any_score)
    results = search(tmp_path, scorer=scorer)
    points = results.curves["step_search"]
    assert [point["policy_num_sequences"] for point in points] == [40 * 4 * n for n in (1, 2, 4)]
    assert [point["policy_num_requests"] for point in points] == [40 * 4] * 3
    assert [point["scorer_num_calls"] for point in points] == [4] * 3 and scorer.num_calls == 12
    assert [point["scorer_num_steps"] for point in points] == [40 * 4 * n for n in (1, 2, 4)]
    cost = results.cost
    assert cost["policy"]["num_tokens"] == sum(point["policy_num_tokens"] for point in points)
    assert cost["scorer"]["num_calls"] == 12 and cost["rest_seconds"] > 0
    with EventLog(tmp_path / "n-4" / "log-00000-of-00001.jsonl") as log:
        nodes = [node for problem_id in log.problems for node in log.read(problem_id).tree.nodes]
        opened = [log.read(problem_id) for problem_id in log.problems]
    assert points[-1]["policy_num_tokens"] == sum(len(node.token_ids) for node in nodes)
    num_tokens = 0  # for each judged path, as if it were scored alone
    for one in opened:
        for i, score in one.scores.items():
            steps = [one.tree.step_text(j) for j in one.tree.path(i)]
            prompt_ids, step_ids = scorer.step_format.encode(scorer.tokenizer, one.tree.problem.prompt, steps)
            num_tokens += len(prompt_ids) + sum(map(len, step_ids))
            assert score is not None
    assert points[-1]["scorer_num_tokens"] == num_tokens
    assert cost["scorer"]["num_tokens"] == sum(point["scorer_num_tokens"] for point in points)
    # additional cost is added, and no additional cost changes nothing
    before = cost
    cost = search(tmp_path, scorer=scorer, problems=[problem for _, problem in make_problems(60)]).cost
    assert cost["scorer"]["num_calls"] == 24 and cost["scorer"]["num_tokens"] > before["scorer"]["num_tokens"]
    again = search(tmp_path, scorer=scorer, problems=[problem for _, problem in make_problems(60)]).cost
    assert again == cost


def test_planted_random_and_adversarial(tmp_path):
    """The three curves must rise, stay level, and fall with a gap above 0."""
    curves, gaps = {}, {}
    scores = {"planted": is_good, "random": any_score, "adversarial": lambda path: 1 - is_good(path)}
    for name, score in scores.items():
        problems = [problem for _, problem in make_problems(60)]
        results = search(tmp_path / name, score, problems=problems, n=[1, 4, 16])
        curves[name] = [point["accuracy"] for point in results.curves["step_search"]]
        gaps[name] = results.hacking_gap["step_search"]
    assert len({curve[0] for curve in curves.values()}) == 1  # one candidate leaves no choice
    assert curves["planted"][-1] == 1.0 and gaps["planted"]["gap"] == 0
    assert abs(curves["random"][-1] - curves["random"][0]) < 0.1
    assert curves["adversarial"][-1] == 0.0
    assert gaps["adversarial"]["gap"] == curves["adversarial"][0] > 0 and gaps["adversarial"]["low"] > 0


class Stopping(ScriptedEngine):
    """Stops the run at a given request."""

    def __init__(self, after: int):
        super().__init__(write_solution)
        self.after = after

    async def sample(self, *args, **kwargs):
        self.after -= 1
        if self.after < 0:
            raise EngineFatal("stop")
        return await super().sample(*args, **kwargs)


@pytest.mark.parametrize("strategy", ["step_search", "beam_search", "diverse_tree_search"])
def test_stopped_ten_times(tmp_path, strategy):
    """Same candidates, numbers and counts as in an uninterrupted run, and nothing is sampled twice."""
    problems = [problem for _, problem in make_problems(20)]
    given = {"score": any_score, "problems": problems, "strategy": strategy, "n": [4, 8]}
    search(tmp_path / "whole", engine=ScriptedEngine(write_solution), **given)
    rng = random.Random(1)
    for _ in range(10):
        with pytest.raises(EngineFatal):
            search(tmp_path / "stopped", engine=Stopping(rng.randint(1, 4)), **given)
        assert not (tmp_path / "stopped" / "results.json").exists()
    search(tmp_path / "stopped", engine=ScriptedEngine(write_solution), **given)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")
    search(tmp_path / "stopped", engine=Stopping(0), **given)  # everything is done
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_shards_make_the_same_results(tmp_path):
    """The last process to finish writes the results, and none exist before."""
    search(tmp_path / "one")
    for index in range(3):
        assert not (tmp_path / "three" / "results.json").exists()
        results = search(tmp_path / "three", shard=Shard(index, 3))
    assert results is not None and results.num_problems == 40
    one, three = numbers(tmp_path / "one"), numbers(tmp_path / "three")
    assert one["rows"] == three["rows"] and one["curves"] == three["curves"] and one["counts"] == three["counts"]


def test_other_settings_are_refused(tmp_path):
    """One log must not hold scores of two reward models."""
    search(tmp_path)
    for given, name in (
        ({"aggregate": "min"}, 'aggregate was "last" and is "min"'),
        ({"reward_model": "other"}, 'reward_model.model was "planted" and is "other"'),
        ({"max_depth": 4}, "search.max_depth was 5 and is 4"),
        ({"scoring": ScoringConfig([1, 2])}, "spans was"),
        ({"seed": 1}, "seed was 42 and is 1"),
    ):
        with pytest.raises(ValueError, match=name):
            search(tmp_path, **given)
    assert search(tmp_path, n=[1, 2, 4, 8]).n == [1, 2, 4, 8]  # a new N is an additional search


def test_a_policy_that_never_answers(tmp_path):
    """Accuracy is 0, with the reason: every path reached the depth limit."""

    def script(prefix: str, rng: random.Random) -> str:
        number = prefix.rsplit("Question:", 1)[1].count("# Step ")
        return f"{'' if number else '# Step 1'}\nGo on {rng.random()}.\n\n# Step {max(number, 1) + 1}\n"

    results = search(tmp_path, engine=ScriptedEngine(script), score=any_score, n=[2])
    assert results.curves["step_search"][0]["accuracy"] == 0
    counts = results.counts
    assert counts["problems_without_solution_at_n2"] == counts["paths_at_the_depth_limit_at_n2"] == 40
    assert counts["candidates_without_answer"] == counts["num_candidates"] == 40
    (row, *_) = load_candidates(tmp_path, "candidates-n2.jsonl")
    (candidate,) = row.candidates
    assert candidate.answer is None and candidate.correct is None and len(candidate.steps) == 5
    assert not candidate.text.rstrip().endswith("# Step 6") and len(candidate.scores) == 5


class Refusing(ScriptedEngine):
    """Fails for one problem."""

    def __init__(self, error):
        super().__init__(write_coins)
        self.error = error

    async def sample(self, prefix_ids, *args, **kwargs):
        if "What is 3 - 3" in self.tokenizer.decode(prefix_ids):
            raise self.error
        return await super().sample(prefix_ids, *args, **kwargs)


def test_what_cannot_be_searched_is_counted(tmp_path):
    """Unreadable references and failed requests are excluded from the accuracy, and counted separately."""
    problems = [problem for _, problem in make_problems(6)]
    problems[1] = replace(problems[1], answer="?")
    given = {"problems": problems, "n": [4], "grader": Grader(unreadable=("?",))}
    results = search(tmp_path, engine=Refusing(EngineError("the server answered 500.")), **given)
    assert results.num_problems == 4
    assert results.counts["problems_ungradable_at_n4"] == 1 == results.counts["problems_error_at_n4"]
    results = search(tmp_path, **given)
    assert results.num_problems == 5 and "problems_error_at_n4" not in results.counts
    with pytest.raises(ValueError, match="problems_ungradable_at_n4': 1"):
        search(tmp_path / "none", **given | {"problems": [problems[1]]})


def test_prompts_too_long_for_the_policy(tmp_path):
    """They are skipped and counted as in `best_of_n`. Counted as wrong, they would make the two curves incomparable."""
    problems = [problem for _, problem in make_problems(6)]
    results = search(tmp_path, engine=Refusing(PrefixTooLong("no room")), problems=problems, n=[4])
    assert results.num_problems == 5 == len(list(load_candidates(tmp_path, "candidates-n4.jsonl")))
    assert results.counts["problems_prompt_too_long_at_n4"] == 1 and results.counts["num_candidates"] == 5


def test_pending_problems_of_another_process_are_counted(tmp_path):
    """Two processes get more problems. The first to finish sees the other's earlier parts."""
    given = {"problems": [problem for _, problem in make_problems(10)], "n": [2]}
    for index in range(2):
        search(tmp_path, shard=Shard(index, 2), **given)
    given["problems"] = [problem for _, problem in make_problems(30)]
    results = search(tmp_path, shard=Shard(0, 2), **given)
    missing = results.counts["problems_not_searched_at_n2"]
    assert missing > 0 and results.num_problems == 30 - missing
    results = search(tmp_path, shard=Shard(1, 2), **given)
    assert results.num_problems == 30 and "problems_not_searched_at_n2" not in results.counts
    given["problems"] = given["problems"][5:9]  # problems that are only in the logs do not count
    results = [search(tmp_path, shard=Shard(index, 2), **given) for index in range(2)][1]
    assert results.num_problems == 4 and "problems_not_searched_at_n2" not in results.counts
    assert [row.problem_id for row in load_candidates(tmp_path, "candidates-n2.jsonl")] == [
        f"p{i:03d}" for i in range(5, 9)
    ]


def test_no_labels_of_guided_searches(tmp_path):
    """After a step chosen by a reward model, answers are right more often than the policy's own continuations."""
    search(tmp_path / "run", n=[4])
    run = tmp_path / "run" / "n-4"
    for name in (run, run / "nodes-00000-of-00001.parquet"):
        for view in ("tree", "hrm", "prm", "orm"):
            config = ExportConfig(inputs=str(name), output_dir=str(tmp_path / view), view=view)
            with pytest.raises(ValueError, match="n-4: .*--view sft"):
                export(config)
            assert not (tmp_path / view).exists()
    report = export(ExportConfig(inputs=[str(run)], output_dir=str(tmp_path / "sft"), view="sft"))
    assert report["notes"]["solutions_found"] > 20


def test_an_answer_that_cannot_be_read_is_wrong(tmp_path):
    """As in `best_of_n`. Otherwise the two curves would not be comparable."""
    results = search(tmp_path, grader=Grader(unreadable=("8",)), n=[1])
    right = sum(row.candidates[0].answer == "7" for row in load_candidates(tmp_path, "candidates-n1.jsonl"))
    assert results.curves["step_search"][0]["accuracy"] == pytest.approx(right / 40) and 0 < right < 40
    assert results.counts["candidates_unreadable"] == 40 - right and results.counts["not_graded"] == 0


def test_a_nan_score_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="nan"):
        search(tmp_path, lambda path: math.nan)
    assert not (tmp_path / "results.json").exists()


def test_shapes():
    """If N is less than the branching factor, N becomes the branching factor. Any other N must be a multiple of it."""
    config = StepSearchSettings("x", [1, 2, 4, 8], "beam_search")
    shapes = {n: tuple(found.shape) for n, found in config.searches(PROMPT, RULE).items()}
    assert shapes == {1: (1, 1, 1), 2: (1, 1, 2), 4: (1, 1, 4), 8: (1, 2, 4)}
    config = StepSearchSettings("x", [8, 1, 2, 4], "diverse_tree_search", branching=2)
    shapes = {n: tuple(found.shape) for n, found in config.searches(PROMPT, RULE).items()}
    assert shapes == {1: (1, 1, 1), 2: (1, 1, 2), 4: (2, 1, 2), 8: (4, 1, 2)}
    assert all(found.n == n for n, found in config.searches(PROMPT, RULE).items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "best"}, "`strategy` is 'best'.*step_search"),
        ({"branching": 2}, "step_search always samples N next steps of one path"),
        ({"strategy": "beam_search", "n": [6]}, "6 is not a multiple of `branching`"),
        ({"strategy": "beam_search", "branching": 0}, "`branching` is 0"),
        ({"n": [0, 1]}, r"`n` is \[0, 1\]"),
        ({"n": []}, r"`n` is \[\]"),
    ],
)
def test_options_that_do_not_go_together(given, message):
    with pytest.raises(ValueError, match=message):
        StepSearchSettings(**{"output_dir": "x", "n": [4]} | given)


@pytest.mark.parametrize("spans", [(1,), (1, 2)])
def test_steps_too_long_for_the_reward_model_have_no_score(spans):
    """The other steps keep their scores. The limit is the model's, including merged steps."""
    step_format = StepFormat(merge_separator="\n")
    scorer = StepScorer(tiny_model(step_format), tiny_tokenizer(), step_format)
    trees = [
        StepTree("1+2?", ["add x", "so y", "add " * 30, "thus 3"], [None] * 4, [-1, 0, 0, 1]),
        StepTree("sub " * 40, ["x"], [None], [-1]),
        StepTree("2?", ["y"], [None], [-1]),
    ]
    free = score_fitting(scorer, trees, ScoringConfig(spans))
    assert free == scorer.score_trees(trees, spans)
    scorer.max_positions = 40
    found = score_fitting(scorer, trees, ScoringConfig(spans))
    assert found[0][2] is None and found[1] == [None]
    expected = [[*free[0][:2], None, free[0][3]], [None], free[2]]
    assert [[score and round(score, 5) for score in one] for one in found] == [
        [score and round(score, 5) for score in one] for one in expected
    ]


@pytest.mark.parametrize("spans", [(1,), (1, 2), (1, 2, 3)])
def test_too_long_is_what_the_scorer_refuses(spans):
    """At every limit, including merged steps: one more would stop a long run near its end, and one less would lose a path."""
    step_format = StepFormat(merge_separator="\n and then\n")
    scorer = StepScorer(tiny_model(step_format), tiny_tokenizer(), step_format)
    tree = StepTree("1+2?", ["add x", "so y", "sub 3", "thus", "= 7"], [None] * 5, [-1, 0, 1, 0, 3])
    found = set()
    for limit in range(2, 70, 2):
        scorer.max_positions = limit
        scores = score_fitting(scorer, [tree], ScoringConfig(spans))[0]
        for i, score in enumerate(scores):
            steps = [tree.completions[j] for j in tree.path(i)]
            if score is None:
                with pytest.raises(ValueError, match=f"{limit} positions"):
                    scorer.score([tree.prompt], [[steps]], spans)
            else:
                assert score == pytest.approx(scorer.score([tree.prompt], [[steps]], spans)[0][0][-1], abs=1e-5)
        found.add(tuple(score is None for score in scores))
    assert {(True,) * 5, (False,) * 5} < found and len(found) >= 4


def test_the_command_with_real_models(tmp_path, policy, capsys):
    """From the command line: a policy that has memorised four problems, and a reward model with random weights."""
    tiny_model().save_pretrained(tmp_path / "hrm")
    tiny_tokenizer().save_pretrained(tmp_path / "hrm")
    StepFormat().save(tmp_path / "hrm")
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in KNOWN))
    command = (
        "step-search "
        f"--strategy diverse_tree_search --n 2 4 --branching 2 --aggregate last --problems {tmp_path}/problems.jsonl "
        f"--policy {policy} --engine transformers --reward_model {tmp_path}/hrm --output_dir {tmp_path}/run "
        "--prompt question --prompt_style plain --segmentation step_header --max_depth 5 --max_step_tokens 40"
    )
    assert main([*command.split(), "--final_stops", "# END!"]) == 0
    results = load_results(tmp_path / "run")
    assert results.n == [2, 4] and results.num_problems == 4 and results.policy["model"] == policy
    assert (
        results.versions["torch"] and results.versions["sympy"] and results.reward_model["model"] == f"{tmp_path}/hrm"
    )
    rows = list(load_candidates(tmp_path / "run", "candidates-n4.jsonl"))
    candidates = [candidate for row in rows for candidate in row.candidates]
    assert sum(candidate.answer is not None for candidate in candidates) >= 6
    scorer = StepScorer.from_pretrained(str(tmp_path / "hrm"))
    for row in rows:
        alone = scorer.score([row.problem], [[candidate.steps for candidate in row.candidates]])[0]
        for candidate, scores in zip(row.candidates, alone, strict=True):
            assert candidate.scores == pytest.approx(scores, abs=1e-5)
