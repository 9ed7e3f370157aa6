"""The files of a pack that are open: opened when first read, a limited number kept."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_offload.offload.streaming.disk import Disk, DiskFile


@dataclass
class _Entry:
    file: DiskFile
    users: int = 0


class OpenFiles:
    """Lends open files to threads; past ``max_open`` it closes the one unused longest."""

    def __init__(self, disk: Disk, folder: Path, max_open: int = 128) -> None:
        """Opens nothing yet. More than ``max_open`` are open only while that many are in use."""
        self._disk = disk
        self._folder = folder
        self._max_open = max_open
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    @contextmanager
    def borrow(self, name: str) -> Iterator[DiskFile]:
        """The open file, which stays open for the block; raises OSError."""
        entry = self._known(name)
        if entry is None:
            # Outside the lock: a disk that does not answer stops this thread, not the others.
            file = self._disk.open(self._folder / name)
            entry = self._known(name, file)
            assert entry is not None
            if entry.file is not file:  # another thread was faster
                file.close()
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.users -= 1
                self._close_surplus()

    def _known(self, name: str, new: DiskFile | None = None) -> _Entry | None:
        """The entry of ``name`` with one user more; where there is none, one is made of ``new``."""
        with self._lock:
            entry = self._entries.get(name)
            if entry is None:
                if new is None:
                    return None
                entry = self._entries[name] = _Entry(new)
            entry.users += 1
            self._entries.move_to_end(name)
            return entry

    def _close_surplus(self) -> None:
        surplus = len(self._entries) - self._max_open
        if surplus > 0:
            for name in [name for name, entry in self._entries.items() if not entry.users][:surplus]:
                self._entries.pop(name).file.close()

    def close(self) -> None:
        """Close all that nobody is using; a thread that still reads keeps its file."""
        with self._lock:
            self._max_open = 0
            self._close_surplus()
