"""Slots in one piece of page-aligned memory, which costs nothing until it is touched."""

import contextlib
import mmap
from types import TracebackType
from typing import Protocol

import psutil
import torch

from moe_offload.errors import BudgetError, ConfigError
from moe_offload.offload.planning.sizes import format_size


class CudaHost(Protocol):
    """The part of the CUDA runtime that page-locks memory; ``torch.cuda.cudart()`` has it. Zero is success."""

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        """Page-lock memory."""

    def cudaHostUnregister(self, address: int) -> int:
        """Undo it."""


class Slab:
    """``num_slots`` slots of ``slot_bytes`` in anonymous memory; untouched pages cost no memory unless pinned.

    Ownership: views from `memory` and `tensor` keep the memory alive, also after `close`, which only gives up the
    slab's own hold on it (and its pinning): it never pulls memory from under a view, and the memory returns to the
    system with the last of them. Copies to or from a device must have ended before `close`.

    ``pinned`` says whether the memory is page-locked; where it was asked for and is not, ``pin_failure`` says why.
    """

    def __init__(
        self, num_slots: int, slot_bytes: int, pin: bool = False, *, cuda_host: CudaHost | None = None
    ) -> None:
        """Reserve the memory; raises BudgetError when the system refuses. ``cuda_host``: by default torch's."""
        if num_slots < 1 or slot_bytes < 1 or slot_bytes % mmap.PAGESIZE:
            raise ValueError(f"{num_slots} slots of {slot_bytes} bytes: at least one, of whole pages, is needed")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self.size_bytes = num_slots * slot_bytes
        self.pinned = False
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
        self._cuda_host: CudaHost | None = None
        if pin:
            self._pin(cuda_host)

    def _pin(self, cuda_host: CudaHost | None) -> None:
        try:
            if cuda_host is None:
                if not torch.cuda.is_available():
                    self.pin_failure = "there is no CUDA device"
                    return
                cuda_host = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = int(cuda_host.cudaHostRegister(self._address(), self.size_bytes, 0))
        except RuntimeError as error:
            self.pin_failure = f"CUDA cannot pin memory: {error}"
            return
        if status:
            self.pin_failure = (
                f"cudaHostRegister refused {format_size(self.size_bytes)} with CUDA error {status}; "
                "`ulimit -l` and the container's memory limit bound what can be pinned"
            )
            return
        self._cuda_host = cuda_host
        self.pinned = True

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

    def close(self) -> None:
        """Unpin the memory and let go of it; see the class for views that still exist. May be called twice."""
        if self._cuda_host is not None:
            self._cuda_host.cudaHostUnregister(self._address())
            self._cuda_host = None
            self.pinned = False
        self._memory = self._tensor = None

    def __enter__(self) -> "Slab":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
