"""Rates measured in a second or two: memory, disk, and the link to the device, in bytes a second."""

import errno
import itertools
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_MEMORY_BYTES = 512 * 1024**2
_COPY_BYTES = 256 * 1024**2
_FILE_BYTES = 256 * 1024**2
_BLOCK_BYTES = 4096
_NUM_THREADS = 4  # as many as read experts
_LONGEST_S = 0.9


@dataclass(frozen=True)
class Rate:
    """Bytes moved and the time that it took."""

    num_bytes: int
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        """The rate; 0 where nothing was moved."""
        return self.num_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def gb_per_s(self) -> float:
        """The rate in units of 10^9 bytes a second."""
        return self.bytes_per_s / 1e9


@dataclass(frozen=True)
class DiskRate(Rate):
    """A rate of reading; ``direct`` says whether it bypassed the page cache, without which it may be memory's rate."""

    read_bytes: int
    direct: bool


def memory_read_rate(num_bytes: int = _MEMORY_BYTES) -> Rate:
    """How fast all of torch's threads together read a buffer larger than the caches, the better of two passes."""
    import torch

    numbers = torch.ones(max(1, num_bytes // 8), dtype=torch.int64)
    # A sum of integers this wide costs less than fetching them.
    return min((_timed_sum(numbers) for _ in range(2)), key=lambda rate: rate.elapsed_s)


def disk_read_rate(path: Path, read_bytes: int = 4 * 1024**2, file_bytes: int = _FILE_BYTES) -> DiskRate:
    """How fast a few threads together read pieces of ``read_bytes`` from a file, or from a new one in a folder.

    Bounded to about a second of reading, and one of writing. The new file is removed, whatever happens.
    """
    read_bytes = max(_BLOCK_BYTES, read_bytes // _BLOCK_BYTES * _BLOCK_BYTES)
    if path.is_dir():
        descriptor, name = tempfile.mkstemp(dir=path, prefix=".moe-offload-rate-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                # Random, so that a compressing file system has to read it all.
                block = os.urandom(4 * 1024**2)
                start_s = time.perf_counter()
                while file.tell() < file_bytes and time.perf_counter() - start_s < _LONGEST_S:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            return _read_rate(Path(name), read_bytes)
        finally:
            os.unlink(name)
    return _read_rate(path, read_bytes)


def host_to_device_rate(num_bytes: int = _COPY_BYTES) -> Rate | None:
    """How fast pinned memory is copied to the CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    source = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream()
    target.copy_(source, non_blocking=True)  # the first copy sets things up
    stream.synchronize()
    start_s = time.perf_counter()
    target.copy_(source, non_blocking=True)
    stream.synchronize()
    return Rate(num_bytes, time.perf_counter() - start_s)


def _timed_sum(numbers: "torch.Tensor") -> Rate:
    start_s = time.perf_counter()
    numbers.sum().item()
    return Rate(numbers.numel() * numbers.element_size(), time.perf_counter() - start_s)


def _read_rate(path: Path, read_bytes: int) -> DiskRate:
    from moe_offload.offload.streaming.slab import Slab

    descriptor, direct = _open_direct(path)
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        reads = itertools.count()
        # Memory like that of expert slots: on huge pages, direct reads into it are up to three times as fast.
        slab = Slab(_NUM_THREADS, read_bytes)
        for slot in range(_NUM_THREADS):
            slab.tensor(slot).fill_(1)  # touched, so that no page is made while the clock runs
        start_s = time.perf_counter()

        def read(slot: int) -> int:
            memory = slab.memory(slot)
            num_bytes = 0
            while time.perf_counter() - start_s < _LONGEST_S:
                num_read = os.preadv(descriptor, [memory], next(reads) * read_bytes)
                num_bytes += num_read
                if num_read < read_bytes:  # the end of the file
                    break
            return num_bytes

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            num_bytes = sum(pool.map(read, range(_NUM_THREADS)))
        return DiskRate(num_bytes, time.perf_counter() - start_s, read_bytes, direct)
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor past the page cache where the file system allows it, and whether it does."""
    if hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECT), True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
    return os.open(path, os.O_RDONLY), False
