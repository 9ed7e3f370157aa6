"""The slots of one layer: which expert is in which, and what may happen to it."""

from collections import Counter
from collections.abc import Iterable, Iterator
from enum import Enum

import numpy as np
from numpy.typing import NDArray


class SlotState(Enum):
    """The life of a slot.

    EMPTY -> LOADING -> LOADED -> EMPTY again by eviction; a failed load ends EMPTY, by way of FAILED while a lease
    still holds the slot; RETIRED slots were given back by a resize and belong to nobody.
    """

    EMPTY = "empty"
    LOADING = "loading"
    LOADED = "loaded"
    FAILED = "failed"
    RETIRED = "retired"


EMPTY, LOADING, LOADED, FAILED, RETIRED = SlotState


class LayerSlots:
    """Slots of one layer. Knows no policy, counts nothing and takes no lock.

    A loading slot is never evicted, pinned or not: somebody may be writing into it. Writes are ordered so that an
    interrupt between any two of them may lose a slot until `rebuild`, but never shows an expert in the wrong one.
    """

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.slot_of = [-1] * num_experts
        self.state = [EMPTY] * num_slots
        self.pins = [0] * num_slots
        self.expert_in: NDArray[np.int64] = np.full(num_slots, -1, dtype=np.int64)
        self.evictable: NDArray[np.bool_] = np.zeros(num_slots, dtype=np.bool_)  # loaded and not pinned
        self.empty = list(range(num_slots - 1, -1, -1))

    @property
    def num_slots(self) -> int:
        return len(self.state) - self.state.count(RETIRED)

    def unused(self) -> set[int]:
        """The slots that hold an expert and no pin."""
        return {slot for slot in self.slot_of if slot >= 0 and not self.pins[slot]}

    def loaded_experts(self) -> list[int]:
        """Those whose bytes are there."""
        return [expert_idx for expert_idx, slot in enumerate(self.slot_of) if slot >= 0 and self.state[slot] is LOADED]

    def orphans(self) -> list[int]:
        """Experts that wait for their bytes while no step waits for them."""
        return [int(self.expert_in[slot]) for slot in self.unused() if self.state[slot] is LOADING]

    def coldest_first(self, scores: NDArray[np.float64]) -> Iterator[int]:
        """The evictable slots, by the scores of their experts; of equals, the lower slot first."""
        candidates = self.evictable.nonzero()[0]
        order = scores[self.expert_in[candidates]].argsort(kind="stable")
        return iter(candidates[order].tolist())

    def pin(self, slot: int) -> None:
        self.evictable[slot] = False
        self.pins[slot] += 1

    def unpin(self, slots: Iterable[int]) -> None:
        pins, state = self.pins, self.state
        for slot in slots:
            pins[slot] -= 1
            if not pins[slot]:
                if state[slot] is LOADED:
                    self.evictable[slot] = True
                elif state[slot] is FAILED:
                    self._set_empty(slot)

    def fill(self, slot: int, expert_idx: int) -> None:
        """Give an empty slot to an expert whose bytes are to come."""
        self.expert_in[slot] = expert_idx
        self.state[slot] = LOADING
        self.slot_of[expert_idx] = slot

    def evict(self, slot: int) -> int:
        """Take an evictable slot from its expert, which is returned; the caller fills or retires the slot."""
        victim = int(self.expert_in[slot])
        self.slot_of[victim] = -1
        self.evictable[slot] = False
        self.state[slot] = EMPTY
        self.expert_in[slot] = -1
        return victim

    def loaded(self, slot: int) -> None:
        self.state[slot] = LOADED
        self.evictable[slot] = not self.pins[slot]

    def failed(self, slot: int) -> None:
        """Take the slot from its expert: at once if nobody holds it, else when the last lease lets go."""
        self.slot_of[int(self.expert_in[slot])] = -1
        self.evictable[slot] = False
        self.expert_in[slot] = -1
        if self.pins[slot]:
            self.state[slot] = FAILED
        else:
            self._set_empty(slot)

    def grow(self, num_new: int) -> list[int]:
        """Add slots, retired numbers first; returns theirs."""
        retired = [slot for slot, state in enumerate(self.state) if state is RETIRED][:num_new]
        first = len(self.state)
        added = retired + list(range(first, first + num_new - len(retired)))
        num_appended = len(added) - len(retired)
        self.state += [RETIRED] * num_appended
        self.pins += [0] * num_appended
        self.expert_in = np.concatenate([self.expert_in, np.full(num_appended, -1, dtype=np.int64)])
        self.evictable = np.concatenate([self.evictable, np.zeros(num_appended, dtype=np.bool_)])
        for slot in reversed(added):
            self._set_empty(slot)
        return added

    def retire(self, slot: int) -> None:
        """Give back a slot that holds nothing and is not in the list of empty ones."""
        self.state[slot] = RETIRED

    def _set_empty(self, slot: int) -> None:
        self.state[slot] = EMPTY
        self.empty.append(slot)

    def rebuild(self, pins: Counter[int]) -> None:
        """Derive everything again from where the experts are, what state that slot is in, and who pins it."""
        resident = {slot: expert_idx for expert_idx, slot in enumerate(self.slot_of) if slot >= 0}
        num_numbers = len(self.state)
        self.pins = [pins[slot] for slot in range(num_numbers)]
        self.expert_in = np.array([resident.get(slot, -1) for slot in range(num_numbers)], dtype=np.int64)
        self.empty = []
        for slot in reversed(range(num_numbers)):
            if slot in resident or self.state[slot] is RETIRED:
                continue
            if self.pins[slot]:
                self.state[slot] = FAILED
            else:
                self._set_empty(slot)
        self.evictable = np.array([s is LOADED and not p for s, p in zip(self.state, self.pins, strict=True)])

    def check_integrity(self) -> None:
        """AssertionError if the slots contradict themselves."""
        resident = {slot: expert_idx for expert_idx, slot in enumerate(self.slot_of) if slot >= 0}
        assert len(resident) == sum(slot >= 0 for slot in self.slot_of), f"two experts share a slot: {self.slot_of}"
        assert len(self.state) == len(self.pins) == len(self.expert_in) == len(self.evictable), "ragged slot tables"
        for slot, state in enumerate(self.state):
            told = f"slot {slot} ({state.value}, pins {self.pins[slot]}, expert {self.expert_in[slot]})"
            assert self.expert_in[slot] == resident.get(slot, -1), f"{told} is expert {resident.get(slot, -1)}'s"
            assert (state in (LOADING, LOADED)) == (slot in resident), f"{told} contradicts its state"
            assert self.pins[slot] >= 0, f"{told} has negative pins"
            assert not (self.pins[slot] and state in (EMPTY, RETIRED)), f"{told} is pinned but holds nothing"
            assert self.pins[slot] or state is not FAILED, f"{told} failed and was not emptied"
            assert self.evictable[slot] == (state is LOADED and not self.pins[slot]), (
                f"{told} has a wrong evictable flag"
            )
            assert self.empty.count(slot) == (state is EMPTY), f"{told} is wrong in the list of empty slots"
