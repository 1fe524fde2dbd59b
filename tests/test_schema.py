"""Check JSON values against type hints: each fault with the exact place and words."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from trl_hrm.schema import INT64, Amount, Count, Index, Range, Share, check_json, from_json


class Sample(TypedDict):
    ids: list[Index]
    text: str
    finish: Literal["stop", "eos"]
    cuts: NotRequired[list[tuple[Count, Count]]]


class Event(TypedDict):
    samples: list[Sample]
    weight: Annotated[float, Range(1, INT64)]
    scores: NotRequired[list[Share | None] | None]
    anything: NotRequired[Any]


@dataclass
class Options:
    name: str
    parts: tuple[str, ...] = ()
    limits: dict[str, int] = field(default_factory=dict)

    def __post_init__(self):
        if not self.name:
            raise ValueError("`name` is empty.")


GOOD = {
    "samples": [
        {"ids": [0, 2**31 - 1], "text": "", "finish": "eos", "cuts": [[0, 1]]},
        {"ids": [], "text": "a", "finish": "stop"},
    ],
    "weight": 1,
    "scores": [0, 0.5, None, 1.0],
    "anything": {"a": [None]},
}


def test_good_values():
    check_json(GOOD, Event, "here")
    check_json(GOOD | {"scores": None}, Event, "here")
    check_json([], list, "here")
    check_json({}, dict, "here")
    assert from_json(Options, {"name": "a", "parts": ["b"]}, "here") == Options("a", ["b"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": {}}, "`samples` is {}, expected a list."),
        ({"samples": [3]}, "`samples[0]` is 3, expected an object."),
        ({"samples": [{}]}, "`samples[0]` has no `ids`, `text`, `finish`."),
        ({"samples": [GOOD["samples"][1] | {"ids": [0] * 9 + [-1]}]}, "`samples[0].ids[9]` is -1, expected a whole number from 0 to 2147483647."),
        ({"samples": [GOOD["samples"][1] | {"ids": [2**31]}]}, "`samples[0].ids[0]` is 2147483648, expected a whole number from 0 to 2147483647."),
        ({"samples": [GOOD["samples"][1] | {"ids": [1, True]}]}, "`samples[0].ids[1]` is True, expected a whole number from 0 to 2147483647."),
        ({"samples": [GOOD["samples"][1] | {"ids": [1.0]}]}, "`samples[0].ids[0]` is 1.0, expected a whole number from 0 to 2147483647."),
        ({"samples": [GOOD["samples"][1] | {"text": None}]}, "`samples[0].text` is None, expected a string."),
        ({"samples": [GOOD["samples"][1] | {"finish": "end"}]}, "`samples[0].finish` is 'end', expected one of 'stop', 'eos'."),
        ({"samples": [GOOD["samples"][1] | {"finish": []}]}, "`samples[0].finish` is [], expected one of 'stop', 'eos'."),
        ({"samples": [GOOD["samples"][1] | {"cuts": [[1]]}]}, "`samples[0].cuts[0]` is [1], expected a list of 2 values."),
        ({"samples": [GOOD["samples"][1] | {"cuts": [[1, 10**400]]}]}, f"`samples[0].cuts[0][1]` is 1{'0' * 76}..., expected a whole number of at least 0."),
        ({"weight": 0.5}, "`weight` is 0.5, expected a number of at least 1."),
        ({"weight": float("nan")}, "`weight` is nan, expected a number of at least 1."),
        ({"weight": "1"}, "`weight` is '1', expected a number of at least 1."),
        ({"scores": [0.5, float("nan")]}, "`scores[1]` is nan, expected a number from 0 to 1 or null."),
        ({"scores": [1.5]}, "`scores[0]` is 1.5, expected a number from 0 to 1 or null."),
        ({"scores": 2}, "`scores` is 2, expected a list or null."),
        ({"more": 2}, "has the unknown key 'more'. Known keys are samples, weight, scores, anything."),
    ],
)  # fmt: skip
def test_faults(change, words):
    with pytest.raises(ValueError) as error:
        check_json(GOOD | change, Event, "log.jsonl:7", "Remove it.")
    assert str(error.value) == f"log.jsonl:7{': ' if words.startswith('`') else ' '}{words} Remove it."


def test_dataclasses():
    """Lists stand for tuples. What the dataclass itself refuses is named with the file, too."""
    for values, words in (
        ({"parts": []}, "has no `name`."),
        ({"name": "a", "other": 1}, "has the unknown key 'other'. Known keys are name, parts, limits."),
        ({"name": "a", "parts": [1]}, "`parts[0]` is 1, expected a string."),
        ({"name": "a", "limits": {"b\n": None}}, "`limits.b\\n` is None, expected a whole number."),
        ({"name": ""}, "`name` is empty."),
        (None, "is None, expected an object."),
    ):
        with pytest.raises(ValueError) as error:
            from_json(Options, values, "file.json", "Write it again.")
        assert str(error.value) == f"file.json{': ' if words.startswith('`') else ' '}{words} Write it again."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, True, None, "1", [1.0]])
def test_numbers_are_finite(value):
    for hint in (float, Amount, Share, int, Count):
        with pytest.raises(ValueError, match="^here is .*expected a "):
            check_json(value, hint, "here")
    check_json(value, Any, "here")
