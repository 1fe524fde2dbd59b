"""JSON Lines files: what a kill may leave behind, and which process may write."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_hrm.io import AppendedLines, read_json, read_json_lines, read_yaml, shown, write_json


@pytest.mark.parametrize("torn", [b"", b"x", b"x" * (1 << 16), b"x" * ((1 << 17) + 1)])
@pytest.mark.parametrize("whole", [b"", b"1\n", b"2" * (1 << 16) + b"\n"])
def test_a_torn_line_is_dropped(tmp_path, whole, torn):
    """Works for a line of any length, because the file is searched backwards block by block."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(whole + torn)
    with AppendedLines(path) as lines:
        assert (lines.size, lines.torn) == (len(whole), len(torn))
        assert lines.append({"a": "ü"}) == '{"a": "ü"}\n'.encode()
        assert path.read_bytes() == whole + '{"a": "ü"}\n'.encode() and lines.size == path.stat().st_size
        lines.clear()
        lines.append(1)
    assert path.read_bytes() == b"1\n" and [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


def test_a_killed_process_holds_no_lock(tmp_path):
    """Only the running process may write. After a kill, any process may, and the old lock file is removed."""
    path = tmp_path / "lines.jsonl"
    program = "import sys, time; from trl_hrm.io import AppendedLines; lines = AppendedLines(sys.argv[1]); lines.append(1); time.sleep(60)"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], env=os.environ | {"PYTHONPATH": "."})
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
    with pytest.raises(
        BlockingIOError, match="lines.jsonl: another process is writing to this file. Wait for it or stop it"
    ):
        AppendedLines(path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 1  # the lock file is hidden
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with AppendedLines(path) as lines:
        lines.append(2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["lines.jsonl"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"a": NaN}', "'NaN' is not a finite number"),
        (b'{"a": -Infinity}', "'-Infinity' is not a finite number"),
        (b'{"a": 1e999}', "'1e999' is not a finite number"),
        (b'{"a": 1' + b"0" * 400 + b".0}", r"'10+\.\.\. is not a finite number"),
        (b'{"a": "\\ud83d"}', "surrogates not allowed"),
        (b'{"a": "\xed\xa0\xbd"}', "not valid UTF-8"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"a": "\xff"}', "not valid UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1', "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1]", r"found \[1\], expected a JSON object"),
        (b'"' + b"x" * 1_000_000 + b'"', r"found 'x+\.\.\., expected"),
    ],
)
def test_damaged_json(tmp_path, text, fault):
    """The message names file and line, is short, and ends with the remedy."""
    path = tmp_path / "values.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=fault) as caught:
        read_json(path, "Run it again.")
    assert str(caught.value).startswith(f"{path}: ") and str(caught.value).endswith(" Run it again.")
    assert len(str(caught.value)) < 300
    if text:
        path.write_bytes(b"{}\n" + text)
        lines = read_json_lines(path)
        assert next(lines) == (f"{path}:1", {})
        with pytest.raises(ValueError, match=f"{path}:2: "):
            next(lines)


ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "line", "fault"),
    [
        ("seed: 1\n\tview: hrm\n", ":2", "not valid YAML"),
        ("seed: 1\nview: [hrm\n", ":3", "not valid YAML"),
        ("seed: 1\nseed: 2\n", ":2", "found 'seed' twice"),
        ("seed: 1\n2: 3\n", ":2", "found '2', expected the name"),
        ("a: !!python/object/apply:os.getcwd []\n", ":1", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", ":2", "not valid YAML"),
        ("a: 2024-13-45\n", "", "month must be"),
        ("a: \x07\n", "", "not valid YAML"),
        ("a: " + "[" * 20_000, "", "nested too deeply"),
        (ALIASES, "", "aliases expand"),
        ("a: &a [*a]\n", "", "aliases expand"),
        ("- a\n", "", "contains no options"),
        ("", "", "contains no options"),
    ],
)
def test_damaged_yaml(tmp_path, text, line, fault):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=fault) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}{line}")


def test_yaml_files_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("utf16.yaml").write_bytes("seed: 1".encode("utf-16"))
    Path("bom.yaml").write_bytes("\ufeffseed: 1".encode())
    with pytest.raises(FileNotFoundError, match="^missing.yaml: file not found. Expected a YAML file of settings.$"):
        read_yaml("missing.yaml")
    with pytest.raises(IsADirectoryError, match="^folder is a folder. Expected a YAML file of settings.$"):
        read_yaml("folder")
    with pytest.raises(ValueError, match="^utf16.yaml: not valid UTF-8 .* Save it as UTF-8.$"):
        read_yaml("utf16.yaml")
    assert read_yaml("bom.yaml") == {"seed": 1}


def test_yaml_aliases_within_the_bound(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\nd:\n  <<: *a\n  e: 2\n")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


def test_shown_values_are_short_and_on_one_line():
    assert shown("a\x1b[31m\n") == r"'a\x1b[31m\n'"
    assert len(shown("x" * 10**6)) == len(shown(list(range(1000)))) == 80


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_numbers_that_are_not_json_are_not_written(tmp_path, value):
    """`json.dumps` writes `NaN`, which no other JSON reader accepts. The existing file must stay."""
    path = tmp_path / "values.json"
    write_json(path, {"old": "ü😀"})
    with pytest.raises(ValueError, match=r"values.json: a value cannot be written as JSON \(Out of range float"):
        write_json(path, value)
    assert read_json(path) == {"old": "ü😀"}
    with AppendedLines(tmp_path / "lines.jsonl") as lines:
        lines.append({"a": 1})
        with pytest.raises(ValueError, match="lines.jsonl: a value cannot be written"):
            lines.append(value)
        lines.append({"a": 2})
    assert (tmp_path / "lines.jsonl").read_text() == '{"a": 1}\n{"a": 2}\n'
