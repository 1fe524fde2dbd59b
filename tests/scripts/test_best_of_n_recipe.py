"""The recipe of best-of-N and its files of settings, which the parser of the command reads."""

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import yaml

from trl_hrm.evaluation.step_search_run import StepSearchConfig
from trl_hrm.scripts.best_of_n_options import STEP_OPTIONS, add_arguments, check_options
from trl_hrm.scripts.settings_file import add_config_argument, with_settings


ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "recipes" / "demo" / "best_of_n.yaml"  # the demo adds the rest: tests/scripts/test_demo_stages.py


def read(*words: str) -> Namespace:
    """The options of `trl-hrm best-of-n`, which the recipe calls."""
    parser = ArgumentParser()
    add_config_argument(parser)
    add_arguments(parser)
    return parser.parse_args(with_settings(parser, words))


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "recipes").rglob("best_of_n*.yaml")) - {DEMO}),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_settings_of_recipes(path):
    """Each key is an option of the command, with that value, and they go together."""
    args = read("--config", str(path))
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: getattr(args, name) for name in values} == values
    check_options(args)
    if args.strategy != "best_of_n":
        given = {name: getattr(args, name) for name in STEP_OPTIONS if getattr(args, name) is not None}
        StepSearchConfig("out", args.n, args.strategy, **given)
    if path.parent.name != "tiny":
        assert path.read_text().startswith("# not run\n")


def test_settings_on_the_command_line_win(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "reward_model: m\noutput_dir: o\nn: [1, 2]\noverwrite: true\nlimit: null\nengine_args: {a: 1}\nmax_step_tokens: 5\n"
    )
    args = read("--config", str(tmp_path / "a.yaml"), "--n", "8", "--output_dir", "p")
    assert isinstance(args, Namespace) and args.n == [8] and args.output_dir == "p" and args.overwrite is True
    assert args.limit is None and args.engine_args == {"a": 1} and args.max_step_tokens == 5
    (tmp_path / "a.yaml").write_text("reward_model: m\noutput_dir: o\nno_such_setting: 1\n")
    with pytest.raises(ValueError, match="a.yaml: no_such_setting: no such option"):
        read("--config", str(tmp_path / "a.yaml"))
    (tmp_path / "a.yaml").write_text("# not run\n")
    with pytest.raises(ValueError, match="a.yaml: found None, expected settings, one a line"):
        read("--config", str(tmp_path / "a.yaml"))


def test_the_papers_settings():
    """N, policies and aggregates of the tables: HRM, tables 3 and 4; ER-PRM, section 5 and tables 4 to 6."""
    recipes = ROOT / "recipes"
    found = {
        path.parent.name: yaml.safe_load(path.read_text()) for path in {*recipes.glob("*/best_of_n.yaml")} - {DEMO}
    }
    assert found["qwen2.5-math-7b"]["n"] == [2, 4, 8, 16, 24, 32, 64, 128, 256, 512] == found["deepseek-math-7b"]["n"]
    assert found["qwen2.5-math-72b"]["n"] == [2, 4, 8, 16, 24] and found["qwen2.5-math-72b"]["prompt"] == "formulas"
    for name in ("deepseek-math-7b-instruct", "metamath-mistral-7b", "openmath2-llama3.1-8b"):
        assert found[name]["n"] == [1, 4, 8, 16, 32, 64] and found[name]["aggregate"] == ["min"]
    assert all(values["max_in_flight"] >= max(values["n"]) for values in found.values() if max(values["n"]) > 256)
    assert math.isclose(found["qwen2.5-math-7b"]["temperature"], 1.0)
