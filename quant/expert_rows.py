"""One expert's MLP for one token, as many rows of its weights at a time as are there."""

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_offload.quant import kernels
from moe_offload.quant.activation import Activation
from moe_offload.quant.threads import num_threads

if TYPE_CHECKING:
    from moe_offload.quant.moe_layer import PackedMlp


class ExpertRows:
    """What has been computed of an expert's output so far; bit for bit what one call for all of it gives.

    Rows of the first product (all gates and ups, in the order in which they are packed), then rows of the last one.
    Reads no row before it is asked for, and none twice.
    """

    __slots__ = ("_activation", "_down_rows", "_memory", "_mlp", "_out", "_up_rows", "_x")

    def __init__(self, activation: Activation, x: Tensor, mlp: "PackedMlp", out: Tensor) -> None:
        """``x [1, H]``, contiguous; ``out``: ``fp32 [H]``, contiguous, whole when all rows were computed."""
        self._activation, self._x, self._mlp, self._out = activation, x, mlp, out
        size, isa = kernels.entry("moe_offload_expert_rows_bytes")
        size.restype = ctypes.c_int64
        num_bytes = size(isa, ctypes.byref(activation.struct), kernels.DTYPES[x.dtype], ctypes.c_void_p(mlp.address))
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._up_rows = self._down_rows = 0

    def advance(self, up_rows: int, down_rows: int) -> None:
        """Compute what is missing up to so many rows of each product; of the last none before all of the first."""
        up_rows, down_rows = max(self._up_rows, up_rows), max(self._down_rows, down_rows)
        if (up_rows, down_rows) == (self._up_rows, self._down_rows):
            return
        assert not down_rows or up_rows == self._mlp.up_rows
        compute, isa = kernels.entry("moe_offload_expert_rows")
        compute(
            isa,
            ctypes.byref(self._activation.struct),
            ctypes.c_void_p(self._x.data_ptr()),
            kernels.DTYPES[self._x.dtype],
            ctypes.c_void_p(self._mlp.address),
            ctypes.c_void_p(self._memory.data_ptr()),
            ctypes.c_int64(self._up_rows),
            ctypes.c_int64(up_rows),
            ctypes.c_int64(self._down_rows),
            ctypes.c_int64(down_rows),
            ctypes.c_void_p(self._out.data_ptr()),
            num_threads(),
        )
        self._up_rows, self._down_rows = up_rows, down_rows

    def finish(self) -> None:
        """Compute all that is left."""
        self.advance(self._mlp.up_rows, self._mlp.down_rows)
