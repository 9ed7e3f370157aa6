"""How much memory there is, how much of it is free, and how much this process holds."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_offload.errors import ConfigError
from moe_offload.offload.planning.sizes import parse_size

_GIB = 1024**3
_MIB = 1024**2
# What "auto" leaves alone. RAM: room for other programs to grow and for the page cache. VRAM: a desktop's compositor,
# and what the allocator loses to fragmentation.
_RAM_MARGIN_BYTES, _RAM_MARGIN_SHARE = 1 * _GIB, 0.10
_VRAM_MARGIN_BYTES, _VRAM_MARGIN_SHARE = 512 * _MIB, 0.06


@dataclass(frozen=True)
class Memory:
    """One kind of memory: all of it, and what nobody uses now."""

    total_bytes: int
    free_bytes: int


def ram_memory(root: Path = Path("/")) -> Memory:
    """RAM that this process may use: the machine's, or less where a control group limits it (``root`` is for tests)."""
    machine = psutil.virtual_memory()
    total_bytes, free_bytes = int(machine.total), int(machine.available)
    for limit_bytes, used_bytes in _cgroup_limits(root):
        total_bytes = min(total_bytes, limit_bytes)
        free_bytes = min(free_bytes, max(0, limit_bytes - used_bytes))
    return Memory(total_bytes, min(free_bytes, total_bytes))


def vram_memory(device_index: int = 0) -> Memory | None:
    """Memory of a CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    free_bytes, total_bytes = torch.cuda.mem_get_info(device_index)
    return Memory(int(total_bytes), int(free_bytes))


def ram_budget_bytes(size: str | int, memory: Memory) -> int:
    """Bytes of RAM that ``size`` asks for, never more than there are; "auto" is what is free, less a margin."""
    return _budget_bytes(size, memory, _RAM_MARGIN_BYTES, _RAM_MARGIN_SHARE)


def vram_budget_bytes(size: str | int, memory: Memory) -> int:
    """The same of a device's memory."""
    return _budget_bytes(size, memory, _VRAM_MARGIN_BYTES, _VRAM_MARGIN_SHARE)


def vram_budgets_bytes(sizes: Mapping[int, str | int]) -> dict[int, int]:
    """The same by device; ConfigError for one that is not there."""
    import torch

    budgets = {}
    for index, size in sizes.items():
        memory = vram_memory(index) if index < torch.cuda.device_count() else None
        if memory is None:
            raise ConfigError(f"there is no GPU {index} here, but {torch.cuda.device_count()}, counted from 0")
        budgets[index] = vram_budget_bytes(size, memory)
    return budgets


def rss_bytes() -> int:
    """Memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_rss_bytes() -> int | None:
    """Most memory that this process has held since its start or ``reset_peak_rss``; None where Linux does not say."""
    for line in _lines(Path("/proc/self/status")):
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def reset_peak_rss() -> bool:
    """Start the peak afresh from what is held now; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _budget_bytes(size: str | int, memory: Memory, margin_bytes: int, margin_share: float) -> int:
    margin_bytes = max(margin_bytes, int(margin_share * memory.free_bytes))
    budget_bytes = parse_size(
        size, total_bytes=memory.total_bytes, free_bytes=memory.free_bytes, margin_bytes=margin_bytes
    )
    return min(budget_bytes, memory.total_bytes)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used) of every limited control group that this process is in, its ancestors included."""
    mount = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, names = mount, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        limit_name, used_name, cache_name = names
        # In a container the path may be the host's, of which only the root is mounted: absent folders are passed over.
        group = folder / path.strip().lstrip("/")
        for ancestor in (group, *group.parents):
            limit_bytes, used_bytes = _number(ancestor / limit_name), _number(ancestor / used_name)
            if limit_bytes is not None and used_bytes is not None:
                yield limit_bytes, used_bytes - _page_cache_bytes(ancestor / "memory.stat", cache_name)
            if ancestor == folder:
                break


def _page_cache_bytes(stat: Path, name: str) -> int:
    """File pages that the kernel drops before it kills anybody: counted as used by a group, yet free to take."""
    for line in _lines(stat):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or for "max", which is no limit."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
