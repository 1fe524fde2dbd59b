"""Check JSON values against type hints, with pydantic: `TypedDict` and dataclasses for objects, and numbers with a range."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from .io import shown


T = TypeVar("T")

INT64 = 2**63 - 1
Count = Annotated[int, Field(ge=0, le=INT64)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]  # what the node files can hold
Amount = Annotated[float, Field(ge=0, le=2**53)]  # a whole number of this size is exact as a float
Share = Annotated[float, Field(ge=0, le=1)]

OTHER_DATASET = "is_other_dataset"  # key in the logs of evaluations of a dataset that is not the trainer's

_adapter = cache(TypeAdapter)


def check_json(value: Any, hint: Any, where: str | Path, remedy: str = "", more: bool = False) -> None:
    """
    Check that a JSON value has a type. Nothing is converted, except that a whole number may stand for a `float`.

    Args:
        value (`Any`):
            Value as returned by [`~io.parse_json`].
        hint (`Any`):
            Type hint. A `TypedDict` (of `typing_extensions`) or a dataclass is an object with these keys and no others. Keys with
            `NotRequired` or with a default may be missing. A `tuple` is a list.
        where (`str` or `Path`):
            File, or file and line, for the error message.
        remedy (`str`, *optional*):
            What to do about a damaged file, for the error message.
        more (`bool`, *optional*, defaults to `False`):
            Whether the object may have other keys, which are not checked.

    Raises:
        `ValueError`: If the value has another type. The message names the place of the first difference.
    """
    if more and type(value) is dict:
        value = {key: value[key] for key in get_type_hints(hint) if key in value}
    from_json(hint, value, where, remedy)


def from_json(kind: type[T], value: Any, where: str | Path, remedy: str = "") -> T:
    """
    Return a dataclass from the JSON object with its fields.

    Raises:
        `ValueError`: If the object has other keys or types (see [`check_json`]), or the dataclass refuses the values. The message
            starts with `where`.
    """
    try:
        return _adapter(kind).validate_json(_adapter(Any).dump_json(value), strict=True, extra="forbid")
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
    keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in found["loc"])
    place = "".join(keys).removeprefix(".")
    name = f"`{shown(place, 200)[1:-1]}`" if place else "the value"
    if found["type"] == "missing":
        words = f"{name} is missing."
    elif found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        words = f"{name} is not a known key."
    elif found["type"] == "value_error":  # of the dataclass
        words = str(found["ctx"]["error"])
    else:
        words = f"{name} is {shown(found['input'])}. {found['msg'].replace('Input should', 'It must')}."
    raise ValueError(f"{where}: {words} {remedy}".rstrip())
