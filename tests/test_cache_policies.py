"""Each policy's order on examples small enough to check by hand, and their use through the cache."""

from collections.abc import Sequence

import pytest

from moe_offload.cache import Admit, ExpertCache, Policy, make_policy, policy_names
from moe_offload.errors import ConfigError


def hottest_first(policy: Policy) -> list[int]:
    scores = policy.scores(0)
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)


def touch_all(policy: Policy, *events: Sequence[int]) -> None:
    for event in events:
        policy.touch(0, event, None)


def step(cache: ExpertCache, *expert_ids: int) -> list[int | None]:
    """One decode step at layer 0; returns the victims."""
    lease = cache.acquire(0, expert_ids)
    for miss in lease.misses:
        cache.mark_loaded(0, miss.expert_idx)
    cache.release(lease)
    return [miss.victim for miss in lease.misses]


def test_lru_orders_by_last_use_and_within_an_event_by_rank():
    policy = make_policy("lru", [4])
    touch_all(policy, [0, 1], [2, 3], [1])
    assert hottest_first(policy) == [1, 2, 3, 0]


def test_lru_in_the_cache():
    cache = ExpertCache([5], [3], "lru")
    assert step(cache, 0) == step(cache, 1) == step(cache, 2) == [None]
    assert step(cache, 0) == []
    assert step(cache, 3) == [1]
    assert step(cache, 2, 4) == [0]


def test_lfu_counts_and_breaks_ties_by_last_use():
    policy = make_policy("lfu", [4])
    touch_all(policy, [0], [0], [0], [1], [1], [2], [2], [3])
    assert [int(score) for score in policy.scores(0)] == [3, 2, 2, 1]
    assert hottest_first(policy) == [0, 2, 1, 3]


def test_lfu_in_the_cache():
    cache = ExpertCache([4], [2], "lfu")
    for _ in range(3):
        step(cache, 0)
    step(cache, 1)
    assert step(cache, 2) == [1]
    assert step(cache, 1) == [2]
    assert step(cache, 2) == [1]
    assert step(cache, 3) == [2]


def test_decay_has_a_half_life_of_24_events():
    policy = make_policy("decay", [3])
    touch_all(policy, [0], *[[2]] * 23, [1])
    scores = policy.scores(0)
    assert scores[1] / scores[0] == pytest.approx(2.0)


@pytest.mark.parametrize(("later_uses", "winner"), [(0, 0), (2, 0), (3, 1)])
def test_decay_weighs_frequency_against_age(later_uses: int, winner: int):
    """Four uses in a row, 24 events ago, weigh two now: two in a row as old as the first of them lose, three win."""
    policy = make_policy("decay", [3])
    touch_all(policy, *[[0]] * 4, *[[2]] * 20, *[[1]] * later_uses)
    scores = policy.scores(0)
    assert (0 if scores[0] > scores[1] else 1) == winner


def test_decay_keeps_its_order_over_any_number_of_events():
    policy = make_policy("decay", [3])
    touch_all(policy, *[[0], [0], [1]] * 5000)
    scores = policy.scores(0)
    assert hottest_first(policy) == [0, 1, 2]
    # A use every third event against two of three: the exact ratio of the two geometric sums.
    half = 2.0 ** (-1 / 24)
    assert scores[0] / scores[1] == pytest.approx(half + half**2)


def test_decay_starts_anew_at_a_new_sequence():
    policy = make_policy("decay", [4])
    touch_all(policy, *[[0]] * 500, [1], [1])
    policy.new_sequence()
    touch_all(policy, [2])
    assert hottest_first(policy) == [2, 0, 1, 3]
    for _ in range(1000):
        policy.new_sequence()
    touch_all(policy, [3])
    assert hottest_first(policy)[0] == 3


@pytest.mark.parametrize("name", ["lru", "lfu"])
def test_a_new_sequence_leaves_the_others_as_they_were(name: str):
    policy = make_policy(name, [3])
    touch_all(policy, [0], [0], [1])
    before = list(policy.scores(0))
    policy.new_sequence()
    assert list(policy.scores(0)) == before


@pytest.mark.parametrize("name", policy_names())
def test_layers_do_not_mix(name: str):
    policy = make_policy(name, [3, 5])
    policy.touch(1, [4, 2], [0.7, 0.3])
    assert list(policy.scores(0)) == [0, 0, 0]
    scores = policy.scores(1)
    assert len(scores) == 5
    assert min(scores[2], scores[4]) > max(scores[0], scores[1], scores[3])


@pytest.mark.parametrize("name", policy_names())
def test_a_prompt_does_not_wipe_what_decode_found_hot(name: str):
    cache = ExpertCache([8], [3], name)
    for _ in range(3):
        step(cache, 0, 1, 2)
    lease = cache.acquire(0, [7, 6, 5, 1, 4, 3], admit=Admit.IF_HOTTER, phase="prefill")
    assert [hit.expert_idx for hit in lease.hits] == [1]
    assert lease.misses == []
    assert lease.bypassed == [7, 6, 5, 4, 3]
    cache.release(lease)
    assert sorted(cache.resident(0)) == [0, 1, 2]


def test_a_prompt_evicts_what_is_colder_and_the_hottest_newcomer_comes_first():
    cache = ExpertCache([6], [2], "lfu")
    for _ in range(4):
        step(cache, 0)
    for expert_idx in (2, 3, 3, 2, 3, 4):
        step(cache, expert_idx)
    assert sorted(cache.resident(0)) == [0, 4]
    lease = cache.acquire(0, [1, 2, 3], admit=Admit.IF_HOTTER, phase="prefill")
    assert [(miss.expert_idx, miss.victim) for miss in lease.misses] == [(3, 4)]
    assert lease.bypassed == [2, 1]


def test_a_prompt_evicts_nothing_for_an_equal():
    cache = ExpertCache([4], [1], "decay")
    step(cache, 0, 1)
    assert cache.acquire(0, [1], admit=Admit.IF_HOTTER, phase="prefill").bypassed == [1]


@pytest.mark.parametrize("name", policy_names())
def test_what_a_prompt_asks_for_counts_afterwards(name: str):
    cache = ExpertCache([4], [2], name)
    step(cache, 0)
    step(cache, 1)
    for _ in range(3):
        cache.release(cache.acquire(0, [0], admit=Admit.IF_HOTTER, phase="prefill"))
    assert cache.hot_set() == [[0, 1]]


def test_the_best_of_the_missing_get_the_slots_there_may_be():
    cache = ExpertCache([6], [3], "lfu")
    for expert_idx in (5, 5, 4, 4, 4, 3):
        step(cache, expert_idx)
    cache.resize(0, 1)
    cache.resize(0, 3)
    assert sorted(cache.resident(0)) == [4]
    lease = cache.acquire(0, [3, 4, 5, 2], most=1)
    assert [miss.expert_idx for miss in lease.misses] == [5]
    assert lease.bypassed == [3, 2]
    assert cache.acquire(0, [0, 1], most=0).bypassed == [0, 1]


def test_who_is_hotter_now_gets_the_slot_of_a_colder_one():
    """A use counts that a prompt's rule leaves out of account."""
    cache = ExpertCache([4], [1], "lfu")
    step(cache, 0)
    before = cache.acquire(0, [1], admit=Admit.IF_HOTTER, phase="prefill")
    assert before.bypassed == [1]
    now = cache.acquire(0, [1], admit=Admit.IF_HOTTER_NOW)
    assert [(miss.expert_idx, miss.victim) for miss in now.misses] == [(1, 0)]
    assert cache.acquire(0, [2], admit=Admit.IF_HOTTER_NOW).bypassed == [2]


def test_a_step_without_experts_is_no_event():
    cache = ExpertCache([4], [2], "decay")
    step(cache, 0)
    step(cache, 0)
    for _ in range(100):
        step(cache)
    step(cache, 1)
    assert cache.hot_set() == [[0, 1]]


@pytest.mark.parametrize("name", policy_names())
def test_a_prompt_fills_empty_slots(name: str):
    cache = ExpertCache([6], [3], name)
    lease = cache.acquire(0, [5, 4, 3, 2], admit=Admit.IF_HOTTER, phase="prefill")
    assert [miss.expert_idx for miss in lease.misses] == [5, 4, 3]
    assert lease.bypassed == [2]


@pytest.mark.parametrize("name", policy_names())
def test_the_hot_set_survives_a_restart(name: str):
    cache = ExpertCache([6, 6], [3, 2], name)
    for ids in ([0], [1], [1, 2], [1, 2], [1, 4]):
        step(cache, *ids)
    hot = cache.hot_set()
    assert hot[0][0] == 1
    assert hot[1] == []
    restarted = ExpertCache([6, 6], [3, 2], name)
    placements = restarted.admit_warm(0, hot[0])
    assert [placement.expert_idx for placement in placements] == hot[0]
    for placement in placements:
        restarted.mark_loaded(0, placement.expert_idx)
    assert sorted(restarted.hot_set()[0]) == sorted(hot[0])
    assert restarted.admit_warm(0, [5]) == []


def test_lru_keeps_the_order_of_a_warm_start():
    cache = ExpertCache([6], [3], "lru")
    cache.remember(0, [4, 0, 2, 5])
    for placement in cache.admit_warm(0, [4, 0, 2, 5]):
        cache.mark_loaded(0, placement.expert_idx)
    assert cache.hot_set() == [[4, 0, 2]]
    assert step(cache, 5) == [2]


def test_an_unknown_policy_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown cache policy 'fifo'; choose one of: lru, lfu, decay"):
        ExpertCache([4], [2], "fifo")
