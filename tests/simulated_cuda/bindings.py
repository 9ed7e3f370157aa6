"""What torch's own Python code for CUDA finds in ``torch._C``: streams, events, graphs, memory, the runtime's calls."""

import ctypes
import itertools
import weakref
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch

_KIND = int(torch._C._autograd.DeviceType.CUDA)
runtime: Any = None  # set when the device is installed
# Too old for Triton's kernels: interpreted, a whole model's take minutes.
capability = (7, 0)


class StreamBase(torch.Stream):
    """``torch._C._CudaStreamBase``."""

    def __new__(cls, priority: int = 0, stream_id: int = 0, device_index: int = 0, device_type: int = 0, **_: Any):
        if device_type:
            return super().__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)
        device = runtime.current_device()
        return super().__new__(cls, stream_id=runtime.new_stream(device), device_index=device, device_type=_KIND)

    @property
    def cuda_stream(self) -> int:
        return self.stream_id and 0x5EED0000 + self.device_index * 1000 + self.stream_id

    def query(self) -> bool:
        return bool(runtime.query_stream(self.device_index, self.stream_id))

    def synchronize(self) -> None:
        runtime.synchronize_stream(self.device_index, self.stream_id)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5


class EventBase:
    """``torch._C._CudaEventBase``."""

    def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any):
        self = super().__new__(cls)
        self._event = runtime.new_event(int(enable_timing))
        self.device: torch.device | None = None
        return self

    def __del__(self) -> None:
        if getattr(self, "_event", None):
            runtime.destroy_event(self._event)

    @property
    def cuda_event(self) -> int:
        return self._event if self.device else 0

    def record(self, stream: Any) -> None:
        if self.device is not None and self.device != stream.device:
            raise RuntimeError(f"Event device {self.device} does not match recording stream's device {stream.device}.")
        self.device = stream.device
        runtime.record(self._event, stream.device_index, stream.stream_id)

    def wait(self, stream: Any) -> None:
        if self.device is not None:
            runtime.wait(self._event, stream.device_index, stream.stream_id)

    def query(self) -> bool:
        return self.device is None or bool(runtime.query_event(self._event))

    def synchronize(self) -> None:
        if self.device is not None:
            runtime.synchronize_event(self._event)

    def elapsed_time(self, end: "EventBase") -> float:
        return runtime.elapsed_ns(self._event, end._event) * 1e-6


class GraphBase:
    """``torch._C._CUDAGraph``."""

    def __new__(cls, keep_graph: bool = False):
        self = super().__new__(cls)
        self._graph = None
        self._pool: tuple[int, int] | None = None
        return self

    def capture_begin(self, pool: tuple[int, int] | None = None, capture_error_mode: str = "global") -> None:
        if self._graph is not None:
            raise RuntimeError("This CUDAGraph instance already owns a captured graph.")
        self._pool = tuple(pool) if pool else graph_pool_handle()
        self._graph = runtime.capture_begin(self._pool[1], capture_error_mode.encode())
        self._release = weakref.finalize(self, runtime.destroy_graph, self._graph)

    def capture_end(self) -> None:
        runtime.capture_end(self._graph)

    def replay(self) -> None:
        runtime.replay(self._graph)

    def reset(self) -> None:
        if self._graph is not None:
            self._graph = None
            self._release()

    def pool(self) -> tuple[int, int]:
        return self._pool


class DefaultGenerator:
    """What a device draws from, as far as ``torch.manual_seed`` uses it."""

    def __init__(self, device: int) -> None:
        self.device = torch.device("cuda", device)

    def manual_seed(self, seed: int) -> None:
        runtime.seed(self.device.index, seed)


_pools = itertools.count(1)


def graph_pool_handle() -> tuple[int, int]:
    """An identifier that no other graph has."""
    return 0, next(_pools)


class Cudart:
    """``torch._C._cudart``."""

    cudaError = SimpleNamespace(success=0)

    @staticmethod
    def cudaHostRegister(address: int, size_bytes: int, flags: int) -> int:
        return runtime.pin(address, size_bytes)

    @staticmethod
    def cudaHostUnregister(address: int) -> int:
        return runtime.unpin(address)

    @staticmethod
    def cudaMemGetInfo(device: int) -> tuple[int, int]:
        return runtime.free_bytes(device), runtime.total_bytes(device)

    @staticmethod
    def cudaGetErrorString(code: int) -> str:
        return f"CUDA error {code}"


def memory_stats(device: int) -> dict[str, Any]:
    """As the allocator tells them, nested."""
    five = (ctypes.c_int64 * 5)()
    runtime.memory(device, five)
    allocated, peak_allocated, reserved, peak_reserved, num_allocations = five
    stats: dict[str, Any] = defaultdict(dict)
    for name, current, peak in [
        ("allocated_bytes", allocated, peak_allocated),
        ("active_bytes", allocated, peak_allocated),
        ("requested_bytes", allocated, peak_allocated),
        ("reserved_bytes", reserved, peak_reserved),
    ]:
        stats[name]["all"] = {"current": current, "peak": peak, "allocated": 0, "freed": 0}
    stats["num_device_alloc"] = num_allocations
    return dict(stats)


def _is_current_stream_capturing() -> bool:
    return bool(runtime.is_capturing(runtime.current_device()))


def _exchange_device(device: int) -> int:
    before = runtime.current_device()
    if device >= 0:
        runtime.set_device(device)
    return before


def _stream_data(stream_id: int, device: int) -> tuple[int, int, int]:
    return stream_id, device, _KIND


def functions() -> dict[str, Any]:
    """What is put into ``torch._C``."""
    return {
        "_CudaStreamBase": StreamBase,
        "_CudaEventBase": EventBase,
        "_CUDAGraph": GraphBase,
        "_cudart": Cudart,
        "_graph_pool_handle": graph_pool_handle,
        "_cuda_isCurrentStreamCapturing": _is_current_stream_capturing,
        "_cuda_init": lambda: torch.ops.simulated_cuda.init(),
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getDeviceCount": lambda: runtime.device_count(),
        "_cuda_getArchFlags": lambda: "sm_80 sm_86",
        "_cuda_getDevice": lambda: runtime.current_device(),
        "_cuda_setDevice": lambda device: runtime.set_device(device),
        "_cuda_exchangeDevice": _exchange_device,
        "_cuda_maybeExchangeDevice": _exchange_device,
        "_cuda_synchronize": lambda: runtime.synchronize(runtime.current_device()),
        "_cuda_getCurrentStream": lambda device: _stream_data(runtime.current_stream(device), device),
        "_cuda_getDefaultStream": lambda device: _stream_data(0, device),
        "_cuda_getCurrentRawStream": lambda device: runtime.current_stream(device),
        "_cuda_setStream": lambda stream_id, device_index, device_type: runtime.set_stream(device_index, stream_id),
        "_cuda_sleep": lambda cycles: runtime.sleep(runtime.current_device(), cycles / 1.5e3),
        "_cuda_canDeviceAccessPeer": lambda device, peer: True,
        "_cuda_set_sync_debug_mode": lambda mode: runtime.set_sync_debug_mode(mode),
        "_cuda_get_sync_debug_mode": lambda: runtime.sync_debug_mode(),
        "_cuda_memoryStats": memory_stats,
        "_cuda_resetPeakMemoryStats": lambda device: runtime.reset_peaks(device),
        "_cuda_resetAccumulatedMemoryStats": lambda device: None,
        # A graph whose capture has failed lets go of its pool when it is gone.
        "_cuda_endAllocateToPool": lambda device, pool: None,
        "_cuda_releasePool": lambda device, pool: None,
        "_host_emptyCache": lambda: None,
        "_cuda_emptyCache": lambda: runtime.empty_cache(),
        "_cuda_setMemoryFraction": lambda fraction, device: runtime.limit(device, fraction),
        "_cuda_getMemoryFraction": lambda device: runtime.fraction(device),
        "_cuda_getAllocatorBackend": lambda: "native",
        "_cuda_hostMemoryStats": dict,
        "_cuda_clearCublasWorkspaces": lambda: None,
    }
