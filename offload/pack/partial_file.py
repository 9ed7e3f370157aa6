"""Files that appear whole or not at all: written under another name, synced, then renamed."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from moe_offload.errors import ConfigError, DiskFullError
from moe_offload.offload.planning.sizes import format_size

PARTIAL_SUFFIX = ".partial"
# Written pages are handed to the disk in steps of this size, so that the sync at the end has little left to wait for.
WRITEBACK_BYTES = 32 << 20
_FULL = {errno.ENOSPC, errno.EDQUOT}


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a crash."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes | memoryview) -> None:
    """Write every byte, however little the system takes at a time."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


@contextmanager
def typed_write_errors(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turn "no space" into DiskFullError, any other failure to write into ConfigError.

    ``needed_bytes`` is what ``path`` takes when it is whole.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise ConfigError(f"cannot write {path}: {error.strerror}; choose another folder") from error
        space = os.statvfs(path.parent)
        why = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        raise DiskFullError(
            f"{why}: {path.name} needs {format_size(needed_bytes)}, {path.parent} has "
            f"{format_size(space.f_bavail * space.f_frsize)} free; make room and run the same command again, "
            "it goes on after the last finished file"
        ) from error


class PartialFile:
    """A file under ``path`` with a suffix, until `commit`; leaving the context without it removes the file.

    Failures to write raise DiskFullError or ConfigError.
    """

    def __init__(self, path: Path, total_bytes: int = 0, suffix: str = PARTIAL_SUFFIX) -> None:
        """Create the file, which will have ``total_bytes`` as far as is known (for messages only)."""
        self.path = path
        self.size_bytes = 0
        self._total_bytes = total_bytes
        self._partial = path.with_name(path.name + suffix)
        self._flushed_bytes = 0
        with typed_write_errors(path, total_bytes):
            self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        end_bytes = self.size_bytes + len(data)
        with typed_write_errors(self.path, max(end_bytes, self._total_bytes)):
            write_all(self._fd, data)
            self.size_bytes = end_bytes
            if self.size_bytes - self._flushed_bytes >= WRITEBACK_BYTES:
                self._start_writeback()

    def write_at_start(self, data: bytes) -> None:
        """Replace the first bytes."""
        with typed_write_errors(self.path, self.size_bytes):
            os.lseek(self._fd, 0, os.SEEK_SET)
            write_all(self._fd, data)
            os.lseek(self._fd, 0, os.SEEK_END)

    def read_at(self, offset_bytes: int, size_bytes: int) -> bytes:
        """Bytes already written."""
        return os.pread(self._fd, size_bytes, offset_bytes)

    def commit(self) -> None:
        """Sync the file, give it its name, sync the name."""
        with typed_write_errors(self.path, self.size_bytes):
            os.fsync(self._fd)
            # The pages would push more useful ones out of the page cache.
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(self._partial, self.path)
            sync_folder(self.path.parent)

    def _start_writeback(self) -> None:
        # On Linux this starts writing dirty pages without waiting, and drops the clean ones.
        length_bytes = self.size_bytes - self._flushed_bytes
        os.posix_fadvise(self._fd, self._flushed_bytes, length_bytes, os.POSIX_FADV_DONTNEED)
        self._flushed_bytes = self.size_bytes

    def __enter__(self) -> "PartialFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._partial.unlink(missing_ok=True)  # gone already where it was committed
