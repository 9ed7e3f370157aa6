"""What each of several GPUs holds: its layers with their slots, and its share of everything else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moe_offload.errors import BudgetError
from moe_offload.offload.planning.cuda_memory import CudaOverhead
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import SlotNeed, fill_slots_beside, slots_bytes


@dataclass(frozen=True)
class DevicePart:
    """One GPU: its CUDA index, its budget, and the bytes of what is on it.

    ``layers`` are those with experts, ``cache_layers`` those with keys and values, ``modules`` the names of all that
    was placed there.
    """

    index: int
    vram_bytes: int
    layers: tuple[int, ...]
    cache_layers: tuple[int, ...]
    modules: tuple[str, ...]
    dense_bytes: int
    workspace_bytes: int
    staging_bytes: int
    cache_bytes: tuple[int, ...]
    """Of each of ``cache_layers``."""
    overhead: CudaOverhead

    @property
    def kv_bytes(self) -> int:
        """Keys and values."""
        return sum(self.cache_bytes)

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes + self.overhead.total_bytes


# The overhead of a part with slots of so many bytes a layer.
Overhead = Callable[[DevicePart, Sequence[int]], CudaOverhead]


def device_parts(
    placement: Placement, cache_bytes: Sequence[int], *, workspace_bytes: int, staging_bytes: int
) -> tuple[DevicePart, ...]:
    """The parts of a placement, whose overhead `fill_parts` knows; workspace and staging are the same on each."""
    parts = []
    for position, index in enumerate(placement.devices):
        cache_layers = tuple(idx for idx, on in enumerate(placement.device_of_cache_layer) if on == position)
        parts.append(
            DevicePart(
                index,
                placement.budgets_bytes[position],
                tuple(layer_idx for layer_idx, on in enumerate(placement.device_of_layer) if on == position),
                cache_layers,
                tuple(name for name, on in placement.device_map.items() if on == index),
                placement.dense_bytes[position],
                workspace_bytes,
                staging_bytes,
                tuple(cache_bytes[layer_idx] for layer_idx in cache_layers),
                CudaOverhead(0, 0, 0, 0),
            )
        )
    return tuple(parts)


def fill_parts(
    parts: Sequence[DevicePart], needs: Sequence[SlotNeed], overhead: Overhead
) -> tuple[tuple[DevicePart, ...], list[int]]:
    """The parts with their overhead, and the slots of every layer, each device's from its own budget.

    BudgetError for the first that is too small.
    """
    num_slots = [0] * len(needs)
    filled = []
    for part in parts:
        there = [needs[layer_idx] for layer_idx in part.layers]

        def overhead_of(
            slots: Sequence[int], part: DevicePart = part, there: Sequence[SlotNeed] = there
        ) -> CudaOverhead:
            return overhead(part, [need.slot_bytes * count for need, count in zip(there, slots, strict=True)])

        floors = [need.floor for need in there]
        needed_bytes = part.fixed_bytes + slots_bytes(there, floors) + overhead_of(floors).total_bytes
        if part.vram_bytes < needed_bytes:
            raise BudgetError(
                f"GPU {part.index} needs {format_size(needed_bytes)} of VRAM for its part of the model, budget "
                f"{format_size(part.vram_bytes)}: dense weights {format_size(part.dense_bytes)}, KV cache "
                f"{format_size(part.kv_bytes)}, workspace {format_size(part.workspace_bytes)}, {len(part.layers)} "
                f"layers with experts; give it more with --vram {part.index}=..., or others more, which then take "
                f"layers from it",
                needed_bytes=needed_bytes,
                budget_bytes=part.vram_bytes,
            )
        slots = fill_slots_beside(
            there, part.vram_bytes - part.fixed_bytes, lambda counts: overhead_of(counts).total_bytes
        )
        for layer_idx, count in zip(part.layers, slots, strict=True):
            num_slots[layer_idx] = count
        filled.append(replace(part, overhead=overhead_of(slots)))
    return tuple(filled), num_slots
