"""Experts of one layer that were prefetched and not asked for yet."""

from collections.abc import Mapping, Sequence

from moe_offload.cache.counts import PrefetchCounters


class Speculation:
    """Follows every prefetch of a layer to its end: used, late or wasted. Takes no lock."""

    def __init__(self) -> None:
        self.counters = PrefetchCounters()
        self._issued_at: dict[int, int] = {}  # slot -> the layer's step count when it was prefetched
        self._num_steps = 0
        self._last_step: frozenset[int] = frozenset()

    def __contains__(self, slot: int) -> bool:
        return slot in self._issued_at

    def __len__(self) -> int:
        return len(self._issued_at)

    def begin(self, slot: int) -> None:
        self._issued_at[slot] = self._num_steps
        self.counters.issued += 1

    def end_in_use(self, slot: int, *, late: bool) -> None:
        """A step asked for the expert, before its bytes had come (late) or after."""
        del self._issued_at[slot]
        if late:
            self.counters.late += 1
        else:
            self.counters.used += 1

    def end_wasted(self, slot: int) -> None:
        """The slot loses its expert, which need not have been prefetched."""
        if self._issued_at.pop(slot, None) is not None:
            self.counters.wasted += 1

    def renumber(self, numbers: Mapping[int, int]) -> None:
        """The experts have moved to other slots."""
        self._issued_at = {numbers[slot]: step for slot, step in self._issued_at.items()}

    def step(self, expert_ids: Sequence[int]) -> None:
        self._num_steps += 1
        self._last_step = frozenset(expert_ids)

    def may_displace(self, slot: int, expert_idx: int) -> bool:
        """Whether a prefetch may take the slot: not from what the last step used, nor from a prefetch made since."""
        return self._issued_at.get(slot, -1) != self._num_steps and expert_idx not in self._last_step

    def reset_counters(self) -> None:
        self.counters = PrefetchCounters(issued=len(self))

    def rebuild(self, unused: set[int]) -> None:
        """After an interrupt: only these slots hold an expert that nobody uses."""
        self._issued_at = {slot: step for slot, step in self._issued_at.items() if slot in unused}
        counters = self.counters
        counters.issued = counters.used + counters.late + counters.wasted + len(self)

    def check_integrity(self, unused: set[int]) -> None:
        assert self._issued_at.keys() <= unused, f"speculative slots {self._issued_at} are empty or in use"
        settled = self.counters.used + self.counters.late + self.counters.wasted
        assert settled + len(self) == self.counters.issued, f"{self.counters} and {len(self)} open do not add up"
