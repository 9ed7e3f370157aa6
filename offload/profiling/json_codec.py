"""Frozen dataclasses as JSON and back, strictly: what is read was written by others."""

import dataclasses
import functools
import math
import types
import typing
from typing import Any, TypeVar

from moe_offload.offload.pack.strict_json import JsonShapeError

T = TypeVar("T")


def encode(value: Any) -> Any:
    """Dataclasses become objects, tuples become lists; numbers that JSON does not have are refused."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no place in JSON")
    return value


def decode(kind: type[T], value: Any, where: str) -> T:
    """The ``kind`` that ``value`` describes; `JsonShapeError`, which names the place, where it does not."""
    decoded: T = _decode(kind, value, where)
    return decoded


def _decode(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # of one kind and None, the only unions here
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise JsonShapeError(f"{where} is not a list: {value!r:.60}")
        return tuple([_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)])
    if origin is dict:
        if not isinstance(value, dict):
            raise JsonShapeError(f"{where} is not an object: {value!r:.60}")
        return {key: _decode(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in arguments:
            raise JsonShapeError(f"{where} is {value!r:.60}; it must be one of {', '.join(arguments)}")
        return value
    if kind is float:
        return _decode_float(value, where)
    if type(value) is not kind or (kind is int and not 0 <= value < 1 << 63):
        raise JsonShapeError(f"{where} is not {_NAMES[kind]}: {value!r:.60}")
    return value


_NAMES = {int: "a whole number from 0 to 2^63-1", str: "a string", bool: "true or false"}


def _decode_float(value: Any, where: str) -> float:
    if type(value) not in (int, float):
        raise JsonShapeError(f"{where} is not a number: {value!r:.60}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise JsonShapeError(f"{where} is not a finite number: {value!r:.60}")
    return number


def _decode_object(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise JsonShapeError(f"{where} is not an object: {value!r:.60}")
    kinds = _fields(kind)
    if missing := [name for name in kinds if name not in value]:
        raise JsonShapeError(f"{where} lacks {', '.join(map(repr, missing))}")
    if unknown := sorted(set(value) - set(kinds)):
        raise JsonShapeError(f"{where} has unknown keys: {', '.join(map(repr, unknown))}")
    return kind(**{name: _decode(kinds[name], value[name], f"{where}.{name}") for name in kinds})


@functools.cache
def _fields(kind: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
