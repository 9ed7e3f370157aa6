"""Products with packed weights, beside the bandwidth of plain reading measured in the same run.

    python benchmarks/bench_linear.py [--formats nf4,int4] [--tokens 1,4,64]

Weights are cycled through more copies than caches hold, and products take turns with plain reads. A product with few
rows is judged by the packed bytes it reads a second; one with many rows by F.linear in bf16 on the dequantised weight.
The time of a small product is a call's as much as the kernel's; bench_layer.py measures the one call that a decode step
makes for all its experts, and bench_row.py the kernels by themselves.
"""

import argparse
from collections.abc import Callable

import torch
from kernel_timing import (
    FORMATS,
    PIECE_BYTES,
    SHAPES,
    copies,
    machine,
    print_table,
    readings,
    seconds,
    seconds_in_turns,
)
from torch import Tensor
from torch.nn import functional as F

from moe_offload.quant import Format, get_format

_COLD_BYTES = 256 << 20


def gone_through(slots: Tensor, num_tokens: int) -> Tensor:
    """Copies enough to come from memory; few where arithmetic takes the time."""
    return slots[:8] if num_tokens > 16 else slots[: max(64, _COLD_BYTES // slots.shape[1])]


def torch_s(x: Tensor, slots: Tensor, shape: tuple[int, int]) -> float:
    """Seconds of one F.linear in bf16."""
    weights = [slot.view(torch.bfloat16).view(shape) for slot in slots]
    return seconds([lambda weight=weight: F.linear(x, weight) for weight in weights])


def products(x: Tensor, slots: Tensor, shape: tuple[int, int], fmt: Format) -> list[Callable[[], object]]:
    """One product with each packed weight."""
    return [lambda slot=slot: fmt.linear(x, slot, shape) for slot in slots]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,4,16,64,256")
    arguments = parser.parse_args()
    tokens = [int(count) for count in arguments.tokens.split(",")]
    print(machine())
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape)
        inputs = {count: torch.randn(count, shape[1]).to(torch.bfloat16) for count in tokens}
        plain = copies(get_format("bf16").quantize(weight))
        baseline_s = {count: torch_s(inputs[count], gone_through(plain, count), shape) for count in tokens}
        del plain
        for spec in arguments.formats.split(","):
            fmt = get_format(spec)
            slots = copies(fmt.quantize(weight))
            for count in tokens:
                calls = products(inputs[count], gone_through(slots, count), shape, fmt)
                spent_s, read_s = seconds_in_turns(calls, readings(slots))
                read = PIECE_BYTES / read_s
                rate = slots.shape[1] / spent_s
                cells = (f"{spent_s * 1e3:.3f}", f"{rate / 1e9:.1f}", f"{rate / read:.0%}", f"{read / 1e9:.1f}")
                relative = f"{baseline_s[count] / spent_s:.2f}"
                rows.append((f"{shape[0]} x {shape[1]}", spec, str(count), *cells, relative))
    print_table(
        ("weight", "format", "rows", "ms", "packed GB/s", "of plain read", "plain read GB/s", "x F.linear bf16"), rows
    )


if __name__ == "__main__":
    main()
