"""What a device does in its own time: streams of copies and kernels, and the events that order them."""

from collections.abc import Callable, Hashable, Iterable
from typing import Protocol

import torch

from moe_offload.offload.streaming.slab import PageLock
from moe_offload.offload.tiers.link_meter import LinkMeter


class Event(Protocol):
    """A mark in a stream. One that was never recorded counts as reached."""

    @property
    def device(self) -> Hashable:
        """Whose stream."""

    def is_over(self) -> bool:
        """Whether the device has come past the mark; does not wait."""

    def wait(self) -> None:
        """Block this thread until it has. Raises ExpertCopyError if the device has failed."""


class DeviceQueue(Protocol):
    """One device: a stream that copies from the host, and the streams that callers compute on.

    A stream does one thing after the other; streams know nothing of each other but what `copy` and `wait` tell them.
    Nothing here waits for the device except where it says so. Every method may be called from any thread.
    """

    @property
    def page_lock(self) -> PageLock:
        """What page-locks host memory for this device."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """``uint8 [size_bytes]`` on the device, which copies may write to; raises BudgetError."""

    def new_event(self) -> Event:
        """A mark that is not in any stream yet."""

    @property
    def link(self) -> LinkMeter:
        """What measures the copy stream."""

    def copy(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        *,
        after: Iterable[Event],
        event: Event,
        is_ahead: bool = False,
    ) -> None:
        """Host to device on the copy stream, behind what it has to do already and the events ``after``.

        ``event`` is recorded behind it. Until that is over, ``source`` must not change. ``is_ahead``: nobody waits
        for it, which is noted and changes nothing. Raises ExpertCopyError.
        """

    @property
    def copy_s_per_byte(self) -> float:
        """What a byte takes on the copy stream, from copies of late; 0 while that is not known."""

    def to_host(self, source: torch.Tensor, target: torch.Tensor, *, event: Event) -> None:
        """Device to host, a few rows, behind what this thread has launched; ``event`` is recorded behind it."""

    def to_device(self, source: torch.Tensor, target: torch.Tensor, *, event: Event) -> None:
        """Host to device, a few rows, before what this thread launches next; until ``event``, ``source`` must stay."""

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """From one place on the device to another, on this thread's stream."""

    def stream(self) -> Hashable:
        """The stream that this thread launches kernels on."""

    def wait(self, event: Event) -> None:
        """This thread's stream goes on only when the event is over."""

    def record(self, event: Event) -> None:
        """Put the mark behind all that was launched on this thread's stream."""

    def when_over(self, event: Event, call: Callable[[], None]) -> None:
        """Call back after a recorded event is over, or the device has failed: on another thread, never from in here."""

    def close(self) -> None:
        """Wait for the copies, not for the kernels; no more calls back afterwards. May be called twice."""
