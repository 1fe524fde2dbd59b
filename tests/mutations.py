"""Seeded mutations of JSON values and files, for tests of readers."""

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any


HUGE = 2**63
VALUES = [
    None,
    True,
    -1,
    0,
    1.5,
    HUGE,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x" * 100_000,
    [],
    {},
    [[[]]],
    {"a": {"b": 1}},
    ["a"],
]


def places(value: Any, place: tuple = ()) -> Iterator[tuple]:
    """Yield the keys and indices that lead to each value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*place, key)
        yield from places(below, (*place, key))


def pattern(place: tuple) -> tuple:
    """Return a place with all indices of lists replaced by `None`."""
    return tuple(key if isinstance(key, str) else None for key in place)


def at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def mutate(value: Any, rng: random.Random) -> tuple[str, Any]:
    """Return a copy of a JSON value in which one thing is changed, and what was changed."""
    value = copy.deepcopy(value)
    all_places = sorted(places(value), key=str)
    patterns = sorted({pattern(place) for place in all_places}, key=str)
    chosen = rng.choice(patterns)  # a long list is not chosen more often than a short one
    place = rng.choice([place for place in all_places if pattern(place) == chosen])
    above, key = at(value, place[:-1]), place[-1]
    name = ".".join(map(str, place))
    kind = rng.randrange(4)
    if kind == 0:
        del above[key]
        return f"{name} removed", value
    if kind == 1 and isinstance(above, dict):
        above[f"{key}_"] = above.pop(key)
        return f"{name} renamed", value
    if kind == 1:
        above.insert(key, copy.deepcopy(above[key]))
        return f"{name} repeated", value
    new = rng.choice([one for one in VALUES if not same(one, above[key])])
    above[key] = new
    return f"{name} = {repr(new)[:30]}", value


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def kinds_of(values: list[Any]) -> dict[tuple, set]:
    """Return the types (and whether numbers are negative) at each place of some JSON values, with indices left out."""
    found: dict[tuple, set] = {}
    for value in values:
        for place in places(value):
            kinds = found.setdefault(pattern(place), set())
            kinds.add(kind_of(at(value, place)))
            if isinstance(at(value, place), float):
                kinds |= {"whole number", "number"}
    return found


def kind_of(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return type(value).__name__
    if not math.isfinite(value) if isinstance(value, float) else abs(value) >= HUGE:
        return "not finite"
    return "negative number" if value < 0 else "whole number" if value == int(value) else "number"


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
