"""Control groups that hold a process to so much memory, page cache included: version 1 or 2, as root."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path


class NoLimitError(Exception):
    """Memory cannot be limited here; the message says why."""


@dataclass(frozen=True)
class _Files:
    """What a version calls things; writing 0 to ``swap`` keeps a group from swapping."""

    parent: str
    limit: str
    swap: str
    peak: str


# Not version 1's limit of memory and swap: with it, the kernel no longer counts in memory.failcnt.
_V1 = _Files("memory", "memory.limit_in_bytes", "memory.swappiness", "memory.max_usage_in_bytes")
_V2 = _Files("", "memory.max", "memory.swap.max", "memory.peak")


@dataclass(frozen=True)
class MemoryGroup:
    """One group. Processes enter it by `enter`, before they do anything else."""

    folder: Path
    files: _Files

    def enter(self) -> None:
        """Move the calling process into the group."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int | None:
        """The most that the group has held; None where the kernel does not say."""
        peak = self.folder / self.files.peak
        return int(peak.read_text()) if peak.exists() else None

    @property
    def num_reclaims(self) -> int:
        """How often the limit was reached and memory had to be taken back."""
        if self.files is _V1:
            return int((self.folder / "memory.failcnt").read_text())
        events = dict(line.split() for line in (self.folder / "memory.events").read_text().splitlines())
        return int(events.get("max", 0))


def _version(root: Path) -> tuple[Path, _Files]:
    mount = root / "sys/fs/cgroup"
    if (mount / _V1.parent / _V1.limit).exists():
        return mount / _V1.parent, _V1
    controllers = mount / "cgroup.controllers"
    if controllers.exists() and "memory" in controllers.read_text().split():
        return mount, _V2
    raise NoLimitError("no memory controller of control groups is mounted under /sys/fs/cgroup")


def check_limits(root: Path = Path("/"), is_root: Callable[[], bool] = lambda: os.geteuid() == 0) -> None:
    """NoLimitError where memory cannot be limited."""
    parent, _ = _version(root)
    if not is_root():
        raise NoLimitError("memory limits need a control group: run as root")
    if not os.access(parent, os.W_OK):
        raise NoLimitError(f"{parent} cannot be written")


@contextlib.contextmanager
def memory_group(limit_bytes: int | None, root: Path = Path("/")) -> Iterator[MemoryGroup]:
    """A group that exists for the duration, without swap; no limit, but its figures, where ``limit_bytes`` is None."""
    parent, files = _version(root)
    if files is _V2:
        subtree = parent / "cgroup.subtree_control"
        if "memory" not in subtree.read_text().split():
            subtree.write_text("+memory")
    folder = parent / f"moe-offload-peers-{os.getpid()}"
    folder.mkdir()
    try:
        if limit_bytes is not None:
            (folder / files.limit).write_text(str(limit_bytes))
            swap = folder / files.swap
            if swap.exists():  # not where the kernel has no swap
                swap.write_text("0")
        yield MemoryGroup(folder, files)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    """A group can only go when its last process is gone, which takes a moment after its death."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()


def drop_page_cache(files: list[Path]) -> None:
    """Make the disk read again what the system has cached: of everything as root, else of these files."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        for path in files:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
