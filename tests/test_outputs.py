"""Outputs are claimed before any work: tried, locked, cleaned up after a kill, and never replaced if they are not the command's own."""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_hrm import BuildStepwiseConfig, build_stepwise
from trl_hrm import io as trl_hrm_io
from trl_hrm.cli import main
from trl_hrm.data import build as data_build
from trl_hrm.evaluation.benchmarks.run import check_output
from trl_hrm.evaluation.results import check_results
from trl_hrm.io import claimed_file, claimed_folder, replacing, write_or_keep
from trl_hrm.scripts import train_grid
from trl_hrm.scripts.training import check_inputs

from .fakes import write_rows
from .helpers import save_checkpoint


# Every command that writes, with inputs that do not exist. Any work would fail on them first.
POLICY = ["--problems", "missing.jsonl", "--policy", "missing", "--engine", "transformers"]
BUILDS = {
    "build-prm800k": ["missing.jsonl"],
    "build-math-shepherd": ["missing.jsonl"],
    "build-stepwise": ["missing.jsonl"],
    "build-grid": ["sudoku", "--train_csv", "missing.csv"],
    "export": ["missing"],
    "select-raft": ["--candidates", "missing.jsonl", "--reward_model", "missing"],
}
RUNS = {
    "annotate": POLICY,
    "judge": ["missing.jsonl", "--judge", "missing", "--engine", "transformers"],
    "evaluate": POLICY,
    "best-of-n": ["--candidates", "missing.jsonl", "--reward_model", "missing"],
    "step-search": [*POLICY, "--reward_model", "missing", "--n", "2"],
    "benchmark": ["missing.jsonl", "--suite", "processbench", "--reward_model", "missing"],
    "reason": ["--data", "missing"],
    "quickstart": [],
    "demo": [],
}
FILES = {
    "report": ["missing"],
    "solve": ["missing", "missing.txt"],
    "score": ["missing.jsonl", "--reward_model", "missing"],
}
COMMANDS = BUILDS | RUNS | FILES
ROWS = [{"prompt": f"What is {i}?", "completions": ["a", "b"], "labels": [True, False]} for i in range(8)]


def run(name: str, output: str, *more: str) -> int:
    option = "--output" if name in FILES else "--output_dir"
    return main([name, *COMMANDS[name], option, output, *more])


def error_of(capsys) -> str:
    """Return the error, which must be one line at the end."""
    lines = capsys.readouterr().err.splitlines()
    shown = [line for line in lines if line and not re.search(r"\d%\|", line)]  # without progress bars
    assert len(shown) == 1 and shown[0].startswith("error: "), lines
    return shown[0]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The output is tried first


@pytest.mark.parametrize(
    "fault",
    ["below a file", "dangling link", "dangling parent", "wrong kind", "long name", "full disk", "no permission"],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_written_is_noticed_first(name, fault, tmp_path, capsys, monkeypatch):
    """Otherwise hours of work are lost at their end. Nothing may stay on disk."""
    output = {
        "below a file": "file/a/out",
        "dangling link": "link",
        "dangling parent": "link/out",
        "long name": "x" * 300,
    }.get(fault, "new/out")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to("nowhere/at/all")
    if fault == "wrong kind":
        output = "wrong"
        (tmp_path / "wrong").mkdir() if name in FILES else (tmp_path / "wrong").write_text("1")
    if fault == "full disk":
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(trl_hrm_io.os, "fsync", lambda number: (_ for _ in ()).throw(full))
    if fault == "no permission":  # a test that runs as root cannot take it away
        monkeypatch.setattr(trl_hrm_io.os, "access", lambda path, mode: False)
    before = names_in(tmp_path)
    assert run(name, output, *(["--overwrite"] if name in BUILDS and fault == "wrong kind" else [])) == 1
    error = error_of(capsys)
    assert output[:50] in error and "missing" not in error
    assert re.search("[Cc]hoose (another|a (file|folder))", error)
    assert names_in(tmp_path) == before


@pytest.mark.parametrize("name", [name for name in COMMANDS if COMMANDS[name]])
def test_missing_folders_are_made_and_removed_again(name, tmp_path, capsys, monkeypatch):
    """A failed command leaves no empty folders, but keeps those that were there."""
    (tmp_path / "there").mkdir()
    assert run(name, "there/a/b/out") == 1
    assert "missing" in error_of(capsys)
    assert names_in(tmp_path) == ["there"]


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", FILES)
def test_a_pipe_or_device_is_not_replaced_by_a_file(name, kind, tmp_path, capsys):
    """`--output /dev/null` of root would break the machine."""
    output = "/dev/null" if kind == "device" else "pipe"
    if kind == "fifo":
        os.mkfifo(output)
    before = os.lstat(output)
    assert run(name, output) == 1
    assert "not a regular file" in error_of(capsys)
    assert os.lstat(output).st_ino == before.st_ino


# Locks


CLAIM = """
import sys
from contextlib import ExitStack
from pathlib import Path
from trl_hrm.io import claimed_file, claimed_folder, claimed_name

LOCKS = {"run": ".lock", "demo": ".trl-hrm-demo.json.lock", "reason": ".trl-hrm-reason.json.lock"}
with ExitStack() as stack:
    for kind, path in map(str.split, sys.argv[1:]):
        if kind == "build":
            claim = claimed_name(Path(path).absolute(), path, "")
        elif kind == "file":
            claim = claimed_file(path, "")
        else:
            claim = claimed_folder(path, "", lock=LOCKS[kind])
        stack.enter_context(claim)
    print("claimed", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def claimed_elsewhere(outputs: list[str]):
    """Claim outputs in another process."""
    other = subprocess.Popen(
        [sys.executable, "-c", CLAIM, *outputs], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "claimed\n"
    try:
        yield other
    finally:
        other.kill()
        other.communicate()


def kind_of(name: str) -> str:
    return "build" if name in BUILDS else "file" if name in FILES else name if name in ("demo", "reason") else "run"


def test_two_processes_on_one_output(tmp_path, capsys):
    """The second of two builds replaced the output of the first, with and without `--overwrite`."""
    with claimed_elsewhere([f"{kind_of(name)} {name}" for name in COMMANDS]) as other:
        before = names_in(tmp_path)
        for name in COMMANDS:
            can_overwrite = name in BUILDS or name in ("evaluate", "best-of-n", "step-search", "benchmark")
            for more in ([], ["--overwrite"] if can_overwrite else []):
                assert run(name, name, *more) == 1
                assert f"{name}: another process is writing to this output. Wait" in error_of(capsys)
        assert names_in(tmp_path) == before
        other.send_signal(signal.SIGKILL)
        other.wait()
        for name in filter(COMMANDS.get, COMMANDS):  # the system has released the locks
            assert run(name, name) == 1
            assert "missing" in error_of(capsys)
    left = [path for path in names_in(tmp_path) if path.split("/")[0] not in ("demo", "quickstart")]
    assert [path for path in left if not Path(path).is_dir()] == []


def test_an_output_can_be_claimed_again(tmp_path):
    for _ in range(2):
        with claimed_file("a/file", "output") as file, claimed_folder("a/folder", "output_dir") as folder:
            assert (file, folder) == (tmp_path / "a" / "file", tmp_path / "a" / "folder")
            with pytest.raises(BlockingIOError, match="a/file: another process"), claimed_file("a/file", "output"):
                pass
            with (
                pytest.raises(BlockingIOError, match="Wait .* choose another `output_dir`"),
                claimed_folder("a/folder", "output_dir"),
            ):
                pass
    assert names_in(tmp_path) == []


def test_processes_of_one_run_share_its_folder(tmp_path):
    with (
        claimed_folder("run", "output_dir", lock=".shard-0.lock"),
        claimed_folder("run", "output_dir", lock=".shard-1.lock"),
    ):
        assert names_in(tmp_path) == ["run", "run/.shard-0.lock", "run/.shard-1.lock"]


# Builds


@pytest.fixture
def rows(tmp_path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


def build(rows: str, output: str = "out", **more):
    return build_stepwise(BuildStepwiseConfig(inputs=[rows], output_dir=output, num_proc=1, **more))


@pytest.mark.parametrize("again", ["rows.jsonl", "link"])
def test_an_input_given_twice(again, tmp_path, rows, capsys):
    """Its rows would count twice."""
    (tmp_path / "link").symlink_to("rows.jsonl")
    assert main(["build-stepwise", rows, again, "--output_dir", "out"]) == 1
    assert f"{again} is given twice" in error_of(capsys)
    assert names_in(tmp_path) == ["link", "rows.jsonl"]


@pytest.mark.parametrize("output", ["link", "folder/link"])
@pytest.mark.parametrize("has_build", [False, True])
def test_a_link_as_output_is_followed(output, has_build, tmp_path, rows):
    """The link, often to a larger disk, was replaced by a folder."""
    (tmp_path / "target").mkdir()
    (tmp_path / "folder").mkdir()
    Path(output).symlink_to(tmp_path / "target")
    if has_build:
        build(rows, "target")
    build(rows, output, overwrite=has_build, view="prm")
    assert (
        Path(output).is_symlink()
        and json.loads((tmp_path / "target" / "build_report.json").read_text())["view"] == "prm"
    )
    assert {path.split("/")[0] for path in names_in(tmp_path)} == {"folder", "rows.jsonl", "target", "link"} - (
        {"link"} if "/" in output else set()
    )


def test_a_file_behind_a_link_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to("there.jsonl")
    (tmp_path / "there.jsonl").write_text("old")
    with claimed_file("link", "output") as file, replacing(file) as opened:
        opened.write("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there.jsonl").read_text() == "new"


@pytest.mark.parametrize("foreign", ["notes.txt", "data/more.parquet", "data/train", ".hidden", "README.md.bak"])
def test_overwrite_deletes_only_files_of_builds(foreign, tmp_path, rows, capsys):
    """A file that a user has put into the folder was deleted with it."""
    build(rows)
    (tmp_path / "out" / foreign).write_text("mine")
    before = contents(tmp_path)
    assert main(["build-stepwise", rows, "--output_dir", "out", "--overwrite"]) == 1
    assert f"out: --overwrite would delete {foreign}, which no build has written" in error_of(capsys)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("source", ["out", "out/data/train-00000-of-00001.parquet"])
def test_a_build_does_not_replace_its_input(source, tmp_path, rows, capsys):
    build(rows)
    before = contents(tmp_path)
    for output in ("out", "./out/", "link"):
        if output == "link":
            (tmp_path / "link").symlink_to("out")
        assert main(["build-stepwise", source, "--output_dir", output, "--overwrite"]) == 1
        assert f"{output}: the output contains the input {source}" in error_of(capsys)
    assert (
        contents(tmp_path) == before | {f"link/{name}": data for name, data in contents(tmp_path / "out").items()}
        or contents(tmp_path) == before
    )


def test_a_killed_build_leaves_nothing_for_the_next_one(tmp_path, rows, caplog):
    """Its hidden folder stayed for good. Other hidden files of the user are not touched."""
    (tmp_path / ".out.trl-hrm-partial" / "parts").mkdir(parents=True)
    (tmp_path / ".out.trl-hrm-partial" / "parts" / "train-00000000.arrow").write_text("1")
    for name in (".out.backup", ".other.trl-hrm-partial", ".out.partial", ".out.lock"):
        (tmp_path / name).write_text("mine")
    build(rows)
    assert {path for path in names_in(tmp_path) if "/" not in path} == {
        ".other.trl-hrm-partial",
        ".out.backup",
        ".out.partial",
        "out",
        "rows.jsonl",
    }
    assert "Removed " in caplog.text and ".out.trl-hrm-partial, which an interrupted build had left" in caplog.text


def test_a_kill_between_the_two_renames_does_not_lose_the_earlier_dataset(tmp_path, rows, caplog):
    """The earlier dataset has been moved aside, and the new one is not in its place yet."""
    build(rows)
    before = contents(tmp_path / "out")
    code = (
        "import os, signal, sys; from pathlib import Path; from trl_hrm.cli import main\n"
        "rename = Path.rename\n"
        "def once(path, target):\n"
        "    rename(path, target)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Path.rename = once\n"
        "main(['build-stepwise', 'rows.jsonl', '--output_dir', 'out', '--overwrite', '--view', 'prm'])\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="--overwrite"):
        build(rows)
    assert contents(tmp_path / "out") == before
    assert "Restored out, which an interrupted build had moved aside" in caplog.text
    assert {path for path in names_in(tmp_path) if "/" not in path} == {"out", "rows.jsonl"}


def test_a_kill_after_the_two_renames_keeps_the_new_dataset(tmp_path, rows):
    build(rows, view="prm")
    (tmp_path / "out").rename(tmp_path / ".out.trl-hrm-replaced")
    build(rows, "new")
    (tmp_path / "new").rename(tmp_path / "out")
    with pytest.raises(FileExistsError, match="--overwrite"):
        build(rows)
    assert json.loads((tmp_path / "out" / "build_report.json").read_text())["view"] == "tree"
    assert {path for path in names_in(tmp_path) if "/" not in path} == {"out", "rows.jsonl"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_made_during_the_build_is_not_replaced(overwrite, tmp_path, rows, monkeypatch):
    """Another program may use the name, since the lock only stops this package's commands."""
    digest_of = data_build.digest_of

    def digest(folder):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").write_text("mine")
        return digest_of(folder)

    if overwrite:
        build(rows)
    before = contents(tmp_path)
    monkeypatch.setattr(data_build, "digest_of", digest)
    with pytest.raises(FileExistsError, match="would delete notes.txt" if overwrite else "already exists"):
        build(rows, overwrite=overwrite)
    assert contents(tmp_path) == before | {"out/notes.txt": b"mine"}


def test_a_failed_rename_keeps_the_earlier_dataset(tmp_path, rows, monkeypatch):
    build(rows)
    before = contents(tmp_path / "out")
    rename = Path.rename

    def fail(path, target):
        if path.name == "dataset":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        build(rows, overwrite=True, view="prm")
    assert contents(tmp_path) == {"rows.jsonl": Path(rows).read_bytes()} | {
        f"out/{name}": data for name, data in before.items()
    }


def test_a_mount_point_is_refused(rows, tmp_path, capsys, monkeypatch):
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk")
    assert main(["build-stepwise", rows, "--output_dir", "disk"]) == 1
    assert "disk is a mount point, which cannot be replaced. Choose a folder in it" in error_of(capsys)


# Files that are not the command's own


def test_results_of_other_programs_are_not_replaced(tmp_path):
    (tmp_path / "results.json").write_text('{"results": {}}')
    with pytest.raises(FileExistsError, match="--overwrite"):
        check_output(tmp_path, overwrite=False)
    for check in (check_output, check_results):
        with pytest.raises(FileExistsError, match="results.json exists, and was not written by"):
            check(tmp_path, overwrite=True)
    (tmp_path / "results.json").write_text('{"kind": "benchmark", "strategy": "best_of_n"}')
    check_output(tmp_path, overwrite=True)
    check_results(tmp_path, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_scores_and_candidates_of_other_programs_are_not_replaced(tmp_path, overwrite):
    """Both were replaced or deleted without a question, since there was no `results.json`."""
    write_rows(tmp_path / "scores.jsonl", [{"id": 1}])
    with pytest.raises(FileExistsError, match="scores.jsonl exists, and was not written by `benchmark`"):
        check_output(tmp_path, overwrite)
    write_rows(tmp_path / "scores.jsonl", [{"suite": "prmbench", "labels": [1], "scores": [0.5]}])
    check_output(tmp_path, overwrite)  # left by an interrupted run
    write_rows(tmp_path / "candidates.jsonl", [{"problem_id": "a"}])
    with pytest.raises(FileExistsError, match="candidates.jsonl exists, and was not written by `best-of-n`"):
        check_results(tmp_path, overwrite)
    (tmp_path / "partial-00000-of-00001.jsonl").write_text("{}\n")
    check_results(tmp_path, overwrite)


@pytest.mark.parametrize("command", ["report", "inspect"])
def test_a_page_replaces_only_pages(command, tmp_path, capsys):
    """`report runs/bon --output runs/bon/results.json` replaced the results."""
    from trl_hrm.pages.page import claimed_page

    (tmp_path / "results.json").write_text("{}")
    with (
        pytest.raises(FileExistsError, match="results.json exists and is not an HTML page"),
        claimed_page("results.json", "output"),
    ):
        pass
    for text in ("<!DOCTYPE html>\n<title>old</title>", "\n<html>", ""):
        (tmp_path / "page.html").write_text(text)
        with claimed_page("page.html", "output") as page:
            assert page == tmp_path / "page.html"


@pytest.mark.parametrize("output", ["rows.jsonl", "./rows.jsonl", "link", "hard"])
def test_score_does_not_replace_its_input(output, tmp_path, rows, capsys):
    (tmp_path / "link").symlink_to("rows.jsonl")
    os.link("rows.jsonl", "hard")
    before = Path(rows).read_bytes()
    assert main(["score", rows, "--reward_model", "missing", "--output", output]) == 1
    assert f"{output} is an input, which would be replaced" in error_of(capsys)
    assert Path(rows).read_bytes() == before


@pytest.mark.parametrize("output", ["model/model.safetensors", "model/config.json", "other.jsonl"])
def test_score_replaces_only_scores(output, tmp_path, rows, capsys):
    """`--output model/model.safetensors` replaced the weights of the reward model."""
    save_checkpoint(tmp_path / "model")
    (tmp_path / "other.jsonl").write_bytes(Path(rows).read_bytes())
    before = contents(tmp_path)
    command = ["score", rows, "--reward_model", "model", "--reward_model_max_length", "64", "--output"]
    assert main([*command, output]) == 1
    assert f"{output} exists and has no scores of an earlier run. Choose another `output`." in error_of(capsys)
    assert contents(tmp_path) == before
    for _ in range(2):
        assert main([*command, "scores.jsonl"]) == 0


@pytest.mark.parametrize("output", ["scores.jsonl.gz", "scores.parquet"])
def test_names_of_other_formats(output, rows, capsys):
    """Other commands could not read the file."""
    assert main(["score", rows, "--reward_model", "missing", "--output", output]) == 1
    assert f"`output` is {output}. It must be a JSON Lines file" in error_of(capsys)


@pytest.mark.parametrize("name", COMMANDS)
def test_tilde_that_the_shell_did_not_replace(name, tmp_path, capsys):
    """`--output_dir=~/out` and YAML made a folder with the name `~`."""
    assert run(name, "~/out") == 1
    assert "~/out: the shell did not replace `~`. Write the home folder out" in error_of(capsys)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", FILES)
def test_folder_as_output_file(name, tmp_path, capsys):
    assert run(name, "new/") == 1
    assert "new/ is a folder. Choose a file as `output`." in error_of(capsys)
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("option", ["model_name_or_path", "dataset_name", "ref_model"])
def test_training_does_not_replace_its_inputs(option, tmp_path):
    """The trained model replaced the base model, the reference model, or the card of the dataset."""
    names = {"model_name_or_path": "model", "dataset_name": "dataset", "ref_model": "reference"}
    for name in names.values():
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(names[option])
    model, dataset = SimpleNamespace(model_name_or_path="model"), SimpleNamespace(dataset_name="dataset")
    check_inputs(dataset, SimpleNamespace(output_dir="new", ref_model="reference"), model)
    with pytest.raises(FileExistsError, match=f"link is also the `{option}`, which would be replaced. Choose another"):
        check_inputs(dataset, SimpleNamespace(output_dir="link", ref_model="reference"), model)


@pytest.mark.parametrize("resume, use_peft", [(None, False), ("False", False), (None, True), ("true", False)])
def test_a_training_that_replaces_a_model_says_so(resume, use_peft, tmp_path, capsys):
    """It lost the model of an earlier training, which can have taken hours, without a word."""
    save_checkpoint(tmp_path / "model")
    args = SimpleNamespace(output_dir="model", resume_from_checkpoint=resume, process_index=0)
    check_inputs(SimpleNamespace(), args, SimpleNamespace(model_name_or_path="other", use_peft=use_peft))
    words = "stays in the folder, next to the adapter" if use_peft else "will be replaced at the end of the training"
    expected = f"warning: model has a model (model.safetensors), which {words}.\n" if resume != "true" else ""
    assert capsys.readouterr().err == expected


def test_a_grid_training_that_replaces_a_model_says_so(tmp_path, capsys):
    """Its arguments have no options of adapters."""
    save_checkpoint(tmp_path / "model")
    args = SimpleNamespace(output_dir="model", resume_from_checkpoint=None, process_index=0)
    script_args = train_grid.ScriptArguments(dataset_name="grids")
    check_inputs(script_args, args, script_args)
    assert "model has a model (model.safetensors), which will be replaced" in capsys.readouterr().err


def test_quickstart_does_not_replace_a_model(tmp_path, capsys):
    save_checkpoint(tmp_path / "model")
    before = contents(tmp_path)
    assert main(["quickstart", "--output_dir", "model"]) == 1
    assert "model has files that do not belong to a quickstart" in error_of(capsys)
    assert contents(tmp_path) == before


def test_force_of_the_demo_deletes_only_the_demo(tmp_path):
    from trl_hrm.demo.pipeline import MARK, begun

    folder = tmp_path / "demo"
    with begun(folder, {"seed": 1}):
        (folder / "world").mkdir()
        (folder / "report.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    with (
        pytest.raises(ValueError, match="do not belong to a demo: 'notes.txt'"),
        begun(folder, {"seed": 2}, force=True),
    ):
        pass
    assert names_in(folder) == [MARK, "notes.txt", "report.json", "world"]
    (folder / "notes.txt").unlink()
    with begun(folder, {"seed": 2}, force=True):
        assert names_in(folder) == [MARK, f"{MARK}.lock"]
    assert names_in(folder) == [MARK]


# Results outlive an output that cannot be written


def fail_in(folder: Path, monkeypatch) -> None:
    """Fill the disk of a folder."""
    replace = os.replace

    def full(source, target):
        if Path(target).parent == folder:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(trl_hrm_io.os, "replace", full)


def kept_in(message: str) -> Path:
    return Path(re.search(r"(/\S*trl_hrm-\w+)", message)[1])


def test_scores_outlive_a_full_disk(tmp_path, rows, capsys, monkeypatch):
    checkpoint = save_checkpoint(tmp_path / "model")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(trl_hrm_io.tempfile, "tempdir", None)
    words = ["score", rows, "--reward_model", checkpoint, "--output", "new/scores.jsonl"]
    fail_in(tmp_path / "new", monkeypatch)
    assert main(words) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "new/scores.jsonl could not be written (No space left on device). The results are in " in error
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    assert (kept_in(error) / "scores.jsonl").read_bytes() == (tmp_path / "new" / "scores.jsonl").read_bytes()


def test_all_files_of_a_result_are_kept_together(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "b.json").mkdir()
    with pytest.raises(OSError, match="b.json could not be written") as error:
        write_or_keep(tmp_path / "out", {"a.jsonl": "1\n", "b.json": "2\n"})
    assert contents(kept_in(str(error.value))) == {"a.jsonl": b"1\n", "b.json": b"2\n"}


def test_a_partial_file_of_a_killed_process_is_removed(tmp_path):
    for name in (".page.html.123", ".page.html.bak", ".page.html2.5"):
        (tmp_path / name).write_text("1")
    with claimed_file("page.html", "output"):
        pass
    assert names_in(tmp_path) == [".page.html.bak", ".page.html2.5"]
    (tmp_path / ".results.json.7").write_text("1")
    with claimed_folder(".", "output_dir", ["results.json"]):
        pass
    assert names_in(tmp_path) == [".page.html.bak", ".page.html2.5"]
