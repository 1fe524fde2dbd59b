"""The settings files of the best-of-N and step-search recipes, as the parser of the commands reads them."""

import math
from pathlib import Path

import pytest
import yaml

from trl_hrm import BestOfNConfig, StepSearchConfig
from trl_hrm.command_parser import CommandParser
from trl_hrm.evaluation.step_search import StepSearchSettings


ROOT = Path(__file__).resolve().parents[2]
CONFIGS = {"best_of_n.yaml": BestOfNConfig, "step_search.yaml": StepSearchConfig}


@pytest.mark.parametrize(
    "path",
    sorted(path for name in CONFIGS for path in (ROOT / "recipes").rglob(name)),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_settings_of_recipes(path):
    """Every key is a setting of the command and keeps its value, and the settings are compatible."""
    config, _ = CommandParser(CONFIGS[path.name]).read(["--config", str(path)])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {name: getattr(config, name) for name in values} == values
    if path.name == "step_search.yaml":
        StepSearchSettings("out", config.n, config.strategy, config.branching)
    if path.parent.name != "tiny":
        assert path.read_text().startswith("# Not tested")


def test_settings_on_the_command_line_win(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "reward_model: m\npolicy: p\nproblems: q\noutput_dir: o\nn: [1, 2]\noverwrite: true\nlimit: null\n"
        "engine_args: {a: 1}\nmax_step_tokens: 5\n"
    )
    words = ["--config", str(tmp_path / "a.yaml"), "--n", "8", "--output_dir", "p"]
    config, _ = CommandParser(StepSearchConfig).read(words)
    assert config.n == [8] and config.output_dir == "p" and config.overwrite is True
    assert config.limit is None and config.engine_args == {"a": 1} and config.max_step_tokens == 5


def test_the_papers_settings():
    """N, policies and aggregates as in HRM, tables 3 and 4, and ER-PRM, section 5 and tables 4 to 6."""
    found = {
        (path.parent.name, path.stem): yaml.safe_load(path.read_text())
        for name in CONFIGS
        for path in (ROOT / "recipes").glob(f"*/{name}")
    }
    searches = [found[name, "step_search"] for name in ("qwen2.5-math-7b", "deepseek-math-7b")]
    assert all(values["n"] == [2, 4, 8, 16, 24, 32, 64, 128, 256, 512] for values in searches)
    large = found["qwen2.5-math-72b", "step_search"]
    assert large["n"] == [2, 4, 8, 16, 24] == found["qwen2.5-math-72b", "best_of_n"]["n"]
    assert large["prompt"] == "formulas"
    for name in ("deepseek-math-7b-instruct", "metamath-mistral-7b", "openmath2-llama3.1-8b"):
        values = found[name, "best_of_n"]
        assert values["n"] == [1, 4, 8, 16, 32, 64] and values["aggregate"] == ["min"]
    assert all(values["max_in_flight"] >= max(values["n"]) for values in found.values() if max(values["n"]) > 256)
    assert math.isclose(searches[0]["temperature"], 1.0)
