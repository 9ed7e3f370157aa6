"""The dense part of a decode step in C++: a norm, a product with a raw weight, an attention module, one call each."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload.quant.kernels import DTYPES
from moe_offload.quant.step_weights import (
    Norm,
    NormStructure,
    PackedProjection,
    ProjectionStructure,
    RawWeight,
    check,
    entry,
    norm_structure,
    projection_structure,
    raw_weight_structure,
    vector,
)
from moe_offload.quant.threads import num_threads


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, ProjectionStructure) for name in ("query", "key", "value", "output")),
        *((name, NormStructure) for name in ("query_norm", "key_norm")),
        ("sinks", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("scaling", ctypes.c_float),
        ("sinks_dtype", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("is_gated", ctypes.c_int32),
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
    ctypes.c_int,  # threads
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


class LinearCall:
    """``x @ weight.T + bias`` for few rows of x, summed in fp32 and rounded once."""

    def __init__(self, raw: RawWeight) -> None:
        self._raw = raw  # keeps the memory
        self._weight = raw_weight_structure(raw.weight)
        self._address = ctypes.addressof(self._weight)
        self._bias, self._bias_dtype = vector(raw.bias)
        self._num_rows = raw.weight.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., in]`` contiguous to ``[..., out]``."""
        function, isa = entry("moe_offload_raw_linear", _LINEAR_ARGUMENTS)
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
        check(status)
        return out


class NormCall:
    """A norm over the last dimension."""

    def __init__(self, norm: Norm) -> None:
        self._norm = norm  # keeps the memory
        self._structure = norm_structure(norm)
        self._address = ctypes.addressof(self._structure)

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., width]`` contiguous to the same."""
        function, isa = entry("moe_offload_rms_norm", _NORM_ARGUMENTS)
        out = torch.empty_like(x)
        num_rows = x.numel() // x.shape[-1]
        dtype = DTYPES[x.dtype]
        check(function(isa, self._address, x.data_ptr(), num_rows, dtype, out.data_ptr(), num_threads()))
        return out


@dataclass(frozen=True)
class AttentionWeights:
    """What one attention module holds. ``sinks`` [heads] or None.

    ``half_tables``: cosines and sines are given for the first half of what rotates, the second has the same.
    ``is_gated``: ``query`` gives each head's query and then its gate, whose sigmoid is a factor of the head's result.
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
    is_gated: bool = False


class AttentionCall:
    """One token through an attention module, from hidden states to hidden states."""

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype) -> None:
        self.weights = weights  # keeps the memory
        sinks, sinks_dtype = vector(weights.sinks)
        self._structure = _Attention(
            *(projection_structure(p) for p in (weights.query, weights.key, weights.value, weights.output)),
            *(norm_structure(n) for n in (weights.query_norm, weights.key_norm)),
            sinks,
            weights.num_heads,
            weights.num_kv_heads,
            weights.head_dim,
            weights.scaling,
            sinks_dtype,
            DTYPES[dtype],
            weights.is_gated,
        )
        self._address = ctypes.addressof(self._structure)

    def __call__(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, begin: int, position: int
    ) -> Tensor:
        """``x [1, 1, hidden]``; ``cos`` and ``sin`` of one token.

        Key and value are written at ``position`` of ``keys`` and ``values`` ``[1, kv heads, capacity, head_dim]``; the
        token attends from ``begin`` to itself. All contiguous, and of one dtype.
        """
        function, isa = entry("moe_offload_attention", _ATTENTION_ARGUMENTS)
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
        check(status)
        return out
