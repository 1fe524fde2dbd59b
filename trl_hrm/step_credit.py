"""Credit assignment for RL with process rewards: the advantage of every step of a group of completions."""

import math
from collections.abc import Sequence
from statistics import fmean


# "outcome" has no function: the aggregated score of a completion is one more reward of TRL's GRPOTrainer
CREDITS = ("outcome", "step_sum", "min_form", "progress", "clip_delta")


def step_sum(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    r"""
    Return the sums of normalised rewards ([DeepSeekMath](https://huggingface.co/papers/2402.03300), section 4.1.3).
    Each reward is normalised over all steps of the group. The advantage of a step is the sum over this step and the later
    steps:

    \\[\tilde{r}_{i,j} = \frac{r_{i,j} - \mathrm{mean}(r)}{\mathrm{std}(r) + 10^{-4}}, \quad
    A_{i,j} = \sum_{l \ge j} \tilde{r}_{i,l}\\]

    The standard deviation has n − 1 degrees of freedom, and \\(10^{-4}\\) is added to it, as in TRL's `GRPOTrainer`. If every
    completion has one step, the advantages are the same as in GRPO. Every step with a reward above the mean increases the sum,
    so a policy can increase it by adding steps.

    Args:
        rewards (`Sequence[Sequence[float]]`):
            Rewards of the steps of each completion of a group, at least one per completion.

    Returns:
        `list[list[float]]`: The advantage of each step, in the same shape. 0 for a group of one completion.

    Raises:
        `ValueError`: If a completion has no steps, or a reward is not finite.

    Example:

    ```python
    >>> advantages = step_sum([[1.0, 1.0], [0.0, 0.0]])  # mean 0.5, standard deviation 0.577
    >>> [[round(one, 2) for one in steps] for steps in advantages]
    [[1.73, 0.87], [-1.73, -0.87]]
    ```
    """
    rewards = _checked(rewards)
    if len(rewards) < 2:
        return [[0.0] * len(steps) for steps in rewards]
    flat = [reward for steps in rewards for reward in steps]
    mean = fmean(flat)
    scale = math.sqrt(math.fsum((reward - mean) ** 2 for reward in flat) / (len(flat) - 1)) + 1e-4
    return _sums_to_end([[(reward - mean) / scale for reward in steps] for steps in rewards])


def min_form(rewards: Sequence[Sequence[float]], temperature: float = 0.05) -> list[list[float]]:
    r"""
    Return the advantages of [PURE](https://huggingface.co/papers/2504.15275), where the worst step carries the reward of the
    completion. Rewards from 0 to 1 are mapped to −1 to 1, as in PURE, and weighted by a softmax over the steps of their
    completion. The return of a step is the sum over this step and the later steps, and its baseline is the mean return of the
    other completions at the same position:

    \\[r^*_{i,j} = \frac{e^{-r_{i,j}/T}}{\sum_l e^{-r_{i,l}/T}} \, (2 r_{i,j} - 1), \quad
    G_{i,j} = \sum_{l \ge j} r^*_{i,l}, \quad A_{i,j} = G_{i,j} - \frac{1}{n - 1} \sum_{k \ne i} G_{k,j}\\]

    A completion with fewer than j steps has \\(G_{k,j} = 0\\). For \\(T \to 0\\), \\(G_{i,1}\\) is the lowest reward of the
    completion, from −1 to 1. The baseline does not change the expected gradient, because it depends only on the other
    completions and on the position of the step, which is known before the step is sampled. PURE's code subtracts averages over
    tokens instead.

    The range matters. After the worst step, the return is 0. With rewards from 0 to 1, a step that becomes the worst one would
    have a return above 0, and more than a good step at its place, and every step would gain something.

    Args:
        rewards (`Sequence[Sequence[float]]`):
            Rewards of the steps of each completion of a group, at least one per completion. Probabilities that the steps are
            correct.
        temperature (`float`, *optional*, defaults to `0.05`):
            Temperature \\(T\\) of the softmax of the probabilities. 0.05 gives the same weights as PURE's 0.1 for rewards from −1
            to 1.

    Returns:
        `list[list[float]]`: The advantage of each step, in the same shape. 0 for a group of one completion.

    Raises:
        `ValueError`: If a completion has no steps, a reward is not finite, or `temperature` is not positive.

    Example:

    ```python
    >>> advantages = min_form([[0.9, 0.2, 0.9], [0.8]], temperature=1e-3)  # returns -0.6, -0.6, 0.0 and 0.6
    >>> [[round(one, 2) for one in steps] for steps in advantages]
    [[-1.2, -0.6, 0.0], [1.2]]
    ```
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"`temperature` is {temperature}. It must be a positive, finite number.")
    weighted = []
    for steps in _checked(rewards):
        lowest = min(steps)  # subtracted, so that no exponential overflows
        weights = [math.exp((lowest - reward) / temperature) for reward in steps]
        total = math.fsum(weights)
        weighted.append([weight / total * (2 * reward - 1) for weight, reward in zip(weights, steps, strict=True)])
    return _minus_others(_sums_to_end(weighted))


def progress(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    r"""
    Return the differences of neighbouring rewards, the process advantages of
    [PAV](https://huggingface.co/papers/2410.08146) (eq. 2):

    \\[A_{i,j} = r_{i,j} - r_{i,j-1}, \quad r_{i,0} = \frac{1}{n - 1} \sum_{k \ne i} r_{k,1}\\]

    A reward is the value of the solution after a step. The value of the problem, before the first step, is estimated by the
    first rewards of the other completions. Differences are not summed over later steps: PAV's effective reward of a step
    (eq. 5) is its Q-value, here the outcome reward, plus a multiple of its own advantage.

    Args:
        rewards (`Sequence[Sequence[float]]`):
            Rewards of the steps of each completion of a group, at least one per completion.

    Returns:
        `list[list[float]]`: The advantage of each step, in the same shape. 0 for a group of one completion.

    Raises:
        `ValueError`: If a completion has no steps, or a reward is not finite.

    Example:

    ```python
    >>> advantages = progress([[0.5, 0.75], [0.25, 0.25, 1.0]])
    >>> advantages
    [[0.25, 0.25], [-0.25, 0.0, 0.75]]
    ```
    """
    rewards = _checked(rewards)
    if len(rewards) < 2:
        return [[0.0] * len(steps) for steps in rewards]
    firsts = [steps[0] for steps in rewards]
    advantages = []
    for i, steps in enumerate(rewards):
        before = [fmean(firsts[:i] + firsts[i + 1 :]), *steps[:-1]]
        advantages.append([after - value for after, value in zip(steps, before, strict=True)])
    return advantages


def clip_delta(rewards: Sequence[Sequence[float]], threshold: float = 0.5) -> list[list[float]]:
    r"""
    Return advantages without a bonus for good steps, from the clip and delta mechanisms of
    [Gao et al. 2024](https://huggingface.co/papers/2410.15115):

    \\[r'_{i,j} = \min(r_{i,j}, c) - c, \quad d_{i,j} = r'_{i,j} - r'_{i,j+1}, \quad d_{i,K_i} = r'_{i,K_i}\\]

    The sum of \\(d\\) over a step and the later steps is \\(r'_{i,j}\\), so adding steps does not increase it. The baseline is
    the mean of the other completions at the same position, where a completion that has ended counts as 0:

    \\[A_{i,j} = r'_{i,j} - \frac{1}{n - 1} \sum_{k \ne i} r'_{k,j}\\]

    Rewards above the threshold \\(c\\) are equal to the threshold. If no reward of the group is below it, all advantages are 0,
    so this credit is meant to be used with an outcome reward.

    Args:
        rewards (`Sequence[Sequence[float]]`):
            Rewards of the steps of each completion of a group, at least one per completion.
        threshold (`float`, *optional*, defaults to `0.5`):
            Threshold \\(c\\) of the rewards.

    Returns:
        `list[list[float]]`: The advantage of each step, in the same shape. 0 for a group of one completion.

    Raises:
        `ValueError`: If a completion has no steps, or a reward or `threshold` is not finite.

    Example:

    ```python
    >>> clip_delta([[0.9, 0.25, 0.9], [0.6]])
    [[0.0, -0.25, 0.0], [0.0]]
    ```
    """
    if not math.isfinite(threshold):
        raise ValueError(f"`threshold` is {threshold}. It must be a finite number.")
    return _minus_others([[min(reward, threshold) - threshold for reward in steps] for steps in _checked(rewards)])


def _checked(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the rewards as lists of Python floats. Raise an error if a completion has no steps, or a reward is not finite."""
    for i, steps in enumerate(rewards):
        if not len(steps):
            raise ValueError(
                f"`rewards[{i}]` is empty: completion {i + 1} of the group has no steps. Pass at least one reward per completion, for "
                "example one reward for the whole completion."
            )
        for j, reward in enumerate(steps):
            if not math.isfinite(reward):
                raise ValueError(
                    f"`rewards[{i}][{j}]`, the reward of step {j + 1} of completion {i + 1} of the group, is {reward}. It must be "
                    "finite. Check the scores of the reward model."
                )
    return [[float(reward) for reward in steps] for steps in rewards]


def _sums_to_end(values: list[list[float]]) -> list[list[float]]:
    """Return the sum of each value and the later values of its completion."""
    return [[math.fsum(steps[j:]) for j in range(len(steps))] for steps in values]


def _minus_others(returns: list[list[float]]) -> list[list[float]]:
    """Subtract the mean return of the other completions at the same position. Completions that have ended count as 0."""
    advantages = []
    for i, steps in enumerate(returns):
        others = returns[:i] + returns[i + 1 :]
        advantages.append(
            [
                value - fmean(other[j] if j < len(other) else 0.0 for other in others) if others else 0.0
                for j, value in enumerate(steps)
            ]
        )
    return advantages
