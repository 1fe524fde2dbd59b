"""Budgets of a problem, and fair choices under them that do not depend on the order in which samples arrive."""

import random
from typing import TypeVar


T = TypeVar("T")


def choose(items: list[T], number: int, seed: int, node_id: str) -> list[T]:
    """`number` of the items at random, in their order. The same seed and node give the same choice."""
    if number >= len(items):
        return items
    rng = random.Random(f"{seed}/{node_id}")
    return [items[i] for i in sorted(rng.sample(range(len(items)), number))]


def share(total: int, number: int) -> list[int]:
    """`total` in `number` parts that differ by one at most."""
    return [total // number + (i < total % number) for i in range(number)]
