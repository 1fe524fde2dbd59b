"""The command `score`, run as users run it."""

import gzip
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
    """The output file keeps every input column and adds the Python class's scores."""
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("\n\n".join(map(json.dumps, ROWS)) + "\n")
    command = ["score", str(source), "--reward_model", checkpoint, "--spans", "1", "2"]
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
    """Scores stay aligned with their steps. Thinking has no scores unless they are requested."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"prompt": "1+2?", "completions": ["<think>", "x", "y</think>so 3", "thus 3"]},
        {"prompt": "1+2?", "completions": ["<think>x"]},
        {"prompt": "1+2?", "completions": ["so 3", "thus 3"]},
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    command = ["score", str(source), "--reward_model", checkpoint]
    assert main([*command, "--output", str(output)]) == 0
    first, second, third = (json.loads(line)["scores"] for line in output.read_text().splitlines())
    assert first == [None, None, *(pytest.approx(score, abs=1e-6) for score in third)]
    assert second == [None] and None not in third
    assert "scores of 4 steps in 3 rows" in capsys.readouterr().out
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
            "in.jsonl:2: .*`problem`.* `prompt`",
        ),
        (
            '{"prompt": "1+2?", "completions": ["#### 3", "#### 4"]}\n{"prompt": "?", "completions": ["#### 3", "#### 4"]}',
            "2 of 3 rows",
        ),
        (
            '{"prompt": "1+2?", "completions": ["<think>", "a", "b"], "parents": [-1, 0, 0]}',
            "in.jsonl:2: .*thinking",
        ),
        ('{"prompt": "1+2?", "comp', "in.jsonl:2: .*JSON"),
        ('{"prompt": "1+2?"}', "in.jsonl:2: .*`completions`"),
        ('{"prompt": "1+2?", "completions": ["a", 3]}', r"in.jsonl:2: `completions\[1\]`"),
        ('{"prompt": " ", "completions": ["a"]}', "in.jsonl:2: column `prompt` holds ' '"),
    ],
)
def test_score_bad_input(checkpoint, tmp_path, capsys, line, message):
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps(ROWS[0]) + "\n" + line)
    assert main(["score", str(source), "--reward_model", checkpoint, "--output", str(output)]) == 1
    error = capsys.readouterr().err
    assert "error: " in error and re.search(message, error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_score_skips_and_counts_what_is_too_long(checkpoint, tmp_path, capsys):
    """One long solution must not cost the scores of the others. A tree is too long if one of its paths is."""
    long = "so " * 600
    rows = [
        ROWS[0],
        {"prompt": "1+2?", "completions": [long], "id": 8},
        {"prompt": "x?", "completions": ["x", "y", long], "parents": [-1, 0, 0]},
        ROWS[1],
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", str(source), "--reward_model", checkpoint]
    assert main([*command, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "scores of 5 steps in 2 rows" in printed
    assert (
        f"warning: 2 rows not scored (more tokens than the 512 positions of the model): {source}:2, {source}:3"
        in printed
    )
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["scores"] is None for row in found] == [False, True, True, False] and found[1]["id"] == 8
    scorer = StepScorer.from_pretrained(checkpoint)
    assert found[0]["scores"] == pytest.approx(scorer.score(["1+2?"], [[ROWS[0]["completions"]]])[0][0], abs=1e-6)
    assert main(command) == 0
    assert "too long for the model" in capsys.readouterr().out


def test_score_without_steps_and_with_blank_steps(checkpoint, tmp_path, capsys):
    """Every row is written, in order, with one score per step."""
    rows = [
        {"prompt": "1+2?", "completions": []},
        {"prompt": "1+2?", "completions": ["so 3", "", "thus 3"]},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score", str(source), "--reward_model", checkpoint, "--output", str(output)]) == 0
    found = [json.loads(line)["scores"] for line in output.read_text().splitlines()]
    assert found[0] == [] and len(found[1]) == 3
    printed = capsys.readouterr().out
    assert f"warning: 1 row scored as given (a blank step): {source}:2" in printed
    assert f"warning: 1 row without scores (no steps): {source}:1" in printed


@pytest.mark.parametrize("kind", ["array", "lines.gz", "array.gz"])
def test_score_of_arrays_compressed_files_and_other_columns(checkpoint, tmp_path, kind):
    """Scores must not depend on the file format."""
    rows = [{"info": {"question": row["prompt"]}, "steps": row["completions"]} for row in (ROWS[0], ROWS[0])]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = (json.dumps(rows, indent=1) if "array" in kind else lines).encode()
    source, output = tmp_path / f"in.{kind}", tmp_path / "out.jsonl"
    source.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    words = ["--columns", "prompt=info.question", "completions=steps", "--output", str(output)]
    assert main(["score", str(source), "--reward_model", checkpoint, *words]) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = StepScorer.from_pretrained(checkpoint).score(["1+2?"], [[ROWS[0]["completions"]]])[0][0]
    assert [row["scores"] for row in found] == [pytest.approx(expected, abs=1e-6)] * 2
    assert found[0]["prompt"] == "1+2?" and found[0]["completions"] == ROWS[0]["completions"]
