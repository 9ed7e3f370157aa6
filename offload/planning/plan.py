"""What goes where: a budget split, before anything is read, into weights, cache, workspace and expert slots."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig

from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.planning.cuda_memory import CudaOverhead
from moe_offload.offload.planning.demand import (
    RUNTIME_BYTES,
    STAGING_SLOTS,
    Demand,
    Device,
    Place,
    budget_error,
    typed_size,
)
from moe_offload.offload.planning.device_parts import DevicePart, fill_parts
from moe_offload.offload.planning.room import Room
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import fewer_slots, fill_slots, fill_slots_beside


class PackShape(Protocol):
    """A pack, or what is foreseen of one."""

    @property
    def layers(self) -> Sequence[LayerLayout]: ...
    @property
    def expert_format(self) -> str: ...
    @property
    def dense_bytes(self) -> int: ...


class Line(NamedTuple):
    """One use of a tier's memory."""

    tier: str
    label: str
    size_bytes: int


@dataclass(frozen=True)
class Plan:
    """Who gets which bytes; "compute" slots are those that kernels read: in RAM on the CPU, in VRAM on a GPU.

    ``num_slots`` are the most: beside ``least_room``. On the CPU some give way while a text needs more than that
    (`ContextRoom`): ``fewest_slots`` stay beside all of the context and a piece of a prompt.
    """

    device: Device
    ram_bytes: int
    vram_bytes: int | None
    context_tokens: int
    prefill_chunk_tokens: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    overhead: CudaOverhead | None
    """Of one GPU; that of several is in ``parts``."""
    num_experts: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    num_slots: tuple[int, ...]
    fewest_slots: tuple[int, ...]
    num_host_slots: tuple[int, ...]
    staging_slots: int
    num_host_staging_slots: int
    num_cache_layers: int = 0
    least_room: Room | None = None
    """Room that slots leave at any time; None: for all of the context and a piece of a prompt, and none give way."""
    expert_rows: int = 0
    """The sum of the output widths of the widest expert's projections."""
    parts: tuple[DevicePart, ...] = ()
    """What is on each GPU, where there are several; the figures above are then of all together."""

    @property
    def staging_slot_bytes(self) -> int:
        """Size of a staging slot, which has to hold any expert."""
        return max(self.slot_bytes)

    @property
    def resident_share(self) -> float:
        """Share of all experts that the compute slots hold."""
        return sum(self.num_slots) / sum(self.num_experts)

    @property
    def fewest_share(self) -> float:
        """The share that they hold beside all of the context and a piece of a prompt."""
        return sum(self.fewest_slots) / sum(self.num_experts)

    @property
    def host_share(self) -> float:
        """Share of all experts that the host slots hold."""
        return sum(self.num_host_slots) / sum(self.num_experts)

    @property
    def device_of_layer(self) -> tuple[int, ...]:
        """For each layer with experts, which of ``parts`` it is on; 0 where there is one device."""
        on = {layer_idx: position for position, part in enumerate(self.parts) for layer_idx in part.layers}
        return tuple(on.get(layer_idx, 0) for layer_idx in range(len(self.num_slots)))

    @property
    def device_map(self) -> dict[str, torch.device]:
        """What is placed where, by the names of modules; empty where there is one device."""
        return {name: torch.device("cuda", part.index) for part in self.parts for name in part.modules}

    @property
    def gives_way(self) -> bool:
        """Whether there are slots that give way to a text."""
        return self.least_room is not None and self.fewest_slots != self.num_slots

    @property
    def room(self) -> Room:
        """What is there for a text beside all slots."""
        if self.least_room is not None and self.gives_way:
            return self.least_room
        return Room(self.context_tokens, self.prefill_chunk_tokens, self.kv_bytes, self.workspace_bytes)

    def slots_bytes(self, layers: Sequence[int]) -> int:
        """Bytes of the compute slots of some layers."""
        return sum(self.slot_bytes[layer_idx] * self.num_slots[layer_idx] for layer_idx in layers)

    def lines(self) -> list[Line]:
        """Every use of memory, tier by tier."""
        if self.parts:
            return [*(line for part in self.parts for line in self._lines_of(part)), *self._host_lines()]
        tier = "RAM" if self.device == "cpu" else "VRAM"
        lines = [
            Line(tier, "dense weights", self.dense_bytes),
            Line(tier, f"KV cache, {self.room.text_tokens} tokens", self.room.kv_bytes),
            Line(tier, f"workspace, {self.room.pass_tokens} tokens at once", self.room.workspace_bytes),
            Line(tier, f"staging, {self.staging_slots} slots", self.staging_slots * self.staging_slot_bytes),
        ]
        if self.overhead is not None:
            lines += _overhead_lines(tier, self.overhead)
        lines.append(Line(tier, "expert slots", _slots_bytes(self.slot_bytes, self.num_slots)))
        if self.device == "cuda":
            return [*lines, *self._host_lines()]
        return [*lines, Line("RAM", "runtime", self.runtime_bytes)]

    def _host_lines(self) -> list[Line]:
        """Of the RAM below GPUs."""
        staging_bytes = self.num_host_staging_slots * self.staging_slot_bytes
        return [
            Line("RAM", f"staging, {self.num_host_staging_slots} slots", staging_bytes),
            Line("RAM", "expert slots", _slots_bytes(self.slot_bytes, self.num_host_slots)),
            Line("RAM", "runtime", self.runtime_bytes),
        ]

    def _lines_of(self, part: DevicePart) -> list[Line]:
        tier = _part_tier(part)
        return [
            Line(tier, "dense weights", part.dense_bytes),
            Line(tier, f"KV cache, {self.context_tokens} tokens", part.kv_bytes),
            Line(tier, f"workspace, {self.prefill_chunk_tokens} tokens at once", part.workspace_bytes),
            Line(tier, f"staging, {self.staging_slots} slots", part.staging_bytes),
            *_overhead_lines(tier, part.overhead),
            Line(tier, f"slots of {len(part.layers)} layers", self.slots_bytes(part.layers)),
        ]

    def total_bytes(self, tier: str) -> int:
        """Bytes planned on "RAM" or "VRAM", all GPUs together."""
        on_gpu = {"VRAM", *(_part_tier(part) for part in self.parts)}
        tiers = on_gpu if tier == "VRAM" else {tier}
        return sum(line.size_bytes for line in self.lines() if line.tier in tiers)

    def render(self) -> str:
        """The plan as a table of text."""
        budgets = {_part_tier(part): part.vram_bytes for part in self.parts}
        if self.vram_bytes is not None and not budgets:
            budgets = {"VRAM": self.vram_bytes}
        budgets["RAM"] = self.ram_bytes
        rows: list[tuple[str, str, int, str]] = []
        for tier, budget_bytes in budgets.items():
            rows.extend(
                (tier, line.label, line.size_bytes, f"{line.size_bytes / budget_bytes:4.0%}")
                for line in self.lines()
                if line.tier == tier
            )
            total_bytes = sum(line.size_bytes for line in self.lines() if line.tier == tier)
            rows.append(
                (tier, "total", total_bytes, f"{total_bytes / budget_bytes:4.0%} of {format_size(budget_bytes)}")
            )
        width = max(len(label) for _, label, _, _ in rows)
        tier_width = max(4, *map(len, budgets))
        text = [
            f"{tier:<{tier_width}}  {label:<{width}}  {format_size(size):>8}  {share}"
            for tier, label, size, share in rows
        ]
        text.append(f"{_slots_phrase(self.num_slots, self.num_experts)}, {self.resident_share:.0%} of experts resident")
        if self.gives_way:
            phrase = _slots_phrase(self.fewest_slots, self.num_experts)
            text.append(
                f"room for {self.context_tokens} tokens, {self.prefill_chunk_tokens} at once, is taken from them when "
                f"a text needs it: {phrase}, {self.fewest_share:.0%} of experts"
            )
        if self.device == "cuda":
            phrase = _slots_phrase(self.num_host_slots, self.num_experts)
            text.append(f"second tier in RAM: {phrase}, {self.host_share:.0%} of experts")
        return "\n".join(text)


def make_plan(
    manifest: PackShape,
    config: PreTrainedConfig,
    *,
    device: Device,
    ram_bytes: int,
    vram_bytes: int | None,
    context_tokens: int,
    dtype_bytes: int,
    top_k_per_layer: Sequence[int],
    prefetch_depth: int = 0,
    resident_dense_bytes: int | None = None,
    small_dense_bytes: int = 0,
    place: Place | None = None,
    experts_only: bool = False,
    graphs: bool = True,
) -> Plan:
    """Split the budgets; BudgetError with the smallest that works where one is too small.

    ``resident_dense_bytes`` is what the dense weights take once loaded, where that differs from their size in the pack;
    ``small_dense_bytes`` of it are of tensors of up to 1 MiB, which torch keeps apart on a GPU.
    ``place``: what divides the model among several GPUs, given the bytes of each cache layer and what every GPU spends
    on workspace and the like; ``vram_bytes`` is then the sum of their budgets.
    ``experts_only``: for a process that computes experts for another, which runs the model and has its KV cache.
    ``graphs``: whether a GPU's decode steps may be recorded.
    """
    if len(top_k_per_layer) != len(manifest.layers):
        raise ConfigError(f"{len(top_k_per_layer)} values of top_k for {len(manifest.layers)} layers with experts")
    if context_tokens < 1:
        raise ConfigError(f"a context of {context_tokens} tokens is too short; use 1 or more")
    if (device == "cuda") != (vram_bytes is not None):
        raise ConfigError(f"device {device!r} {'needs' if device == 'cuda' else 'has no'} budget of VRAM")
    demand = Demand(
        manifest.layers,
        config,
        device=device,
        context_tokens=context_tokens,
        dtype_bytes=dtype_bytes,
        top_k_per_layer=top_k_per_layer,
        dense_bytes=manifest.dense_bytes if resident_dense_bytes is None else resident_dense_bytes,
        small_dense_bytes=small_dense_bytes,
        experts_only=experts_only,
        graphs=graphs and device == "cuda" and not experts_only,
    )
    compute_bytes = ram_bytes if vram_bytes is None else vram_bytes
    if place is None and compute_bytes < demand.smallest_bytes:
        option = "--ram" if device == "cpu" else "--vram"
        raise budget_error(option, compute_bytes, demand, manifest.expert_format)
    parts: tuple[DevicePart, ...] = ()
    lent_bytes = demand.room.total_bytes - demand.least_room.total_bytes
    if place is None:
        slots_budget_bytes = compute_bytes - demand.fixed_bytes
        num_slots = fill_slots_beside(demand.needs, slots_budget_bytes + lent_bytes, demand.overhead_bytes)
        fewest_slots = num_slots
        if lent_bytes:
            fewest_slots = fewer_slots([need.slot_bytes for need in demand.needs], num_slots, slots_budget_bytes)
    else:
        parts, num_slots = fill_parts(demand.parts(place), demand.needs, demand.overhead_of_part)
        fewest_slots = num_slots
    num_host_slots, num_host_staging_slots, runtime_bytes = [0] * len(manifest.layers), 0, RUNTIME_BYTES[device]
    if device == "cuda":
        # Reads for every layer looked ahead land beside those on demand.
        num_host_staging_slots = STAGING_SLOTS + prefetch_depth
        host_fixed_bytes = runtime_bytes + num_host_staging_slots * demand.largest_slot_bytes
        if ram_bytes < host_fixed_bytes:
            raise BudgetError(
                f"needs {format_size(host_fixed_bytes)} of RAM to stage experts, budget {format_size(ram_bytes)}; "
                f"use --ram {typed_size(host_fixed_bytes)}",
                needed_bytes=host_fixed_bytes,
                budget_bytes=ram_bytes,
            )
        # A layer that is whole on the device has no use for a second tier.
        partial = [idx for idx, need in enumerate(demand.needs) if num_slots[idx] < need.num_experts]
        host_needs = [replace(demand.needs[idx], floor=0) for idx in partial]
        for idx, slots in zip(partial, fill_slots(host_needs, ram_bytes - host_fixed_bytes), strict=True):
            num_host_slots[idx] = slots
    return Plan(
        device=device,
        ram_bytes=ram_bytes,
        vram_bytes=vram_bytes,
        context_tokens=context_tokens,
        prefill_chunk_tokens=demand.chunk_tokens,
        dense_bytes=demand.dense_bytes,
        kv_bytes=demand.kv_bytes,
        workspace_bytes=demand.workspace_bytes * max(1, len(parts)),
        runtime_bytes=runtime_bytes,
        overhead=None if parts else demand.overhead(num_slots),
        num_experts=tuple(need.num_experts for need in demand.needs),
        slot_bytes=tuple(need.slot_bytes for need in demand.needs),
        num_slots=tuple(num_slots),
        fewest_slots=tuple(fewest_slots),
        num_host_slots=tuple(num_host_slots),
        staging_slots=demand.staging_slots,
        num_host_staging_slots=num_host_staging_slots,
        num_cache_layers=len(demand.cache_bytes),
        least_room=demand.least_room if lent_bytes else None,
        expert_rows=demand.expert_rows,
        parts=parts,
    )


def _overhead_lines(tier: str, overhead: CudaOverhead) -> list[Line]:
    lines = [Line(tier, "CUDA context", overhead.context_bytes), Line(tier, "library work", overhead.library_bytes)]
    if overhead.graph_pool_bytes:
        lines.append(Line(tier, "recorded steps", overhead.graph_pool_bytes))
    return [*lines, Line(tier, "fragmentation", overhead.fragmentation_bytes)]


def _slots_bytes(slot_bytes: Sequence[int], num_slots: Sequence[int]) -> int:
    return sum(size * slots for size, slots in zip(slot_bytes, num_slots, strict=True))


def _part_tier(part: DevicePart) -> str:
    return f"GPU {part.index}"


def _slots_phrase(num_slots: Sequence[int], num_experts: Sequence[int]) -> str:
    """ "slots 5 of 8 per layer", or the range where layers differ."""
    counts = Counter(zip(num_slots, num_experts, strict=True))
    if len(counts) == 1:
        ((slots, experts),) = counts
        return f"slots {slots} of {experts} per layer"
    slots_range, experts_range = (
        f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
        for values in (num_slots, num_experts)
    )
    return f"slots {slots_range} of {experts_range} per layer"
