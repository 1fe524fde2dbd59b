"""Check JSON values against type hints: each fault with the exact place and words."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NotRequired

import pytest
from pydantic import Field
from typing_extensions import TypedDict

from trl_hrm.schema import INT64, Amount, Count, Index, Share, check_json, from_json


class Sample(TypedDict):
    ids: list[Index]
    text: str
    finish: Literal["stop", "eos"]
    cuts: NotRequired[list[tuple[Count, Count]]]


class Event(TypedDict):
    samples: list[Sample]
    weight: Annotated[float, Field(ge=1, le=INT64)]
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


SAMPLE = {"ids": [], "text": "a", "finish": "stop"}
GOOD = {
    "samples": [{"ids": [0, 2**31 - 1], "text": "", "finish": "eos", "cuts": [[0, 1]]}, SAMPLE],
    "weight": 1,
    "scores": [0, 0.5, None, 1.0],
    "anything": {"a": [None]},
}


def test_good_values():
    check_json(GOOD, Event, "here")
    check_json(GOOD | {"scores": None}, Event, "here")
    check_json([], list, "here")
    check_json({}, dict, "here")
    assert from_json(Options, {"name": "a", "parts": ["b"]}, "here") == Options("a", ("b",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"samples": {}}, "`samples` is {}. It must be a valid array."),
        ({"samples": [3]}, "`samples[0]` is 3. It must be an object."),
        ({"samples": [{}]}, "`samples[0].ids` is missing."),
        ({"samples": [SAMPLE | {"ids": [0] * 9 + [-1]}]}, "`samples[0].ids[9]` is -1. It must be greater than or equal to 0."),
        ({"samples": [SAMPLE | {"ids": [2**31]}]}, "`samples[0].ids[0]` is 2147483648. It must be less than or equal to 2147483647."),
        ({"samples": [SAMPLE | {"ids": [1, True]}]}, "`samples[0].ids[1]` is True. It must be a valid integer."),
        ({"samples": [SAMPLE | {"ids": [1.0]}]}, "`samples[0].ids[0]` is 1.0. It must be a valid integer."),
        ({"samples": [SAMPLE | {"text": None}]}, "`samples[0].text` is None. It must be a valid string."),
        ({"samples": [SAMPLE | {"finish": "end"}]}, "`samples[0].finish` is 'end'. It must be 'stop' or 'eos'."),
        ({"samples": [SAMPLE | {"finish": []}]}, "`samples[0].finish` is []. It must be 'stop' or 'eos'."),
        ({"samples": [SAMPLE | {"cuts": [[1]]}]}, "`samples[0].cuts[0][1]` is missing."),
        ({"samples": [SAMPLE | {"cuts": [[1, 10**400]]}]}, f"`samples[0].cuts[0][1]` is 1{'0' * 76}.... It must be less than or equal to {INT64}."),
        ({"weight": 0.5}, "`weight` is 0.5. It must be greater than or equal to 1."),
        ({"weight": "1"}, "`weight` is '1'. It must be a valid number."),
        ({"scores": [1.5]}, "`scores[0]` is 1.5. It must be less than or equal to 1."),
        ({"scores": 2}, "`scores` is 2. It must be a valid array."),
        ({"more": 2}, "`more` is not a known key."),
    ],
)  # fmt: skip
def test_faults(change, words):
    with pytest.raises(ValueError) as error:
        check_json(GOOD | change, Event, "log.jsonl:7", "Remove it.")
    assert str(error.value) == f"log.jsonl:7: {words} Remove it."


def test_dataclasses():
    """Lists stand for tuples. What the dataclass itself refuses is named with the file, too."""
    for values, words in (
        ({"parts": []}, "`name` is missing."),
        ({"name": "a", "other": 1}, "`other` is not a known key."),
        ({"name": "a", "parts": [1]}, "`parts[0]` is 1. It must be a valid string."),
        ({"name": "a", "limits": {"b\n": None}}, "`limits.b\\n` is None. It must be a valid integer."),
        ({"name": ""}, "`name` is empty."),
        (None, "the value is None. It must be an object."),
    ):
        with pytest.raises(ValueError) as error:
            from_json(Options, values, "file.json", "Write it again.")
        assert str(error.value) == f"file.json: {words} Write it again."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, True, None, "1", [1.0]])
def test_numbers_are_finite(value):
    for hint in (Amount, Share, Count):
        with pytest.raises(ValueError, match="^here: the value is .* It must be "):
            check_json(value, hint, "here")
    check_json(value, Any, "here")
