"""The settings files of the best-of-N and step-search recipes, as the parser of the commands reads them."""

from pathlib import Path

import pytest
import yaml

from trl_hrm import BestOfNConfig, StepSearchConfig
from trl_hrm.command_parser import CommandParser
from trl_hrm.evaluation.step_search import StepSearchSettings


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"best_of_n*.yaml": BestOfNConfig, "step_search*.yaml": StepSearchConfig}


@pytest.mark.parametrize(
    "path",
    sorted(path for name in CONFIGS for path in (ROOT / "recipes").glob(f"*/{name}")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_settings_of_recipes(path):
    """Every key is a setting of the command and keeps its value, and the settings are compatible."""
    [config_class] = [CONFIGS[name] for name in CONFIGS if path.match(name)]
    config, _ = CommandParser(config_class).read(["--config", str(path)])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: getattr(config, name) for name in values} == values
    if config_class is StepSearchConfig:
        StepSearchSettings("out", config.n, config.strategy, config.branching)


def test_settings_on_the_command_line_win(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "reward_model: m\npolicy: p\nproblems: q\noutput_dir: o\nn: [1, 2]\noverwrite: true\nlimit: null\n"
        "engine_args: {a: 1}\nmax_step_tokens: 5\n"
    )
    words = ["--config", str(tmp_path / "a.yaml"), "--n", "8", "--output_dir", "p"]
    config, _ = CommandParser(StepSearchConfig).read(words)
    assert config.n == [8] and config.output_dir == "p" and config.overwrite is True
    assert config.limit is None and config.engine_args == {"a": 1} and config.max_step_tokens == 5
