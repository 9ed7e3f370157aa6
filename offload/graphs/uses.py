"""Uses of experts that the device found by itself, told to the cache when there is time for it."""

import threading
from collections.abc import Sequence
from typing import Any, Protocol

from moe_offload.offload.graphs.routing_record import routing_of
from moe_offload.offload.graphs.step_recording import ExpertsCall


class UseListener(Protocol):
    """Residency, as far as it counts."""

    def note_used(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float]) -> None: ...


class PendingUses:
    """The last step's. Told late, but before anything is decided that they have a say in."""

    def __init__(self, listener: UseListener) -> None:
        self._listener = listener
        self._pending: tuple[Sequence[ExpertsCall], Any] = ((), ())
        self._lock = threading.Lock()

    def add(self, calls: Sequence[ExpertsCall], rows: Any) -> None:
        """A step has used what its routing record says; the uses of the one before are told."""
        with self._lock:
            self._pending = calls, rows

    def tell(self) -> None:
        """Of what is still untold."""
        with self._lock:
            (calls, rows), self._pending = self._pending, ((), ())
        for call, row in zip(calls, rows, strict=False):
            routing = routing_of(row, call.num_pairs, call.num_experts)
            self._listener.note_used(call.layer_idx, routing.expert_ids, routing.weights)
