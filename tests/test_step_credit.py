"""Credit of steps: values by hand, slow plain loops, and what each credit promises."""

import doctest
import itertools
import math
import random

import numpy as np
import pytest
import torch

from trl_hrm import step_credit
from trl_hrm.step_credit import CREDITS, clip_delta, min_form, progress, step_sum


FUNCTIONS = [step_sum, min_form, progress, clip_delta]
BINARY = 0.1 / math.log(2)  # exp(-r / T) = 2 ** (-10 r)


def close(found, expected):
    """Compare ragged lists."""
    assert [len(steps) for steps in found] == [len(steps) for steps in expected]
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def random_group(seed: int, num_completions: int | None = None) -> list[list[float]]:
    generator = random.Random(seed)
    count = num_completions or generator.randint(2, 6)
    return [[generator.random() for _ in range(generator.randint(1, 7))] for _ in range(count)]


# ---------------------------------------------------------------- values by hand


def test_step_sum_by_hand():
    """Two groups of three completions. The second differs in its mean, and in the sign of the last step."""
    # 6 rewards, mean 3/6, every deviation is 0.5: variance 6 * 0.25 / 5 = 0.3
    unit = 0.5 / (math.sqrt(0.3) + 1e-4)
    close(step_sum([[1, 0], [1], [0, 1, 0]]), [[0, -unit], [unit], [-unit, 0, -unit]])
    # 5 rewards, mean 0.4, deviations 0.4, 0.2, -0.4, -0.2, 0: variance (0.16 + 0.04 + 0.16 + 0.04 + 0) / 4 = 0.1
    unit = 1 / (math.sqrt(0.1) + 1e-4)
    close(
        step_sum([[0.8, 0.6], [0.0, 0.2], [0.4]]),
        [[(0.4 + 0.2) * unit, 0.2 * unit], [(-0.4 - 0.2) * unit, -0.2 * unit], [0.0]],
    )


def test_min_form_by_hand():
    """With T = 0.1 / ln 2, a reward that is higher by 0.1 has half the weight."""
    # weights: 2/3 1/3 | 1 | 1/2 1/4 1/4
    # 2 r - 1: -0.6 -0.4 | -0.2 | -0.8 -0.6 -0.6
    # r*: -1.2/3 -0.4/3 | -0.2 | -0.4 -0.15 -0.15
    # G: -1.6/3 -0.4/3 | -0.2 | -0.7 -0.3 -0.15
    close(
        min_form([[0.2, 0.3], [0.4], [0.1, 0.2, 0.2]], BINARY),
        [
            [-1.6 / 3 - (-0.2 - 0.7) / 2, -0.4 / 3 - (0 - 0.3) / 2],
            [-0.2 - (-1.6 / 3 - 0.7) / 2],
            [-0.7 - (-1.6 / 3 - 0.2) / 2, -0.3 - (-0.4 / 3 + 0) / 2, -0.15 - 0],
        ],
    )
    # weights: 1 | 1/5 4/5 | 1/9 8/9
    # 2 r - 1: 0.8 | 0.6 0.2 | 0.4 -0.2
    # r*: 0.8 | 0.6/5 0.8/5 | 0.4/9 -1.6/9
    # G: 0.8 | 1.4/5 0.8/5 | -1.2/9 -1.6/9
    close(
        min_form([[0.9], [0.8, 0.6], [0.7, 0.4]], BINARY),
        [
            [0.8 - (1.4 / 5 - 1.2 / 9) / 2],
            [1.4 / 5 - (0.8 - 1.2 / 9) / 2, 0.8 / 5 - (0 - 1.6 / 9) / 2],
            [-1.2 / 9 - (0.8 + 1.4 / 5) / 2, -1.6 / 9 - (0 + 0.8 / 5) / 2],
        ],
    )


def test_progress_by_hand():
    close(
        progress([[0.5, 0.75], [0.25], [0.75, 0.5, 1.0]]),
        [[0.5 - (0.25 + 0.75) / 2, 0.25], [0.25 - (0.5 + 0.75) / 2], [0.75 - (0.5 + 0.25) / 2, -0.25, 0.5]],
    )
    close(
        progress([[0.9], [0.1, 0.1, 0.2], [0.4, 0.0]]),
        [[0.9 - (0.1 + 0.4) / 2], [0.1 - (0.9 + 0.4) / 2, 0.0, 0.1], [0.4 - (0.9 + 0.1) / 2, -0.4]],
    )


def test_clip_delta_by_hand():
    # r': 0 -0.25 | -0.5 | 0 0 -0.25
    close(
        clip_delta([[0.75, 0.25], [0.0], [0.5, 1.0, 0.25]]),
        [
            [0 - (-0.5 + 0) / 2, -0.25 - (0 + 0) / 2],
            [-0.5 - (0 + 0) / 2],
            [0 - (0 - 0.5) / 2, 0 - (-0.25 + 0) / 2, -0.25 - 0],
        ],
    )
    # threshold 0.8. r': -0.2 | -0.1 0 | 0 -0.3
    close(
        clip_delta([[0.6], [0.7, 0.9], [0.8, 0.5]], threshold=0.8),
        [
            [-0.2 - (-0.1 + 0) / 2],
            [-0.1 - (-0.2 + 0) / 2, 0 - (0 - 0.3) / 2],
            [0 - (-0.2 - 0.1) / 2, -0.3 - (0 + 0) / 2],
        ],
    )


# ---------------------------------------------------------------- slow references


def slow_step_sum(rewards):
    flat = np.concatenate([np.array(steps) for steps in rewards])
    return [
        [
            sum((steps[m] - flat.mean()) / (flat.std(ddof=1) + 1e-4) for m in range(j, len(steps)))
            for j in range(len(steps))
        ]
        for steps in rewards
    ]


def slow_returns(rewards, temperature):
    """PURE's formula for rewards from -1 to 1, with twice the temperature, and without a stable softmax."""
    returns = []
    for steps in rewards:
        signed = [2 * reward - 1 for reward in steps]
        total = sum(math.exp(-reward / (2 * temperature)) for reward in signed)
        stars = [math.exp(-reward / (2 * temperature)) / total * reward for reward in signed]
        returns.append([sum(stars[j:]) for j in range(len(steps))])
    return returns


def slow_clipped(rewards, threshold):
    """The deltas of Gao et al., summed from each step to the end."""
    returns = []
    for steps in rewards:
        clipped = [min(reward, threshold) - threshold for reward in steps]
        deltas = [clipped[j] - clipped[j + 1] for j in range(len(steps) - 1)] + [clipped[-1]]
        returns.append([sum(deltas[j:]) for j in range(len(steps))])
    return returns


def slow_leave_one_out(returns):
    advantages = []
    for i in range(len(returns)):
        advantages.append([])
        for j in range(len(returns[i])):
            baseline = 0.0
            for k in range(len(returns)):
                if k != i and j < len(returns[k]):
                    baseline += returns[k][j] / (len(returns) - 1)
            advantages[-1].append(returns[i][j] - baseline)
    return advantages


def slow_progress(rewards):
    advantages = []
    for i, steps in enumerate(rewards):
        others = [rewards[k][0] for k in range(len(rewards)) if k != i]
        advantages.append([steps[0] - np.mean(others)] + [steps[j] - steps[j - 1] for j in range(1, len(steps))])
    return advantages


@pytest.mark.parametrize("seed", range(20))
def test_plain_loops(seed):
    """Ragged groups of different sizes. An index that is wrong by one would still give plausible numbers."""
    rewards = random_group(seed)
    close(step_sum(rewards), slow_step_sum(rewards))
    close(min_form(rewards), slow_leave_one_out(slow_returns(rewards, 0.05)))
    close(min_form(rewards, 0.3), slow_leave_one_out(slow_returns(rewards, 0.3)))
    close(progress(rewards), slow_progress(rewards))
    close(clip_delta(rewards), slow_leave_one_out(slow_clipped(rewards, 0.5)))
    close(clip_delta(rewards, 0.7), slow_leave_one_out(slow_clipped(rewards, 0.7)))


# ---------------------------------------------------------------- properties


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_order_of_completions_does_not_matter(function):
    for seed in range(10):
        rewards = random_group(seed)
        order = random.Random(seed).sample(range(len(rewards)), len(rewards))
        advantages = function(rewards)
        close(function([rewards[i] for i in order]), [advantages[i] for i in order])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_numpy_rewards(function):
    """The results are Python floats in any case, so that they can be saved as JSON."""
    rewards = random_group(3)
    found = function([np.array(steps) for steps in rewards])
    assert found == function(rewards)
    assert all(type(one) is float for steps in found for one in steps)


def test_the_shift_of_all_rewards():
    """Sums and differences do not depend on the zero of the rewards. The returns of `min_form` do after the first step."""
    rewards = random_group(5)
    shifted = [[reward + 0.3 for reward in steps] for steps in rewards]
    close(step_sum(shifted), step_sum(rewards))
    close(progress(shifted), progress(rewards))
    close(clip_delta(shifted, 0.8), clip_delta(rewards, 0.5))
    for one, other in zip(min_form([[0.2, 0.4], [0.3, 0.1]]), min_form([[0.5, 0.7], [0.6, 0.4]]), strict=True):
        assert one[0] == pytest.approx(other[0])
        assert abs(one[1] - other[1]) > 0.1


def test_step_sum_equals_grpo_for_one_step():
    """The formula of TRL's `GRPOTrainer` for `scale_rewards="group"`."""
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    close(step_sum([[reward] for reward in rewards.tolist()]), expected[:, None].tolist())


@pytest.mark.parametrize("function", [step_sum, progress])
def test_equal_rewards_have_no_advantage(function):
    """`step_sum` divides by a standard deviation of 0 and 1e-4, which would show a rounding error of the mean."""
    close(function([[0.1] * 3, [0.1], [0.1] * 7]), [[0.0] * 3, [0.0], [0.0] * 7])


def test_cold_min_form_gives_the_worst_step_everything():
    """The return up to the worst step is its reward, and 0 after it. Two worst steps share it."""
    # G: -0.6 -0.6 0 0 | 0.2 0.1 0.1 | 0.8
    close(
        min_form([[0.7, 0.2, 0.9, 0.8], [0.6, 0.8, 0.6], [0.9]], 1e-4),
        [
            [-0.6 - (0.2 + 0.8) / 2, -0.6 - 0.1 / 2, 0 - 0.1 / 2, 0.0],
            [0.2 - (-0.6 + 0.8) / 2, 0.1 - (-0.6) / 2, 0.1 - 0],
            [0.8 - (-0.6 + 0.2) / 2],
        ],
    )


@pytest.mark.parametrize("first", [0.3, 0.6])
def test_a_wrong_step_is_worse_than_a_good_one_at_its_place(first):
    """
    With rewards from 0 to 1 it would be better: the return of the wrong step would be 0.2, and of the good step 0, because the
    worst step is before it.
    """
    wrong, good = min_form([[first, 0.2], [first, 0.9]])
    assert wrong[1] < -0.5 < 0.5 < good[1]


def test_min_form_at_extreme_temperatures():
    """exp(-r / T) without a shift overflows for -1000, and is 0 for both steps of the second completion."""
    rewards = [[-1000.0, 1000.0], [900.0, 900.0]]
    for temperature in (1e-310, 1e-9):  # G: -2001 0 | 1799 899.5
        close(min_form(rewards, temperature), [[-3800.0, -899.5], [3800.0, 899.5]])
    hot = min_form(rewards, 1e9)  # the mean of the steps. G: -1 999.5 | 1799 899.5
    np.testing.assert_allclose(hot, [[-1800.0, 100.0], [1800.0, -100.0]], atol=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_differences_telescope(seed):
    """`progress` sums to the last reward minus the value of the problem, whatever is in between."""
    rewards = random_group(seed)
    for i, (steps, advantages) in enumerate(zip(rewards, progress(rewards), strict=True)):
        others = [other[0] for k, other in enumerate(rewards) if k != i]
        assert sum(advantages) == pytest.approx(steps[-1] - sum(others) / len(others))


@pytest.mark.parametrize("seed", range(5))
def test_good_steps_gain_nothing_with_clip_delta(seed):
    """However many are added and however high they score: the same advantages for all other steps, and 0 for them."""
    rewards = random_group(seed)
    longer = [
        [*steps, *[0.5 + 0.5 * random.Random(seed).random()] * 20] if i == 0 else steps
        for i, steps in enumerate(rewards)
    ]
    before, after = clip_delta(rewards), clip_delta(longer)
    assert after[1:] == before[1:]
    assert after[0][: len(rewards[0])] == before[0]
    longest = max(len(steps) for steps in rewards)
    assert after[0][longest:] == [0.0] * (len(rewards[0]) + 20 - longest)


@pytest.mark.parametrize("function", [min_form, clip_delta, progress])
def test_the_baseline_leaves_the_completion_out(function):
    """
    The baseline of the first completion depends on its position only: with other rewards, advantage minus return stays the
    same. A mean over the whole group would scale the gradient by (n - 1) / n.
    """
    own = {
        min_form: lambda steps: slow_returns([steps], 0.05)[0],
        clip_delta: lambda steps: slow_clipped([steps], 0.5)[0],
        progress: lambda steps: [steps[0]],
    }[function]
    others = random_group(1, 4)
    baselines = []
    for seed in (2, 3):
        steps = [random.Random(seed + j).random() for j in range(5)]
        advantages = function([steps, *others])[0]
        baselines.append([advantage - value for advantage, value in zip(advantages, own(steps), strict=False)])
    assert baselines[0] == pytest.approx(baselines[1], abs=1e-12)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_completion_has_nothing_to_be_compared_with(function):
    assert function([[0.3, 0.9]]) == [[0.0, 0.0]]


@pytest.mark.parametrize(("function", "returns"), [(min_form, slow_returns), (clip_delta, slow_clipped)])
def test_the_baseline_does_not_change_the_expected_gradient(function, returns):
    """
    All groups of three completions of a policy with two kinds of steps, weighted by their probability. The decision to stop
    belongs to the step before it, as the EOS token does.
    """
    setting = {min_form: 0.05, clip_delta: 0.5}[function]
    scores = [[0.3, 0.8], [0.6, 0.1]]  # by position and kind
    kinds = [np.array([0.3, 0.7]), np.array([0.6, 0.4])]
    stops = np.array([0.25, 0.75])
    completions = []  # probability, rewards, gradient of the log-probability of each step by the 6 logits
    for first, stop in itertools.product((0, 1), (0, 1)):
        choice = np.concatenate([np.eye(2)[first] - kinds[0], np.zeros(2), np.eye(2)[stop] - stops])
        weight = kinds[0][first] * stops[stop]
        if stop:
            completions.append((weight, [scores[0][first]], [choice]))
            continue
        for second in (0, 1):
            last = np.concatenate([np.zeros(2), np.eye(2)[second] - kinds[1], np.zeros(2)])
            completions.append((weight * kinds[1][second], [scores[0][first], scores[1][second]], [choice, last]))
    assert sum(weight for weight, _, _ in completions) == pytest.approx(1)

    def gradient(values, group):
        pairs = [
            (value, choice)
            for steps, one in zip(values, group, strict=True)
            for value, choice in zip(steps, one[2], strict=True)
        ]
        return sum(value * choice for value, choice in pairs) / len(group)

    expected = sum(one[0] * gradient(returns([one[1]], setting), [one]) for one in completions)
    found = sum(
        math.prod(one[0] for one in group) * gradient(function([one[1] for one in group], setting), group)
        for group in itertools.product(completions, repeat=3)
    )
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.abs(expected).max() > 0.01


# ---------------------------------------------------------------- bad input and docs


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite(function, bad):
    """They would make the advantages of the whole group NaN. The message counts from 1."""
    with pytest.raises(ValueError, match=r"step 3 of completion 2 of the group"):
        function([[0.5, 0.5], [0.5, 0.5, bad]])
    with pytest.raises(ValueError, match=r"step 1 of completion 1 of the group"):
        function([[bad]])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_completions_without_steps(function):
    with pytest.raises(ValueError, match=r"completion 2 of the group has no steps"):
        function([[0.5], []])


@pytest.mark.parametrize("temperature", [0, -0.05, math.nan, math.inf])
def test_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature"):
        min_form([[0.5], [0.2]], temperature)


def test_thresholds():
    with pytest.raises(ValueError, match="threshold"):
        clip_delta([[0.5], [0.2]], math.nan)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_examples(function):
    """The example of each docstring, without the fence of its code block."""
    assert function.__name__ in CREDITS
    text = function.__doc__.replace("```python", "").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, vars(step_credit).copy(), function.__name__, None, None)
    assert example.examples
    assert doctest.DocTestRunner(verbose=False).run(example).failed == 0
