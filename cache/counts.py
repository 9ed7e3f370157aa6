"""What is counted, running and frozen."""

from dataclasses import dataclass
from typing import Literal, Self

Phase = Literal["decode", "prefill"]


@dataclass(frozen=True)
class _Counts:
    """Counts that add and subtract field by field."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __sub__(self, other: Self) -> Self:
        return type(self)(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class PhaseCounts(_Counts):
    """Requests for experts, one per expert and step: requests == hits + misses + bypassed."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    evictions: int = 0

    @property
    def hit_ratio(self) -> float:
        """Share of the requests that found their expert resident or on its way; 0 without requests."""
        return self.hits / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class PrefetchCounts(_Counts):
    """Speculative loads, in experts: issued == used + late + wasted + those whose fate is open.

    ``used`` were asked for after their bytes had arrived, ``late`` before; ``wasted`` left without any use.
    """

    issued: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    evictions: int = 0


@dataclass(frozen=True)
class LayerStats:
    """The counts of one layer, or of several added up."""

    decode: PhaseCounts = PhaseCounts()
    prefill: PhaseCounts = PhaseCounts()
    prefetch: PrefetchCounts = PrefetchCounts()

    @property
    def total(self) -> PhaseCounts:
        """Decode and prefill together."""
        return self.decode + self.prefill

    def __add__(self, other: Self) -> "LayerStats":
        return LayerStats(self.decode + other.decode, self.prefill + other.prefill, self.prefetch + other.prefetch)

    def __sub__(self, other: Self) -> "LayerStats":
        return LayerStats(self.decode - other.decode, self.prefill - other.prefill, self.prefetch - other.prefetch)


@dataclass(frozen=True)
class StatsSnapshot:
    """All counts at one moment."""

    layers: tuple[LayerStats, ...]

    @property
    def all_layers(self) -> LayerStats:
        """The layers added up."""
        return sum(self.layers, start=LayerStats())

    @property
    def decode(self) -> PhaseCounts:
        return self.all_layers.decode

    @property
    def prefill(self) -> PhaseCounts:
        return self.all_layers.prefill

    @property
    def prefetch(self) -> PrefetchCounts:
        return self.all_layers.prefetch

    @property
    def total(self) -> PhaseCounts:
        """Decode and prefill together."""
        return self.all_layers.total

    @property
    def hit_ratio(self) -> float:
        """Of decode and prefill together."""
        return self.total.hit_ratio

    def diff(self, earlier: "StatsSnapshot") -> "StatsSnapshot":
        """What was counted since an earlier snapshot of the same cache."""
        return StatsSnapshot(tuple(new - old for new, old in zip(self.layers, earlier.layers, strict=True)))


@dataclass(slots=True)
class PhaseCounters:
    """The running form of `PhaseCounts`."""

    requests: int = 0
    hits: int = 0
    misses: int = 0
    bypassed: int = 0
    evictions: int = 0

    def freeze(self) -> PhaseCounts:
        return PhaseCounts(self.requests, self.hits, self.misses, self.bypassed, self.evictions)


@dataclass(slots=True)
class PrefetchCounters:
    """The running form of `PrefetchCounts`."""

    issued: int = 0
    used: int = 0
    late: int = 0
    wasted: int = 0
    evictions: int = 0

    def freeze(self) -> PrefetchCounts:
        return PrefetchCounts(self.issued, self.used, self.late, self.wasted, self.evictions)
