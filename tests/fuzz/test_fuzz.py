"""Mutated inputs of every reader and command: a clean error, or a result whose invariants hold."""

from collections import Counter

import pytest

from trl_hrm.cli import COMMANDS, TRAINING

from .fuzzer import run_seed
from .targets import targets


def run_seeds(seeds: range, inputs) -> None:
    kinds, failures = Counter(), []
    for seed in seeds:
        target, outcome = run_seed(seed, inputs)
        kinds[outcome.kind] += 1
        if outcome.kind not in ("ok", "error"):
            failures.append(f"seed {seed}, {target.command} [{target.file}]: {outcome.kind}\n{outcome.details}")
    assert not failures, "\n\n".join([*failures, "To reproduce one: python -m tests.fuzz --seed SEED"])
    assert kinds["ok"] > len(seeds) // 8 and kinds["error"] > len(seeds) // 4, kinds  # both are tested


def test_mutated_inputs(inputs):
    run_seeds(range(60), inputs)


@pytest.mark.slow
def test_many_mutated_inputs(inputs):
    run_seeds(range(1000, 3000), inputs)


def test_every_command_is_a_target():
    assert {target.command.split()[0] for target in targets()} == {*COMMANDS, *TRAINING} - {"env"}
