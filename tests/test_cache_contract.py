"""Every policy under random operations: no wrong weights, no lost slots, counts that add up."""

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from moe_offload.cache import Admit, ExpertCache, Lease, Placement, PrefetchCounts, policy_names

NUM_EXPERTS = [6, 9]
NUM_SLOTS = [2, 5]
FLOORS = [2, 3]

layers = st.integers(0, 1)
expert_lists = st.lists(st.integers(0, 8), unique=True, max_size=7)


class CacheMachine(RuleBasedStateMachine):
    """The cache beside a mover that writes expert numbers, instead of weights, into slots."""

    policy = ""

    def __init__(self) -> None:
        super().__init__()
        self.cache = ExpertCache(NUM_EXPERTS, NUM_SLOTS, self.policy, floors=FLOORS)
        self.slots = [set(range(n)) for n in NUM_SLOTS]
        self.content: dict[tuple[int, int], int] = {}  # (layer_idx, slot) -> expert whose bytes are whole there
        self.in_flight: dict[tuple[int, int], int] = {}  # (layer_idx, expert_idx) -> slot being written to
        self.leases: list[tuple[Lease, dict[int, int]]] = []  # with the experts it may rely on, and their slots

    def bring(self, layer_idx: int, placements: list[Placement]) -> None:
        for expert_idx, slot, victim, loading in placements:
            assert loading
            assert slot in self.slots[layer_idx]
            assert (layer_idx, expert_idx) not in self.in_flight
            assert slot not in [at for (layer, _), at in self.in_flight.items() if layer == layer_idx]
            assert slot not in self.held(layer_idx)
            assert self.content.pop((layer_idx, slot), None) == victim
            self.in_flight[layer_idx, expert_idx] = slot

    def held(self, layer_idx: int) -> set[int]:
        return {
            placement.slot
            for lease, _ in self.leases
            if lease.layer_idx == layer_idx
            for placement in lease.hits + lease.misses
        }

    def where(self, layer_idx: int) -> dict[int, int]:
        """Expert -> slot, loading ones included."""
        found = {expert_idx: slot for (layer, slot), expert_idx in self.content.items() if layer == layer_idx}
        return found | {expert_idx: slot for (layer, expert_idx), slot in self.in_flight.items() if layer == layer_idx}

    @rule(
        layer_idx=layers,
        ids=expert_lists,
        admit=st.sampled_from(Admit),
        most=st.none() | st.integers(0, 3),
        phase=st.sampled_from(["decode", "prefill"]),
    )
    def acquire(self, layer_idx: int, ids: list[int], admit: Admit, most: int | None, phase: Any) -> None:
        ids = [expert_idx for expert_idx in ids if expert_idx < NUM_EXPERTS[layer_idx]]
        before, held = self.where(layer_idx), self.held(layer_idx)
        before_stats = self.cache.stats.snapshot()
        lease = self.cache.acquire(layer_idx, ids, admit=admit, most=most, phase=phase, weights=[0.5] * len(ids))

        assert [hit.expert_idx for hit in lease.hits] == [expert_idx for expert_idx in ids if expert_idx in before]
        for hit in lease.hits:
            assert hit.slot == before[hit.expert_idx]
            assert hit.loading == ((layer_idx, hit.expert_idx) in self.in_flight)
            assert hit.victim is None
        placed = [placement.expert_idx for placement in lease.hits + lease.misses]
        assert sorted(placed + lease.bypassed) == sorted(ids)
        assert not {miss.victim for miss in lease.misses} & set(ids)
        self.bring(layer_idx, lease.misses)
        self.leases.append((lease, {p.expert_idx: p.slot for p in lease.hits + lease.misses}))
        assert most is None or len(lease.misses) <= most
        if lease.bypassed and admit is Admit.ALWAYS and len(lease.misses) != most:
            busy = held | self.held(layer_idx) | {at for (lay, _), at in self.in_flight.items() if lay == layer_idx}
            assert busy == self.slots[layer_idx]

        counted = self.cache.stats.snapshot().diff(before_stats).layers[layer_idx]
        counts = counted.decode if phase == "decode" else counted.prefill
        assert counts == counted.total
        assert (counts.hits, counts.misses, counts.bypassed) == (
            len(lease.hits),
            len(lease.misses),
            len(lease.bypassed),
        )
        assert counts.evictions == sum(miss.victim is not None for miss in lease.misses)

    @rule(
        layer_idx=layers, ids=expert_lists, admit=st.sampled_from(Admit), phase=st.sampled_from(["decode", "prefill"])
    )
    def whole_step(self, layer_idx: int, ids: list[int], admit: Admit, phase: Any) -> None:
        """As most steps go; without it, too few experts are ever loaded to be evicted."""
        self.acquire(layer_idx, ids, admit, None, phase)
        for miss in self.leases[-1][0].misses:
            self.load(sorted(self.in_flight).index((layer_idx, miss.expert_idx)))
        self.release(len(self.leases) - 1, True)

    @precondition(lambda self: self.leases)
    @rule(pick=st.integers(0), explicitly=st.booleans())
    def release(self, pick: int, explicitly: bool) -> None:
        lease, _ = self.leases.pop(pick % len(self.leases))
        if explicitly:
            self.cache.release(lease)
            self.cache.release(lease)

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.integers(0))
    def load(self, pick: int) -> None:
        layer_idx, expert_idx = sorted(self.in_flight)[pick % len(self.in_flight)]
        slot = self.in_flight.pop((layer_idx, expert_idx))
        self.content[layer_idx, slot] = expert_idx
        assert self.cache.mark_loaded(layer_idx, expert_idx)
        assert not self.cache.mark_loaded(layer_idx, expert_idx)

    @precondition(lambda self: self.in_flight or self.content)
    @rule(pick=st.integers(0))
    def fail(self, pick: int) -> None:
        known = sorted([*self.in_flight, *((layer_idx, e) for (layer_idx, _), e in self.content.items())])
        layer_idx, expert_idx = known[pick % len(known)]
        self.forget(layer_idx, expert_idx)
        assert self.cache.mark_failed(layer_idx, expert_idx)
        assert not self.cache.mark_failed(layer_idx, expert_idx)

    def forget(self, layer_idx: int, expert_idx: int) -> None:
        slot = self.where(layer_idx)[expert_idx]
        self.in_flight.pop((layer_idx, expert_idx), None)
        self.content.pop((layer_idx, slot), None)
        for lease, relied_on in self.leases:
            if lease.layer_idx == layer_idx and relied_on.get(expert_idx) == slot:
                del relied_on[expert_idx]

    @rule(layer_idx=layers, ids=expert_lists)
    def prefetch(self, layer_idx: int, ids: list[int]) -> None:
        ids = [expert_idx for expert_idx in ids if expert_idx < NUM_EXPERTS[layer_idx]]
        before = self.where(layer_idx)
        placements = self.cache.admit_prefetch(layer_idx, ids)
        wanted = [expert_idx for expert_idx in ids if expert_idx not in before]
        assert [placement.expert_idx for placement in placements] == wanted[: len(placements)]
        self.bring(layer_idx, placements)

    @precondition(lambda self: self.in_flight)
    @rule(pick=st.integers(0))
    def drop_prefetch(self, pick: int) -> None:
        layer_idx, expert_idx = sorted(self.in_flight)[pick % len(self.in_flight)]
        if self.cache.drop_prefetch(layer_idx, expert_idx):
            assert self.in_flight[layer_idx, expert_idx] not in self.held(layer_idx)
            self.forget(layer_idx, expert_idx)

    @rule(layer_idx=layers, ids=expert_lists)
    def warm(self, layer_idx: int, ids: list[int]) -> None:
        placements = self.cache.admit_warm(layer_idx, [e for e in ids if e < NUM_EXPERTS[layer_idx]])
        assert all(placement.victim is None for placement in placements)
        self.bring(layer_idx, placements)

    @rule(layer_idx=layers, num_slots=st.integers(2, 9))
    def resize(self, layer_idx: int, num_slots: int) -> None:
        num_slots = min(max(num_slots, FLOORS[layer_idx]), NUM_EXPERTS[layer_idx])
        slots, busy = self.slots[layer_idx], self.held(layer_idx)
        busy |= {at for (layer, _), at in self.in_flight.items() if layer == layer_idx}
        growing = num_slots > len(slots)
        changed = set(self.cache.resize(layer_idx, num_slots))
        if growing:
            assert not changed & slots
            slots |= changed
        else:
            assert not changed & busy
            slots -= changed
            for slot in changed:
                self.content.pop((layer_idx, slot), None)
        assert len(slots) == self.cache.num_slots(layer_idx) == max(num_slots, len(busy) if not growing else 0)

    @rule()
    def new_sequence(self) -> None:
        self.cache.new_sequence()

    @rule()
    def reset_stats(self) -> None:
        self.cache.stats.reset()
        snapshot = self.cache.stats.snapshot()
        assert snapshot.total.requests == 0
        assert snapshot.prefetch == PrefetchCounts(issued=snapshot.prefetch.issued)

    @rule()
    def recover_without_need(self) -> None:
        """Nothing changes for leases and loads that are alive."""
        self.cache.recover(in_flight=self.in_flight.keys())

    @invariant()
    def integrity(self) -> None:
        self.cache.check_integrity()

    @invariant()
    def readable_slots_hold_what_they_should(self) -> None:
        for layer_idx in range(2):
            resident = self.cache.resident(layer_idx)
            assert resident == {e: slot for (layer, slot), e in self.content.items() if layer == layer_idx}
            assert sorted(self.cache.hot_set()[layer_idx]) == sorted(resident)
        for lease, relied_on in self.leases:
            for expert_idx, slot in relied_on.items():
                assert self.where(lease.layer_idx)[expert_idx] == slot

    def teardown(self) -> None:
        """When everything has ended, every slot can be had again."""
        self.leases.clear()
        for layer_idx, expert_idx in self.in_flight:
            self.cache.mark_failed(layer_idx, expert_idx)
        for layer_idx, slots in enumerate(self.slots):
            lease = self.cache.acquire(layer_idx, list(range(len(slots))))
            assert {placement.slot for placement in lease.hits + lease.misses} == slots


@pytest.mark.parametrize("policy_name", policy_names())
def test_random_operations(policy_name: str) -> None:
    machine = type(f"{policy_name.title()}Machine", (CacheMachine,), {"policy": policy_name})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=60,
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
