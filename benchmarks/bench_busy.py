"""Products of decode steps while other processes keep cores busy, beside F.linear in bf16 with torch's own threads.

    python benchmarks/bench_busy.py [--format nf4] [--busy 0,1,2] [--seconds 3]

A sequence of products with one row, of weights that caches do not hold, as a decode step goes through experts. Each
runs in a process of its own, with and without others that do nothing but count. A runtime whose threads spin at
barriers, or split the work evenly, waits for whichever thread lost its core; the fair share of n busy processes on c
cores leaves c / (c + n) of the speed at best, where one thread for each core takes part.
"""

import argparse
import subprocess
import sys
import time

import torch
from kernel_timing import copies, machine, print_table
from torch.nn import functional as F

from moe_offload.quant import get_format

_SHAPE = (2048, 2048)
_BYTES = 256 << 20
_BUSY = "while True: pass"


def rate(spec: str, budget_s: float, *, through_torch: bool) -> float:
    """Weights multiplied a second, over a stretch of ``budget_s``."""
    fmt = get_format(spec)
    slots = copies(fmt.quantize(torch.randn(_SHAPE)), _BYTES)
    x = torch.randn(1, _SHAPE[1]).to(torch.bfloat16)
    weights = [slot.view(torch.bfloat16).view(_SHAPE) for slot in slots] if through_torch else []

    def one_round() -> None:
        if through_torch:
            for weight in weights:
                F.linear(x, weight)
        else:
            for slot in slots:
                fmt.linear(x, slot, _SHAPE)

    one_round()
    num_rounds = 0
    start = time.perf_counter()
    while (spent_s := time.perf_counter() - start) < budget_s:
        one_round()
        num_rounds += 1
    return num_rounds * len(slots) * _SHAPE[0] * _SHAPE[1] / spent_s


def measured(case: str, num_busy: int, budget_s: float) -> float:
    """The rate of a case in a process of its own, beside ``num_busy`` that count."""
    busy = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(num_busy)]
    try:
        command = [sys.executable, __file__, "--case", case, "--seconds", str(budget_s)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--busy", default="0,1,2")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case is not None:
        spec, _, runtime = arguments.case.partition(" ")
        print(rate(spec, arguments.seconds, through_torch=runtime == "F.linear"))
        return
    print(machine())
    counts = [int(count) for count in arguments.busy.split(",")]
    rows = []
    for case in (arguments.format, "bf16", "bf16 F.linear"):
        rates = [measured(case, count, arguments.seconds) for count in counts]
        cells = [f"{value / 1e9:.2f} ({value / rates[0]:.0%})" for value in rates]
        rows.append((case, *cells))
    print_table(("product", *(f"{count} busy: 10^9 weights/s" for count in counts)), rows)


if __name__ == "__main__":
    main()
