"""Policies and sizes beside each other on one trace, between LRU and the optimum."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_offload.cache.counts import Phase, PhaseCounts
from moe_offload.cache.replay import Slots, belady, replay
from moe_offload.cache.replay_arrays import Counting
from moe_offload.cache.replay_result import ReplayResult, gap_closed
from moe_offload.cache.replay_timing import Lookahead, Rates
from moe_offload.cache.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class ComparedRow:
    """One policy at one size."""

    result: ReplayResult
    phase: Phase  # what the ratios are of: decode, where the trace has any
    gap_closed: float | None  # share of the way from LRU to the optimum, both with slots of each layer's own

    @property
    def counts(self) -> PhaseCounts:
        return counts_of(self.result, self.phase)


def compare(
    trace: RoutingTrace,
    policies: Sequence[str],
    sizes: Sequence[Slots],
    *,
    pool: bool = False,
    counting: Counting = "run",
    rates: Rates | None = None,
    lookahead: Lookahead | None = None,
    expert_bytes: int | None = None,
) -> list[ComparedRow]:
    """Every policy at every size; with ``pool`` also as one pool of all layers of that many slots together."""
    rows = []
    for num_slots in sizes:
        lru = replay(trace, policy="lru", num_slots=num_slots, counting=counting)
        best = belady(trace, num_slots=num_slots, counting=counting)
        phase: Phase = "decode" if best.stats.decode.requests else "prefill"
        ends = [counts_of(end, phase).hits for end in (lru, best)]
        for pool_slots in (None, best.total_slots) if pool else (None,):
            for policy in policies:
                result = replay(
                    trace,
                    policy=policy,
                    num_slots=num_slots,
                    pool_slots=pool_slots,
                    counting=counting,
                    rates=rates,
                    lookahead=lookahead,
                    expert_bytes=expert_bytes,
                )
                rows.append(ComparedRow(result, phase, gap_closed(counts_of(result, phase).hits, *ends)))
    return rows


def counts_of(result: ReplayResult, phase: Phase) -> PhaseCounts:
    return result.stats.decode if phase == "decode" else result.stats.prefill
