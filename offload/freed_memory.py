"""What torch keeps beyond what it uses: large blocks that it has freed, and kernels that it has compiled."""

import ctypes
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, wraps
from typing import Any

from torch import nn

from moe_offload.offload.pass_inputs import pass_tokens

# malloc.h; mallopt(3) has their meanings and what they are by themselves
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_TRIM_BYTES = 128 * 1024
_REUSED_BYTES = 512 * 1024  # smaller blocks are kept in any case, as decoding wants
_MOST_KEPT_BYTES = 32 * 1024**2  # of a block: glibc takes no more
_NEVER_TRIM_BYTES = 1 << 30
# oneDNN's cache of compiled products, and torch's own on top of it.
_KERNEL_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
_KEPT_KERNELS = 32  # more than the dense part of a layer has shapes
# A hidden state of fewer tokens is seldom a large block.
_FEWEST_TOKENS = 64


@cache
def _glibc() -> ctypes.CDLL | None:
    """None where another C library is at work."""
    try:
        library = ctypes.CDLL(None)
        return library if library.mallopt and library.malloc_trim else None
    except (AttributeError, OSError, TypeError):
        return None


def give_freed_memory_back() -> bool:
    """Have glibc return every large block to the system when freed; False under another C library.

    By itself it learns from the first large block freed to keep those up to 32 MiB, and what was freed then stays with
    the process for good. Call it before the first large allocation.
    """
    glibc = _glibc()
    if glibc is None:
        return False
    glibc.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
    return bool(glibc.mallopt(_M_MMAP_THRESHOLD, _REUSED_BYTES))


def return_freed_memory() -> None:
    """Give the system what was freed so far and lies in the middle of what is in use; some milliseconds."""
    glibc = _glibc()
    if glibc is not None:
        glibc.malloc_trim(0)


def keep_few_kernels() -> None:
    """Have torch forget products of shapes not seen lately, of which it would keep 1024; what the user has set stays.

    Each expert gets another number of a prompt's rows, and each number is a kernel with memory of its own: that adds
    up to tens of MiB, and more with every prompt. Call it before the first product; later it does nothing.
    """
    for name in _KERNEL_CACHES:
        os.environ.setdefault(name, str(_KEPT_KERNELS))


class _Keeping:
    """The process's setting, while any pass wants blocks kept."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_passes = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        glibc = _glibc()
        if glibc is None:
            yield
            return
        with self._lock:
            self._num_passes += 1
            glibc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES)
            glibc.mallopt(_M_MMAP_THRESHOLD, _MOST_KEPT_BYTES)
        try:
            yield
        finally:
            with self._lock:
                self._num_passes -= 1
                if not self._num_passes:
                    give_freed_memory_back()
                    return_freed_memory()


_keeping = _Keeping()


def keep_freed_memory_in_prompts(model: nn.Module) -> None:
    """Have what a long prompt's pass frees kept for what it allocates next, and all of it returned behind the pass.

    The system zeroes the pages of a new block one by one when they are first written, in the middle of whatever writes
    them: 5 % of a pass over 512 tokens in the shape of Mixtral-8x7B. What a pass holds is about half more for it.
    """
    forward = model.forward

    @wraps(forward)
    def keeping(*args: Any, **kwargs: Any) -> Any:
        tokens = pass_tokens(args, kwargs)
        if tokens is None or tokens.dim() < 2 or tokens.shape[:2].numel() < _FEWEST_TOKENS:
            return forward(*args, **kwargs)
        with _keeping():
            return forward(*args, **kwargs)

    model.forward = keeping
