"""Copies to devices, as the links' meters tell of them."""

import threading
from dataclasses import dataclass

from moe_offload.cache import CopyKind


@dataclass(frozen=True)
class CopyNote:
    """One copy, or one piece of it: when it was enqueued (``perf_counter_ns``), and how long the link took for it."""

    device: int
    begin_ns: int
    num_bytes: int
    kind: CopyKind
    took_ns: int


class CopyLog:
    """Is told of every copy (`CopyObserver`), by any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._copies: list[CopyNote] = []

    def copied(self, device: int, begin_ns: int, num_bytes: int, is_ahead: bool, took_ns: int) -> None:
        """See `CopyObserver`."""
        note = CopyNote(device, begin_ns, num_bytes, CopyKind.AHEAD if is_ahead else CopyKind.DEMAND, took_ns)
        with self._lock:
            self._copies.append(note)

    def take(self) -> list[CopyNote]:
        """Those that were told of since the last call."""
        with self._lock:
            copies, self._copies = self._copies, []
            return copies
