"""The C++ kernels: found beside this file if they were built, called through ctypes, which releases the GIL."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_offload.errors import ConfigError
from moe_offload.libraries import load_library
from moe_offload.quant import reference
from moe_offload.quant.layout import PackedLayout
from moe_offload.quant.threads import num_threads

_ENVIRONMENT = "MOE_OFFLOAD_KERNELS"
_TORCH = "torch"
_ISA_NAMES = ("portable", "avx2", "avx512", "neon", "avx512-base")  # indices are the library's
_PREFERENCE = ("avx512", "avx512-base", "avx2", "neon", "portable")

# The numbers that packed.h gives them.
CODES = {"nf4": 0, "int4": 1, "e2m1": 2, "fp4": 3, "int8": 4, "e4m3": 5, "nf3": 6}
RAW_CODES = {"bf16": 16, "fp16": 17}  # by format
_SCALE_TYPES = {torch.float16: 0, torch.float32: 1, torch.uint8: 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_STATUS_NONFINITE = 1


class PackedWeight(ctypes.Structure):
    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("row_bytes", ctypes.c_int64),
        ("block_rows", ctypes.c_int64),
        ("block_cols", ctypes.c_int64),
        ("code", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    )


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("dtype", ctypes.c_int32))


_MOE_LAYER_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # activation
    ctypes.c_void_p,  # x
    ctypes.c_int32,  # dtype of x and of the result
    ctypes.c_void_p,  # experts and their rows
    ctypes.c_int64,
    ctypes.c_void_p,  # outputs
    ctypes.c_int64,  # columns of outputs
    ctypes.c_void_p,  # rows to sum
    ctypes.c_void_p,  # their weights
    ctypes.c_int64,
    ctypes.c_void_p,  # result
    ctypes.c_int,  # threads
)


_LINEAR_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # the weight but for its addresses
    ctypes.c_void_p,  # codes
    ctypes.c_void_p,  # scales
    ctypes.c_void_p,  # x
    ctypes.c_int64,  # its stride
    ctypes.c_int,  # its dtype
    ctypes.c_int64,  # tokens
    ctypes.c_void_p,  # out, contiguous
    ctypes.c_int,  # its dtype
    ctypes.c_int,  # threads
)


@cache
def _library() -> ctypes.CDLL | None:
    library = load_library(Path(__file__).parent, ctypes.CDLL)
    if library is not None:
        library.moe_offload_isa.restype = ctypes.c_char_p
        library.moe_offload_dequantize.restype = None
        library.moe_offload_read.restype = ctypes.c_uint64
        library.moe_offload_moe_layer.argtypes = _MOE_LAYER_ARGUMENTS
        library.moe_offload_linear_at.argtypes = _LINEAR_ARGUMENTS
    return library


def available() -> tuple[str, ...]:
    """Every backend that can run here, the best first; "torch" always can."""
    library = _library()
    if library is None:
        return (_TORCH,)
    built = tuple(name for name in _PREFERENCE if library.moe_offload_isa(_ISA_NAMES.index(name)) is not None)
    return (*built, _TORCH)


class _Choice:
    """The backend in force; a class so that tests can change it."""

    name: str | None = None


def _chosen() -> str:
    if _Choice.name is None:
        asked = os.environ.get(_ENVIRONMENT)
        if asked is not None and asked not in available():
            raise ConfigError(f"{_ENVIRONMENT}={asked} cannot run here; available: {', '.join(available())}")
        _Choice.name = asked or available()[0]
    return _Choice.name


@contextmanager
def forced(name: str | None) -> Iterator[None]:
    """Run with one of `available()`, or with what the environment says; for tests and benchmarks."""
    before, _Choice.name = _Choice.name, name
    try:
        yield
    finally:
        _Choice.name = before


def backend_name() -> str:
    """What computes with packed weights on the CPU: "cpu-avx512", "cpu-avx2", ..., or "torch"."""
    name = _chosen()
    return name if name == _TORCH else f"cpu-{name}"


def usable(*tensors: Tensor) -> bool:
    """Whether kernels were built and can take these tensors."""
    return _chosen() != _TORCH and all(tensor.is_cpu for tensor in tensors)


def _call() -> tuple[ctypes.CDLL, int]:
    library = _library()
    assert library is not None
    return library, _ISA_NAMES.index(_chosen())


def entry(name: str) -> tuple[Any, int]:
    """A function of the library, and the instruction set that it takes first."""
    library, isa = _call()
    return getattr(library, name), isa


def packed_weight(packed: Tensor, layout: PackedLayout, code: int) -> PackedWeight:
    """A packed weight as kernels take it; valid while the tensor's memory is."""
    address = packed.data_ptr()
    return PackedWeight(
        address,
        address + layout.scales_offset_bytes,
        layout.num_rows,
        layout.num_cols,
        layout.row_bytes,
        layout.block_rows,
        layout.block_cols,
        code,
        _SCALE_TYPES[layout.scale_dtype],
    )


def _matrix(tensor: Tensor) -> _Matrix:
    return _Matrix(tensor.data_ptr(), tensor.stride(0), DTYPES[tensor.dtype])


def quantize(weight: Tensor, packed: Tensor, layout: PackedLayout, code: int) -> None:
    """Fill the codes and scales of ``packed`` from fp32, bf16 or fp16 [N, K]."""
    library, isa = _call()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    status = library.moe_offload_quantize(
        isa, ctypes.byref(packed_weight(packed, layout, code)), ctypes.byref(_matrix(weight)), num_threads()
    )
    if status:
        raise reference.nonfinite_error() if status & _STATUS_NONFINITE else reference.overflow_error()


def dequantize(packed: Tensor, layout: PackedLayout, code: int, rows: slice, out: Tensor) -> None:
    """Rows of the weight into ``out`` [n, K] of any float dtype."""
    library, isa = _call()
    library.moe_offload_dequantize(
        isa,
        ctypes.byref(packed_weight(packed, layout, code)),
        ctypes.c_int64(rows.start),
        ctypes.c_int64(rows.stop),
        ctypes.byref(_matrix(out)),
        num_threads(),
    )


def multiplies_many(*tensors: Tensor) -> bool:
    """Whether `linear_many` can take these tensors, and beats dequantising for torch's product."""
    if not usable(*tensors):
        return False
    library, isa = _call()
    return bool(library.moe_offload_multiplies_many(isa))


def linear_many(x: Tensor, packed: Tensor, layout: PackedLayout, code: int, out: Tensor) -> None:
    """out [T, N] = x [T, K] @ weight.T with x in bf16, the weight rounded to bf16, and sums in fp32."""
    library, isa = _call()
    x = x if x.stride(1) == 1 else x.contiguous()
    status = library.moe_offload_linear_many(
        isa,
        ctypes.byref(packed_weight(packed, layout, code)),
        ctypes.byref(_matrix(x)),
        ctypes.c_int64(x.shape[0]),
        ctypes.byref(_matrix(out)),
        num_threads(),
    )
    if status:
        raise MemoryError(f"no memory to arrange {x.shape[0]} rows of {x.shape[1]} activations")


# What `linear` passes but for addresses, by layout and code: to describe a small weight anew would take a good part of
# the time that its product takes.
_shapes: dict[tuple[PackedLayout, int], tuple[PackedWeight, int, int]] = {}


def linear(x: Tensor, packed: Tensor, layout: PackedLayout, code: int, out: Tensor) -> None:
    """out [T, N] = x [T, K] @ weight.T for few rows of x; ``out`` is contiguous.

    Every row of the result depends on its row of x and on the weight alone: on no other row, thread or address.
    """
    library, isa = _call()
    x = x if x.stride(1) == 1 else x.contiguous()
    shape = _shapes.get((layout, code))
    if shape is None:
        described = packed_weight(packed, layout, code)
        shape = _shapes[layout, code] = (described, ctypes.addressof(described), layout.scales_offset_bytes)
    address = packed.data_ptr()
    num_tokens, stride = x.shape[0], x.stride(0)
    status = library.moe_offload_linear_at(
        isa,
        shape[1],
        address,
        address + shape[2],
        x.data_ptr(),
        stride,
        DTYPES[x.dtype],
        num_tokens,
        out.data_ptr(),
        DTYPES[out.dtype],
        num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for {x.shape[0]} prepared rows of {x.shape[1]} activations")


def expert_many(
    activation: ctypes.Structure, expert: int, x: Tensor, x_rows: Tensor, out: Tensor, out_rows: Tensor
) -> None:
    """Rows ``out_rows`` of out [.., H] = an expert's MLP of rows ``x_rows`` of x [.., H] in bf16.

    ``expert``: the address of its description. Both lists of rows are int64 [n].
    """
    library, isa = _call()
    status = library.moe_offload_expert_many(
        isa,
        ctypes.byref(activation),
        ctypes.c_void_p(expert),
        ctypes.byref(_matrix(x)),
        ctypes.c_void_p(x_rows.data_ptr()),
        ctypes.c_int64(x_rows.shape[0]),
        ctypes.byref(_matrix(out)),
        ctypes.c_void_p(out_rows.data_ptr()),
        num_threads(),
    )
    if status:
        raise MemoryError(f"no memory to arrange {x_rows.shape[0]} rows of an expert's activations")


def moe_layer(
    activation: ctypes.Structure,
    x: Tensor,
    tasks: Sequence[int],
    outputs: Tensor,
    rows: Sequence[int],
    weights: Sequence[float],
    result: Tensor,
) -> None:
    """Fill rows of ``outputs`` (fp32 [n, H]) from x [1, H]; then, if ``rows`` are given, sum them into ``result``.

    ``tasks``: by turns the address of an expert's description and its row. ``rows`` and ``weights``: the terms of the
    sum, in its order; ``result`` [1, H] has x's dtype.
    """
    library, isa = _call()
    status = library.moe_offload_moe_layer(
        isa,
        ctypes.byref(activation),
        x.data_ptr(),
        DTYPES[x.dtype],
        (ctypes.c_int64 * len(tasks))(*tasks),
        len(tasks) // 2,
        outputs.data_ptr(),
        outputs.shape[1],
        (ctypes.c_int64 * len(rows))(*rows),
        (ctypes.c_float * len(rows))(*weights) if rows else None,
        len(rows),
        result.data_ptr(),
        num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for the activations of {len(tasks) // 2} experts")


def read_all(data: Tensor) -> int:
    """Read every byte once on all threads: the bandwidth that products are measured against."""
    library, isa = _call()
    return int(
        library.moe_offload_read(isa, ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel()), num_threads())
    )
