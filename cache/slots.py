"""The slots of one layer: which expert is in which, and what may happen to it."""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum
from itertools import compress


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
        self.expert_in = [-1] * num_slots
        self.evictable = [False] * num_slots  # loaded and not pinned
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

    def is_loaded(self, expert_idx: int) -> bool:
        """Whether the expert's bytes are there."""
        slot = self.slot_of[expert_idx]
        return slot >= 0 and self.state[slot] is LOADED

    def resident_by_slot(self) -> list[int]:
        """The expert whose bytes are in each slot, -1 for none; empty if there are no such."""
        experts = [e if state is LOADED else -1 for e, state in zip(self.expert_in, self.state, strict=True)]
        return experts if max(experts, default=-1) >= 0 else []

    def orphans(self) -> list[int]:
        """Experts that wait for their bytes while no step waits for them."""
        return [self.expert_in[slot] for slot in self.unused() if self.state[slot] is LOADING]

    def coldest_first(self, scores: Sequence[float]) -> list[int]:
        """The experts in evictable slots, by score; of equals, the one in the lower slot first."""
        return sorted(compress(self.expert_in, self.evictable), key=scores.__getitem__)

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

    def evict(self, expert_idx: int) -> int:
        """Take its slot, an evictable one, from the expert; the caller fills or retires the slot, which is returned."""
        slot = self.slot_of[expert_idx]
        self.slot_of[expert_idx] = -1
        self.evictable[slot] = False
        self.state[slot] = EMPTY
        self.expert_in[slot] = -1
        return slot

    def loaded(self, slot: int) -> None:
        self.state[slot] = LOADED
        self.evictable[slot] = not self.pins[slot]

    def failed(self, slot: int) -> None:
        """Take the slot from its expert: at once if nobody holds it, else when the last lease lets go."""
        self.slot_of[self.expert_in[slot]] = -1
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
        self.expert_in += [-1] * num_appended
        self.evictable += [False] * num_appended
        for slot in reversed(added):
            self._set_empty(slot)
        return added

    @property
    def is_quiet(self) -> bool:
        """Whether nobody holds a slot, or brings bytes to one."""
        return not any(self.pins) and not any(state in (LOADING, FAILED) for state in self.state)

    def renumber(self, num_slots: int) -> dict[int, int]:
        """Let there be slots 0 to ``num_slots`` - 1, of a quiet layer with no more experts; old number -> new."""
        experts = {slot: expert_idx for expert_idx, slot in enumerate(self.slot_of) if slot >= 0}
        free = iter([slot for slot in range(num_slots) if slot not in experts])
        numbers = {slot: slot if slot < num_slots else next(free) for slot in sorted(experts)}
        self.expert_in = [-1] * num_slots
        self.state = [EMPTY] * num_slots
        self.pins = [0] * num_slots
        for old, new in numbers.items():
            self.slot_of[experts[old]] = new
            self.expert_in[new] = experts[old]
            self.state[new] = LOADED
        self.evictable = [state is LOADED for state in self.state]
        self.empty = [slot for slot in reversed(range(num_slots)) if self.state[slot] is EMPTY]
        return numbers

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
        self.expert_in = [resident.get(slot, -1) for slot in range(num_numbers)]
        self.empty = []
        for slot in reversed(range(num_numbers)):
            if slot in resident or self.state[slot] is RETIRED:
                continue
            if self.pins[slot]:
                self.state[slot] = FAILED
            else:
                self._set_empty(slot)
        self.evictable = [s is LOADED and not p for s, p in zip(self.state, self.pins, strict=True)]

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
