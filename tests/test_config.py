"""Values that every config accepts or rejects."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from trl_hrm.config import Config


@dataclass(kw_only=True)
class ReadConfig(Config):
    files: list[str]
    exclude: list[str] = field(default_factory=list)
    extractors: list[str] | None = None
    sizes: list[int] = field(default_factory=list)
    order: Literal["given", "random"] = "given"
    format: Literal["json", "text"] | None = None
    first: Literal[0, 1] = 0
    kinds: list[str] = field(default_factory=lambda: ["a"], metadata={"choices": ["a", "b"]})
    share: float = 0.5
    names: dict[str, str] | None = None
    engine_args: dict[str, Any] | str | None = None


@pytest.mark.parametrize("files", ["a.jsonl", Path("a.jsonl"), ["a.jsonl"], (Path("a.jsonl"),)])
def test_a_single_string_becomes_a_list(files):
    """Otherwise a path would be read as a list of characters."""
    assert ReadConfig(files=files).files == ["a.jsonl"]


def test_optional_lists():
    config = ReadConfig(files=["a"], exclude="b.jsonl", extractors="boxed", sizes=[1, 2])
    assert (config.files, config.exclude, config.extractors, config.sizes) == (["a"], ["b.jsonl"], ["boxed"], [1, 2])
    assert ReadConfig(files=["a"]).extractors is None


@pytest.mark.parametrize("wrong", [{"order": "sorted"}, {"order": None}, {"format": "yaml"}])
def test_choices(wrong):
    with pytest.raises(ValueError, match="must be one of (given, random|json, text)"):
        ReadConfig(files=["a"], **wrong)
    assert ReadConfig(files=["a"], format="json").format == "json"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sizes": True}, "`sizes` is True.*a whole number"),
        ({"sizes": 2.0}, "`sizes` is 2.0.*a whole number"),
        ({"share": "half"}, "`share` is 'half'.*a number"),
        ({"kinds": []}, "`kinds` is \\[\\].*some of a, b"),
        ({"first": True}, "`first` is True.*one of 0, 1"),
        ({"names": 5}, "`names` is 5.*a JSON object"),
        ({"names": {"a": None}}, "`names` is None.*a string"),
        ({"engine_args": 5}, "`engine_args` is 5.*a JSON object"),
        ({"engine_args": ["a"]}, r"`engine_args` is \['a'\].*a JSON object"),
        ({"engine_args": "[1]"}, r"`engine_args` is \[1\].*a JSON object"),
    ],
)
def test_values_of_a_wrong_type(wrong, message):
    with pytest.raises(ValueError, match=message):
        ReadConfig(files=["a"], **wrong)


def test_numpy_numbers_become_python_numbers():
    """Otherwise the report could not be written as JSON."""
    config = ReadConfig(files=["a"], sizes=[np.int64(3)], share=np.float32(0.25), first=np.int64(1))
    assert [type(config.sizes[0]), type(config.share), type(config.first)] == [int, float, int]
    assert (config.sizes, config.share, config.first) == ([3], 0.25, 1)
