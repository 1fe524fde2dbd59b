"""Values that every config accepts or rejects."""

import re
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import trl_hrm
from trl_hrm.cli import COMMANDS
from trl_hrm.config import SEED, Config


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


def test_a_dataset_must_be_saved():
    from datasets import Dataset

    with pytest.raises(ValueError, match="`files` is a Dataset. It must be a string. Save .* `save_to_disk`"):
        ReadConfig(files=Dataset.from_dict({"prompt": ["a"]}))


def test_numpy_numbers_become_python_numbers():
    """Otherwise the report could not be written as JSON."""
    config = ReadConfig(files=["a"], sizes=[np.int64(3)], share=np.float32(0.25), first=np.int64(1))
    assert [type(config.sizes[0]), type(config.share), type(config.first)] == [int, float, int]
    assert (config.sizes, config.share, config.first) == ([3], 0.25, 1)


# Every number that a command accepts


def numeric_fields() -> list[tuple[str, Field]]:
    """Return the numeric options of all commands, and the name of the config that has them."""
    found = {}
    for command in COMMANDS.values():
        config = getattr(trl_hrm, command.config)
        hints = get_type_hints(config)
        for one in fields(config):
            kinds = {
                kind for part in (hints[one.name], *get_args(hints[one.name])) for kind in (part, *get_args(part))
            }
            if (
                one.init
                and kinds & {int, float}
                and not kinds & {str, bool}
                and get_origin(hints[one.name]) is not Literal
            ):
                found[config.__name__, one.name] = one
    return [(config, one) for (config, _), one in found.items()]


# What each interval accepts of these values. All other values are refused
TRIED = [-1, 0, 1, 2, 0.5, 1.0, 10**7, 2**32 - 1, 2**32, 10**30, 1e30, float("nan"), float("inf"), float("-inf")]
LIMIT = r"(a finite number|a whole number|(at least|at most|greater than|below) \d+( and (at most|below) \d+)?)"
WHOLE = {
    "[0, inf)": [0, 1, 2, 10**7],
    "[1, inf)": [1, 2, 10**7],
    "[2, inf)": [2, 10**7],
    "[1, 1000]": [1, 2],
    "[2, 1000]": [2],
    "[1, 1024]": [1, 2],
    "[1, 1000000]": [1, 2],
    "[1, 80]": [1, 2],
    "[4, 99]": [],
    "[4, 101]": [],
    "[0, 100000]": [0, 1, 2],
    "[1, 65535]": [1, 2],
    "[0, 4294967295]": [0, 1, 2, 10**7, 2**32 - 1],
}
REAL = {
    "(-inf, inf)": [-1, 0, 1, 2, 0.5, 1.0, 10**7, 2**32 - 1, 2**32, 10**30, 1e30],
    "[0, inf)": [0, 1, 2, 0.5, 1.0, 10**7, 2**32 - 1, 2**32, 10**30, 1e30],
    "(0, inf)": [1, 2, 0.5, 1.0, 10**7, 2**32 - 1, 2**32, 10**30, 1e30],
    "[1, inf)": [1, 2, 1.0, 10**7, 2**32 - 1, 2**32, 10**30, 1e30],
    "[0, 1]": [0, 1, 0.5, 1.0],
    "[0, 1)": [0, 0.5],
    "(0, 1]": [1, 0.5, 1.0],
    "(0, 86400]": [1, 2, 0.5, 1.0],
}


@pytest.mark.parametrize(
    ("config", "option"), [pytest.param(*one, id=f"{one[0]}.{one[1].name}") for one in numeric_fields()]
)
def test_a_number_is_refused_when_the_config_is_made(config, option):
    """`--seed -1` failed after all sampling, and NaN as a threshold found every step right."""
    config = getattr(trl_hrm, config)
    declared = get_type_hints(config)[option.name]
    is_real = "float" in str(declared)
    accepted = (REAL if is_real else WHOLE)[option.metadata["range"]]
    names = {one.name for one in fields(config) if one.init}
    needed = {
        one.name for one in fields(config) if one.init and one.default is MISSING and one.default_factory is MISSING
    }
    settings = dict.fromkeys(needed | {"problems", "policy"}, "given") | {
        "engine": "transformers",
        "suite": "prmbench",
        "family": "sudoku",
        "view": "hrm",  # with which `max_merge` has an effect
    }
    for value in TRIED:
        given = [1, value] if option.name == "spans" else [value] if get_origin(declared) is list else value
        message = ""
        try:
            config(**{name: value for name, value in settings.items() if name in names} | {option.name: given})
        except ValueError as error:
            message = str(error)
        is_refused = re.fullmatch(rf"`{option.name}` is [^`]+\. It must be {LIMIT}\.", message)
        is_accepted = value in accepted and (is_real or isinstance(value, int))
        assert is_accepted != bool(is_refused), (value, message)


def test_numbers_name_their_limits():
    @dataclass(kw_only=True)
    class Limits(Config):
        size: float = field(default=0.5, metadata={"range": "[0, 1)"})
        counts: list[int] = field(default_factory=list, metadata={"range": "[1, inf)"})
        seed: int = field(default=0, metadata={"range": SEED})

    for given, message in (
        ({"size": 1}, "`size` is 1.0. It must be at least 0 and below 1."),
        ({"size": float("nan")}, "`size` is nan. It must be a finite number."),
        ({"counts": [3, 0]}, "`counts` is 0. It must be at least 1."),
        ({"counts": 10**100}, "`counts` is 1000"),
        ({"seed": -1}, "`seed` is -1. It must be at least 0 and at most 4294967295."),
    ):
        with pytest.raises(ValueError) as error:
            Limits(**given)
        assert str(error.value).startswith(message) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"files": []}, "`files` is empty. It must have at least one value."),
        ({"files": [""]}, "`files` is empty. Set it, or remove it."),
        ({"files": "a\0b"}, r"`files` is 'a\\x00b'. It must be valid Unicode without null characters."),
        ({"files": "a\udcff"}, r"`files` is 'a\\udcff'. It must be valid Unicode"),
        ({"extractors": ""}, "`extractors` is empty"),
        ({"names": {"a": ""}}, "`names` is empty"),
        ({"engine_args": '{"a": NaN}'}, "`engine_args` is .*not valid JSON .*NaN"),
        ({"engine_args": '{"a": 1, "a": 2}'}, "'a' occurs twice"),
        ({"engine_args": "[" * 100_000}, "`engine_args` is '\\[{76}....*nested too deeply"),
    ],
)
def test_empty_and_invalid_strings(given, message):
    with pytest.raises(ValueError, match=message):
        ReadConfig(**{"files": ["a"]} | given)


@pytest.mark.parametrize(
    ("config", "revision", "model", "others"),
    [
        (trl_hrm.AnnotateConfig, "policy_revision", "policy", {"problems": "a", "output_dir": "b"}),
        (
            trl_hrm.AnnotateConfig,
            "policy_revision",
            "policy_tokenizer",
            {"problems": "a", "output_dir": "b", "policy": "me/model", "policy_urls": "http://a/v1"},
        ),
        (trl_hrm.BestOfNConfig, "reward_model_revision", "reward_model", {"candidates": "a"}),
    ],
)
def test_local_folders_have_no_revisions(tmp_path, config, revision, model, others):
    """transformers ignores the revision of a local folder."""
    config(**others, **{revision: "v1", model: "me/other"})
    config(**others, **{model: str(tmp_path)})
    with pytest.raises(
        ValueError, match=f"`{revision}` is 'v1', but `{model}` is the local folder .* Remove `{revision}`"
    ):
        config(**others, **{revision: "v1", model: str(tmp_path)})
