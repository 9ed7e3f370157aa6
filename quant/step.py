"""The dense part of a decode step in C++: a norm, a product with a raw weight, an attention module, one call each."""

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_offload.quant import kernels
from moe_offload.quant.kernels import DTYPES, PackedWeight, packed_weight
from moe_offload.quant.layout import PackedLayout
from moe_offload.quant.threads import num_threads


class _RawWeight(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("cols", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


class _Projection(ctypes.Structure):
    _fields_ = (
        ("packed", PackedWeight),
        ("raw", _RawWeight),
        ("bias", ctypes.c_void_p),
        ("bias_dtype", ctypes.c_int32),
    )


class _RmsNorm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("width", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("weight_dtype", ctypes.c_int32),
        ("rounds_first", ctypes.c_int32),
    )


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in ("query", "key", "value", "output")),
        *((name, _RmsNorm) for name in ("query_norm", "key_norm")),
        ("sinks", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("sinks_dtype", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


_LINEAR_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # weight
    ctypes.c_void_p,  # bias
    ctypes.c_int,
    ctypes.c_void_p,  # x
    ctypes.c_int64,
    ctypes.c_int,  # dtype
    ctypes.c_void_p,  # out
    ctypes.c_int,  # threads
)
_NORM_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # norm
    ctypes.c_void_p,  # x
    ctypes.c_int64,
    ctypes.c_int,  # dtype
    ctypes.c_void_p,  # out
)
_ATTENTION_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # attention
    ctypes.c_void_p,  # x
    ctypes.c_void_p,  # cos
    ctypes.c_void_p,  # sin
    ctypes.c_int64,  # numbers that rotate in a head
    ctypes.c_int64,  # length of cos and sin
    ctypes.c_void_p,  # keys
    ctypes.c_void_p,  # values
    ctypes.c_int64,  # capacity
    ctypes.c_int64,  # first position attended to
    ctypes.c_int64,  # position of the token
    ctypes.c_void_p,  # out
    ctypes.c_int,  # threads
)


@dataclass(frozen=True)
class RawWeight:
    """A contiguous weight [out, in] in a float dtype, and a bias [out] or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class PackedProjection:
    """A weight packed in a blocked format, and a bias [out] or None."""

    packed: Tensor
    layout: PackedLayout
    code: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """``x / rms(x) * weight [width]``; ``rounds_first``: to the dtype of x before the weight too, as in Llama."""

    weight: Tensor
    epsilon: float
    rounds_first: bool


class LinearCall:
    """``x @ weight.T + bias`` for few rows of x, summed in fp32 and rounded once."""

    def __init__(self, raw: RawWeight) -> None:
        self._raw = raw  # keeps the memory
        self._weight = _raw_weight(raw.weight)
        self._address = ctypes.addressof(self._weight)
        self._bias, self._bias_dtype = _vector(raw.bias)
        self._num_rows = raw.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` contiguous to ``[..., out]``."""
        function, isa = _function("moe_offload_raw_linear", _LINEAR_ARGUMENTS)
        out = x.new_empty((*x.shape[:-1], self._num_rows))
        status = function(
            isa,
            self._address,
            self._bias,
            self._bias_dtype,
            x.data_ptr(),
            x.numel() // x.shape[-1],
            DTYPES[x.dtype],
            out.data_ptr(),
            num_threads(),
        )
        _check(status)
        return out


class NormCall:
    """A norm over the last dimension."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm  # keeps the memory
        self._structure = _rms_norm(norm)
        self._address = ctypes.addressof(self._structure)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` contiguous to the same."""
        function, isa = _function("moe_offload_rms_norm", _NORM_ARGUMENTS)
        out = torch.empty_like(x)
        _check(function(isa, self._address, x.data_ptr(), x.numel() // x.shape[-1], DTYPES[x.dtype], out.data_ptr()))
        return out


@dataclass(frozen=True)
class AttentionWeights:
    """What one attention module holds. ``sinks`` [heads] or None.

    ``half_tables``: cosines and sines are given for the first half of what rotates, the second has the same.
    """

    query: RawWeight | PackedProjection
    key: RawWeight | PackedProjection
    value: RawWeight | PackedProjection
    output: RawWeight | PackedProjection
    query_norm: Norm | None
    key_norm: Norm | None
    sinks: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scaling: float
    half_tables: bool


class AttentionCall:
    """One token through an attention module, from hidden states to hidden states."""

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype) -> None:
        self.weights = weights  # keeps the memory
        sinks, sinks_dtype = _vector(weights.sinks)
        self._structure = _Attention(
            *(_projection(p) for p in (weights.query, weights.key, weights.value, weights.output)),
            *(_RmsNorm() if n is None else _rms_norm(n) for n in (weights.query_norm, weights.key_norm)),
            sinks,
            weights.num_heads,
            weights.num_kv_heads,
            weights.head_dim,
            weights.scaling,
            sinks_dtype,
            DTYPES[dtype],
        )
        self._address = ctypes.addressof(self._structure)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, begin: int, position: int
    ) -> Tensor:
        """``x [1, 1, hidden]``; ``cos`` and ``sin`` of one token.

        Key and value are written at ``position`` of ``keys`` and ``values`` ``[1, kv heads, capacity, head_dim]``; the
        token attends from ``begin`` to itself. All contiguous, and of one dtype.
        """
        function, isa = _function("moe_offload_attention", _ATTENTION_ARGUMENTS)
        out = torch.empty_like(x)
        table = cos.shape[-1]
        status = function(
            isa,
            self._address,
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            2 * table if self.weights.half_tables else table,
            table,
            keys.data_ptr(),
            values.data_ptr(),
            keys.shape[2],
            begin,
            position,
            out.data_ptr(),
            num_threads(),
        )
        _check(status)
        return out


def _function(name: str, arguments: tuple[Any, ...]) -> tuple[Any, int]:
    function, isa = kernels.entry(name)
    if function.argtypes is not arguments:
        function.argtypes = arguments
    return function, isa


def _check(status: int) -> None:
    if status:
        raise MemoryError("no memory for the activations of a decode step")


def _vector(tensor: Tensor | None) -> tuple[int | None, int]:
    return (None, 0) if tensor is None else (tensor.data_ptr(), DTYPES[tensor.dtype])


def _raw_weight(weight: Tensor) -> _RawWeight:
    return _RawWeight(weight.data_ptr(), *weight.shape, DTYPES[weight.dtype])


def _rms_norm(norm: Norm) -> _RmsNorm:
    weight = norm.weight
    return _RmsNorm(weight.data_ptr(), weight.shape[0], norm.epsilon, DTYPES[weight.dtype], norm.rounds_first)


def _projection(projection: RawWeight | PackedProjection) -> _Projection:
    bias = _vector(projection.bias)
    if isinstance(projection, RawWeight):
        return _Projection(PackedWeight(), _raw_weight(projection.weight), *bias)
    packed = packed_weight(projection.packed, projection.layout, projection.code)
    return _Projection(packed, _RawWeight(), *bias)
