"""Base class of the configs, whose fields are also the options of the command line."""

import os
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


@dataclass(kw_only=True)
class Config:
    """
    Base class of the configs.

    A field declared as `list[str]` also takes a single string or path, which becomes a list of one. A subclass that checks more
    calls `super().__post_init__()` first.

    Raises:
        `ValueError`: If a field declared as `Literal` holds none of its choices.

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
    ValueError: order is 'sorted', expected one of given, random.
    ```
    """

    def __post_init__(self):
        types = get_type_hints(type(self))
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and _allows(types[field.name], type(None)):
                continue
            if _allows(types[field.name], list[str]):
                names = [value] if isinstance(value, (str, os.PathLike)) else value
                setattr(self, field.name, [os.fspath(name) for name in names])
            choices = choices_of(types[field.name])
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(map(str, choices))}.")


def choices_of(declared: Any) -> tuple[Any, ...]:
    """Return the choices of a type that is a `Literal`, or a `Literal` or `None`. Empty for other types."""
    kinds = [declared, *get_args(declared)]
    return next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), ())


def _allows(declared: Any, kind: Any) -> bool:
    return declared == kind or kind in get_args(declared)
