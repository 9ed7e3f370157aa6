"""The events of a replay as arrays, as the C++ library takes them."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moe_offload.cache import kernels
from moe_offload.cache.trace import Array, EventKind

Counting = Literal["run", "token"]


@dataclass(frozen=True, eq=False)
class ReplayEvents:
    """Steps of layers, and the places where another text begins; contiguous arrays, as the C++ library takes them.

    The experts of event i are ``expert_ids[begin[i]:begin[i + 1]]``, all different, best first.
    """

    kind: npt.NDArray[np.uint8]  # `EventKind`: ACQUIRE, ACQUIRE_IF_HOTTER or NEW_SEQUENCE
    is_prefill: npt.NDArray[np.uint8]
    layer_idx: npt.NDArray[np.int32]
    token: npt.NDArray[np.int64]  # the first of the event
    begin: npt.NDArray[np.int64]
    expert_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64] | None  # of each expert, as fp16 has it; NaN in events without weights
    token_ids: npt.NDArray[np.int32] | None  # of each event; -1 for more than one token
    num_experts: npt.NDArray[np.int32]  # by layer
    num_decode_tokens: int
    num_prefill_tokens: int

    @property
    def num_events(self) -> int:
        return len(self.kind)

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    @property
    def always_admits(self) -> bool:
        """Whether every step evicts for all of its experts."""
        return not (self.kind == EventKind.ACQUIRE_IF_HOTTER).any()

    def native(self) -> kernels.Events:
        """As the library takes them; valid while these arrays are."""

        def address(array: npt.NDArray[Any] | None) -> int | None:
            return None if array is None else array.ctypes.data

        return kernels.Events(
            address(self.kind),
            address(self.is_prefill),
            address(self.layer_idx),
            address(self.begin),
            address(self.expert_ids),
            address(self.weights),
            address(self.token_ids),
            address(self.num_experts),
            self.num_events,
            self.num_layers,
        )

    def most_asked(self) -> npt.NDArray[np.int64]:
        """By layer, the most experts of one step that evicts for all of them: with fewer slots some are bypassed."""
        most = np.zeros(self.num_layers, np.int64)
        sizes = np.where(self.kind == EventKind.ACQUIRE, np.diff(self.begin), 0)
        np.maximum.at(most, self.layer_idx, sizes)
        return most


def as_fp16(weights: Array) -> npt.NDArray[np.float64]:
    """Rounded as traces hold them, so that every source of weights gives a policy the same numbers."""
    with np.errstate(over="ignore"):
        return weights.astype(np.float32).astype(np.float16).astype(np.float64)


def offsets(sizes: Array) -> npt.NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
