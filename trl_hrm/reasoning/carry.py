"""Slots that carry the state of unfinished puzzles from one optimizer step to the next (HRM, arXiv 2506.21734, deep supervision)."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch


IGNORED = -100  # label of padding cells
# Distinguish the random numbers of one seed
_ORDER, _ROW = 0, 1

# Changes a puzzle and its solution before they are trained on, with a generator that depends on the seed, the slot and the refill
Transform = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


class RowStreams:
    r"""
    The rows that each slot trains on. At its n-th refill, slot j of G takes the row \\(\pi_e[(nG + j) \bmod N]\\) with
    \\(e = \lfloor (nG + j) / N \rfloor\\), where \\(\pi_e\\) is a permutation of the N rows that depends on the seed and e.

    No row is thrown away: if all slots are refilled equally often, each row is used once before any is used again. One integer per
    slot is enough to resume, and the rows of a slot do not depend on how the slots are distributed over batches and processes.

    Args:
        num_rows (`int`):
            Number of rows N.
        num_slots (`int`):
            Number of slots G: batch size × gradient accumulation steps × processes.
        seed (`int`):
            Seed.
    """

    def __init__(self, num_rows: int, num_slots: int, seed: int):
        self.num_rows, self.num_slots, self.seed = num_rows, num_slots, seed
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()
        # Slots that halt early run ahead, so the permutations of several epochs are in use at the same time
        self._num_kept = max(8, 2**23 // num_rows)

    def row(self, slot: int, refill: int) -> int:
        """Return the row that a slot takes at a refill, both counted from 0."""
        epoch, place = divmod(refill * self.num_slots + slot, self.num_rows)
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(self.num_rows)
            self._orders[epoch] = order
            if len(self._orders) > self._num_kept:
                self._orders.popitem(last=False)
        else:
            self._orders.move_to_end(epoch)
        return int(order[place])


@dataclass
class SlotBatch:
    """
    The slots of one forward pass.

    Args:
        index (`torch.Tensor`):
            Global number of each slot, `int64`, shape `(B,)`.
        puzzle (`torch.Tensor`):
            Puzzles, `int64`, shape `(B, L)`.
        labels (`torch.Tensor`):
            Solutions, `int64`, shape `(B, L)`. -100 for padding cells.
        puzzle_ids (`torch.Tensor`):
            Index of each puzzle id, `int64`, shape `(B,)`.
        z_H, z_L (`torch.Tensor`):
            States before the segment, shape `(B, T, d)`.
        steps (`torch.Tensor`):
            Number of segments that each puzzle has had, `int64`, shape `(B,)`. `Slots.begin` counts the segment that begins.
        halted (`torch.Tensor`):
            Whether the puzzle of each slot is done, so that the next segment begins with a new one. Boolean, shape `(B,)`.
        refills (`list[int]`):
            Number of puzzles that each slot has taken.
    """

    index: torch.Tensor
    puzzle: torch.Tensor
    labels: torch.Tensor
    puzzle_ids: torch.Tensor
    z_H: torch.Tensor
    z_L: torch.Tensor
    steps: torch.Tensor
    halted: torch.Tensor
    refills: list[int]


class Slots:
    """
    The slots of one process. Each slot has a puzzle, the state of the model after the segments so far, and their number. A slot whose
    puzzle has halted takes a new one with the initial state.

    The slots are divided into parts, one for each forward pass of an optimizer step (gradient accumulation), which never mix.

    Args:
        puzzles (`np.ndarray`):
            Puzzles, `uint8`, shape `(N, L)`.
        solutions (`np.ndarray`):
            Solutions, `uint8`, shape `(N, L)`. 0 for padding cells.
        puzzle_ids (`np.ndarray`):
            Index of the puzzle id of each row, shape `(N,)`.
        indices (`Sequence[Sequence[int]]`):
            Global numbers of the slots of each part.
        num_slots (`int`):
            Number of slots of all processes.
        initial_state (`Callable`):
            Function that returns the initial `z_H` and `z_L` of a number of puzzles.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order of the rows, and of `transform`.
        transform (`Callable`, *optional*):
            Function that is called with a puzzle, its solution and a generator, and returns the puzzle and the solution to train on.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device of the tensors.
    """

    def __init__(
        self,
        puzzles: np.ndarray,
        solutions: np.ndarray,
        puzzle_ids: np.ndarray,
        indices: Sequence[Sequence[int]],
        num_slots: int,
        initial_state: Callable[[int], tuple[torch.Tensor, torch.Tensor]],
        seed: int = 0,
        transform: Transform | None = None,
        device: torch.device | str = "cpu",
    ):
        self._puzzles, self._solutions, self._puzzle_ids = puzzles, solutions, puzzle_ids
        self._initial_state, self._transform = initial_state, transform
        self._seed, self._device = seed, torch.device(device)
        self.streams = RowStreams(len(puzzles), num_slots, seed)
        self.parts: list[SlotBatch] = []
        for numbers in indices:
            size, length = len(numbers), puzzles.shape[1]
            z_H, z_L = initial_state(size)
            self.parts.append(
                SlotBatch(
                    index=torch.tensor(list(numbers), dtype=torch.long, device=device),
                    puzzle=torch.zeros(size, length, dtype=torch.long, device=device),
                    labels=torch.full((size, length), IGNORED, dtype=torch.long, device=device),
                    puzzle_ids=torch.zeros(size, dtype=torch.long, device=device),
                    z_H=z_H.detach(),
                    z_L=z_L.detach(),
                    steps=torch.zeros(size, dtype=torch.long, device=device),
                    halted=torch.ones(size, dtype=torch.bool, device=device),
                    refills=[0] * size,
                )
            )

    def begin(self, part: int) -> SlotBatch:
        """Give new puzzles to the halted slots of a part, count the segment that begins, and return the part."""
        batch = self.parts[part]
        halted = batch.halted
        places = halted.nonzero().flatten().tolist()
        if places:
            for place in places:
                batch.refills[place] += 1
            self._fill(batch, places)
            z_H, z_L = self._initial_state(len(halted))
            batch.z_H = torch.where(halted[:, None, None], z_H.to(batch.z_H.dtype), batch.z_H)
            batch.z_L = torch.where(halted[:, None, None], z_L.to(batch.z_L.dtype), batch.z_L)
            batch.steps = torch.where(halted, 0, batch.steps)
            batch.halted = torch.zeros_like(halted)
        batch.steps = batch.steps + 1
        return batch

    def end(self, part: int, z_H: torch.Tensor, z_L: torch.Tensor, halted: torch.Tensor) -> None:
        """Store the states after a segment, and which slots have halted."""
        batch = self.parts[part]
        batch.z_H, batch.z_L, batch.halted = z_H.detach(), z_L.detach(), halted

    def _fill(self, batch: SlotBatch, places: Sequence[int]) -> None:
        """Write the puzzles that slots took at their last refill to a part."""
        index = batch.index.tolist()
        pairs, rows = [], []
        for place in places:
            slot, refill = index[place], batch.refills[place] - 1
            row = self.streams.row(slot, refill)
            pair = self._puzzles[row], self._solutions[row]
            if self._transform is not None:
                pair = self._transform(*pair, np.random.default_rng([self._seed, _ROW, slot, refill]))
            pairs.append(pair)
            rows.append(row)
        puzzles, solutions = (
            torch.from_numpy(np.stack(arrays).astype(np.int64)) for arrays in zip(*pairs, strict=True)
        )
        where = torch.tensor(places, device=self._device)
        batch.puzzle[where] = puzzles.to(self._device)
        batch.labels[where] = solutions.masked_fill(solutions == 0, IGNORED).to(self._device)
        batch.puzzle_ids[where] = torch.from_numpy(self._puzzle_ids[rows].astype(np.int64)).to(self._device)

    # Checkpoints

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of the slots of this process. The puzzles follow from the number of refills."""

        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(batch, name) for batch in self.parts]).cpu().contiguous()

        state = {name: joined(name) for name in ("index", "steps", "halted", "z_H", "z_L")}
        refills = [number for batch in self.parts for number in batch.refills]
        return state | {"refills": torch.tensor(refills), "num_slots": torch.tensor([self.streams.num_slots])}

    def load_state_dict(self, states: Sequence[dict[str, torch.Tensor]]) -> None:
        """
        Continue with saved slots. They may have been distributed in another way over batches, accumulation and processes, because
        they are found by their global number.

        Args:
            states (`Sequence[dict[str, torch.Tensor]]`):
                What `state_dict` returned, of all processes.

        Raises:
            `ValueError`: If the number of slots has changed, or the states of some are missing.
        """
        saved = {name: torch.cat([state[name] for state in states]) for name in states[0]}
        num_slots, found = saved["num_slots"][0].item(), saved["index"].sort()
        if num_slots != self.streams.num_slots:
            raise ValueError(
                f"The checkpoint has the states of {num_slots} slots, but this training has {self.streams.num_slots} "
                "(`per_device_train_batch_size` × `gradient_accumulation_steps` × processes). Keep this product. How it is split may change."
            )
        if not torch.equal(found.values, torch.arange(num_slots)):
            raise ValueError(
                f"The checkpoint has the states of only {len(found.values.unique())} of {num_slots} slots. Each process saves its own, so "
                "copy the files of all processes into the folder of the checkpoint."
            )
        for batch in self.parts:
            places = found.indices[batch.index.cpu()]
            batch.refills = saved["refills"][places].tolist()
            for name in ("steps", "halted", "z_H", "z_L"):
                setattr(batch, name, saved[name][places].to(self._device))
            filled = [place for place, number in enumerate(batch.refills) if number]
            if filled:
                self._fill(batch, filled)
