"""The machine's rates, measured beside a run: what its figures are held against."""

import random
import time
from collections import deque
from pathlib import Path

import torch

from moe_offload.offload.bench.settings import DISK_S
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.planning.rates import Rate, memory_read_rate
from moe_offload.offload.streaming.disk import DirectDisk
from moe_offload.offload.streaming.reader import ExpertReader, Read
from moe_offload.offload.streaming.slab import Slab
from moe_offload.quant import kernels

_MIB = 1024**2
# Beyond any cache, yet little beside the budgets that are measured.
_SMALLEST_BUFFER_BYTES, _LARGEST_BUFFER_BYTES = 128 * _MIB, 512 * _MIB
_IN_FLIGHT, _IN_FLIGHT_BYTES = 8, 256 * _MIB
_PASSES = 5
_MATRIX_S = 0.5


def kernel_read_rate(num_bytes: int) -> Rate:
    """How fast the kernels' own threads read a buffer once, the best of a few passes; as many bytes as a step reads."""
    num_bytes = max(_SMALLEST_BUFFER_BYTES, min(num_bytes, _LARGEST_BUFFER_BYTES))
    if not kernels.usable():
        return memory_read_rate(num_bytes)
    slab = Slab(1, num_bytes // _MIB * _MIB)  # on huge pages, as slots are
    data = slab.tensor(0).fill_(1)
    best_s = float("inf")
    for _ in range(_PASSES):
        begin_s = time.perf_counter()
        kernels.read_all(data)
        best_s = min(best_s, time.perf_counter() - begin_s)
    return Rate(data.numel(), best_s)


def expert_read_rate(
    manifest: PackManifest, folder: Path, *, seed: int, longest_s: float = DISK_S
) -> tuple[Rate, bool]:
    """How fast experts of the pack are read in random order by the runtime's own reader; and whether past the cache."""
    slot_bytes = max(layer.slot_bytes for layer in manifest.layers)
    in_flight = max(2, min(_IN_FLIGHT, _IN_FLIGHT_BYTES // slot_bytes))
    everything = [
        (layer_idx, expert_idx)
        for layer_idx, layer in enumerate(manifest.layers)
        for expert_idx in range(layer.num_experts)
    ]
    random.Random(seed).shuffle(everything)
    disk = DirectDisk()
    with Slab(in_flight, slot_bytes) as slab, ExpertReader(manifest, folder, disk=disk, verify="off") as reader:
        for slot in range(in_flight):
            slab.tensor(slot).fill_(0)  # as in use: page faults are paid once in a run
        reads: deque[Read] = deque()
        num_bytes, begin_s = 0, time.perf_counter()
        for index, (layer_idx, expert_idx) in enumerate(everything):
            if index >= in_flight:
                reads.popleft().wait()
                if time.perf_counter() - begin_s > longest_s:
                    break
            memory = slab.memory(index % in_flight)[: manifest.layers[layer_idx].slot_bytes]
            reads.append(reader.submit(layer_idx, expert_idx, memory))
            num_bytes += len(memory)
        for read in reads:
            read.wait()
        elapsed_s = time.perf_counter() - begin_s
    return Rate(num_bytes, elapsed_s), disk.buffered_files == 0


def matrix_rate(rows: int, shape: tuple[int, int]) -> float:
    """Operations a second of ``F.linear`` in bf16 on a weight ``[N, K]`` and so many rows, the best of some."""
    weight = torch.randn(shape, dtype=torch.bfloat16)
    x = torch.randn((rows, shape[1]), dtype=torch.bfloat16)
    best_s, begin_s = float("inf"), time.perf_counter()
    with torch.inference_mode():
        torch.nn.functional.linear(x, weight)  # the first call sets things up
        while time.perf_counter() - begin_s < _MATRIX_S or best_s == float("inf"):
            start_s = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            best_s = min(best_s, time.perf_counter() - start_s)
    return 2 * rows * shape[0] * shape[1] / best_s
