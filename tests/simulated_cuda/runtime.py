"""The simulator's C functions, with errors as torch raises them, and kernels that are written in Python."""

import ctypes
import itertools
import os
import traceback
from collections.abc import Callable
from typing import Any

import torch

from simulated_cuda import library

_VOID, _U64, _I64, _F64 = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int64, ctypes.c_double
_INT, _TEXT = ctypes.c_int, ctypes.c_char_p
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "error": (_TEXT, []),
    "error_kind": (_INT, []),
    "device_count": (_I64, []),
    "current_device": (_I64, []),
    "set_device": (_I64, [_INT]),
    "synchronize": (_I64, [_INT]),
    "current_stream": (_I64, [_INT]),
    "set_stream": (_I64, [_INT, _I64]),
    "new_stream": (_I64, [_INT]),
    "query_stream": (_I64, [_INT, _I64]),
    "synchronize_stream": (_I64, [_INT, _I64]),
    "is_capturing": (_I64, [_INT]),
    "new_event": (_VOID, [_INT]),
    "destroy_event": (None, [_VOID]),
    "record": (_I64, [_VOID, _INT, _I64]),
    "wait": (_I64, [_VOID, _INT, _I64]),
    "query_event": (_I64, [_VOID]),
    "synchronize_event": (_I64, [_VOID]),
    "elapsed_ns": (_I64, [_VOID, _VOID]),
    "launch": (_I64, [_INT, _U64, _F64]),
    "sleep": (_I64, [_INT, _F64]),
    "capture_begin": (_VOID, [_U64, _TEXT]),
    "capture_end": (_I64, [_VOID]),
    "replay": (_I64, [_VOID]),
    "graph_length": (_I64, [_VOID]),
    "destroy_graph": (_I64, [_VOID]),
    "memory": (None, [_INT, ctypes.POINTER(_I64)]),
    "reset_peaks": (None, [_INT]),
    "free_bytes": (_I64, [_INT]),
    "total_bytes": (_I64, [_INT]),
    "limit": (None, [_INT, _F64]),
    "fraction": (_F64, [_INT]),
    "empty_cache": (_I64, []),
    "pin": (_I64, [_VOID, _U64]),
    "unpin": (_I64, [_VOID]),
    "limit_pinned": (None, [_U64]),
    "seed": (None, [_INT, _U64]),
    "set_sync_debug_mode": (None, [_INT]),
    "sync_debug_mode": (_INT, []),
    "forget_failure": (None, []),
    "pending": (_U64, []),
}
_CALLBACK = ctypes.CFUNCTYPE(_INT, _U64)


class Runtime:
    """The one simulator of this process."""

    def __init__(self, *, num_devices: int, total_bytes: int, context_bytes: int, seed: int, late: bool) -> None:
        self._library = library.load()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, f"simulated_{name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, f"_{name}", function)
        self._launched: dict[int, Callable[[], None]] = {}
        self._recorded: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._callback = _CALLBACK(self._run)
        configure = self._library.simulated_configure
        configure.argtypes = [_INT, _U64, _U64, _U64, _INT, _CALLBACK]
        configure(num_devices, total_bytes, context_bytes, seed, late, self._callback)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The C function of that name; what it answers, or its error."""
        function = getattr(self._library, f"simulated_{name}")
        is_checked = function.restype is _I64 or name == "capture_begin"

        def call(*arguments: Any) -> Any:
            answer = function(*arguments)
            if is_checked and answer in (-1, None):
                self._raise()
            return answer

        setattr(self, name, call)
        return call

    def launch_python(self, device: int, kernel: Callable[[], None], microseconds: float = 20) -> None:
        """Run ``kernel`` when its turn comes on the current stream, each time that a graph with it is replayed."""
        number = next(self._numbers)
        kernels = self._recorded if self.is_capturing(device) else self._launched
        kernels[number] = kernel
        self.launch(device, number, microseconds)

    def _run(self, number: int) -> int:
        try:
            kernel = self._recorded.get(number) or self._launched.pop(number)
            kernel()
        except BaseException:
            traceback.print_exc()
            return 1
        return 0

    def _raise(self) -> None:
        text = self._error().decode()
        if self._error_kind() == 0:
            raise torch.AcceleratorError(text)
        raise RuntimeError(text)


def from_environment() -> Runtime:
    """As ``SIMULATED_CUDA`` says it: ``devices=2,gib=8,seed=0,late=1``, or any of these."""
    text = os.environ.get("SIMULATED_CUDA", "")
    wanted = dict(part.split("=") for part in text.split(",") if "=" in part)
    return Runtime(
        num_devices=int(wanted.get("devices", 2)),
        total_bytes=int(float(wanted.get("gib", 8)) * (1 << 30)),
        context_bytes=300 << 20,
        seed=int(wanted.get("seed", 0)),
        late=wanted.get("late", "1") != "0",
    )
