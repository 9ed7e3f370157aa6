"""One token through a gated delta net in one call to the C++ kernels."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload.quant.kernels import DTYPES
from moe_offload.quant.recurrent_step import RecurrentStep
from moe_offload.quant.step_weights import (
    ConvolutionStructure,
    Norm,
    NormStructure,
    PackedProjection,
    ProjectionStructure,
    RawWeight,
    convolution_structure,
    norm_structure,
    projection_structure,
    vector,
)


class _DeltaNet(ctypes.Structure):
    _fields_ = (
        *((name, ProjectionStructure) for name in ("mixed", "gate", "beta", "decay", "output")),
        ("norm", NormStructure),
        ("convolution", ConvolutionStructure),
        *((name, ctypes.c_void_p) for name in ("decay_bias", "decay_log")),
        *((name, ctypes.c_int64) for name in ("num_key_heads", "num_value_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int32) for name in ("decay_bias_dtype", "decay_log_dtype", "is_grouped", "dtype")),
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


class DeltaNetCall(RecurrentStep):
    """One token through a gated delta net; its state is ``[1, value heads, key_dim, value_dim]``."""

    name = "moe_offload_delta_net"

    def __init__(self, weights: DeltaNetWeights, dtype: torch.dtype) -> None:
        self._weights = w = weights  # keeps the memory
        bias, bias_dtype = vector(w.decay_bias)
        log, log_dtype = vector(w.decay_log)
        structure = _DeltaNet(
            *(projection_structure(p) for p in (w.mixed, w.gate, w.beta, w.decay, w.output)),
            norm_structure(w.norm),
            *(convolution_structure(w.convolution), bias, log),
            *(w.num_key_heads, w.num_value_heads, w.key_dim, w.value_dim),
            *(bias_dtype, log_dtype, w.gate is None, DTYPES[dtype]),
        )
        super().__init__(structure)
