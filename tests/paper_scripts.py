"""What the tests of recipes/papers share: the stages that a script lists, as the config objects of their commands."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from accelerate.commands.launch import launch_command_parser

import trl_hrm
from trl_hrm.cli import COMMANDS, TRAINING
from trl_hrm.command_parser import CommandParser
from trl_hrm.scripts import kl_self, reward

from .helpers import ROOT


RECIPES = ROOT / "recipes" / "papers"
# fields of all commands that name an input
INPUTS = ("inputs", "problems", "candidates", "exclude", "dataset_name")
MODELS = ("policy", "reward_model", "model_name_or_path", "ref_model")


@dataclass
class Stage:
    """A stage of a script: the name, the command, its settings by name, and the options of `accelerate launch`."""

    name: str
    command: str
    settings: dict[str, Any]
    words: list[str]
    num_processes: int = 1


def run_script(script: str, *options: str, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of recipes/papers, such as "hrm/table3.sh", with the programs of this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | kwargs.pop("env", {})
    return subprocess.run(
        ["bash", f"recipes/papers/{script}", *options], cwd=ROOT, env=environment, text=True, capture_output=True, **kwargs
    )  # fmt: skip


def listed(script: str, *options: str) -> list[Stage]:
    """Return the stages of a script. Each line is parsed by the program that runs it, which refuses unknown options."""
    done = run_script(script, "--list", *options)
    assert done.returncode == 0, done.stderr
    stages = []
    for line in done.stdout.splitlines():
        name, _, command = line.partition("\t")
        words, num_processes = shlex.split(command), 1
        if words[0] == "accelerate":
            start = words.index("trl_hrm.cli")
            launch = launch_command_parser().parse_args([*words[2 : start + 1], "x"])
            num_processes, words = launch.num_processes, words[start:]
        stages.append(Stage(name, words[1], settings(words[1], (*words[2:],)), words[2:], num_processes))
    return stages


@cache
def settings(command: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of a command, by name. Scripts share stages, so many command lines occur several times."""
    if command in COMMANDS:
        config, _ = CommandParser(getattr(trl_hrm, COMMANDS[command].config)).read(words)
        return {field.name: getattr(config, field.name) for field in fields(config)}
    parser = {"reward": reward, "kl-self": kl_self}[command].make_parser()
    assert command in TRAINING
    # this machine may have no GPU
    *parsed, of_file, of_launch = parser.parse_args_and_config(
        [*words, "--use_cpu", "true", "--bf16", "false"],
        return_remaining_strings=True,
        separate_remaining_strings=True,
    )
    assert of_file == [], "the file has settings that are not options of this command"
    if of_launch:
        of_launch = ["--config_file" if word == "--accelerate_config" else word for word in of_launch]
        launch = launch_command_parser().parse_args([*of_launch, "x"])
        assert (ROOT / launch.config_file).is_file()
    return {name: value for one in parsed for name, value in vars(one).items()}


def check_paths(stages: list[Stage], runs: str, data: str, raw: set[str]) -> None:
    """
    Check that each stage reads only files of the repository, raw files, and outputs of earlier stages.

    Args:
        stages (`list[Stage]`):
            Stages of a script.
        runs (`str`):
            Folder of the outputs.
        data (`str`):
            Folder of the raw files.
        raw (`set[str]`):
            Paths of the raw files in `data`.
    """
    written: set[str] = set()
    for stage in stages:
        if stage.command == "table":
            layout = yaml.safe_load((ROOT / stage.settings["layout"]).read_text(encoding="utf-8"))
            for series in layout["series"]:
                folders = series["results"]
                for folder in folders.values() if isinstance(folders, dict) else [folders]:
                    assert f"{runs}/{folder}" in written, f"{stage.name} reads {folder}, which no stage has written"
            continue
        for name in (*INPUTS, *MODELS):
            values = stage.settings.get(name) or []
            for value in [values] if isinstance(values, str) else values:
                where = f"{stage.name}: {name} is {value}"
                if value.startswith((f"{runs}/", f"{data}/")):  # in a dry run, one folder has both
                    is_raw = value.removeprefix(f"{data}/") in raw
                    assert is_raw or any(value == one or value.startswith(f"{one}/") for one in written), where
                elif name in MODELS:
                    assert value.count("/") == 1 and not (ROOT / value).exists(), f"{where}, which is not a Hub id"
                else:
                    assert (ROOT / value).exists(), where
        written.add(stage.settings["output_dir"])
        assert stage.settings["output_dir"].startswith(f"{runs}/"), stage.name
