"""One token through a gated delta net in one call to the C++ kernels."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload.quant.kernels import DTYPES
from moe_offload.quant.step_weights import (
    ConvolutionStructure,
    Norm,
    NormStructure,
    PackedProjection,
    ProjectionStructure,
    RawWeight,
    check,
    convolution_structure,
    entry,
    norm_structure,
    projection_structure,
    vector,
)
from moe_offload.quant.threads import num_threads


class _DeltaNet(ctypes.Structure):
    _fields_ = (
        *((name, ProjectionStructure) for name in ("mixed", "gate", "beta", "decay", "output")),
        ("norm", NormStructure),
        ("convolution", ConvolutionStructure),
        *((name, ctypes.c_void_p) for name in ("decay_bias", "decay_log")),
        *((name, ctypes.c_int64) for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int32) for name in ("decay_bias_dtype", "decay_log_dtype", "is_grouped", "dtype")),
    )


_ARGUMENTS = (
    ctypes.c_int,  # instruction set
    ctypes.c_void_p,  # net
    ctypes.c_void_p,  # x
    ctypes.c_void_p,  # past
    ctypes.c_void_p,  # state
    ctypes.c_void_p,  # out
    ctypes.c_int,  # threads
)


@dataclass(frozen=True)
class DeltaNetWeights:
    """What one gated delta net holds.

    ``mixed`` gives queries, keys and values, ``[2 * key heads * key_dim + value heads * value_dim, hidden]``. Without
    ``gate`` and ``decay`` it gives each key head's query, key, values and gates, and ``beta`` its betas and decays.
    ``convolution`` [channels, kernel_size]; ``decay_bias`` and ``decay_log`` [value heads].
    """

    mixed: RawWeight | PackedProjection
    gate: RawWeight | PackedProjection | None
    beta: RawWeight | PackedProjection
    decay: RawWeight | PackedProjection | None
    output: RawWeight | PackedProjection
    norm: Norm
    convolution: Tensor
    decay_bias: Tensor
    decay_log: Tensor
    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int


class DeltaNetCall:
    """One token through a gated delta net, from hidden states to hidden states."""

    def __init__(self, weights: DeltaNetWeights, dtype: torch.dtype) -> None:
        self._weights = w = weights  # keeps the memory
        bias, bias_dtype = vector(w.decay_bias)
        log, log_dtype = vector(w.decay_log)
        self._structure = _DeltaNet(
            *(projection_structure(p) for p in (w.mixed, w.gate, w.beta, w.decay, w.output)),
            norm_structure(w.norm),
            *(convolution_structure(w.convolution), bias, log),
            *(w.num_key_heads, w.num_value_heads, w.key_dim, w.value_dim),
            *(bias_dtype, log_dtype, w.gate is None, DTYPES[dtype]),
        )
        self._address = ctypes.addressof(self._structure)

    def __call__(self, x: Tensor, past: Tensor, state: Tensor) -> Tensor:
        """``x [1, 1, hidden]``; ``past`` [1, channels, kernel_size] and ``state`` [1, value heads, key_dim, value_dim].

        Both are brought up to date. All contiguous and of one dtype, but for the state, which is in fp32.
        """
        function, isa = entry("moe_offload_delta_net", _ARGUMENTS)
        out = torch.empty_like(x)
        addresses = (tensor.data_ptr() for tensor in (x, past, state, out))
        check(function(isa, self._address, *addresses, num_threads()))
        return out
