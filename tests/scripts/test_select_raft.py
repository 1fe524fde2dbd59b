"""The command `select-raft`: a planted reward model must find the planted best, in every format of candidates."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from trl import SFTConfig, SFTTrainer

from trl_hrm import SelectRaftConfig, StepFormat, StepScorer
from trl_hrm.cli import main
from trl_hrm.command_parser import CommandParser
from trl_hrm.data import raft
from trl_hrm.data.candidate_sources import finished_solutions, read_candidates
from trl_hrm.data.candidates_config import CandidatesConfig, RaftConfig
from trl_hrm.data.problems import problem_split
from trl_hrm.data.step_labels import unite_steps
from trl_hrm.pages.pictures import draw_scores
from trl_hrm.scoring.aggregate import AGGREGATES, aggregate
from trl_hrm.search.engines.base import EngineError
from trl_hrm.search.nodes import read_trees, write_nodes
from trl_hrm.search.run_folder import check_manifest, finish_shard, node_files
from trl_hrm.search.steps import RULES, cut_text

from ..fakes import write_rows
from ..helpers import HEADS, save_checkpoint, tiny_model, tiny_tokenizer
from ..search.scripted import PROMPT, SEARCHES, make_problems, run_scripted, write_solution


class Planted(StepScorer):
    """Scores a step by the number in its text, and records the steps that it scored."""

    def score(self, prompts, candidates, spans=(1,), combine="max", progress=False):
        self.shown = getattr(self, "shown", []) + list(zip(prompts, candidates, strict=True))
        return [
            [[float(re.search(r"0\.\d+", step)[0]) for step in steps] for steps in solutions]
            for solutions in candidates
        ]


@pytest.fixture
def planted(monkeypatch) -> Planted:
    scorer = Planted(tiny_model(), tiny_tokenizer(), StepFormat())
    monkeypatch.setattr(SelectRaftConfig, "load_scorer", lambda config: scorer)
    return scorer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=1024)


def select(tmp_path: Path, source: str, *more: str, model: str = "planted") -> tuple[list[dict], dict]:
    """Return the report and all rows in file order, train before test."""
    words = ["select-raft", "--candidates", source, "--reward_model", model, "--output_dir", str(tmp_path / "raft")]
    assert main([*words, "--overwrite", *(() if "--test_size" in more else ("--test_size", "0")), *more]) == 0
    files = sorted((tmp_path / "raft" / "data").iterdir(), reverse=True)
    report = json.loads((tmp_path / "raft" / "build_report.json").read_text())
    return [row for file in files for row in pq.read_table(file).to_pylist()], report


def steps_text(*scores: float) -> str:
    return "\n\n".join(f"# Step {k}\nI am worth {score}" for k, score in enumerate(scores, start=1))


BY_AGGREGATE = {  # each aggregate prefers a different candidate
    "min": (0.4, 0.4, 0.4),
    "prod": (0.7, 0.3),
    "last": (0.1, 0.2, 0.92),
    "mean": (0.1, 0.9, 0.9, 0.9),
    "max": (0.99, 0.01, 0.01),
}


@pytest.mark.parametrize("name", AGGREGATES)
def test_each_aggregate_chooses_another_candidate(tmp_path, planted, name):
    """An aggregate that is accepted and ignored would choose something as well."""
    best = {k: max(BY_AGGREGATE, key=lambda other: aggregate(BY_AGGREGATE[other], k)) for k in AGGREGATES}
    assert best == {k: k for k in AGGREGATES}
    rows = [{"prompt": "1+1?", "completion": steps_text(*scores)} for scores in BY_AGGREGATE.values()]
    (row,), report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows), "--aggregate", name)
    assert row == {
        "prompt": "1+1?",
        "completion": steps_text(*BY_AGGREGATE[name]),
        "score": pytest.approx(aggregate(BY_AGGREGATE[name], name)),
        "aggregate": name,
        "num_candidates": 5,
        "rank": 1,
        "problem_id": row["problem_id"],
        "problem": "1+1?",
    }
    assert report["dropped"] == {"beyond_top_k": 4}


def test_against_sorting_by_hand(tmp_path, planted):
    """All options together: cap, repeats, blanks, ties, minimum score, and the count of what each one drops."""
    rng = random.Random(0)
    rows, groups = [], defaultdict(list)
    for _ in range(400):
        problem = f"What is {rng.randrange(30)}?"
        text = (
            steps_text(*(rng.randrange(1, 9) / 10 for _ in range(rng.randint(1, 2)))) if rng.random() < 0.95 else " \n"
        )
        rows.append({"prompt": problem, "completion": text})
        groups[problem].append(text)
    source = write_rows(tmp_path / "in.jsonl", rows)
    exclude = write_rows(tmp_path / "exclude.jsonl", [{"problem": "what is  3?"}])
    options = "--num_candidates 12 --max_kept 3 --min_score 0.4 --aggregate mean --test_size 0.3 --seed 7"
    found, report = select(tmp_path, source, *options.split(), "--exclude", exclude)
    expected, ties = {"train": [], "test": []}, 0
    judged = []
    dropped = dict.fromkeys(
        ("excluded", "beyond_num_candidates", "blank", "duplicate", "below_min_score", "beyond_top_k"), 0
    )
    empty = 0
    for problem, texts in groups.items():
        if problem == "What is 3?":
            dropped["excluded"] += len(texts)
            continue
        dropped["beyond_num_candidates"] += max(0, len(texts) - 12)
        scored = []
        for text in texts[:12]:
            if not text.strip():
                dropped["blank"] += 1
            elif text in [other for other, _ in scored]:
                dropped["duplicate"] += 1
            else:
                scores = list(map(float, re.findall(r"0\.\d", text)))
                scored.append((text, sum(scores) / len(scores)))
        judged += [score for _, score in scored]
        reach = [pair for pair in scored if pair[1] >= 0.4 - 1e-9]
        kept = sorted(reach, key=lambda pair: -pair[1])[:3]
        ties += len({score for _, score in kept}) < len(kept)
        dropped["below_min_score"] += len(scored) - len(reach)
        dropped["beyond_top_k"] += len(reach) - len(kept)
        empty += not kept
        for rank, (text, score) in enumerate(kept, start=1):
            row = (problem, text, pytest.approx(score), rank, min(len(texts), 12))
            expected[problem_split(problem, 0.3, 7)].append(row)
    names = ("prompt", "completion", "score", "rank", "num_candidates")
    assert [tuple(row[name] for name in names) for row in found] == expected["train"] + expected["test"]
    assert ties > 3 and min(dropped.values()) > 0
    assert report["dropped"] == dropped
    assert report["rows"] == {split: len(rows) for split, rows in expected.items()}
    assert report["records_in"] == 400 == len(found) + sum(dropped.values())
    assert report["notes"]["problems"] == 30 and report["notes"].get("problems_without_a_row", 0) == empty
    assert report["notes"]["problems_excluded"] == 1
    means = report["facts"]["mean score"]
    assert means["all judged candidates"] == pytest.approx(sum(judged) / len(judged))
    assert means["chosen"] == pytest.approx(sum(row["score"] for row in found) / len(found))


FORMS = {
    "text": [{"prompt": "p?", "completion": steps_text(*scores)} for scores in BY_AGGREGATE.values()],
    "steps": [{"prompt": "p?", "completions": steps_text(*s).split("\n\n")} for s in BY_AGGREGATE.values()],
    "texts": [{"prompt": "p?", "candidates": [steps_text(*scores) for scores in BY_AGGREGATE.values()]}],
    "lists": [{"prompt": "p?", "candidates": [steps_text(*s).split("\n\n") for s in BY_AGGREGATE.values()]}],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_candidates(tmp_path, planted, form):
    """In every format, the reward model scores the same steps and the row has the same text."""
    (row,), report = select(tmp_path, write_rows(tmp_path / "in.jsonl", FORMS[form]))
    assert row["completion"] == steps_text(*BY_AGGREGATE["min"]) and report["records_in"] == 5
    shown = [[f"# Step {k}\nI am worth {v}" for k, v in enumerate(s, start=1)] for s in BY_AGGREGATE.values()]
    assert planted.shown == [("p?", shown)]


def test_messages(tmp_path, planted):
    """Conversations stay conversations. The reward model gets only the problem, as in its training."""
    rows = []
    for place, scores in enumerate(BY_AGGREGATE.values()):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "p?"}]
        text = steps_text(*scores)
        completion = [{"role": "assistant", "content": text}] if place % 2 else text
        rows.append({"prompt": prompt, "completion": completion})
    rows += [row | {"prompt": row["prompt"][1:] * 2, "problem": "Q?"} for row in rows]
    found, _ = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    assert [row["prompt"] for row in found] == [rows[0]["prompt"], rows[-1]["prompt"]]
    assert [row["problem"] for row in found] == ["p?", "Q?"] == [problem for problem, _ in planted.shown]
    best = [{"role": "assistant", "content": steps_text(*BY_AGGREGATE["min"])}]
    assert [row["completion"] for row in found] == [best, best]


def test_problem_ids(tmp_path, planted):
    """Rows are grouped by id, or by problem if they have no id."""
    rows = [
        {"prompt": "p?", "completion": steps_text(0.1), "problem_id": "a"},
        {"prompt": "p?", "completion": steps_text(0.2), "problem_id": "b"},
        {"prompt": "p?", "completion": steps_text(0.3)},
        {"prompt": "p?", "completion": steps_text(0.4), "problem_id": "a"},
        {"prompt": "p?", "completion": steps_text(0.2)},
    ]
    found, report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    assert [(row["score"], row["num_candidates"]) for row in found] == [(0.4, 2), (0.2, 1), (0.3, 2)]
    assert [row["problem_id"] for row in found][:2] == ["a", "b"]
    assert report["warnings"] == [
        "every candidate has a single step, so all aggregates are the same. Check whether --segmentation matches the format of the candidates."
    ]


def test_blank_steps_of_a_list_are_dropped_and_counted(tmp_path, planted):
    """As in texts that are split into steps. The text of the candidate does not change."""
    steps = [steps_text(0.5), " ", ""]
    (row,), report = select(tmp_path, write_rows(tmp_path / "in.jsonl", [{"prompt": "p?", "completions": steps}]))
    assert planted.shown == [("p?", [[steps_text(0.5)]])]
    assert row["completion"] == "\n\n".join(steps)
    assert report["notes"]["blank_steps_left_out"] == 2


def test_problems_that_differ_in_space(tmp_path, planted):
    """The rows have one id for both. As two problems with different prompts, the next round would reject this output."""
    rows = [{"prompt": "What  is 1?", "candidates": [steps_text(0.1), steps_text(0.7)]}]
    rows += [{"prompt": "What is 1?\n", "candidates": [steps_text(0.6), steps_text(0.2)]}]
    for _ in range(2):
        found, report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows), "--max_kept", "2")
        assert [(row["prompt"], row["score"]) for row in found] == [("What  is 1?", 0.7), ("What  is 1?", 0.6)]
        assert report["notes"]["problems"] == 1
        rows = [*found, {"prompt": " What is 1?", "completion": steps_text(0.3)}]
    messages = [[{"role": "user", "content": text}] for text in ("a b", "a  b")]
    rows = [{"prompt": prompt, "completion": steps_text(0.1)} for prompt in messages]
    (row,), _ = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    assert row["prompt"] == messages[0]


def test_problems_that_differ_in_case_are_two(tmp_path, planted):
    """`$N$` and `$n$` are different variables, so the candidates of one must not be chosen for the other."""
    rows = [{"prompt": f"Find ${name}$.", "completion": steps_text(0.5)} for name in "Nn"]
    found, report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    assert [row["prompt"] for row in found] == ["Find $N$.", "Find $n$."] and report["notes"]["problems"] == 2
    assert len({row["problem_id"] for row in found}) == 2


def test_excluded_by_the_problem(tmp_path, planted):
    """The prompt has instructions around the problem, so comparing the prompt would never exclude a test problem."""
    rows = [{"prompt": f"Solve: {name}?", "problem": f"{name}?", "completion": steps_text(0.5)} for name in "ab"]
    rows.append({"prompt": "c?", "problem": "d?", "completion": steps_text(0.5)})
    exclude = write_rows(tmp_path / "exclude.jsonl", [{"problem": "A?"}, {"problem": "c?"}])
    found, report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows), "--exclude", exclude)
    assert [row["problem"] for row in found] == ["b?", "d?"]
    assert report["notes"] == {"problems": 3, "problems_excluded": 1} and report["dropped"] == {"excluded": 1}


def test_segmentation(tmp_path, planted):
    """A different split into steps has a different weakest step."""
    text = "It is 0.9. So 0.8.\n\nThen 0.3, or 0.7."
    other = "It is 0.4. So 0.8.\n\nThen 0.5."
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "p?", "candidates": [text, other]}])
    for words, shown in (
        (["blank_line"], [["It is 0.9. So 0.8.", "Then 0.3, or 0.7."], ["It is 0.4. So 0.8.", "Then 0.5."]]),
        (["sentence"], [["It is 0.9.", "So 0.8.", "Then 0.3, or 0.7."], ["It is 0.4.", "So 0.8.", "Then 0.5."]]),
        (["regex", "--step_pattern", r"\n+"], [text.split("\n\n"), other.split("\n\n")]),
    ):
        planted.shown = []
        (row,), report = select(tmp_path, source, "--segmentation", *words)
        assert planted.shown == [("p?", shown)]
        assert row["completion"] == other
        assert f"--segmentation {words[0]}" in report["command"] and not report["warnings"]


def test_lists_are_joined(tmp_path, planted):
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "p?", "completions": [" a 0.5", "b 0.6 "]}])
    assert select(tmp_path, source)[0][0]["completion"] == " a 0.5\n\nb 0.6 "
    assert select(tmp_path, source, "--join_steps", r"\n")[0][0]["completion"] == " a 0.5\nb 0.6 "
    assert planted.shown[0] == ("p?", [["a 0.5", "b 0.6"]])
    for separator, written in ((r"\n", "\n"), (r"\t", "\t"), ("", ""), ("-", "-")):
        (row,), report = select(tmp_path, source, f"--join_steps={separator}")
        assert row["completion"] == f" a 0.5{written}b 0.6 "
        assert "\n" not in report["command"] and "\t" not in report["command"]
        assert main([*shlex.split(report["command"])[1:], "--overwrite"]) == 0
        (again,) = pq.read_table(tmp_path / "raft" / "data").to_pylist()
        assert again == row


def test_advice_on_steps(tmp_path, planted, monkeypatch):
    """Only texts are split by --segmentation. For lists of steps, the option is an error."""
    say = "every candidate has a single step, so all aggregates are the same."
    for row, advice in (
        ({"completion": "a 0.5"}, " Check whether --segmentation matches the format of the candidates."),
        ({"completions": ["a 0.5"]}, ""),
        ({"candidates": ["a 0.5", ["b 0.5"]]}, " Check whether --segmentation matches the format of the candidates."),
    ):
        _, report = select(tmp_path, write_rows(tmp_path / "in.jsonl", [{"prompt": "p?"} | row]))
        assert report["warnings"] == [say + advice]
    script = lambda prefix, rng: "It is 0.7.\n\n# END!"  # noqa: E731
    run_scripted(tmp_path / "run", SEARCHES["rollouts"], make_problems(1), script=script)
    check_manifest(tmp_path / "run", {"prompt": asdict(PROMPT)})
    unanswered, warning = select(tmp_path, str(tmp_path / "run"))[1]["warnings"]
    assert warning == say and "(100.0 %) have no grade: " in unanswered and "without an answer." in unanswered


@pytest.fixture(params=["full_tree", "rollouts"])
def run_folder(request, tmp_path) -> Path:
    """A run of a scripted policy in which one of seven problems is not fully searched."""
    folder = tmp_path / "run"
    run_scripted(folder, SEARCHES[request.param], make_problems(7))
    check_manifest(folder, {"prompt": asdict(replace(PROMPT, style="chat"))})
    log = folder / "log-00000-of-00001.jsonl"
    events = log.read_text().splitlines(keepends=True)
    assert '"event": "close"' in events.pop()
    log.write_text("".join(events))
    finish_shard(folder, 0, 1)
    return folder


def test_texts_are_split_as_in_exports(run_folder):
    """The reward model was trained on exported steps. Other whitespace or headers would be unfamiliar text."""
    num_steps = 0
    for tree in (tree for file in node_files(run_folder) for tree in read_trees(file)):
        known = set(unite_steps(tree, Counter()).texts)
        for text, steps in finished_solutions(tree):
            assert cut_text(text, RULES["step_header"]) == steps and set(steps) <= known
            num_steps += len(steps)
    assert num_steps > 40


def test_run_as_candidates(tmp_path, run_folder, checkpoint):
    """All finished solutions are candidates, right and wrong, and the best equals scoring each one separately."""
    found, report = select(
        tmp_path,
        str(run_folder),
        "--aggregate",
        "prod",
        "--max_kept",
        "2",
        "--spans",
        "1",
        "2",
        "--combine",
        "mean",
        model=checkpoint,
    )
    scorer = StepScorer.from_pretrained(checkpoint)
    trees = [tree for file in node_files(run_folder) for tree in read_trees(file)]
    expected, wrong, num_finished, num_cut_off = [], 0, 0, 0
    assert len(trees) == 6
    for tree in trees:
        scored = {}
        steps_at = {tuple(tree.path(i)) for i, node in enumerate(tree.nodes) if node.role != "rollout"}
        above = {path[:-1] for path in steps_at}
        num_cut_off += sum(path not in above and not tree.nodes[path[-1]].is_final for path in steps_at)
        for i, node in enumerate(tree.nodes):
            if node.is_final and node.role != "rollout":
                num_finished += 1
                wrong += not node.correct
                steps = [text for text in map(tree.step_text, tree.path(i)) if text]
                score = aggregate(scorer.score([tree.problem.prompt], [[steps]], (1, 2), "mean")[0][0], "prod")
                scored.setdefault(tree.text(i), score)
        best = sorted(scored.items(), key=lambda pair: -pair[1])[:2]
        expected += [(tree.problem.problem_id, text, pytest.approx(score, abs=1e-5)) for text, score in best]
    assert [(row["problem_id"], row["completion"][0]["content"], row["score"]) for row in found] == expected
    assert report["records_in"] == num_finished and wrong > 5
    assert report["notes"]["solutions_without_an_end"] == num_cut_off > 0
    message = "1 problems have an unfinished search and are dropped. Run trl-hrm annotate again to complete them."
    assert report["warnings"] == [f"{run_folder}: {message}"]
    for row in found:
        assert row["prompt"] == [{"role": "user", "content": PROMPT.text(row["problem"])}]


def test_missing_problems_of_a_run_are_counted(tmp_path, planted, monkeypatch, capsys):
    """Otherwise a half-finished run would look like a small one, and filtered problems like hard ones."""

    def write(prefix: str, rng: random.Random) -> str:
        if "What is 3 " in prefix:
            return "\n# Answer\n\n7\n# END!"  # always right
        if "What is 4 " in prefix:
            raise EngineError("no answer")
        return write_solution(prefix, rng).replace("The value is ", "It is 0.")

    folder = tmp_path / "run"
    run_scripted(folder, SEARCHES["filtered"], make_problems(8), script=write, shard=(0, 2))
    check_manifest(folder, {"prompt": asdict(PROMPT)})
    trees = [tree for file in node_files(folder) for tree in read_trees(file)]
    status = Counter(tree.status for tree in trees)
    assert status["always_solved"] > 0 and status["done"] > 2
    next(tree for tree in trees if any(finished_solutions(tree))).status = "never_solved"
    write_nodes(trees, node_files(folder)[0])
    status = Counter(tree.status for tree in trees)
    _, report = select(tmp_path, str(folder))
    notes = report["notes"]
    assert {name: notes[f"problems_{name}"] for name in status if name != "done"} == {
        name: count for name, count in status.items() if name != "done"
    }
    finished = sum(tree.status == "done" and any(finished_solutions(tree)) for tree in trees)
    assert notes["problems"] == finished
    assert notes.get("problems_without_a_finished_solution", 0) == status["done"] - finished
    expected = [
        f"{folder}: 1 problems have failed requests and are dropped. Run trl-hrm annotate again to complete them.",
        f"{folder}: 1 shards are missing from the folder, so their problems are not included.",
    ]
    assert report["warnings"] == expected
    printed = capsys.readouterr().out
    assert all(f"warning: {warning}" in printed for warning in expected)


def test_a_dataset_as_candidates(tmp_path, planted, monkeypatch):
    """The output of one command is the input of the next, and another split has other candidates."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "shared")  # may hold rows of another folder
    rows = [{"prompt": f"{i}?", "completion": steps_text(0.1 * (j + 1))} for i in range(20) for j in range(4)]
    source = write_rows(tmp_path / "in.jsonl", rows)
    first, _ = select(tmp_path, source, "--max_kept", "3", "--test_size", "0.3")
    (tmp_path / "raft").rename(tmp_path / "first")
    for split in ("train", "test"):
        found, report = select(tmp_path, str(tmp_path / "first"), "--split", split)
        expected = [row for row in first if problem_split(row["problem"], 0.3, 42) == split and row["rank"] == 1]
        same = ("prompt", "completion", "score", "problem_id", "problem")
        assert [[row[k] for k in same] for row in found] == [[row[k] for k in same] for row in expected]
        assert report["records_in"] == 3 * len(expected) > 10
    assert not (tmp_path / "shared").exists()


def test_inputs_of_a_wrong_type(tmp_path, planted, run_folder, capsys):
    """Simple mistakes that would otherwise give wrong candidates or a confusing error."""
    folder = tmp_path / "data"
    folder.mkdir()
    row = {"prompt": ["p?"], "completion": [steps_text(0.5)], "problem_id": [1.5]}
    pq.write_table(pa.table(row), folder / "train.parquet")
    (run_folder / "manifest.json").rename(tmp_path / "elsewhere.json")
    before = sorted(tmp_path.iterdir())
    for source, more, message in (
        (folder / "train.parquet", [], "train.parquet: .*Parquet"),
        (folder, ["--split", "nope"], f"{folder}: .*\"nope\".*'train'"),
        (folder, [], f"{folder}, dataset row 0: `problem_id` is 1.5"),
        (run_folder, [], f"{run_folder}: .*manifest.json"),
    ):
        words = ["--candidates", str(source), "--reward_model", "x", "--output_dir", str(tmp_path / "raft"), *more]
        assert main(["select-raft", *words]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert sorted(tmp_path.iterdir()) == before


def test_rebuild_card_and_picture(tmp_path, monkeypatch, checkpoint):
    """The command on the card reproduces every byte, including the picture."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    rows = [
        {"prompt": f"{i % 15}+2?", "completion": f"add {rng.randrange(9)}\n\nso {rng.randrange(9)}", "join": 1}
        for i in range(200)
    ]
    write_rows(tmp_path / "in.jsonl", rows)
    command = (
        "select-raft --candidates in.jsonl --output_dir out --aggregate mean --segmentation blank_line --max_kept 2"
    )
    command += (
        " --num_candidates 10 --min_score 0.2 --spans 1 2 --combine mean --test_size 0.2 --seed 3"
        " --reward_model_batch_size 4"
    )
    assert main([*command.split(), "--reward_model", checkpoint]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert (tmp_path / "out" / "scores.png").read_bytes().startswith(b"\x89PNG") and len(files) == 5
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    program, *again = shlex.split(report["command"])
    assert program == "trl-hrm" and main(again) == 1  # the output exists
    assert main([*again, "--overwrite"]) == 0
    assert {path: path.read_bytes() for path in files} == files
    card = DatasetCard.load(tmp_path / "out" / "README.md").text
    for line in (
        "![Scores of all scored candidates and of the selected ones](scores.png)",
        f"| reward model: reward model | {checkpoint} |",
        "| reward model: spans | `[1, 2]` |",
        "| selection: aggregate | mean |",
        "| selection: num candidates | 10 |",
        report["command"],
    ):
        assert line in card
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(dataset[name]) for name in dataset} == report["rows"]


def test_trained_on(tmp_path, planted):
    """TRL can train on the texts and messages in the files as they are."""
    tokenizer = tiny_tokenizer().__class__.from_pretrained(_saved(tmp_path))
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant\n{% endif %}"
    )
    for name, prompt in (("texts", "1+1?\n"), ("messages", [{"role": "user", "content": "1+1?"}])):
        source = write_rows(tmp_path / f"{name}.jsonl", [{"prompt": prompt, "completion": steps_text(0.5, 0.6)}])
        select(tmp_path, source)
        dataset = load_dataset(str(tmp_path / "raft"), split="train", cache_dir=str(tmp_path / name))
        config = SFTConfig(
            str(tmp_path / "sft"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            max_steps=1,
            save_strategy="no",
        )
        trainer = SFTTrainer(tiny_model(HEADS["lm"]), args=config, train_dataset=dataset, processing_class=tokenizer)
        (prepared,) = trainer.train_dataset
        trained = [
            token for token, label in zip(prepared["input_ids"], prepared["labels"], strict=True) if label != -100
        ]
        assert tokenizer.decode(trained, skip_special_tokens=True).strip() == steps_text(0.5, 0.6)
        trainer.train()
        assert trainer.state.global_step == 1


def _saved(tmp_path: Path) -> str:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def test_too_long_for_the_model(tmp_path, planted):
    """One long sample must neither stop the selection, nor be chosen, nor be dropped without a count."""
    rows = [{"prompt": "p?", "candidates": [steps_text(0.2), steps_text(0.9) + " on" * 600]}]
    rows += [{"prompt": "q?", "candidates": [steps_text(0.9) + " on" * 600]}]
    (row,), report = select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    assert row["score"] == 0.2
    assert report["dropped"] == {"too_long_to_judge": 2} and report["notes"]["problems_without_a_row"] == 1


GOOD = {"prompt": "p?", "completion": steps_text(0.5)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"completion": "x"},
            "in.jsonl:2: .*--columns prompt=problem",
        ),
        ({"prompt": [{"role": "user"}], "completion": "x"}, "in.jsonl:2: `prompt` is "),
        ({"prompt": "p?"}, r"in.jsonl:2: .*\['prompt'\]"),
        (GOOD | {"completions": ["x"]}, "in.jsonl:2: .*completion and completions"),
        ({"prompt": "p?", "completion": 3}, "in.jsonl:2: `completion` is 3"),
        ({"prompt": "p?", "completion": ["a"]}, r"in.jsonl:2: `completion` is \['a'\]"),
        ({"prompt": "p?", "completions": "a"}, "in.jsonl:2: `completions` is 'a'"),
        ({"prompt": "p?", "completions": ["a", 3]}, r"in.jsonl:2: `completions\[1\]` is 3"),
        ({"prompt": "p?", "candidates": "a"}, "in.jsonl:2: `candidates` is 'a'"),
        ({"prompt": "p?", "candidates": ["a", 3]}, r"in.jsonl:2: `candidates\[1\]` is 3"),
        (
            {"prompt": "p?", "completion": [{"role": "user", "content": "x"}]},
            "in.jsonl:2: `completion` is .*assistant",
        ),
        (GOOD | {"problem_id": 7.5}, "in.jsonl:2: `problem_id` is 7.5"),
        (
            {"prompt": [{"role": "user", "content": "a", "name": "me"}], "completion": "x"},
            "in.jsonl:2: .*`prompt` has name",
        ),
        (
            {"prompt": "q?", "completion": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]},
            "in.jsonl:2: .*`completion` has reasoning_content",
        ),
        (GOOD | {"problem": " "}, "in.jsonl:2: the problem is ' '"),
        (
            {"prompt": "Solve: p?", "problem": "p?", "completion": "x"},
            "in.jsonl:2: `prompt` is 'Solve: p[?]'.*in.jsonl:1 has 'p[?]'",
        ),
        (GOOD | {"parents": [-1]}, "in.jsonl:2: .*`parents`"),
        (
            {"prompt": [{"role": "user", "content": "a"}] * 2, "completion": "x"},
            "in.jsonl:2: .*\\['user', 'user'\\]",
        ),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": "x"},
            "in.jsonl:1.*in.jsonl:2",
        ),
    ],
)
def test_faulty_rows(tmp_path, planted, capsys, row, message):
    """The error names file and line, and nothing is partially written."""
    source = write_rows(tmp_path / "in.jsonl", [GOOD, row])
    words = [
        "select-raft",
        "--candidates",
        source,
        "--reward_model",
        "planted",
        "--output_dir",
        str(tmp_path / "raft"),
    ]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and re.search(message, error), error
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_same_id_other_prompt(tmp_path, planted, capsys):
    for more, message in (
        ({"prompt": "q?"}, "in.jsonl:2: `prompt` is 'q?', but"),
        ({"problem": "q?"}, "in.jsonl:2: `problem` is 'q?', but"),
    ):
        rows = [GOOD | {"problem_id": "a"}, GOOD | {"problem_id": "a"} | more]
        source = write_rows(tmp_path / "in.jsonl", rows)
        words = ["--candidates", source, "--reward_model", "x", "--output_dir", str(tmp_path / "o")]
        assert main(["select-raft", *words]) == 1
        assert message in capsys.readouterr().err


def test_fields_of_messages_without_a_value(tmp_path, planted):
    """`datasets` adds the fields of other rows with the value None. Dropping these loses nothing."""
    prompt = [{"role": "user", "content": "p?", "name": None}]
    (row,), _ = select(tmp_path, write_rows(tmp_path / "in.jsonl", [GOOD | {"prompt": prompt}]))
    assert row["prompt"] == [{"role": "user", "content": "p?"}]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_kept", "0"], "`max_kept` is 0"),
        (["--num_candidates", "0"], "`num_candidates` is 0"),
        (["--min_score", "1.5"], "`min_score` is 1.5"),
        (["--min_score", "-0.1"], "`min_score` is -0.1"),
        (["--test_size", "1"], "`test_size` is 1.0"),
        (["--segmentation", "regex"], "step_pattern"),
        (["--step_pattern", "x"], "step_pattern"),
        (["--segmentation", "regex", "--step_pattern", "("], "regular expression"),
        (["--split", "test"], "`split` is 'test'.*in.jsonl"),
        (["--join_steps", "x"], "`join_steps` .*texts"),
        (["--min_score", "0.9"], "below_min_score: 1"),
        (["--candidates", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_options_that_cannot_work(tmp_path, planted, capsys, more, message):
    words = ["--candidates", write_rows(tmp_path / "in.jsonl", [GOOD]), "--reward_model", "x"]
    assert main(["select-raft", *words, "--output_dir", str(tmp_path / "raft"), *more]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_options_without_effect(tmp_path, run_folder, planted, capsys):
    for more, message in (
        (["--join_steps", "x"], "`join_steps` is 'x'"),
        (["--split", "train"], "`split` is 'train'"),
    ):
        words = ["--candidates", str(run_folder), "--reward_model", "x", "--output_dir", str(tmp_path / "raft")]
        assert main(["select-raft", *words, *more]) == 1
        assert re.search(message, capsys.readouterr().err)
    source = write_rows(tmp_path / "in.jsonl", [{"prompt": "p?", "completions": ["a"]}])
    config = CandidatesConfig(candidates=source, segmentation="sentence")
    with pytest.raises(ValueError, match="`segmentation` .*lists of steps"):
        read_candidates(config, Counter())
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl"):
        read_candidates(CandidatesConfig(candidates=str(tmp_path / "empty.jsonl")), Counter())


def test_several_inputs(tmp_path, planted):
    """The questions of RAFT come from several sources. A problem that is in two of them has the candidates of both."""
    first = [{"prompt": "1?", "completion": steps_text(0.5)}, {"prompt": "2?", "completion": steps_text(0.4)}]
    second = [{"prompt": "2?", "completion": steps_text(0.6)}, {"prompt": "3?", "completion": steps_text(0.2)}]
    sources = [write_rows(tmp_path / f"{i}.jsonl", rows) for i, rows in enumerate((first, second))]
    rows, report = select(tmp_path, sources[0], "--candidates", *sources)
    assert {row["problem"]: (row["score"], row["num_candidates"]) for row in rows} == {
        "1?": (0.5, 1),
        "2?": (0.6, 2),
        "3?": (0.2, 1),
    }
    assert report["inputs"] == sources and report["records_in"] == 4 and report["dropped"] == {"beyond_top_k": 1}
    assert report["notes"]["problems_in_several_inputs"] == 1 and report["notes"]["problems"] == 3
    assert report["facts"]["steps"] == "step_header"
    words = shlex.split(report["command"])[1:]
    assert words[words.index("--candidates") + 1 :][:2] == sources
    parsed, _ = CommandParser(SelectRaftConfig).read(words[1:])
    assert parsed.candidates == sources


def test_a_run_and_a_file(tmp_path, run_folder, planted, monkeypatch):
    """The steps of a run stay as they are, and texts of a file are split."""
    monkeypatch.setattr(planted, "score", lambda p, c, **_: [[[0.5] * len(steps) for steps in one] for one in c])
    alone, _ = select(tmp_path, str(run_folder))
    row = {"prompt": [{"role": "user", "content": "1?"}], "completion": [{"role": "assistant", "content": "a. b."}]}
    source = write_rows(tmp_path / "in.jsonl", [row])
    rows, report = select(tmp_path, source, "--candidates", str(run_folder), source)
    assert rows[:-1] == alone and rows[-1]["completion"] == row["completion"]
    assert report["warnings"][0].startswith(f"{run_folder}: ") and report["facts"]["steps"] == "given, step_header"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"problem_id": "a", "prompt": "1?"}, {"problem_id": "a", "prompt": "2?"}],
            "1.jsonl:1: `prompt` is '2\\?'.*0.jsonl:1",
        ),
        (
            [{"prompt": "1?"}, {"prompt": [{"role": "user", "content": "2?"}]}],
            "text at .*0.jsonl:1, but messages at .*1.jsonl:1",
        ),
    ],
)
def test_inputs_that_contradict_each_other(tmp_path, planted, capsys, rows, message):
    sources = [
        write_rows(tmp_path / f"{i}.jsonl", [row | {"completion": steps_text(0.5)}]) for i, row in enumerate(rows)
    ]
    words = [
        "select-raft",
        "--candidates",
        *sources,
        "--reward_model",
        "planted",
        "--output_dir",
        str(tmp_path / "raft"),
    ]
    assert main(words) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "raft").exists()


def test_output_that_exists_is_found_before_scoring(tmp_path, capsys):
    """Found after it, it would cost hours of scoring."""
    source = write_rows(tmp_path / "in.jsonl", [GOOD])
    words = [
        "select-raft",
        "--candidates",
        source,
        "--reward_model",
        "nowhere",
        "--output_dir",
        str(tmp_path / "raft"),
    ]
    (tmp_path / "raft").mkdir()
    (tmp_path / "raft" / "mine.txt").write_text("x")
    assert main(words) == 1
    assert "the output already exists" in capsys.readouterr().err


def test_aggregates_from_python():
    with pytest.raises(ValueError, match="`aggregate` is 'sum'"):
        RaftConfig(output_dir="out", candidates="in.jsonl", aggregate="sum")


def test_options_of_the_reward_model(tmp_path, monkeypatch):
    """An option that is read and not passed on would make no visible difference."""
    loaded = Mock()
    monkeypatch.setattr(StepScorer, "from_pretrained", loaded)
    StepFormat(step_separator="; ").save(tmp_path)
    given = {"revision": "v2", "dtype": "bfloat16", "max_length": 64, "batch_size": 3}
    config = SelectRaftConfig(
        candidates="in.jsonl",
        output_dir="out",
        reward_model="model",
        step_format=tmp_path / "step_format.json",
        reference_model="base",
        **{f"reward_model_{name}": value for name, value in given.items()},
    )
    config.load_scorer()
    given["reference_model"] = "base"
    loaded.assert_called_once_with("model", step_format=StepFormat(step_separator="; "), **given)


def test_the_picture_shows_what_was_judged_and_chosen(tmp_path, planted, monkeypatch):
    """If the two histograms were swapped, the picture would look just as good."""
    figures = []
    monkeypatch.setattr(raft, "draw_scores", lambda *args: figures.append(draw_scores(*args)))
    rows = [{"prompt": f"{i}?", "candidates": [steps_text(0.1), steps_text(0.62 + i / 10)]} for i in range(2)]
    select(tmp_path, write_rows(tmp_path / "in.jsonl", rows))
    above, below = figures[0].axes
    assert above.get_title() == "all judged candidates: 4, mean 0.385" and below.get_title() == "chosen: 2, mean 0.670"
    for axes, expected in ((above, {4: 2, 24: 1, 28: 1}), (below, {24: 1, 28: 1})):
        heights = {i: bar.get_height() for i, bar in enumerate(axes.patches)}
        assert {i: height for i, height in heights.items() if height} == expected
        assert axes.lines[0].get_xdata()[0] == pytest.approx(float(axes.get_title()[-5:]))
    assert below.get_xlabel() == "min of step scores"


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("no space left")])
def test_stopped(tmp_path, monkeypatch, planted, capsys, fault):
    """Stopped while writing, it leaves neither a dataset without its card nor a partial folder."""
    monkeypatch.setattr(raft, "draw_scores", Mock(side_effect=fault))
    source = write_rows(tmp_path / "in.jsonl", [GOOD])
    words = [
        "select-raft",
        "--candidates",
        source,
        "--reward_model",
        "planted",
        "--output_dir",
        str(tmp_path / "raft"),
    ]
    assert main(words) == (130 if fault is KeyboardInterrupt else 1)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_the_dataset_outlives_a_full_disk(tmp_path, monkeypatch, planted, capsys):
    """Scoring takes hours, so the dataset is saved elsewhere if its folder cannot be written."""
    draw = raft.draw_scores

    def full(judged, chosen, label, path):
        if tmp_path / "raft" in path.parents or ".raft." in str(path):
            raise OSError(28, "No space left on device")
        draw(judged, chosen, label, path)

    monkeypatch.setattr(raft, "draw_scores", full)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    words = ["select-raft", "--candidates", write_rows(tmp_path / "in.jsonl", [GOOD]), "--reward_model", "planted"]
    words += ["--output_dir", str(tmp_path / "raft")]
    assert main(words) == 1
    folder = re.search(
        r"raft could not be written \(.*No space left.*\). The dataset is in (\S+)\. ", capsys.readouterr().err
    )[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "temporary"]
    monkeypatch.setattr(raft, "draw_scores", draw)
    assert main(words) == 0
    for name in ("data/train-00000-of-00001.parquet", "build_report.json", "README.md", "scores.png"):
        assert Path(folder, name).read_bytes() == (tmp_path / "raft" / name).read_bytes()


SLEEPER = """
import sys, time
from trl_hrm.cli import main
from trl_hrm.command_parser import CommandParser
from trl_hrm.data import raft
raft.draw_scores = lambda *args: time.sleep(600)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed(tmp_path, checkpoint):
    """Killed while writing, with the rows on disk, it must leave no output folder and be able to start again."""
    rows = [{"prompt": f"{i}?", "completion": f"add {j}"} for i in range(20) for j in range(2)]
    words = ["select-raft", "--candidates", write_rows(tmp_path / "in.jsonl", rows), "--reward_model", checkpoint]
    words += ["--output_dir", str(tmp_path / "raft"), "--test_size", "0"]
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, *words], env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not list(tmp_path.glob(".raft.*/parts/*.arrow")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "raft").exists()
    assert main(words) == 0
    assert pq.read_table(tmp_path / "raft" / "data").num_rows == 20
