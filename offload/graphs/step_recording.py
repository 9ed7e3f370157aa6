"""Records one decode step piece by piece, from experts to experts, while the model's own code runs through it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moe_offload.offload.graphs.recorder import Recorder, RecordingError, Replay
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import ABSENT

OnSlots = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``(x [T, H], slots int32 [T, K], weights fp32 [T, K], out [T, H])``: all of a layer's experts, from these slots."""


@dataclass(frozen=True)
class ExpertsCall:
    """One layer's experts in a recorded step."""

    layer_idx: int
    num_experts: int
    num_pairs: int
    out: torch.Tensor
    eager: Callable[[], torch.Tensor]
    """Computes the same as ever, misses and all, from what the piece before has left."""
    on_slots: Replay | None
    """Computes ``out`` from the slots in the routing record; None if no kernel can."""


class StepRecording:
    """A recording under way. `experts` stands in for the experts of every layer."""

    def __init__(self, recorder: Recorder, record: RoutingRecord, slot_of: torch.Tensor) -> None:
        """``slot_of``: the device's table."""
        self.pieces: list[Replay] = []
        self.calls: list[ExpertsCall] = []
        self.held: list[Sequence[torch.Tensor]] = []
        """What experts read and write: its memory is not to be taken for something else as long as any piece is."""
        self._recorder, self._record, self._slot_of = recorder, record, slot_of

    def experts(
        self,
        layer_idx: int,
        num_experts: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        eager: Callable[[], torch.Tensor],
        on_slots: OnSlots | None,
    ) -> torch.Tensor:
        """End the piece that leads here, record the experts apart, and begin the next piece; their output."""
        call_idx, num_pairs = len(self.calls), top_k_index.numel()
        if call_idx == self._record.num_calls or num_pairs > self._record.num_pairs:
            raise RecordingError(f"the experts of layer {layer_idx} are called in a way that was not foreseen")
        slots, weights = self._record.write(call_idx, top_k_index, top_k_weights, self._slot_of[layer_idx])
        out = torch.empty_like(hidden_states)
        self.held.append((hidden_states, top_k_index, top_k_weights, out))
        self.pieces.append(self._recorder.end())
        replay = None
        if on_slots is not None:
            # Kernels are compiled and loaded at their first launch, which must not be a recorded one. The slots that
            # are to be used hold nothing yet.
            on_slots(hidden_states, torch.full_like(slots, ABSENT), weights, out)
            self._recorder.begin()
            on_slots(hidden_states, slots, weights, out)
            replay = self._recorder.end()
        self.calls.append(ExpertsCall(layer_idx, num_experts, num_pairs, out, eager, replay))
        self._recorder.begin()
        return out
