"""Halting, its target, and the draws of exploration."""

import pytest
import torch

from trl_hrm.reasoning.halting import continue_target, exploration_minimum, halt, keyed_uniform


STEPS = torch.tensor([1, 2, 3])
Q_HALT, Q_CONTINUE = torch.tensor([0.2, -0.4, -0.1]), torch.tensor([-0.1, 0.3, 0.5])


def test_halt_by_hand():
    """M = 3: the first board wants to halt, the second does not, the third is in its last segment."""
    assert halt(STEPS, Q_HALT, Q_CONTINUE, 3).tolist() == [True, False, True]
    # Exploration holds back a board that wants to halt, but not in its last segment.
    assert halt(STEPS, Q_HALT, Q_CONTINUE, 3, torch.tensor([2, 0, 2])).tolist() == [False, False, True]
    assert halt(STEPS, Q_HALT, Q_CONTINUE, 3, torch.tensor([0, 0, 3])).tolist() == [True, False, True]


def test_halt_without_continue_head():
    """Without continue head the threshold is 0, not the untrained second logit."""
    q_halt = torch.tensor([0.2, 0.1, -0.1])
    assert halt(torch.tensor([1, 1, 1]), q_halt, torch.tensor([9.0, 9.0, -9.0]), 3).tolist() == [False, False, True]
    assert halt(torch.tensor([1, 1, 1]), q_halt, None, 3).tolist() == [True, True, False]
    assert halt(torch.tensor([1, 1, 3]), -q_halt.abs(), None, 3).tolist() == [False, False, True]


def test_halt_max_steps():
    with pytest.raises(ValueError, match="at least 1"):
        halt(STEPS, Q_HALT, None, 0)


def test_continue_target_by_hand():
    """σ(1 or -1) differs from σ(2): the last board only sees the value of halting."""
    q_halt = torch.tensor([1.0, -1.0, 0.0], requires_grad=True)
    target = continue_target(STEPS, q_halt, torch.tensor([-1.0, 2.0, 3.0]), 3)
    torch.testing.assert_close(target, torch.tensor([0.731059, 0.880797, 0.5]), rtol=0, atol=1e-6)
    assert not target.requires_grad


def test_draws_do_not_depend_on_the_split():
    """The draw of a slot is a function of (seed, slot, step): the same in one batch of 8 and in two of 4."""
    whole = exploration_minimum(3, torch.arange(8), 17, 0.5, 6)
    parts = [exploration_minimum(3, part, 17, 0.5, 6) for part in torch.arange(8).split(4)]
    assert torch.equal(whole, torch.cat(parts))
    per_slot = exploration_minimum(3, torch.arange(8), torch.full((8,), 17), 0.5, 6)
    assert torch.equal(whole, per_slot)


def test_draws_have_the_right_distribution():
    """Probability 0.1, uniform over {2, ..., M}, with different numbers for each slot, step, seed and stream."""
    slots, draws = torch.arange(200).repeat_interleave(1000), torch.arange(1000).repeat(200)
    minimum = exploration_minimum(0, slots, draws, 0.1, 5)
    counts = torch.bincount(minimum, minlength=6) / len(minimum)
    assert minimum.max() == 5 and counts[1] == 0
    assert counts[0].item() == pytest.approx(0.9, abs=0.004)
    assert counts[2:].tolist() == pytest.approx([0.025] * 4, abs=0.002)
    uniform = keyed_uniform(0, slots, draws).double()
    assert 0 <= uniform.min() and uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.003)
    table = uniform.view(200, 1000)
    for first, second in [
        (table[1:], table[:-1]),
        (table[:, 1:], table[:, :-1]),
        (uniform, keyed_uniform(1, slots, draws).double()),
        (uniform, keyed_uniform(0, slots, draws, stream=1).double()),
    ]:
        assert abs(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1].item()) < 0.01


def test_draws_are_stable():
    """Known numbers: resumed runs depend on the mixing function."""

    def reference(*keys: int) -> float:
        step, mask = 0x9E3779B97F4A7C15, 2**64 - 1

        def mix(x):
            x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
            x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
            return x ^ x >> 31

        seed, stream, slot, draw = keys
        key = mix(seed + step & mask)
        for value in (stream, slot, draw):
            key = mix(key + value * step & mask)
        return (key >> 40) / 2**24

    for keys in [(0, 0, 0, 0), (7, 1, 3, 12345), (2**62 + 5, 2, 10**6, 10**9)]:
        seed, stream, slot, draw = keys
        assert keyed_uniform(seed, torch.tensor([slot]), draw, stream).item() == reference(*keys)


def test_one_segment_has_nothing_to_explore():
    """{2, ..., 1} is empty."""
    assert exploration_minimum(0, torch.arange(4), 0, 1.0, 1).tolist() == [0] * 4
    assert set(exploration_minimum(0, torch.arange(50), 0, 1.0, 2).tolist()) == {2}
    with pytest.raises(ValueError, match="between 0 and 1"):
        exploration_minimum(0, torch.arange(4), 0, 1.5, 4)
