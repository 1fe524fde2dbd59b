"""Base class of the configs. The fields of a config are also the options of its command."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .io import parse_json, shown


COUNT = "[1, inf)"  # of things, such as tokens
PROCESSES = "[1, 1024]"
SEED = "[0, 4294967295]"  # what NumPy and torch accept
MAX_INT = 2**31 - 1
Dtype = Literal["auto", "bfloat16", "float16", "float32", "half", "float"]  # of weights, for transformers and vLLM


@dataclass(kw_only=True)
class Config:
    """
    Base class of the configs. It validates the fields and converts common values from Python and YAML:

    - a single value for a list field becomes a list with one element;
    - a path, number or date for a `str` field becomes a string (YAML parses `revision: 2024` and `2024-07-26` as
      number and date);
    - a JSON string for a `dict[str, Any] | str` field becomes a dictionary.

    These keys in the metadata of a field restrict its values, so that an error comes before any work:

    - `range`: the numbers that are allowed, such as `"[0, 1)"` for at least 0 and below 1. Each number of a list must be in the range;
    - `choices`: the values that are allowed in a list;
    - `words`: strings that are allowed in a list of numbers;
    - `may_be_empty`: strings may be empty.

    Numbers must be finite, and whole numbers must be below 2,147,483,648. Strings must be valid Unicode without null characters.
    A list may only be empty if the field is optional.

    Subclasses with further checks must call `super().__post_init__()` first.

    Raises:
        `ValueError`: If a field has a value of the wrong type, or a value that is not one of its choices (`Literal`) or out of its
            range.

    Example:

    ```python
    >>> @dataclass(kw_only=True)
    ... class ReadConfig(Config):
    ...     files: list[str]
    ...     order: Literal["given", "random"] = "given"
    >>> ReadConfig(files="a.jsonl")
    ReadConfig(files=['a.jsonl'], order='given')
    >>> ReadConfig(files="a.jsonl", order="sorted")
    Traceback (most recent call last):
    ValueError: `order` is 'sorted'. It must be one of given, random.
    ```
    """

    def __post_init__(self):
        types = get_type_hints(type(self))
        for one in fields(self):
            value = _checked(one.name, getattr(self, one.name), types[one.name], one.metadata)
            if isinstance(value, list):
                choices = one.metadata.get("choices")
                is_optional = one.default is None or one.default_factory is list
                if choices and not (value or is_optional) or not set(value) <= set(choices or value):
                    raise ValueError(
                        f"`{one.name}` is {shown(value)}. It must be some of {', '.join(map(str, choices))}."
                    )
                if not (value or is_optional):
                    raise ValueError(f"`{one.name}` is empty. It must have at least one value.")
            setattr(self, one.name, value)

    def refuse_revision_of_folder(self, revision: str, model: str) -> None:
        """
        Check that a model with a revision is on the Hub. Local folders have no revisions, and transformers ignores it.

        Args:
            revision (`str`), model (`str`):
                Names of the two fields. The second one can be a list of models.

        Raises:
            `ValueError`: If both are set, and a model is a folder.
        """
        value, models = getattr(self, revision), getattr(self, model)
        for path in models if isinstance(models, list) else [models]:
            if value is not None and path is not None and os.path.isdir(path):
                raise ValueError(
                    f"`{revision}` is {shown(value)}, but `{model}` is the local folder {path}, which has no revisions. Remove `{revision}`."
                )

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not `None`, as in a YAML file."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(kw_only=True)
class OutputConfig(Config):
    """
    Base class of the configs of commands that write a dataset.

    Args:
        output_dir (`str`):
            Output folder, with one Parquet file per split, a dataset card and `build_report.json`.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace `output_dir` if it is an earlier build.
    """

    output_dir: str = field(
        metadata={"help": "Output folder, with one Parquet file per split, a dataset card and build_report.json."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace --output_dir if it is an earlier build."})


def _checked(name: str, value: Any, declared: Any, metadata: Mapping[str, Any]) -> Any:
    """Check a value and convert it to the declared type of its field."""
    kinds = get_args(declared) if get_origin(declared) in (Union, UnionType) else (declared,)
    if value is None and type(None) in kinds:
        return None
    kind = next(kind for kind in kinds if kind is not type(None))
    origin = get_origin(kind) or kind
    if origin is Literal:
        choices = get_args(kind)
        if isinstance(value, bool) or value not in choices:  # True == 1
            raise ValueError(f"`{name}` is {shown(value)}. It must be one of {', '.join(map(str, choices))}.")
        return choices[choices.index(value)]  # converts NumPy numbers to Python numbers
    elif origin is list:
        [element] = get_args(kind)
        values = value if isinstance(value, list | tuple) else [value]
        words = metadata.get("words", ())
        return [one if one in words else _checked(name, one, element, metadata) for one in values]
    elif origin is dict:
        if isinstance(value, str):
            value = parse_json(value, f"`{name}` is {shown(value)}. It must be a JSON object")
        if not isinstance(value, dict):
            raise ValueError(f"`{name}` is {shown(value)}. It must be a JSON object.")
        if get_args(kind)[1] is str:
            return {_checked(name, key, str, {}): _checked(name, one, str, {}) for key, one in value.items()}
    elif origin is str:
        if isinstance(value, Real | date | os.PathLike) and not isinstance(value, bool):
            value = str(value)
        if hasattr(value, "save_to_disk"):  # a `datasets.Dataset` or `DatasetDict`
            raise ValueError(
                f"`{name}` is a {type(value).__name__}. It must be a string. Save the dataset with `save_to_disk`, and pass its directory."
            )
        if not isinstance(value, str):
            raise ValueError(f"`{name}` is {shown(value)}. It must be a string.")
        if not value and not metadata.get("may_be_empty"):
            raise ValueError(f"`{name}` is empty. Set it, or remove it.")
        if "\0" in value or not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
            raise ValueError(f"`{name}` is {shown(value)}. It must be valid Unicode without null characters.")
    elif origin is bool:
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is {shown(value)}. It must be true or false.")
    elif origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real if origin is float else Integral):
            raise ValueError(
                f"`{name}` is {shown(value)}. It must be {'a number' if origin is float else 'a whole number'}."
            )
        return _in_range(name, origin(value), metadata.get("range", "(-inf, inf)"))
    return value


def _in_range(name: str, value: float, interval: str) -> float:
    """Check that a number is in an interval such as `"[0, 1)"`."""
    low, high = map(float, interval[1:-1].split(","))
    above = value > low if interval[0] == "(" else value >= low
    below = value < high if interval[-1] == ")" else value <= high
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` is {value}. It must be a finite number.")
    if not (above and below):
        words = {"[": "at least ", "(": "greater than ", "]": "at most ", ")": "below "}
        ends = [(interval[0], low), (interval[-1], high)]
        limits = [f"{words[bracket]}{limit:.10g}" for bracket, limit in ends if math.isfinite(limit)]
        raise ValueError(f"`{name}` is {value}. It must be {' and '.join(limits)}.")
    if isinstance(value, int) and not -MAX_INT <= value <= max(MAX_INT, high if math.isfinite(high) else 0):
        raise ValueError(f"`{name}` is {shown(value)}. It must be at most {MAX_INT}.")
    return value
