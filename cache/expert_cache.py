"""Which experts are in which slots, who holds them, and who has to go."""

import itertools
import threading
from collections import Counter, deque
from collections.abc import Container, Iterator, Sequence

from moe_offload.cache.lease import Admit, Lease, Placement
from moe_offload.cache.registry import make_policy
from moe_offload.cache.slots import LOADED, LOADING, LayerSlots
from moe_offload.cache.stats import CacheStats, LayerCounters, Phase, PhaseCounters
from moe_offload.errors import ConfigError


class ExpertCache:
    """Decides over experts and slots of all layers; moves no bytes. Every method is thread-safe.

    Whoever acquires or prefetches fetches the bytes of the placements it was given and then says `mark_loaded`, or
    `mark_failed`, or for a prefetch `drop_prefetch`; until one of them, the slot is taken to be written to and is
    never evicted. Slots are numbered from 0 in every layer; only a resize leaves gaps.
    """

    def __init__(
        self,
        num_experts: Sequence[int],
        num_slots: Sequence[int],
        policy: str = "lru",
        *,
        floors: Sequence[int] | None = None,
    ) -> None:
        self._floors = [1] * len(num_experts) if floors is None else list(floors)
        if not len(num_experts) == len(num_slots) == len(self._floors):
            raise ConfigError(
                f"num_experts, num_slots and floors differ in length: "
                f"{len(num_experts)}, {len(num_slots)} and {len(self._floors)} layers"
            )
        self._num_experts = list(num_experts)
        for layer_idx, slots in enumerate(num_slots):
            self._check_num_slots(layer_idx, slots)
        self._policy = make_policy(policy, num_experts)
        self._slots = [LayerSlots(e, s) for e, s in zip(num_experts, num_slots, strict=True)]
        self._counters = [LayerCounters() for _ in num_experts]
        self._lock = threading.Lock()
        self._leases: dict[int, tuple[int, list[int]]] = {}  # lease_id -> layer_idx, slots it pins
        self._lease_ids = itertools.count()
        self._abandoned: deque[int] = deque()
        self.stats = CacheStats(self._lock, self._counters, lambda layer_idx: len(self._slots[layer_idx].speculative))

    @property
    def num_layers(self) -> int:
        return len(self._slots)

    def num_slots(self, layer_idx: int) -> int:
        with self._lock:
            return self._slots[layer_idx].num_slots

    # -- a step --

    def acquire(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        *,
        weights: Sequence[float] | None = None,
        admit: Admit = Admit.ALWAYS,
        phase: Phase = "decode",
    ) -> Lease:
        """Hold the slots of these experts, all different, best first, until `release`.

        Where slots are short, the first come first; ``weights`` are for the policy (see `Policy.touch`).
        """
        with self._lock:
            self._release_abandoned()
            slots = self._slots[layer_idx]
            if expert_ids:
                _check_expert_ids(layer_idx, expert_ids, len(slots.slot_of))
            held: list[int] = []
            lease = Lease(layer_idx, [], [], [], next(self._lease_ids), self._abandoned)
            self._leases[lease.lease_id] = (layer_idx, held)
            missing = []
            for expert_idx in expert_ids:
                slot = slots.slot_of[expert_idx]
                if slot < 0:
                    missing.append(expert_idx)
                    continue
                held.append(slot)
                slots.pin(slot)
                loading = slots.state[slot] is LOADING
                if slot in slots.speculative:
                    self._end_speculation(layer_idx, slot, "late" if loading else "used")
                lease.hits.append(Placement(expert_idx, slot, None, loading))

            if admit is Admit.ALWAYS:
                self._policy.touch(layer_idx, expert_ids, weights)
            counters = self._counters[layer_idx].decode if phase == "decode" else self._counters[layer_idx].prefill
            if missing:
                self._admit_missing(lease, missing, held, admit, counters)
            if admit is Admit.IF_HOTTER:
                self._policy.touch(layer_idx, expert_ids, weights)
            slots.num_events += 1
            slots.last_step = frozenset(expert_ids)
            counters.requests += len(expert_ids)
            counters.hits += len(lease.hits)
            counters.misses += len(lease.misses)
            counters.bypassed += len(lease.bypassed)
            return lease

    def _admit_missing(
        self, lease: Lease, missing: list[int], held: list[int], admit: Admit, counters: PhaseCounters
    ) -> None:
        layer_idx, slots = lease.layer_idx, self._slots[lease.layer_idx]
        scores = self._policy.scores(layer_idx)
        candidates: Iterator[int] = iter(())
        if len(missing) > len(slots.empty):
            candidates = slots.coldest_first(scores)
            if admit is Admit.IF_HOTTER:
                missing = sorted(missing, key=scores.__getitem__, reverse=True)
        for rank, expert_idx in enumerate(missing):
            victim = None
            if slots.empty:
                slot = slots.empty.pop()
            else:
                slot = next(candidates, -1)
                if slot < 0 or (admit is Admit.IF_HOTTER and scores[slots.expert_in[slot]] >= scores[expert_idx]):
                    # Victims only get hotter and newcomers colder from here on: nobody after this one fits either.
                    lease.bypassed.extend(missing[rank:])
                    return
                victim = self._evict(layer_idx, slot)
                counters.evictions += 1
            held.append(slot)
            slots.fill(slot, expert_idx)
            slots.pin(slot)
            lease.misses.append(Placement(expert_idx, slot, victim, True))

    def release(self, lease: Lease) -> None:
        """Let go of a lease's slots; again is harmless."""
        with self._lock:
            self._release_abandoned()
            self._release(lease.lease_id)
            lease.is_open = False

    def _release(self, lease_id: int) -> None:
        layer_idx, held = self._leases.pop(lease_id, (0, []))
        self._slots[layer_idx].unpin(held)

    def _release_abandoned(self) -> None:
        while self._abandoned:
            self._release(self._abandoned[0])
            self._abandoned.popleft()

    def new_sequence(self) -> None:
        """Tell the policy that another text begins."""
        with self._lock:
            self._policy.new_sequence()

    # -- the bytes --

    def mark_loaded(self, layer_idx: int, expert_idx: int) -> bool:
        """All bytes are in the slot. False if the expert is not waiting for any."""
        with self._lock:
            slots = self._slots[layer_idx]
            slot = slots.slot_of[expert_idx]
            if slot < 0 or slots.state[slot] is not LOADING:
                return False
            slots.loaded(slot)
            return True

    def mark_failed(self, layer_idx: int, expert_idx: int) -> bool:
        """The bytes did not come, or are bad, and nobody writes to the slot any more. False if it is not resident.

        The expert is gone at once; leases that hold the slot keep it until their release.
        """
        with self._lock:
            slot = self._slots[layer_idx].slot_of[expert_idx]
            if slot < 0:
                return False
            self._fail(layer_idx, slot)
            return True

    def _fail(self, layer_idx: int, slot: int) -> None:
        if slot in self._slots[layer_idx].speculative:
            self._end_speculation(layer_idx, slot, "wasted")
        self._slots[layer_idx].failed(slot)

    def _evict(self, layer_idx: int, slot: int) -> int:
        if slot in self._slots[layer_idx].speculative:
            self._end_speculation(layer_idx, slot, "wasted")
        return self._slots[layer_idx].evict(slot)

    # -- prefetch --

    def admit_prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> list[Placement]:
        """Slots for those of the experts that are not resident, likeliest first, as far as slots can be had.

        Evicts nothing that is pinned, that the layer's last step used, or that was prefetched since that step.
        """
        with self._lock:
            self._release_abandoned()
            slots, counters = self._slots[layer_idx], self._counters[layer_idx].prefetch
            if expert_ids:
                _check_expert_ids(layer_idx, expert_ids, len(slots.slot_of))
            missing = [expert_idx for expert_idx in expert_ids if slots.slot_of[expert_idx] < 0]
            candidates: Iterator[int] = iter(())
            if len(missing) > len(slots.empty):
                candidates = slots.coldest_first(self._policy.scores(layer_idx))
            placements = []
            for expert_idx in missing:
                victim = None
                if slots.empty:
                    slot = slots.empty.pop()
                else:
                    slot = next((slot for slot in candidates if self._may_make_way(slots, slot)), -1)
                    if slot < 0:
                        break
                    victim = self._evict(layer_idx, slot)
                    counters.evictions += 1
                slots.fill(slot, expert_idx)
                slots.speculative[slot] = slots.num_events
                counters.issued += 1
                placements.append(Placement(expert_idx, slot, victim, True))
            return placements

    @staticmethod
    def _may_make_way(slots: LayerSlots, slot: int) -> bool:
        return slots.speculative.get(slot, -1) != slots.num_events and int(slots.expert_in[slot]) not in slots.last_step

    def drop_prefetch(self, layer_idx: int, expert_idx: int) -> bool:
        """A prefetch was cancelled before its bytes came, and nobody writes to the slot any more.

        False, and nothing changes, if there is no such prefetch: a step has asked for the expert meanwhile (then
        somebody waits for the bytes), or they have come.
        """
        with self._lock:
            slots = self._slots[layer_idx]
            slot = slots.slot_of[expert_idx]
            if slot not in slots.speculative or slots.state[slot] is not LOADING:
                return False
            self._fail(layer_idx, slot)
            return True

    def _end_speculation(self, layer_idx: int, slot: int, fate: str) -> None:
        del self._slots[layer_idx].speculative[slot]
        counters = self._counters[layer_idx].prefetch
        if fate == "used":
            counters.used += 1
        elif fate == "late":
            counters.late += 1
        else:
            counters.wasted += 1

    # -- the hot set --

    def resident(self, layer_idx: int) -> dict[int, int]:
        """Expert -> slot of those whose bytes are there."""
        with self._lock:
            slots = self._slots[layer_idx]
            return {e: slot for e, slot in enumerate(slots.slot_of) if slot >= 0 and slots.state[slot] is LOADED}

    def hot_set(self) -> list[list[int]]:
        """The loaded experts of every layer, hottest first: what `admit_warm` wants after a restart."""
        with self._lock:
            hot = []
            for layer_idx, slots in enumerate(self._slots):
                scores = self._policy.scores(layer_idx)
                loaded = [e for e, slot in enumerate(slots.slot_of) if slot >= 0 and slots.state[slot] is LOADED]
                hot.append(sorted(loaded, key=scores.__getitem__, reverse=True))
            return hot

    def admit_warm(self, layer_idx: int, expert_ids: Sequence[int]) -> list[Placement]:
        """Slots for the first of these that are not resident, hottest first, as long as there are empty ones."""
        with self._lock:
            self._release_abandoned()
            slots = self._slots[layer_idx]
            if expert_ids:
                _check_expert_ids(layer_idx, expert_ids, len(slots.slot_of))
            missing = [expert_idx for expert_idx in expert_ids if slots.slot_of[expert_idx] < 0][: len(slots.empty)]
            placements = []
            for expert_idx in missing:
                slot = slots.empty.pop()
                slots.fill(slot, expert_idx)
                placements.append(Placement(expert_idx, slot, None, True))
            self._policy.touch(layer_idx, missing, None)
            return placements

    # -- size --

    def resize(self, layer_idx: int, num_slots: int) -> list[int]:
        """Change the number of a layer's slots; returns those that were added or given back.

        Shrinking gives back empty slots, then the coldest; those that are held or loading stay, so it may fall short:
        call again when steps have ended. ConfigError below the layer's floor or above its number of experts.
        """
        self._check_num_slots(layer_idx, num_slots)
        with self._lock:
            self._release_abandoned()
            slots = self._slots[layer_idx]
            num_excess = slots.num_slots - num_slots
            if num_excess <= 0:
                return slots.grow(-num_excess)
            given_back = sorted(slots.empty, reverse=True)[:num_excess]
            for slot in given_back:
                slots.empty.remove(slot)
                slots.retire(slot)
            for slot in itertools.islice(
                slots.coldest_first(self._policy.scores(layer_idx)), num_excess - len(given_back)
            ):
                self._evict(layer_idx, slot)
                slots.retire(slot)
                given_back.append(slot)
            return given_back

    def _check_num_slots(self, layer_idx: int, num_slots: int) -> None:
        floor, num_experts = max(1, self._floors[layer_idx]), self._num_experts[layer_idx]
        if not floor <= num_slots <= num_experts:
            raise ConfigError(
                f"layer {layer_idx}: {num_slots} expert slots; it needs at least {floor} "
                f"and has use for at most {num_experts}"
            )

    # -- consistency --

    def recover(self, in_flight: Container[tuple[int, int]]) -> None:
        """Put things right after an interrupt (Ctrl-C) that may have struck anywhere, in here too.

        ``in_flight``: the (layer_idx, expert_idx) whose bytes somebody is still fetching. Experts of released leases
        that wait for bytes which nobody fetches lose their slots.
        """
        with self._lock:
            while self._abandoned:
                self._leases.pop(self._abandoned[0], None)
                self._abandoned.popleft()
            pins: list[Counter[int]] = [Counter() for _ in self._slots]
            for layer_idx, held in self._leases.values():
                pins[layer_idx].update(held)
            for layer_idx, slots in enumerate(self._slots):
                slots.rebuild(pins[layer_idx])
                for expert_idx, slot in enumerate(slots.slot_of):
                    waits = slot >= 0 and slots.state[slot] is LOADING and not slots.pins[slot]
                    if waits and (layer_idx, expert_idx) not in in_flight:
                        self._fail(layer_idx, slot)
                counters = self._counters[layer_idx]
                for phase in (counters.decode, counters.prefill):
                    phase.requests = phase.hits + phase.misses + phase.bypassed
                prefetch = counters.prefetch
                prefetch.issued = prefetch.used + prefetch.late + prefetch.wasted + len(slots.speculative)

    def check_integrity(self) -> None:
        """AssertionError, with details, if anything contradicts itself."""
        with self._lock:
            self._release_abandoned()
            pins: list[Counter[int]] = [Counter() for _ in self._slots]
            for layer_idx, held in self._leases.values():
                pins[layer_idx].update(held)
            for layer_idx, slots in enumerate(self._slots):
                try:
                    self._check_layer(layer_idx, slots, pins[layer_idx])
                except AssertionError as error:
                    raise AssertionError(f"layer {layer_idx}: {error}") from None

    def _check_layer(self, layer_idx: int, slots: LayerSlots, pins: Counter[int]) -> None:
        slots.check_integrity()
        assert slots.num_slots >= max(1, self._floors[layer_idx]), f"{slots.num_slots} slots, below the floor"
        counted = [pins[slot] for slot in range(len(slots.state))]
        assert slots.pins == counted, f"pins {slots.pins}, but the leases hold {counted}"
        counters = self._counters[layer_idx]
        for phase in (counters.decode, counters.prefill):
            assert phase.hits + phase.misses + phase.bypassed == phase.requests, f"counts do not add up: {phase}"
        prefetch, num_open = counters.prefetch, len(slots.speculative)
        settled = prefetch.used + prefetch.late + prefetch.wasted
        assert settled + num_open == prefetch.issued, f"prefetches do not add up: {prefetch} and {num_open} open"


def _check_expert_ids(layer_idx: int, expert_ids: Sequence[int], num_experts: int) -> None:
    if len(set(expert_ids)) != len(expert_ids) or min(expert_ids) < 0 or max(expert_ids) >= num_experts:
        raise ConfigError(
            f"layer {layer_idx}: expert ids {list(expert_ids)} must be different and between 0 and {num_experts - 1}"
        )
