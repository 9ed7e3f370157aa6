"""Which experts stay: slots, policies, statistics. Imports no torch and moves no bytes."""

from moe_offload.cache.counts import LayerStats, Phase, PhaseCounts, PrefetchCounts, StatsSnapshot
from moe_offload.cache.expert_cache import ExpertCache
from moe_offload.cache.lease import Admit, Lease, Placement
from moe_offload.cache.policy import Policy
from moe_offload.cache.registry import DEFAULT_POLICY, LEARNED, make_policy, policy_names
from moe_offload.cache.stats import CacheStats
from moe_offload.cache.trace import CopyKind, EventKind, Outcome, RoutingTrace, TransferKind
from moe_offload.cache.trace_file import read_trace, write_trace

__all__ = [
    "DEFAULT_POLICY",
    "LEARNED",
    "Admit",
    "CacheStats",
    "CopyKind",
    "EventKind",
    "ExpertCache",
    "LayerStats",
    "Lease",
    "Outcome",
    "Phase",
    "PhaseCounts",
    "Placement",
    "Policy",
    "PrefetchCounts",
    "RoutingTrace",
    "StatsSnapshot",
    "TransferKind",
    "make_policy",
    "policy_names",
    "read_trace",
    "write_trace",
]
