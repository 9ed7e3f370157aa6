"""Hit ratio against cache size: the run's own requests, replayed with other policies and sizes."""

from collections.abc import Sequence

import numpy as np

from moe_offload.cache.replay import replay_policies, run, snapshot
from moe_offload.cache.replay_events import ReplayEvents, events_of
from moe_offload.cache.replay_python import BELADY
from moe_offload.cache.trace import Outcome, RoutingTrace
from moe_offload.offload.profiling.requests import Requests, num_experts
from moe_offload.offload.profiling.run_facts import RunFacts
from moe_offload.offload.profiling.sections import CurvePoint, Curves, PolicyCurve

_LABELS = {"lru": "LRU", "lfu": "LFU", "decay": "decayed frequency", BELADY: "Belady's optimum"}
_SIZES = 16


def curves(trace: RoutingTrace, facts: RunFacts, requests: Requests) -> Curves:
    """One curve for every policy, from as many slots as a token needs to all experts."""
    events = events_of(trace)
    sizes = num_experts(trace)
    grid = slot_grid(sizes, trace.top_k)
    found = tuple(_curve(trace, events, policy, grid) for policy in replay_policies())
    best = max((curve for curve in found if not curve.is_bound), key=lambda curve: sum(curve.hit_ratio))
    return Curves(
        curves=found,
        today=_today(trace, events, facts),
        measured_hit_ratio=_share(requests, (Outcome.RESIDENT, Outcome.PREFETCHED, Outcome.LATE)),
        measured_resident_ratio=_share(requests, (Outcome.RESIDENT,)),
        knee=knee(best),
        knee_policy=best.policy,
    )


def slot_grid(sizes: Sequence[int], top_k: int) -> list[list[int]]:
    """Slots of every layer, at equal shares of its experts, from those of one token to all."""
    shares = np.arange(1, _SIZES + 1) / _SIZES
    rows = {tuple(min(size, max(top_k, round(share * size))) for size in sizes) for share in shares}
    return [list(row) for row in sorted(rows)]


def hit_ratio(events: ReplayEvents, policy: str, slots: Sequence[int]) -> float:
    """In decode, with so many slots by layer."""
    counts, _ = run(events, policy, np.array(slots, np.int32))
    return snapshot(counts).decode.hit_ratio


def knee(curve: PolicyCurve) -> CurvePoint | None:
    """Where a curve lies furthest above the line from its first point to its last.

    Satopaa, Albrecht, Irwin, Raghavan: "Finding a Kneedle in a Haystack", ICDCS workshops 2011, without smoothing.
    """
    x, y = np.array(curve.resident_share), np.array(curve.hit_ratio)
    if len(x) < 3 or y[-1] <= y[0]:
        return None
    above = (y - y[0]) / (y[-1] - y[0]) - (x - x[0]) / (x[-1] - x[0])
    at = int(above.argmax())
    if above[at] <= 0:
        return None
    return CurvePoint(
        curve.slots[at],
        curve.resident_share[at],
        None if curve.resident_bytes is None else curve.resident_bytes[at],
        curve.hit_ratio[at],
    )


def _curve(trace: RoutingTrace, events: ReplayEvents, policy: str, grid: list[list[int]]) -> PolicyCurve:
    points = [_point(trace, slots, hit_ratio(events, policy, slots)) for slots in grid]
    bytes_ = [point.resident_bytes for point in points if point.resident_bytes is not None]
    return PolicyCurve(
        policy=policy,
        label=_LABELS.get(policy, policy),
        is_bound=policy == BELADY,
        slots=tuple(point.slots for point in points),
        resident_share=tuple(point.resident_share for point in points),
        resident_bytes=tuple(bytes_) if len(bytes_) == len(points) else None,
        hit_ratio=tuple(point.hit_ratio for point in points),
    )


def _point(trace: RoutingTrace, slots: Sequence[int], ratio: float) -> CurvePoint:
    resident_bytes = None if trace.expert_bytes is None else int(np.dot(slots, trace.expert_bytes))
    return CurvePoint(sum(slots), sum(slots) / sum(num_experts(trace)), resident_bytes, ratio)


def _today(trace: RoutingTrace, events: ReplayEvents, facts: RunFacts) -> CurvePoint | None:
    """The run's slots under its policy."""
    if trace.num_slots is None or facts.policy not in replay_policies():
        return None
    slots = np.minimum(trace.num_slots, num_experts(trace)).tolist()
    return _point(trace, slots, hit_ratio(events, facts.policy, slots))


def _share(requests: Requests, outcomes: tuple[Outcome, ...]) -> float | None:
    if requests.outcome is None or not requests.is_decode.any():
        return None
    return float(np.isin(requests.outcome[requests.is_decode], outcomes).mean())
