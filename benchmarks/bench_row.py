"""One row of activations times packed weights that stay in a core's own cache: what the kernels by themselves take.

    python benchmarks/bench_row.py [--formats nf4,int4]

One thread, in ns for each 64 weights, and the packed bytes a second that follow: where that is more than a core gets
from memory, memory is what a product waits for. Times are the difference between a weight with three times the rows and
one, so that what a call costs by itself cancels.
"""

import argparse

import torch
from kernel_timing import FORMATS, SHAPES, machine, print_table, seconds_in_turns

from moe_offload.quant import get_format

_CACHED_BYTES = 192 << 10
_CALLS = 2000


def row_s(spec: str, num_cols: int) -> tuple[float, float]:
    """Seconds of the product with one row of a weight, and the bytes of that row."""
    fmt = get_format(spec)
    num_rows = _CACHED_BYTES * 8 // int(fmt.bits_per_weight() * num_cols) // 16 * 16
    x = torch.randn(1, num_cols).bfloat16()
    calls, sizes = [], []
    for times in (1, 3):
        shape = (times * num_rows, num_cols)
        packed = fmt.quantize(torch.randn(shape))
        calls.append([lambda packed=packed, shape=shape: fmt.linear(x, packed, shape)])
        sizes.append(packed.numel())
    once_s, thrice_s = seconds_in_turns(*calls, rounds=_CALLS)
    return (thrice_s - once_s) / (2 * num_rows), (sizes[1] - sizes[0]) / (2 * num_rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rows = []
    for _, num_cols in SHAPES:
        for spec in arguments.formats.split(","):
            spent_s, row_bytes = row_s(spec, num_cols)
            rate = f"{row_bytes / spent_s / 1e9:.1f}"
            rows.append((str(num_cols), spec, f"{spent_s * 64 / num_cols * 1e9:.2f}", rate))
    print_table(("columns", "format", "ns for 64 weights", "packed GB/s"), rows)


if __name__ == "__main__":
    main()
