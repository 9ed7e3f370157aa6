"""Which expert is in which slot, as a tensor on the device: what lets a step find its experts without asking the host.

The table on the device is what one step sees. It is brought up to date on the stream of the step, before the step, so
nothing in it changes while kernels read it; and a slot that it names is not overwritten before the step is over.
"""

import threading
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from moe_offload.offload.tiers.device_queue import Event

ABSENT = -1


class SlotOrder(Protocol):
    """What orders kernels and copies."""

    def stream(self) -> Hashable:
        """The stream that this thread launches kernels on."""

    def see(self, layer_idx: int, slot: int) -> None:
        """Kernels that this thread launches from now on see the slot's bytes."""

    def mark(self) -> Event:
        """An event behind all that this thread has launched."""

    def hold(self, layer_idx: int, slot: int, stream: Hashable, until: Event) -> None:
        """The next copy into the slot waits for the event, which replaces an earlier one of the same stream."""


class SlotTable:
    """Experts by layer and number; residency tells it what comes and goes, from any thread."""

    def __init__(self, num_experts: Sequence[int], device: torch.device, order: SlotOrder) -> None:
        """Empty."""
        width = max(num_experts) + 1  # the last column stands for ids past the last expert, which are no experts
        self._host = torch.full((len(num_experts), width), ABSENT, dtype=torch.int32)
        self._rows = self._host.numpy()
        self._sent = torch.full_like(self._host, ABSENT, pin_memory=device.type == "cuda")
        self.device = torch.full((len(num_experts), width), ABSENT, dtype=torch.int32, device=device)
        """``int32 [layers, experts + 1]``: the slot of each expert in its layer, or `ABSENT`."""
        self._order = order
        self._stream: Hashable = None  # of the last step
        self._step_over: dict[Hashable, Event] = {}  # of the last step on each stream
        self._expert_in: dict[tuple[int, int], int] = {}
        self._fresh: set[tuple[int, int]] = set()  # filled since the last step that asked
        self._changed = False
        self._lock = threading.Lock()

    def put(self, layer_idx: int, expert_idx: int, slot: int) -> None:
        """The copy of the expert's bytes into the slot has been enqueued."""
        with self._lock:
            self._forget(layer_idx, slot)
            self._expert_in[layer_idx, slot] = expert_idx
            self._rows[layer_idx, expert_idx] = slot
            self._fresh.add((layer_idx, slot))
            self._changed = True

    def clear(self, layer_idx: int, slot: int) -> None:
        """The slot is about to be filled: no later step finds it, and the copy waits for those that may have."""
        with self._lock:
            for stream, event in self._step_over.items():
                self._order.hold(layer_idx, slot, stream, event)
            self._forget(layer_idx, slot)

    def close(self) -> None:
        """The slots are about to be freed: the last step holds all of them."""
        for layer_idx, slot in list(self._expert_in):
            self.clear(layer_idx, slot)

    def _forget(self, layer_idx: int, slot: int) -> None:
        expert_idx = self._expert_in.pop((layer_idx, slot), None)
        self._fresh.discard((layer_idx, slot))
        if expert_idx is not None:
            self._rows[layer_idx, expert_idx] = ABSENT
            self._changed = True

    @contextmanager
    def step(self) -> Iterator[None]:
        """Launch a step in here. The device's table is as of now, and stays true until the step is over.

        Whoever fills a slot meanwhile waits for the end of this, to know what the copy has to wait for.
        """
        with self._lock:
            stream = self._order.stream()
            for layer_idx, slot in self._fresh if stream == self._stream else self._expert_in:
                self._order.see(layer_idx, slot)
            self._fresh.clear()
            self._stream = stream
            if self._changed:
                # By way of memory that nobody else writes to, while the copy may still be under way.
                self._sent.copy_(self._host)
                self.device.copy_(self._sent, non_blocking=True)
                self._changed = False
            try:
                yield
            finally:  # an interrupted launch has kernels under way too
                self._step_over[stream] = self._order.mark()

    def num_resident(self) -> int:
        """Experts that are in slots."""
        with self._lock:
            return len(self._expert_in)

    def check_integrity(self, layer_idx: int, slot_of: dict[int, int]) -> None:
        """AssertionError if a layer's entries are not these."""
        with self._lock:
            found = {e: int(slot) for e, slot in enumerate(self._rows[layer_idx]) if slot >= 0}
        assert found == slot_of, f"layer {layer_idx}: the table has {found}, the cache {slot_of}"
