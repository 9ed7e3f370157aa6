"""Host slots that experts only pass through, on their way from the disk to the device."""

from collections import deque

import torch

from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.device_queue import Event
from moe_offload.offload.tiers.emptying import Emptying


class StagingRing:
    """Lends slots of one size. Takes no lock: its owner's guards it.

    A slot is lent for a read, then kept for the copy that empties it; when that is over, which is asked only when
    a slot is wanted, it can be lent again.
    """

    def __init__(self, slab: Slab, num_for_demand: int) -> None:
        """``num_for_demand``: slots that speculation leaves alone, as long as one is left for it."""
        self._slab = slab
        self._speculation_limit = max(1, slab.num_slots - num_for_demand)
        self._free = deque(range(slab.num_slots))
        self._lent: dict[int, bool] = {}  # slot -> whether for speculation
        self._emptying: Emptying[int] = Emptying()

    @property
    def is_pinned(self) -> bool:
        """Whether all of it is page-locked."""
        return self._slab.num_pinned_slots == self._slab.num_slots

    def memory(self, slot: int, size_bytes: int) -> memoryview:
        """The first bytes of a slot, for a read."""
        return self._slab.memory(slot)[:size_bytes]

    def tensor(self, slot: int, size_bytes: int) -> torch.Tensor:
        """The same, for a copy."""
        return self._slab.tensor(slot)[:size_bytes]

    def take(self, *, speculative: bool) -> int | None:
        """A slot to read into, or None if all are in use."""
        for slot in self._emptying.take_over():
            self.give_back(slot)
        if not self._free or (speculative and sum(self._lent.values()) >= self._speculation_limit):
            return None
        slot = self._free.popleft()
        self._lent[slot] = speculative
        return slot

    def give_back(self, slot: int) -> None:
        """Nobody reads or writes the slot any more."""
        del self._lent[slot]
        self._free.append(slot)

    def give_back_after(self, slot: int, event: Event) -> None:
        """A copy reads the slot until the event is over."""
        self._emptying.add(event, slot)

    def oldest_copy(self) -> Event | None:
        """What the next slot waits for, if any copy is under way."""
        return self._emptying.oldest()
