"""Page-locking of host memory by the CUDA runtime."""

import contextlib

import torch

from moe_offload.offload.planning.sizes import format_size


class CudaPageLock:
    """See `PageLock`. What is locked for one device is so for all: addresses are the same everywhere (UVA)."""

    def __init__(self, device: torch.device) -> None:
        """``device``: one that is in use anyway; the runtime sets up whichever is current, at some hundred MiB."""
        self._device = device

    def lock(self, address: int, size_bytes: int) -> str | None:
        """cudaHostRegister; None, or what it said."""
        try:
            with torch.cuda.device(self._device):
                status = int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            return f"CUDA cannot page-lock memory: {error}"
        if not status:
            return None
        self._forget_error()
        return (
            f"cudaHostRegister refused {format_size(size_bytes)} with CUDA error {status}; "
            "`ulimit -l` and the container's memory limit bound what can be page-locked"
        )

    def unlock(self, address: int) -> None:
        """cudaHostUnregister, which waits for the device; where that has failed, its memory is the system's to free."""
        with contextlib.suppress(RuntimeError), torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def _forget_error(self) -> None:
        """The refusal stays the thread's last error, and would be reported by whatever it launches next: so launch."""
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self._device)
