"""The machine that a profile was made on: what it is, and how fast it reads."""

import os
import platform
from pathlib import Path
from typing import Any

from moe_offload.offload.bench.rates import expert_read_rate, kernel_read_rate
from moe_offload.offload.pack.manifest import PackManifest, is_pack
from moe_offload.offload.planning.memory import ram_memory
from moe_offload.offload.planning.rates import host_to_device_rate
from moe_offload.offload.profiling.run_facts import Rates


def machine_facts(device: str) -> dict[str, Any]:
    """As a trace's meta has them."""
    import torch

    from moe_offload.quant import backend_name

    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "kernels": backend_name(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "memory_bytes": ram_memory().total_bytes,
    }


def measured_rates(manifest: PackManifest, folder: Path, *, token_bytes: int, device: str) -> Rates:
    """Memory by the kernels' threads, the disk by the runtime's reader, PCIe: a few seconds, up to 400 MiB meanwhile.

    ``token_bytes``: what a token reads from memory.
    """
    disk, direct = expert_read_rate(manifest, folder, seed=0) if is_pack(folder) else (None, None)
    copy = host_to_device_rate() if device.startswith("cuda") else None
    return Rates(
        memory_bytes_per_s=kernel_read_rate(token_bytes).bytes_per_s,
        disk_bytes_per_s=None if disk is None else disk.bytes_per_s,
        pcie_bytes_per_s=None if copy is None else copy.bytes_per_s,
        direct=direct,
    )


def _cpu_name() -> str:
    """As Linux names it; elsewhere what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
