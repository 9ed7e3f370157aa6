"""One way to hold a model: experts in one format, the rest in another; what the planner and the clock need of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moe_offload.offload.dense_weights import DenseWeights
from moe_offload.offload.experts.prefetch_tuning import parse_prefetch
from moe_offload.offload.forecast.machine import Machine
from moe_offload.offload.forecast.model_shape import SOURCE, ModelShape, PackedShape
from moe_offload.offload.forecast.token_load import LayerLoad, TokenLoad
from moe_offload.offload.pack.manifest import LayerLayout
from moe_offload.offload.planning.caching_allocator import small_bytes
from moe_offload.offload.planning.kv_cache import kv_cache_bytes
from moe_offload.offload.planning.place_model import place_model
from moe_offload.offload.planning.placement import Placement
from moe_offload.offload.planning.plan import Plan, make_plan
from moe_offload.offload.planning.workspace import experts_per_token
from moe_offload.offload.row_embedding import table_in_pack
from moe_offload.quant import get_format


@dataclass(frozen=True)
class Candidate:
    """``layers`` are all with experts; ``dense_sizes`` is in memory, ``step_dense_bytes`` of it is read by a token."""

    expert_format: str
    dense_format: str
    layers: Sequence[LayerLayout]
    config: Any
    dtype_bytes: int
    dense_sizes: Mapping[str, int]
    step_dense_bytes: int
    pack_bytes: int

    @property
    def dense_bytes(self) -> int:
        """All but the experts, in memory."""
        return sum(self.dense_sizes.values())

    @property
    def top_k(self) -> int:
        """Experts that a token asks of a layer."""
        return experts_per_token(self.config.get_text_config(decoder=True))

    def plan(self, machine: Machine, *, context_tokens: int) -> Plan:
        """What goes where, as loading would have it; `BudgetError` with the smallest budget that would do."""

        def place(cache_bytes: Sequence[int], overhead_bytes: int) -> Placement:
            return place_model(
                self.config,
                self.layers,
                self.dense_sizes,
                cache_bytes,
                budgets_bytes=dict(machine.gpus),
                overhead_bytes=overhead_bytes,
            )

        return make_plan(
            self,
            self.config,
            device=machine.device,
            ram_bytes=machine.ram_bytes,
            vram_bytes=machine.vram_bytes,
            context_tokens=context_tokens,
            dtype_bytes=self.dtype_bytes,
            top_k_per_layer=[self.top_k] * len(self.layers),
            prefetch_depth=parse_prefetch("auto"),
            resident_dense_bytes=self.dense_bytes,
            small_dense_bytes=small_bytes(self.dense_sizes.values()),
            place=place if machine.gpus else None,
        )

    def token_load(self, plan: Plan, *, context_tokens: int, num_slots: Sequence[int] | None = None) -> TokenLoad:
        """What a decode step moves under ``plan`` with so many tokens in its past.

        ``num_slots``: of each layer, where they are not the most.
        """
        loads = [
            LayerLoad(
                layer.num_experts,
                min(self.top_k, layer.num_experts),
                sum(part.size_bytes for part in layer.parts),
                slots / layer.num_experts,
                host_slots / layer.num_experts,
            )
            for layer, slots, host_slots in zip(
                self.layers, plan.num_slots if num_slots is None else num_slots, plan.num_host_slots, strict=True
            )
            if not _is_encoders(layer.module, self.config)
        ]
        kv_bytes = kv_cache_bytes(self.config, context_tokens=context_tokens, dtype_bytes=self.dtype_bytes)
        return TokenLoad(loads, self.step_dense_bytes, kv_bytes)

    @property
    def operations_per_token(self) -> float:
        """Multiplications and additions of the products with weights that a token of a prompt goes through."""
        decoder = self.config.get_text_config(decoder=True)
        experts = sum(
            min(self.top_k, layer.num_experts) * math.prod(part.shape)
            for layer in self.layers
            for part in layer.parts
            if len(part.shape) > 1 and not _is_encoders(layer.module, self.config)
        )
        bits = 8 * self.dtype_bytes if self.dense_format == SOURCE else get_format(self.dense_format).bits_per_weight()
        head = decoder.vocab_size * (getattr(decoder, "hidden_size", None) or decoder.d_model)  # of the last token only
        return float(2 * (experts + max(0.0, self.step_dense_bytes * 8 / bits - head)))


def candidate(shape: ModelShape, machine: Machine, expert_format: str, dense_format: str) -> Candidate:
    """``shape`` in these formats; `FormatError` for bits that no mixture has."""
    outline = shape.outline(expert_format, dense_format)
    config = shape.config
    dtype_bytes = _dtype(config).itemsize
    table = table_in_pack(config, outline.dense_names, machine.device)
    dense_sizes = {name: size for name, size in outline.resident_sizes(dtype_bytes).items() if name != table}
    dense_bytes = sum(dense_sizes.values())
    encoder_bytes = sum(
        count * dtype_bytes for name, count in outline.plain_dense.items() if _is_encoders(name, config)
    ) + sum(size_bytes for name, size_bytes in outline.other_dense.items() if _is_encoders(name, config))
    return Candidate(
        expert_format,
        dense_format,
        outline.layers,
        config,
        dtype_bytes,
        dense_sizes,
        dense_bytes - encoder_bytes - (0 if table else _lookup_bytes(config, dtype_bytes)),
        outline.dense_bytes + sum(layer.num_experts * layer.slot_bytes for layer in outline.layers),
    )


def packed_candidate(shape: PackedShape, machine: Machine) -> Candidate:
    """A pack as it is."""
    manifest, config, dtype = shape.manifest, shape.config, _dtype(shape.config)
    with DenseWeights(shape.folder, manifest) as dense:
        table = table_in_pack(config, dense.keys(), machine.device)
        dense_sizes = {name: size for name, size in dense.resident_sizes(dtype).items() if name != table}
    dense_bytes = sum(dense_sizes.values())
    return Candidate(
        manifest.expert_format,
        manifest.dense_format,
        manifest.layers,
        config,
        dtype.itemsize,
        dense_sizes,
        dense_bytes - (0 if table else _lookup_bytes(config, dtype.itemsize)),
        manifest.dense_bytes + sum(layer.num_experts * layer.slot_bytes for layer in manifest.layers),
    )


def _dtype(config: Any) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16


def _is_encoders(name: str, config: Any) -> bool:
    """Whether a module or parameter belongs to an encoder, which a decode step leaves alone."""
    return bool(config.is_encoder_decoder) and "encoder" in name.split(".")


def _lookup_bytes(config: Any, dtype_bytes: int) -> int:
    """Bytes of a table of embeddings of which a token reads one row; 0 where it is the head too."""
    decoder = config.get_text_config(decoder=True)
    if getattr(config, "tie_word_embeddings", False) or getattr(decoder, "tie_word_embeddings", False):
        return 0
    return int(decoder.vocab_size * (getattr(decoder, "hidden_size", None) or decoder.d_model) * dtype_bytes)
