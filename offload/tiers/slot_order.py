"""The order of kernels and copies, for steps of which the host does not know which slots they read."""

from collections.abc import Callable, Hashable

from moe_offload.offload.tiers.device_queue import DeviceQueue, Event
from moe_offload.offload.tiers.device_slot import DeviceSlot


class TierSlotOrder:
    """See `graphs.slot_table`: a tier's slots on one device."""

    def __init__(self, queue: DeviceQueue, slot: Callable[[int, int], DeviceSlot]) -> None:
        """``slot(layer_idx, slot)``: one of the cache's."""
        self._queue, self._slot = queue, slot

    def stream(self) -> Hashable:
        """The stream that this thread launches kernels on."""
        return self._queue.stream()

    def see(self, layer_idx: int, slot: int) -> None:
        """Kernels that this thread launches from now on see the slot's bytes."""
        self._slot(layer_idx, slot).use()

    def mark(self) -> Event:
        """An event behind all that this thread has launched."""
        event = self._queue.new_event()
        self._queue.record(event)
        return event

    def hold(self, layer_idx: int, slot: int, stream: Hashable, until: Event) -> None:
        """The next copy into the slot waits for the event, which replaces an earlier one of the same stream."""
        self._slot(layer_idx, slot).hold(stream, until)
