"""A decode step that was recorded, and the two ways of running it again."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from moe_offload.offload.graphs.recorder import Replay
from moe_offload.offload.graphs.routing_record import RoutingRecord, routing_of
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.step_recording import ExpertsCall, StepRecording
from moe_offload.offload.graphs.uses import PendingUses


class ResidentExperts(Protocol):
    """What a step asks of residency, beyond what the experts' own eager code does."""

    def run_resident(
        self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float], compute: Callable[[list[int]], None]
    ) -> bool: ...


class CapturedStep:
    """Pieces between experts, and the experts. Both ways compute what the model's own code would, bit for bit."""

    def __init__(self, recording: StepRecording, last: Replay, record: RoutingRecord, output: Any) -> None:
        """``output``: what the model's code returned, whose tensors every run writes anew."""
        self.output = output
        self._recording, self._record = recording, record
        self._pieces, self._last, self._calls = recording.pieces, last, recording.calls
        self._num_experts = [call.num_experts for call in self._calls]

    @property
    def can_run_whole(self) -> bool:
        """Whether the experts of every layer can be computed from the slots that the device finds by itself."""
        return all(call.on_slots is not None for call in self._calls)

    def run_by_layers(self, residency: ResidentExperts) -> bool:
        """Ask at every layer; one that misses leaves the graph for its experts alone. Whether any did."""
        missed = False
        for call_idx, (piece, call) in enumerate(zip(self._pieces, self._calls, strict=True)):
            piece()
            if not self._run_resident(call_idx, call, residency):
                missed = True
                call.out.copy_(call.eager())
        self._last()
        return missed

    def _run_resident(self, call_idx: int, call: ExpertsCall, residency: ResidentExperts) -> bool:
        replay = call.on_slots
        if replay is None:
            return False
        self._record.fetch(call_idx, call_idx + 1)
        routing = routing_of(self._record.row(call_idx), call.num_pairs, call.num_experts)

        def compute(slots: list[int]) -> None:
            self._record.send_slots(call_idx, [slots[place] if place >= 0 else -1 for place in routing.places])
            replay()

        return residency.run_resident(call.layer_idx, routing.expert_ids, routing.weights, compute)

    def run_whole(self, table: SlotTable, uses: PendingUses) -> bool:
        """Launch everything, then look. False if an expert was missing: what was computed is void then."""
        with table.step():
            for piece, call in zip(self._pieces, self._calls, strict=True):
                piece()
                assert call.on_slots is not None, "asked of a step that can"
                call.on_slots()
            self._last()
        uses.tell()  # while the device is at work
        self._record.fetch(0, len(self._calls))
        if self._record.missed(self._num_experts):
            return False
        uses.add(self._calls, self._record.copy_of(len(self._calls)))
        return True
