"""Finds what cannot be recorded, by looking at what torch is asked to do while it still does it.

A recording that fails leaves more behind than one that was not begun; so a step is looked through first.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from moe_offload.offload.graphs.recorder import RecordingError

# What tells the host numbers, or the size of its result: it waits for the device.
_WAITS = frozenset(
    (
        "_local_scalar_dense",
        "_unique2",
        "bincount",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique_consecutive",
        "unique_dim",
    )
)
_COPIES = frozenset(("_to_copy", "copy_", "_copy_from"))


class NoWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this, `RecordingError` where this thread would wait for a device, or bring something to one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at it, then do it; what is made of other operations is looked at one by one."""
        kwargs = kwargs or {}
        with self:
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func._schema.name.rpartition("::")[2]
        if name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            raise RecordingError(f"{func} waits for the device")
        if name == "index" and any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1])):
            raise RecordingError(f"{func} by a mask waits for the device")
        result = func(*args, **kwargs)
        if name in _COPIES and len({tensor.device.type for tensor in _tensors((args, kwargs, result))}) > 1:
            raise RecordingError(f"{func} copies between the host and the device")
        return result


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor))
