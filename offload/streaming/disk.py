"""Reading files past the page cache, behind a protocol so that tests can put faults in between."""

import ctypes
import errno
import os
import threading
from pathlib import Path
from typing import Protocol

# Logical blocks of disks are 512 or 4096 bytes; what is aligned to the larger suits both.
DIRECT_ALIGNMENT_BYTES = 4096
_REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}
_O_DIRECT = getattr(os, "O_DIRECT", 0)


class DiskFile(Protocol):
    """An open file; any number of threads may read at once."""

    def pread_into(self, into: memoryview, offset_bytes: int) -> int:
        """Read up to ``len(into)`` bytes, 0 only at the file's end; raises OSError. Keeps no reference to ``into``."""

    def close(self) -> None:
        """Close it; nobody reads any more."""


class Disk(Protocol):
    """Opens files for reading."""

    def open(self, path: Path) -> DiskFile:
        """The file at ``path``; raises OSError."""


class DirectDisk:
    """Reads with O_DIRECT, and through the page cache, which it cleans behind itself, where that is refused.

    Direct reads need a buffer, offset and length that are multiples of 4096: slots of a `Slab` are. Refusals are
    remembered per open file. ``buffered_files`` counts the files that are or were read through the page cache.
    """

    def __init__(self, direct: bool = True) -> None:
        """``direct=False`` always reads through the page cache."""
        self.direct = direct
        self.buffered_files = 0

    def open(self, path: Path) -> DiskFile:
        """The file at ``path``."""
        if self.direct and _O_DIRECT:
            try:
                return DirectFile(self, path, os.open(path, os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT))
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        return DirectFile(self, path, None)


class DirectFile:
    """A file of a `DirectDisk`, open for direct reads, ordinary ones, or both."""

    def __init__(self, disk: DirectDisk, path: Path, direct_fd: int | None) -> None:
        """``direct_fd`` is open with O_DIRECT, or None where that is refused."""
        self._disk = disk
        self._path = path
        self._direct_fd = direct_fd
        self._refused = direct_fd is None
        self._lock = threading.Lock()
        self._buffered_fd: int | None = None
        if direct_fd is None:
            self._open_buffered()

    def pread_into(self, into: memoryview, offset_bytes: int) -> int:
        """One read; shorter than asked near the file's end, or where the system likes."""
        if not self._refused and self._direct_fd is not None and _is_aligned(into, offset_bytes):
            try:
                return os.preadv(self._direct_fd, [into], offset_bytes)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._refused = True  # some file systems refuse at the first read, not at opening
        fd = self._open_buffered()
        count = os.preadv(fd, [into], offset_bytes)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, offset_bytes, count, os.POSIX_FADV_DONTNEED)
        return count

    def _open_buffered(self) -> int:
        with self._lock:
            if self._buffered_fd is None:
                self._buffered_fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
                self._disk.buffered_files += 1
            return self._buffered_fd

    def close(self) -> None:
        """Close what is open."""
        for fd in (self._direct_fd, self._buffered_fd):
            if fd is not None:
                os.close(fd)


def _is_aligned(into: memoryview, offset_bytes: int) -> bool:
    address = ctypes.addressof(ctypes.c_char.from_buffer(into))
    return not (address | offset_bytes | len(into)) % DIRECT_ALIGNMENT_BYTES
