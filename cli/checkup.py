"""What ``moe-offload doctor`` finds: versions, memory, devices, kernels, and rates measured on the spot."""

import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from moe_offload._version import VERSION
from moe_offload.offload.home import home_dir
from moe_offload.offload.planning.sizes import format_size

_PACKAGES = ("torch", "transformers", "bitsandbytes")


def examine() -> dict[str, Any]:
    """Everything that is known, by name; rates are bytes a second. Takes a few seconds."""
    import torch

    from moe_offload.offload.planning.memory import ram_memory
    from moe_offload.offload.planning.rates import disk_read_rate, host_to_device_rate, memory_read_rate
    from moe_offload.quant import backend_name

    home = home_dir()
    home.mkdir(parents=True, exist_ok=True)
    ram, disk, copy = ram_memory(), disk_read_rate(home), host_to_device_rate()
    return {
        "versions": {"moe-offload": VERSION, "python": platform.python_version()} | _installed(),
        "cpu": {"cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()},
        "ram": {
            "total_bytes": ram.total_bytes,
            "free_bytes": ram.free_bytes,
            "read_bytes_per_s": memory_read_rate().bytes_per_s,
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "host_to_device_bytes_per_s": copy.bytes_per_s if copy is not None else None,
        "disk": {
            "folder": str(home),
            "free_bytes": shutil.disk_usage(home).free,
            "read_bytes_per_s": disk.bytes_per_s,
            "read_bytes": disk.read_bytes,
            "direct": disk.direct,
        },
        "kernels": backend_name(),
    }


def sentences(checkup: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The same for people: labels and what is to be said."""
    cpu, ram, disk = checkup["cpu"], checkup["ram"], checkup["disk"]
    rows = [
        ("versions", ", ".join(f"{name} {number or 'missing'}" for name, number in checkup["versions"].items())),
        ("cpu", f"{cpu['cores']} cores, {cpu['threads']} threads compute"),
        (
            "ram",
            f"{format_size(ram['free_bytes'])} free of {format_size(ram['total_bytes'])}, "
            f"read at {_rate(ram['read_bytes_per_s'])}",
        ),
    ]
    rows += [
        (
            "gpu",
            f"{gpu['name']}: {format_size(gpu['free_bytes'])} free of {format_size(gpu['total_bytes'])}, "
            f"kernels: {gpu['kernels']}",
        )
        for gpu in checkup["gpus"]
    ]
    if checkup["host_to_device_bytes_per_s"] is not None:
        rows.append(("copy", f"RAM to GPU at {_rate(checkup['host_to_device_bytes_per_s'])}"))
    if not checkup["gpus"]:
        rows.append(("gpu", "none that torch can use; models run on the CPU"))
    rows += [
        (
            "disk",
            f"{disk['folder']}: {format_size(disk['free_bytes'])} free, "
            f"read at {_rate(disk['read_bytes_per_s'])} in pieces of {format_size(disk['read_bytes'])}",
        ),
        (
            "O_DIRECT",
            "works: experts are read past the page cache"
            if disk["direct"]
            else "refused by this file system: experts are read through the page cache, and the rate above may be "
            "that of memory; set MOE_OFFLOAD_HOME to a folder on another disk",
        ),
        ("kernels", checkup["kernels"]),
    ]
    return rows


def _installed() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _gpu(index: int) -> dict[str, Any]:
    import torch

    from moe_offload.offload.planning.memory import vram_memory
    from moe_offload.quant.slot_kernels.choice import device_kernels

    memory = vram_memory(index)
    assert memory is not None
    return {
        "name": torch.cuda.get_device_name(index),
        "total_bytes": memory.total_bytes,
        "free_bytes": memory.free_bytes,
        "kernels": device_kernels(torch.device("cuda", index)),
    }


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"
