"""Control groups that hold a process to so much memory, page cache included, or a disk to a rate of reading; as root.

Version 1 has a hierarchy for each controller, version 2 one for all.
"""

import contextlib
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

# For how long a limited rate has to be measured: the kernel hands it out in slices of 0.1 s, each at once, so that what
# is read is up to a slice ahead.
SUSTAINED_S = 5.0


class NoLimitError(Exception):
    """Nothing can be limited here; the message says why."""


@dataclass(frozen=True)
class MemoryLimit:
    """So much memory, page cache included, and no swap; only counted, not limited, where ``limit_bytes`` is None."""

    limit_bytes: int | None
    what: ClassVar[str] = "memory"
    controllers: ClassVar[tuple[str, str]] = ("memory", "memory")  # as version 1 and 2 call it
    # Not version 1's limit of memory and swap: with it, the kernel no longer counts in memory.failcnt.
    first_version_file: ClassVar[str] = "memory.limit_in_bytes"

    def write(self, folder: Path, version: int) -> None:
        """Set it for the group in ``folder``."""
        if self.limit_bytes is None:
            return
        limit = self.first_version_file if version == 1 else "memory.max"
        _write(folder / limit, str(self.limit_bytes))
        swap = folder / ("memory.swappiness" if version == 1 else "memory.swap.max")
        if swap.exists():  # not where the kernel has no swap
            _write(swap, "0")


@dataclass(frozen=True)
class ReadLimit:
    """So many bytes a second from a whole disk, of which ``disk`` has the numbers: "254:0"."""

    disk: str
    bytes_per_s: int
    what: ClassVar[str] = "a disk's rate"
    controllers: ClassVar[tuple[str, str]] = ("blkio", "io")
    first_version_file: ClassVar[str] = "blkio.throttle.read_bps_device"

    def write(self, folder: Path, version: int) -> None:
        """Set it for the group in ``folder``."""
        if version == 1:
            _write(folder / self.first_version_file, f"{self.disk} {self.bytes_per_s}")
        else:
            _write(folder / "io.max", f"{self.disk} rbps={self.bytes_per_s}")


Limit = MemoryLimit | ReadLimit


@dataclass(frozen=True)
class ControlGroup:
    """One group: a folder for every kind of limit, all the same one in version 2.

    Processes enter it by the `launcher`, before they do anything else.
    """

    folders: dict[type[Limit], Path]

    @property
    def launcher(self) -> list[str]:
        """What a command is given to for running it in the group, in the same process."""
        if not self.folders:
            return []
        # A shell, since code of ours between fork and exec is not safe where this process has threads.
        files = [str(folder / "cgroup.procs") for folder in sorted(set(self.folders.values()))]
        script = " && ".join([*(f"echo $$ > {shlex.quote(file)}" for file in files), 'exec "$@"'])
        return ["/bin/sh", "-c", script, "sh"]

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that the group has held; None where that is not counted."""
        return self._memory_figure("memory.max_usage_in_bytes", "memory.peak")

    @property
    def num_reclaims(self) -> int | None:
        """How often the limit of memory was reached and some had to be taken back; None where that is not counted."""
        if (count := self._memory_figure("memory.failcnt")) is not None or MemoryLimit not in self.folders:
            return count
        lines = (self.folders[MemoryLimit] / "memory.events").read_text().splitlines()
        return int(dict(line.split() for line in lines).get("max", 0))

    def _memory_figure(self, *names: str) -> int | None:
        """Of the first of these files that there is."""
        paths = (self.folders[MemoryLimit] / name for name in names if MemoryLimit in self.folders)
        return next((int(path.read_text()) for path in paths if path.exists()), None)


def _hierarchy(limit: Limit, root: Path) -> tuple[Path, int]:
    """Where groups with such a limit are made, and the version."""
    mount = root / "sys/fs/cgroup"
    first, second = limit.controllers
    if (mount / first / limit.first_version_file).exists():
        return mount / first, 1
    controllers = mount / "cgroup.controllers"
    if controllers.exists() and second in controllers.read_text().split():
        return mount, 2
    name = first if first == second else f"{first} or {second}"
    raise NoLimitError(f"no {name} controller of control groups is mounted under /sys/fs/cgroup")


def check_limits(
    limits: Sequence[Limit], root: Path = Path("/"), is_root: Callable[[], bool] = lambda: os.geteuid() == 0
) -> None:
    """NoLimitError where such limits cannot be set; tried with a group that nothing enters."""
    for limit in limits:
        parent, _ = _hierarchy(limit, root)
        if not is_root():
            raise NoLimitError(f"limits of {limit.what} need a control group: run as root")
        if not os.access(parent, os.W_OK):
            raise NoLimitError(f"{parent} cannot be written")
    with control_group(limits, root):
        pass


@contextlib.contextmanager
def control_group(limits: Sequence[Limit], root: Path = Path("/")) -> Iterator[ControlGroup]:
    """A group that exists for the duration; without any limits it is nowhere, and its launcher is empty."""
    folders: dict[type[Limit], Path] = {}
    with contextlib.ExitStack() as stack:
        for limit in limits:
            parent, version = _hierarchy(limit, root)
            if version == 2:
                _delegate(parent, limit.controllers[1])
            folder = parent / f"moe-offload-bench-{os.getpid()}"
            if folder not in folders.values():
                folder.mkdir()
                stack.callback(_remove, folder)
            folders[type(limit)] = folder
            limit.write(folder, version)
        yield ControlGroup(folders)


def _delegate(parent: Path, controller: str) -> None:
    """Let groups below ``parent`` have the controller."""
    subtree = parent / "cgroup.subtree_control"
    if controller not in subtree.read_text().split():
        _write(subtree, f"+{controller}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise NoLimitError(f"{path} does not take {text!r}: {error.strerror}") from error


def _remove(folder: Path) -> None:
    """A group can only go when its last process is gone, which takes a moment after its death."""
    for _ in range(100):
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)
    folder.rmdir()
