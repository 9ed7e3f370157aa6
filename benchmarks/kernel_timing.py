"""What the kernel benchmarks share: the machine in one line, timing, and a table."""

import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moe_offload.quant import backend_name, kernels

SHAPES = ((14336, 4096), (2048, 768))
PIECE_BYTES = 8 << 20
FORMATS = ("nf4", "int4", "mxfp4", "nf3", "int8", "fp8", "bf16")


def machine() -> str:
    """Processor, threads and what computes."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    processor = names[0] if names else platform.processor()
    return (
        f"{processor}, {torch.get_num_threads()} threads, {backend_name()}, torch {torch.__version__}, "
        f"`python {' '.join(sys.argv)}`"
    )


def seconds(calls: Sequence[Callable[[], object]], *, rounds: int = 3) -> float:
    """The time that one call in ten stays below, each timed by itself, after a round to warm up.

    Low and not the median, since what else runs on the machine can only add to a time; not the least, which is luck.
    """
    return seconds_in_turns(calls, rounds=rounds)[0]


def seconds_in_turns(*series: Sequence[Callable[[], object]], rounds: int = 3) -> list[float]:
    """The same of several series of calls, a call of each in its turn: what changes meanwhile changes all alike."""
    times: list[list[float]] = [[] for _ in series]
    turns = rounds * max(len(calls) for calls in series)
    for calls in series:
        for call in calls:
            call()
    for turn in range(turns):
        for calls, of_series in zip(series, times, strict=True):
            call = calls[turn % len(calls)]
            start = time.perf_counter()
            call()
            of_series.append(time.perf_counter() - start)
    return [sorted(of_series)[turns // 10] for of_series in times]


def copies(packed: torch.Tensor, at_least_bytes: int = 512 << 20) -> torch.Tensor:
    """The same weight many times [n, nbytes]: more than any cache holds, as experts are."""
    return packed.expand(max(2, at_least_bytes // max(1, packed.numel())), -1).contiguous()


def readings(slots: torch.Tensor) -> list[Callable[[], object]]:
    """Plain reading on all threads of more than caches hold, PIECE_BYTES a call."""
    flat = slots.view(-1)
    pieces = flat[: flat.numel() // PIECE_BYTES * PIECE_BYTES].view(-1, PIECE_BYTES)

    def reading(piece: torch.Tensor) -> Callable[[], object]:
        if kernels.usable(piece):
            return lambda: kernels.read_all(piece)
        return lambda: piece.view(torch.int64).sum()

    return [reading(piece) for piece in pieces]


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """GitHub markdown, aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    for row in (header, ["-" * width for width in widths], *rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
