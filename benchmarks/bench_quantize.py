"""How fast weights are packed and unpacked, beside bitsandbytes' quantize_4bit on the same machine.

python benchmarks/bench_quantize.py [--formats nf4,int4]
"""

import argparse

import bitsandbytes.functional as bnb
import torch
from kernel_timing import FORMATS, SHAPES, machine, print_table, seconds
from torch import Tensor

from moe_offload.quant import get_format


def format_row(spec: str, weight: Tensor, half: Tensor) -> tuple[str, ...]:
    """Weights a second into and out of one format."""
    fmt, shape = get_format(spec), (weight.shape[0], weight.shape[1])
    packed = fmt.quantize(half)
    into = [weight.numel() / seconds([lambda source=source: fmt.quantize(source)] * 7) for source in (weight, half)]
    out = weight.numel() / seconds([lambda: fmt.dequantize(packed, shape, torch.bfloat16)] * 7)
    unpacked = "a view" if fmt.is_raw else f"{out / 1e6:.0f} ({2 * out / 1e9:.1f} GB/s)"
    return f"{shape[0]} x {shape[1]}", spec, f"{into[0] / 1e6:.0f}", f"{into[1] / 1e6:.0f}", unpacked


def bnb_row(half: Tensor) -> tuple[str, ...]:
    """bitsandbytes, for comparison."""
    rate = half.numel() / seconds([lambda: bnb.quantize_4bit(half, blocksize=64, quant_type="nf4")], rounds=2)
    return f"{half.shape[0]} x {half.shape[1]}", "bitsandbytes nf4", "-", f"{rate / 1e6:.0f}", "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    arguments = parser.parse_args()
    print(machine())
    rows = []
    for shape in SHAPES:
        weight = torch.randn(shape)
        half = weight.to(torch.bfloat16)
        rows += [format_row(spec, weight, half) for spec in arguments.formats.split(",")]
        rows.append(bnb_row(half))
    print_table(("weight", "format", "M/s from fp32", "M/s from bf16", "M/s to bf16"), rows)


if __name__ == "__main__":
    main()
