"""Triton's kernels on the simulated device: interpreted, when their turn comes on the stream, on the device's memory.

Triton's interpreter copies every tensor of a device to the host, and back when the kernel is over. Here it computes on
the memory itself: a slab's other slots are not written to while copies fill them.
"""

from typing import Any

import torch

from simulated_cuda.runtime import Runtime


def install(runtime: Runtime) -> None:
    """Make interpreted kernels launches; nothing where Triton is not installed."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    from mended_interpreter import mend_interpreter

    mend_interpreter()
    on_host = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **settings: Any) -> None:
        tensors = [value for value in (*arguments, *settings.values()) if isinstance(value, torch.Tensor)]
        devices = {tensor.device for tensor in tensors}
        if not any(device.type == "cuda" for device in devices):
            on_host(self, *arguments, **settings)
            return
        (device,) = devices  # one pointer of another device, or of the host, is an illegal memory access
        if device.index != torch.cuda.current_device():
            raise RuntimeError(f"a Triton kernel for {device} is launched on cuda:{torch.cuda.current_device()}")
        here = [_host_view(value) for value in arguments]
        named = {name: _host_view(value) for name, value in settings.items()}
        runtime.launch_python(device.index, lambda: on_host(self, *here, **named))

    interpreter.GridExecutor.__call__ = launch


def _host_view(value: Any) -> Any:
    is_on_device = isinstance(value, torch.Tensor) and value.is_cuda
    return torch.ops.simulated_cuda.host_view(value) if is_on_device else value
