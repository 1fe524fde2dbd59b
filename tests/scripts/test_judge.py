"""`trl-hrm judge`: known error rates, resuming, shards, budgets, refused changes, servers with faults, and what reads the verdicts."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from trl_hrm import BuildStepwiseConfig, ExportConfig, JudgeConfig, build_stepwise, export, judge
from trl_hrm.cli import main
from trl_hrm.data.verdicts import Verdict, read_verdicts
from trl_hrm.intervals import wilson_interval
from trl_hrm.io import read_json
from trl_hrm.search.engines.base import EngineFatal

from ..fakes import write_rows
from ..scoring.judges import ChatTokenizer, Judge, genprm, instruct, thinkprm
from ..search.hostile import RESPONSE, TRANSPORT, HostileServer
from ..search.http_server import FakeServer
from .judge_runs import coin_judge, first_bad, make_run, use_engine


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("judge") / "run")


@pytest.fixture
def run(searched, tmp_path) -> Path:
    """A run that the test may change."""
    shutil.copytree(searched, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def engine(monkeypatch):
    """The engine of all judges, with the given script."""

    def use(script=None, weights="w1", engine=None):
        return use_engine(engine or Judge(script or coin_judge()), weights, monkeypatch.setattr)

    return use


def judged(source, **options):
    """Judge a run or file. Return the report and the rows."""
    report = judge(JudgeConfig(**{"input": str(source), "judge": "coins", "engine": "transformers"} | options))
    path = report.output_dir / "verdicts.jsonl"
    return report, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else None


def lines_of(folder) -> list[dict]:
    """Return the responses in the logs of a judge."""
    files = sorted(folder.glob("judgements-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]


# Verdicts


def test_votes_labels_and_intervals_of_a_run(run, engine):
    """Everything is recomputed from the texts in the log, with another parser."""
    engine()
    report, rows = judged(run, num_votes=5)
    votes = []
    for line in lines_of(report.output_dir):
        boxes = [re.fullmatch(r"I have .*\.\n(?:\\boxed\{(.*)\})?", one["text"])[1] for one in line["samples"]]
        votes.append([None if box is None else -1 if box == "-1" else int(box) - 1 for box in boxes])
    assert sorted(map(str, votes)) == sorted(str(row["judge_votes"]) for row in rows)
    for row in rows:
        verdict = Verdict(row["problem_id"], tuple(row["node_ids"]), tuple(row["judge_votes"]))
        readable = [vote for vote in row["judge_votes"] if vote is not None]
        assert row["labels"] == verdict.labels() and row["judge_first_error"] == verdict.first_error
        if verdict.first_error is not None:
            hits = readable.count(verdict.first_error)
            assert row["judge_agreement"] == hits / len(readable)
            assert [row["judge_low"], row["judge_high"]] == list(wilson_interval(hits, len(readable)))
        assert row["answer"] == "7" and len(row["completions"]) == len(row["node_ids"])
    assert list(read_verdicts(run)) == [
        Verdict(row["problem_id"], tuple(row["node_ids"]), tuple(row["judge_votes"])) for row in rows
    ]
    assert report.summary == read_json(report.output_dir / "summary.json")


def test_node_ids_are_those_of_an_export(run, tmp_path, engine):
    engine()
    _, rows = judged(run)
    export(ExportConfig(inputs=[str(run)], view="prm", output_dir=str(tmp_path / "data"), test_size=0.0))
    from datasets import load_dataset

    exported = {
        tuple(row["node_ids"]): row["completions"]
        for row in load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    }
    assert len(rows) == 4 * 16
    assert all(exported[tuple(row["node_ids"])] == row["completions"] for row in rows)


def test_known_error_rate(run, engine):
    """Of all readable votes, a fifth is wrong, with equal probability at each other place. A tenth is unreadable."""
    engine(coin_judge(error=0.2, unreadable=0.1))
    report, rows = judged(run, num_votes=9, max_solutions=40)
    kinds = Counter()
    for row in rows:
        true = first_bad(row["completions"])
        for vote in row["judge_votes"]:
            kinds["unreadable" if vote is None else "right" if vote == true else "wrong"] += 1
    readable = kinds["right"] + kinds["wrong"]
    for share, count, total in ((0.2, kinds["wrong"], readable), (0.1, kinds["unreadable"], kinds.total())):
        assert abs(count - share * total) < 4 * math.sqrt(total * share * (1 - share))
    assert report.summary["votes"] == kinds.total() == 9 * len(rows)
    assert report.summary["unreadable"] == {"no_box": kinds["unreadable"]}
    # most votes of nine are right, so nearly all verdicts are
    decided = [row for row in rows if row["judge_first_error"] is not None]
    assert sum(row["judge_first_error"] == first_bad(row["completions"]) for row in decided) > 0.95 * len(decided)


def test_summary_and_text(run, engine):
    engine(lambda prompt, rng: rng.choice(["\\boxed{1}", "\\boxed{-1}", "hm", "\\boxed{9}"]))
    report, rows = judged(run, num_votes=2, max_solutions=5)
    firsts = [row["judge_first_error"] for row in rows]
    unreadable = [all(vote is None for vote in row["judge_votes"]) for row in rows]
    summary = report.summary
    assert (summary["problems"], summary["solutions"], summary["votes"]) == (4, 20, 40)
    assert summary["without_error"] == firsts.count(-1)
    assert summary["with_error"] == sum(first not in (None, -1) for first in firsts)
    assert summary["unreadable_solutions"] == sum(unreadable)
    assert summary["undecided"] == firsts.count(None) - sum(unreadable)
    assert sum(summary["unreadable"].values()) == sum(vote is None for row in rows for vote in row["judge_votes"])
    assert summary["not_judged"] == {"solutions_beyond_max_solutions": 88}
    assert summary["input"] == {"equal_solutions": 216}  # 4 trees of 81 leaves have 108 different solutions
    assert summary["cost"]["samples"] == 40 and "seconds" not in summary["cost"]
    text = str(report)
    for words in (
        "judged 20 solutions of 4 problems",
        "votes: 40, ",
        "responses without a \\boxed{}",
        "responses with the number of a step that does not exist",
        "not judged: ",
        "judge: 20 prompts, 40 responses (0 from the log)",
        f"Next: trl-hrm export {run} --consensus --view hrm --output_dir DATASET",
    ):
        assert words in text


@pytest.mark.parametrize("answer", ["hm", "\\boxed{-1}"])
def test_warning_about_unreadable_responses(run, engine, answer):
    """A judge that does not follow the prompt costs tokens and gives no labels."""
    engine(lambda prompt, rng: answer)
    report, rows = judged(run, num_votes=2, max_solutions=1)
    words = f"8 of 8 responses are unreadable. See their texts in {report.output_dir}/judgements-*.jsonl."
    assert (words in str(report)) == (answer == "hm")
    assert all(row["labels"] == [None if answer == "hm" else 1.0] * len(row["completions"]) for row in rows)


@pytest.mark.parametrize(
    ("template", "script"),
    [("instruct", instruct), ("genprm", genprm), ("thinkprm", thinkprm)],
    ids=["instruct", "genprm", "thinkprm"],
)
def test_other_templates(tmp_path, engine, template, script):
    """Labels of step prompts are mean scores, and votes are the first no of each response."""
    rows = [{"prompt": "1+1?", "completions": ["a p1", "b p0", "c p1"], "labels": [1, 0, None]}]
    engine(script)
    _, [row] = judged(write_rows(tmp_path / "rows.jsonl", rows), template=template, output_dir=str(tmp_path / "out"))
    assert row["judge_votes"] == [1, 1, 1] and row["judge_first_error"] == 1
    assert row["labels"] == ([1.0, 0.0, None] if template == "thinkprm" else [1.0, 0.0, 1.0])
    assert row["source_labels"] == [1.0, 0.0, None]


def test_files_of_steps_and_candidates(tmp_path, engine):
    """The verdicts are rows that `build-stepwise` reads, with the columns of the input."""
    trees = [
        {
            "prompt": f"{i}+1?",
            "completions": ["good 1", "bad 2", "good 3"],
            "parents": [-1, 0, 0],
            "labels": [0.5, None, 1],
            "kind": "x",
        }
        for i in range(6)
    ]
    engine(coin_judge(0, 0))
    report, rows = judged(write_rows(tmp_path / "trees.jsonl", trees), output_dir=str(tmp_path / "out"))
    assert [row["judge_first_error"] for row in rows] == [1, -1] * 6
    assert rows[0]["labels"] == [1.0, 0.0] and rows[0]["source_labels"] == [0.5, None] and rows[0]["kind"] == "x"
    assert str(report).endswith(
        f"Next: trl-hrm build-stepwise {tmp_path}/out/verdicts.jsonl --view hrm --output_dir DATASET"
    )
    built = build_stepwise(
        BuildStepwiseConfig(
            inputs=[str(tmp_path / "out" / "verdicts.jsonl")],
            view="hrm",
            output_dir=str(tmp_path / "data"),
            test_size=0.0,
        )
    )
    assert "rows out: train" in str(built)
    candidates = [
        {"prompt": "1+1?", "candidates": ["# Step 1\ngood\n\n# Step 2\nbad", ["good", "good"]], "answer": "2"}
    ]
    _, rows = judged(write_rows(tmp_path / "candidates.jsonl", candidates), output_dir=str(tmp_path / "other"))
    assert [row["judge_first_error"] for row in rows] == [1, -1] and rows[0]["answer"] == "2"


def test_labels_of_the_input_are_not_those_of_the_judge(run, tmp_path, engine):
    """The columns of progress labels would change the labels of merged steps."""
    progress, verdicts = str(tmp_path / "progress"), str(tmp_path / "out")
    export(ExportConfig(inputs=[str(run)], labels="progress", output_dir=progress, test_size=0.0, num_proc=1))
    engine(coin_judge(0, 0))
    _, rows = judged(progress, output_dir=verdicts)
    assert rows[0]["source_label_kind"] == "progress" and len(rows[0]["source_mc_scores"]) == len(rows[0]["labels"])
    own = {"inputs": [f"{verdicts}/verdicts.jsonl"], "output_dir": str(tmp_path / "data"), "test_size": 0.0}
    build_stepwise(BuildStepwiseConfig(view="hrm", num_proc=1, **own))
    from datasets import load_dataset

    built = load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert any(2 in row["num_merged"] for row in built)
    for row in built:
        for text, label in zip(row["completions"], row["labels"], strict=True):
            if (
                label is not None
            ):  # the judge finds the first bad step, so labels of single and merged steps are of their ends
                assert label == float("bad" not in text.rpartition("# Step")[2])


def test_reference_answers(run, tmp_path, engine):
    fake = engine()
    judged(run, template="first_error_reference", num_votes=1, max_solutions=1)
    assert all("# Correct answer\n\n7\n" in prompt for prompt, _ in fake.requests) and len(fake.requests) == 4
    rows = [{"prompt": "1+1?", "completions": ["a"], "labels": [1]}]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        ValueError,
        match=r"rows\.jsonl:1: the problem has no reference answer, which the template first_error_reference",
    ):
        judged(source, template="first_error_reference", output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_own_template(run, tmp_path, engine):
    path = tmp_path / "mine.json"
    path.write_text(
        json.dumps(
            {"scope": "first_error", "user": "{problem}\n{steps}\n\\boxed{none}", "first_number": 0, "none": "none"}
        )
    )
    engine(lambda prompt, rng: rng.choice(["\\boxed{0}", "\\boxed{none}"]))
    _, rows = judged(run, template=str(path), max_solutions=3)
    assert {vote for row in rows for vote in row["judge_votes"]} == {0, -1}


def test_problems_without_an_end_are_counted(run, engine):
    """Problems whose search has not ended have no solutions in an export either."""
    log = run / "log-00000-of-00001.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    ends = [i for i, line in enumerate(lines) if json.loads(line)["event"] == "close"]
    assert len(ends) == 4
    log.write_text("".join(line for i, line in enumerate(lines) if i != ends[0]))
    for file in (*run.glob("nodes*"), *run.glob("summary*")):
        file.unlink()
    engine()
    report, rows = judged(run, max_solutions=2)
    assert len(rows) == 6 and any("unfinished search" in warning for warning in report.warnings)


# Resuming


PROGRAM = [sys.executable, "-m", "tests.scripts.judge_runs"]


@pytest.mark.slow
def test_killed_and_resumed(searched, run, tmp_path, engine):
    """A process that is killed twice, at random moments, and resumed with another concurrency ends with the same bytes."""
    engine()
    shutil.copytree(searched, tmp_path / "undisturbed")
    judged(tmp_path / "undisturbed")
    folder = run / "judges" / "judge"
    log = folder / "judgements-00000-of-00001.jsonl"
    rng = random.Random(0)
    done = 0
    for in_flight, latency in (("5", "0.1"), ("30", "0.5")):
        process = subprocess.Popen(
            [*PROGRAM, str(run), latency, in_flight], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        least = done + rng.randrange(3, 9)
        while not log.exists() or log.read_bytes().count(b"\n") <= least:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "verdicts.jsonl").exists()
        assert done < len(lines_of(folder)) < 64
        done = len(lines_of(folder))
    with open(log, "ab") as file:
        file.write(b'{"key": "')  # killed while writing
    assert subprocess.run([*PROGRAM, str(run), "0", "256"], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0
    for name in ("verdicts.jsonl", "summary.json"):
        assert (folder / name).read_bytes() == (tmp_path / "undisturbed" / "judges" / "judge" / name).read_bytes()
    assert len(lines_of(folder)) == 64
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == sorted(
        ["manifest.json", log.name, "verdicts.jsonl", "summary.json"]
    )


def test_order_and_concurrency_do_not_matter(searched, tmp_path, engine):
    engine(engine=Judge(coin_judge(), latency=lambda rng: rng.uniform(0, 0.004)))
    found = []
    for in_flight in (3, 10, 256):
        shutil.copytree(searched, tmp_path / str(in_flight))
        report, _ = judged(tmp_path / str(in_flight), max_in_flight=in_flight)
        found.append([(report.output_dir / name).read_bytes() for name in ("verdicts.jsonl", "summary.json")])
    assert found[0] == found[1] == found[2]


def test_failed_engine_stops_and_resumes(run, tmp_path, engine, capsys):
    words = ["judge", str(run), "--judge", "coins", "--engine", "transformers", "--max_in_flight", "3"]
    engine(engine=Judge(coin_judge(), fails_after=7))
    assert main(words) == 1
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith("error: The engine of the judge failed. the server is gone Finished responses are in")
    folder = run / "judges" / "judge"
    done = len(lines_of(folder))
    assert 0 < done <= 7 and not (folder / "verdicts.jsonl").exists()
    new = engine()
    assert main(words) == 0
    assert len(new.requests) == 64 - done and len(lines_of(folder)) == 64
    assert f"({3 * done} from the log)" in capsys.readouterr().out

    class Refusing(Judge):
        async def sample(self, *args, **options):
            raise EngineFatal("no such model.")

    engine(engine=Refusing(coin_judge()))
    assert main([*words, "--name", "other"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: The engine of the judge failed. no such model.")


def test_more_votes_use_the_first_ones(searched, run, tmp_path, engine):
    """Three votes and then five are the five votes of a new judge, and the other way round."""
    engine()
    shutil.copytree(searched, tmp_path / "new")
    five, five_rows = judged(tmp_path / "new", num_votes=5)
    _, three_rows = judged(run, num_votes=3)
    assert [row["judge_votes"] for row in three_rows] == [row["judge_votes"][:3] for row in five_rows]
    more, rows = judged(run, num_votes=5)
    assert rows == five_rows and more.summary == five.summary
    assert (more.cost["reused_samples"], more.cost["samples"]) == (3 * 64, 5 * 64)
    fewer, rows = judged(run, num_votes=3)
    assert rows == three_rows and fewer.cost["reused_samples"] == 3 * 64


def test_more_solutions_include_the_first_ones(run, engine):
    engine()
    ids = []
    for number in (2, 5, 100):
        report, rows = judged(run, max_solutions=number)
        ids.append({tuple(row["node_ids"]): row["judge_votes"] for row in rows})
    assert [len(one) for one in ids[:2]] == [8, 20] and ids[0].items() <= ids[1].items() <= ids[2].items()
    assert "solutions_beyond_max_solutions" not in report.summary["not_judged"]
    _, other = judged(run, max_solutions=2, seed=1, name="other")
    assert {tuple(row["node_ids"]) for row in other} != ids[0].keys()


# Shards


def test_shards_give_the_same_files(searched, run, tmp_path, engine):
    engine()
    shutil.copytree(searched, tmp_path / "whole")
    whole, _ = judged(tmp_path / "whole")
    for index in (2, 0, 1):
        report, rows = judged(run, shard=f"{index}/3")
        assert (rows is None) == bool(report.unfinished_shards) == (index != 1)
    assert "judge the other shards (0, 1)" in str(judged(run, shard="2/3", num_votes=4)[0])
    judged(run, shard="2/3")
    for name in ("verdicts.jsonl", "summary.json"):
        assert (report.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


def test_shards_with_other_settings_are_not_joined(run, engine):
    engine()
    for index in range(2):
        report, rows = judged(run, shard=f"{index}/2")
    before = (report.output_dir / "verdicts.jsonl").read_bytes()
    report, _ = judged(run, shard="0/2", num_votes=4)
    assert report.unfinished_shards == [1] and (report.output_dir / "verdicts.jsonl").read_bytes() == before
    report, rows = judged(run, shard="1/2", num_votes=4)
    assert not report.unfinished_shards and all(len(row["judge_votes"]) == 4 for row in rows)
    with pytest.raises(ValueError, match="num_shards was 2 and is 3"):
        judged(run, shard="0/3")


# Budget


def always_yes(prompt, rng):
    """Say yes to every step, in the form that the prompt asks for, after a text of random length."""
    text = "x" * rng.randrange(30)
    if prompt.endswith(("\\boxed{", "Is the solution correct? ")):
        return "Yes"
    if "</analyze>" in prompt or "<analyze>" in prompt:
        return text + "</analyze>"
    if "Let's verify" in prompt:
        number = prompt.partition("[Solution]")[2].count("Step ")
        return text + "\\boxed{correct}" * number + "</think>"
    return text + ("\nVerdict: Yes" if "Verdict" in prompt else "\\boxed{-1}")


@pytest.mark.parametrize("template", ["first_error", "instruct", "genprm", "thinkprm"])
def test_budget_is_never_exceeded(run, engine, template):
    """Responses and tokens of each problem in the log stay within the limits."""
    engine(always_yes)
    numbers = []
    for number, limits in enumerate(
        ({"max_sequences": 20}, {"max_tokens": 2100}, {"max_sequences": 24, "max_tokens": 5000})
    ):
        report, rows = judged(
            run, template=template, max_response_tokens=200, num_votes=2, name=f"n{number}", **limits
        )
        spent = defaultdict(Counter)
        for line in lines_of(report.output_dir):
            spent[line["problem"]]["samples"] += len(line["samples"])
            spent[line["problem"]]["tokens"] += sum(one["num_tokens"] for one in line["samples"])
        assert len(spent) == 4 and all(one["samples"] <= limits.get("max_sequences", 10**9) for one in spent.values())
        assert all(one["tokens"] <= limits.get("max_tokens", 10**9) for one in spent.values())
        assert all(row["judge_votes"] == [-1, -1] for row in rows)
        numbers.append(len(rows))
        assert report.summary["not_judged"]["solutions_beyond_budget"] == 64 - len(rows)
    if template in ("first_error", "thinkprm"):
        assert numbers == [40, 20, 48]  # 10, 5 and 12 prompts per problem
    else:
        # a prompt per step, which solutions with the same beginning share
        assert numbers[1] <= numbers[0] <= numbers[2] < 40


def test_budget_below_one_solution(run, engine):
    engine(instruct)
    with pytest.raises(
        ValueError, match="but no solution fits: 3 votes of up to 1024 tokens per prompt, and a prompt per step"
    ):
        judged(run, template="instruct", max_sequences=4)
    assert not (run / "judges").exists()


# What is refused


def test_other_settings_are_refused(run, tmp_path, engine):
    """Another judge, template, seed or length must not be mixed with the verdicts."""
    engine()
    report, _ = judged(run)
    files = {path.name: path.read_bytes() for path in report.output_dir.iterdir()}
    template = tmp_path / "mine.json"
    template.write_text(json.dumps({"scope": "first_error", "user": "{problem} {steps} \\boxed{-1}"}))
    for options, message in (
        ({"seed": 1}, "seed was 42 and is 1"),
        ({"template": str(template)}, "template.user was"),
        ({"max_response_tokens": 9}, "max_response_tokens was 4096 and is 9"),
    ):
        with pytest.raises(ValueError, match=rf"{message}.*or another --name to start a new run"):
            judged(run, **options)
    engine(weights="w2")
    with pytest.raises(ValueError, match='judge.weights was "w1" and is "w2".*--accept_changes judge.weights'):
        judged(run)
    assert {path.name: path.read_bytes() for path in report.output_dir.iterdir()} == files


def test_a_run_that_has_grown(run, tmp_path, engine):
    """Only the new solutions are sampled, and the files are those of a judge that saw all problems from the start."""
    engine()
    before, _ = judged(run)
    grown, fresh = (make_run(tmp_path / name, num_problems=5) for name in ("grown", "fresh"))
    shutil.copytree(run / "judges", grown / "judges")
    report, _ = judged(grown)
    assert report.cost["reused_samples"] == before.cost["samples"] < report.cost["samples"]
    judged(fresh)
    for name in ("verdicts.jsonl", "summary.json"):
        assert (grown / "judges" / "judge" / name).read_bytes() == (fresh / "judges" / "judge" / name).read_bytes()


def test_a_run_that_has_changed(run, tmp_path, engine):
    """The consensus says what to do, and it helps."""
    engine(coin_judge(0, 0))
    judged(run)
    changed = make_run(tmp_path / "changed", num_problems=3)
    shutil.copytree(run / "judges", changed / "judges")
    options = {"inputs": [str(changed)], "consensus": True, "test_size": 0.0, "num_proc": 1}
    with pytest.raises(ValueError, match="'p003' has verdicts, but is not in the run.*Run `trl-hrm judge` again"):
        export(ExportConfig(output_dir=str(tmp_path / "a"), **options))
    report, _ = judged(changed)
    assert report.cost["reused_samples"] == report.cost["samples"]
    facts = export(ExportConfig(output_dir=str(tmp_path / "b"), **options))["facts"]["consensus"]
    assert facts["solutions"] > facts["not_compared"]["without_verdict"] >= 0


def test_shards_of_a_run_that_has_grown(run, tmp_path, engine):
    engine()
    for i in range(2):
        report, _ = judged(run, shard=f"{i}/2")
    assert not report.unfinished_shards
    grown = make_run(tmp_path / "grown", num_problems=5)
    shutil.copytree(run / "judges", grown / "judges")
    for i, unfinished in ((1, [0]), (0, [])):
        report, _ = judged(grown, shard=f"{i}/2")
        assert report.unfinished_shards == unfinished
    assert report.summary["problems"] < 5 == read_json(report.output_dir / "summary.json")["problems"]


def test_another_file_is_refused(tmp_path, engine):
    engine()
    rows = [{"prompt": f"{i}?", "completions": ["good"], "labels": [None]} for i in range(2)]
    folder = str(tmp_path / "out")
    report, _ = judged(write_rows(tmp_path / "rows.jsonl", rows[:1]), output_dir=folder)
    files = {path.name: path.read_bytes() for path in report.output_dir.iterdir()}
    with pytest.raises(ValueError, match=r"input.problems was 1 and is 2; input.solutions was 1 and is 2\."):
        judged(write_rows(tmp_path / "more.jsonl", rows), output_dir=folder)
    assert {path.name: path.read_bytes() for path in report.output_dir.iterdir()} == files


def test_accepted_changes(run, engine):
    """Earlier responses stay, also of a judge with other weights. This is in the manifest, and is said each time."""
    engine()
    judged(run, num_votes=2)
    engine(weights="w2")
    report, rows = judged(run, num_votes=4, accept_changes=["judge.weights"])
    assert report.cost["reused_samples"] == 2 * 64
    assert read_json(report.output_dir / "manifest.json")["accepted_changes"][0]["name"] == "judge.weights"
    again, _ = judged(run, num_votes=4)
    for one in (report, again):
        assert "warning: This run mixes different judges" in str(one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "2/2"}, "`shard` is '2/2'"),
        ({"name": "../x"}, "`name` is '../x'"),
        ({"name": ".x"}, "`name` is '.x'"),
        ({"template": "poem"}, "template is 'poem'"),
        ({"temperature": 0.0}, "all votes would be the same"),
        ({"num_votes": 0}, "`num_votes` is 0"),
        ({"num_votes": 1025, "max_in_flight": 1025}, "`num_votes` is 1025"),
        ({"max_in_flight": 2}, "`max_in_flight` is 2. It must be at least `num_votes`, which is 3"),
        ({"max_sequences": 2}, "`max_sequences` is 2. It must be at least `num_votes`"),
        ({"max_tokens": 3 * 4096 - 1}, "which is 12288"),
        ({"base_urls": ["http://a"]}, "`base_urls` only applies to engine openai"),
        ({"judge_api": "text"}, "`judge_api` only applies to engine openai"),
        ({"engine": "openai"}, "`base_urls` is missing"),
        ({"engine": "openai", "base_urls": ["http://a"], "judge_dtype": "float32"}, "Remove `judge_dtype`"),
        ({"judge": "/tmp", "judge_revision": "main"}, "`judge` is the local folder /tmp"),
        ({"segmentation": "regex"}, "must be used together"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message) if "`" in message else message):
        JudgeConfig(**{"input": "run", "judge": "nowhere", "engine": "transformers"} | options)


def test_output_folders(run, tmp_path, engine):
    engine()
    with pytest.raises(ValueError, match="`output_dir` is 'x', but the verdicts on the run"):
        judged(run, output_dir="x")
    with pytest.raises(ValueError, match="`segmentation` is 'sentence', but has no effect"):
        judged(run, segmentation="sentence")
    source = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1?", "completions": ["good"], "labels": [1]}])
    with pytest.raises(ValueError, match="`output_dir` is missing"):
        judged(source)
    with pytest.raises(ValueError, match="`name` is mine, but only names a folder in a run"):
        judged(source, output_dir=str(tmp_path / "out"), name="mine")
    verdicts = write_rows(tmp_path / "verdicts.jsonl", [{"prompt": "1+1?", "completions": ["good"], "labels": [1]}])
    for same in (verdicts, str(tmp_path)):
        with pytest.raises(ValueError, match="would be replaced. Choose another `output_dir`"):
            judged(same, output_dir=str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nothing: file not found"):
        judged(tmp_path / "nothing", output_dir=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (run / "judges").mkdir()
    (run / "judges" / "judge").touch()
    with pytest.raises(NotADirectoryError, match="Choose a folder as `name`"):
        judged(run)


def test_default_template_of_a_published_judge():
    config = JudgeConfig(input="a", judge="GenPRM/GenPRM-7B", engine="transformers")
    assert (config.template, config.temperature, config.max_response_tokens) == ("genprm", 0.6, 2048)
    assert JudgeConfig(input="a", judge="me/judge", base_urls="http://a").engine == "openai"


# Servers


class JudgeServer(HostileServer):
    """Server whose judge reads coins."""

    def write(self, prompt, seed, temperature):
        if "# Solution" not in prompt:
            return super().write(prompt, seed, temperature)
        return coin_judge()(prompt, random.Random(f"{prompt}/{seed}"))


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr(JudgeConfig, "load_tokenizer", lambda self: ChatTokenizer())
    monkeypatch.setattr(JudgeConfig, "model_identity", lambda self: {"tokenizer": "characters"})
    monkeypatch.setattr("trl_hrm.search.engines.http.MAX_PAUSE", 0.01)


def served_options(tmp_path, *servers):
    template = tmp_path / "served.json"
    template.write_text(
        json.dumps(
            {
                "scope": "first_error",
                "user": "Question: {problem}\n\n# Solution\n\n{steps}\n\n\\boxed{-1}",
                "max_tokens": 200,
            }
        )
    )
    urls = [server.url for server in servers]
    args = {"timeout": 5.0, "max_retries": 3, "backoff": 0.0}
    return {
        "judge": "lm",
        "engine": "openai",
        "base_urls": urls,
        "engine_args": args,
        "template": str(template),
        "max_solutions": 4,
    }


FAULTS = [
    "hang up",
    "cut",
    "100,000 brackets",
    "too few",
    "ids of another text",
    "id 2**31",
    "more tokens than requested",
]


@pytest.mark.parametrize("mode", FAULTS)
def test_server_with_faults(searched, run, tmp_path, served, mode):
    """Every fifth response is faulty and retried. An honest server gives the same verdicts."""
    shutil.copytree(searched, tmp_path / "honest")
    with JudgeServer() as server:
        _, expected = judged(tmp_path / "honest", **served_options(tmp_path, server))
    with JudgeServer((TRANSPORT | RESPONSE)[mode], every=5) as server:
        _, rows = judged(run, **served_options(tmp_path, server))
        assert server.num_asked > 16
    assert rows == expected


def test_server_that_only_has_faults(run, tmp_path, served):
    with JudgeServer(TRANSPORT["hang up"]) as server:
        with pytest.raises(OSError, match="The engine of the judge failed") as caught:
            judged(run, **served_options(tmp_path, server))
    assert "policy" not in str(caught.value) and not (run / "judges" / "judge" / "verdicts.jsonl").exists()
    with JudgeServer() as server:
        report, rows = judged(run, **served_options(tmp_path, server))
    assert len(rows) == 16 and report.summary["votes"] == 48


def test_server_that_cannot_be_used(run, tmp_path, served):
    """Messages name the options of the judge."""
    with FakeServer() as server:
        server.model = "other"
        with pytest.raises(OSError) as caught:
            judged(run, **served_options(tmp_path, server))
    assert "policy" not in str(caught.value) and "other" in str(caught.value)
    assert not (run / "judges").exists()


def test_command_line_with_a_server(run, tmp_path, served, capsys):
    """The command of the documentation."""
    with JudgeServer() as server:
        words = [
            "judge",
            str(run),
            "--judge",
            "lm",
            "--engine",
            "openai",
            "--base_urls",
            server.url,
            "--num_votes",
            "3",
        ]
        assert main(words) == 0
    assert "judged 64 solutions of 4 problems" in capsys.readouterr().out
    assert len(list(read_verdicts(run))) == 64
