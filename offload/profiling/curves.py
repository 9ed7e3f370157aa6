"""Hit ratio against cache size: the run's own requests, replayed with other policies and sizes."""

from collections.abc import Sequence

import numpy as np

from moe_offload.cache.replay import replay, replay_policies
from moe_offload.cache.replay_curves import Curve, curve
from moe_offload.cache.replay_python import BELADY
from moe_offload.cache.trace import Outcome, RoutingTrace
from moe_offload.offload.profiling.requests import Requests, num_experts
from moe_offload.offload.profiling.run_facts import RunFacts
from moe_offload.offload.profiling.sections import CurvePoint, Curves, PolicyCurve

_LABELS = {
    "lru": "LRU",
    "lfu": "LFU",
    "decay": "decayed frequency",
    "recall": "recall of like tokens",
    BELADY: "Belady's optimum",
}


def curves(trace: RoutingTrace, facts: RunFacts, requests: Requests) -> Curves:
    """One curve for every policy, from as many slots as a token needs to all experts."""
    found = [curve(trace, policy) for policy in replay_policies()]
    best = max((one for one in found if one.policy != BELADY), key=lambda one: sum(one.hit_ratio()))
    return Curves(
        curves=tuple(_policy_curve(trace, one) for one in found),
        today=_today(trace, facts),
        measured_hit_ratio=_share(requests, (Outcome.RESIDENT, Outcome.PREFETCHED, Outcome.LATE)),
        measured_resident_ratio=_share(requests, (Outcome.RESIDENT,)),
        knee=_knee(trace, best),
        knee_policy=best.policy,
    )


def _policy_curve(trace: RoutingTrace, one: Curve) -> PolicyCurve:
    points = [_point(trace, one, index) for index in range(len(one.sizes))]
    bytes_ = [point.resident_bytes for point in points if point.resident_bytes is not None]
    return PolicyCurve(
        policy=one.policy,
        label=_LABELS.get(one.policy, one.policy),
        is_bound=one.policy == BELADY,
        slots=tuple(point.slots for point in points),
        resident_share=tuple(point.resident_share for point in points),
        resident_bytes=tuple(bytes_) if len(bytes_) == len(points) else None,
        hit_ratio=tuple(point.hit_ratio for point in points),
    )


def _knee(trace: RoutingTrace, one: Curve) -> CurvePoint | None:
    """None where the curve has none: it is a straight line, or too short."""
    index = one.sizes.index(one.knee())
    return _point(trace, one, index) if 0 < index < len(one.sizes) - 1 else None


def _point(trace: RoutingTrace, one: Curve, index: int) -> CurvePoint:
    slots = [min(size, one.sizes[index]) for size in num_experts(trace)]
    return _at(trace, slots, one.hit_ratio()[index])


def _at(trace: RoutingTrace, slots: Sequence[int], ratio: float) -> CurvePoint:
    resident_bytes = None if trace.expert_bytes is None else int(np.dot(slots, trace.expert_bytes))
    return CurvePoint(sum(slots), sum(slots) / sum(num_experts(trace)), resident_bytes, ratio)


def _today(trace: RoutingTrace, facts: RunFacts) -> CurvePoint | None:
    """The run's slots under its policy."""
    if trace.num_slots is None or facts.policy not in replay_policies():
        return None
    slots = np.minimum(trace.num_slots, num_experts(trace)).tolist()
    return _at(trace, slots, replay(trace, policy=facts.policy, num_slots=slots).hit_ratio())


def _share(requests: Requests, outcomes: tuple[Outcome, ...]) -> float | None:
    if requests.outcome is None or not requests.is_decode.any():
        return None
    return float(np.isin(requests.outcome[requests.is_decode], outcomes).mean())
