"""Experts computed on the CPU: reads from the disk land in the slot that the kernels read."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.landing import read_order
from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.offload.pack.manifest import PackManifest, PartSpec
from moe_offload.offload.streaming.reader import ExpertReader, ReadObserver
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.compute_tier import Done, Transfer
from moe_offload.offload.tiers.link_meter import CopyObserver, LinkTotals


class _SlotMemory:
    """The memory of one slot, and the views of the expert in it."""

    def __init__(self, slab: Slab, index: int) -> None:
        self.forget = partial(slab.forget, index)
        self.bytes: memoryview = slab.memory(index)
        self._data: torch.Tensor = slab.tensor(index)
        self._weights: tuple[PartLayout, ExpertWeights] | None = None

    def weights(self, layout: PartLayout) -> ExpertWeights:
        """Made once, as long as the experts in it are of one layout."""
        if self._weights is None or self._weights[0] is not layout:
            self._weights = layout, ExpertWeights(layout, self._data)
        return self._weights[1]


class CpuTier:
    """Slots in RAM, one slab a layer, untouched pages of which cost nothing."""

    def __init__(
        self, manifest: PackManifest, reader: ExpertReader, *, num_slots: Sequence[int], num_staging_slots: int
    ) -> None:
        self._reader = reader
        self._slot_bytes = [layer.slot_bytes for layer in manifest.layers]
        layouts: dict[tuple[PartSpec, ...], PartLayout] = {}
        self._layouts = [layouts.setdefault(layer.parts, PartLayout(layer.parts)) for layer in manifest.layers]
        self._orders = [
            read_order(layout, size, reader.chunk_bytes)
            for layout, size in zip(self._layouts, self._slot_bytes, strict=True)
        ]
        self._slabs = [Slab(slots, size) for slots, size in zip(num_slots, self._slot_bytes, strict=True)]
        self._staging_bytes = max(self._slot_bytes)
        self._slabs.append(Slab(num_staging_slots, self._staging_bytes))
        # Of each layer, then of staging. `close`, perhaps called under a running step, replaces all of it at once.
        self._memories = [[_SlotMemory(slab, i) for i in range(slab.num_slots)] for slab in self._slabs]
        self._given_up: list[list[_SlotMemory]] = [[] for _ in num_slots]
        self.num_staging_slots = num_staging_slots

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer:
        """Read straight into the slot."""
        slots, index = self._place(layer_idx, slot)
        into = slots[index].bytes[: self._slot_bytes[layer_idx]]
        order = self._orders[layer_idx]
        return self._reader.submit(layer_idx, expert_idx, into, speculative=speculative, on_done=done, order=order)

    def exchanges(self, layer_idx: int) -> bool:
        """Where experts are as large as staging slots, which are made for the largest."""
        return self._slot_bytes[layer_idx] == self._staging_bytes

    def exchange(self, layer_idx: int, slot: int, staging_slot: int) -> None:
        """Give each the other's memory."""
        slots, index = self._place(layer_idx, slot)
        staging, staging_index = self._place(layer_idx, staging_slot)
        slots[index], staging[staging_index] = staging[staging_index], slots[index]

    @property
    def lender(self) -> None:
        """None: everything is computed on the CPU anyway."""

    def resize(self, layer_idx: int, num_slots: int, numbers: Mapping[int, int]) -> bool:
        """Slots keep their memory under new numbers; that of slots given up goes back to the system until they return.

        No layer gets more than it began with.
        """
        old = self._memories[layer_idx] + self._given_up[layer_idx]
        stay = {new: old[number] for number, new in numbers.items()}
        others = iter([memory for number, memory in enumerate(old) if number not in numbers])
        self._memories[layer_idx] = [stay.get(slot) or next(others) for slot in range(num_slots)]
        self._given_up[layer_idx] = list(others)
        for memory in self._given_up[layer_idx]:
            memory.forget()
        return True

    def expert_bytes(self, layer_idx: int) -> int:
        """The size of an expert of this layer."""
        return self._slot_bytes[layer_idx]

    def layout(self, layer_idx: int) -> PartLayout:
        """Where the parts of an expert of this layer lie in a slot."""
        return self._layouts[layer_idx]

    def slab(self, layer_idx: int) -> torch.Tensor | None:
        """None: slots change their memory with staging slots."""
        return None

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """Views of the slot, made once."""
        slots, index = self._place(layer_idx, slot)
        return slots[index].weights(self._layouts[layer_idx])

    def used(self, layer_idx: int, slot: int) -> None:
        """Nothing: CPU kernels have finished when they return."""

    def _place(self, layer_idx: int, slot: int) -> tuple[list[_SlotMemory], int]:
        """The list that has the memory of a slot, and where; slots below 0 are staging."""
        memories = self._memories
        if not memories:
            raise ConfigError("the memory of the experts was freed: the model is closed; load it again")
        return (memories[layer_idx], slot) if slot >= 0 else (memories[-1], -1 - slot)

    def observe_reads(self, observer: ReadObserver | None) -> None:
        """The reader's."""
        self._reader.observer = observer

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._reader.stats.bytes_read

    @property
    def bytes_cancelled(self) -> int:
        """Those of them that belong to reads given up halfway."""
        return self._reader.stats.bytes_cancelled

    @property
    def bytes_copied(self) -> int:
        """None: there is no other device."""
        return 0

    @property
    def link_totals(self) -> LinkTotals:
        """None likewise."""
        return LinkTotals()

    @property
    def link_peaks_bytes_per_s(self) -> Sequence[float]:
        """None likewise."""
        return ()

    def observe_copies(self, observer: CopyObserver | None) -> None:
        """Nothing is copied."""

    def close(self) -> None:
        """Fail what is being read, then free the slots."""
        self._reader.close()
        self._memories, self._given_up = [], []
        for slab in self._slabs:
            slab.close()
