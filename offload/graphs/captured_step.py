"""A decode step that was recorded, and the two ways of running it again."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from moe_offload.offload.experts.step_observer import StepObserver
from moe_offload.offload.graphs.recorder import Replay
from moe_offload.offload.graphs.routing_record import Routing, RoutingRecord, routing_of
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.step_recording import ExpertsCall, StepRecording
from moe_offload.offload.graphs.uses import PendingUses


class ResidentExperts(Protocol):
    """What a step asks of residency, beyond what the experts' own eager code does."""

    def run_resident(
        self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float], compute: Callable[[list[int]], None]
    ) -> bool: ...


class Foresight(Protocol):
    """What a step tells of the predictions that it has made; see `experts.lookahead`."""

    def fetched(self, layer_idx: int, predictions: Sequence[tuple[int, Sequence[int]]]) -> None: ...
    def after_routing(self, layer_idx: int, expert_ids: Sequence[int]) -> None: ...


LookAhead = Callable[[], None]


class CapturedStep:
    """Pieces between experts, and the experts. Both ways compute what the model's own code would, bit for bit."""

    def __init__(self, recording: StepRecording, last: Replay, record: RoutingRecord, output: Any) -> None:
        """``output``: what the model's code returned, whose tensors every run writes anew."""
        self.output = output
        self._recording, self._record = recording, record
        self._pieces, self._last, self._calls = recording.pieces, last, recording.calls
        self._num_experts = [call.num_experts for call in self._calls]
        self._looks_ahead = any(call.ahead for call in self._calls)

    @property
    def can_run_whole(self) -> bool:
        """Whether the experts of every layer can be computed from the slots that the device finds by itself."""
        return not self._looks_ahead and all(call.on_slots is not None for call in self._calls)

    def run_by_layers(
        self, residency: ResidentExperts, foresight: Foresight, observer: StepObserver | None = None
    ) -> bool:
        """Ask at every layer; one that misses leaves the graph for its experts alone. Whether any did."""
        missed = False
        look_ahead: LookAhead | None = None
        for call_idx, piece in enumerate(self._pieces):
            piece()
            if look_ahead is not None:  # of the layer before, while the device is at work
                look_ahead()
            found, look_ahead = self._run_experts(call_idx, residency, foresight, observer)
            missed |= not found
        self._last()
        if look_ahead is not None:
            look_ahead()
        return missed

    def _run_experts(
        self, call_idx: int, residency: ResidentExperts, foresight: Foresight, observer: StepObserver | None
    ) -> tuple[bool, LookAhead | None]:
        """Whether all experts were there; and what is to be done about later layers when the next piece is launched."""
        call = self._calls[call_idx]
        self._record.fetch(call_idx, call_idx + 1)
        routing = routing_of(self._record.row(call_idx), call.num_pairs, call.num_experts)
        if observer is not None:
            index, weights = (torch.tensor(values).view(call.shape) for values in routing.pairs)
            observer.begin_layer(call.layer_idx, index, weights)
        predictions = [
            (target_idx, self._record.ahead(call_idx, number, num_pairs))
            for number, (target_idx, num_pairs) in enumerate(call.ahead)
        ]

        def look_ahead() -> None:
            foresight.fetched(call.layer_idx, predictions)
            foresight.after_routing(call.layer_idx, routing.expert_ids)

        found = self._run_resident(call_idx, call, routing, residency)
        if not found:
            foresight.fetched(call.layer_idx, predictions)
            call.out.copy_(call.eager(known=routing))
        if observer is None:
            return found, look_ahead if found and self._looks_ahead else None
        if found and self._looks_ahead:
            observer.look_ahead(look_ahead)
        observer.end_layer()
        return found, None

    def _run_resident(self, call_idx: int, call: ExpertsCall, routing: Routing, residency: ResidentExperts) -> bool:
        replay = call.on_slots
        if replay is None:
            return False

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
