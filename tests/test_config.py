"""What all configs accept and refuse."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

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


@pytest.mark.parametrize("files", ["a.jsonl", Path("a.jsonl"), ["a.jsonl"], (Path("a.jsonl"),)])
def test_a_single_string_is_a_list_of_one(files):
    """Otherwise a path would be read as a list of its letters."""
    assert ReadConfig(files=files).files == ["a.jsonl"]


def test_optional_lists():
    config = ReadConfig(files=[], exclude="b.jsonl", extractors="boxed", sizes=[1, 2])
    assert (config.files, config.exclude, config.extractors, config.sizes) == ([], ["b.jsonl"], ["boxed"], [1, 2])
    assert ReadConfig(files=[]).extractors is None


@pytest.mark.parametrize("wrong", [{"order": "sorted"}, {"order": None}, {"format": "yaml"}])
def test_choices(wrong):
    with pytest.raises(ValueError, match="expected one of (given, random|json, text)"):
        ReadConfig(files=[], **wrong)
    assert ReadConfig(files=[], format="json").format == "json"
