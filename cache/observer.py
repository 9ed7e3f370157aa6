"""Who is told what a cache is asked for, in the order in which it sees it."""

from collections.abc import Sequence
from typing import Protocol

from moe_offload.cache.lease import Admit, Lease
from moe_offload.cache.trace import EventKind


class CacheObserver(Protocol):
    """Called under the cache's lock: to be quick, not to raise, and not to call the cache."""

    def acquired(self, lease: Lease, expert_ids: Sequence[int], weights: Sequence[float] | None, admit: Admit) -> None:
        """A step asked for experts, and this is what it got."""

    def told(self, kind: EventKind, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Anything else: see `EventKind`."""
