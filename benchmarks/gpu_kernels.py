"""Kernels on a GPU that compute experts from their slots, against what the device itself can do, in the same run.

    python benchmarks/gpu_kernels.py [--format nf4 --format mxfp4] [--json FILE]

Decode: a token's experts, as a captured graph, by the bytes of their weights, against the rate at which a copy on the
device moves bytes. Prefill: 2048 tokens, against bf16 products of the same shapes, one for each expert and its rows.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels import SlotKernels, SlotMlp, SlotPart, slot_kernels

FORMATS = ("nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "bf16")
PREFILL_TOKENS = 2048
# Every run finds other experts than the one before it, so that none is in a cache of the device.
_LEAST_SLAB_BYTES = 1 << 30
_ROUNDS, _CALLS = 20, 8


@dataclass(frozen=True)
class Shape:
    """Experts of a published model."""

    name: str
    hidden: int
    inner: int
    num_experts: int
    top_k: int


SHAPES = (Shape("Mixtral", 4096, 14336, 8, 2), Shape("2048 x 768", 2048, 768, 128, 8))


@dataclass(frozen=True)
class Row:
    """What was measured of one shape and format."""

    shape: str
    format: str
    kernels: str
    decode_us: float
    decode_bytes_per_s: float
    copy_bytes_per_s: float
    prefill_ms: float
    matmul_ms: float

    @property
    def decode_share(self) -> float:
        return self.decode_bytes_per_s / self.copy_bytes_per_s

    @property
    def prefill_share(self) -> float:
        return self.matmul_ms / self.prefill_ms


def random_experts(shape: Shape, spec: str, device: torch.device) -> tuple[SlotMlp, Tensor]:
    """A slab of random bytes that are weights: one expert, packed, in all slots."""
    weight_format = get_format(spec)
    up = SlotPart(weight_format, (2 * shape.inner, shape.hidden), 0)
    down = SlotPart(weight_format, (shape.hidden, shape.inner), weight_format.nbytes(up.shape))
    end = down.offset_bytes + weight_format.nbytes(down.shape)
    expert = torch.zeros(-(-end // 4096) * 4096, dtype=torch.uint8)
    for part in (up, down):
        weight = torch.randn(part.shape, generator=torch.Generator().manual_seed(0)) * 0.02
        part.packed(expert).copy_(weight_format.quantize(weight))
    num_slots = max(shape.num_experts, -(-_LEAST_SLAB_BYTES // len(expert)))
    slab = expert.to(device).repeat(num_slots).view(num_slots, -1)
    return SlotMlp((up,), down, Activation("sigmoid")), slab


def seconds(calls: list[Callable[[], None]]) -> float:
    """The median over rounds of the time of a call, on the device's own clock."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_ROUNDS + 2):
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / len(calls))
    return statistics.median(times[2:])


def captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call as a CUDA graph, after it has run once."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_bytes_per_s(slab: Tensor) -> float:
    """What the device's memory moves while half of the slab is copied: each byte is read once and written once."""
    half = slab.view(-1)[: slab.numel() // 2]
    target = torch.empty_like(half)
    return 2 * half.numel() / seconds([lambda: target.copy_(half)])


def decode_seconds(shape: Shape, kernels: SlotKernels, mlp: SlotMlp, slab: Tensor) -> float:
    x = torch.randn(1, shape.hidden, device=slab.device, dtype=torch.bfloat16)
    weights, result = torch.rand(1, shape.top_k, device=slab.device), torch.empty_like(x)

    def call(first: int) -> Callable[[], None]:
        chosen = [(first * shape.top_k + k) % len(slab) for k in range(shape.top_k)]
        slots = torch.tensor([chosen], dtype=torch.int32, device=slab.device)
        return lambda: kernels.decode_layer(mlp, slab, slots, x, weights, result)

    num_calls = min(64, max(_CALLS, len(slab) // shape.top_k))
    if kernels.name == "torch" or kernels.name == "bitsandbytes":  # they ask the device for slots
        return seconds([call(first) for first in range(_CALLS)])
    return seconds([captured(call(first)) for first in range(num_calls)])


def prefill_seconds(shape: Shape, kernels: SlotKernels, mlp: SlotMlp, slab: Tensor) -> float:
    num_pairs = PREFILL_TOKENS * shape.top_k
    x = torch.randn(PREFILL_TOKENS, shape.hidden, device=slab.device, dtype=torch.bfloat16)
    outputs = torch.empty(num_pairs, shape.hidden, device=slab.device, dtype=torch.bfloat16)
    rows = torch.arange(num_pairs, dtype=torch.int32, device=slab.device)
    slots = torch.arange(shape.num_experts, dtype=torch.int32, device=slab.device)
    offsets = torch.arange(shape.num_experts + 1, dtype=torch.int32, device=slab.device)
    offsets = offsets * (num_pairs // shape.num_experts)
    x_rows = rows % PREFILL_TOKENS
    return seconds([lambda: kernels.grouped_experts(mlp, slab, slots, offsets, x, x_rows, outputs, rows)])


def matmul_seconds(shape: Shape, device: torch.device) -> float:
    """The same products in bf16, without an activation, all by one pair of weights."""
    num_rows = PREFILL_TOKENS * shape.top_k // shape.num_experts
    up = torch.randn(2 * shape.inner, shape.hidden, device=device, dtype=torch.bfloat16)
    down = torch.randn(shape.hidden, shape.inner, device=device, dtype=torch.bfloat16)
    x = torch.randn(num_rows, shape.hidden, device=device, dtype=torch.bfloat16)

    def call() -> None:
        for _ in range(shape.num_experts):
            torch.nn.functional.linear(torch.nn.functional.linear(x, up)[:, : shape.inner], down)

    return seconds([captured(call)])


def measure(shape: Shape, spec: str, device: torch.device) -> Row:
    mlp, slab = random_experts(shape, spec, device)
    kernels = slot_kernels(device, mlp).kernels
    decode_s = decode_seconds(shape, kernels, mlp, slab)
    token_bytes = shape.top_k * sum(part.format.nbytes(part.shape) for part in (*mlp.up, mlp.down))
    return Row(
        shape.name,
        spec,
        kernels.name,
        decode_us=decode_s * 1e6,
        decode_bytes_per_s=token_bytes / decode_s,
        copy_bytes_per_s=copy_bytes_per_s(slab),
        prefill_ms=prefill_seconds(shape, kernels, mlp, slab) * 1e3,
        matmul_ms=matmul_seconds(shape, device) * 1e3,
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| experts | format | kernels | decode, us | GB/s | of a copy | prefill, ms | of a bf16 product |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.shape} | {row.format} | {row.kernels} | {row.decode_us:.1f} | {row.decode_bytes_per_s / 1e9:.0f} "
        f"| {row.decode_share:.0%} | {row.prefill_ms:.2f} | {row.prefill_share:.0%} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", action="append", choices=FORMATS, help="measure this one; may be given again")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py needs a CUDA device, and torch finds none here")
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for shape in SHAPES:
        for spec in options.format or FORMATS:
            rows.append(measure(shape, spec, device))
            torch.cuda.empty_cache()
    machine = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "cuda": torch.version.cuda}
    print(f"{machine['gpu']}, torch {machine['torch']}, CUDA {machine['cuda']}\n\n{table(rows)}")
    if options.json is not None:
        figures = [asdict(row) | {"decode_share": row.decode_share, "prefill_share": row.prefill_share} for row in rows]
        options.json.write_text(json.dumps({"machine": machine, "rows": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
