"""One token through a Mamba 2 layer in one call to the C++ kernels."""

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


class _Mamba(ctypes.Structure):
    _fields_ = (
        ("input", ProjectionStructure),
        ("output", ProjectionStructure),
        ("norm", NormStructure),
        ("convolution", ConvolutionStructure),
        *((name, ctypes.c_void_p) for name in ("step_bias", "decay_log", "skip")),
        *((name, ctypes.c_int64) for name in ("num_heads", "head_dim", "num_groups", "state_size")),
        *((name, ctypes.c_int32) for name in ("step_bias_dtype", "decay_log_dtype", "skip_dtype", "dtype")),
    )


@dataclass(frozen=True)
class MambaWeights:
    """What one Mamba 2 layer holds.

    ``input`` gives gates and x [inner], the state's inputs and outputs [groups * state_size] each, and steps [heads].
    ``norm`` is [inner], over rows of ``inner / groups``. ``convolution`` [channels, kernel_size] and its bias or None;
    ``step_bias``, ``decay_log`` and ``skip`` [heads].
    """

    input: RawWeight | PackedProjection
    output: RawWeight | PackedProjection
    norm: Norm
    convolution: Tensor
    convolution_bias: Tensor | None
    step_bias: Tensor
    decay_log: Tensor
    skip: Tensor
    num_heads: int
    head_dim: int
    num_groups: int
    state_size: int


class MambaCall(RecurrentStep):
    """One token through a Mamba 2 layer; its state is ``[1, heads, head_dim, state_size]``."""

    name = "moe_offload_mamba"

    def __init__(self, weights: MambaWeights, dtype: torch.dtype) -> None:
        self._weights = w = weights  # keeps the memory
        norm = norm_structure(w.norm)
        norm.width = w.num_heads * w.head_dim // w.num_groups
        vectors = [vector(tensor) for tensor in (w.step_bias, w.decay_log, w.skip)]
        structure = _Mamba(
            *(projection_structure(p) for p in (w.input, w.output)),
            norm,
            convolution_structure(w.convolution, w.convolution_bias),
            *(address for address, _ in vectors),
            *(w.num_heads, w.head_dim, w.num_groups, w.state_size),
            *(vector_dtype for _, vector_dtype in vectors),
            DTYPES[dtype],
        )
        super().__init__(structure)
