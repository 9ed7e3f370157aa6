"""Eight-bit formats: int8 by groups of a row, fp8 (e4m3fn) by blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant import kernels, reference
from moe_offload.quant.base import ErrorBound
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.layout import PackedLayout, ceil_div, matrix_shape


@dataclass(frozen=True)
class Int8Format(BlockedFormat):
    """Symmetric int8 with an fp16 scale for each group of a row; rows are padded to whole groups."""

    group_size: int

    @property
    def code(self) -> int:
        return kernels.CODES["int8"]

    @property
    def error_bound(self) -> ErrorBound:
        return ErrorBound(of_block_max=(1 + 2**-10) / 254, absolute=2**-18)

    def bits_per_weight(self) -> float:
        return 8 + 16 / self.group_size

    def _make_layout(self, shape: tuple[int, ...]) -> PackedLayout:
        num_rows, num_cols = matrix_shape(shape, self.spec)
        row_bytes = ceil_div(num_cols, self.group_size) * self.group_size
        return PackedLayout(num_rows, num_cols, row_bytes, 1, self.group_size, torch.float16)

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        groups = torch.unflatten(F.pad(weight, (0, -weight.shape[1] % self.group_size)), 1, (-1, self.group_size))
        codes, scales = reference.quantize_int8_blocks(groups)
        return codes.flatten(1), scales

    def codes_to_float(self, codes: Tensor) -> Tensor:
        return codes.view(torch.int8).float()


@dataclass(frozen=True)
class Fp8Format(BlockedFormat):
    """e4m3fn with an fp32 scale for each ``block_rows`` x ``block_cols`` weights; rows are not padded."""

    block_rows: int
    block_cols: int

    @property
    def code(self) -> int:
        return kernels.CODES["e4m3"]

    @property
    def error_bound(self) -> ErrorBound:
        # half a step of three mantissa bits; below e4m3's normal numbers half of its smallest step, 2**-9
        return ErrorBound(of_weight=2**-4, of_block_max=2**-10 / 448, absolute=2**-140)

    def bits_per_weight(self) -> float:
        return 8 + 32 / (self.block_rows * self.block_cols)

    def _make_layout(self, shape: tuple[int, ...]) -> PackedLayout:
        num_rows, num_cols = matrix_shape(shape, self.spec)
        return PackedLayout(num_rows, num_cols, num_cols, self.block_rows, self.block_cols, torch.float32)

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, num_cols = weight.shape
        bn, bk = self.block_rows, self.block_cols
        padded = F.pad(weight, (0, -num_cols % bk, 0, -num_rows % bn))
        blocks = padded.view(-(-num_rows // bn), bn, -1, bk).transpose(1, 2)  # [N/bn, K/bk, bn, bk]
        codes, scales = reference.quantize_fp8_blocks(blocks.flatten(2))
        codes = torch.unflatten(codes, 2, (bn, bk)).transpose(1, 2).flatten(2).flatten(0, 1)
        return codes[:num_rows, :num_cols], scales

    def codes_to_float(self, codes: Tensor) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()


INT8 = Int8Format("int8", 64)


def fp8_format(block_rows: int = 128, block_cols: int = 128) -> Fp8Format:
    if block_rows < 1 or block_cols < 1:
        raise FormatError(f"fp8 blocks have at least one row and column, got {block_rows}x{block_cols}")
    spec = "fp8" if (block_rows, block_cols) == (128, 128) else f"fp8-{block_rows}x{block_cols}"
    return Fp8Format(spec, block_rows, block_cols)
