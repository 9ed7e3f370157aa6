"""The arguments of a forward pass in memory that stays, so that a recorded pass can be given new ones."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache


def signature(kwargs: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """What a recording is good for: equal for passes that differ only in what is in their tensors.

    None for arguments that are no tensors, caches or plain values.
    """
    described: list[Any] = []
    for name, value in sorted(kwargs.items()):
        if isinstance(value, torch.Tensor):
            described.append((name, value.device, value.shape, value.dtype, value.stride()))
        elif isinstance(value, Cache):
            described.append((name, id(value)))
        elif isinstance(value, Mapping):
            inner = signature(value)
            if inner is None:
                return None
            described.append((name, inner))
        elif value is None or isinstance(value, bool | int | str):
            described.append((name, value))
        else:
            return None
    return tuple(described)


def static_copy(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The same arguments with tensors of their own."""
    return {name: _copied(value) for name, value in kwargs.items()}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, Mapping) and not isinstance(value, Cache):
        return static_copy(value)
    return value


def fill(static: Mapping[str, Any], kwargs: Mapping[str, Any]) -> None:
    """Write a pass's arguments, of the same `signature`, into the memory of `static_copy`."""
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            static[name].copy_(value)
        elif isinstance(value, Mapping) and not isinstance(value, Cache):
            fill(static[name], value)
