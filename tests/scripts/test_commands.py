"""The commands `score` and `demo`, run as a user runs them."""

import json
import re

import pytest

from trl_hrm import StepScorer
from trl_hrm.cli import main

from ..helpers import save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


ROWS = [
    {"prompt": "1+2?", "completions": ["so 3", "thus 3"], "id": 7},
    {"prompt": "x?", "completions": ["x", "y", "x y"], "parents": [-1, 0, 0], "labels": [True, None, 0.5]},
]


def test_score(checkpoint, tmp_path, capsys):
    """The file holds every column that came in, and the scores of the Python class."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    command = ["score", "--model", checkpoint, "--input", str(source), "--spans", "1", "2"]
    assert main([*command, "--output", str(output)]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in found if "id" in row] == [7]
    assert found[1]["labels"] == ROWS[1]["labels"]
    scorer = StepScorer.from_pretrained(checkpoint)
    expected = scorer.score([ROWS[0]["prompt"]], [[ROWS[0]["completions"]]], spans=(1, 2))[0][0]
    assert found[0]["scores"] == pytest.approx(expected, abs=1e-6)
    assert main(command) == 0
    assert f"{expected[1]:.3f}  thus 3" in capsys.readouterr().out


def test_score_leaves_thinking_out(checkpoint, tmp_path, capsys):
    """Scores stay beside their steps; a step of thinking has none, unless it is asked for."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": "1+2?", "completions": ["<think>", "x", "y</think>so 3", "thus 3"]},
        {"prompt": "1+2?", "completions": ["<think>x"]},
        {"prompt": "1+2?", "completions": ["so 3", "thus 3"]},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    command = ["score", "--model", checkpoint, "--input", str(source)]
    assert main([*command, "--output", str(output)]) == 0
    first, second, third = (json.loads(line)["scores"] for line in output.read_text().splitlines())
    assert first == [None, None, *(pytest.approx(score, abs=1e-6) for score in third)]
    assert second == [None] and None not in third
    assert "Scores of 4 steps of 3 rows" in capsys.readouterr().out
    assert main(command) == 0
    assert "    -  <think>" in capsys.readouterr().out
    assert main([*command, "--output", str(output), "--keep_thinking"]) == 0
    kept = json.loads(output.read_text().splitlines()[0])
    expected = StepScorer.from_pretrained(checkpoint).score(["1+2?"], [[["x", "yso 3", "thus 3"]]])[0][0]
    assert kept["scores"] == [None, *(pytest.approx(score, abs=1e-6) for score in expected)]
    assert kept["completions"] == rows[0]["completions"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"problem": "1+2?", "completions": ["a", "b"]}',
            "in.jsonl, line 2: found `problem` and .* without `prompt`",
        ),
        (
            '{"prompt": "1+2?", "completions": ["#### 3", "#### 4"]}\n{"prompt": "?", "completions": ["#### 3", "#### 4"]}',
            "every one of several `completions` states an answer in 2 of 3 rows",
        ),
        (
            '{"prompt": "1+2?", "completions": ["<think>", "a", "b"], "parents": [-1, 0, 0]}',
            "in.jsonl, row 2: found the thinking of a reasoning model in a tree with branches",
        ),
        ('{"prompt": "1+2?", "comp', "in.jsonl, line 2: not a complete JSON object"),
        ('{"prompt": "1+2?"}', "in.jsonl, line 2: found .* expected an object with `prompt` and a list `completions`"),
        ('{"prompt": "1+2?", "completions": ["a", " "]}', r"in.jsonl, line 2: `completions\[1\]`"),
    ],
)
def test_score_bad_input(checkpoint, tmp_path, capsys, line, message):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n" + line)
    assert main(["score", "--model", checkpoint, "--input", str(source), "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]
