"""Check JSON values against type hints: `TypedDict` and dataclasses for objects, lists, unions, literals, and numbers with a range."""

import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    NotRequired,
    Required,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from .io import shown


T = TypeVar("T")

INT64 = 2**63 - 1


class Range(NamedTuple):
    """Smallest and largest value of a number, for `Annotated`."""

    low: float
    high: float


Count = Annotated[int, Range(0, INT64)]
Index = Annotated[int, Range(0, 2**31 - 1)]  # what the node files can hold
Amount = Annotated[float, Range(0, INT64)]
Share = Annotated[float, Range(0, 1)]


class _Mismatch(Exception):
    """What is wrong with a value, and the keys and indices that lead to it, innermost first."""

    def __init__(self, words: str):
        self.words = words
        self.path: list[str | int] = []


@dataclass(frozen=True)
class _Check:
    """
    Check of a value.

    Args:
        run (`Callable[[Any], None]`):
            Function that raises [`_Mismatch`] if the value is wrong.
        free (`frozenset[type]`, *optional*):
            Types whose values are all right. They are checked faster.
        range ([`Range`], *optional*):
            Range of whole numbers. Lists of them are checked faster.
    """

    run: Callable[[Any], None]
    free: frozenset[type] = frozenset()
    range: Range | None = None


def check_json(value: Any, hint: Any, where: str | Path, remedy: str = "", more: bool = False) -> None:
    """
    Check that a JSON value has a type. All numbers must be finite, and whole numbers must fit into 64 bits.

    Args:
        value (`Any`):
            Value as returned by [`~io.parse_json`].
        hint (`Any`):
            Type hint. A `TypedDict` or a dataclass is an object with these keys and no others. Keys with `NotRequired` or with a
            default may be missing. A `tuple` is a list.
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
    try:
        _check_of(hint).run(value)
    except _Mismatch as mismatch:
        keys = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in reversed(mismatch.path))
        place = "".join(keys).removeprefix(".")
        name = f": `{shown(place, 200)[1:-1]}`" if place else ""
        raise ValueError(f"{where}{name} {mismatch.words} {remedy}".rstrip()) from None


def from_json(kind: type[T], values: Any, where: str | Path, remedy: str = "") -> T:
    """
    Return a dataclass from the JSON object with its fields.

    Raises:
        `ValueError`: If the object has other keys or types (see [`check_json`]), or the dataclass refuses the values. The message
            starts with `where`.
    """
    check_json(values, kind, where, remedy)
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error} {remedy}".rstrip()) from None


@cache
def _check_of(hint: Any) -> _Check:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _Check(lambda value: None)
    if origin in (NotRequired, Required):
        return _check_of(args[0])
    if origin in (Union, UnionType):
        return _union([_check_of(one) for one in args])
    if origin is Literal:
        return _leaf(frozenset(map(type, args)), f"one of {', '.join(map(repr, args))}", allowed=frozenset(args))
    if origin is tuple and args[-1] is not Ellipsis:
        return _tuple([_check_of(one) for one in args])
    if (origin or hint) in (list, tuple):
        return _list(_check_of(args[0] if args else Any))
    if (origin or hint) is dict:
        return _dict(*map(_check_of, args or (str, Any)))
    if is_typeddict(hint):
        required = hint.__required_keys__
    elif is_dataclass(hint):
        required = {one.name for one in fields(hint) if one.default is MISSING and one.default_factory is MISSING}
    elif hint in _WORDS:
        return _leaf(frozenset({hint}), _WORDS[hint])
    else:
        return _number(*(args if origin is Annotated else (hint, None)))
    hints = get_type_hints(hint, include_extras=True)
    return _object({name: _check_of(inner) for name, inner in hints.items()}, required)


_WORDS = {str: "a string", bool: "true or false", NoneType: "null"}


def _leaf(
    types: frozenset[type], words: str, range: Range | None = None, allowed: Collection[Any] | None = None
) -> _Check:
    def run(value: Any) -> None:
        if (
            type(value) not in types
            or (range is not None and not range.low <= value <= range.high)
            or (allowed is not None and value not in allowed)
        ):
            raise _Mismatch(f"is {shown(value)}, expected {words}.")

    is_free = range is None and allowed is None
    return _Check(run, types if is_free else frozenset(), range if types == {int} else None)


def _number(kind: type, bounds: Range | None) -> _Check:
    words = "a whole number" if kind is int else "a number"
    if bounds is not None:
        words += f" of at least {bounds.low}" if bounds.high == INT64 else f" from {bounds.low} to {bounds.high}"
    elif kind is int:
        bounds = Range(-INT64 - 1, INT64)
    else:
        bounds = Range(-sys.float_info.max, sys.float_info.max)
    return _leaf(frozenset({int} if kind is int else {int, float}), words, bounds)


def _union(checks: list[_Check]) -> _Check:
    def run(value: Any) -> None:
        found = []
        for check in checks:
            try:
                return check.run(value)
            except _Mismatch as mismatch:
                found.append(mismatch)
        deepest = max(found, key=lambda mismatch: len(mismatch.path))
        if deepest.path:
            raise deepest
        words = " or ".join(mismatch.words.partition("expected ")[2].rstrip(".") for mismatch in found)
        raise _Mismatch(f"is {shown(value)}, expected {words}.")

    return _Check(run, frozenset().union(*(check.free for check in checks)))


def _list(item: _Check) -> _Check:
    def run(values: Any) -> None:
        if type(values) is not list:
            raise _Mismatch(f"is {shown(values)}, expected a list.")
        types = set(map(type, values))
        if types <= item.free:
            return
        if item.range is not None and types == {int}:
            if item.range.low <= min(values) and max(values) <= item.range.high:
                return
        _each(item, enumerate(values))

    return _Check(run)


def _tuple(items: list[_Check]) -> _Check:
    def run(values: Any) -> None:
        if type(values) is not list or len(values) != len(items):
            raise _Mismatch(f"is {shown(values)}, expected a list of {len(items)} values.")
        for place, item in enumerate(items):
            _each(item, [(place, values[place])])

    return _Check(run)


def _dict(key: _Check, item: _Check) -> _Check:
    def run(values: Any) -> None:
        if type(values) is not dict:
            raise _Mismatch(f"is {shown(values)}, expected an object.")
        for name in values:
            try:
                key.run(name)
            except _Mismatch as mismatch:
                raise _Mismatch(f"has the key {mismatch.words.removeprefix('is ')}") from None
        _each(item, values.items())

    return _Check(run)


def _each(item: _Check, values: Iterable[tuple[str | int, Any]]) -> None:
    for key, value in values:
        try:
            item.run(value)
        except _Mismatch as mismatch:
            mismatch.path.append(key)
            raise


def _object(items: Mapping[str, _Check], required: Collection[str]) -> _Check:
    def run(values: Any) -> None:
        if type(values) is not dict:
            raise _Mismatch(f"is {shown(values)}, expected an object.")
        if not values.keys() >= required:
            missing = ", ".join(f"`{key}`" for key in items if key in required and key not in values)
            raise _Mismatch(f"has no {missing}.")
        for key, value in values.items():
            if key not in items:
                raise _Mismatch(f"has the unknown key {shown(key)}. Known keys are {', '.join(items)}.")
            if type(value) not in items[key].free:
                _each(items[key], [(key, value)])

    return _Check(run)
