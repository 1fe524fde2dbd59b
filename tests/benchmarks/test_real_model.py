"""Intervals of the AUROC over problems, against a plain loop over pairs."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_hrm.step_metrics import auroc


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("real_model")
    sys.path.pop(0)


def test_the_auroc_and_its_interval_are_those_of_a_plain_loop(script):
    rng = np.random.default_rng(0)
    problems = rng.integers(5, size=60)
    labels = rng.integers(2, size=60).astype(float)
    scores = {"first": rng.random(60).round(1), "second": rng.random(60)}  # the first has ties

    found = script.auroc_intervals(scores, labels, problems, seed=7)

    weights = np.random.default_rng(7).exponential(size=(script.NUM_DRAWS, 5))
    drawn = {}
    for name, values in scores.items():
        assert found[name]["value"] == pytest.approx(auroc(values, labels >= 0.5), abs=1e-12)
        drawn[name] = []
        for weight in weights[:, problems]:
            won = total = 0.0
            for i in np.flatnonzero(labels == 1):
                here = weight[i] * weight[labels == 0]
                won += (here * ((values[i] > values[labels == 0]) + 0.5 * (values[i] == values[labels == 0]))).sum()
                total += here.sum()
            drawn[name].append(won / total)
        assert [found[name]["low"], found[name]["high"]] == pytest.approx(np.percentile(drawn[name], [2.5, 97.5]))
    differences = np.array(drawn["first"]) - np.array(drawn["second"])
    difference = found["first minus second"]
    assert difference["value"] == pytest.approx(found["first"]["value"] - found["second"]["value"])
    assert [difference["low"], difference["high"]] == pytest.approx(np.percentile(differences, [2.5, 97.5]))


def test_the_interval_is_about_problems_and_not_about_steps(script):
    """Ten copies of each step say nothing new."""
    rng = np.random.default_rng(1)
    problems, labels, scores = rng.integers(4, size=40), rng.integers(2, size=40).astype(float), rng.random(40)

    once = script.auroc_intervals({"model": scores}, labels, problems, seed=3)
    often = script.auroc_intervals({"model": np.tile(scores, 10)}, np.tile(labels, 10), np.tile(problems, 10), seed=3)

    assert once["model"] == pytest.approx(often["model"])


def test_the_section_of_the_page_is_replaced(script):
    """And nothing else of the page. `benchmarks/evidence.py` keeps what `find_section` returns."""
    common, heading = importlib.import_module("common"), "## Second"
    first, second = f"{heading}\n\nOld.\n\n```\n### no heading\n```\n", f"{heading}\n\nNew.\n"
    page = "# Evidence\n\n## One\n\nText.\n\n## Last\n\nEnd.\n"
    assert common.find_section(page, heading) == ""
    once = common.replace_section(page, first, heading)
    assert once == f"# Evidence\n\n## One\n\nText.\n\n{first}\n## Last\n\nEnd.\n"
    assert common.find_section(once, heading) == first
    third = "## Third\n\nOther.\n"
    twice = common.replace_section(once, third, "## Third")
    assert common.find_section(twice, heading) == first and common.find_section(twice, "## Third") == third
    assert common.replace_section(twice, third.replace("Other", "More"), "## Third") == twice.replace("Other", "More")
    assert common.replace_section(once, second, heading) == once.replace(first, second)
