"""Slots in one piece of page-aligned memory, which costs nothing until it is touched."""

import contextlib
import mmap
from types import TracebackType
from typing import Protocol

import psutil
import torch

from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.planning.sizes import format_size

# Page-locked at once: where a system's limit is met in the middle of a slab, most of the slab is within it.
_LOCKED_AT_ONCE_BYTES = 256 * 1024**2


class PageLock(Protocol):
    """What keeps memory where it is, so that a device can fetch from it by itself."""

    def lock(self, address: int, size_bytes: int) -> str | None:
        """Page-lock memory; None, or why it was refused."""

    def unlock(self, address: int) -> None:
        """Undo it, by the address that was locked."""


class Slab:
    """``num_slots`` slots of ``slot_bytes`` in anonymous memory; untouched pages cost no memory unless pinned.

    Ownership: views from `memory` and `tensor` keep the memory alive, also after `close`, which only gives up the
    slab's own hold on it (and its pinning): it never pulls memory from under a view, and the memory returns to the
    system with the last of them. Copies to or from a device must have ended before `close`.

    The first ``num_pinned_slots`` are page-locked; where it was asked for and fewer than all are, ``pin_failure`` says
    why. Page-locked memory is not there in a forked child, which would crash if it touched it.
    """

    def __init__(self, num_slots: int, slot_bytes: int, *, page_lock: PageLock | None = None) -> None:
        """Reserve the memory, page-locked as far as ``page_lock`` can; raises BudgetError when the system refuses."""
        if num_slots < 1 or slot_bytes < 1 or slot_bytes % mmap.PAGESIZE:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes: at least one, of whole pages, is needed")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.size_bytes = num_slots * slot_bytes
        self.pin_failure: str | None = None
        try:
            # Private: shared anonymous memory, the default of mmap, counts as shmem and gets no huge pages.
            memory = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            free_bytes = psutil.virtual_memory().available
            raise BudgetError(
                f"the system refuses {format_size(self.size_bytes)} for {num_slots} expert slots "
                f"({error.strerror}; {format_size(free_bytes)} free); lower --ram or raise the process's memory limit",
                needed_bytes=self.size_bytes,
                budget_bytes=free_bytes,
            ) from error
        # Direct reads into huge pages are two to three times as fast (benchmarks/bench_read.py);
        # a touched slot costs at most the rest of the huge pages at its two ends.
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._memory: memoryview | None = memoryview(memory)
        self._tensor: torch.Tensor | None = torch.frombuffer(memory, dtype=torch.uint8)
        self._page_lock = page_lock
        self._locked: list[tuple[int, int]] = []  # address and slots of each piece
        if page_lock is not None:
            # A fork makes pages copy-on-write: the next write, by the disk or here, would go to a page of its own while
            # the device goes on reading the old one. (Kernels since 5.12 copy locked pages at once, at a cost.)
            if hasattr(mmap, "MADV_DONTFORK"):
                memory.madvise(mmap.MADV_DONTFORK)
            self._pin(page_lock)

    def _pin(self, page_lock: PageLock) -> None:
        """Lock piece by piece, until one is refused. No slot is in two: a copy may not cross from one to the next."""
        at_once = max(1, _LOCKED_AT_ONCE_BYTES // self.slot_bytes)
        for first in range(0, self.num_slots, at_once):
            slots = min(at_once, self.num_slots - first)
            address = self._address() + first * self.slot_bytes
            self.pin_failure = page_lock.lock(address, slots * self.slot_bytes)
            if self.pin_failure is not None:
                return
            self._locked.append((address, slots))

    @property
    def num_pinned_slots(self) -> int:
        """How many slots, from the first on, are page-locked."""
        return sum(slots for _, slots in self._locked)

    def _address(self) -> int:
        assert self._tensor is not None
        return self._tensor.data_ptr()

    def memory(self, slot: int) -> memoryview:
        """The slot's bytes, writable, starting at a page."""
        start = self._start(slot)
        assert self._memory is not None
        return self._memory[start : start + self.slot_bytes]

    def tensor(self, slot: int) -> torch.Tensor:
        """The same bytes as a ``uint8 [slot_bytes]`` tensor."""
        start = self._start(slot)
        assert self._tensor is not None
        return self._tensor[start : start + self.slot_bytes]

    def _start(self, slot: int) -> int:
        if self._memory is None:
            raise ConfigError("the memory of the experts was freed: the model is closed; load it again")
        if not 0 <= slot < self.num_slots:
            raise IndexError(f"slot {slot} of {self.num_slots}")
        return slot * self.slot_bytes

    def forget(self, slot: int) -> None:
        """Give a pageable slot's memory back to the system: its bytes are zero, and it costs nothing until touched."""
        start = self._start(slot)
        assert self._memory is not None
        if hasattr(mmap, "MADV_DONTNEED") and isinstance(memory := self._memory.obj, mmap.mmap):
            memory.madvise(mmap.MADV_DONTNEED, start, self.slot_bytes)

    def close(self) -> None:
        """Unpin the memory and let go of it; see the class for views that still exist. May be called twice."""
        if self._page_lock is not None:
            while self._locked:
                self._page_lock.unlock(self._locked.pop()[0])
        self._memory = self._tensor = None

    def __enter__(self) -> "Slab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
