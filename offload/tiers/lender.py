"""Experts in host memory below a device, lent to the CPU: it computes them while the device computes others."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.offload.tiers.host_rows import RowsPool


class LentExpert(NamedTuple):
    """``weights`` lie in host memory, and their bytes stay as they are until ``give_back``, which is called once."""

    weights: ExpertWeights
    give_back: Callable[[], None]


class Lender(Protocol):
    """What the CPU needs of a tier whose experts are computed elsewhere. Any thread may call any method."""

    def lends(self, layer_idx: int) -> bool:
        """Whether experts of this layer are kept in host memory."""

    def lend(
        self,
        layer_idx: int,
        expert_idx: int,
        *,
        lent: Callable[[LentExpert], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Hand out an expert of a layer that lends, once it is there: one of the two is called once, from any thread.

        Raises ExpertReadError, and calls neither, when the tier is closed.
        """

    def rows(self, layer_idx: int) -> RowsPool:
        """What moves rows between the host and the layer's device."""

    def copy_s_per_byte(self, layer_idx: int) -> float:
        """What a byte has taken of late to the layer's device; 0 while that is not known."""

    def expert_bytes(self, layer_idx: int) -> int:
        """The size of an expert of this layer."""
