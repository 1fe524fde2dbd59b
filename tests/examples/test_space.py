"""The files of the Hugging Face Space in `examples/space`."""

import runpy
from pathlib import Path

import yaml

import trl_hrm


SPACE = Path(__file__).resolve().parents[2] / "examples" / "space"


def test_the_space_serves_the_models_of_its_variable(monkeypatch):
    served = []
    monkeypatch.setattr(trl_hrm, "app", served.append)
    monkeypatch.setenv("REWARD_MODEL", "me/hrm me/prm")
    monkeypatch.setenv("SPANS", "1 2")
    runpy.run_path(str(SPACE / "app.py"))
    monkeypatch.delenv("REWARD_MODEL")
    monkeypatch.delenv("SPANS")
    runpy.run_path(str(SPACE / "app.py"))
    first, second = served
    assert (first.reward_model, first.spans, first.host) == (["me/hrm", "me/prm"], [1, 2], "0.0.0.0")
    assert (second.reward_model, second.spans) == (["Qwen/Qwen2.5-Math-PRM-7B"], [1])


def test_the_space_installs_what_it_needs():
    """The Hub installs gradio in the version of the front matter, before the requirements."""
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    settings = yaml.safe_load(front)
    assert settings["sdk"] == "gradio" and (SPACE / settings["app_file"]).exists()
    pins = dict(
        line.split("==") for line in (SPACE.parents[1] / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert settings["sdk_version"] == pins["gradio"]
    assert (SPACE / "requirements.txt").read_text() == "trl-hrm[app]\n"
