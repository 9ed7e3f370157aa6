"""What a replay found."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_offload.cache.counts import LayerStats, Phase, StatsSnapshot
from moe_offload.cache.replay_arrays import ReplayEvents
from moe_offload.cache.replay_timing import SimulatedTime


@dataclass(frozen=True, eq=False)
class ReplayResult:
    """The counts of one policy and size on one trace, as a cache would have counted them."""

    policy: str
    num_slots: tuple[int, ...]  # by layer; of a pool, the fewest that a layer keeps
    pool_slots: int | None  # of all layers together
    stats: StatsSnapshot
    num_decode_tokens: int
    num_prefill_tokens: int
    expert_bytes: tuple[int, ...] | None  # by layer, where the trace tells
    events: ReplayEvents
    fetched: npt.NDArray[np.uint16]  # by event: experts that were not resident, with or without getting a slot
    time: SimulatedTime | None  # where rates were given

    @property
    def total_slots(self) -> int:
        """Over all layers."""
        return sum(self.num_slots) if self.pool_slots is None else self.pool_slots

    def hit_ratio(self, phase: Phase = "decode") -> float:
        return self.stats.decode.hit_ratio if phase == "decode" else self.stats.prefill.hit_ratio

    def layer_bytes(self, phase: Phase = "decode") -> tuple[int, ...] | None:
        """Bytes that were fetched, by layer; None where it is not known how large experts are.

        In decode with what was prefetched for nothing, where the time was simulated.
        """
        if self.expert_bytes is None:
            return None
        fetched = [_fetched(layer, phase) for layer in self.stats.layers]
        if self.time is not None and phase == "decode":
            fetched = [num + counts.wasted for num, counts in zip(fetched, self.time.prefetch, strict=True)]
        return tuple(num * size for num, size in zip(fetched, self.expert_bytes, strict=True))

    @property
    def seconds_per_token(self) -> float | None:
        """Of a decode token; None without rates."""
        if self.time is None or not self.num_decode_tokens:
            return None
        return self.time.decode_s / self.num_decode_tokens

    @property
    def bytes_per_token(self) -> float | None:
        """Fetched for a decode token, over all layers."""
        layer_bytes = self.layer_bytes()
        if layer_bytes is None or not self.num_decode_tokens:
            return None
        return sum(layer_bytes) / self.num_decode_tokens

    @property
    def fetched_per_token(self) -> float:
        """Experts fetched for a decode token, over all layers; 0 without any."""
        if not self.num_decode_tokens:
            return 0.0
        return sum(_fetched(layer, "decode") for layer in self.stats.layers) / self.num_decode_tokens


def gap_closed(hits: int, lru_hits: int, belady_hits: int) -> float | None:
    """Share of the way from LRU to Belady's optimum; None where they are equal."""
    if lru_hits == belady_hits:
        return None
    return (hits - lru_hits) / (belady_hits - lru_hits)


def _fetched(layer: LayerStats, phase: Phase) -> int:
    counts = layer.decode if phase == "decode" else layer.prefill
    return counts.misses + counts.bypassed
