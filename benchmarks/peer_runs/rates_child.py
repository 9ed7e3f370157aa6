"""Measures the machine's rates in a process of its own, so that a control group's limits hold for them too.

Takes one JSON object of settings, prints one of figures: the fields of `MachineRates`.
"""

import dataclasses
import json
import sys
from pathlib import Path

# isort: off
import moe_offload  # noqa: F401  before torch, as the command line has it

# isort: on
import torch

from moe_offload.offload.bench.rates import expert_read_rate, kernel_read_rate, matrix_rate
from moe_offload.offload.bench.report import MachineRates
from moe_offload.offload.pack.manifest import read_manifest


def main() -> None:
    """Of the disk, experts of a pack by the project's reader; of the memory, by its kernels; of matrix products."""
    settings = json.loads(sys.argv[1])
    torch.set_num_threads(settings["threads"])
    pack = Path(settings["pack"])
    disk, direct = expert_read_rate(read_manifest(pack), pack, seed=0, longest_s=settings["disk_s"])
    memory = kernel_read_rate(settings["token_bytes"])
    matrix = None
    if settings["prefill_tokens"]:
        matrix = matrix_rate(settings["prefill_tokens"], tuple(settings["matrix_shape"]))
    print(json.dumps(dataclasses.asdict(MachineRates(memory.bytes_per_s, disk.bytes_per_s, direct, matrix))))


if __name__ == "__main__":
    main()
