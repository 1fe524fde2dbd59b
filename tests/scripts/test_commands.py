"""The command `score`, run as users run it."""

import gzip
import io
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


# Texts and standard input


def pipe(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("kind", ["lines", "array", "gz"])
def test_score_reads_standard_input(checkpoint, tmp_path, monkeypatch, kind):
    """The rows have the scores of the same file."""
    data = (json.dumps(ROWS) if kind == "array" else "".join(json.dumps(row) + "\n" for row in ROWS)).encode()
    (tmp_path / "in.jsonl").write_bytes(data)
    assert (
        main(
            ["score", str(tmp_path / "in.jsonl"), "--reward_model", checkpoint, "--output", str(tmp_path / "a.jsonl")]
        )
        == 0
    )
    pipe(monkeypatch, gzip.compress(data) if kind == "gz" else data)
    assert main(["score", "-", "--reward_model", checkpoint, "--output", str(tmp_path / "b.jsonl")]) == 0
    assert read_rows(tmp_path / "b.jsonl") == read_rows(tmp_path / "a.jsonl")


def test_score_of_texts(checkpoint, tmp_path, monkeypatch, capsys):
    """A text has the scores of its steps, whether it is an option, a file, standard input or a row."""
    text = "so 3\n\nthus 3"
    expected = StepScorer.from_pretrained(checkpoint).score(["1+2?"], [[["so 3", "thus 3"]]])[0][0]
    (tmp_path / "solution.txt").write_bytes(text.replace("\n", "\r\n").encode())
    rows = [
        {"prompt": "1+2?", "completion": text, "id": 7},
        {"prompt": "1+2?", "completion": [{"role": "assistant", "content": text}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    base = ["--reward_model", checkpoint, "--segmentation", "blank_line", "--output", str(output)]
    for words in (
        ["--prompt", "1+2?", "--solution", text],
        [str(tmp_path / "solution.txt"), "--prompt", "1+2?"],
        ["-", "--prompt", "1+2?"],
        [str(tmp_path / "rows.jsonl")],
    ):
        pipe(monkeypatch, text.encode())
        assert main(["score", *words, *base]) == 0
        for row in read_rows(output):
            assert (row["prompt"], row["completions"]) == ("1+2?", ["so 3", "thus 3"])
            assert row["scores"] == pytest.approx(expected, abs=1e-6)
    assert [row.get("id") for row in read_rows(output)] == [7, None]
    assert "warning" not in capsys.readouterr().out
    assert main(["score", "--prompt", "1+2?", "--solution", text, *base[:4]]) == 0
    assert f"{expected[1]:.3f}  thus 3" in capsys.readouterr().out


def test_score_says_how_a_text_was_read(checkpoint, capsys):
    """One step instead of several, or without the thinking, gives other scores."""
    words = ["score", "--reward_model", checkpoint, "--prompt", "1+2?", "--solution", "<think>x</think>so 3\nthus 3"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "warning: the rule step_header finds no text with two steps" in printed
    assert "Thinking is left out of 1 text." in printed
    assert main([*words, "--segmentation", "thinking"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"0\.\d{3}  x\n", printed) and "left out" not in printed


def test_score_warns_of_texts_that_are_not_split(checkpoint, tmp_path, capsys):
    """Also if the rule finds steps in one of them."""
    texts = ["# Step 1\nso 3\n# Step 2\nthus 3", *["so 3\n\nthus 3\n\nthen 3"] * 3]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "1+2?", "completion": text}) + "\n" for text in texts))
    assert main(["score", str(file), "--reward_model", checkpoint]) == 0
    assert "warning: 3 of 4 solutions with several lines (75.0 %) are a single step" in capsys.readouterr().out


def test_score_of_texts_with_windows_line_ends(checkpoint, tmp_path):
    """They have the steps, and so the scores, of the same text with other line ends."""
    text = "so 3\n\nthus 3\nand 3\n\n# Answer\n\n3"
    rows = [{"prompt": "1+2?", "completion": one} for one in (text, text.replace("\n", "\r\n"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--reward_model", checkpoint, "--segmentation", "blank_line", "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", str(tmp_path / "rows.jsonl"), *words]) == 0
    first, second = read_rows(tmp_path / "out.jsonl")
    assert first["completions"] == second["completions"] == ["so 3", "thus 3\nand 3", "# Answer\n\n3"]
    assert second["scores"] == pytest.approx(first["scores"], abs=1e-6)


def test_score_does_not_write_what_no_program_reads(checkpoint, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+2?", "completions": ["so 3"], "x": NaN}\n')
    words = ["--reward_model", checkpoint, "--output", str(tmp_path / "out.jsonl")]
    assert main(["score", str(tmp_path / "rows.jsonl"), *words]) == 1
    assert "rows.jsonl:1: a value cannot be written as JSON" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_score_of_messages(checkpoint, tmp_path):
    """They have the scores of their texts, and stay messages in the output."""
    row = {
        "prompt": [{"role": "user", "content": "1+2?"}],
        "completions": [[{"role": "assistant", "content": step}] for step in ("so 3", "thus 3")],
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    output = tmp_path / "out.jsonl"
    assert main(["score", str(tmp_path / "in.jsonl"), "--reward_model", checkpoint, "--output", str(output)]) == 0
    expected = StepScorer.from_pretrained(checkpoint).score(["1+2?"], [[["so 3", "thus 3"]]])[0][0]
    [found] = read_rows(output)
    assert found["scores"] == pytest.approx(expected, abs=1e-6)
    assert {name: found[name] for name in row} == row


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "data", "message"),
    [
        ([], b"", "There is nothing to score"),
        (["-"], None, "nothing is piped to standard input"),
        (["-", "--prompt", "x?"], None, "nothing is piped to standard input"),
        (
            ["rows.jsonl", "--prompt", "x?"],
            None,
            "With `prompt`, it must be the text of one solution. Remove `prompt`.",
        ),
        (["-"], b"", "standard input is empty"),
        (["-"], b" \n", "standard input: no records found"),
        (["-"], b"PAR1", "standard input: found a Parquet file"),
        (["-"], b'{"prompt": "x?", "completions": ["a"]}\n{"prompt": 1', "standard input:2: invalid JSON"),
        (["-"], b'{"prompt": "x?", "completions": [3]}', "standard input:1: `completions[0]` is 3"),
        (["-"], b'{"prompt": "x?", "completion": 3}', "standard input:1: `completion` is 3"),
        (["-"], b'{"prompt": "x?", "completion": "a", "parents": [-1]}', "Only steps (`completions`) can be a tree"),
        (["-", "--prompt", "x?"], b" \n", "standard input: the text is empty"),
        (["-", "--prompt", "x?"], b"a\0b", "standard input: found binary data"),
        (["-", "--prompt", "x?"], b"\xff\xfe", "standard input: the text is not valid UTF-8"),
        (["none.txt", "--prompt", "x?"], b"", "none.txt: file not found"),
        (["--solution", "x"], b"", "`solution` is set without `prompt`"),
        (["-", "--prompt", "x?", "--solution", "x"], b"", "Both `input` ('-') and `solution` are set"),
        (["--prompt", "x?", "--solution", "x", "--columns", "prompt=a"], b"", "`columns` has no effect with `prompt`"),
        (
            ["-", "--segmentation", "sentence"],
            b'{"prompt": "x?", "completions": ["a"]}',
            "`segmentation` has no effect",
        ),
    ],
)
def test_score_refuses_what_it_cannot_read(checkpoint, monkeypatch, capsys, words, data, message):
    pipe(monkeypatch, data or b"")
    if data is None:
        monkeypatch.setattr("sys.stdin", Terminal(io.BytesIO()))
    assert main(["score", *words, "--reward_model", checkpoint]) == 1
    printed = capsys.readouterr().err
    assert message in printed and "/tmp" not in printed.replace(checkpoint, "")
