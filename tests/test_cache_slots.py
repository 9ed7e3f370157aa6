"""Leases, failures, prefetch and resizing, one situation at a time."""

import subprocess
import sys

import pytest

from moe_offload.cache import ExpertCache, Lease, PhaseCounts, Placement, PrefetchCounts
from moe_offload.errors import BudgetError, ConfigError


def load(cache: ExpertCache, placements: list[Placement], layer_idx: int = 0) -> None:
    for placement in placements:
        assert cache.mark_loaded(layer_idx, placement.expert_idx)


def step(cache: ExpertCache, *expert_ids: int) -> Lease:
    lease = cache.acquire(0, expert_ids)
    load(cache, lease.misses)
    cache.release(lease)
    return lease


def prefetch_counts(cache: ExpertCache) -> PrefetchCounts:
    return cache.stats.snapshot().prefetch


def test_two_leases_hold_a_slot_until_both_let_go():
    cache = ExpertCache([4], [1])
    first = cache.acquire(0, [0])
    load(cache, first.misses)
    second = cache.acquire(0, [0])
    assert second.hits == [Placement(0, 0, None, False)]
    cache.release(first)
    cache.release(first)
    assert cache.acquire(0, [1]).bypassed == [1]
    cache.release(second)
    assert cache.acquire(0, [1]).misses == [Placement(1, 0, 0, True)]


def test_a_dropped_lease_is_released():
    cache = ExpertCache([4], [1])
    lease = cache.acquire(0, [0])
    load(cache, lease.misses)
    del lease
    assert cache.acquire(0, [1]).misses == [Placement(1, 0, 0, True)]


def test_an_expert_on_its_way_is_a_hit_that_is_loading():
    cache = ExpertCache([4], [2])
    first = cache.acquire(0, [3])
    second = cache.acquire(0, [3])
    assert second.hits == [Placement(3, first.misses[0].slot, None, True)]
    assert cache.resident(0) == {}
    load(cache, first.misses)
    assert cache.resident(0) == {3: first.misses[0].slot}


def test_a_step_never_evicts_what_it_hits():
    cache = ExpertCache([4], [2])
    step(cache, 0)
    step(cache, 1)
    lease = cache.acquire(0, [2, 0, 3])
    assert [hit.expert_idx for hit in lease.hits] == [0]
    assert [(miss.expert_idx, miss.victim) for miss in lease.misses] == [(2, 1)]
    assert lease.bypassed == [3]


def test_a_slot_that_is_written_to_is_not_evicted_even_when_nobody_holds_it():
    cache = ExpertCache([4], [1])
    cache.release(cache.acquire(0, [0]))
    assert cache.acquire(0, [1]).bypassed == [1]
    assert cache.mark_loaded(0, 0)
    assert cache.acquire(0, [1]).misses == [Placement(1, 0, 0, True)]


def test_a_failed_expert_is_gone_at_once_and_its_slot_after_the_last_release():
    cache = ExpertCache([4], [1])
    first = cache.acquire(0, [0])
    second = cache.acquire(0, [0])
    assert cache.mark_failed(0, 0)
    assert not cache.mark_loaded(0, 0)
    cache.release(first)
    assert cache.acquire(0, [0]).bypassed == [0]
    cache.release(second)
    assert cache.acquire(0, [0]).misses == [Placement(0, 0, None, True)]


def test_a_prefetch_in_time_is_used():
    cache = ExpertCache([8], [2])
    load(cache, cache.admit_prefetch(0, [3]))
    assert prefetch_counts(cache) == PrefetchCounts(issued=1)
    assert cache.acquire(0, [3]).hits == [Placement(3, 0, None, False)]
    assert prefetch_counts(cache) == PrefetchCounts(issued=1, used=1)


def test_a_prefetch_that_is_overtaken_is_late_and_becomes_demand():
    cache = ExpertCache([8], [2])
    cache.admit_prefetch(0, [3])
    lease = cache.acquire(0, [3])
    assert lease.hits == [Placement(3, 0, None, True)]
    assert prefetch_counts(cache) == PrefetchCounts(issued=1, late=1)
    assert not cache.drop_prefetch(0, 3)
    assert cache.mark_loaded(0, 3)


def test_prefetches_that_nobody_used_are_wasted():
    cache = ExpertCache([8], [3])
    placements = cache.admit_prefetch(0, [3, 4, 5])
    assert cache.drop_prefetch(0, 3)
    assert not cache.drop_prefetch(0, 3)
    assert cache.mark_failed(0, 4)
    load(cache, placements[2:])
    assert not cache.drop_prefetch(0, 5)
    step(cache, 0, 1, 2)
    assert 5 not in cache.resident(0)
    assert prefetch_counts(cache) == PrefetchCounts(issued=3, wasted=3)


def test_a_prefetch_displaces_neither_the_last_step_nor_another_prefetch():
    cache = ExpertCache([8], [4])
    step(cache, 0)
    step(cache, 1)
    step(cache, 2, 3)
    assert cache.admit_prefetch(0, [2, 4, 5, 6, 7]) == [Placement(4, 0, 0, True), Placement(5, 1, 1, True)]
    load(cache, [Placement(4, 0), Placement(5, 1)])
    assert cache.admit_prefetch(0, [6]) == []
    assert prefetch_counts(cache) == PrefetchCounts(issued=2, evictions=2)
    step(cache, 2)
    assert [placement.victim for placement in cache.admit_prefetch(0, [6, 7, 0, 1])] == [4, 5, 3]
    assert prefetch_counts(cache) == PrefetchCounts(issued=5, wasted=2, evictions=5)


def test_a_reset_carries_prefetches_whose_fate_is_open():
    cache = ExpertCache([8], [4])
    cache.admit_prefetch(0, [3, 4])
    step(cache, 0)
    cache.stats.reset()
    assert prefetch_counts(cache) == PrefetchCounts(issued=2)
    assert cache.stats.snapshot().total == PhaseCounts()
    cache.acquire(0, [3])
    assert prefetch_counts(cache) == PrefetchCounts(issued=2, late=1)
    cache.check_integrity()


def test_shrinking_gives_back_empty_slots_then_the_coldest():
    cache = ExpertCache([8], [5], floors=[2])
    for expert_idx in (0, 1, 2):
        step(cache, expert_idx)
    step(cache, 0)
    assert cache.resize(0, 2) == [4, 3, 1]
    assert cache.resident(0) == {0: 0, 2: 2}
    assert cache.num_slots(0) == 2
    assert cache.resize(0, 4) == [1, 3]
    assert step(cache, 5, 6).misses == [Placement(5, 1, None, True), Placement(6, 3, None, True)]
    assert cache.resize(0, 6) == [4, 5]


def test_shrinking_leaves_what_is_held_or_loading():
    cache = ExpertCache([8], [3])
    lease = cache.acquire(0, [0])
    load(cache, lease.misses)
    cache.admit_prefetch(0, [1])
    assert cache.resize(0, 1) == [2]
    assert cache.num_slots(0) == 2
    cache.release(lease)
    assert cache.resize(0, 1) == [0]
    assert cache.mark_loaded(0, 1)
    assert cache.resident(0) == {1: 1}


def test_phases_and_layers_are_counted_apart():
    cache = ExpertCache([4, 4], [2, 2])
    step(cache, 0, 1)
    before = cache.stats.snapshot()
    step(cache, 0, 2)
    cache.release(cache.acquire(1, [0, 1, 2], phase="prefill"))
    counted = cache.stats.snapshot().diff(before)
    assert counted.layers[0].decode == PhaseCounts(requests=2, hits=1, misses=1, evictions=1)
    assert counted.layers[0].prefill == counted.layers[1].decode == PhaseCounts()
    assert counted.layers[1].prefill == counted.prefill == PhaseCounts(requests=3, misses=2, bypassed=1)
    assert counted.decode.hit_ratio == 0.5
    assert counted.total == PhaseCounts(requests=5, hits=1, misses=3, bypassed=1, evictions=1)
    assert counted.hit_ratio == 0.2
    assert PhaseCounts().hit_ratio == 0.0


@pytest.mark.parametrize("expert_ids", [[0, 0], [-1], [4]])
def test_impossible_experts_are_refused_and_change_nothing(expert_ids: list[int]):
    cache = ExpertCache([4], [2])
    for refuse in (cache.acquire, cache.admit_prefetch, cache.admit_warm):
        with pytest.raises(ConfigError, match=r"layer 0: expert ids must all differ and lie in 0\.\.3"):
            refuse(0, expert_ids)
    cache.check_integrity()
    assert cache.stats.snapshot().total.requests == 0


@pytest.mark.parametrize("num_slots", [1, 5])
def test_slots_below_the_floor_or_beyond_the_experts_are_refused(num_slots: int):
    message = rf"layer 1 cannot have {num_slots} expert slots: it needs at least 2 and has use for at most 4"
    with pytest.raises(ConfigError, match=message):
        ExpertCache([4, 4], [2, num_slots], floors=[2, 2])
    cache = ExpertCache([4, 4], [2, 3], floors=[2, 2])
    with pytest.raises(ConfigError, match=message):
        cache.resize(1, num_slots)


def test_at_least_one_slot_and_lists_of_one_length():
    with pytest.raises(ConfigError, match="needs at least 1"):
        ExpertCache([4], [0])
    with pytest.raises(ConfigError, match="1, 2 and 1 layers"):
        ExpertCache([4], [2, 2])


@pytest.mark.parametrize(
    "damage",
    [
        "slots.slot_of[3] = slots.slot_of[0]",
        "slots.slot_of[0] = -1",
        "slots.pins[0] += 1",
        "slots.pins[1] = -1",
        "slots.evictable[1] = False",
        "slots.empty.append(0)",
        "slots.empty.pop()",
        "slots.state[1] = slots.state[2]",
        "layer.speculation.counters.issued += 1",
        "layer.speculation.begin(0)",
        "layer.freeze_counts; layer._phases['decode'].hits += 1",
    ],
)
def test_check_integrity_sees(damage: str):
    cache = ExpertCache([4], [3])
    step(cache, 0, 1)
    lease = cache.acquire(0, [0])
    cache.check_integrity()
    layer = cache._layers[0]
    exec(damage, {"layer": layer, "slots": layer.slots})
    with pytest.raises(AssertionError, match="layer 0: "):
        cache.check_integrity()
    assert lease.is_open


def test_the_cache_needs_no_torch():
    code = "import sys, moe_offload.cache; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_repacking_leaves_the_hottest_without_gaps():
    cache = ExpertCache([6], [5])
    for expert_idx in (0, 1, 2, 3, 4):
        lease = cache.acquire(0, [expert_idx])
        assert not cache.repack(0, 3, lambda numbers: True), "held"
        cache.mark_loaded(0, expert_idx)
        cache.release(lease)
    before = cache.resident(0)
    moves: list[dict[int, int]] = []
    assert cache.repack(0, 3, lambda numbers: bool(moves.append(numbers) or True))
    after = cache.resident(0)
    assert set(after) == {2, 3, 4}
    assert sorted(after.values()) == [0, 1, 2]
    assert moves == [{before[expert_idx]: after[expert_idx] for expert_idx in after}]
    cache.check_integrity()
    assert cache.repack(0, 5, lambda numbers: True)
    assert cache.resident(0) == after
    assert cache.num_slots(0) == 5
    cache.check_integrity()
    assert cache.repack(0, 4, lambda numbers: False), "their bytes are lost"
    assert cache.resident(0) == {}
    cache.check_integrity()


def test_repacking_that_gets_no_memory_for_more_changes_nothing():
    cache = ExpertCache([6], [2])

    def refuse(numbers: dict[int, int]) -> bool:
        raise BudgetError("full", needed_bytes=2, budget_bytes=1)

    with pytest.raises(BudgetError):
        cache.repack(0, 4, refuse)
    assert cache.num_slots(0) == 2
    cache.check_integrity()
