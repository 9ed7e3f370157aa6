"""Experts that a step waits for, and how it waits."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from moe_offload.offload.experts.interrupts import InterruptShield

Arrival = tuple[int, int, BaseException | None]  # expert_idx, slot, what went wrong
# How long to wait before looking whether the user has pressed Ctrl-C.
PATIENCE_S = 0.1
T = TypeVar("T")


class Arrivals:
    """What has arrived for one step. When the step ends, early or not, its staging slots go back to the free ones."""

    def __init__(self, free_staging: "queue.SimpleQueue[int]") -> None:
        self._free_staging = free_staging
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False

    def put(self, expert_idx: int, slot: int, error: BaseException | None) -> None:
        """An expert's bytes are in a slot, or will not come; nothing is written to the slot any more."""
        with self._lock:
            if not self._ended:
                self._arrived.put((expert_idx, slot, error))
            elif slot < 0:
                self._free_staging.put(slot)

    def get(self, timeout_s: float) -> Arrival:
        """The next one; `queue.Empty` if none comes in that time."""
        return self._arrived.get(timeout_s > 0, timeout_s)

    def get_all(self) -> list[Arrival]:
        """What has come and was not got yet."""
        arrived = []
        with suppress(queue.Empty):
            while True:
                arrived.append(self._arrived.get_nowait())
        return arrived

    def end(self) -> None:
        """The step is over."""
        with self._lock:
            self._ended = True
        for _, slot, _ in self.get_all():
            if slot < 0:
                self._free_staging.put(slot)


def patiently(get: Callable[[float], T], shield: InterruptShield) -> T:
    """``get(timeout_s)`` again and again until it does not raise `queue.Empty`; Ctrl-C comes through in between."""
    while True:
        shield.check()
        try:
            return get(PATIENCE_S)
        except queue.Empty:
            continue
