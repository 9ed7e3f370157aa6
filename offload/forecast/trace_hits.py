"""Hit ratios of recorded routing, replayed through the runtime's default policy."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moe_offload.cache import DEFAULT_POLICY, EventKind, RoutingTrace, read_trace
from moe_offload.cache.replay import replay
from moe_offload.cache.replay_events import num_experts_of
from moe_offload.errors import ConfigError
from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.hit_ratio import HitCurve

_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8)
_PARTS = 5
_LEAST_SPREAD = 0.01


def trace_curve(path: Path) -> HitCurve:
    """The hits that a user's trace would have had at any size, in its decode steps.

    The band is as wide as parts of the trace differ. `ConfigError` for a file without a single decode token.
    """
    trace = read_trace(path)
    if trace.num_tokens == 0 or (trace.phase is not None and not trace.phase.any()):
        raise ConfigError(f"{path} has no decode tokens; record an answer, not only a prompt")
    part = np.arange(trace.num_tokens) * _PARTS // trace.num_tokens
    most_experts = int(num_experts_of(trace).max())
    points = []
    for num_slots in slots_at_shares(most_experts):
        ratio, spread = hit_ratio(trace, num_slots, part)
        spread = max(spread, _LEAST_SPREAD)
        points.append((num_slots / most_experts, Band(max(0.0, ratio - spread), ratio, min(1.0, ratio + spread))))
    return HitCurve(f"{path.name}, {trace.num_tokens} tokens", tuple(points))


def slots_at_shares(num_experts: int) -> list[int]:
    """The sizes at which hits are counted."""
    return sorted({max(1, round(share * num_experts)) for share in _SHARES})


def hit_ratio(trace: RoutingTrace, num_slots: int, part: npt.NDArray[np.integer]) -> tuple[float, float]:
    """The share of the experts of decode steps found in slots, and its standard deviation between parts.

    ``part [tokens]`` says which part each token is of. The cache lives on across parts; a first use is a miss.
    """
    result = replay(trace, policy=DEFAULT_POLICY, num_slots=num_slots)
    events = result.events
    decode = (events.kind == EventKind.ACQUIRE) & (events.is_prefill == 0)
    of_event = part[events.token[decode]]
    asked = np.bincount(of_event, np.diff(events.begin)[decode])
    missed = np.bincount(of_event, result.fetched[decode])
    there = asked > 0
    ratios = 1 - missed[there] / asked[there]
    return float(1 - missed.sum() / asked.sum()), float(np.std(ratios))
