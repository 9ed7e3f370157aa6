"""One layer: who gets a slot, who loses it, and what is counted of it."""

from collections import Counter
from collections.abc import Container, Iterator, Sequence

from moe_offload.cache.counts import LayerStats, Phase, PhaseCounters
from moe_offload.cache.lease import Placement
from moe_offload.cache.slots import LOADING, LayerSlots
from moe_offload.cache.speculation import Speculation


class Layer:
    """Decisions over one layer's slots, given the policy's scores. Takes no lock."""

    def __init__(self, num_experts: int, num_slots: int) -> None:
        self.slots = LayerSlots(num_experts, num_slots)
        self.speculation = Speculation()
        self._phases: dict[Phase, PhaseCounters] = {"decode": PhaseCounters(), "prefill": PhaseCounters()}

    # -- a step --

    def pin_resident(
        self, expert_ids: Sequence[int], held: list[int], hits: list[Placement], prefetched: list[int]
    ) -> list[int]:
        """Pin those that have a slot (appended to the lists); returns the others."""
        slots, missing = self.slots, []
        for expert_idx in expert_ids:
            slot = slots.slot_of[expert_idx]
            if slot < 0:
                missing.append(expert_idx)
                continue
            held.append(slot)
            slots.pin(slot)
            loading = slots.state[slot] is LOADING
            if slot in self.speculation:
                self.speculation.end_in_use(slot, late=loading)
                prefetched.append(expert_idx)
            hits.append(Placement(expert_idx, slot, None, loading))
        return missing

    def admit_missing(
        self,
        missing: list[int],
        held: list[int],
        misses: list[Placement],
        scores: Sequence[float],
        only_if_hotter: bool,
        phase: Phase,
        most: int | None = None,
    ) -> list[int]:
        """Pinned slots for ``most`` of the missing, as far as there are any; returns those that get none."""
        slots = self.slots
        if most is not None and most < len(missing):
            missing = sorted(missing, key=scores.__getitem__, reverse=True)
            refused = missing[most:]
            return self.admit_missing(missing[:most], held, misses, scores, only_if_hotter, phase) + refused
        coldest: Iterator[int] = iter(())
        if len(missing) > len(slots.empty):
            coldest = iter(slots.coldest_first(scores))
            if only_if_hotter:
                missing = sorted(missing, key=scores.__getitem__, reverse=True)
        for rank, expert_idx in enumerate(missing):
            victim = None
            if slots.empty:
                slot = slots.empty.pop()
            else:
                victim = next(coldest, None)
                if victim is None or (only_if_hotter and scores[victim] >= scores[expert_idx]):
                    # From here on victims only get hotter and newcomers colder: nobody after this one fits either.
                    return missing[rank:]
                slot = self._evict(victim)
                self._phases[phase].evictions += 1
            held.append(slot)
            slots.fill(slot, expert_idx)
            slots.pin(slot)
            misses.append(Placement(expert_idx, slot, victim, True))
        return []

    def end_request(self, expert_ids: Sequence[int], num_hits: int, num_misses: int, phase: Phase) -> None:
        """Count a step, and remember it for the prefetches that follow."""
        self.speculation.step(expert_ids)
        counters = self._phases[phase]
        counters.requests += len(expert_ids)
        counters.hits += num_hits
        counters.misses += num_misses
        counters.bypassed += len(expert_ids) - num_hits - num_misses

    # -- the bytes --

    def is_unheld(self, expert_idx: int) -> bool:
        """Whether the expert's bytes are on their way to a slot that no lease holds."""
        slot = self.slots.slot_of[expert_idx]
        return slot >= 0 and self.slots.state[slot] is LOADING and not self.slots.pins[slot]

    def mark_loaded(self, expert_idx: int) -> bool:
        slot = self.slots.slot_of[expert_idx]
        if slot < 0 or self.slots.state[slot] is not LOADING:
            return False
        self.slots.loaded(slot)
        return True

    def mark_failed(self, expert_idx: int) -> bool:
        slot = self.slots.slot_of[expert_idx]
        if slot < 0:
            return False
        self.speculation.end_wasted(slot)
        self.slots.failed(slot)
        return True

    def drop_prefetch(self, expert_idx: int) -> bool:
        slot = self.slots.slot_of[expert_idx]
        if slot not in self.speculation or self.slots.state[slot] is not LOADING:
            return False
        return self.mark_failed(expert_idx)

    def _evict(self, expert_idx: int) -> int:
        self.speculation.end_wasted(self.slots.slot_of[expert_idx])
        return self.slots.evict(expert_idx)

    # -- without a step --

    def admit_prefetch(self, expert_ids: Sequence[int], scores: Sequence[float], evict: bool) -> list[Placement]:
        slots, speculation = self.slots, self.speculation
        missing = [expert_idx for expert_idx in expert_ids if slots.slot_of[expert_idx] < 0]
        coldest: Iterator[int] = iter(())
        if evict and len(missing) > len(slots.empty):
            coldest = iter(slots.coldest_first(scores))
        placements: list[Placement] = []
        for expert_idx in missing:
            victim = None
            if slots.empty:
                slot = slots.empty.pop()
            else:
                victim = next((e for e in coldest if speculation.may_displace(slots.slot_of[e], e)), None)
                if victim is None:
                    break
                slot = self._evict(victim)
                speculation.counters.evictions += 1
            slots.fill(slot, expert_idx)
            speculation.begin(slot)
            placements.append(Placement(expert_idx, slot, victim, True))
        return placements

    def admit_warm(self, expert_ids: Sequence[int]) -> list[Placement]:
        slots = self.slots
        missing = [expert_idx for expert_idx in expert_ids if slots.slot_of[expert_idx] < 0]
        placements = []
        for expert_idx in missing[: len(slots.empty)]:
            slot = slots.empty.pop()
            slots.fill(slot, expert_idx)
            placements.append(Placement(expert_idx, slot, None, True))
        return placements

    def resize(self, num_slots: int, scores: Sequence[float]) -> list[int]:
        slots = self.slots
        num_excess = slots.num_slots - num_slots
        if num_excess <= 0:
            return slots.grow(-num_excess)
        given_back = sorted(slots.empty, reverse=True)[:num_excess]
        for slot in given_back:
            slots.empty.remove(slot)
            slots.retire(slot)
        for victim in slots.coldest_first(scores)[: num_excess - len(given_back)]:
            slot = self._evict(victim)
            slots.retire(slot)
            given_back.append(slot)
        return given_back

    def repack(self, num_slots: int, scores: Sequence[float]) -> dict[int, int]:
        """As `resize`, of a quiet layer, leaving no gaps; old number of every slot that has an expert -> new."""
        slots = self.slots
        num_loaded = len(slots.loaded_experts())
        for victim in slots.coldest_first(scores)[: max(0, num_loaded - num_slots)]:
            self._evict(victim)
        numbers = slots.renumber(num_slots)
        self.speculation.renumber(numbers)
        return numbers

    # -- counts and consistency --

    def freeze_counts(self) -> LayerStats:
        return LayerStats(
            self._phases["decode"].freeze(), self._phases["prefill"].freeze(), self.speculation.counters.freeze()
        )

    def num_missed(self, phase: Phase) -> int:
        counters = self._phases[phase]
        return counters.misses + counters.bypassed

    def reset_counts(self) -> None:
        self._phases = {"decode": PhaseCounters(), "prefill": PhaseCounters()}
        self.speculation.reset_counters()

    def rebuild(self, pins: Counter[int], in_flight: Container[int]) -> None:
        """After an interrupt: see `ExpertCache.recover`."""
        self.slots.rebuild(pins)
        self.speculation.rebuild(self.slots.unused())
        for expert_idx in self.slots.orphans():
            if expert_idx not in in_flight:
                self.mark_failed(expert_idx)
        for counters in self._phases.values():
            counters.requests = counters.hits + counters.misses + counters.bypassed

    def check_integrity(self, pins: Counter[int]) -> None:
        """AssertionError if anything contradicts itself, or the pins that the leases hold."""
        self.slots.check_integrity()
        held = [pins[slot] for slot in range(len(self.slots.pins))]
        assert self.slots.pins == held, f"pins {self.slots.pins}, but the leases hold {held}"
        self.speculation.check_integrity(self.slots.unused())
        for counters in self._phases.values():
            assert counters.hits + counters.misses + counters.bypassed == counters.requests, f"{counters} do not add up"
