"""Where the codes and scales of a packed weight lie: all codes, then at the next multiple of 64 bytes all scales."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_offload.errors import FormatError

ALIGNMENT_BYTES = 64


def align_up(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def ceil_div(count: int, size: int) -> int:
    return -(-count // size)


@dataclass(frozen=True)
class PackedLayout:
    """Byte layout of one packed [N, K] weight with one scale for each ``block_rows`` x ``block_cols`` weights.

    Codes are row-major, ``row_bytes`` a row; scales [ceil(N / block_rows), ceil(K / block_cols)] are ``scale_dtype``.
    """

    num_rows: int
    num_cols: int
    row_bytes: int
    block_rows: int
    block_cols: int
    scale_dtype: torch.dtype

    @property
    def codes_bytes(self) -> int:
        return self.num_rows * self.row_bytes

    @property
    def scale_shape(self) -> tuple[int, int]:
        return ceil_div(self.num_rows, self.block_rows), ceil_div(self.num_cols, self.block_cols)

    @cached_property
    def scales_offset_bytes(self) -> int:
        return align_up(self.codes_bytes)

    @cached_property
    def scales_bytes(self) -> int:
        rows, cols = self.scale_shape
        return rows * cols * self.scale_dtype.itemsize

    @cached_property
    def total_bytes(self) -> int:
        return self.scales_offset_bytes + align_up(self.scales_bytes)

    def empty(self) -> Tensor:
        """Room for the packed weight; the gaps between sections are zero so that equal weights give equal bytes."""
        packed = torch.empty(self.total_bytes, dtype=torch.uint8)
        packed[self.codes_bytes : self.scales_offset_bytes] = 0
        packed[self.scales_offset_bytes + self.scales_bytes :] = 0
        return packed

    def codes(self, packed: Tensor) -> Tensor:
        """The code bytes as a view [N, row_bytes]."""
        return packed[: self.codes_bytes].view(self.num_rows, self.row_bytes)

    def scales(self, packed: Tensor) -> Tensor:
        """The scales as a view of their own dtype."""
        section = packed[self.scales_offset_bytes : self.scales_offset_bytes + self.scales_bytes]
        return section.view(self.scale_dtype).view(self.scale_shape)

    def check(self, packed: Tensor, spec: str) -> None:
        if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != self.total_bytes:
            raise FormatError(
                f"a [{self.num_rows}, {self.num_cols}] weight packed as {spec} is {self.total_bytes} bytes of uint8, "
                f"got {packed.dtype} {list(packed.shape)}; slice the slot to Format.nbytes(shape)"
            )
        if not packed.is_contiguous():
            raise FormatError(f"a weight packed as {spec} must be contiguous bytes; got stride {packed.stride()}")


def matrix_shape(shape: tuple[int, ...], spec: str) -> tuple[int, int]:
    """[N, K] of a weight that is packed row by row."""
    if len(shape) != 2:
        raise FormatError(f"{spec} packs [N, K] matrices, got shape {list(shape)}; keep this weight in bf16 or fp32")
    return shape[0], shape[1]
