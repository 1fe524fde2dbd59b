"""The tables of the benchmark of long paths, by hand."""

import importlib
import sys
from pathlib import Path

import pytest

from trl_hrm.search.thinking import begins_thought

from ..helpers import tiny_tokenizer


@pytest.fixture(scope="module")
def paths():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("long_paths")
    sys.path.pop(0)


def test_fit(paths):
    assert paths.fit([1024, 2048, 4096], [3.0, 4.0, 6.0]) == (1 / 1024, 0.5849625007211562)


def test_report(paths):
    results = [
        {
            "name": "model",
            "kind": "scoring",
            "length": length,
            "memory": 100 + length / 1024,
            "start_memory": 100,
            "seconds": 1.25,
        }
        for length in (1024, 2048, 4096)
    ]
    text = paths.report(results, {"line": "versions"})
    assert "| 2,048 | 102 | 1.2 |" in text and text.endswith("versions")
    assert "- scoring: 1 KiB per token of the path" in text and "power 1.00 of the length" in text


def test_every_eighth_step_begins_with_a_mark(paths):
    steps = paths.make_solution(tiny_tokenizer(), 8000, seed=0)
    assert [begins_thought(step) for step in steps[:17]] == [i % 8 == 7 for i in range(17)]
