"""Hit ratios of recorded routing, replayed through the runtime's own cache."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_offload.cache import DEFAULT_POLICY, ExpertCache, read_trace
from moe_offload.errors import ConfigError
from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.hit_ratio import HitCurve

Experts = npt.NDArray[np.int16]
SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
_DECODE = 1
# Enough to tell hit ratios to about a percent; the rest of a long trace would only take time.
_MOST_TOKENS = 1000
_PARTS = 5
_LEAST_SPREAD = 0.01


def trace_curve(path: Path) -> HitCurve:
    """The hits that a user's trace would have had at any size: of its decode tokens, by the default policy.

    The band is as wide as parts of the trace differ. `ConfigError` for a file without a single decode token.
    """
    trace = read_trace(path)
    experts = trace.experts if trace.phase is None else trace.experts[trace.phase == _DECODE]
    if not len(experts):
        raise ConfigError(f"{path} has no decode tokens; record an answer, not only a prompt")
    experts = experts[-_MOST_TOKENS:]
    sequence = np.arange(len(experts)) * _PARTS // len(experts)
    num_experts = int(experts.max()) + 1 if trace.num_experts is None else int(trace.num_experts.max())
    points = []
    for num_slots in slots_at_shares(num_experts):
        ratio, spread = hit_ratio(experts, sequence, num_experts, num_slots)
        spread = max(spread, _LEAST_SPREAD)
        points.append((num_slots / num_experts, Band(max(0.0, ratio - spread), ratio, min(1.0, ratio + spread))))
    return HitCurve(f"{path.name}, {len(experts)} tokens", tuple(points))


def slots_at_shares(num_experts: int) -> list[int]:
    """The sizes at which hits are counted."""
    return sorted({max(1, round(share * num_experts)) for share in SHARES})


def hit_ratio(
    experts: Experts, sequence: npt.NDArray[np.integer], num_experts: int, num_slots: int
) -> tuple[float, float]:
    """The share of ``experts [tokens, layers, top_k]`` found in slots, and its standard deviation between sequences.

    An event is one token at one layer; the cache lives on across sequences; the first use of an expert is a miss.
    """
    num_layers = experts.shape[1]
    cache = ExpertCache([num_experts] * num_layers, [num_slots] * num_layers, DEFAULT_POLICY)
    ratios, before = [], 0
    for number in np.unique(sequence):
        tokens = experts[sequence == number]
        for token in tokens.tolist():
            for layer_idx, chosen in enumerate(token):
                lease = cache.acquire(layer_idx, [expert_idx for expert_idx in chosen if expert_idx >= 0])
                for miss in lease.misses:
                    cache.mark_loaded(layer_idx, miss.expert_idx)
                cache.release(lease)
        hits = sum(layer.decode.hits for layer in cache.stats.snapshot().layers)
        ratios.append((hits - before) / max(1, int((tokens >= 0).sum())))
        before = hits
    return before / max(1, int((experts >= 0).sum())), float(np.std(ratios))
