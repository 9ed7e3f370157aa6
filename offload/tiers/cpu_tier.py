"""Experts computed on the CPU: reads from the disk land in the slot that the kernels read."""

from collections.abc import Sequence

from moe_offload.offload.experts.weights import ExpertWeights, PartLayout
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.streaming.reader import ExpertReader
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.compute_tier import Done, Transfer


class CpuTier:
    """Slots in RAM, one slab a layer, untouched pages of which cost nothing."""

    def __init__(
        self, manifest: PackManifest, reader: ExpertReader, *, num_slots: Sequence[int], num_staging_slots: int
    ) -> None:
        self._reader = reader
        self._slot_bytes = [layer.slot_bytes for layer in manifest.layers]
        self._layouts = [PartLayout(layer.parts) for layer in manifest.layers]
        self._slabs = [Slab(slots, size) for slots, size in zip(num_slots, self._slot_bytes, strict=True)]
        self._staging = Slab(num_staging_slots, max(self._slot_bytes))
        self.num_staging_slots = num_staging_slots
        self._weights: dict[tuple[int, int], ExpertWeights] = {}

    def begin(self, layer_idx: int, expert_idx: int, slot: int, *, speculative: bool, done: Done) -> Transfer:
        """Read straight into the slot."""
        memory = self._slabs[layer_idx].memory(slot) if slot >= 0 else self._staging.memory(-1 - slot)
        return self._reader.submit(
            layer_idx, expert_idx, memory[: self._slot_bytes[layer_idx]], speculative=speculative, on_done=done
        )

    def use(self, layer_idx: int, slot: int) -> ExpertWeights:
        """Views of the slot, made once."""
        weights = self._weights.get((layer_idx, slot))
        if weights is None:
            data = self._slabs[layer_idx].tensor(slot) if slot >= 0 else self._staging.tensor(-1 - slot)
            weights = ExpertWeights(self._layouts[layer_idx], data)
            self._weights[layer_idx, slot] = weights
        return weights

    def used(self, layer_idx: int, slot: int) -> None:
        """Nothing: CPU kernels have finished when they return."""

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._reader.stats.bytes_read

    @property
    def bytes_copied(self) -> int:
        """None: there is no other device."""
        return 0

    def close(self) -> None:
        """Fail what is being read, then free the slots."""
        self._reader.close()
        self._weights.clear()
        for slab in [*self._slabs, self._staging]:
            slab.close()
