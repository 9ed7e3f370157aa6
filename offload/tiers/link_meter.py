"""What a link to a device carries, by stamps that it sets before and behind each copy; nothing waits for them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

# What starting a copy takes counts for little from this size on.
LEAST_BYTES = 256 * 1024
_NEWEST_SHARE = 0.2


class Stamp(Protocol):
    """A mark in a copy stream, which can be set again once it was read."""

    def set(self) -> None:
        """Behind what was enqueued so far."""

    def is_over(self) -> bool:
        """Whether the device has come past it; does not wait. RuntimeError if the device has failed."""

    def ns_until(self, later: Self) -> int:
        """The device's time between two marks that are over."""


class CopyObserver(Protocol):
    """Told of each copy when it is known how long it took, by any thread: to be quick, and not to raise."""

    def copied(self, device: int, begin_ns: int, num_bytes: int, is_ahead: bool, took_ns: int) -> None:
        """``begin_ns`` of ``perf_counter_ns``: when it was enqueued. ``took_ns`` is 0 where that did not become known.

        ``is_ahead``: nobody waited for the bytes when they were enqueued.
        """


@dataclass(frozen=True)
class LinkTotals:
    """What was enqueued, and the time that the link was busy with what of it is over."""

    demand_bytes: int = 0
    ahead_bytes: int = 0
    busy_ns: int = 0

    @property
    def num_bytes(self) -> int:
        """All that was enqueued."""
        return self.demand_bytes + self.ahead_bytes

    def __add__(self, other: "LinkTotals") -> "LinkTotals":
        return LinkTotals(
            self.demand_bytes + other.demand_bytes,
            self.ahead_bytes + other.ahead_bytes,
            self.busy_ns + other.busy_ns,
        )

    def __sub__(self, earlier: "LinkTotals") -> "LinkTotals":
        return LinkTotals(
            self.demand_bytes - earlier.demand_bytes,
            self.ahead_bytes - earlier.ahead_bytes,
            self.busy_ns - earlier.busy_ns,
        )


@dataclass(eq=False)
class _Copy:
    begin: Stamp
    end: Stamp
    begin_ns: int
    num_bytes: int
    is_ahead: bool
    is_told: bool = False


class LinkMeter:
    """For one copy stream. Any thread may call any method.

    A copy's time is the device's, from when it had nothing else to wait for. It is read when a later copy is enqueued,
    or when somebody asks, if it is over by then.
    """

    def __init__(self, new_stamp: Callable[[], Stamp]) -> None:
        self.s_per_byte = 0.0
        """What a byte takes, from copies of late; 0 while that is not known."""
        self._peak_bytes_per_s = 0.0
        self._new_stamp = new_stamp
        self._totals = LinkTotals()
        self._observer: tuple[CopyObserver, int] | None = None
        self._stamps: list[Stamp] = []
        self._under_way: deque[_Copy] = deque()
        self._enqueueing = threading.Lock()
        self._lock = threading.Lock()

    @contextmanager
    def copying(self, num_bytes: int, *, is_ahead: bool) -> Iterator[None]:
        """Enqueue one copy within this, and nothing else; other threads enqueue theirs before or after it.

        One that raises does not count.
        """
        with self._enqueueing:
            with self._lock:
                self._read()
                begin, end = self._stamp(), self._stamp()
            copy = _Copy(begin, end, time.perf_counter_ns(), num_bytes, is_ahead)
            begin.set()
            yield
            end.set()
            with self._lock:
                self._under_way.append(copy)
                self._totals += LinkTotals(0, num_bytes) if is_ahead else LinkTotals(num_bytes)

    def totals(self) -> LinkTotals:
        """Since the beginning."""
        with self._lock:
            self._read()
            return self._totals

    @property
    def peak_bytes_per_s(self) -> float:
        """The fastest copy so far; 0 before the first."""
        with self._lock:
            self._read()
            return self._peak_bytes_per_s

    def observe(self, observer: CopyObserver | None, device: int) -> None:
        """Tell ``observer`` of every copy from now on, under this number; the last one hears of what is under way."""
        with self._lock:
            self._read()
            for copy in self._under_way:
                self._tell(copy, 0)
                copy.is_told = True
            self._observer = None if observer is None else (observer, device)

    # -- the lock is held --

    def _stamp(self) -> Stamp:
        return self._stamps.pop() if self._stamps else self._new_stamp()

    def _read(self) -> None:
        """Count the time of what is over."""
        try:
            while self._under_way and self._under_way[0].end.is_over():
                copy = self._under_way.popleft()
                self._count(copy, copy.begin.ns_until(copy.end))
                self._stamps += [copy.begin, copy.end]
        except RuntimeError:  # the device has failed: whoever waits for a copy is told so
            self._under_way.clear()

    def _count(self, copy: _Copy, took_ns: int) -> None:
        self._totals += LinkTotals(busy_ns=took_ns)
        if copy.num_bytes >= LEAST_BYTES and took_ns > 0:
            s_per_byte = took_ns * 1e-9 / copy.num_bytes
            share = _NEWEST_SHARE if self.s_per_byte else 1.0
            self.s_per_byte += share * (s_per_byte - self.s_per_byte)
            self._peak_bytes_per_s = max(self._peak_bytes_per_s, 1 / s_per_byte)
        self._tell(copy, took_ns)

    def _tell(self, copy: _Copy, took_ns: int) -> None:
        if self._observer is not None and not copy.is_told:
            observer, device = self._observer
            observer.copied(device, copy.begin_ns, copy.num_bytes, copy.is_ahead, took_ns)
