"""`benchmarks/active_labels.py`: the exact world, the simulation, and a small study from end to end."""

import importlib
import random
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from trl_hrm.demo.policy import solution_text
from trl_hrm.demo.world import different_problems, solve
from trl_hrm.io import write_json


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("active_labels")
    sys.path.pop(0)


PROBLEMS = different_problems(random.Random(0), 20)


def test_the_policy_writes_as_the_demo(study):
    for seed, problem in enumerate(PROBLEMS):
        steps, _ = solve(problem, random.Random(seed), study.SLIP_RATE, study.CORRECTION_RATE)
        assert study.write_on(problem.text(), random.Random(seed)) == solution_text(steps)


def test_values_are_exact(study):
    """The value of a prefix is the mean of its continuations, here within four standard errors."""
    rng, number = random.Random(1), 2000
    kinds = set()
    for problem in PROBLEMS[:6]:
        steps, _ = solve(problem, rng, 0.5, 0.5)
        for length in range(len(steps)):
            prefix = problem.text() + "".join(f"{step}\n\n" for step in steps[:length])
            state = study.read_state(problem, prefix)
            value = study.exact_value(problem, state)
            answers = (study.ANSWER.search(study.write_on(prefix, rng))[1] for _ in range(number))
            found = statistics.fmean(int(answer) == problem.values()[-1] for answer in answers)
            assert abs(found - value) <= 4 * (value * (1 - value) / number) ** 0.5 + 1e-12
            kinds.add((state.before is not None, 0 < value < 1))
    assert len(kinds) == 4  # with and without a slip that may be corrected, certain or not


def test_errors_by_hand(study):
    found = study.errors_of(np.array([0.0, 0.75, 0.5]), np.array([0.25, 0.5, 0.75]), np.array([0.0, 0.0, 0.03]))
    assert found["absolute"] == 0.25 and found["squared"] == pytest.approx((3 / 16 - 0.03) / 3)
    assert found["hard"] == 2 / 3 and found["positive"] == 1 / 3


def test_simulation(study, monkeypatch):
    """Both distributions have the same tokens up to one request, and the errors fall."""
    monkeypatch.setattr(study, "NUM_LABELS", 200)
    found = study.simulate(4, seed=0)
    assert found == study.simulate(4, seed=0) != study.simulate(4, seed=1)
    errors = [found["before"]["squared"]]
    for multiple in study.MULTIPLES:
        uncertain, uniform = (found[str(multiple)][where] for where in study.WHERE)
        assert uncertain["samples"] == multiple * 4 * 200
        difference = uncertain["tokens"] - uniform["tokens"]
        assert 0 <= difference < study.UNIT * study.STEP_TOKENS * study.MAX_STEPS
        errors.append(uniform["squared"])
    assert errors[0] > errors[1] > errors[3]


def test_a_small_study(study, tmp_path, monkeypatch):
    """From the command to the section of a page. The exact values come from the world, or from other rollouts."""
    runs = study.Study(study.WorldConfig, "world", 3, 2, (1, 2))
    found = study.measure_run(runs, tmp_path / "world", seed=0)
    assert study.measure_run(runs, tmp_path / "world", seed=0) == found
    for multiple in ("1", "2"):
        uncertain, uniform = (found[multiple][where] for where in study.WHERE)
        assert uncertain["squared"] < found["before"]["squared"]
        assert uniform["tokens"] == pytest.approx(uncertain["tokens"], rel=0.2)
    keys = list(study.read_labels(tmp_path / "world" / "first"))
    values, _ = study.true_values(runs, tmp_path / "world", keys, seed=0)

    class Sampled(study.WorldConfig):
        """The same policy, whose values are taken as unknown."""

    monkeypatch.setattr(study, "NUM_REFERENCE", 64)
    unknown = study.Study(Sampled, "world", 3, 2, (1,))
    monkeypatch.setattr(study, "SEARCH", study.POLICY)
    estimated, noise = study.true_values(unknown, tmp_path / "world", keys, seed=0)
    assert np.all(np.abs(estimated - values) <= 5 * np.sqrt(values * (1 - values) / 60) + 1e-12)
    assert noise == pytest.approx(estimated * (1 - estimated) / 63, rel=0.1)
    results = {"settings": {"exact world, 2 rollouts each": [found] * 3}, "date": "2026-11-30", "versions": {}}
    results |= {"seeds": 3, "policy_seeds": 0}
    write_json(tmp_path / "results.json", results)
    section = study.report(results)
    assert section.startswith(study.HEADING) and "### Exact world, 2 rollouts each" in section
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) == 5 and "tokens per label" in rows[-1]
    assert study.picture(results).images["light"].startswith(b"\x89PNG")
