"""Hits over a trace, by the counting rule of published figures, against a reimplementation without any cleverness."""

import random

import pytest

from moe_offload.cache import ExpertCache, policy_names


def synthetic_trace(num_tokens: int, num_layers: int, num_experts: int, top_k: int) -> list[list[list[int]]]:
    """Drifting popularity: each layer has favourites that change now and then."""
    rng = random.Random(7)
    favourites = [rng.sample(range(num_experts), num_experts) for _ in range(num_layers)]
    trace = []
    for _ in range(num_tokens):
        token = []
        for order in favourites:
            if rng.random() < 0.1:
                a, b = rng.sample(range(num_experts), 2)
                order[a], order[b] = order[b], order[a]
            chosen: list[int] = []
            while len(chosen) < top_k:
                expert_idx = order[min(int(rng.expovariate(0.25)), num_experts - 1)]
                if expert_idx not in chosen:
                    chosen.append(expert_idx)
            token.append(chosen)
        trace.append(token)
    return trace


def naive_lru_hits(trace: list[list[list[int]]], layer_idx: int, num_slots: int) -> int:
    """A list from least to most recent; an event is one token at one layer, and evicts nothing that it asks for."""
    resident: list[int] = []
    hits = 0
    for token in trace:
        chosen = token[layer_idx]
        hits += sum(expert_idx in resident for expert_idx in chosen)
        resident = [expert_idx for expert_idx in resident if expert_idx not in chosen] + chosen[::-1]
        resident = resident[-num_slots:]
    return hits


def replay(trace: list[list[list[int]]], num_experts: int, num_slots: list[int], policy: str) -> ExpertCache:
    cache = ExpertCache([num_experts] * len(num_slots), num_slots, policy)
    for token in trace:
        for layer_idx, chosen in enumerate(token):
            lease = cache.acquire(layer_idx, chosen)
            for miss in lease.misses:
                cache.mark_loaded(layer_idx, miss.expert_idx)
            cache.release(lease)
    cache.check_integrity()
    return cache


def test_lru_hits_equal_a_naive_lru():
    trace = synthetic_trace(num_tokens=400, num_layers=3, num_experts=16, top_k=3)
    num_slots = [3, 5, 12]
    layers = replay(trace, 16, num_slots, "lru").stats.snapshot().layers
    expected = [naive_lru_hits(trace, layer_idx, slots) for layer_idx, slots in enumerate(num_slots)]
    assert [layer.decode.hits for layer in layers] == expected
    assert all(0 < layer.decode.hits < layer.decode.requests == 1200 for layer in layers)
    assert all(layer.decode.bypassed == 0 for layer in layers)


@pytest.mark.parametrize("policy", policy_names())
def test_with_room_for_all_only_first_uses_miss(policy: str):
    trace = synthetic_trace(num_tokens=100, num_layers=2, num_experts=16, top_k=3)
    snapshot = replay(trace, 16, [16, 16], policy).stats.snapshot()
    distinct = sum(len({e for token in trace for e in token[layer_idx]}) for layer_idx in range(2))
    assert snapshot.total.misses == distinct
    assert snapshot.total.evictions == 0
