"""The slots of one device: a slab of equal slots for each layer, and one of staging slots for all of them."""

from collections.abc import Iterator, Mapping

import torch

from moe_offload.errors import BudgetError, ConfigError
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
        # Memory of a thread in inference mode could be written to by no other thread.
        with torch.inference_mode(False):
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

    def resize(self, layer_idx: int, num_slots: int, numbers: Mapping[int, int]) -> bool:
        """Another slab in place of a layer's; the experts move to new ``numbers``. False if there was no room for both.

        Then the old one is freed first, and its bytes are lost; but where slots are added, BudgetError. Nobody else
        uses or fills the layer's slots. Waits until no kernel reads them.
        """
        old, slot_bytes = self._slots[layer_idx], self._slabs[layer_idx].shape[1]
        has_both = True
        try:
            slab = self._allocate((num_slots, slot_bytes))
        except BudgetError:
            if num_slots >= len(old):
                raise
            has_both = False
            self._let_go(layer_idx)
            old = []
            slab = self._allocate((num_slots, slot_bytes))
        slots = [DeviceSlot(self.queue, slab, row) for row in range(num_slots)]
        for number, new in numbers.items() if has_both else ():
            slots[new].take_over(old[number])
        for slot in old:
            slot.wait_until_unused()
            slot.let_go()
        self._slabs[layer_idx], self._slots[layer_idx] = slab, slots
        return has_both

    def _let_go(self, layer_idx: int) -> None:
        for slot in self._slots.pop(layer_idx):
            slot.wait_until_unused()
            slot.let_go()
        del self._slabs[layer_idx]

    def __iter__(self) -> Iterator[DeviceSlot]:
        return (slot for slots in list(self._slots.values()) for slot in slots)

    def free(self) -> None:
        """Let go of the memory. Copies have ended, and no kernel reads it."""
        for slot in self:
            slot.let_go()
        self._slabs, self._slots = {}, {}


def _closed_error() -> ConfigError:
    return ConfigError("the memory of the experts was freed: the model is closed; load it again")
