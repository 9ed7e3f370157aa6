"""One slot on the device, and the events that order those who write and read it."""

import threading
from collections.abc import Hashable

import torch

from moe_offload.offload.tiers.device_queue import DeviceQueue, Event
from moe_offload.offload.tiers.host_expert import HostExpert


class DeviceSlot:
    """Memory that copies fill and kernels read: each copy behind the kernels before it, each kernel behind its copy."""

    def __init__(self, queue: DeviceQueue, slab: torch.Tensor, row: int) -> None:
        """``slab``: ``uint8 [rows, slot_bytes]`` on the queue's device."""
        self.slab, self.row = slab, row
        self.data = slab[row]
        self._queue = queue
        self._lock = threading.Lock()
        self._arrival: Event | None = None
        self._last_copy: Event | None = None  # also of bytes that turned out wrong, or that nobody has used
        self._ordered: set[Hashable] = set()  # the streams that have been told to wait for the arrival
        self._last_use: dict[Hashable, Event] = {}  # one for each stream that has read what is in the slot

    def fill(self, expert: HostExpert) -> None:
        """Enqueue the copy of all of it. Raises ExpertCopyError; the host memory is given back in any case.

        Nobody may use the slot until this has returned, and nobody may launch kernels that read its old bytes.
        """
        event = self._queue.new_event()
        try:
            self.copy(expert.data, range(expert.data.numel()), event)
        finally:
            # Also when an interrupt strikes in between: the copy may be under way.
            expert.hold_until(event)
        self.filled(event)

    def copy(self, data: torch.Tensor, span: range, event: Event, *, is_ahead: bool = False) -> None:
        """Enqueue the copy of these bytes of an expert. Raises ExpertCopyError; of the slot the same holds."""
        uses = tuple(self._last_use.values())
        source, target = data[span.start : span.stop], self.data[span.start : span.stop]
        self._last_copy = event
        self._queue.copy(source, target, after=uses, event=event, is_ahead=is_ahead)

    def filled(self, event: Event) -> None:
        """All bytes are enqueued, the event behind the last of them."""
        with self._lock:
            self._arrival = event
            self._ordered.clear()
            self._last_use.clear()  # later copies are behind this one

    def take_over(self, other: "DeviceSlot") -> None:
        """Enqueue a copy of another slot's bytes, on this thread's stream; this slot is as one that has been filled."""
        other.use()
        self._queue.move(other.data, self.data)
        other.used()
        self.used()  # a copy into it comes behind this one
        arrival = self._queue.new_event()
        self._queue.record(arrival)
        with self._lock:
            self._arrival = arrival

    def use(self) -> None:
        """Kernels that this thread launches from now on see the bytes."""
        stream = self._queue.stream()
        if self._arrival is not None and stream not in self._ordered:
            self._queue.wait(self._arrival)
            self._ordered.add(stream)

    def used(self) -> None:
        """The next copy waits for all that this thread has launched so far."""
        stream = self._queue.stream()
        with self._lock:  # two threads may share a stream: the event has to end up behind both
            event = self._last_use.get(stream)
            if event is None:
                event = self._last_use[stream] = self._queue.new_event()
            self._queue.record(event)

    def hold(self, stream: Hashable, until: Event) -> None:
        """The next copy waits for this event of a stream too, beside the one that `used` has left there."""
        with self._lock:
            self._last_use["held", stream] = until

    def let_go(self) -> None:
        """Of the memory: whoever still knows of the slot, as a transfer that has ended may, does not keep it."""
        self.slab = self.data = torch.empty(0, dtype=torch.uint8)

    def wait_until_unused(self) -> None:
        """Block this thread until no kernel reads the slot, and no copy writes to it."""
        copies = [] if self._last_copy is None else [self._last_copy]
        for event in [*copies, *self._last_use.values()]:
            event.wait()
