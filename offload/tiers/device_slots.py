"""The slots of one device: a slab of equal slots for each layer, and one of staging slots for all of them."""

from collections.abc import Iterator, Mapping

import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.tiers.device_queue import DeviceQueue
from moe_offload.offload.tiers.device_slot import DeviceSlot

STAGING = -1  # in place of a layer


class DeviceSlots:
    """One ``uint8 [rows, slot_bytes]`` a layer, which kernels index by row; a slab is an allocation of its own."""

    def __init__(
        self, queue: DeviceQueue, shapes: Mapping[int, tuple[int, int]], staging_shape: tuple[int, int]
    ) -> None:
        """``shapes``: number and bytes of the slots of each layer that is on this device; raises BudgetError."""
        self.queue = queue
        # `close`, perhaps called under a running step, replaces both at once.
        self._slabs = {STAGING: self._allocate(staging_shape)}
        self._slabs |= {layer_idx: self._allocate(shape) for layer_idx, shape in shapes.items()}
        self._slots = {
            layer_idx: [DeviceSlot(queue, slab, row) for row in range(len(slab))]
            for layer_idx, slab in self._slabs.items()
        }

    def _allocate(self, shape: tuple[int, int]) -> torch.Tensor:
        num_slots, slot_bytes = shape
        return self.queue.allocate(num_slots * slot_bytes).view(num_slots, slot_bytes)

    def slab(self, layer_idx: int) -> torch.Tensor:
        """All slots of a layer, or of `STAGING`; ConfigError once they are freed."""
        slab = self._slabs.get(layer_idx)
        if slab is None:
            raise _closed_error()
        return slab

    def slot(self, layer_idx: int, slot: int) -> DeviceSlot:
        """A slot by the cache's number, or a staging slot (-1, -2, ...); ConfigError once they are freed."""
        slots = self._slots.get(layer_idx if slot >= 0 else STAGING)
        if slots is None:
            raise _closed_error()
        return slots[slot if slot >= 0 else -1 - slot]

    def __iter__(self) -> Iterator[DeviceSlot]:
        return (slot for slots in list(self._slots.values()) for slot in slots)

    def free(self) -> None:
        """Let go of the memory. Copies have ended, and no kernel reads it."""
        self._slabs, self._slots = {}, {}


def _closed_error() -> ConfigError:
    return ConfigError("the memory of the experts was freed: the model is closed; load it again")
