"""What one token makes a model move: bytes of experts, of dense weights, of keys and values."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moe_offload.offload.forecast.band import Band
from moe_offload.offload.forecast.hit_ratio import HitCurve


@dataclass(frozen=True)
class LayerLoad:
    """One layer with experts: packed bytes of one expert, and the shares of its experts with slots in each tier."""

    num_experts: int
    top_k: int
    expert_bytes: int
    share: float
    host_share: float = 0.0


@dataclass(frozen=True)
class TokenLoad:
    """A decode step; ``dense_bytes`` are those it reads, not those it could."""

    layers: Sequence[LayerLoad]
    dense_bytes: int
    kv_bytes: int

    @property
    def expert_bytes(self) -> int:
        """Packed bytes of a token's experts in all layers."""
        return sum(layer.top_k * layer.expert_bytes for layer in self.layers)

    @property
    def memory_bytes(self) -> int:
        """Read from the memory that computes, each once."""
        return self.expert_bytes + self.dense_bytes + self.kv_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "dense_bytes": self.dense_bytes,
            "kv_bytes": self.kv_bytes,
            "layers": [asdict(layer) for layer in self.layers],
        }

    def hit_ratio(self, curve: HitCurve) -> Band:
        """Of a token's experts, by bytes: those found in compute slots."""
        return self._mean(curve, [layer.share for layer in self.layers])

    def reach(self, curve: HitCurve) -> Band:
        """Of a token's experts, by bytes: those found in any memory, so that the disk is left alone.

        What is in host slots may also be in compute slots or not: the best guess lies between.
        """
        same = self._mean(curve, [max(layer.share, layer.host_share) for layer in self.layers])
        apart = self._mean(curve, [min(1.0, layer.share + layer.host_share) for layer in self.layers])
        return Band(same.low, (same.mid + apart.mid) / 2, apart.high)

    def _mean(self, curve: HitCurve, shares: Sequence[float]) -> Band:
        low = mid = high = 0.0
        for layer, share in zip(self.layers, shares, strict=True):
            band, weight = curve.at(share), layer.top_k * layer.expert_bytes / self.expert_bytes
            low, mid, high = low + weight * band.low, mid + weight * band.mid, high + weight * band.high
        return Band(min(low, mid), mid, max(mid, high))
