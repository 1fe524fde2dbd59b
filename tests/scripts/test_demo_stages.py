"""The stages of the demo: every setting is one that its command takes, and what a stage reads an earlier one has made."""

import argparse
import importlib
import json
from pathlib import Path

import pytest
import yaml

from trl_hrm.data.export_config import ExportConfig
from trl_hrm.scripts import kl_self
from trl_hrm.scripts.annotate_options import make_prompt, make_search
from trl_hrm.scripts.best_of_n_options import check_options
from trl_hrm.scripts.build_options import build_config
from trl_hrm.scripts.demo_jobs import RECIPES, recipe, self_train
from trl_hrm.scripts.demo_profiles import PROFILES
from trl_hrm.scripts.demo_runner import run_command, run_recipe
from trl_hrm.scripts.demo_stages import stages
from trl_hrm.scripts.settings_file import add_config_argument, with_settings, words_of


ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=PROFILES)
def demo(request):
    return stages(PROFILES[request.param], "demo", 42)


def jobs_of(demo, call):
    return [job.arguments for stage in demo for job in stage.jobs if job.call is call]


def parse(name, config, settings):
    settings = dict(settings)
    free = [word for key in ("inputs", "results") for word in settings.pop(key, ())]
    module = importlib.import_module(f"trl_hrm.scripts.{name.replace('-', '_')}")
    parser = argparse.ArgumentParser()
    add_config_argument(parser)
    module.add_arguments(parser)
    return parser.parse_args(with_settings(parser, [*free, "--config", config, *words_of(settings)]))


def test_commands_take_their_settings(demo):
    """A setting that no option takes, or two that exclude each other, would show after minutes of work."""
    for arguments in jobs_of(demo, run_command):
        args = parse(**arguments)
        if arguments["name"] == "annotate":
            make_search(args, *make_prompt(args))
        elif arguments["name"] == "best-of-n":
            check_options(args)
        elif arguments["name"] == "export":
            build_config(args, ExportConfig)
    assert {arguments["name"] for arguments in jobs_of(demo, run_command)} == {
        "annotate",
        "export",
        "build-stepwise",
        "best-of-n",
    }


def test_recipes_take_their_settings(demo):
    found = jobs_of(demo, run_recipe)
    for arguments in found[:2]:
        module = importlib.import_module(f"trl_hrm.scripts.{arguments['name']}")
        words = ["--config", arguments["config"], *words_of(arguments["settings"])]
        _, config, model = module.make_parser().parse_args_and_config(words)
        assert config.seed == arguments["settings"]["seed"] and model.model_name_or_path == "demo/policy"
    assert len({arguments["settings"]["output_dir"] for arguments in found}) == len(found)
    for arguments in jobs_of(demo, self_train):
        words = [
            "--config",
            recipe("kl_self"),
            "--dataset_name",
            "d",
            "--output_dir",
            "o",
            *words_of(arguments["settings"]),
        ]
        _, config, _ = kl_self.make_parser().parse_args_and_config(words)
        assert {name: getattr(config, name) for name in arguments["settings"]} == arguments["settings"]


def test_every_input_is_made_before(demo):
    """The stages stand in an order in which a reader, and a first run, can follow them."""
    made: set[str] = set()
    for stage in demo:
        for job in stage.jobs:
            read, _ = paths(job.arguments)
            missing = {path for path in read if not any(f"{path}/".startswith(f"{one}/") for one in made)}
            assert not missing, (stage.name, job.name)
        made |= {path for job in stage.jobs for path in paths(job.arguments)[1]}
    names = [(stage.name, job.name) for stage in demo for job in stage.jobs]
    assert len(set(names)) == len(names)


def paths(arguments):
    """Folders below that of the demo that a job reads, and that it makes."""
    flat = {**arguments, **arguments.get("settings", {})}
    values = [(key, one) for key, value in flat.items() for one in (value if isinstance(value, list) else [value])]
    below = [
        (key, one.removeprefix("demo/")) for key, one in values if isinstance(one, str) and one.startswith("demo/")
    ]
    made = {path for key, path in below if key in ("output_dir", "output", "folder")}
    return {path for _, path in below} - made, made


def test_all_is_json(demo):
    for stage in demo:
        for job in stage.jobs:
            assert json.loads(json.dumps(job.arguments)) == job.arguments


def test_settings_stand_in_recipes_demo(demo):
    """A reader of the clone finds there what the package reads, and every file is used."""
    assert RECIPES.resolve() == ROOT / "recipes" / "demo"
    used = {Path(a["config"]).name for call in (run_command, run_recipe) for a in jobs_of(demo, call)} | {
        "kl_self.yaml"
    }
    assert used == {path.name for path in (ROOT / "recipes" / "demo").iterdir()}
    for path in (ROOT / "recipes" / "demo").iterdir():
        assert path.read_text().startswith("# ") and yaml.safe_load(path.read_text())
