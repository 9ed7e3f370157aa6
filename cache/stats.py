"""The running counts of a cache."""

import threading
from collections.abc import Sequence

from moe_offload.cache.counts import Phase, StatsSnapshot
from moe_offload.cache.layer import Layer


class CacheStats:
    """What a cache has counted since its start or the last reset."""

    def __init__(self, lock: threading.Lock, layers: Sequence[Layer]) -> None:
        self._lock = lock
        self._layers = layers

    def snapshot(self) -> StatsSnapshot:
        """Consistent across layers, whatever other threads are doing."""
        with self._lock:
            return StatsSnapshot(tuple(layer.freeze_counts() for layer in self._layers))

    def num_missed(self, phase: Phase) -> int:
        """Requests that found no slot with their expert, with or without getting one; cheap enough for every step."""
        with self._lock:
            return sum(layer.num_missed(phase) for layer in self._layers)

    def reset(self) -> None:
        """Start from zero; prefetches that nobody has used or wasted yet count as issued anew."""
        with self._lock:
            for layer in self._layers:
                layer.reset_counts()
