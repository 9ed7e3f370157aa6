"""Which experts stay: slots, policies, statistics. Imports no torch and moves no bytes."""

from moe_offload.cache.counts import LayerStats, Phase, PhaseCounts, PrefetchCounts, StatsSnapshot
from moe_offload.cache.expert_cache import ExpertCache
from moe_offload.cache.lease import Admit, Lease, Placement
from moe_offload.cache.policy import Policy
from moe_offload.cache.registry import make_policy, policy_names
from moe_offload.cache.stats import CacheStats

__all__ = [
    "Admit",
    "CacheStats",
    "ExpertCache",
    "LayerStats",
    "Lease",
    "Phase",
    "PhaseCounts",
    "Placement",
    "Policy",
    "PrefetchCounts",
    "StatsSnapshot",
    "make_policy",
    "policy_names",
]
