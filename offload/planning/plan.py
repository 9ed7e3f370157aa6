"""What goes where: a budget split, before anything is read, into weights, cache, workspace and expert slots."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from transformers import PreTrainedConfig

from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.planning.device_parts import DevicePart, device_parts, fill_parts
from moe_offload.offload.planning.kv_cache import cache_bytes_per_layer
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import SlotNeed, fill_slots, slots_bytes
from moe_offload.offload.planning.workspace import prefill_chunk_tokens, workspace_bytes
from moe_offload.quant import format_names, get_format

Device = Literal["cpu", "cuda"]
Place = Callable[[Sequence[int], int], Placement]
_MIB = 1024**2
# Tokenizer, modules, thread stacks, and what the allocator holds without using it.
_RUNTIME_BYTES = {"cpu": 160 * _MIB, "cuda": 512 * _MIB}
_CUDA_CONTEXT_BYTES = 400 * _MIB  # the context, kernels, and the libraries' own workspaces
_STAGING_SLOTS = 2  # at least: one is computed with while the next is filled
_FEWEST_SLOTS = 1  # a layer; what a step asks for beyond them passes through staging
_SHORTEST_CONTEXT_TOKENS = 256
_DEFAULT_FORMAT = "nf4"  # the one to propose among equals


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
    """Who gets which bytes; "compute" slots are those that kernels read: in RAM on the CPU, in VRAM on a GPU."""

    device: Device
    ram_bytes: int
    vram_bytes: int | None
    context_tokens: int
    prefill_chunk_tokens: int
    dense_bytes: int
    kv_bytes: int
    workspace_bytes: int
    runtime_bytes: int
    device_context_bytes: int
    num_experts: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    num_slots: tuple[int, ...]
    num_host_slots: tuple[int, ...]
    staging_slots: int
    num_host_staging_slots: int
    num_cache_layers: int = 0
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
            Line(tier, f"KV cache, {self.context_tokens} tokens", self.kv_bytes),
            Line(tier, f"workspace, {self.prefill_chunk_tokens} tokens at once", self.workspace_bytes),
            Line(tier, f"staging, {self.staging_slots} slots", self.staging_slots * self.staging_slot_bytes),
        ]
        if self.device == "cuda":
            lines.append(Line(tier, "CUDA context", self.device_context_bytes))
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
            Line(tier, "CUDA context", part.overhead_bytes),
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
        text = [f"{tier:<4}  {label:<{width}}  {format_size(size):>8}  {share}" for tier, label, size, share in rows]
        text.append(f"{_slots_phrase(self.num_slots, self.num_experts)}, {self.resident_share:.0%} of experts resident")
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
    place: Place | None = None,
    experts_only: bool = False,
) -> Plan:
    """Split the budgets; BudgetError with the smallest that works where one is too small.

    ``resident_dense_bytes`` is what the dense weights take once loaded, where that differs from their size in the pack.
    ``place``: what divides the model among several GPUs, given the bytes of each cache layer and what every GPU spends
    on workspace and the like; ``vram_bytes`` is then the sum of their budgets.
    ``experts_only``: for a process that computes experts for another, which runs the model and has its KV cache.
    """
    if len(top_k_per_layer) != len(manifest.layers):
        raise ConfigError(f"{len(top_k_per_layer)} values of top_k for {len(manifest.layers)} layers with experts")
    if context_tokens < 1:
        raise ConfigError(f"a context of {context_tokens} tokens is too short; use 1 or more")
    if (device == "cuda") != (vram_bytes is not None):
        raise ConfigError(f"device {device!r} {'needs' if device == 'cuda' else 'has no'} budget of VRAM")
    demand = _Demand(
        manifest.layers,
        config,
        device=device,
        context_tokens=context_tokens,
        dtype_bytes=dtype_bytes,
        top_k_per_layer=top_k_per_layer,
        dense_bytes=manifest.dense_bytes if resident_dense_bytes is None else resident_dense_bytes,
        experts_only=experts_only,
    )
    compute_bytes = ram_bytes if vram_bytes is None else vram_bytes
    if place is None and compute_bytes < demand.smallest_bytes:
        option = "--ram" if device == "cpu" else "--vram"
        raise _budget_error(option, compute_bytes, demand, manifest.expert_format)
    parts: tuple[DevicePart, ...] = ()
    if place is None:
        num_slots = fill_slots(demand.needs, compute_bytes - demand.fixed_bytes)
    else:
        parts = demand.parts(place)
        num_slots = fill_parts(parts, demand.needs)
    num_host_slots, num_host_staging_slots, runtime_bytes = [0] * len(manifest.layers), 0, _RUNTIME_BYTES[device]
    if device == "cuda":
        # Reads for every layer looked ahead land beside those on demand.
        num_host_staging_slots = _STAGING_SLOTS + prefetch_depth
        host_fixed_bytes = runtime_bytes + num_host_staging_slots * demand.largest_slot_bytes
        if ram_bytes < host_fixed_bytes:
            raise BudgetError(
                f"needs {format_size(host_fixed_bytes)} of RAM to stage experts, budget {format_size(ram_bytes)}; "
                f"use --ram {_typed(host_fixed_bytes)}",
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
        device_context_bytes=_CUDA_CONTEXT_BYTES * max(1, len(parts)) if device == "cuda" else 0,
        num_experts=tuple(need.num_experts for need in demand.needs),
        slot_bytes=tuple(need.slot_bytes for need in demand.needs),
        num_slots=tuple(num_slots),
        num_host_slots=tuple(num_host_slots),
        staging_slots=demand.staging_slots,
        num_host_staging_slots=num_host_staging_slots,
        num_cache_layers=len(demand.cache_bytes),
        expert_rows=demand.expert_rows,
        parts=parts,
    )


class _Demand:
    """What the tier that computes must hold whatever the budget, and what its slots need."""

    def __init__(
        self,
        layers: Sequence[LayerLayout],
        config: PreTrainedConfig,
        *,
        device: Device,
        context_tokens: int,
        dtype_bytes: int,
        top_k_per_layer: Sequence[int],
        dense_bytes: int,
        experts_only: bool,
    ) -> None:
        self.experts_only = experts_only
        self.layers, self.config, self.device, self.context_tokens = layers, config, device, context_tokens
        self.dtype_bytes, self.top_k_per_layer, self.dense_bytes = dtype_bytes, top_k_per_layer, dense_bytes
        expert_rows = max(sum(part.shape[0] for part in layer.parts if len(part.shape) > 1) for layer in layers)
        self.expert_rows = expert_rows
        self.chunk_tokens = prefill_chunk_tokens(
            config, context_tokens=context_tokens, dtype_bytes=dtype_bytes, expert_rows=expert_rows
        )
        spare_tokens = SPARE_TOKENS if device == "cpu" else 0
        self.cache_bytes: list[int] = []
        if not experts_only:
            self.cache_bytes = cache_bytes_per_layer(
                config,
                context_tokens=context_tokens + spare_tokens,
                dtype_bytes=dtype_bytes,
                chunk_tokens=self.chunk_tokens,
            )
        self.kv_bytes = sum(self.cache_bytes)
        passes = [self.chunk_tokens] if device == "cpu" else [self.chunk_tokens, 1]  # a recorded step keeps its own
        self.workspace_bytes = sum(
            workspace_bytes(
                config,
                chunk_tokens=tokens,
                context_tokens=context_tokens,
                dtype_bytes=dtype_bytes,
                expert_rows=expert_rows,
            )
            for tokens in passes
        )
        self.needs = [SlotNeed(layer.num_experts, layer.slot_bytes, _FEWEST_SLOTS) for layer in layers]
        # All of a token's experts can be on their way at once, however few slots their layer has.
        self.staging_slots = max(_STAGING_SLOTS, max(top_k_per_layer) - _FEWEST_SLOTS)
        self.largest_slot_bytes = max(layer.slot_bytes for layer in layers)
        self.overhead_bytes = _RUNTIME_BYTES["cpu"] if device == "cpu" else _CUDA_CONTEXT_BYTES
        self.staging_bytes = self.staging_slots * self.largest_slot_bytes
        self.fixed_bytes = dense_bytes + self.kv_bytes + self.workspace_bytes + self.staging_bytes + self.overhead_bytes

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works: every layer at its floor."""
        return self.fixed_bytes + slots_bytes(self.needs, [need.floor for need in self.needs])

    def parts(self, place: Place) -> tuple[DevicePart, ...]:
        """What each of several GPUs holds."""
        each_bytes = self.workspace_bytes + self.staging_bytes + self.overhead_bytes
        return device_parts(
            place(self.cache_bytes, each_bytes),
            self.cache_bytes,
            workspace_bytes=self.workspace_bytes,
            staging_bytes=self.staging_bytes,
            overhead_bytes=self.overhead_bytes,
        )

    def replaced(self, *, layers: Sequence[LayerLayout] | None = None, context_tokens: int | None = None) -> "_Demand":
        """The demand with other experts or another context."""
        return _Demand(
            self.layers if layers is None else layers,
            self.config,
            device=self.device,
            context_tokens=self.context_tokens if context_tokens is None else context_tokens,
            dtype_bytes=self.dtype_bytes,
            top_k_per_layer=self.top_k_per_layer,
            dense_bytes=self.dense_bytes,
            experts_only=self.experts_only,
        )


def _budget_error(option: str, budget_bytes: int, demand: _Demand, expert_format: str) -> BudgetError:
    """The refusal, with those remedies that would do."""
    needed_bytes = demand.smallest_bytes
    remedies = [f"{option} {_typed(needed_bytes)}"]
    context_tokens = demand.context_tokens // 2
    while context_tokens >= _SHORTEST_CONTEXT_TOKENS:
        smaller_bytes = demand.replaced(context_tokens=context_tokens).smallest_bytes
        if smaller_bytes <= budget_bytes:
            remedies.append(f"--context {context_tokens} (needs {format_size(smaller_bytes)})")
            break
        context_tokens //= 2
    # the default where it fits, else what loses least of what does
    fitting = [
        (spec == _DEFAULT_FORMAT, format_bytes, spec)
        for spec in format_names()
        if spec != expert_format
        and (format_bytes := demand.replaced(layers=_in_format(demand.layers, spec)).smallest_bytes) <= budget_bytes
    ]
    if fitting:
        _, format_bytes, spec = max(fitting)
        remedies.append(f"a pack made with --format {spec} (needs {format_size(format_bytes)})")
    memory = "RAM" if option == "--ram" else "VRAM"
    floor_bytes = needed_bytes - demand.fixed_bytes
    return BudgetError(
        f"needs {format_size(needed_bytes)} of {memory}, budget {format_size(budget_bytes)}: "
        f"dense weights {format_size(demand.dense_bytes)}, "
        f"KV cache for {demand.context_tokens} tokens {format_size(demand.kv_bytes)}, "
        f"workspace {format_size(demand.workspace_bytes)}, fewest expert slots {format_size(floor_bytes)}, "
        f"the rest {format_size(demand.fixed_bytes - demand.dense_bytes - demand.kv_bytes - demand.workspace_bytes)}; "
        f"use {' or '.join(remedies)}",
        needed_bytes=needed_bytes,
        budget_bytes=budget_bytes,
    )


def _in_format(layers: Sequence[LayerLayout], spec: str) -> list[LayerLayout]:
    """The layers as they would be packed in another format; biases and other vectors stay as they are."""
    weight_format = get_format(spec)
    return [
        LayerLayout.of(
            layer.module,
            layer.num_experts,
            [
                (part.name, part.shape, spec, weight_format.nbytes(part.shape))
                if len(part.shape) > 1
                else (part.name, part.shape, part.format, part.size_bytes)
                for part in layer.parts
            ],
        )
        for layer in layers
    ]


def _typed(size_bytes: int) -> str:
    """A size to type back in: whole MiB, rounded up so that it suffices."""
    return f"{-(-size_bytes // _MIB)}MiB"


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
