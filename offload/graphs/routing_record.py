"""What routers chose in one step, in one piece of device memory that comes to the host in one copy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_IDS, _SLOTS, _WEIGHTS, _AHEAD = range(4)  # of a call's rows; from the last on, what was predicted there for others
_ROW_VALUES = 4  # rows begin at multiples of 16 bytes: kernels are compiled for how their arguments are aligned


@dataclass(frozen=True)
class Routing:
    """What one call's router chose: the experts without repeats, their weights, and each pair's place among them."""

    expert_ids: list[int]
    weights: list[float]
    places: list[int]
    """-1 where a pair stands for no expert."""
    pairs: tuple[list[int], list[float]]
    """The router's own words: ids and weights of all pairs."""


class RoutingRecord:
    """Rows for each experts call of a step on one device: ids, slots, weights, and what was predicted there.

    Of its ``T * K`` pairs, in 32 bits each. Rows are written by the step on the device, and read by the host after
    `fetch`. `send_slots` goes the other way.
    """

    def __init__(self, num_calls: int, num_pairs: int, device: torch.device, *, num_ahead: int = 0) -> None:
        """Room for ``num_calls`` calls of at most ``num_pairs`` pairs, and as many predictions in each."""
        self.num_calls, self.num_pairs = num_calls, num_pairs
        self.device = device
        width = -(-num_pairs // _ROW_VALUES) * _ROW_VALUES
        shape, pinned = (num_calls, _AHEAD + num_ahead, width), device.type == "cuda"
        self._device = torch.zeros(shape, dtype=torch.int32, device=device)
        self._host = torch.zeros(shape, dtype=torch.int32, pin_memory=pinned)
        self._rows: Any = self._host.numpy()
        self._outgoing = torch.zeros((num_calls, width), dtype=torch.int32, pin_memory=pinned)
        self._outgoing_rows: Any = self._outgoing.numpy()
        # Waits for it spin: a thread that slept would be woken a good part of a layer too late.
        self._event = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]

    # -- on the device, as a part of the step --

    def write(
        self, call_idx: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, slot_of: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill a call's rows, with slots by ``slot_of [experts + 1]``.

        Returns the slots ``int32 [T, K]`` and the weights ``fp32 [T, K]``, which lie in the row.
        """
        ids, slots, weights = self._device[call_idx, :_AHEAD, : top_k_index.numel()]
        ids.copy_(top_k_index.reshape(-1))
        weights = weights.view(torch.float32)
        weights.copy_(top_k_weights.reshape(-1))
        torch.index_select(slot_of, 0, ids.clamp(max=len(slot_of) - 1), out=slots)
        return slots.view(top_k_index.shape), weights.view(top_k_index.shape)

    def write_ahead(self, call_idx: int, number: int, index: torch.Tensor) -> None:
        """The call's prediction of this number: another layer's experts ``[T, K]``."""
        self._device[call_idx, _AHEAD + number, : index.numel()].copy_(index.reshape(-1))

    # -- on the host --

    def fetch(self, begin: int, end: int) -> None:
        """Bring the rows of these calls to the host, and wait for them: the step's only waits."""
        self._host[begin:end].copy_(self._device[begin:end], non_blocking=True)
        if self._event is not None:
            # This device's stream: without a word, an event takes that of the thread's current device.
            self._event.record(torch.cuda.current_stream(self.device))
            self._event.synchronize()

    def missed(self, num_experts: Sequence[int]) -> bool:
        """Whether any expert in the fetched rows of the first calls, with so many experts each, had no slot."""
        rows = self._rows[: len(num_experts)]
        is_expert = rows[:, _IDS] < [[experts] for experts in num_experts]
        return bool((is_expert & (rows[:, _SLOTS] < 0)).any())

    def copy_of(self, num_calls: int) -> Any:
        """The first rows as they were fetched, to be read after the next `fetch` too."""
        return self._rows[:num_calls].copy()

    def row(self, call_idx: int) -> Any:
        """A call's rows as they were fetched, to be read before the next `fetch`."""
        return self._rows[call_idx]

    def ahead(self, call_idx: int, number: int, num_pairs: int) -> list[int]:
        """A prediction as it was fetched."""
        ids: list[int] = self._rows[call_idx, _AHEAD + number, :num_pairs].tolist()
        return ids

    def send_slots(self, call_idx: int, slots: list[int]) -> None:
        """What the host knows better than the table, for the kernels that come next on this thread's stream.

        The row must not be sent again before a `fetch` that came after it.
        """
        num_pairs = len(slots)
        self._outgoing_rows[call_idx, :num_pairs] = slots
        self._device[call_idx, _SLOTS, :num_pairs].copy_(self._outgoing[call_idx, :num_pairs], non_blocking=True)


def routing_of(row: Any, num_pairs: int, num_experts: int) -> Routing:
    """A call's fetched rows in words, of a layer with so many experts."""
    ids = row[_IDS, :num_pairs].tolist()
    weights = row[_WEIGHTS, :num_pairs].view("float32").tolist()
    weight_of: dict[int, float] = {}
    for expert_idx, weight in zip(ids, weights, strict=True):
        if expert_idx < num_experts:
            weight_of[expert_idx] = weight_of.get(expert_idx, 0.0) + weight
    places = {expert_idx: place for place, expert_idx in enumerate(weight_of)}
    return Routing(
        list(weight_of), list(weight_of.values()), [places.get(expert_idx, -1) for expert_idx in ids], (ids, weights)
    )
