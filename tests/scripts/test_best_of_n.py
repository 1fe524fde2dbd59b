"""The command `best-of-n`: from candidates or a policy to curves, on one and two processes, killed and resumed."""

import json
import os
import random
import re
import socket
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import yaml

from trl_hrm import BestOfNConfig, StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.evaluation.best_of_n import wait_for_parts
from trl_hrm.evaluation.curves import INTERVALS
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.io import AppendedLines
from trl_hrm.scoring.aggregate import AGGREGATES, aggregate
from trl_hrm.scripts import best_of_n
from trl_hrm.search.outcomes import describe_outcomes
from trl_hrm.search.run_folder import read_summary
from trl_hrm.search.steps import RULES, cut_text

from ..fakes import write_rows
from ..helpers import save_checkpoint, tiny_model, tiny_tokenizer
from ..search.policies import KNOWN


ROOT = Path(__file__).resolve().parents[2]


class Planted:
    """Scores a step by the number in it, and records the steps that it scored."""

    def __init__(self):
        self.tokenizer, self.step_format, self.max_positions = tiny_tokenizer(), StepFormat(), None
        self.shown: list[tuple[str, list[list[str]]]] = []
        self.stop_after: int | None = None

    def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
        if self.stop_after == len(self.shown):
            raise KeyboardInterrupt
        self.shown += zip(prompts, candidates, strict=True)
        return [
            [[float(re.search(r"nan|0\.\d+", step)[0]) for step in steps] for steps in group] for group in candidates
        ]


@pytest.fixture
def planted(monkeypatch) -> Planted:
    scorer = Planted()
    monkeypatch.setattr(BestOfNConfig, "load_scorer", lambda config, *_: scorer)
    monkeypatch.setattr(BestOfNConfig, "describe_identity", lambda config, scorer: {})  # there is no checkpoint
    return scorer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=1024)


def solution(answer: int | None, *scores: float) -> str:
    steps = [f"# Step {k}\nI am worth {score}." for k, score in enumerate(scores, start=1)]
    return "\n\n".join(steps) + ("" if answer is None else f"\n\n# Answer\n\n{answer}\n# END!")


def make_rows(num_problems: int, size: int, seed: int = 0) -> list[dict]:
    rng = random.Random(seed)
    return [
        {
            "prompt": f"What is {i}?",
            "answer": str(i),
            "candidates": [
                solution(
                    rng.choice([i, i, i + 1, i + 2, None]),
                    *(rng.randrange(10, 100) / 100 for _ in range(rng.randint(1, 3))),
                )
                for _ in range(size)
            ],
        }
        for i in range(num_problems)
    ]


def rescore(folder: Path, source: str, *more: str, model: str = "planted") -> int:
    words = ["best-of-n", "--candidates", source, "--reward_model", model, "--output_dir", str(folder)]
    return main([*words, *(() if "--n" in more else ("--n", "1", "2", "4")), *more])


def test_given_candidates(tmp_path, planted, capsys):
    """Every number of the result is recomputed here from the texts alone."""
    rows = make_rows(12, 4)
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), "--aggregate", "min", "last") == 0
    results = load_results(tmp_path / "out")
    for name in ("min", "last"):
        for point in results.curves[f"best_of_n/{name}"]:
            right = []
            for row in rows:
                for texts in combinations(row["candidates"], point["n"]):
                    best = min(
                        texts,
                        key=lambda text: (-aggregate(list(map(float, re.findall(r"0\.\d+", text))), name), text),
                    )
                    right.append(f"# Answer\n\n{row['answer']}\n" in best)
            assert point["accuracy"] == pytest.approx(sum(right) / len(right))
            assert point["low"] <= point["accuracy"] <= point["high"]
    assert [point["n"] for point in results.curves["majority_vote"]] == [1, 2, 4] == results.n
    assert list(results.curves) == [
        "best_of_n/min",
        "best_of_n/last",
        "weighted_vote/min",
        "weighted_vote/last",
        "majority_vote",
        "pass_at_n",
    ]
    assert list(results.hacking_gap) == list(results.curves)[:4]
    assert (results.strategy, results.policy, results.seed, results.num_problems) == ("best_of_n", None, 42, 12)
    assert results.reward_model["model"] == "planted" and results.settings["aggregate"] == ["min", "last"]
    assert (
        results.settings["extractors"] == ["marker", "tag", "boxed", "hash", "answer_is"]
        and results.versions["trl_hrm"]
    )
    bins = results.calibration["bins"]
    assert results.calibration["aggregate"] == "min" and sum(one["count"] for one in bins) == 48
    worth = [min(map(float, re.findall(r"0\.\d+", text))) for row in rows for text in row["candidates"]]
    assert sum(one["mean_score"] * one["count"] for one in bins) == pytest.approx(sum(worth))
    silent = sum("# Answer" not in text for row in rows for text in row["candidates"])
    assert results.counts["candidates_without_answer"] == silent > 0
    assert results.counts["num_candidates"] == 48 and results.counts["problems_without_answer"] == 0
    right = sum(
        candidate.correct is True for problem in load_candidates(tmp_path / "out") for candidate in problem.candidates
    )
    assert results.solutions == {"right": right, "wrong": 48 - silent - right, "without_answer": silent}
    assert results.intervals == INTERVALS and results.warnings == []
    assert results.cost["policy"] is None and results.cost["scorer"]["num_calls"] == 1
    assert results.cost["scorer"]["num_steps"] == sum(
        text.count("# Step") for row in rows for text in row["candidates"]
    )
    assert planted.shown[3][0] == "What is 3?" and len(planted.shown) == 12
    candidates = list(load_candidates(tmp_path / "out"))
    assert [[c.text for c in problem.candidates] for problem in candidates] == [row["candidates"] for row in rows]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["candidates.jsonl", "results.json"]
    printed = capsys.readouterr().out
    assert re.search(r"best_of_n/min +\d+\.\d +\d+\.\d", printed) and "hacking gap of best_of_n/min" in printed
    assert f"Next: trl-hrm report {tmp_path / 'out'} --output report.html" in printed


def test_given_grades(tmp_path, planted, capsys):
    """Accuracies must follow the grades given with the candidates, even where the answers contradict them."""
    rows = make_rows(6, 4)
    for row in rows:
        row["correct"] = [text != row["candidates"][0] for text in row["candidates"]]
        del row["answer"]
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), "--aggregate", "min") == 0
    results = load_results(tmp_path / "out")
    assert results.curves["pass_at_n"][0]["accuracy"] == pytest.approx(
        sum(sum(row["correct"]) / 4 for row in rows) / 6
    )
    assert results.curves["best_of_n/min"][0]["accuracy"] == 0.75
    assert results.counts["problems_with_given_grades"] == 6 and results.counts["problems_without_answer"] == 0
    assert "candidates of 6 problems came with grades" in capsys.readouterr().out
    judged = list(load_candidates(tmp_path / "out"))
    assert [[c.correct for c in problem.candidates] for problem in judged] == [row["correct"] for row in rows]


def test_columns_of_candidates_and_of_problems(tmp_path, planted, capsys):
    """With both files, each column option applies to one of them."""
    rows = make_rows(4, 4)
    samples = [{"q": row["prompt"], "outputs": row["candidates"], "gold": row["answer"]} for row in rows]
    known = [{"Question": row["prompt"], "info": {"gold": row["answer"]}} for row in rows] + [{"Question": "x"}]
    source, problems = write_rows(tmp_path / "in.jsonl", samples), write_rows(tmp_path / "p.jsonl", known)
    assert rescore(tmp_path / "a", source, "--columns", "prompt=q", "candidates=outputs", "answer=gold") == 0
    words = ["--problems", problems, "--columns", "problem=Question", "answer=info.gold"]
    assert rescore(tmp_path / "b", source, *words, "--candidates_columns", "prompt=q", "candidates=outputs") == 0
    found = [load_results(tmp_path / name) for name in "ab"]
    assert found[0].curves == found[1].curves and found[1].counts["problem_records_left_out"] == 1
    assert f"warning: 1 row dropped (no answer): {problems}:5" in capsys.readouterr().out
    assert rescore(tmp_path / "c", source, "--candidates_columns", "prompt=q") == 1
    assert "`candidates_columns` has no effect without `problems`" in capsys.readouterr().err
    assert rescore(tmp_path / "c", source, *words, "--strict", "--candidates_columns", "prompt=q") == 1
    assert "p.jsonl:5: found no answer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "n"), [(10, [1, 2, 4, 8, 10]), (8, [1, 2, 4, 8]), (1, [1]), (70, [1, 2, 4, 8, 16, 32, 64])]
)
def test_the_shortest_command(tmp_path, monkeypatch, planted, size, n):
    """Without a folder and N, the largest N for all problems is used, and all candidates of each problem."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(2, size) + make_rows(3, size + 2)[2:]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert main(["best-of-n", "--candidates", source, "--reward_model", "m", "--aggregate", "min", "last"]) == 0
    results = load_results(tmp_path / "outputs" / "best-of-n")
    assert results.n == n == results.settings["n"]
    assert results.counts["num_candidates"] == 3 * size + 2
    assert (results.estimate["min_candidates"], results.estimate["max_candidates"]) == (size, size + 2)


@pytest.mark.parametrize("name", AGGREGATES)
def test_each_aggregate_is_used(tmp_path, planted, name):
    """Each aggregate prefers a different solution, and only the tested aggregate's choice is right."""
    worth = {
        "min": (0.4, 0.4, 0.4),
        "prod": (0.7, 0.3),
        "last": (0.1, 0.2, 0.92),
        "mean": (0.1, 0.9, 0.9, 0.9),
        "max": (0.99, 0.01, 0.01),
    }
    texts = [solution(i, *scores) for i, scores in enumerate(worth.values())]
    rows = [{"prompt": "?", "answer": list(worth).index(name), "candidates": texts}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert rescore(tmp_path / "out", source, "--n", "5", "--aggregate", *AGGREGATES) == 0
    curves = load_results(tmp_path / "out").curves
    assert {k: curves[f"best_of_n/{k}"][0]["accuracy"] for k in worth} == {k: float(k == name) for k in worth}


def test_answers_of_problems_and_segmentation(tmp_path, planted):
    rows = [{"prompt": f"{i}?", "completion": f"It is 0.5. So 0.7: #### {i}"} for i in range(3)]
    rows = [row | {"completion": row["completion"].replace(": ####", "\n####")} for row in rows]
    source = write_rows(tmp_path / "in.jsonl", rows)
    problems = write_rows(tmp_path / "problems.jsonl", [{"problem": f"{i}?", "answer": "1"} for i in (0, 1, 7)])
    more = ["--n", "1", "--problems", problems, "--segmentation", "sentence", "--extractors", "hash"]
    assert rescore(tmp_path / "out", source, *more) == 0
    results = load_results(tmp_path / "out")
    assert results.curves["majority_vote"][0]["accuracy"] == 0.5 and results.num_problems == 2
    assert results.counts["problems_without_answer"] == 1 and results.counts["problems_without_candidates"] == 1
    assert planted.shown[0] == ("0?", [["It is 0.5.", "So 0.7\n#### 0"]])


def test_texts_without_step_headers(tmp_path, planted, capsys):
    """The default rule reads solutions with blank lines as one step each, so that a step reward model scores whole solutions."""
    texts = [f"We get 0.{k}.\n\nThen 0.7.\n\nFrom 0.7, the answer is {k}." for k in (1, 2)]
    rows = [{"prompt": f"{i}?", "answer": "1", "candidates": texts} for i in range(2)]
    rows[1]["candidates"] = [texts[0], "# Step 1\nWe get 0.5.\n\n# Step 2\nThen 0.7.\n\n0.7"]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert rescore(tmp_path / "one", source, "--n", "1") == 0
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert "3 of 4 solutions" in warning and "--segmentation (now step_header)" in warning
    assert warning.endswith("such as --segmentation blank_line.")
    assert rescore(tmp_path / "two", source, "--n", "1", "--segmentation", "blank_line") == 0
    assert "warning" not in capsys.readouterr().out


def test_a_policy_that_never_answers(tmp_path, planted, capsys):
    """Accuracies are 0, and the output says why."""
    rows = [{"prompt": f"{i}?", "answer": "1", "candidates": [solution(None, 0.5), ""]} for i in range(3)]
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), "--n", "1", "2") == 0
    results = load_results(tmp_path / "out")
    assert {point["accuracy"] for points in results.curves.values() for point in points} == {0.0}
    assert results.counts["candidates_without_answer"] == 6 and results.counts["candidates_without_steps"] == 3
    printed = capsys.readouterr().out
    assert results.warnings == [
        "6 of 6 solutions (100.0 %) have no grade: 6 without an answer. Check that --extractors (now 'marker' 'tag' 'boxed' 'hash' "
        "'answer_is') match the solutions."
    ]
    assert f"warning: {results.warnings[0]}" in printed and "6 candidates without answer" in printed
    assert "6 solutions: 0.0 % correct, 0.0 % wrong, 0.0 % cut off, 100.0 % without an answer" in printed
    assert (
        printed.count("No verdict: no selected solution is correct, at any N.") == len(results.hacking_gap)
        and "No sign" not in printed
    )
    assert {(point["low"], round(point["high"], 4)) for points in results.curves.values() for point in points} == {
        (0.0, 0.5615)
    }


def test_ungradable_problems_are_left_out(tmp_path, planted, capsys):
    rows = make_rows(3, 2) + [{"prompt": "odd?", "answer": r"\frac{", "candidates": [solution(1, 0.5)] * 2}]
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), "--n", "1", "2") == 0
    assert load_results(tmp_path / "out").counts["problems_ungradable"] == 1
    assert load_results(tmp_path / "out").num_problems == 3
    printed = capsys.readouterr().out
    assert "1 problems ungradable" in printed
    warning = f"1 problem has an unreadable reference answer and was skipped: {tmp_path / 'in.jsonl'}:4 ('\\\\frac{{')"
    assert f"warning: {warning}" in printed and load_results(tmp_path / "out").warnings[0].startswith(warning)
    assert rescore(tmp_path / "none", write_rows(tmp_path / "in.jsonl", rows[3:]), "--n", "1") == 1
    error = capsys.readouterr().err
    assert "no problem is left" in error and "1 problem has an unreadable reference answer" in error


BAD = {
    "N larger than the pool": (make_rows(3, 3), (), "in.jsonl:1: problem .* has 3 candidates, but the largest N is 4"),
    "no answer": ([{"prompt": "?", "completion": "x"}], ("--n", "1"), "no reference answer .* column `answer`"),
    "no candidate": (
        [{"prompt": "?", "answer": "1", "candidates": []}],
        ("--n", "1"),
        "no candidates found for any of the",
    ),
    "nothing": ([], (), "no records found"),
    "not a number": (
        [{"prompt": "?", "answer": "1", "candidates": ["worth 0.3", "worth nan"]}],
        ("--n", "1", "2"),
        r"in.jsonl:1: the reward model returned \[nan\] for 1 steps",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_candidates(tmp_path, planted, capsys, case):
    rows, more, message = BAD[case]
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), *more) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "Set either `candidates`"),
        ("--candidates x --policy p --problems q", "Set either `candidates`"),
        ("--policy p", "`problems` is missing"),
        ("--candidates x --temperature 0.5", "`temperature` .*`policy`"),
        ("--candidates x --policy_dtype float16", "`policy_dtype` .*`policy`"),
        ("--candidates x --max_solution_tokens 9", "`max_solution_tokens` .*`policy`"),
        ("--candidates x --final_stops a", "`final_stops` .*`policy`"),
        ("--candidates x --limit 3", "`limit` .*`problems`"),
        ("--policy p --problems q --join_steps x", "`join_steps` .*`candidates`"),
        ("--candidates x --n 0", r"`n` is 0"),
        ("--candidates x --num_draws 0", "`num_draws` is 0"),
        ("--candidates x --segmentation regex", "step_pattern"),
        ("--candidates x --reward_model_engine vlm", "`reward_model_engine` is 'vlm'"),
        ("--policy p --problems q --combine mean", "`combine` is mean"),
        ("--policy p --problems q", "error: m: "),
        ("--candidates nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_options_that_cannot_work(tmp_path, capsys, words, message):
    """Ignoring an option silently would make users believe that it had an effect."""
    assert main(["best-of-n", "--reward_model", "m", "--output_dir", str(tmp_path / "out"), *words.split()]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_reward_model_of_another_format(tmp_path, checkpoint, capsys):
    """The user sees the model's own error, even before the run exists."""
    source = write_rows(tmp_path / "in.jsonl", make_rows(3, 4))
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    assert rescore(tmp_path / "out", source, model=str(folder)) == 1
    assert "step_format.json" in capsys.readouterr().err
    StepFormat(head="regression").save(folder)
    assert rescore(tmp_path / "out", source, model=str(folder)) == 1
    assert "regression" in capsys.readouterr().err


def test_a_real_reward_model(tmp_path, checkpoint):
    """The scores equal the scorer's own, with merged spans, several blocks, and one solution that is too long."""
    rows = make_rows(20, 4)
    rows[7]["candidates"][2] = solution(7, *[0.5] * 150)
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert rescore(tmp_path / "out", source, "--spans", "1", "2", "--combine", "mean", model=checkpoint) == 0
    scorer = StepScorer.from_pretrained(checkpoint)
    for place, problem in enumerate(load_candidates(tmp_path / "out")):
        for i, candidate in enumerate(problem.candidates):
            if (place, i) == (7, 2):
                assert candidate.scores is None and candidate.correct
            else:
                alone = scorer.score([problem.problem], [[candidate.steps]], (1, 2), "mean")[0][0]
                assert candidate.scores == pytest.approx(alone, abs=1e-5)
    assert load_results(tmp_path / "out").counts["candidates_too_long"] == 1


def test_results_are_kept(tmp_path, planted, capsys):
    source = write_rows(tmp_path / "in.jsonl", make_rows(3, 4))
    assert rescore(tmp_path / "out", source) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert rescore(tmp_path / "out", source, "--aggregate", "max") == 1
    assert "results.json exists" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert rescore(tmp_path / "out", source, "--aggregate", "max", "--overwrite") == 0
    assert "best_of_n/max" in load_results(tmp_path / "out").curves


def test_stopped_and_resumed(tmp_path, monkeypatch, planted, capsys):
    """Resuming gives the same candidates and numbers without rescoring, and rejects other settings."""
    monkeypatch.setattr("trl_hrm.evaluation.best_of_n.BLOCK", 2)
    source = write_rows(tmp_path / "in.jsonl", make_rows(7, 4))
    assert rescore(tmp_path / "whole", source) == 0
    planted.shown, planted.stop_after = [], 4
    assert rescore(tmp_path / "parts", source) == 130
    assert not (tmp_path / "parts" / "results.json").exists()
    planted.stop_after = None
    capsys.readouterr()
    for more in (["--spans", "1", "2"], ["--extractors", "boxed"]):
        assert rescore(tmp_path / "parts", source, *more) == 1
        assert f"{more[0][2:]} was" in capsys.readouterr().err
    write_rows(tmp_path / "in.jsonl", make_rows(7, 4, seed=1))
    assert rescore(tmp_path / "parts", source) == 1
    assert "candidates was" in capsys.readouterr().err
    write_rows(tmp_path / "in.jsonl", make_rows(7, 4))
    assert rescore(tmp_path / "parts", source) == 0
    assert len(planted.shown) == 7
    whole, parts = load_results(tmp_path / "whole"), load_results(tmp_path / "parts")
    for name in ("curves", "hacking_gap", "calibration", "counts", "settings", "num_problems"):
        assert getattr(whole, name) == getattr(parts, name)
    assert whole.cost["scorer"]["num_calls"] == parts.cost["scorer"]["num_calls"] == 4
    files = [(tmp_path / name / "candidates.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_resumed_with_other_curves(tmp_path, monkeypatch, planted):
    """Scores were thrown away if only the aggregates, N or the number of draws changed. A repeated aggregate counts once."""
    monkeypatch.setattr("trl_hrm.evaluation.best_of_n.BLOCK", 2)
    source = write_rows(tmp_path / "in.jsonl", make_rows(7, 4))
    planted.stop_after = 4
    assert rescore(tmp_path / "parts", source, "--aggregate", "min") == 130
    planted.stop_after = None
    more = ["--n", "1", "2", "--num_draws", "5", "--aggregate", "last", "min", "last"]
    assert rescore(tmp_path / "parts", source, *more) == 0
    assert len(planted.shown) == 7  # each problem was scored once
    assert rescore(tmp_path / "whole", source, *more) == 0
    whole, parts = load_results(tmp_path / "whole"), load_results(tmp_path / "parts")
    assert (parts.curves, parts.settings) == (whole.curves, whole.settings)
    assert parts.settings["aggregate"] == ["last", "min"] and parts.settings["num_draws"] == 5


def test_an_outdated_part_is_not_merged(tmp_path, monkeypatch, planted):
    """The first process would merge an earlier start's part while this process is still sampling new candidates."""

    def stop(*args):
        raise KeyboardInterrupt

    source, names = write_rows(tmp_path / "in.jsonl", make_rows(8, 4)), ("part", "partial")
    for given, expected in (
        (best_of_n._given, [True, False]),
        (stop, [False, True]),
        (best_of_n._given, [True, False]),
    ):
        monkeypatch.setattr(best_of_n, "_given", given)
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert rescore(tmp_path / "out", source) == (130 if given is stop else 0)
        assert [(tmp_path / "out" / f"{name}-00001-of-00002.jsonl").exists() for name in names] == expected
    assert len(planted.shown) == len({problem for problem, _ in planted.shown}) > 0


def test_parts_with_other_settings_are_not_merged(tmp_path, monkeypatch):
    """Each process has its own candidates and must wait for the others to replace parts of an earlier start."""
    header, path, waits = {"spans": [1], "candidates": "mine"}, tmp_path / "part-00001-of-00002.jsonl", []

    def sleep(seconds):
        waits.append(seconds)
        path.write_text(json.dumps(header | {"candidates": "its own"}) + "\n")

    monkeypatch.setattr("time.sleep", sleep)
    path.write_text(json.dumps(header | {"spans": [1, 2]}) + "\n")
    wait_for_parts([path], header)
    assert len(waits) == 1


def test_candidates_are_not_replaced_by_the_results(tmp_path, planted, capsys):
    """A user's file with the same name as ours may hold hours of samples."""
    (tmp_path / "out").mkdir()
    source = write_rows(tmp_path / "out" / "candidates.jsonl", make_rows(3, 4))
    before = Path(source).read_bytes()
    assert rescore(tmp_path / "out", source) == 1
    assert "candidates.jsonl exists, and was not written by `best-of-n`" in capsys.readouterr().err
    assert Path(source).read_bytes() == before


def test_all_candidates_are_used(tmp_path, planted, capsys):
    """Also with a small N, whose accuracy is a mean over all subsets. Only votes depend on the number of draws."""
    source = write_rows(tmp_path / "in.jsonl", make_rows(5, 12))
    assert rescore(tmp_path / "default", source, "--n", "1", "4") == 0
    assert (
        "Means over all subsets of N of the 12 candidates of a problem. Votes with more than 200"
        in capsys.readouterr().out
    )
    assert rescore(tmp_path / "few", source, "--n", "1", "4", "--num_draws", "3") == 0
    found, few = load_results(tmp_path / "default"), load_results(tmp_path / "few")
    assert found.counts["num_candidates"] == 60
    assert found.estimate == {"method": "subsets", "min_candidates": 12, "max_candidates": 12, "num_draws": 200}
    assert (few.settings["num_draws"], few.estimate["num_draws"]) == (3, 3)
    for name in ("best_of_n/min", "pass_at_n"):
        assert found.curves[name] == few.curves[name]
    assert found.curves["majority_vote"][1] != few.curves["majority_vote"][1]
    right = [one.correct for problem in load_candidates(tmp_path / "default") for one in problem.candidates]
    assert [points[0]["accuracy"] for points in found.curves.values()] == pytest.approx(
        [right.count(True) / 60] * len(found.curves)
    )


# with a policy


SETTINGS = "--engine transformers --prompt question --prompt_style plain --segmentation step_header --max_solution_tokens 60".split()
SETTINGS += ["--final_stops", "# END!", "--n", "1", "2", "6"]


@pytest.fixture
def problems(tmp_path) -> str:
    return write_rows(tmp_path / "problems.jsonl", KNOWN)


def sample(folder: Path, policy: str, problems: str, model: str, *more: str) -> int:
    words = [
        "best-of-n",
        "--problems",
        problems,
        "--policy",
        policy,
        "--reward_model",
        model,
        "--output_dir",
        str(folder),
    ]
    return main([*words, *SETTINGS, *more])


def test_sampled_candidates(tmp_path, policy, problems, checkpoint, capsys):
    """Sampling and scoring must equal scoring the saved samples, with the cost and the policy in both results."""
    assert sample(tmp_path / "out", policy, problems, checkpoint) == 0
    results = load_results(tmp_path / "out")
    candidates = list(load_candidates(tmp_path / "out"))
    assert [problem.problem for problem in candidates] == [row["problem"].strip() for row in KNOWN]
    answers = Counter(c.correct for problem in candidates for c in problem.candidates)
    assert (
        answers[True] >= 4 and answers[False] >= 4 and sum(answers.values()) == 24
    )  # the policy solves them half of the time
    assert results.policy["model"] == policy and results.policy["search"]["num_solutions"] == 6
    spent = results.cost["policy"]
    assert spent["num_sequences"] == 24 and spent["num_requests"] == 4 and spent["seconds"] > 0
    assert spent["num_tokens"] == sum(c.num_tokens for problem in candidates for c in problem.candidates)
    assert results.cost["scorer"]["seconds"] > 0 and results.cost["rest_seconds"] > 0
    printed = capsys.readouterr().out
    assert "problems: 4 done" in printed and "pass_at_n" in printed and "trl-hrm export" not in printed
    assert results.solutions == read_summary(tmp_path / "out" / "samples")["solutions"]
    assert results.solutions["right"] == answers[True] and sum(results.solutions.values()) == 24
    assert printed.count(describe_outcomes(results.solutions)) == 2  # after sampling, and with the results

    assert rescore(tmp_path / "again", str(tmp_path / "out" / "samples"), "--n", "1", "2", "6", model=checkpoint) == 0
    again = load_results(tmp_path / "again")
    assert again.curves == results.curves and again.policy == results.policy
    assert again.solutions == results.solutions
    # with other extractors, outcomes follow the answers that these find
    other = ["--n", "1", "2", "6", "--extractors", "tag"]
    assert rescore(tmp_path / "other", str(tmp_path / "out" / "samples"), *other, model=checkpoint) == 0
    assert load_results(tmp_path / "other").solutions.keys() <= {"without_answer", "cut_off_by_tokens"}
    assert again.cost["policy"] == results.cost["policy"]
    assert [problem.candidates for problem in load_candidates(tmp_path / "again")] == [
        p.candidates for p in candidates
    ]


def test_the_candidates_of_a_run_keep_its_settings(tmp_path, policy, problems, checkpoint, capsys):
    """Extractors, prompt style and segmentation default to the run's. The results record which were used."""
    assert sample(tmp_path / "out", policy, problems, checkpoint, "--extractors", "last_number") == 0
    results = load_results(tmp_path / "out")
    assert results.settings["extractors"] == ["last_number"]
    source, more = str(tmp_path / "out" / "samples"), ["--n", "1", "2", "6"]
    capsys.readouterr()
    assert rescore(tmp_path / "same", source, *more, model=checkpoint) == 0
    same = load_results(tmp_path / "same")
    assert same.curves == results.curves
    used = {"extractors": ["last_number"], "segmentation": "step_header", "prompt_style": "plain"}
    assert {name: same.settings[name] for name in used} == used
    assert (
        "Reading candidates with extractors last_number, segmentation step_header, prompt_style plain"
        in capsys.readouterr().out
    )
    other = ["--extractors", "boxed", "--segmentation", "blank_line"]
    assert rescore(tmp_path / "other", source, *more, *other, model=checkpoint) == 0
    told = load_results(tmp_path / "other")
    assert told.settings["extractors"] == ["boxed"] and told.settings["segmentation"] == "blank_line"
    assert told.counts["candidates_without_answer"] == told.counts["num_candidates"] == 24
    for candidate in (c for problem in load_candidates(tmp_path / "other") for c in problem.candidates):
        assert candidate.steps == cut_text(candidate.text, RULES["blank_line"])


def test_outputs_of_search_and_learn(tmp_path, planted, capsys):
    """The headers that its prompt asks for, its own keys, and a printed line about how the file was read."""
    solutions = [
        "## Step 1: Add\n0.6\n\n## Step 2: Conclude\n0.9, as ## Step 1 shows.\n\nIt is $\\boxed{7}$.",
        "## Step 1: Subtract\n0.3\n\nIt is $\\boxed{1}$.",
    ]
    source = write_rows(tmp_path / "in.jsonl", [{"problem": "3 + 4?", "answer": "7", "completions": solutions}])
    assert rescore(tmp_path / "out", source, "--n", "1", "2") == 0
    shown = solutions[0].partition("\n\n## Step 2")
    assert planted.shown == [("3 + 4?", [[shown[0], (shown[1] + shown[2]).strip()], [solutions[1]]])]
    results = load_results(tmp_path / "out")
    assert [point["accuracy"] for point in results.curves["best_of_n/min"]] == [0.5, 1]
    assert results.counts["rows_of_whole_solutions"] == 1
    assert "1 rows have `problem` and `completions`, as written by search-and-learn" in capsys.readouterr().out


def test_whole_solutions_in_place_of_steps_are_refused(tmp_path, planted, capsys):
    rows = [{"prompt": "?", "answer": "7", "completions": ["0.6 \\boxed{7}", "0.3 \\boxed{1}"]}]
    assert rescore(tmp_path / "out", write_rows(tmp_path / "in.jsonl", rows), "--n", "1") == 1
    assert "look like whole solutions" in capsys.readouterr().err
    assert planted.shown == [] and not list(tmp_path.glob("out/*.json"))


def test_thinking_is_not_scored_and_has_no_answer(tmp_path, planted):
    thought = "<think>\n\n# Step 1\n0.1 \\boxed{1}\n\n</think>\n\n"
    texts = [thought + solution(7, 0.5), thought, solution(1, 0.4)]
    rows = [{"prompt": "?", "answer": "7", "candidates": texts}]
    source = write_rows(tmp_path / "in.jsonl", rows)
    assert rescore(tmp_path / "out", source, "--n", "3") == 0
    assert planted.shown == [("?", [[solution(7, 0.5)], [solution(1, 0.4)]])]
    results = load_results(tmp_path / "out")
    assert results.counts["candidates_with_thinking_left_out"] == 2
    assert results.counts["candidates_without_steps"] == results.counts["candidates_without_answer"] == 1
    assert results.settings["keep_thinking"] is False
    assert rescore(tmp_path / "kept", source, "--n", "3", "--keep_thinking") == 0
    kept = load_results(tmp_path / "kept")
    assert kept.settings["keep_thinking"] and not kept.counts["candidates_with_thinking_left_out"]
    assert [len(steps) for steps in planted.shown[1][1]] == [2, 1, 1]


def test_sampling_resumes(tmp_path, monkeypatch, policy, problems, checkpoint, capsys):
    """After two problems, four: nothing is sampled twice. Another N starts another run."""
    assert sample(tmp_path / "whole", policy, problems, checkpoint) == 0
    assert sample(tmp_path / "parts", policy, problems, checkpoint, "--limit", "2") == 0
    assert "this run: 12 samples" in capsys.readouterr().out.rpartition("problems: 2 done")[2]
    assert sample(tmp_path / "parts", policy, problems, checkpoint, "--overwrite") == 0
    assert "this run: 12 samples" in capsys.readouterr().out
    whole, parts = load_results(tmp_path / "whole"), load_results(tmp_path / "parts")
    assert whole.curves == parts.curves and parts.cost["policy"]["num_sequences"] == 24
    assert [p.candidates for p in load_candidates(tmp_path / "whole")] == [
        p.candidates for p in load_candidates(tmp_path / "parts")
    ]
    assert sample(tmp_path / "parts", policy, problems, checkpoint, "--overwrite", "--n", "8") == 1
    assert "search.num_solutions was 6 and is 8" in capsys.readouterr().err


# the recipe


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(*words: str) -> subprocess.CompletedProcess:
    config = ROOT / "accelerate_configs" / "cpu_2proc.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", str(free_port()), str(ROOT / "recipes" / "best_of_n.py"), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def check_equal(one: Path, two: Path) -> None:
    """Check that the result of two processes is the result of one, up to the rounding of a batch."""
    assert len(list((two / "samples").glob("log-*-of-00002.jsonl"))) == 2
    assert sorted(path.name for path in two.iterdir()) == ["candidates.jsonl", "results.json", "samples"]
    first, second = load_results(one), load_results(two)
    assert first.curves == second.curves and first.counts == second.counts and first.n == second.n
    assert second.cost["policy"]["num_tokens"] == first.cost["policy"]["num_tokens"]
    for a, b in zip(load_candidates(one), load_candidates(two), strict=True):
        assert a.problem_id == b.problem_id
        for x, y in zip(a.candidates, b.candidates, strict=True):
            assert (x.text, x.answer, x.correct) == (y.text, y.answer, y.correct)
            assert x.scores == pytest.approx(y.scores, abs=1e-5)


def test_two_ranks_make_one_result(tmp_path, monkeypatch, policy, problems, checkpoint):
    """The ranks run one after another here, in the environment of `accelerate launch`. The slow test below launches them."""
    for rank in ("1", "0"):  # the first process merges the parts
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")  # the command removes both
        assert sample(tmp_path / "two", policy, problems, checkpoint) == 0
    monkeypatch.undo()
    assert sample(tmp_path / "one", policy, problems, checkpoint) == 0
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow  # a launcher and two processes; `.ci/run` launches the recipe too
def test_two_processes_make_one_result(tmp_path, policy, problems, checkpoint):
    """Two processes with a settings file give the result of one process."""
    config = {"problems": problems, "policy": policy, "reward_model": checkpoint, "engine": "transformers"}
    config |= {"prompt": "question", "prompt_style": "plain", "segmentation": "step_header", "final_stops": ["# END!"]}
    config |= {"max_solution_tokens": 60, "n": [1, 2, 6], "output_dir": "nowhere"}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(config))
    launched = launch("--config", str(tmp_path / "settings.yaml"), "--output_dir", str(tmp_path / "two"))
    assert launched.returncode == 0, launched.stderr
    assert sample(tmp_path / "one", policy, problems, checkpoint) == 0
    check_equal(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path, checkpoint):
    """Otherwise the first process would wait forever for the second one's part. A file of its name blocks that part."""
    rows = make_rows(8, 1)
    source = write_rows(tmp_path / "in.jsonl", rows)
    (tmp_path / "out").mkdir()
    with AppendedLines(tmp_path / "out" / "partial-00001-of-00002.jsonl"):
        words = [
            "--candidates",
            source,
            "--reward_model",
            checkpoint,
            "--output_dir",
            str(tmp_path / "out"),
            "--n",
            "1",
        ]
        launched = launch(*words)
    assert launched.returncode != 0 and "another process is writing to this file" in launched.stderr
    assert not (tmp_path / "out" / "results.json").exists()
