"""Every name of 0.1 works, or is an error that states the new name, and docs/migrating_from_0_1.md lists it."""

import importlib
import re
import subprocess
import sys
import tomllib
from itertools import cycle
from pathlib import Path

import pytest

import trl_hrm
from trl_hrm.cli import COMMANDS, main
from trl_hrm.renamed import MODULES, OPTIONS, renamed_option


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migrating_from_0_1.md").read_text(encoding="utf-8")
# What `import trl_hrm` and `trl-hrm` offered in 0.1
NAMES = """
    AnswerGrader FullTree HRMRewardConfig HRMRewardTrainer KLSelfConfig KLSelfTrainer OpenAIEngine PUCT Problem PushError Rollouts Scheduler
    SearchTree ServerScorer StepFormat StepReward StepScorer StepTree TransformersEngine compress entropy_label extract_answer hrm_view
    mc_scores orm_view prm_view push_dataset
""".split()
OLD_COMMANDS = """
    build-prm800k build-math-shepherd build-stepwise annotate export inspect select-raft push-dataset best-of-n benchmark report score demo env
""".split()


def settings_of(command: str) -> set[str]:
    return set(getattr(trl_hrm, COMMANDS[command].config).__dataclass_fields__)


def test_names_and_commands_still_exist():
    assert all(getattr(trl_hrm, name) is not None for name in NAMES)
    assert set(OLD_COMMANDS) <= COMMANDS.keys()


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command, capsys, tmp_path):
    """Without this, `score --model X` would only say that `--reward_model` is missing."""
    spellings = cycle(("--{}", "--{}=x"))
    for old, new in OPTIONS[command].items():
        assert old not in settings_of(command)
        assert set(re.findall(r"^`--(\w+)", new)) <= settings_of(command)
        assert renamed_option(command, f"--{old.replace('_', '-')}") == f" In 0.2, it is {new}."
        with pytest.raises(SystemExit) as stop:
            main([command, next(spellings).format(old), "x"])
        assert stop.value.code == 2
        assert f"In 0.2, it is {new}." in capsys.readouterr().err
        assert any(line.endswith(f"| `--{old}` | {new} |") and f"`{command}`" in line for line in PAGE.splitlines())
    file = tmp_path / "settings.yaml"
    file.write_text(f"{old}: 1\n")
    assert main([command, "--config", str(file)]) == 1
    assert f"In 0.2, it is {new}." in capsys.readouterr().err
    [table] = re.findall(r"^\| command \| option of 0.1.*?\n\n", PAGE, re.MULTILINE | re.DOTALL)
    listed = {
        line.split("|")[2].strip() for line in table.strip().splitlines()[2:] if f"`{command}`" in line.split("|")[1]
    }
    assert listed == {f"`--{old}`" for old in OPTIONS[command]}


def test_modules():
    """A plain ModuleNotFoundError would not say where the names are now."""
    for old, new in MODULES.items():
        with pytest.raises(ModuleNotFoundError, match=re.escape(f"from trl_hrm.{new}, or")):
            importlib.import_module(f"trl_hrm.{old}")
        assert importlib.util.find_spec(f"trl_hrm.{new}") is not None
        assert f"| `trl_hrm.{old}` | `trl_hrm.{new}` |" in PAGE
    assert len(re.findall(r"^\| `trl_hrm\.", PAGE, re.MULTILINE)) == len(MODULES)
    for name in ("trl_hrm.search.nothing", "evaluation.intervals", "trl_hrm_other"):
        with pytest.raises(ModuleNotFoundError, match="No module named"):
            importlib.import_module(name)


def test_other_names_have_no_advice(capsys):
    for command, word in (("score", "--modle"), ("inspect", "--top_k"), ("build-stepwise", "--revision")):
        with pytest.raises(SystemExit):
            main([command, "x", word, "1"])
        assert "0.2" not in capsys.readouterr().err


def test_versions():
    """The version is in three places, and a release with two of them is confusing forever."""
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    [(version, date)] = re.findall(r"\A# Changelog\n\n## (\S+) \((.+)\)\n", changelog)
    assert version == trl_hrm.__version__
    assert f"\nversion: {version}\n" in citation
    assert date == "unreleased" or f"\ndate-released: {date}\n" in citation


NEEDED = """
    trl_hrm/py.typed trl_hrm/pages/style.css trl_hrm/pages/scripts/tree.js trl_hrm/pages/templates/base.html.jinja
    trl_hrm/pages/templates/evaluated_steps.html.jinja trl_hrm/pages/templates/model_card.md.jinja
    trl_hrm/metrics/step_accuracy/README.md trl_hrm/metrics/step_accuracy/requirements.txt
""".split()


@pytest.mark.slow
def test_the_built_wheel(tmp_path):
    """
    A file that is missing in the package data works in a clone and fails after `pip install`. The wheel has every file of the package that
    git knows, and nothing else. The built wheel runs without the clone.
    """
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "dist"), str(clone)], check=True
    )
    [wheel] = (tmp_path / "dist").glob("*.whl")
    assert wheel.name == f"trl_hrm-{trl_hrm.__version__}-py3-none-any.whl"
    target = tmp_path / "installed"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(target)], check=True)
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    files = subprocess.run(["git", "ls-files", "trl_hrm"], cwd=clone, capture_output=True, text=True, check=True)
    assert {name for name in found if name.startswith("trl_hrm/")} == set(files.stdout.split())
    assert all(name.startswith(("trl_hrm/", f"trl_hrm-{trl_hrm.__version__}.dist-info/")) for name in found)
    assert set(NEEDED) <= found
    [metadata] = target.glob("*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {line.removeprefix("Classifier: ") for line in lines if line.startswith("Classifier")} == set(
        project["classifiers"]
    )
    assert f"Requires-Python: {project['requires-python']}" in lines and "License-Expression: Apache-2.0" in lines
    script = f"import sys; sys.path.insert(0, {str(target)!r}); from trl_hrm.cli import main; sys.exit(main(['env']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"trl_hrm {trl_hrm.__version__}" in re.sub(r"[ :=|]+", " ", done.stdout)
