"""One pool of slots for all layers, against a pool that looks at everything every time."""

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_traces import random_trace

from moe_offload.cache import EventKind, RoutingTrace, kernels, make_policy
from moe_offload.cache.replay import replay
from moe_offload.cache.replay_events import events_of
from moe_offload.cache.replay_python import BeladyPolicy
from moe_offload.errors import ConfigError

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the library was not built")


def comparable(name: str, policy: object) -> Callable[[int, int], float]:
    """Scores that mean the same in every layer: ages, shares, and times of the next use."""
    if name == "lru":
        return lambda layer, e: policy.scores(layer)[e] - policy._clock[layer]
    if name == "decay":
        return lambda layer, e: policy.scores(layer)[e] * (1.0 / policy._use_weight[layer])
    return lambda layer, e: policy.scores(layer)[e]


def naive_pool(trace: RoutingTrace, name: str, pool_slots: int) -> list[tuple[int, int]]:
    """Hits and bypassed, by layer."""
    events = events_of(trace)
    policy = BeladyPolicy(events) if name == "belady" else make_policy(name, events.num_experts.tolist())
    score = comparable(name, policy)
    floors = [max(1, n) for n in events.most_asked().tolist()]
    resident: list[set[int]] = [set() for _ in floors]
    hits, bypassed = [0] * len(floors), [0] * len(floors)
    for index in range(events.num_events):
        if events.kind[index] == EventKind.NEW_SEQUENCE:
            policy.new_sequence()
            continue
        layer = int(events.layer_idx[index])
        asked = events.expert_ids[events.begin[index] : events.begin[index + 1]].tolist()
        if not asked:
            continue
        only_if_hotter = events.kind[index] == EventKind.ACQUIRE_IF_HOTTER
        if name == "belady":
            policy.foresee(layer, asked)
        if not only_if_hotter:
            policy.touch(layer, asked, None)
        missing = [e for e in asked if e not in resident[layer]]
        hits[layer] += len(asked) - len(missing)
        if only_if_hotter:
            missing.sort(key=lambda e: -policy.scores(layer)[e])
        for rank, expert_idx in enumerate(missing):
            if sum(map(len, resident)) == pool_slots:
                may_go = [
                    (score(other, e), other, e)
                    for other in range(len(floors))
                    if other == layer or len(resident[other]) > floors[other]
                    for e in resident[other]
                    if other != layer or e not in asked
                ]
                if not may_go or (only_if_hotter and min(may_go)[0] >= score(layer, expert_idx)):
                    bypassed[layer] += len(missing) - rank
                    break
                _, victim_layer, victim = min(may_go)
                resident[victim_layer].remove(victim)
            resident[layer].add(expert_idx)
        if only_if_hotter:
            policy.touch(layer, asked, None)
    return list(zip(hits, bypassed, strict=True))


@pytest.mark.parametrize("policy", ["lru", "lfu", "decay", "belady"])
@given(
    st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10), st.integers(0, 5), st.booleans()
)
@settings(max_examples=50, deadline=None)
def test_a_pool_counts_as_a_naive_one(
    policy: str, seed: int, num_layers: int, top_k: int, extra: int, prompt_tokens: int, some_unknown: bool
):
    trace = random_trace(
        seed,
        num_tokens=50,
        num_layers=num_layers,
        num_experts=9,
        top_k=top_k,
        prompt_tokens=prompt_tokens,
        num_sequences=3,
        unknown=0.2 if some_unknown else 0.0,
    )
    if (trace.experts < 0).all():
        return
    pool_slots = sum(max(1, n) for n in events_of(trace).most_asked().tolist()) + extra
    pool_slots = min(pool_slots, 9 * num_layers)
    layers = replay(trace, policy=policy, pool_slots=pool_slots).stats.layers
    assert [(layer.total.hits, layer.total.bypassed) for layer in layers] == naive_pool(trace, policy, pool_slots)


def test_a_pool_gives_slots_to_the_layer_that_needs_them():
    alike = random_trace(1, num_tokens=600, num_layers=1, num_experts=16, top_k=2).experts
    steady = (alike % 2) * 0 + [[[0, 1]]]
    trace = RoutingTrace(experts=[[*a, *b] for a, b in zip(alike.tolist(), steady.tolist(), strict=True)])
    equal = replay(trace, policy="lru", num_slots=6)
    pooled = replay(trace, policy="lru", pool_slots=12)
    assert pooled.total_slots == equal.total_slots == 12
    assert pooled.stats.total.hits > equal.stats.total.hits
    assert pooled.stats.layers[1].total.misses == 2


def test_room_for_all_is_the_same_in_a_pool():
    trace = random_trace(2, num_layers=3)
    pooled, apart = replay(trace, policy="decay", pool_slots=36), replay(trace, policy="decay", num_slots=12)
    assert pooled.stats == apart.stats


@pytest.mark.parametrize("pool_slots", [5, 25])
def test_pools_that_cannot_be(pool_slots: int):
    with pytest.raises(ConfigError, match=f"a pool of {pool_slots} slots: .* at least 6, .* at most 24"):
        replay(random_trace(1), pool_slots=pool_slots)


def test_a_pool_needs_the_library(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="not 'LruPolicy'; it has: lru, lfu, decay"):
        replay(random_trace(1), policy=type(make_policy("lru", [4])), pool_slots=12)
    monkeypatch.setattr(kernels, "library", lambda: None)
    with pytest.raises(ConfigError, match="nothing, as it was not built"):
        replay(random_trace(1), policy="lru", pool_slots=12)
