"""A disk with faults: wraps a real one, is thread-safe, and does what it was told and nothing else."""

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from moe_offload.offload.streaming.disk import DirectDisk, Disk, DiskFile


class FaultyDisk:
    """Faults are set up by methods, may be combined, and hold for files opened before or after.

    ``log`` lists the reads that were asked for, as ``(file name, offset_bytes, size_bytes)``. ``before_read`` is called
    before each with the same three and may block (to hold a read back) or raise.
    """

    def __init__(self, disk: Disk | None = None, *, seed: int = 0) -> None:
        self.disk = disk or DirectDisk()
        self.before_read: Callable[[str, int, int], None] | None = None
        self.log: list[tuple[str, int, int]] = []
        self._lock = threading.Lock()
        self._random = random.Random(seed)
        self._max_delay_s = 0.0
        self._short_read_ratio = 0.0
        self._errors: list[list] = []  # [name, first, end, times, OSError number]
        self._flips: list[list] = []  # [name, offset, times]
        self._lengths: dict[str, int] = {}
        self._missing: set[str] = set()

    def delay_reads(self, max_s: float) -> None:
        """Every read takes up to ``max_s`` longer, at random: reads end in another order than they began."""
        self._max_delay_s = max_s

    def shorten_reads(self, ratio: float = 1.0) -> None:
        """That share of reads returns fewer bytes than asked, one at least."""
        self._short_read_ratio = ratio

    def fail_reads(
        self,
        name: str,
        *,
        offset_bytes: int = 0,
        size_bytes: int = 1 << 62,
        times: int = 1 << 62,
        number: int = errno.EIO,
    ) -> None:
        """Reads of ``name`` that touch the range raise OSError, the first ``times`` of them (all, by default)."""
        with self._lock:
            self._errors.append([name, offset_bytes, offset_bytes + size_bytes, times, number])

    def flip_byte(self, name: str, offset_bytes: int, *, times: int = 1 << 62) -> None:
        """Invert one byte of the file in the first ``times`` reads of it."""
        with self._lock:
            self._flips.append([name, offset_bytes, times])

    def truncate(self, name: str, size_bytes: int) -> None:
        """The file seems to end there."""
        self._lengths[name] = size_bytes

    def remove(self, name: str) -> None:
        """The file is not there for opening or reading."""
        self._missing.add(name)

    def heal(self) -> None:
        """No more faults."""
        with self._lock:
            self._max_delay_s = self._short_read_ratio = 0.0
            self.before_read = None
            for faults in (self._errors, self._flips, self._lengths, self._missing):
                faults.clear()

    def open(self, path: Path) -> DiskFile:
        self._raise_if_missing(path.name)
        return _FaultyFile(self, path.name, self.disk.open(path))

    def _raise_if_missing(self, name: str) -> None:
        if name in self._missing:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)

    def _read(self, name: str, file: DiskFile, into: memoryview, offset_bytes: int) -> int:
        before_read = self.before_read
        if before_read is not None:
            before_read(name, offset_bytes, len(into))
        with self._lock:
            self.log.append((name, offset_bytes, len(into)))
            delay_s = self._random.random() * self._max_delay_s
            size_bytes = len(into)
            if self._random.random() < self._short_read_ratio:
                size_bytes = self._random.randint(1, size_bytes)
            number = self._take_error(name, offset_bytes, offset_bytes + len(into))
        self._raise_if_missing(name)
        if delay_s:
            time.sleep(delay_s)
        if number is not None:
            raise OSError(number, os.strerror(number), name)
        if name in self._lengths:
            size_bytes = max(0, min(size_bytes, self._lengths[name] - offset_bytes))
        if not size_bytes:
            return 0
        count = file.pread_into(into[:size_bytes], offset_bytes)
        with self._lock:
            for flip in self._flips:
                if flip[0] == name and offset_bytes <= flip[1] < offset_bytes + count and flip[2] > 0:
                    flip[2] -= 1
                    into[flip[1] - offset_bytes] ^= 0xFF
        return count

    def _take_error(self, name: str, first: int, end: int) -> int | None:
        for error in self._errors:
            if error[0] == name and first < error[2] and error[1] < end and error[3] > 0:
                error[3] -= 1
                return error[4]
        return None


class _FaultyFile:
    def __init__(self, disk: FaultyDisk, name: str, file: DiskFile) -> None:
        self._disk = disk
        self._name = name
        self._file = file

    def pread_into(self, into: memoryview, offset_bytes: int) -> int:
        return self._disk._read(self._name, self._file, into, offset_bytes)

    def close(self) -> None:
        self._file.close()
