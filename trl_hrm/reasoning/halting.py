"""Adaptive computation time of the Hierarchical Reasoning Model: when a board halts, and the target of the Q head."""

import torch


def halt(
    steps: torch.Tensor,
    q_halt_logits: torch.Tensor,
    q_continue_logits: torch.Tensor | None,
    max_steps: int,
    minimum: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Return which boards halt after a segment in training (HRM, arXiv 2506.21734).

    A board halts in its last segment, or if the halting logit is greater than the logit for continuing. Without continue head, it
    halts if the halting logit is positive (TRM, arXiv 2510.04871). In both cases the board must have reached its minimum
    number of segments.

    Args:
        steps (`torch.Tensor`):
            Segments of each board so far, including this one, of shape (B,).
        q_halt_logits (`torch.Tensor`):
            Logits of halting, of shape (B,).
        q_continue_logits (`torch.Tensor`, *optional*):
            Logits of continuing, of shape (B,), or `None` without continue head.
        max_steps (`int`):
            Maximum number of segments M.
        minimum (`torch.Tensor`, *optional*):
            Minimum number of segments of each board, of shape (B,), as returned by `exploration_minimum`.

    Returns:
        `torch.Tensor`: Booleans of shape (B,).

    Raises:
        `ValueError`: If `max_steps` is less than 1.
    """
    if max_steps < 1:
        raise ValueError(f"`max_steps` is {max_steps}. It must be at least 1.")
    wants_to_halt = q_halt_logits > (0 if q_continue_logits is None else q_continue_logits)
    halted = wants_to_halt | (steps >= max_steps)
    return halted if minimum is None else halted & (steps >= minimum)


def continue_target(
    steps: torch.Tensor, next_q_halt_logits: torch.Tensor, next_q_continue_logits: torch.Tensor, max_steps: int
) -> torch.Tensor:
    """
    Return the target of the logit for continuing (HRM, arXiv 2506.21734): the value of the next segment, σ(q'_halt) for boards in
    their last segment and σ(max(q'_halt, q'_continue)) for the others.

    Args:
        steps (`torch.Tensor`):
            Segments of each board so far, including this one, of shape (B,).
        next_q_halt_logits (`torch.Tensor`):
            Logits of halting after one more segment with the same weights, of shape (B,).
        next_q_continue_logits (`torch.Tensor`):
            Logits of continuing after one more segment, of shape (B,).
        max_steps (`int`):
            Maximum number of segments M.

    Returns:
        `torch.Tensor`: Targets between 0 and 1, of shape (B,), without gradient.
    """
    best = torch.maximum(next_q_halt_logits, next_q_continue_logits)
    return torch.where(steps >= max_steps, next_q_halt_logits, best).detach().sigmoid()


def exploration_minimum(
    seed: int, slots: torch.Tensor, draws: torch.Tensor, probability: float, max_steps: int
) -> torch.Tensor:
    """
    Return the minimum number of segments of each board: with the given probability a number drawn uniformly from {2, ..., M},
    otherwise 0 (HRM, arXiv 2506.21734).

    The numbers are a function of the arguments, without a random generator. So they do not depend on how a batch is divided into
    processes and accumulation steps, and a resumed run draws the same ones.

    Args:
        seed (`int`):
            Seed of the run.
        slots (`torch.Tensor`):
            Index of each slot in the global batch, of shape (B,).
        draws (`torch.Tensor` or `int`):
            Number of the draw, for example the optimizer step: an integer, or one per slot.
        probability (`float`):
            Probability of exploration.
        max_steps (`int`):
            Maximum number of segments M. Without a choice (M = 1), the minimum is 0.

    Returns:
        `torch.Tensor`: Minima of shape (B,), int64.

    Raises:
        `ValueError`: If `probability` is not between 0 and 1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"The probability of exploration is {probability}. It must be between 0 and 1.")
    if max_steps < 2:
        return torch.zeros_like(slots, dtype=torch.int64)
    explores = keyed_uniform(seed, slots, draws, stream=0) < probability
    minimum = 2 + (keyed_uniform(seed, slots, draws, stream=1) * (max_steps - 1)).long()
    return torch.where(explores, minimum, 0)


def keyed_uniform(seed: int, slots: torch.Tensor, draws: torch.Tensor | int, stream: int = 0) -> torch.Tensor:
    """
    Return one number in [0, 1) per slot, computed from (seed, stream, slot, draw) with the mixing function of SplitMix64.

    Args:
        seed (`int`):
            Seed.
        slots (`torch.Tensor`):
            Integers of any shape.
        draws (`torch.Tensor` or `int`):
            Integers that broadcast with `slots`.
        stream (`int`, *optional*, defaults to `0`):
            Independent stream of numbers.

    Returns:
        `torch.Tensor`: Float32 numbers of the broadcast shape.
    """

    def mix(values: torch.Tensor) -> torch.Tensor:
        # int64 products wrap around. A right shift of int64 keeps the sign, so the mask makes it logical.
        values = (values ^ (values >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
        values = (values ^ (values >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
        return values ^ (values >> 31 & 0x1FFFFFFFF)

    step = -0x61C8864680B583EB
    key = mix(torch.tensor(seed % 2**63, dtype=torch.int64, device=slots.device) + step)
    key = mix(key + torch.tensor(stream, dtype=torch.int64, device=slots.device) * step)
    key = mix(key + slots.long() * step)
    key = mix(key + torch.as_tensor(draws, dtype=torch.int64, device=slots.device) * step)
    # 24 bits, because more do not fit in a float32 below 1.
    return (key >> 40 & 0xFFFFFF).float() / 2**24
