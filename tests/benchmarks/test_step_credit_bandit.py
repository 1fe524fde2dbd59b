"""The world of `benchmarks/step_credit_bandit.py`: exact values, sampler and gradient, and what each credit learns in it."""

import importlib
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def bandit():
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("step_credit_bandit")
    sys.path.pop(0)


@pytest.fixture(params=["correctness", "value"])
def world(bandit, request):
    return bandit.World(request.param, num_needed=2, max_steps=3, slip=0.2, missed=0.3)


def random_policy(bandit, world, seed: int = 0):
    generator = np.random.default_rng(seed)
    start = bandit.Policy.start(world)
    return bandit.Policy(generator.normal(size=start.kinds.shape), generator.normal(size=start.stop.shape))


def enumerate_solutions(bandit, policy, world, prefix=()):
    """Yield the probability of every solution, its steps (kind, is wrong, is seen), and whether it stopped by itself."""
    tried = min(sum(kind != bandit.PADDING for kind, _, _ in prefix), world.num_needed)
    j = len(prefix)
    weights = np.exp(policy.kinds[j, tried])
    for kind in (bandit.NEEDED, bandit.WRONG, bandit.PADDING):
        p_wrong = {bandit.NEEDED: world.slip, bandit.WRONG: 1.0, bandit.PADDING: 0.0}[kind]
        faults = [
            (False, False, 1 - p_wrong),
            (True, False, p_wrong * world.missed),
            (True, True, p_wrong * (1 - world.missed)),
        ]
        for is_wrong, is_seen, p in faults:
            p *= weights[kind] / weights.sum()
            steps = (*prefix, (kind, is_wrong, is_seen))
            if j + 1 == world.max_steps:
                yield p, steps, False
                continue
            after = min(tried + (kind != bandit.PADDING), world.num_needed)
            stop = 1 / (1 + math.exp(-policy.stop[j, after]))
            yield p * stop, steps, True
            for rest, longer, stopped in enumerate_solutions(bandit, policy, world, steps):
                yield p * (1 - stop) * rest, longer, stopped


@pytest.mark.parametrize("cut_off_counts", [False, True])
def test_expected_values_by_enumeration(bandit, world, cut_off_counts):
    """Every solution of at most three steps with its probability, instead of sums over states."""
    world = replace(world, cut_off_counts=cut_off_counts)
    policy = random_policy(bandit, world)
    total = accuracy = length = padding = score = 0.0
    for p, steps, stopped in enumerate_solutions(bandit, policy, world):
        kinds = [kind for kind, _, _ in steps]
        num_tried = sum(kind != bandit.PADDING for kind in kinds)
        total += p
        length += p * len(steps)
        padding += p * kinds.count(bandit.PADDING)
        is_right = num_tried >= 2 and not any(is_wrong for _, is_wrong, _ in steps)
        accuracy += p * (is_right and (stopped or cut_off_counts))
        for j, (kind, _, is_seen) in enumerate(steps):
            if world.reward_model == "correctness":
                score += p * (0.95 if kind == bandit.PADDING else 0.2 if is_seen else 0.8)
            elif any(seen for _, _, seen in steps[: j + 1]):
                score += p * 0.1
            else:
                tried = min(sum(kind != bandit.PADDING for kind in kinds[: j + 1]), 2)
                score += p * (0.4 + 0.15 * tried + 0.05 * kinds[: j + 1].count(bandit.PADDING))
    assert total == pytest.approx(1)
    by_hand = {"accuracy": accuracy, "length": length, "padding": padding, "score": score / length}
    assert bandit.expected(policy, world) == pytest.approx(by_hand)


def test_samples_have_the_expected_values(bandit, world):
    """Otherwise the policies would be trained in another world than they are measured in."""
    number, policy = 40_000, random_policy(bandit, world, seed=1)
    found = bandit.sample(policy, world, number, np.random.default_rng(0))
    expected = bandit.expected(policy, world)
    within = np.arange(world.max_steps) < found.lengths[:, None]
    assert found.is_right.mean() == pytest.approx(expected["accuracy"], abs=0.01)  # 4 standard errors
    assert found.lengths.mean() == pytest.approx(expected["length"], abs=0.02)
    assert ((found.kinds == bandit.PADDING) & within).sum(1).mean() == pytest.approx(expected["padding"], abs=0.02)
    assert found.scores[within].mean() == pytest.approx(expected["score"], abs=0.01)


def test_the_optimum(bandit):
    """The best of all plans without choice, which policies that see no errors cannot surpass."""
    world = bandit.World(num_needed=2, max_steps=4, slip=0.2)
    best = 0.0
    for length in range(1, 5):
        for plan in itertools.product((bandit.NEEDED, bandit.WRONG, bandit.PADDING), repeat=length):
            start = bandit.Policy.start(world)
            kinds, stop = np.zeros_like(start.kinds), np.full_like(start.stop, -50.0)
            kinds[np.arange(length), :, plan] = 50.0
            stop[length - 1] = 50.0
            best = max(best, bandit.expected(bandit.Policy(kinds, stop), world)["accuracy"])
    assert world.optimum == pytest.approx(best) == pytest.approx(0.8**2)


def test_the_gradient(bandit, world):
    """One update against the gradient of the log-probabilities. The decision to stop has the advantage of the step before it."""
    policy = random_policy(bandit, world, seed=2)
    found = bandit.sample(policy, world, 16, np.random.default_rng(1))
    within = np.arange(world.max_steps) < found.lengths[:, None]
    advantages = np.random.default_rng(2).normal(size=within.shape) * within
    kinds, stop = (torch.tensor(logits, requires_grad=True) for logits in (policy.kinds, policy.stop))
    total = 0.0
    for i, length in enumerate(found.lengths):
        for j in range(length):
            log_prob = kinds[j, found.before[i, j]].log_softmax(-1)[found.kinds[i, j]]
            if j + 1 < world.max_steps:
                sign = 1 if j + 1 == length else -1
                log_prob = log_prob + torch.nn.functional.logsigmoid(sign * stop[j, found.after[i, j]])
            total = total + advantages[i, j] * log_prob / len(found.lengths)
    total.backward()
    before = policy.kinds.copy(), policy.stop.copy()
    bandit.ascend(policy, found, advantages)
    np.testing.assert_allclose((policy.kinds - before[0]) / bandit.LEARNING_RATE, kinds.grad.numpy(), atol=1e-12)
    np.testing.assert_allclose((policy.stop - before[1]) / bandit.LEARNING_RATE, stop.grad.numpy(), atol=1e-12)


def test_sums_are_exploited_by_padding(bandit):
    """A short training with two seeds: three needed steps, and padding only with `step_sum`."""
    for seed in (0, 1):
        ends = {
            name: bandit.train(bandit.World(), name, 1.0, 1.0, seed, num_updates=150)[-1]
            for name in (bandit.OUTCOME_ONLY, "outcome", "step_sum", "min_form", "clip_delta")
        }
        exploited = ends.pop("step_sum")
        assert exploited["length"] > 6 and exploited["padding"] > 3
        assert exploited["score"] > 0.85  # the reward model prefers these solutions
        for name, end in ends.items():
            assert end["accuracy"] > 0.8, name
            assert end["length"] < 3.2 and end["padding"] < 0.1, name
            assert end["score"] < 0.8, name


def test_min_form_with_rewards_from_0_to_1(bandit):
    """The same weights as `min_form`, by hand: weights 1/(1 + e^2) for 0.3 and e^2/(1 + e^2) for 0.2, with T = 0.05."""
    low = 1 / (1 + math.exp(2))
    first, second = bandit.unsigned_min_form([[0.3, 0.2], [0.4]])
    assert first == pytest.approx([0.3 * low + 0.2 * (1 - low) - 0.4, 0.2 * (1 - low)])
    assert second == pytest.approx([0.4 - (0.3 * low + 0.2 * (1 - low))])


def test_the_range_of_min_form(bandit):
    """With rewards from 0 to 1, every step has a positive return. With twice the weight, the policy adds steps."""
    unsigned, signed = (
        bandit.train(bandit.World(), name, 1.0, 2.0, 1, num_updates=150)[-1] for name in (bandit.UNSIGNED, "min_form")
    )
    assert unsigned["length"] > 3.6 and signed["length"] < 3.2
    assert signed["accuracy"] > unsigned["accuracy"] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["process weight 1", "process weight 0.25", "cut-off solutions count", "value model"]
)
def test_every_seed_of_the_page(bandit, setting):
    """`docs/evidence.md` says it of five seeds and these settings."""
    runs = bandit.train_all(setting, range(5))
    assert min(run[-1]["padding"] for run in runs["step_sum"]) > 1
    for name in ("min_form", "clip_delta"):
        ends = [run[-1] for run in runs[name]]
        assert min(end["accuracy"] for end in ends) > 0.84
        assert max(end["length"] for end in ends) < 3.2


@pytest.mark.slow
def test_no_credit_solves_the_problem_without_an_outcome_reward(bandit):
    runs = bandit.train_all("no outcome reward", range(2))
    assert bandit.OUTCOME_ONLY not in runs
    assert max(run[-1]["accuracy"] for points in runs.values() for run in points) < 0.5


def test_the_section_is_kept(bandit):
    """`benchmarks/evidence.py` writes the page again without it otherwise."""
    evidence = importlib.import_module("evidence")
    assert bandit.HEADING in [f"## {title}" for title in evidence.KEPT]


def test_the_report(bandit):
    """One update per run: every setting and credit has its place, and settings without an outcome reward a dash."""
    runs = {setting: bandit.train_all(setting, [0], num_updates=1) for setting in bandit.SETTINGS}
    results = {
        "runs": runs,
        "optima": dict.fromkeys(runs, 0.5),
        "seeds": [0],
        "date": "",
        "minutes": 1,
        "versions": {},
    }
    page = bandit.report(results)
    assert page.startswith(bandit.HEADING)
    rows = {row.split(" | ")[0].strip("| "): row for row in page.splitlines() if row.startswith("|")}
    assert {f"`{name}`" for name in bandit.CREDITS} | set(bandit.SETTINGS) <= rows.keys()
    assert [setting for setting in runs if " – " in rows[setting]] == [
        "no outcome reward",
        "value model, no outcome reward",
    ]
    picture = bandit.length_picture(runs[bandit.MAIN])
    assert all(name in picture.text for name in ("outcome", *bandit.CREDITS))
