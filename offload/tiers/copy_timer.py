"""How fast copies to a CUDA device are, from some of them."""

import threading

import torch

# What starting a copy takes counts for little from this size on.
LEAST_BYTES = 256 * 1024
_NEWEST_SHARE = 0.2


class CopyTimer:
    """Times one copy on a stream at a time, by events that the device stamps; nothing waits for them."""

    def __init__(self) -> None:
        self.s_per_byte = 0.0
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._size_bytes = 0  # of the copy between the two; 0 before the first
        self._lock = threading.Lock()

    def begin(self, stream: torch.cuda.Stream, size_bytes: int) -> bool:
        """Before a copy is enqueued; `end` has to follow if this is true, and must not if it is false."""
        if size_bytes < LEAST_BYTES or not self._lock.acquire(blocking=False):
            return False
        if self._size_bytes and not self._end.query():  # type: ignore[no-untyped-call]
            self._lock.release()
            return False
        if self._size_bytes:
            s_per_byte = self._begin.elapsed_time(self._end) * 1e-3 / self._size_bytes
            share = _NEWEST_SHARE if self.s_per_byte else 1.0
            self.s_per_byte += share * (s_per_byte - self.s_per_byte)
        self._size_bytes = size_bytes
        self._begin.record(stream)
        return True

    def end(self, stream: torch.cuda.Stream) -> None:
        """Behind the copy."""
        self._end.record(stream)
        self._lock.release()
