"""Whether a model's decode steps run from CUDA graphs, and everything that takes."""

from dataclasses import dataclass
from typing import Any

import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.experts.layer import StepState
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.graphs.answer_cache import AnswerCache, AnswerCaches
from moe_offload.offload.graphs.cuda_recorder import CudaRecorder
from moe_offload.offload.graphs.graphed_forward import Clock, GraphedForward, StepLookahead
from moe_offload.offload.graphs.recorder import Recorder
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.tiers.compute_tier import ComputeTier
from moe_offload.offload.tiers.cuda_tier import CudaTier

GRAPHS = ("auto", "on", "off")


@dataclass(frozen=True)
class DecodeGraphs:
    """What answers need: caches whose memory stays, and the forward that runs recordings; None of it, or the first."""

    caches: AnswerCaches | None = None
    forward: GraphedForward | None = None
    table: SlotTable | None = None

    def forget(self) -> None:
        """Slots have moved: steps are recorded anew."""
        if self.forward is not None:
            self.forward.forget()

    def tell_uses(self) -> None:
        """Let the cache's counts be whole."""
        if self.forward is not None:
            self.forward.tell_uses()

    def close(self) -> None:
        """The slots are about to be freed."""
        if self.table is not None:
            self.table.close()


def check_graphs(graphs: str, device_type: str) -> None:
    """`ConfigError` for what is no such setting, or cannot be had on such a device."""
    if graphs not in GRAPHS:
        raise ConfigError(f"graphs is {graphs!r}; use {', '.join(GRAPHS)}")
    if graphs == "on" and device_type != "cuda":
        raise ConfigError("decode steps cannot run from CUDA graphs on the CPU; use --graphs auto, or --device cuda")


def decode_graphs(
    model: Any,
    step: StepState,
    residency: Residency,
    tier: ComputeTier,
    graphs: str,
    *,
    context_tokens: int,
    top_k: int,
    lookahead: StepLookahead,
    most_ahead: int,
    clock: Clock,
) -> DecodeGraphs:
    """Set up recordings as ``graphs`` (one of `GRAPHS`) asks; `ConfigError` if they are asked for and cannot be had.

    A model of which steps can be recorded has the same caches with graphs off, so that its logits are the same to the
    bit. ``most_ahead``: how many layers a step may look ahead.
    """
    recorder = make_recorder(model.device)
    why_not = _why_not(model, residency, tier, recorder)
    if why_not is not None or recorder is None or not isinstance(tier, CudaTier):
        if graphs == "on":
            raise ConfigError(f"decode steps cannot run from CUDA graphs: {why_not}; use --graphs auto or off")
        return DecodeGraphs()
    caches = AnswerCaches(model.config, context_tokens)
    if graphs == "off":
        return DecodeGraphs(caches)
    num_experts = [residency.cache.num_experts(layer_idx) for layer_idx in range(residency.cache.num_layers)]
    table = SlotTable(num_experts, model.device, tier.slot_order())
    residency.slot_listener = table
    record = RoutingRecord(len(num_experts), top_k, model.device, num_ahead=most_ahead)
    forward = GraphedForward(model, step, residency, table, recorder, record, caches, lookahead, clock)
    return DecodeGraphs(caches, forward, table)


def make_recorder(device: torch.device) -> Recorder | None:
    """What records on this device; None for the CPU."""
    return CudaRecorder(device) if device.type == "cuda" else None


def _why_not(model: Any, residency: Residency, tier: ComputeTier, recorder: Recorder | None) -> str | None:
    if recorder is None or not isinstance(tier, CudaTier):
        return "the CPU computes"
    if tier.num_devices > 1:
        return "the layers are on several GPUs"
    if residency.peers is not None:
        return "other processes hold some of the experts"
    if not AnswerCache.supported(model.config):
        return f"{type(model).__name__} keeps something in its cache that has no place that stays"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not call {type(model).__name__} one that can be compiled as a whole"
    return None
