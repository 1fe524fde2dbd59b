"""Slots: which rows they take, and what they carry."""

import numpy as np
import pytest
import torch

from trl_hrm.reasoning.carry import RowStreams, Slots


def make_slots(indices: list[list[int]], num_slots: int, rows: int = 10, **options) -> Slots:
    puzzles = np.arange(rows * 3, dtype=np.uint8).reshape(rows, 3)
    solutions = puzzles + 100
    solutions[:, 2] = 0  # padding

    def initial_state(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((size, 2, 2), 0.5), torch.full((size, 2, 2), -0.5)

    return Slots(puzzles, solutions, np.arange(rows), indices, num_slots, initial_state, **options)


def test_rows_by_the_formula():
    """Slot j takes at refill n the row π_e[(nG + j) mod N], e = ⌊(nG + j)/N⌋. A counter that all slots share depends on who halts first."""
    streams = RowStreams(num_rows=6, num_slots=4, seed=0)
    found = [streams.row(slot, refill) for refill in range(3) for slot in range(4)]
    first, second = (np.random.default_rng([0, 0, epoch]).permutation(6).tolist() for epoch in range(2))
    assert found == first + second
    assert found == [3, 2, 5, 4, 0, 1, 1, 4, 5, 3, 2, 0]


def test_each_row_once_per_epoch():
    streams = RowStreams(num_rows=12, num_slots=4, seed=3)
    assert sorted(streams.row(slot, refill) for refill in range(3) for slot in range(4)) == list(range(12))


def test_more_slots_than_rows_and_far_epochs():
    """Slots that run ahead drop the permutations of others from the cache, which must then be computed again."""
    streams, other = RowStreams(3, 8, seed=1), RowStreams(3, 8, seed=1)
    streams._num_kept = 2
    for slot, refill in [(0, 0), (7, 500), (1, 0), (3, 90), (0, 0), (7, 500)]:
        assert streams.row(slot, refill) == other.row(slot, refill)


def test_only_halted_slots_change():
    """A slot that is reset although its puzzle has not halted would never reach the later segments."""
    slots = make_slots([[0, 1, 2]], 3)
    batch = slots.begin(0)
    first = batch.puzzle.clone()
    assert batch.steps.tolist() == [1, 1, 1] and batch.refills == [1, 1, 1]
    assert (batch.labels == torch.where(first % 3 == 2, -100, first + 100)).all()
    z = torch.arange(12.0).view(3, 2, 2)
    slots.end(0, z, -z, torch.tensor([False, True, False]))
    batch = slots.begin(0)
    assert batch.steps.tolist() == [2, 1, 2] and batch.refills == [1, 2, 1]
    assert torch.equal(batch.puzzle[[0, 2]], first[[0, 2]]) and not torch.equal(batch.puzzle[1], first[1])
    assert torch.equal(batch.z_H[[0, 2]], z[[0, 2]]) and torch.equal(batch.z_L[[0, 2]], -z[[0, 2]])
    assert (batch.z_H[1] == 0.5).all() and (batch.z_L[1] == -0.5).all()
    assert batch.puzzle_ids.tolist() == (batch.puzzle[:, 0] // 3).tolist()


def follow(indices: list[list[int]], rounds: int = 6) -> dict[int, list]:
    """Return what each slot sees. When it halts depends on its puzzle and its segments only."""
    slots = make_slots(indices, 8, transform=lambda puzzle, solution, rng: (puzzle + rng.integers(5), solution))
    seen: dict[int, list] = {slot: [] for part in indices for slot in part}
    for _ in range(rounds):
        for part in range(len(indices)):
            batch = slots.begin(part)
            for place, slot in enumerate(batch.index.tolist()):
                seen[slot].append(
                    (batch.puzzle[place].tolist(), batch.steps[place].item(), batch.z_H[place, 0, 0].item())
                )
            slots.end(
                part, batch.z_H + batch.puzzle[:, :1, None], batch.z_L, (batch.puzzle[:, 0] + batch.steps) % 3 == 0
            )
    return seen


def test_a_slot_does_not_depend_on_its_neighbours():
    """Generators or counters that slots share would make the result depend on the split into batches and processes."""
    together = follow([list(range(8))])
    assert follow([[0, 1, 2, 3], [4, 5, 6, 7]]) == together
    assert follow([[i] for i in range(8)]) == together
    assert follow([[0, 1], [4, 5]]) | follow([[2, 3], [6, 7]]) == together


def test_resume_in_another_split():
    """Saved by 2 processes with 2 parts each, and continued by 1 process with 1 part."""

    def advance(slots: Slots) -> None:
        for part in range(len(slots.parts)):
            batch = slots.begin(part)
            slots.end(
                part, batch.z_H + batch.puzzle[:, :1, None], batch.z_L, (batch.puzzle[:, 0] + batch.steps) % 3 == 0
            )

    whole = make_slots([list(range(8))], 8)
    halves = [make_slots([[0, 1], [4, 5]], 8), make_slots([[2, 3], [6, 7]], 8)]
    for _ in range(4):
        for slots in (whole, *halves):
            advance(slots)
    resumed = make_slots([list(range(8))], 8)
    resumed.load_state_dict([slots.state_dict() for slots in halves])
    for _ in range(3):
        advance(whole)
        advance(resumed)
    for name, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name
    assert torch.equal(resumed.parts[0].puzzle, whole.parts[0].puzzle)


def test_another_number_of_slots_is_refused():
    state = make_slots([[0, 1]], 2).state_dict()
    with pytest.raises(ValueError, match="2 slots, but this training has 4"):
        make_slots([[0, 1, 2, 3]], 4).load_state_dict([state])
    with pytest.raises(ValueError, match="only 2 of 4 slots"):  # the file of one of two processes is missing
        make_slots([[0, 1, 2, 3]], 4).load_state_dict([make_slots([[0, 1]], 4).state_dict()])
