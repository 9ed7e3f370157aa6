"""Puts the simulated device into this process's torch. It stays there."""

import importlib
import sys
from types import SimpleNamespace
from typing import Any

import torch

from simulated_cuda import bindings
from simulated_cuda.runtime import Runtime, from_environment

_installed: Runtime | None = None


def install() -> Runtime:
    """From now on torch has CUDA devices. Raises `library.CannotBuildError`."""
    global _installed
    if _installed is not None:
        return _installed
    runtime = from_environment()  # before anything asks torch for its CUDA hooks, which it then keeps
    import bitsandbytes  # noqa: F401  before torch shows a device: it would load its library for one

    bindings.runtime = runtime
    for name, value in bindings.functions().items():
        setattr(torch._C, name, value)
    _reload("streams", "Stream", "Event", "ExternalStream")
    _reload("graphs", "CUDAGraph", "graph", "graph_pool_handle", "is_current_stream_capturing")
    cuda = torch.cuda
    cuda._cudart = bindings.Cudart
    cuda._exchange_device = cuda._maybe_exchange_device = bindings._exchange_device
    cuda._is_in_bad_fork = lambda: False
    cuda.get_device_properties = _properties
    cuda._get_device_properties = _properties
    torch.backends.cuda.is_built = lambda: True
    cuda.default_generators = tuple(bindings.DefaultGenerator(index) for index in range(runtime.device_count()))
    from simulated_cuda import triton_launch

    triton_launch.install(runtime)
    _installed = runtime
    return runtime


def _reload(module: str, *names: str) -> None:
    """torch's own code again, now that it finds what a CUDA build has."""
    loaded = importlib.reload(sys.modules[f"torch.cuda.{module}"])
    for name in names:
        setattr(torch.cuda, name, getattr(loaded, name))


def _properties(device: Any = None) -> SimpleNamespace:
    index = torch.cuda._utils._get_device_index(device, optional=True)
    if not 0 <= index < torch.cuda.device_count():
        raise AssertionError("Invalid device id")
    return SimpleNamespace(
        name=f"Simulated GPU {index}",
        major=bindings.capability[0],
        minor=bindings.capability[1],
        total_memory=bindings.runtime.total_bytes(index),
        multi_processor_count=46,
        warp_size=32,
        max_threads_per_multi_processor=1536,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
        L2_cache_size=4 << 20,
        is_integrated=False,
        is_multi_gpu_board=False,
        gcnArchName="",
        uuid="",
    )
