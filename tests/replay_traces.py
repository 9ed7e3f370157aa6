"""Random traces for tests of replay, and caches that are too slow and too simple to be wrong."""

from collections.abc import Sequence

import numpy as np

from moe_offload.cache import RoutingTrace

Event = tuple[int, list[int]]  # layer, experts


def random_trace(
    seed: int,
    *,
    num_tokens: int = 200,
    num_layers: int = 2,
    num_experts: int = 12,
    top_k: int = 3,
    prompt_tokens: int = 0,
    num_sequences: int = 1,
    unknown: float = 0.0,
    weighted: bool = False,
    **arrays: object,
) -> RoutingTrace:
    """Drifting favourites. Each sequence begins with ``prompt_tokens``; a share of the experts is ``unknown``."""
    rng = np.random.default_rng(seed)
    likes = rng.gumbel(size=(num_layers, num_experts)) * 1.5
    experts = np.empty((num_tokens, num_layers, top_k), np.int16)
    probs = np.zeros(experts.shape, np.float16)
    for token in range(num_tokens):
        likes += rng.normal(scale=0.3, size=likes.shape)
        drawn = likes + rng.gumbel(size=likes.shape)
        experts[token] = np.argsort(-drawn, axis=1)[:, :top_k]
        chosen = np.exp(np.take_along_axis(drawn, experts[token].astype(np.int64), 1) / 4)
        probs[token] = chosen / chosen.sum(1, keepdims=True)
    experts[rng.random(experts.shape) < unknown] = -1
    sequence = np.sort(rng.integers(num_sequences, size=num_tokens)).astype(np.int32)
    _, first = np.unique(sequence, return_index=True)
    since = np.arange(num_tokens) - first[np.searchsorted(np.unique(sequence), sequence)]
    return RoutingTrace(
        experts=experts,
        sequence=sequence,
        phase=(since >= prompt_tokens).astype(np.uint8),
        probs=probs if weighted else None,
        num_experts=np.full(num_layers, num_experts, np.int32),
        **arrays,
    )


def token_events(trace: RoutingTrace) -> list[Event]:
    """Every token at every layer."""
    return [
        (layer_idx, [e for e in chosen if e >= 0])
        for token in trace.experts.tolist()
        for layer_idx, chosen in enumerate(token)
    ]


def naive_lru_hits(events: Sequence[Event], layer_idx: int, num_slots: int) -> int:
    """A list from least to most recent; evicts nothing that its event asks for."""
    resident: list[int] = []
    hits = 0
    for layer, chosen in events:
        if layer == layer_idx:
            hits += sum(expert_idx in resident for expert_idx in chosen)
            resident = [expert_idx for expert_idx in resident if expert_idx not in chosen] + chosen[::-1]
            resident = resident[-num_slots:]
    return hits


def most_hits(events: Sequence[Event], layer_idx: int, num_slots: int) -> int:
    """By trying every victim there is: the best over all policies, for small cases only."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for layer, chosen in events:
        if layer != layer_idx:
            continue
        asked = frozenset(chosen)
        after: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            for kept in _kept(resident, asked, num_slots):
                value = hits + len(resident & asked)
                after[kept] = max(after.get(kept, 0), value)
        best = after
    return max(best.values())


def _kept(resident: frozenset[int], asked: frozenset[int], num_slots: int) -> list[frozenset[int]]:
    from itertools import combinations

    others = resident - asked
    room = num_slots - len(asked)
    if len(others) <= room:
        return [resident | asked]
    return [asked | frozenset(kept) for kept in combinations(sorted(others), room)]
