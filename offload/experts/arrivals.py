"""Experts that a step waits for, and how it waits."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.tiers.lender import LentExpert

Place = int | LentExpert | None
"""A slot, host memory that was lent, or nowhere where it went wrong before it was."""
Arrival = tuple[int, Place, BaseException | None]  # expert_idx, where it is, what went wrong
# How long to wait before looking whether the user has pressed Ctrl-C.
PATIENCE_S = 0.1
T = TypeVar("T")


class Arrivals:
    """What has arrived for one step. When the step ends, early or not, staging slots and what was lent go back."""

    def __init__(self, free_staging: "queue.SimpleQueue[int]") -> None:
        self._free_staging = free_staging
        self._arrived: queue.SimpleQueue[Arrival] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = False

    def put(self, expert_idx: int, place: Place, error: BaseException | None) -> None:
        """An expert's bytes are there, or will not come; nothing is written there any more."""
        with self._lock:
            if not self._ended:
                self._arrived.put((expert_idx, place, error))
                return
        self.give_back(place)

    def give_back(self, place: Place) -> None:
        """The step is done with it; a cache's slot is held by its lease."""
        if isinstance(place, LentExpert):
            place.give_back()
        elif place is not None and place < 0:
            self._free_staging.put(place)

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
        for _, place, _ in self.get_all():
            self.give_back(place)


def patiently(get: Callable[[float], T], shield: InterruptShield) -> T:
    """``get(timeout_s)`` again and again until it does not raise `queue.Empty`; Ctrl-C comes through in between."""
    while True:
        shield.check()
        try:
            return get(PATIENCE_S)
        except queue.Empty:
            continue
