"""Random traces for tests of replay, and caches that are too slow and too simple to be wrong."""

from collections.abc import Collection, Sequence
from itertools import combinations

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


def most_hits(events: Sequence[Event], num_slots: int, prompts: Collection[int] = ()) -> int:
    """By trying every victim there is: the best over all policies, of one layer, for small cases only.

    ``prompts``: the indices of events that need not admit what they ask for.
    """
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for index, (_, chosen) in enumerate(events):
        asked = frozenset(chosen)
        after: dict[frozenset[int], int] = {}
        for resident, hits in best.items():
            stay = resident & asked if index in prompts else asked
            others = sorted((resident | asked) - stay)
            for kept in combinations(others, min(len(others), num_slots - len(stay))):
                now = stay | frozenset(kept)
                after[now] = max(after.get(now, 0), hits + len(resident & asked))
        best = after
    return max(best.values())
