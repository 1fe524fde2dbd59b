"""Follow docs/first_hour.md from top to bottom, as printed, with a tiny model instead of SmolLM2."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .helpers import tiny_model, tiny_tokenizer


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "first_hour.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


def commands() -> list[list[str]]:
    """Return the `trl-hrm` commands of the page, as words."""
    texts = [text.replace("\\\n", " ") for text in blocks("")]
    return [shlex.split(line)[1:] for text in texts for line in text.splitlines() if line.startswith("trl-hrm ")]


def test_the_rows_are_valid():
    solutions, candidates = ([json.loads(line) for line in block.splitlines()] for block in blocks("json"))
    assert len(solutions) == 10 and len({row["prompt"] for row in solutions}) == 5
    assert all(len(row["completions"]) == len(row["labels"]) for row in solutions)
    labels = [label for row in solutions for label in row["labels"]]
    assert {True, False} == set(labels)
    assert any([False, True] == row["labels"][i : i + 2] for row in solutions for i in range(2))  # a correction
    for row in candidates:  # one candidate of each problem is right
        answers = [re.search(r"The answer is (\d+)\.$", steps[-1])[1] for steps in row["candidates"]]
        assert answers.count(row["answer"]) == 1
    assert [words[0] for words in commands()] == [
        "env",
        "build-stepwise",
        "reward",
        "score",
        "best-of-n",
        "report",
        "app",
    ]


@pytest.mark.slow
def test_the_page_runs(tmp_path):
    """A newcomer copies the commands one after another: each finds what the one before it wrote."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    for name, block in zip(("solutions.jsonl", "candidates.jsonl"), blocks("json"), strict=True):
        (tmp_path / name).write_text(block, encoding="utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    printed = {}
    for words in commands()[:-1]:  # the app serves until it is stopped. It has tests of its own
        words = [word.replace("HuggingFaceTB/SmolLM2-135M", "model") for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "trl_hrm.cli", *words], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        printed[words[0]] = done.stdout
    assert printed["reward"].count("only 40 optimizer steps, and a model hardly learns") == 1  # see the page
    assert len(list((tmp_path / "outputs" / "mine" / "_evaluations").glob("eval_*.html"))) == 10
    assert printed["score"].count("What is 20 % of 150?") == 2
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "best-of-n" in page
