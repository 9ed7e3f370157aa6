"""Experts that a step waits for, and how it waits."""

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.experts.landing import MIN_CHUNKS, StepAhead
from moe_offload.offload.streaming.reader import Read
from moe_offload.offload.tiers.compute_tier import Transfer
from moe_offload.offload.tiers.lender import LentExpert

Place = int | LentExpert | None
"""A slot, host memory that was lent, or nowhere where it went wrong before it was."""
Arrival = tuple[int, Place, BaseException | None]  # expert_idx, where it is, what went wrong
# How long to wait before looking whether the user has pressed Ctrl-C.
PATIENCE_S = 0.1
T = TypeVar("T")


class Arrivals:
    """What has arrived for one step. When the step ends, early or not, staging slots and what was lent go back."""

    def __init__(self, free_staging: "queue.SimpleQueue[int]", ahead: StepAhead | None = None) -> None:
        """``ahead``: what computes experts that have come in part, if anything does."""
        self.ahead = ahead
        self._free_staging = free_staging
        self._landing: dict[int, tuple[int, Read]] = {}  # expert_idx -> its slot, and what fills that
        self._arrived: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._ended = self._told = False

    def put(self, expert_idx: int, place: Place, error: BaseException | None) -> None:
        """An expert's bytes are there, or will not come; nothing is written there any more."""
        with self._lock:
            if not self._ended:
                self._arrived.put((expert_idx, place, error))
                return
        self.give_back(place)

    def watch(self, expert_idx: int, slot: int, transfer: Transfer | None) -> None:
        """Let the step hear of what has come of an expert, where it is read straight into its slot in many chunks."""
        if self.ahead is not None and isinstance(transfer, Read) and len(transfer.order) >= MIN_CHUNKS:
            self._landing[expert_idx] = slot, transfer
            transfer.watch(self._landed)

    def landing(self) -> list[tuple[int, int, Read]]:
        """Experts that have come in part: each with its slot and what fills that, the first to be whole first."""
        return [(expert_idx, slot, read) for expert_idx, (slot, read) in self._landing.items() if read.num_landed]

    def has_landed(self, expert_idx: int) -> None:
        """The expert is whole and verified; what was computed of it counts if it came at the first try."""
        _, read = self._landing.pop(expert_idx, (0, None))
        if read is not None and self.ahead is not None and (read.error is not None or read.rereads):
            self.ahead.forget(expert_idx)

    def _landed(self) -> None:
        with self._lock:
            if not (self._ended or self._told):
                self._told = True
                self._arrived.put(None)

    def give_back(self, place: Place) -> None:
        """The step is done with it; a cache's slot is held by its lease."""
        if isinstance(place, LentExpert):
            place.give_back()
        elif place is not None and place < 0:
            self._free_staging.put(place)

    def get(self, timeout_s: float) -> Arrival | None:
        """The next one, or None where more has come of those that are `landing`; `queue.Empty` if nothing comes."""
        arrival = self._arrived.get(timeout_s > 0, timeout_s)
        if arrival is None:
            self._told = False
        return arrival

    def get_all(self) -> list[Arrival]:
        """What has come and was not got yet."""
        arrived = []
        with suppress(queue.Empty):
            while True:
                if (arrival := self.get(0)) is not None:
                    arrived.append(arrival)
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
