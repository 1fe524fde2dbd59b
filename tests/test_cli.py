"""The command line: fast help, one-line errors, and options that reach the builder."""

import dataclasses
import importlib
import json
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures.process import BrokenProcessPool

import aiohttp
import jinja2
import pyarrow as pa
import pytest
import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError

import trl_hrm
from trl_hrm import __version__
from trl_hrm.cli import COMMANDS, GROUPS, TRAINING, main
from trl_hrm.command_parser import CommandParser
from trl_hrm.hub import HTTPError
from trl_hrm.scripts import reward
from trl_hrm.scripts.training import run_script, short_help
from trl_hrm.search.engines.base import EngineError


ROWS = [{"prompt": f"What is {i}?", "completions": ["a", "b"], "labels": [True, i % 2 == 0]} for i in range(40)]


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(file)


def test_help_lists_each_command_once(capsys):
    names = [name for group in GROUPS.values() for name in group]
    assert sorted(names) == sorted({**COMMANDS, **TRAINING})
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [line for line in lines if line in names] == names


def test_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "trl_hrm", "--version"], capture_output=True, text=True)
    assert done.stdout == f"trl_hrm {__version__}\n"


@pytest.mark.parametrize("command", TRAINING)
def test_training_help_has_the_options_of_the_docs(command):
    """Each option of the commands in the README and the docs, and no option that the training does not have."""
    module = importlib.import_module(f"trl_hrm.scripts.{command.replace('-', '_')}")
    text = short_help(module, f"trl-hrm {command}")
    shown = set(re.findall(r"--(\w+)", text.partition("options:\n")[2]))
    known = {option for action in module.make_parser()._actions for option in action.option_strings}
    # those of the launcher, and of `trl-hrm export` in a description
    other = set("accelerate_config num_processes cpu config help_all consensus disagreement".split())
    assert {f"--{name}" for name in shown - other} <= known
    if command == "reward":
        used = {
            "model_name_or_path",
            "dataset_name",
            "output_dir",
            "use_cpu",
            "bf16",
            "learning_rate",
            "num_train_epochs",
        }
        assert used <= shown


def test_help_says_what_is_required(capsys):
    with pytest.raises(SystemExit):
        main(["best-of-n", "--help"])
    assert "(required)" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    """A heavy import at the top of a module would delay every `--help` by seconds."""
    code = (
        "import sys; from trl_hrm.cli import main\n"
        f"for words in {[[], *([command] for command in [*COMMANDS, *TRAINING])]!r}:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as end: assert not end.code\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules); assert not heavy, (words, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: trl-hrm") == 1 + len(COMMANDS) + len(TRAINING)


def test_signals_are_handled_before_slow_imports():
    """Ctrl-C during an import that comes before `main` would print a traceback."""
    code = "import sys, trl_hrm.cli; slow = {'trl', 'torch', 'numpy'} & set(sys.modules); assert not slow, slow"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS.values(), ids=list(COMMANDS))
def test_every_option_is_explained_once(command):
    """The command line reads the help of the field, and the config that declares it must have it in the docstring."""
    config = getattr(trl_hrm, command.config)
    fields = [field for field in dataclasses.fields(config) if field.init]
    for field in fields:
        owner = next(kind for kind in reversed(config.__mro__) if field.name in getattr(kind, "__annotations__", {}))
        assert field.metadata["help"].rstrip().endswith("."), field.name
        assert field.name in owner.__doc__, (owner, field.name)
    parser = CommandParser(config, show_all=True)
    assert all("%" not in field.metadata["help"] for field in fields)
    shown, short = parser.format_help(), CommandParser(config).format_help()
    for field in fields:
        if not field.metadata.get("positional"):
            assert f"--{field.name} " in shown
            assert (f"--{field.name} " in short) != bool(field.metadata.get("advanced")), field.name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--final_stops", "---"], ["---"]),
        (["--final_stops=---", "-->", "x"], ["---", "-->", "x"]),
        (["--final_stops=--end", "--seed", "3"], ["--end"]),
        (["--final_stops=--", "-"], ["--", "-"]),
        (["--final_stops", "a b", "-.5", "-2e-1", "=", "a=b"], ["a b", "-.5", "-2e-1", "=", "a=b"]),
        (["--final_stops="], []),
        (["--final-stops=-x"], ["-x"]),
    ],
)
def test_values_that_look_like_options(words, expected):
    """`--final_stops '---'` was an error, and a list could not have such a value and another one."""
    parser = CommandParser(trl_hrm.AnnotateConfig, prog="trl-hrm annotate")
    given = ["--problems", "p", "--policy", "m", "--engine", "transformers", "--output_dir", "o"]
    assert parser.read([*given, *words])[0].final_stops == expected


def test_other_values_with_a_dash(capsys):
    def read(*words):
        parser = CommandParser(trl_hrm.ExportConfig, prog="trl-hrm export")
        return parser.read(["run", "--output_dir", "o", "--labels", "entropy", *words])[0]

    for word in ("-2e-1", "-.2", "-0.2"):
        assert read("--eta", word).eta == read(f"--eta={word}").eta == -0.2
    assert read("--eta", "1", "--output_dir=--out").output_dir == "--out"
    with pytest.raises(SystemExit):
        read("--eta", "1", "-x")
    assert "found '-x', which is not an option" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"trl_hrm {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command given"),
        (["anotate"], "found 'anotate', which is not a command. Did you mean annotate?"),
        (["report"], "the following arguments are required: RUN"),
        (["build-stepwise", "x", "--output_dir", "y", "--view", "z"], "invalid choice: 'z'"),
        (["build-stepwise", "x"], "the following arguments are required: --output_dir\n"),
        (["report", "x", "--outptu", "y"], "found '--outptu', which is not an option. Did you mean --output?"),
        (
            ["score", "x", "--rewardmodel", "y"],
            "found '--rewardmodel', which is not an option. Did you mean --reward_model?",
        ),
        (["score", "x", "--prompt", "---"], "the following arguments are required: --reward_model\n"),
        (["report", "x", "--out", "y"], "found '--out', which is not an option."),
        (["report", "x", "--config"], "--config takes one file"),
    ],
)
def test_wrong_use(capsys, argv, message):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert "error: " in printed and message in printed


def test_errors_are_one_line(tmp_path, capsys, rows_file):
    with open(rows_file, "a") as lines:
        lines.write('{"prompt": "q"}\n')
    assert main(["build-stepwise", rows_file, "--output_dir", str(tmp_path / "out")]) == 1
    printed = [line for line in capsys.readouterr().err.split("\n") if "error" in line or "Traceback" in line]
    assert len(printed) == 1
    assert printed[0].startswith(f"error: {rows_file}:41: `completions` and `labels` are missing")
    assert main(["build-stepwise", rows_file, "--output_dir", str(tmp_path), "--test_size", "2"]) == 1
    assert "error: `test_size` is 2.0" in capsys.readouterr().err


def test_options_reach_the_builder_and_the_rebuild_command_rebuilds(tmp_path, monkeypatch, capsys, rows_file):
    """An option that is ignored, or missing from the rebuild command, would give a different dataset."""
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
    assert "error: `neutral` is 'maybe'" in capsys.readouterr().err


def test_a_closed_pipe_is_not_an_error(tmp_path):
    """`trl-hrm ... | head -1` closes the pipe while the command prints."""
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
    """A list at the end of the file must not swallow options, and the command line's options override the file."""
    settings = tmp_path / "settings.yaml"
    left_out = tmp_path / "exclude.jsonl"
    left_out.write_text('{"problem": "what is 3?"}\n')
    settings.write_text(f"view: prm\ntest_size: 0\nnum_proc: 1\noutput_dir: {tmp_path / 'a'}\nexclude: [{left_out}]\n")
    assert main(["build-stepwise", rows_file, "--config", str(settings), "--view", "tree"]) == 0
    report = json.loads((tmp_path / "a" / "build_report.json").read_text())
    assert report["view"] == "tree" and report["dropped"] == {"excluded": 1}
    for text, message in (
        ("veiw: hrm\n", f"{settings}: found 'veiw', .* Did you mean view?"),
        (f"config: {settings}\n", f"{settings}: found 'config'"),
        ("seed: 1\nseed: 2\n", f"{settings}:2: found 'seed' twice"),
        ("debug: true\n", f"{settings}: found 'debug', which"),
        ("1: hrm\n", f"{settings}:1: found '1', expected the name"),
        ("view: [hrm\n", f"{settings}:2: not valid YAML"),
        ("- a list\n", f"{settings} contains no options"),
        ("", f"{settings} contains no options"),
        ("columns: 5\n", "found 5, expected NAME=COLUMN"),
    ):
        settings.write_text(text)
        assert main(["build-stepwise", rows_file, "--output_dir", str(tmp_path / "b"), "--config", str(settings)]) == 1
        assert re.search(message, capsys.readouterr().err)
    with pytest.raises(SystemExit):  # abbreviated options are rejected, because their file would not be read
        main(["build-stepwise", rows_file, "--output_dir", str(tmp_path / "b"), "--conf", str(settings)])


def test_printed_settings_can_be_read_back(tmp_path, capsys, rows_file):
    """The output of `--print_config` gives the same config again, even for values that YAML reads as other types."""
    words = ["--problems", "p.jsonl", "--policy", "me/policy", "--policy-revision", "2024", "--output_dir", "run"]
    words += ["--columns", "problem=Question", "--chat_template_kwargs", '{"think": true}', "--final_stops", "a", "b"]
    words += ["--chat_template_date", "2024-07-26", "--strict"]
    assert main(["annotate", *words, "--print_config"]) == 0
    printed = capsys.readouterr().out
    settings = yaml.safe_load(printed)
    assert settings["engine"] in ("vllm", "transformers") and settings["columns"] == {"problem": "Question"}
    assert settings["extractors"] and settings["policy_revision"] == "2024"
    (tmp_path / "run.yaml").write_text(printed.replace("'2024'", "2024").replace("'2024-07-26'", "2024-07-26"))
    assert main(["annotate", "--config", str(tmp_path / "run.yaml"), "--print_config"]) == 0
    assert capsys.readouterr().out == printed
    assert not (tmp_path / "run").exists()


def test_a_report_without_folders(tmp_path, capsys):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"inputs: []\noutput: {tmp_path / 'report.html'}\n")
    assert main(["report", "--config", str(settings)]) == 1
    assert "error: `inputs` is empty" in capsys.readouterr().err


def test_every_command_reads_columns_in_the_same_way(tmp_path, capsys):
    """As a word, a list of words or a mapping, from a file or the command line."""
    settings = tmp_path / "settings.yaml"
    commands = (["build-stepwise", "x"], ["annotate", "--problems", "p", "--policy", "q"])
    commands += (
        ["score", "x", "--reward_model", "m"],
        ["benchmark", "x", "--suite", "prmbench", "--reward_model", "m"],
    )
    for command in commands:
        for text in ("columns: problem=Question", "columns: [problem=Question]", "columns: {problem: Question}"):
            settings.write_text(text)
            folder = [] if command[0] == "score" else ["--output_dir", "y"]
            assert main([*command, *folder, "--config", str(settings), "--print_config"]) == 0
            assert yaml.safe_load(capsys.readouterr().out)["columns"] == {"problem": "Question"}


def test_help_shows_defaults_of_zero_and_words_without_a_name(capsys):
    with pytest.raises(SystemExit):
        main(["benchmark", "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: trl-hrm benchmark SOURCE [OPTIONS]\n")
    assert "(default: 0)" in shown and "(default: False)" not in shown and "(default: None)" not in shown


FORESEEN = [
    OSError("no space"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    MemoryError(),
    RecursionError("too deep"),
    EOFError("ended"),
    re.error("missing )"),
    zlib.error("bad data"),
    zipfile.BadZipFile("not a zip file"),
    pickle.UnpicklingError("refused"),
    subprocess.CalledProcessError(1, "git"),
    BrokenProcessPool("a process ended"),
    yaml.YAMLError("bad"),
    pa.ArrowInvalid("bad"),
    pa.ArrowTypeError("bad"),
    pa.ArrowKeyError("bad"),
    pa.ArrowNotImplementedError("bad"),
    SafetensorError("bad header"),
    jinja2.TemplateSyntaxError("unexpected", 1),
    aiohttp.ClientPayloadError("not all"),
    HTTPError("slow"),
    StrictDataclassFieldValidationError("a", TypeError("b")),
    DatasetGenerationError("An error occurred"),
    torch.OutOfMemoryError("out of memory"),
    EngineError("the server failed"),
    ImportError("no module"),
]


@pytest.mark.parametrize("error", FORESEEN, ids=lambda error: type(error).__name__)
def test_foreseen_errors_are_one_line(monkeypatch, capsys, error):
    def fail(config):
        raise error

    monkeypatch.setattr(trl_hrm, "print_env", fail)
    assert main(["env"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and "bug" not in printed
    assert str(error).strip().split("\n")[0] in printed
    with pytest.raises(type(error)):
        main(["env", "--debug"])


def test_the_cause_of_a_dataset_error_is_shown(monkeypatch, capsys):
    def fail(config):
        try:
            raise pa.ArrowInvalid("Parquet magic bytes not found")
        except pa.ArrowInvalid as error:
            raise DatasetGenerationError("An error occurred while generating the dataset") from error

    monkeypatch.setattr(trl_hrm, "print_env", fail)
    assert main(["env"]) == 1
    assert capsys.readouterr().err == "error: Parquet magic bytes not found\n"


@pytest.mark.parametrize(
    "error", [TypeError("a \x1b[31m\nb"), KeyError("a"), AssertionError(), RuntimeError("x" * 5000), Exception()]
)
def test_other_errors_are_a_short_report(monkeypatch, capsys, error):
    def fail(config):
        raise error

    monkeypatch.setattr(trl_hrm, "print_env", fail)
    assert main(["env"]) == 1
    printed = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: `trl-hrm env` failed with {type(error).__name__}: .{{1,2000}}\. This is a bug in trl_hrm\. Run it again with --debug for "
        "the traceback, and report it together with the output of `trl-hrm env`\\.\n",
        printed,
    )
    assert "\x1b" not in printed
    monkeypatch.setenv("TRL_HRM_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["env"])


def test_errors_of_training_scripts(tmp_path, capsys):
    """A training script is started by `accelerate launch`, so it has a border of its own."""

    def fail(*arguments):
        raise RuntimeError("NCCL")

    words = ["--dataset_name", "a", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(SystemExit) as stop:
        run_script(fail, reward.make_parser(prog="reward.py"), words)
    assert stop.value.code == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(
        "error: `reward.py` failed with RuntimeError: NCCL. This is a bug in trl_hrm. Run it again with --log_"
    )
    (tmp_path / "a.yaml").write_text("learning_rate: {a: 1}\n")
    with pytest.raises(SystemExit):
        run_script(fail, reward.make_parser(), [*words, "--config", str(tmp_path / "a.yaml")])
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'a.yaml'}: `learning_rate` is {{'a': 1}}. It must be a number.\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--do_train", "false"], "`do_train` is false, but this script always trains."),
        (["--do_predict", "true"], "`do_predict` is true, but this script only trains."),
        (["--do_eval", "true"], "`do_eval` is true, but `eval_strategy` is no."),
        ([], "started"),
        (["--do_train", "true", "--do_eval", "true", "--eval_strategy", "steps", "--eval_steps", "1"], "started"),
    ],
)
def test_tasks_that_a_training_script_does_not_do(tmp_path, capsys, words, message):
    def started(*parsed):
        raise ValueError("started")

    required = ["--dataset_name", "a", "--output_dir", str(tmp_path), "--use_cpu", "true"]
    with pytest.raises(SystemExit):
        run_script(started, reward.make_parser(), [*required, *words])
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_a_failed_training_process_ends_the_command_with_its_exit_code(monkeypatch, tmp_path, capfd):
    """`accelerate launch` would print the traceback of a `CalledProcessError` after the error of the script."""
    words = [
        "--dataset_name",
        str(tmp_path),
        "--model_name_or_path",
        "a",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
    ]
    for code in (3, -9, -15, 137):

        def fail(args, code=code):
            raise subprocess.CalledProcessError(code, "accelerate")

        monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
        if code == 3:
            with pytest.raises(SystemExit, match="3"):
                main(["reward", *words])
            assert "error" not in capfd.readouterr().err  # the process has printed its error
        else:
            assert main(["reward", *words]) == 1
            name = "SIGTERM" if code == -15 else "SIGKILL"
            assert f"error: A training process was ended by {name}." in capfd.readouterr().err


def test_debug_shows_where_an_error_comes_from(tmp_path, capsys):
    command = ["score", "none.jsonl", "--reward_model", str(tmp_path)]
    assert main(command) == 1
    short = capsys.readouterr().err
    assert short.startswith("error: ") and "Traceback" not in short
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        main([*command, "--debug"])


def test_short_help_stays_short():
    """The help must fit on a page. Rarely used options are listed by --help_all."""
    for command in COMMANDS.values():
        fields = [field for field in dataclasses.fields(getattr(trl_hrm, command.config)) if field.init]
        assert sum(not field.metadata.get("advanced") for field in fields) <= 35, command
