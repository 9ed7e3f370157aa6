"""Host memory that copies are reading from, and that is free again when they are over."""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from moe_offload.offload.tiers.device_queue import Event

What = TypeVar("What")


class Emptying(Generic[What]):
    """In the order in which the copies were enqueued, which on each device is the order in which they end."""

    def __init__(self) -> None:
        self._of_device: dict[Hashable, deque[tuple[Event, What]]] = {}

    def add(self, event: Event, what: What) -> None:
        """A copy reads it until the event is over."""
        self._of_device.setdefault(event.device, deque()).append((event, what))

    def take_over(self) -> Iterator[What]:
        """Those whose copies are over; each is told once."""
        for copies in self._of_device.values():
            while copies and copies[0][0].is_over():
                yield copies.popleft()[1]

    def oldest(self) -> Event | None:
        """A copy that is under way, and that no other on its device has to wait for."""
        return next((copies[0][0] for copies in self._of_device.values() if copies), None)
