"""The cache of experts in host memory, below the device's: slots of those layers that have any."""

from collections.abc import Iterable, Sequence

import torch

from moe_offload.cache import Admit, ExpertCache, Lease
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.device_queue import Event
from moe_offload.offload.tiers.emptying import Emptying


class HostSlots:
    """Host slots by layer, some layers without any. Takes no lock: its owner's guards it.

    A lease keeps its expert's slot until the copy out of it is over, which is asked only when a slot is wanted.
    """

    def __init__(self, num_experts: Sequence[int], slabs: Sequence[Slab | None], policy: str) -> None:
        """``slabs``: the memory of each layer's slots, None where it has none."""
        self._slabs = slabs
        cached = [layer_idx for layer_idx, slab in enumerate(slabs) if slab is not None]
        self._cache_layer = {layer_idx: index for index, layer_idx in enumerate(cached)}
        self._cache = ExpertCache(
            [num_experts[layer_idx] for layer_idx in cached], [slab.num_slots for slab in slabs if slab], policy
        )
        self._emptying: Emptying[Lease] = Emptying()

    def has_any(self, layer_idx: int) -> bool:
        """Whether the layer has slots."""
        return layer_idx in self._cache_layer

    def acquire(self, layer_idx: int, expert_idx: int, *, keep: bool) -> Lease | None:
        """A hold on the expert's slot, or None if it has none and gets none.

        ``keep``: it may displace any other; else only one that is colder.
        """
        for emptied in self._emptying.take_over():
            self.release(emptied)
        cache_layer = self._cache_layer.get(layer_idx)
        if cache_layer is None:
            return None
        lease = self._cache.acquire(cache_layer, [expert_idx], admit=Admit.ALWAYS if keep else Admit.IF_HOTTER)
        if lease.bypassed:
            self._cache.release(lease)
            return None
        return lease

    def release(self, lease: Lease) -> None:
        """End the hold."""
        self._cache.release(lease)

    def release_after(self, lease: Lease, event: Event) -> None:
        """End the hold when the event is over."""
        self._emptying.add(event, lease)

    def settle(self, layer_idx: int, expert_idx: int, *, loaded: bool) -> None:
        """The expert's bytes are in its slot, or will not come."""
        mark = self._cache.mark_loaded if loaded else self._cache.mark_failed
        mark(self._cache_layer[layer_idx], expert_idx)

    def memory(self, layer_idx: int, slot: int) -> memoryview:
        """A slot's bytes, for a read."""
        return self._slab(layer_idx).memory(slot)

    def tensor(self, layer_idx: int, slot: int) -> torch.Tensor:
        """The same, for a copy."""
        return self._slab(layer_idx).tensor(slot)

    def is_pinned(self, layer_idx: int, slot: int) -> bool:
        """Whether the slot is page-locked."""
        return slot < self._slab(layer_idx).num_pinned_slots

    def _slab(self, layer_idx: int) -> Slab:
        slab = self._slabs[layer_idx]
        assert slab is not None, "only layers with slots hand them out"
        return slab

    def resident(self, layer_idx: int) -> Iterable[int]:
        """The experts whose bytes are in the layer's slots."""
        cache_layer = self._cache_layer.get(layer_idx)
        return () if cache_layer is None else self._cache.resident(cache_layer)

    def check_integrity(self) -> None:
        """AssertionError if anything contradicts itself."""
        self._cache.check_integrity()
