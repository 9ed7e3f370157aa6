"""What each of several GPUs holds: its layers with their slots, and its share of everything else."""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_offload.errors import BudgetError
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import SlotNeed, fill_slots, slots_bytes


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
    kv_bytes: int
    workspace_bytes: int
    staging_bytes: int
    overhead_bytes: int

    @property
    def fixed_bytes(self) -> int:
        """All but the slots."""
        return self.dense_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes + self.overhead_bytes


def device_parts(
    placement: Placement, cache_bytes: Sequence[int], *, workspace_bytes: int, staging_bytes: int, overhead_bytes: int
) -> tuple[DevicePart, ...]:
    """The parts of a placement; workspace, staging and overhead are the same on each."""
    return tuple(
        DevicePart(
            index,
            placement.budgets_bytes[position],
            tuple(layer_idx for layer_idx, on in enumerate(placement.device_of_layer) if on == position),
            tuple(layer_idx for layer_idx, on in enumerate(placement.device_of_cache_layer) if on == position),
            tuple(name for name, on in placement.device_map.items() if on == index),
            placement.dense_bytes[position],
            sum(size for size, on in zip(cache_bytes, placement.device_of_cache_layer, strict=True) if on == position),
            workspace_bytes,
            staging_bytes,
            overhead_bytes,
        )
        for position, index in enumerate(placement.devices)
    )


def fill_parts(parts: Sequence[DevicePart], needs: Sequence[SlotNeed]) -> list[int]:
    """Slots of every layer, each device's from its own budget; BudgetError for the first that is too small."""
    num_slots = [0] * len(needs)
    for part in parts:
        there = [needs[layer_idx] for layer_idx in part.layers]
        needed_bytes = part.fixed_bytes + slots_bytes(there, [need.floor for need in there])
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
        for layer_idx, slots in zip(part.layers, fill_slots(there, part.vram_bytes - part.fixed_bytes), strict=True):
            num_slots[layer_idx] = slots
    return num_slots
