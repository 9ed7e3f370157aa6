"""The figures to see first."""

import numpy as np

from moe_offload.cache.trace import Array, Outcome, RoutingTrace, TransferKind
from moe_offload.offload.planning.bound import Bottleneck, bound_of
from moe_offload.offload.profiling.facts import exactness
from moe_offload.offload.profiling.link import copied_by_step
from moe_offload.offload.profiling.prediction import in_decode
from moe_offload.offload.profiling.requests import Requests, Steps
from moe_offload.offload.profiling.run_facts import RunFacts
from moe_offload.offload.profiling.sections import BoundFigures, Header, Timing


def header(trace: RoutingTrace, facts: RunFacts, steps: Steps, requests: Requests, timing: Timing | None) -> Header:
    """Speed, hits, bytes, stall and bound, as far as the trace knows them."""
    speed = median_s = None
    if trace.step_us is not None and steps.is_decode.any():
        decode_us = trace.step_us[steps.is_decode]
        speed = facts.decode_tokens / (float(decode_us.sum(dtype=np.int64)) / 1e6)
        median_s = float(np.median(decode_us)) / 1e6
    first_s = [s.time_to_first_token_s for s in facts.sequences if s.time_to_first_token_s is not None]
    split = timing.decode if timing else None
    return Header(
        tokens_per_s=speed,
        median_step_s=median_s,
        time_to_first_token_s=sum(first_s) / len(first_s) if first_s else None,
        hit_ratio_decode=_hit_ratio(requests, requests.is_decode),
        hit_ratio_prefill=_hit_ratio(requests, ~requests.is_decode),
        disk_bytes_per_token=disk_bytes_per_token(trace, facts, steps, requests),
        pcie_bytes_per_token=pcie_bytes_per_token(trace, facts, steps, requests),
        stall_share=split.wait_s / split.clock_s if split else None,
        exactness=exactness(facts),
        bound=_bound(trace, facts, steps, requests, speed),
    )


def disk_bytes_per_token(trace: RoutingTrace, facts: RunFacts, steps: Steps, requests: Requests) -> float | None:
    """All that was read in decode but for a warm start; by outcomes where transfers were not recorded."""
    if trace.transfer_kind is not None:
        return _transferred(trace, steps, facts, (TransferKind.DEMAND, TransferKind.USED, TransferKind.WASTED))
    return needed_bytes_per_token(trace, facts, steps, requests)


def needed_bytes_per_token(trace: RoutingTrace, facts: RunFacts, steps: Steps, requests: Requests) -> float | None:
    """What had to be read in decode, at once or ahead of time: without what was read in vain."""
    if trace.transfer_kind is not None:
        return _transferred(trace, steps, facts, (TransferKind.DEMAND, TransferKind.USED))
    if facts.is_cuda:
        return None  # an expert that missed in VRAM may have been in RAM
    return _bytes_of_outcomes(trace, facts, requests)


def pcie_bytes_per_token(trace: RoutingTrace, facts: RunFacts, steps: Steps, requests: Requests) -> float | None:
    """What was copied to GPUs in decode, by outcomes where copies were not recorded; None where the CPU computes."""
    copied = copied_by_step(trace)
    if copied is not None:
        return _per_token(int((copied["demand_bytes"] + copied["ahead_bytes"])[steps.is_decode].sum()), facts)
    return needed_pcie_bytes_per_token(trace, facts, requests)


def needed_pcie_bytes_per_token(trace: RoutingTrace, facts: RunFacts, requests: Requests) -> float | None:
    """What had to be copied, at once or ahead of time: without what was copied in vain."""
    return _bytes_of_outcomes(trace, facts, requests) if facts.is_cuda else None


def _transferred(trace: RoutingTrace, steps: Steps, facts: RunFacts, kinds: tuple[TransferKind, ...]) -> float | None:
    assert trace.transfer_kind is not None
    assert trace.transfer_bytes is not None
    chosen = in_decode(trace, steps) & np.isin(trace.transfer_kind, kinds)
    return _per_token(int(trace.transfer_bytes[chosen].sum(dtype=np.int64)), facts)


def _bytes_of_outcomes(trace: RoutingTrace, facts: RunFacts, requests: Requests) -> float | None:
    """Of the experts that were not resident when they were asked for, or only because they were prefetched."""
    if requests.outcome is None or trace.expert_bytes is None:
        return None
    moved = requests.is_decode & (requests.outcome != Outcome.RESIDENT) & (requests.outcome != Outcome.UNKNOWN)
    return _per_token(int(trace.expert_bytes[requests.layer[moved]].sum()), facts)


def _per_token(num_bytes: int, facts: RunFacts) -> float | None:
    return num_bytes / facts.decode_tokens if facts.decode_tokens else None


def _hit_ratio(requests: Requests, chosen: Array) -> float | None:
    hits = requests.is_hit
    return None if hits is None or not chosen.any() else float(hits[chosen].mean())


def _bound(
    trace: RoutingTrace, facts: RunFacts, steps: Steps, requests: Requests, speed: float | None
) -> BoundFigures | None:
    """As ``moe-offload bench`` has it; from those rates and bytes that are known."""
    rates, seconds = facts.rates, dict[Bottleneck, float]()
    if rates.memory_bytes_per_s and trace.expert_bytes is not None and not facts.is_cuda and facts.decode_tokens:
        chosen = requests.layer[requests.is_decode]
        expert_bytes = int(trace.expert_bytes[chosen].sum()) / facts.decode_tokens
        memory_bytes = expert_bytes + (facts.dense_bytes or 0) + (facts.kv_bytes or 0)
        seconds["memory"] = memory_bytes / rates.memory_bytes_per_s
    needed = needed_bytes_per_token(trace, facts, steps, requests)
    if rates.disk_bytes_per_s and needed is not None:
        seconds["disk"] = needed / rates.disk_bytes_per_s
    copied = needed_pcie_bytes_per_token(trace, facts, requests)
    if rates.pcie_bytes_per_s and copied is not None:
        seconds["pcie"] = copied / rates.pcie_bytes_per_s
    if speed is None or not any(seconds.values()):
        return None
    bound = bound_of(seconds)
    assert bound.by != "compute"
    return BoundFigures(bound.tokens_per_s, bound.by, speed / bound.tokens_per_s)
