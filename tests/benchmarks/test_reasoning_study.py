"""The evidence page of the reasoning models: planted results, missing tasks, and the learning rates that tasks share."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def study():
    """The script, which imports its neighbours."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("reasoning_study")
    sys.path.pop(0)


def estimate(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "seeds": [mean, mean, mean]}


def system(title: str, seconds: float, steps: float, segments: int, rate: float = 3e-3) -> dict:
    return {
        "title": title,
        "parameters": 98498,
        "seconds_per_step": 0.05,
        "learning_rate": rate,
        "tried_learning_rates": {"0.001": 0.25, "0.003": 0.5},
        "steps": 2000,
        "segments": segments,
        "points": [1000, 2000],
        "run_seconds": [60.0, 62.0],
        "exact": {"seconds": estimate(seconds), "steps": estimate(steps)},
        "cell": {"seconds": estimate(0.875), "steps": estimate(0.875)},
        "by_segment": [estimate(seconds)] * (4 * segments),
        "strategies": {
            budget: {
                f"{name}, {segments} segments": {**estimate(seconds), "mean_segments": 1.5}
                for name in ("first_halt", "choose_by_q")
            }
            for budget in ("seconds", "steps")
        },
        "by_blanks": {"24": estimate(seconds)},  # one group: no table
        "by_rating": {"0": estimate(seconds), "1 to 4": estimate(steps)},
        "few_blanks": {"1": estimate(0.0625)},
        "validation": [{"step": 1000, **estimate(0.5)}, {"step": 2000, **estimate(seconds)}],
    }


def results() -> dict:
    judged = {"verdict": "holds", "parts": {"HRM − loop": {**estimate(-0.125)}}}
    return {
        "settings": {
            "hidden_size": 64,
            "mixer": "mlp",
            "position": "learned",
            "halt_max_steps": 8,
            "batch_size": 64,
            "seconds_per_run": 90.0,
        },
        "versions": {"torch": "2.13.0"},
        "seeds": [0, 1, 2],
        "equal_steps": 1000,
        "data": {
            "family": "sudoku",
            "splits": {"train": 1000, "validation": 200, "test": 500, "few_blanks": 200},
            "build": {"facts": {"test": {"boards": 500, "kept, but with a known grid": 321}}},
        },
        "systems": {
            "one_pass": system("one pass", 0.03125, 0.0, 1),
            "loop": system("loop control", 0.9375, 0.75, 8, rate=1e-3),
            "hrm": system("HRM", 0.8125, 0.6875, 8, rate=6e-3),
        },
        "claims": [
            {
                "claim": "The hierarchy beats the loop",
                "margin": 0.0,
                "seconds": {**judged, "verdict": "does not hold"},
                "steps": judged,
            },
            {"claim": "More segments help (HRM: 32 instead of 8)", "margin": 0.0, "seconds": judged},
        ],
    }


def test_page(study):
    """A verdict, accuracy or picture under the wrong task or budget would be published unnoticed."""
    tasks = study.FULL[:2]
    found = {tasks[0].name: results()}
    text = study.page(
        tasks, found, {tasks[0].name: study.make_pictures(results())}, "the command", ["## Kept\n\nby hand"]
    )
    assert f"**Incomplete: no results yet for {tasks[1].title}.**" in text
    assert "| loop control | 93.8 % / 75.0 % |" in text
    assert "| The hierarchy beats the loop | **does not hold** (−12.5); equal steps: **holds** (−12.5) |" in text
    assert "| More segments help (HRM) | **holds** (−12.5) |" in text
    assert "Test puzzles, kept, but with a known grid: 321." in text
    assert "| HRM | 0.006 | 0.001: 25.0 %, 0.003: 50.0 % |" in text
    assert text.index("## Kept\n\nby hand") < text.index("## Numbers of the papers")
    assert "### By rating" in text and "### By number of blanks" not in text
    assert "![" in text and f"](images/reasoning/{tasks[0].name}_segments.png)" in text
    # one pass has no segments to choose between
    assert "| one pass |" not in text[text.index("### By segment") : text.index("### Few blanks")]


def test_page_without_results(study):
    text = study.page(study.FULL, {}, {}, "the command")
    assert "**Incomplete: no results yet for Sudoku 6x6 with 12 givens, " in text and "## Claims" not in text


def test_written_page(study, tmp_path):
    """Sections that are written by hand survive, and pictures of an earlier run do not."""
    tasks, docs = study.FULL[:1], tmp_path / "docs"
    (tmp_path / tasks[0].name).mkdir()
    (tmp_path / tasks[0].name / "results.json").write_text(json.dumps(results()))
    (tmp_path / "minutes.jsonl").write_text('{"task": "a", "minutes": 1.5}\n{"task": "a", "minutes": 2.5}\n')
    (docs / study.PICTURES).mkdir(parents=True)
    old = docs / study.PICTURES / f"{tasks[0].name}_old.png"
    old.write_bytes(b"")
    (docs / "reasoning_evidence.md").write_text("# Old\n\n## Mazes: what was tried\n\nsizes\n\n## Last\n")
    study.write_page(tasks, tmp_path, docs, "the command")
    text = (docs / "reasoning_evidence.md").read_text()
    assert (
        "## Mazes: what was tried\n\nsizes\n" in text and "## Last" not in text and " 4 minutes, torch 2.13.0." in text
    )
    pictures = {path.name for path in (docs / study.PICTURES).iterdir()}
    assert old.name not in pictures
    assert {f"{study.PICTURES}/{name}" for name in pictures} == {
        part.split(")")[0] for part in text.split("](")[1:] if ".png" in part
    }


def test_learning_rates_of_the_first_task(study, tmp_path, monkeypatch):
    """A later task with the wrong learning rates would compare untuned systems."""
    configs = []
    monkeypatch.setattr(study, "reason", lambda config: configs.append(config) or "done")
    first = study.Task("first", "", "", {})
    later = study.Task("later", "", "", {"systems": ["hrm", "loop"], "seconds_per_run": 60.0})
    with pytest.raises(SystemExit, match="needs the learning rates of first"):
        study.run_task(later, first, tmp_path, {})
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "results.json").write_text(json.dumps(results()))
    study.run_task(later, first, tmp_path, {"num_workers": 1}, 0.5)
    [config] = configs
    assert config.learning_rates == ["hrm=0.006", "loop=0.001"] and config.num_workers == 1
    assert config.seconds_per_run == 30
    assert [config.rates_of(name) for name in config.systems] == [[0.006], [0.001]]


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_profiles_are_valid(study, profile, tmp_path):
    """An option that no longer exists would stop the study after an hour."""
    for task in study.PROFILES[profile]:
        settings = {"learning_rates": ["1e-3"], **task.options}
        config = study.ReasonConfig(output_dir=str(tmp_path), **settings)
        assert {"one_pass", "one_pass_deep", "loop", "hrm", "hrm_continue", "trm"} <= {*config.systems}
        assert len(config.seeds) >= 3
