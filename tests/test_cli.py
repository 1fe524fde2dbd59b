"""The command line: help that answers at once, errors in one line, and options that reach the builder."""

import json
import shlex
import subprocess
import sys
import time

import pytest

from trl_hrm import __version__
from trl_hrm.cli import COMMANDS, main


ROWS = [{"prompt": f"What is {i}?", "completions": ["a", "b"], "labels": [True, i % 2 == 0]} for i in range(40)]


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_is_quick_and_light(command):
    """A heavy import at the top of a module makes every `--help` wait for seconds."""
    words = [command, "--help"] if command else ["--help"]
    code = (
        f"import sys; from trl_hrm.cli import main\ntry: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'pyarrow', 'trl'} & set(sys.modules); assert not heavy, heavy"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: trl-hrm")
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("command", ["build-prm800k", "build-math-shepherd", "build-stepwise"])
def test_help_states_every_default(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = capsys.readouterr().out.split("\n  --")[1:]
    described = {text.split()[0]: " ".join(text.split()) for text in options}
    for option in ("output_dir", "view", "merge_separator", "max_merge", "test_size", "seed", "exclude", "num_proc"):
        assert "(default: " in described[option] or "(required)" in described[option], option


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"trl_hrm {__version__}\n"


@pytest.mark.parametrize("argv", [[], ["build-nothing"], ["build-stepwise", "x", "--output_dir", "y", "--view", "z"]])
def test_wrong_use(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_errors_are_one_line(tmp_path, capsys, rows_file):
    with open(rows_file, "a") as lines:
        lines.write('{"prompt": "q"}\n')
    assert main(["build-stepwise", rows_file, "--output_dir", str(tmp_path / "out")]) == 1
    printed = [line for line in capsys.readouterr().err.split("\n") if "error" in line or "Traceback" in line]
    assert len(printed) == 1
    assert printed[0].startswith(f"error: {rows_file}:41: column `completions` is missing")
    assert main(["build-stepwise", rows_file, "--output_dir", str(tmp_path), "--test_size", "2"]) == 1
    assert "error: test_size is 2.0, expected a share" in capsys.readouterr().err


def test_options_reach_the_builder_and_the_rebuild_command_rebuilds(tmp_path, monkeypatch, capsys, rows_file):
    """An option that is accepted and ignored, or missing from the command, gives another dataset."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exclude.jsonl").write_text('{"problem": "what is 3?"}\n')
    options = "--view hrm --merge_separator | --max_merge 2 --test_size 0.3 --seed 7 --num_proc 1"
    argv = ["build-stepwise", rows_file, "--output_dir", "out", *options.split(), "--exclude", "exclude.jsonl"]
    assert main(argv) == 0
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert report["dropped"] == {"excluded": 1}
    assert "records dropped: excluded" in capsys.readouterr().out
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    program, *again = shlex.split(report["command"])
    assert program == "trl-hrm"
    assert main([*again, "--overwrite"]) == 0
    assert {path: path.read_bytes() for path in files} == before
    assert main(["build-stepwise", rows_file, "--output_dir", "out", "--overwrite", "--seed", "8"]) == 0
    other = json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert other["rows"] != report["rows"]
    assert other["view"] == "tree"


def test_prm800k_options(tmp_path, capsys):
    completions = [{"text": "a", "rating": 0, "flagged": False}]
    step = {"completions": completions, "chosen_completion": 0, "human_completion": None}
    label = {"steps": [step], "finish_reason": "solution"}
    record = {"question": {"problem": "q", "ground_truth_answer": "1"}, "label": label}
    screening = record | {"is_initial_screening_question": True}
    file = tmp_path / "phase2.jsonl"
    file.write_text(json.dumps(record) + "\n" + json.dumps(screening) + "\n")
    argv = ["build-prm800k", str(file), "--output_dir", str(tmp_path / "out"), "--test_size", "0"]
    assert main([*argv, "--neutral", "0.25", "--drop_screening"]) == 0
    report = json.loads((tmp_path / "out" / "build_report.json").read_text())
    assert report["labels"] == {"train": {"single": {"0.25": 1}}}
    assert report["dropped"] == {"screening": 1}
    assert main([*argv, "--overwrite", "--neutral", "maybe"]) == 1
    assert "error: neutral is 'maybe', expected" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough(tmp_path):
    """`trl-hrm ... | head -1` must not end in an error: the pipe is closed while the command prints."""
    path = tmp_path / "trees.jsonl"
    node = {"text": "It is 3.", "mc_value": 1.0, "children": []}
    tree = {
        "question": "1+2?",
        "final_answer": "3",
        "reasoning_steps": {"text": "1+2?", "mc_value": 1.0, "children": [node]},
    }
    path.write_text("".join(json.dumps(tree | {"question": f"{i}+2?"}) + "\n" for i in range(3000)))
    command = f"{sys.executable} -m trl_hrm.cli inspect {path} --format openr | head -n 1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "" and len(result.stdout.splitlines()) == 1


def test_settings_of_a_file(tmp_path, capsys, rows_file):
    """Words that follow a list at the end of a file, and options beside it: the command line's own are read last, and whole."""
    settings = tmp_path / "settings.yaml"
    left_out = tmp_path / "exclude.jsonl"
    left_out.write_text('{"problem": "what is 3?"}\n')
    settings.write_text(f"view: prm\ntest_size: 0\nnum_proc: 1\noutput_dir: {tmp_path / 'a'}\nexclude: [{left_out}]\n")
    assert main(["build-stepwise", rows_file, "--config", str(settings), "--view", "tree"]) == 0
    report = json.loads((tmp_path / "a" / "build_report.json").read_text())
    assert report["view"] == "tree" and report["dropped"] == {"excluded": 1}
    for text in ("no_such_option: null\n", f"config: {settings}\n", "- a list\n"):
        settings.write_text(text)
        assert main(["build-stepwise", rows_file, "--config", str(settings)]) == 1
        assert f"error: {settings}: " in capsys.readouterr().err
    with pytest.raises(SystemExit):  # half a name is none: its file would not be read
        main(["build-stepwise", rows_file, "--conf", str(settings)])
