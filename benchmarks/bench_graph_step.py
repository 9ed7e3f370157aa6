"""What a recorded decode step costs the host in Python, a layer: the cache asked layer by layer, or told afterwards.

Kernels, copies, events and waits are replaced by nothing, so this is the bookkeeping alone; a GPU is not needed.

    python benchmarks/bench_graph_step.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.graphs.captured_step import CapturedStep
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.step_recording import ExpertsCall, StepRecording
from moe_offload.offload.graphs.uses import PendingUses

SHAPES = {"Mixtral-8x7B": (32, 8, 2), "Qwen3-30B-A3B": (48, 128, 8), "DeepSeek-V3": (58, 256, 8)}
STEPS = 200


class _NoTier:
    """Slots without bytes: a tier, and the order of its kernels, that do nothing."""

    num_staging_slots = 0
    lender = None

    def use(self, layer_idx: int, slot: int) -> None: ...
    def used(self, layer_idx: int, slot: int) -> None: ...
    def see(self, layer_idx: int, slot: int) -> None: ...
    def hold(self, *args: Any) -> None: ...
    def mark(self) -> None: ...
    def close(self) -> None: ...
    def stream(self) -> int:
        return 0


def _nothing() -> None:
    """A piece that launches no kernel."""


def _step(num_layers: int, num_experts: int, top_k: int) -> tuple[CapturedStep, Residency, SlotTable, PendingUses]:
    tier: Any = _NoTier()
    residency = Residency(ExpertCache([num_experts] * num_layers, [num_experts] * num_layers), tier)
    table = SlotTable([num_experts] * num_layers, torch.device("cpu"), tier)
    cache = residency.cache
    for layer_idx in range(num_layers):
        for placement in cache.admit_warm(layer_idx, range(num_experts)):
            cache.mark_loaded(layer_idx, placement.expert_idx)
            table.put(layer_idx, placement.expert_idx, placement.slot)
    record = RoutingRecord(num_layers, top_k, torch.device("cpu"))
    recording = StepRecording(None, record, table.device)  # type: ignore[arg-type]
    out = torch.empty(1)
    with table.step():
        for layer_idx in range(num_layers):
            index = torch.randperm(num_experts)[:top_k].view(1, top_k)
            record.write(layer_idx, index, torch.rand(1, top_k), table.device[layer_idx])
            recording.pieces.append(_nothing)
            recording.calls.append(ExpertsCall(layer_idx, num_experts, top_k, out, lambda: out, _nothing))
    return CapturedStep(recording, _nothing, record, None), residency, table, PendingUses(residency)


def _layer_us(run: Callable[[], object], num_layers: int) -> float:
    times = []
    for _ in range(STEPS):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return 1e6 * statistics.median(times) / num_layers


def main() -> None:
    """One line a shape."""
    torch.set_num_threads(1)
    print(f"{'shape':<16}{'by layers':>12}{'whole':>12}  us a layer")
    for name, (num_layers, num_experts, top_k) in SHAPES.items():
        step, residency, table, uses = _step(num_layers, num_experts, top_k)
        by_layers = _layer_us(lambda step=step, residency=residency: step.run_by_layers(residency), num_layers)
        whole = _layer_us(lambda step=step, table=table, uses=uses: step.run_whole(table, uses), num_layers)
        print(f"{name:<16}{by_layers:>12.1f}{whole:>12.1f}")


if __name__ == "__main__":
    main()
