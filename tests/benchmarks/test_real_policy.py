"""The word problems of `benchmarks/real_policy.py`, and its section of docs/evidence.md."""

import importlib
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="module")
def scripts():
    """The scripts `real_policy` and `evidence`, which import their neighbours."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("real_policy"), importlib.import_module("evidence")
    sys.path.pop(0)


def test_answers(scripts):
    """Recomputed from the numbers and words of each problem."""
    problems = scripts[0].make_problems(210, seed=3)
    assert len({row["problem"] for row in problems}) == 210
    for row in problems:
        text, numbers = row["problem"], list(map(int, re.findall(r"\d+", row["problem"])))
        signs = {"gives": 1, "loses": -1, "and gives": -1, "takes": -1}
        if "bags" in text:
            expected = numbers[0] * numbers[1]
        elif "together" in text:
            expected = sum(numbers)
        else:
            verbs = re.findall(r"and gives|gives|loses|takes", text)
            expected = numbers[0] + sum(signs[verb] * number for verb, number in zip(verbs, numbers[1:], strict=True))
        assert int(row["answer"]) == expected > 0


def test_the_seed(scripts):
    """The same seed gives the same problems, and every template is among a few of them."""
    make = scripts[0].make_problems
    assert make(40, seed=1) == make(40, seed=1) != make(40, seed=2)
    patterns = ("more", "and .* has", "of them to", "in a box", "bags", "loses", ", .* and .* has")
    assert all(any(re.search(pattern, row["problem"]) for row in make(40, seed=1)) for pattern in patterns)


def test_the_section_is_kept(scripts):
    """`benchmarks/evidence.py` writes the page again without it otherwise."""
    policy, evidence = scripts
    assert policy.HEADING in [f"## {title}" for title in evidence.KEPT]


def test_the_conclusions_stay_first(scripts, tmp_path, monkeypatch):
    """They are written by hand, and the page is written again from each demo."""
    evidence = scripts[1]
    for name, value in {
        "make_pictures": {},
        "claims": [],
        "sections": [],
        "header": "Header.",
        "vote_words": "",
    }.items():
        monkeypatch.setattr(evidence, name, lambda data, value=value: value)
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "evidence.md").write_text(
        "# Evidence\n\n## Conclusions\n\nBy hand.\n\n## About the first part\n\nOld.\n"
    )
    evidence.main(SimpleNamespace(docs=tmp_path, demo=tmp_path))
    page = (tmp_path / "evidence.md").read_text()
    assert page.startswith("# Evidence\n\n## Conclusions\n\nBy hand.\n\n## About the first part\n\nThe first part")
    assert "Old." not in page
