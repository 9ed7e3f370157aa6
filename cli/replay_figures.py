"""What ``moe-offload replay`` shows of one trace: rows and curves, and the same as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_offload.cache import RoutingTrace
from moe_offload.cache.replay import share_of_slots
from moe_offload.cache.replay_arrays import Counting
from moe_offload.cache.replay_compare import ComparedRow, compare
from moe_offload.cache.replay_curves import Curve, curve
from moe_offload.cache.replay_events import num_experts_of
from moe_offload.cache.replay_python import BELADY
from moe_offload.cache.replay_timing import Lookahead, Rates

_DEFAULT_SHARES = (0.25, 0.5)


@dataclass(frozen=True, eq=False)
class TraceFigures:
    name: str
    trace: RoutingTrace
    counting: Counting
    num_experts: int  # of the largest layer
    rates: Rates | None
    lookahead: Lookahead | None
    rows: list[ComparedRow]
    curves: list[Curve]

    def to_dict(self) -> dict[str, Any]:
        return {
            "trace": self.name,
            "tokens": self.trace.num_tokens,
            "layers": self.trace.num_layers,
            "experts": self.num_experts,
            "top_k": self.trace.top_k,
            "counting": self.counting,
            "rates": None if self.rates is None else asdict(self.rates),
            "lookahead": None if self.lookahead is None else asdict(self.lookahead),
            "rows": [_row(row) for row in self.rows],
            "curves": [_curve(found) for found in self.curves],
        }


def figures(
    name: str,
    trace: RoutingTrace,
    policies: Sequence[str],
    slots: Sequence[int | float],
    *,
    pool: bool,
    with_curves: bool,
    counting: Counting,
    rates: Rates | None,
    recall: float,
    precision: float,
    expert_bytes: int | None,
) -> TraceFigures:
    """``slots``: numbers, or shares of the experts as floats; none: those of the run, else a quarter and a half."""
    num_experts = num_experts_of(trace)
    if not slots and trace.num_slots is not None:
        sizes = [tuple(trace.num_slots.tolist())]
    else:
        sizes = [
            share_of_slots(trace, size) if isinstance(size, float) else tuple(num_experts.clip(max=size).tolist())
            for size in slots or _DEFAULT_SHARES
        ]
    lookahead = None if rates is None else Lookahead(recall, precision)
    rows = compare(
        trace,
        policies,
        sizes,
        pool=pool,
        counting=counting,
        rates=rates,
        lookahead=lookahead,
        expert_bytes=expert_bytes,
    )
    curves = [curve(trace, policy, counting=counting) for policy in policies] if with_curves else []
    return TraceFigures(name, trace, counting, int(num_experts.max()), rates, lookahead, rows, curves)


def _row(row: ComparedRow) -> dict[str, Any]:
    result = row.result
    return {
        "policy": result.policy,
        "slots": list(result.num_slots),
        "pool_slots": result.pool_slots,
        "phase": row.phase,
        "hit_ratio": row.counts.hit_ratio,
        "gap_closed": row.gap_closed,
        "decode": asdict(result.stats.decode),
        "prefill": asdict(result.stats.prefill),
        "fetched_per_token": result.fetched_per_token,
        "bytes_per_token": result.bytes_per_token,
        "seconds_per_token": result.seconds_per_token,
        "time": None if result.time is None else asdict(result.time),
        "layers": [{"decode": asdict(layer.decode), "prefill": asdict(layer.prefill)} for layer in result.stats.layers],
    }


def _curve(found: Curve) -> dict[str, Any]:
    return {
        "policy": found.policy,
        "slots": list(found.sizes),
        "hit_ratio": list(found.hit_ratio("decode")),
        "prefill_hit_ratio": list(found.hit_ratio("prefill")),
        "knee_slots": found.knee(),
    }


def mean_gap_closed(found: Sequence[TraceFigures]) -> dict[str, float]:
    """By policy, over all traces and sizes; without the ends of the gap."""
    of_policy: dict[str, list[float]] = {}
    for each in found:
        for row in each.rows:
            if row.gap_closed is not None and row.result.policy not in ("lru", BELADY):
                label = row.result.policy if row.result.pool_slots is None else f"{row.result.policy}, pool"
                of_policy.setdefault(label, []).append(row.gap_closed)
    return {policy: sum(shares) / len(shares) for policy, shares in of_policy.items()}
