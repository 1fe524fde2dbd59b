"""The command `step-search`: a real policy, also from given steps, the recorded results, and errors."""

import json
import re
from pathlib import Path

import pytest

from trl_hrm import StepScorer
from trl_hrm.cli import main
from trl_hrm.evaluation.results import load_candidates, load_results
from trl_hrm.search.log import EventLog
from trl_hrm.search.tree import make_id

from ..fakes import write_rows
from ..helpers import save_checkpoint
from ..search.policies import KNOWN


WE_START, COUNT = "# Step 1\nWe start.\n\n# Step 2", "# Step 1\nCount.\n\n# Step 2"
ROWS = [row | {"problem_id": f"q{i}", "begun": begun} for i, row in enumerate(KNOWN) for begun in (WE_START, COUNT)]
PROMPT = "--prompt question --prompt_style plain --segmentation step_header --final_stops".split() + ["# END!"]
SEARCH = [*PROMPT, "--engine", "transformers", "--max_step_tokens", "30", "--n", "2", "4"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=1024)


def run(folder: Path, rows: list[dict], policy: str, model: str, *more: str) -> int:
    problems = write_rows(folder.parent / "problems.jsonl", rows)
    words = ["--problems", problems, "--policy", policy, "--reward_model", model, "--output_dir", str(folder)]
    return main(["step-search", *words, *SEARCH, *more])


def test_step_search(tmp_path, policy, checkpoint):
    """Greedy and beam search, with the options of each."""
    problems = write_rows(tmp_path / "problems.jsonl", KNOWN)
    words = ["step-search", "--problems", problems, "--policy", policy, "--reward_model", checkpoint, "--output_dir"]
    common = [*PROMPT, "--engine", "transformers", "--max_step_tokens", "30"]
    assert main([*words, str(tmp_path / "greedy"), *common, "--n", "1", "2"]) == 0
    results = load_results(tmp_path / "greedy")
    assert results.strategy == "step_search" and results.n == [1, 2] and results.settings["aggregate"] == "last"
    assert results.num_problems == 4 and (tmp_path / "greedy" / "candidates-n2.jsonl").is_file()
    beam = ["--strategy", "beam_search", "--branching", "2", "--n", "4", "--aggregate", "min", "--max_depth", "3"]
    assert main([*words, str(tmp_path / "beam"), *common, *beam]) == 0
    assert load_results(tmp_path / "beam").settings["max_depth"] == 3


def test_from_prefixes_to_results(tmp_path, policy, checkpoint, capsys):
    """Two prefixes per problem. A score covers the whole path, from the first sampled step on. Given steps have none."""
    assert run(tmp_path / "out", ROWS, policy, checkpoint, "--prefix_column", "begun", "--spans", "1", "2") == 0
    assert "8 records: 8 problems, 0 repeated" in capsys.readouterr().out
    results = load_results(tmp_path / "out")
    assert results.num_problems == 8 and results.settings["prefix_column"] == "begun"
    manifest = json.loads((tmp_path / "out" / "n-4" / "manifest.json").read_text())
    assert manifest["started_with"]["prefix_column"] == "begun"
    rows = list(load_candidates(tmp_path / "out", "candidates-n4.jsonl"))
    assert [row.problem_id for row in rows] == [f"{row['problem_id']}-{make_id(row['begun'])}" for row in ROWS]
    scorer = StepScorer.from_pretrained(checkpoint)
    for given, row in zip(ROWS, rows, strict=True):
        for candidate in row.candidates:
            assert candidate.text.startswith(given["begun"])
            assert candidate.steps[0] == given["begun"].removesuffix("# Step 2").strip()
            scores = scorer.score([row.problem], [[candidate.steps]], (1, 2))[0][0]
            assert candidate.scores == pytest.approx(scores[1:], abs=1e-5)
    points = results.curves["step_search"]
    with EventLog(tmp_path / "out" / "n-4" / "log-00000-of-00001.jsonl") as log:
        sampled = [node for problem_id in log.problems for node in log.read(problem_id).sampled]
    assert points[-1]["policy_num_tokens"] == sum(len(node.token_ids) for node in sampled)
    assert points[-1]["policy_num_sequences"] == len(sampled)


def test_a_greedy_policy_repeats_its_continuation(tmp_path, policy, checkpoint):
    """
    At temperature 0, a solution cut after any of its steps continues in the same way, because the policy reads the same token
    ids as when it wrote the steps itself.
    """
    greedy = ("--temperature", "0", "--n", "1")
    assert run(tmp_path / "whole", KNOWN, policy, checkpoint, *greedy) == 0
    with EventLog(tmp_path / "whole" / "n-1" / "log-00000-of-00001.jsonl") as log:
        trees = [log.read(problem_id).tree for problem_id in log.problems]
    rows, expected = [], []
    for row, tree in zip(KNOWN, trees, strict=True):
        last = len(tree.nodes) - 1
        for node in tree.path(last)[:-1]:
            rows.append(row | {"begun": tree.text(node)})
            expected.append((tree.text(last), tree.prefix_ids(last)))
    assert len(rows) >= 4
    assert run(tmp_path / "after", rows, policy, checkpoint, *greedy, "--prefix_column", "begun") == 0
    with EventLog(tmp_path / "after" / "n-1" / "log-00000-of-00001.jsonl") as log:
        trees = [log.read(problem_id).tree for problem_id in log.problems]
    assert [(tree.text(len(tree.nodes) - 1), tree.prefix_ids(len(tree.nodes) - 1)) for tree in trees] == expected


def test_more_prefixes_are_more_problems(tmp_path, policy, checkpoint):
    """Started again with more rows, a run keeps its results and searches the new rows. No prefix gets another's samples."""
    more = ("--prefix_column", "begun", "--overwrite")
    assert run(tmp_path / "out", ROWS[:2], policy, checkpoint, *more) == 0
    log = tmp_path / "out" / "n-4" / "log-00000-of-00001.jsonl"
    before = log.read_bytes()
    assert run(tmp_path / "out", ROWS, policy, checkpoint, *more) == 0
    assert log.read_bytes().startswith(before) and load_results(tmp_path / "out").num_problems == 8
    assert run(tmp_path / "whole", ROWS, policy, checkpoint, *more) == 0
    found, expected = (list(load_candidates(tmp_path / name, "candidates-n4.jsonl")) for name in ("out", "whole"))
    assert [[c.text for c in row.candidates] for row in found] == [
        [c.text for c in row.candidates] for row in expected
    ]


def test_without_the_option_nothing_is_recorded(tmp_path, policy, checkpoint):
    """An unnamed column is not read, and the keys of the results do not change."""
    rows = [row | {"begun": "no end"} for row in KNOWN]
    assert run(tmp_path / "out", rows, policy, checkpoint, "--n", "1") == 0
    assert "prefix_column" not in load_results(tmp_path / "out").settings
    text = (tmp_path / "out" / "n-1" / "log-00000-of-00001.jsonl").read_text()
    text += (tmp_path / "out" / "n-1" / "manifest.json").read_text()
    assert "prefix" not in text


def test_only_step_searches_read_a_prefix(tmp_path, capsys):
    """Whole solutions are sampled from the problem. If the option were ignored, they would seem to start with the prefix."""
    words = ["--reward_model", "m", "--output_dir", str(tmp_path / "out"), "--prefix_column", "begun"]
    with pytest.raises(SystemExit):
        main(["best-of-n", *words, "--policy", "p", "--problems", "q"])
    assert "found '--prefix_column', which is not an option" in capsys.readouterr().err
    assert main(["step-search", *words]) == 1
    assert "`problems` is missing" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_annotate_has_no_prefixes(tmp_path, capsys):
    """The labels of `annotate` are values of what follows the problem."""
    with pytest.raises(SystemExit):
        main(["annotate", "--problems", "q", "--policy", "p", "--output_dir", str(tmp_path), "--prefix_column", "x"])
    assert "found '--prefix_column', which is not an option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("column", "begun", "more", "message"),
    [
        (
            "start",
            WE_START,
            (),
            "['answer', 'begun', 'problem']",
        ),
        ("begun", "", (), "'begun' is ''"),
        (
            "begun",
            "# Step 1\nWe",
            (),
            "the prefix ends with '# Step 1\\nWe'",
        ),
        (
            "begun",
            WE_START + "\nIt is \\boxed{3}\n\n# Step 3",
            (),
            "the prefix states the answer '3'",
        ),
        ("begun", WE_START + "\n# END!", (), "the prefix contains '# END!'"),
        (
            "begun",
            WE_START,
            ("--max_depth", "1"),
            "the prefix has 1 steps and max_depth is 1",
        ),
    ],
)
def test_faults_name_file_and_line(tmp_path, capsys, column, begun, more, message):
    """The error must come before the models are loaded and before anything is written."""
    rows = [KNOWN[0] | {"begun": WE_START} if column == "begun" and not more else KNOWN[0] | {"begun": begun}]
    rows += [KNOWN[1] | {"begun": begun}]
    assert run(tmp_path / "out", rows, "p", "m", "--prefix_column", column, *more) == 1
    error = capsys.readouterr().err
    line = 1 if column == "start" or more else 2
    assert re.search(rf"error: \S*problems\.jsonl:{line}: .*{re.escape(message)}", error)
    assert not (tmp_path / "out").exists()


def test_only_extracted_answers_end_a_solution(tmp_path, policy, checkpoint, capsys):
    """With other extractors, a box ends neither a prefix nor a sampled step."""
    rows = [KNOWN[0] | {"begun": "# Step 1\nIt is \\boxed{3}.\n\n# Step 2"}]
    more = ("--prefix_column", "begun", "--n", "1")
    assert run(tmp_path / "a", rows, policy, checkpoint, *more) == 1
    assert "the prefix states the answer '3'" in capsys.readouterr().err
    assert run(tmp_path / "b", rows, policy, checkpoint, *more, "--extractors", "marker") == 0
