"""Records one decode step piece by piece, from experts to experts, while the model's own code runs through it."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_offload.offload.graphs.recorder import Pieces, RecordingError, Replay
from moe_offload.offload.graphs.routing_record import Routing, RoutingRecord

OnSlots = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]
"""``(x [T, H], slots int32 [T, K], weights fp32 [T, K], out [T, H])``: all of a layer's experts, from these slots."""


class Ask(Protocol):
    """Which later layers' routers choose what, after this layer's; `experts.lookahead` says how."""

    def __call__(self, layer_idx: int, *, here_only: bool) -> Iterable[tuple[int, torch.Tensor]]: ...


class Eager(Protocol):
    """Computes a layer's experts the same as ever, misses and all, from what the piece before has left."""

    def __call__(self, *, known: Routing) -> torch.Tensor:
        """``known``: the router's choice, which has come to the host already."""


@dataclass(frozen=True)
class ExpertsCall:
    """One layer's experts in a recorded step."""

    layer_idx: int
    num_experts: int
    shape: tuple[int, int]
    """Tokens and experts a token."""
    out: torch.Tensor
    eager: Eager
    on_slots: Replay | None
    """Computes ``out`` from the slots in the routing record; None if no kernel can."""
    ahead: tuple[tuple[int, int], ...] = ()
    """Later layers of which the record has a prediction, and of how many pairs."""

    @property
    def num_pairs(self) -> int:
        """Tokens, each with each of its experts."""
        return self.shape[0] * self.shape[1]


class StepRecording:
    """A recording under way. `experts` stands in for the experts of every layer."""

    def __init__(self, recorder: Pieces, record: RoutingRecord, slot_of: torch.Tensor, ask: Ask) -> None:
        """``slot_of``: the device's table."""
        self.pieces: list[Replay] = []
        self.calls: list[ExpertsCall] = []
        self.held: list[Sequence[torch.Tensor]] = []
        """What experts read and write: its memory is not to be taken for something else as long as any piece is."""
        self._recorder, self._record, self._slot_of, self._ask = recorder, record, slot_of, ask

    def experts(
        self,
        layer_idx: int,
        num_experts: int,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        eager: Eager,
        on_slots: OnSlots | None,
    ) -> torch.Tensor:
        """End the piece that leads here, record the experts apart, and begin the next piece; their output."""
        call_idx = len(self.calls)
        num_tokens, top_k = top_k_index.shape
        if call_idx == self._record.num_calls or num_tokens * top_k > self._record.num_pairs:
            raise RecordingError(f"the experts of layer {layer_idx} are called in a way that was not foreseen")
        slots, weights = self._record.write(call_idx, top_k_index, top_k_weights, self._slot_of[layer_idx])
        ahead = []
        for number, (target_idx, index) in enumerate(self._ask(layer_idx, here_only=True)):
            self._record.write_ahead(call_idx, number, index)
            ahead.append((target_idx, index.numel()))
        out = torch.empty_like(hidden_states)
        self.held.append((hidden_states, top_k_index, top_k_weights, out))
        self.pieces.append(self._recorder.end())
        replay = None
        if on_slots is not None:
            self._recorder.begin()
            on_slots(hidden_states, slots, weights, out)
            replay = self._recorder.end()
        call = ExpertsCall(layer_idx, num_experts, (num_tokens, top_k), out, eager, replay, tuple(ahead))
        self.calls.append(call)
        self._recorder.begin()
        return out
