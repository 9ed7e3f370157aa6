"""Which part of a model is on which GPU."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """``device_map``: CUDA index by the name of a module, which holds for all below it that are not named themselves.

    The other fields have one entry for each device, in the order of ``devices``: index, budget, bytes of the dense
    weights; and one for each layer with experts, or with a cache: which of ``devices`` it is on.
    """

    devices: tuple[int, ...]
    budgets_bytes: tuple[int, ...]
    device_map: Mapping[str, int]
    dense_bytes: tuple[int, ...]
    device_of_layer: tuple[int, ...]
    device_of_cache_layer: tuple[int, ...]
