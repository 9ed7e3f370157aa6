"""Weights kept in a torch dtype: packed bytes are a view away from the weight."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant import kernels, reference
from moe_offload.quant.base import ErrorBound
from moe_offload.quant.layout import PackedLayout, align_up
from moe_offload.quant.tiles import row_tiles

_ROUNDING = {
    "bf16": ErrorBound(of_weight=2**-8, absolute=2**-134),
    "fp16": ErrorBound(of_weight=2**-11, absolute=2**-25),
    "fp32": ErrorBound(),
}
# Up to so many rows of x the kernels read a weight faster than torch does.
_FEW_ROWS = 4
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class RawFormat:
    """bf16, fp16 or fp32, of any shape."""

    spec: str

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.spec]

    @property
    def is_raw(self) -> bool:
        return True

    @property
    def error_bound(self) -> ErrorBound:
        return _ROUNDING[self.spec]

    @property
    def code(self) -> int | None:
        """The kernels' number for the format; None if they do not take it."""
        return kernels.RAW_CODES.get(self.spec)

    def layout(self, shape: tuple[int, ...]) -> PackedLayout:
        """The weight [N, K] as kernels see it: numbers for codes, and no scales."""
        return _matrix_layout(shape[0], shape[1], self.dtype.itemsize)

    def bits_per_weight(self) -> float:
        return 8.0 * self.dtype.itemsize

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return align_up(math.prod(shape) * self.dtype.itemsize)

    def quantize(self, weight: Tensor) -> Tensor:
        reference.check_finite(weight)
        packed = torch.zeros(self.nbytes(tuple(weight.shape)), dtype=torch.uint8, device=weight.device)
        view = self.view(packed, tuple(weight.shape))
        view.copy_(weight)
        if weight.dtype != self.dtype and not bool(torch.isfinite(view).all()):
            largest = torch.finfo(self.dtype).max
            raise FormatError(f"the weight exceeds {self.spec}'s largest number ({largest:g}); use bf16 or fp32")
        return packed

    def view(self, packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight itself, without a copy."""
        num_bytes = self.nbytes(shape)
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != num_bytes:
            raise FormatError(
                f"a weight of shape {list(shape)} in {self.spec} is {num_bytes} bytes of uint8, "
                f"got {packed.dtype} {list(packed.shape)}; slice the slot to Format.nbytes(shape)"
            )
        return packed[: math.prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)

    def dequantize(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A view where ``dtype`` is the weight's own: write to it and the packed bytes change."""
        return self.view(packed, shape).to(dtype)

    def linear(self, x: Tensor, packed: Tensor, shape: tuple[int, int], out_dtype: torch.dtype | None = None) -> Tensor:
        weight = self.view(packed, shape)
        if x.dim() != 2 or x.shape[1] != shape[1]:
            raise FormatError(f"x must be [T, {shape[1]}] for a {list(shape)} weight, got {list(x.shape)}")
        out_dtype = out_dtype or x.dtype
        if self._kernels_take(x, packed, out_dtype):
            assert self.code is not None
            out = torch.empty(x.shape[0], shape[0], dtype=out_dtype)
            kernels.linear(x, packed, self.layout(shape), self.code, out)
            return out
        compute_dtype = torch.promote_types(x.dtype, weight.dtype)
        if weight.dtype == compute_dtype:
            return F.linear(x.to(compute_dtype), weight).to(out_dtype)
        # x is wider: the weight is widened a tile at a time, since rounding x would lose what the caller has
        out = torch.empty(x.shape[0], shape[0], dtype=out_dtype, device=x.device)
        x = x.to(compute_dtype)
        for rows in row_tiles(shape[0], shape[1]):
            out[:, rows] = F.linear(x, weight[rows].to(compute_dtype))
        return out

    def _kernels_take(self, x: Tensor, packed: Tensor, out_dtype: torch.dtype) -> bool:
        return (
            self.code is not None
            and x.shape[0] <= _FEW_ROWS
            and x.dtype in kernels.DTYPES
            and out_dtype in kernels.DTYPES
            and kernels.usable(x, packed)
        )


@cache
def _matrix_layout(num_rows: int, num_cols: int, itemsize: int) -> PackedLayout:
    return PackedLayout(num_rows, num_cols, num_cols * itemsize, 1, 64, torch.float16)
