"""Base class of the configs. The fields of a config are also the options of its command."""

import json
import os
from dataclasses import dataclass, fields
from datetime import date
from numbers import Integral, Real
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .io import shown


@dataclass(kw_only=True)
class Config:
    """
    Base class of the configs. It validates the fields and converts common values from Python and YAML:

    - a single value for a list field becomes a list with one element;
    - a path, number or date for a `str` field becomes a string (YAML parses `revision: 2024` and `2024-07-26` as
      number and date);
    - a JSON string for a `dict[str, Any] | str` field becomes a dictionary.

    Subclasses with further checks must call `super().__post_init__()` first.

    Raises:
        `ValueError`: If a field has a value of the wrong type, or a value that is not one of its choices. Choices are declared with
            `Literal` or, for lists, with `"choices"` in the metadata of the field.

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
        for field in fields(self):
            value = _checked(field.name, getattr(self, field.name), types[field.name])
            choices = field.metadata.get("choices")
            if choices and isinstance(value, list):
                is_missing = not value and field.default is not None  # an optional list may be empty
                if is_missing or not set(value) <= set(choices):
                    raise ValueError(
                        f"`{field.name}` is {shown(value)}. It must be some of {', '.join(map(str, choices))}."
                    )
            setattr(self, field.name, value)

    def settings(self) -> dict[str, Any]:
        """Return the fields that are not `None`, as in a YAML file."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.init}
        return {name: value for name, value in found.items() if value is not None}


def _checked(name: str, value: Any, declared: Any) -> Any:
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
        return [_checked(name, one, element) for one in (value if isinstance(value, list | tuple) else [value])]
    elif origin is dict:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"`{name}` is {shown(value)}. It must be a JSON object ({error}).") from None
        if not isinstance(value, dict):
            raise ValueError(f"`{name}` is {shown(value)}. It must be a JSON object.")
        if get_args(kind)[1] is str:
            return {key: _checked(name, one, str) for key, one in value.items()}
    elif origin is str:
        if isinstance(value, Real | date | os.PathLike) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise ValueError(f"`{name}` is {shown(value)}. It must be a string.")
    elif origin is bool:
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` is {shown(value)}. It must be true or false.")
    elif origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real if origin is float else Integral):
            raise ValueError(
                f"`{name}` is {shown(value)}. It must be {'a number' if origin is float else 'a whole number'}."
            )
        return origin(value)
    return value
