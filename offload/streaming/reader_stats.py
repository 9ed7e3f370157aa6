"""What a reader has done, counted by several threads."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ReaderStats:
    """Totals. ``read_s`` is the time in which at least one chunk was being read: bytes over it are the disk's rate.

    ``bytes_cancelled`` are those of ``bytes_read`` that belong to reads given up halfway.
    """

    reads: int = 0
    bytes_read: int = 0
    bytes_cancelled: int = 0
    read_s: float = 0.0
    retries: int = 0
    verified: int = 0
    cancelled: int = 0
    failed: int = 0


class ReaderCounters:
    """The same, counting."""

    def __init__(self) -> None:
        """All zero."""
        self._lock = threading.Lock()
        self._totals: dict[str, Any] = asdict(ReaderStats())
        self._reading = 0
        self._since_s = 0.0

    def add(self, **counts: int) -> None:
        """Add to the fields named."""
        with self._lock:
            for name, count in counts.items():
                self._totals[name] += count

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Counts the time of the block, once however many threads are in one."""
        with self._lock:
            if not self._reading:
                self._since_s = time.perf_counter()
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1
                if not self._reading:
                    self._totals["read_s"] = self._read_s()

    def snapshot(self) -> ReaderStats:
        """Totals so far."""
        with self._lock:
            read_s = self._read_s() if self._reading else self._totals["read_s"]
            return ReaderStats(**(self._totals | {"read_s": read_s}))

    def _read_s(self) -> float:
        return float(self._totals["read_s"]) + time.perf_counter() - self._since_s
