"""What a model needs of the memory that computes, whatever the budget, and what is said where a budget is too small."""

from collections.abc import Callable, Sequence
from typing import Literal

from transformers import PreTrainedConfig

from moe_offload.errors import BudgetError
from moe_offload.offload.decode.kv_room import SPARE_TOKENS
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.pass_inputs import LONGEST_DRAFT_TOKENS
from moe_offload.offload.planning.cuda_memory import (
    CONTEXT_BYTES,
    LIBRARY_BYTES,
    CudaOverhead,
    fragmentation_bytes,
    graph_pool_bytes,
)
from moe_offload.offload.planning.device_parts import DevicePart, device_parts
from moe_offload.offload.planning.kv_cache import cache_bytes_per_layer, state_bytes
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.room import Room, tokens_at_once
from moe_offload.offload.planning.sizes import format_size
from moe_offload.offload.planning.slot_shares import SlotNeed, slots_bytes
from moe_offload.offload.planning.workspace import prefill_chunk_tokens, workspace_bytes
from moe_offload.quant import format_names, get_format

Device = Literal["cpu", "cuda"]
Place = Callable[[Sequence[int], int], Placement]
_MIB = 1024**2
# Tokenizer, modules, thread stacks, and what the allocator holds without using it.
RUNTIME_BYTES = {"cpu": 160 * _MIB, "cuda": 512 * _MIB}
STAGING_SLOTS = 2  # at least: one is computed with while the next is filled
_FEWEST_SLOTS = 1  # a layer; what a step asks for beyond them passes through staging
_SHORTEST_CONTEXT_TOKENS = 256
_DEFAULT_FORMAT = "nf4"  # the one to propose among equals


class Demand:
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
        small_dense_bytes: int,
        experts_only: bool,
        graphs: bool,
    ) -> None:
        self.experts_only, self.graphs, self.small_dense_bytes = experts_only, graphs, small_dense_bytes
        self.layers, self.config, self.device, self.context_tokens = layers, config, device, context_tokens
        self.dtype_bytes, self.top_k_per_layer, self.dense_bytes = dtype_bytes, top_k_per_layer, dense_bytes
        expert_rows = max(sum(part.shape[0] for part in layer.parts if len(part.shape) > 1) for layer in layers)
        self.expert_rows = expert_rows
        self.chunk_tokens = prefill_chunk_tokens(
            config, context_tokens=context_tokens, dtype_bytes=dtype_bytes, expert_rows=expert_rows
        )
        self.cache_bytes = [] if experts_only else self._cache_bytes(context_tokens)
        self.kv_bytes = sum(self.cache_bytes)
        self.workspace_bytes, step_bytes = (self._workspace_bytes(n, context_tokens) for n in (self.chunk_tokens, 1))
        self.room = Room(context_tokens, self.chunk_tokens, self.kv_bytes, self.workspace_bytes)
        self.least_room = self._least_room()
        self.needs = [SlotNeed(layer.num_experts, layer.slot_bytes, _FEWEST_SLOTS) for layer in layers]
        # All of a token's experts can be on their way at once, however few slots their layer has.
        self.staging_slots = max(STAGING_SLOTS, max(top_k_per_layer) - _FEWEST_SLOTS)
        self.largest_slot_bytes = max(layer.slot_bytes for layer in layers)
        self.staging_bytes = self.staging_slots * self.largest_slot_bytes
        self._graph_pool_bytes = graph_pool_bytes(step_bytes, state_bytes(config, dtype_bytes)) if graphs else 0
        self.runtime_bytes = RUNTIME_BYTES[device] if device == "cpu" else 0
        self.fixed_bytes = dense_bytes + self.room.total_bytes + self.staging_bytes + self.runtime_bytes

    def _least_room(self) -> Room:
        """What slots leave free at any time: room for a short text that is being decoded.

        All of it where nobody sees to it that slots give way, or where that costs more than it brings: on a GPU slabs
        would be made anew, and recorded steps with them; a rank that holds experts for another knows of no text; an
        encoder reads all of a text at once, and what it leaves for the decoder is as long as that.
        """
        if self.device != "cpu" or self.experts_only or self.config.is_encoder_decoder:
            return self.room
        text_tokens, pass_tokens = tokens_at_once(self.context_tokens), min(self.chunk_tokens, LONGEST_DRAFT_TOKENS)
        kv_bytes = min(self.kv_bytes, sum(self._cache_bytes(text_tokens)))
        step_bytes = min(self.workspace_bytes, self._workspace_bytes(pass_tokens, text_tokens))
        return Room(text_tokens, pass_tokens, kv_bytes, step_bytes)

    def _cache_bytes(self, text_tokens: int) -> list[int]:
        return cache_bytes_per_layer(
            self.config,
            context_tokens=text_tokens + (SPARE_TOKENS if self.device == "cpu" else 0),
            dtype_bytes=self.dtype_bytes,
            chunk_tokens=self.chunk_tokens,
        )

    def _workspace_bytes(self, pass_tokens: int, text_tokens: int) -> int:
        return workspace_bytes(
            self.config,
            chunk_tokens=pass_tokens,
            context_tokens=text_tokens,
            dtype_bytes=self.dtype_bytes,
            expert_rows=self.expert_rows,
        )

    def overhead(self, num_slots: Sequence[int]) -> CudaOverhead | None:
        """What a GPU's memory holds beside all that, where layers have so many slots; None for the CPU."""
        if self.device == "cpu":
            return None
        slabs = [need.slot_bytes * slots for need, slots in zip(self.needs, num_slots, strict=True)]
        return self._overhead(slabs, self.dense_bytes, self.cache_bytes)

    def overhead_of_part(self, part: DevicePart, slabs: Sequence[int]) -> CudaOverhead:
        """The same of one of several GPUs, whose layers have slots of so many bytes."""
        return self._overhead(slabs, part.dense_bytes, part.cache_bytes)

    def _overhead(self, slabs: Sequence[int], dense_bytes: int, cache_bytes: Sequence[int]) -> CudaOverhead:
        lost_bytes = fragmentation_bytes(
            [self.staging_bytes, *slabs],
            dense_bytes=dense_bytes,
            small_dense_bytes=self.small_dense_bytes,
            cache_layers=cache_bytes,
            workspace_bytes=self.workspace_bytes,
        )
        return CudaOverhead(CONTEXT_BYTES, LIBRARY_BYTES, self._graph_pool_bytes, lost_bytes)

    def overhead_bytes(self, num_slots: Sequence[int]) -> int:
        """All of it; 0 for the CPU."""
        overhead = self.overhead(num_slots)
        return 0 if overhead is None else overhead.total_bytes

    @property
    def smallest_bytes(self) -> int:
        """The smallest budget that works: every layer at its floor."""
        floors = [need.floor for need in self.needs]
        return self.fixed_bytes + slots_bytes(self.needs, floors) + self.overhead_bytes(floors)

    def parts(self, place: Place) -> tuple[DevicePart, ...]:
        """What each of several GPUs holds."""
        floors = [need.floor for need in self.needs]
        each_bytes = self.workspace_bytes + self.staging_bytes + self.overhead_bytes(floors)
        return device_parts(
            place(self.cache_bytes, each_bytes),
            self.cache_bytes,
            workspace_bytes=self.workspace_bytes,
            staging_bytes=self.staging_bytes,
        )

    def replaced(self, *, layers: Sequence[LayerLayout] | None = None, context_tokens: int | None = None) -> "Demand":
        """The demand with other experts or another context."""
        return Demand(
            self.layers if layers is None else layers,
            self.config,
            device=self.device,
            context_tokens=self.context_tokens if context_tokens is None else context_tokens,
            dtype_bytes=self.dtype_bytes,
            top_k_per_layer=self.top_k_per_layer,
            dense_bytes=self.dense_bytes,
            small_dense_bytes=self.small_dense_bytes,
            experts_only=self.experts_only,
            graphs=self.graphs,
        )


def budget_error(option: str, budget_bytes: int, demand: Demand, expert_format: str) -> BudgetError:
    """The refusal, with those remedies that would do."""
    needed_bytes = demand.smallest_bytes
    remedies = [f"{option} {typed_size(needed_bytes)}"]
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
    floor_bytes = slots_bytes(demand.needs, [need.floor for need in demand.needs])
    named_bytes = demand.dense_bytes + demand.kv_bytes + demand.workspace_bytes + floor_bytes
    return BudgetError(
        f"needs {format_size(needed_bytes)} of {memory}, budget {format_size(budget_bytes)}: "
        f"dense weights {format_size(demand.dense_bytes)}, "
        f"KV cache for {demand.context_tokens} tokens {format_size(demand.kv_bytes)}, "
        f"workspace {format_size(demand.workspace_bytes)}, fewest expert slots {format_size(floor_bytes)}, "
        f"the rest {format_size(needed_bytes - named_bytes)}; "
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


def typed_size(size_bytes: int) -> str:
    """A size to type back in: whole MiB, rounded up so that it suffices."""
    return f"{-(-size_bytes // _MIB)}MiB"
