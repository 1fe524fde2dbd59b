"""Every command does the same from Python, from the command line, and from a settings file."""

import re
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

import trl_hrm
from trl_hrm.cli import COMMANDS, main
from trl_hrm.command_parser import CommandParser

from .commands import SETTINGS, config_of, files_of, settings_of, words_of


@pytest.mark.parametrize("name", SETTINGS)
def test_python_and_command_line(name, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    command = COMMANDS[name]
    folders = [f"{name}-{way}" for way in ("python", "line")]
    python, line = folders
    if name in ("inspect", "report", "score", "solve", "table"):  # these write files instead of folders
        for folder in folders:
            Path(folder).mkdir()
    capsys.readouterr()
    result = getattr(trl_hrm, command.function)(config_of(name, python))
    printed = [capsys.readouterr().out + ("" if result is None else f"{result}\n")]
    assert main([name, *words_of(getattr(trl_hrm, command.config), settings_of(name, line))]) == 0
    printed.append(capsys.readouterr().out)
    written = [files_of(work / folder, folder) for folder in folders]
    assert written[0] or name in ("push-dataset", "env")
    assert written[0] == written[1]
    shown = [
        re.sub(r"in \d+ s \(.*?\)", "", text.replace(folder, "OUT"))
        for text, folder in zip(printed, folders, strict=True)
    ]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_a_file_of_settings(name, work, monkeypatch):
    """It gives the config of the command line, which is all that the command is run with."""
    monkeypatch.chdir(work)
    kind = getattr(trl_hrm, COMMANDS[name].config)
    Path("settings.yaml").write_text(yaml.safe_dump(settings_of(name, "OUT")))
    from_file, from_line = (
        CommandParser(kind).read(words)[0]
        for words in (["--config", "settings.yaml"], words_of(kind, settings_of(name, "OUT")))
    )
    assert from_file == from_line == config_of(name, "OUT")


WRITERS = [name for name in SETTINGS if "OUT" in str(SETTINGS[name])]
WAITING = """
import os, sys, time
from filelock import FileLock
from trl_hrm.cli import main

acquire = FileLock.acquire
def wait(lock, **options):
    acquired = acquire(lock, **options)
    FileLock.acquire = acquire
    open("claimed", "w").close()
    while not os.path.exists("continue"):
        time.sleep(0.05)
    return acquired
FileLock.acquire = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_two_processes_on_one_output(name, work, monkeypatch, capsys):
    """Of two processes, one writes the whole result, and the other ends with an error before it does anything."""
    folder = f"{name}-two"
    monkeypatch.chdir(work)
    words = [name, *words_of(getattr(trl_hrm, COMMANDS[name].config), settings_of(name, folder))]
    first = subprocess.Popen(
        [sys.executable, "-c", WAITING, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not Path("claimed").exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    before = sorted(work.rglob("*"))
    can_overwrite = "overwrite" in {field.name for field in fields(getattr(trl_hrm, COMMANDS[name].config))}
    for more in ([], ["--overwrite"] if can_overwrite else []):
        capsys.readouterr()
        assert main([*words, *more]) == 1
        assert re.fullmatch("error: .* another process is writing to this output. Wait .*\n", capsys.readouterr().err)
    assert sorted(work.rglob("*")) == before
    Path("continue").touch()
    assert first.wait() == 0, first.stderr.read()
    first.stderr.close()
    Path("continue").unlink()
    Path("claimed").unlink()
    alone = f"{name}-alone"
    assert main([name, *words_of(getattr(trl_hrm, COMMANDS[name].config), settings_of(name, alone))]) == 0
    assert files_of(work / folder, folder) == files_of(work / alone, alone)


def test_no_command_is_left_out():
    # These train for minutes, or for a measured time, or serve until they are stopped, and have tests of their own
    assert set(SETTINGS) | {"app", "demo", "quickstart", "reason"} == set(COMMANDS)
