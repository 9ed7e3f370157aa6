"""What a recorded decode step costs the host in Python, a layer.

By layers the cache is asked at each; with lookahead it is told what two layers are predicted to choose as well; of a
step that is launched whole it is told afterwards.

Kernels, copies, events and waits are replaced by nothing, so this is the bookkeeping alone; a GPU is not needed.

    python benchmarks/bench_graph_step.py
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_offload.cache import ExpertCache
from moe_offload.offload.experts.lookahead import Lookahead
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.graphs.captured_step import CapturedStep
from moe_offload.offload.graphs.routing_record import RoutingRecord
from moe_offload.offload.graphs.slot_table import SlotTable
from moe_offload.offload.graphs.step_recording import ExpertsCall, StepRecording
from moe_offload.offload.graphs.uses import PendingUses

SHAPES = {"Mixtral-8x7B": (32, 8, 2), "Qwen3-30B-A3B": (48, 128, 8), "DeepSeek-V3": (58, 256, 8)}
STEPS = 200
AHEAD = 2


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

    def exchanges(self, layer_idx: int) -> bool:
        return False


def _nothing() -> None:
    """A piece that launches no kernel."""


class _Layer(nn.Module):
    """What lookahead looks for: a router beside experts."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Identity(), nn.Identity()
        self.experts.num_experts = num_experts  # type: ignore[assignment]


def _lookahead(residency: Residency, num_layers: int, num_experts: int, top_k: int) -> Lookahead:
    model = nn.ModuleList(_Layer(num_experts) for _ in range(num_layers))
    names = [f"{layer_idx}.experts" for layer_idx in range(num_layers)]
    return Lookahead(model, names, [top_k] * num_layers, residency)


def _step(
    num_layers: int, num_experts: int, top_k: int, num_ahead: int
) -> tuple[CapturedStep, Residency, SlotTable, PendingUses]:
    tier: Any = _NoTier()
    residency = Residency(ExpertCache([num_experts] * num_layers, [num_experts] * num_layers), tier)
    table = SlotTable([num_experts] * num_layers, torch.device("cpu"), tier)
    cache = residency.cache
    for layer_idx in range(num_layers):
        for placement in cache.admit_warm(layer_idx, range(num_experts)):
            cache.mark_loaded(layer_idx, placement.expert_idx)
            table.put(layer_idx, placement.expert_idx, placement.slot)
    record = RoutingRecord(num_layers, top_k, torch.device("cpu"), num_ahead=num_ahead)
    recording = StepRecording(None, record, table.device, None)  # type: ignore[arg-type]
    out, shape = torch.empty(1), (1, top_k)
    with table.step():
        for layer_idx in range(num_layers):
            index = torch.randperm(num_experts)[:top_k].view(1, top_k)
            record.write(layer_idx, index, torch.rand(1, top_k), table.device[layer_idx])
            ahead = range(layer_idx + 1, min(layer_idx + 1 + num_ahead, num_layers))
            for number, _ in enumerate(ahead):
                record.write_ahead(layer_idx, number, torch.randperm(num_experts)[:top_k].view(1, top_k))
            recording.pieces.append(_nothing)
            foreseen = tuple((target_idx, top_k) for target_idx in ahead)
            eager: Any = None
            recording.calls.append(ExpertsCall(layer_idx, num_experts, shape, out, eager, _nothing, foreseen))
    return CapturedStep(recording, _nothing, record, None), residency, table, PendingUses(residency)


def _layer_us(run: Callable[[], object], num_layers: int) -> float:
    times = []
    for _ in range(STEPS):
        begin_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin_s)
    return 1e6 * statistics.median(times) / num_layers


def _by_layers_us(num_layers: int, num_experts: int, top_k: int, num_ahead: int) -> float:
    step, residency, _, _ = _step(num_layers, num_experts, top_k, num_ahead)
    lookahead = _lookahead(residency, num_layers, num_experts, top_k)
    return _layer_us(lambda: step.run_by_layers(residency, lookahead), num_layers)


def _whole_us(num_layers: int, num_experts: int, top_k: int) -> float:
    step, _, table, uses = _step(num_layers, num_experts, top_k, 0)
    return _layer_us(lambda: step.run_whole(table, uses), num_layers)


def main() -> None:
    """One line a shape."""
    torch.set_num_threads(1)
    print(f"{'shape':<16}{'by layers':>12}{'lookahead':>12}{'whole':>12}  us a layer")
    for name, (num_layers, num_experts, top_k) in SHAPES.items():
        shape = (num_layers, num_experts, top_k)
        times_us = (_by_layers_us(*shape, 0), _by_layers_us(*shape, AHEAD), _whole_us(*shape))
        print(f"{name:<16}" + "".join(f"{time_us:>12.1f}" for time_us in times_us))


if __name__ == "__main__":
    main()
