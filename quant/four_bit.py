"""Four-bit formats: a table of sixteen values, two codes a byte."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant import kernels, reference
from moe_offload.quant.base import ErrorBound
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.codes import BNB_FP4_TABLE, E2M1_TABLE, INT4_TABLE, NF4_TABLE, CodeTable
from moe_offload.quant.layout import PackedLayout, ceil_div, matrix_shape

# bitsandbytes' own choice; CPU kernels take whole interleaved groups of 32 or 64 codes
BNB_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_INTERLEAVE = 64

_ERROR_BOUNDS = {
    # half the widest gap of the table, and what rounding the scale to fp16 (or below its smallest number) adds
    ("nf4", torch.float16): ErrorBound(of_block_max=0.1520 + 2**-11, absolute=2**-25),
    # bitsandbytes scales a block below 1e-38 as if it reached that
    ("nf4", torch.float32): ErrorBound(of_block_max=0.1520, absolute=1e-38),
    ("fp4", torch.float32): ErrorBound(of_block_max=1 / 6, absolute=1e-38),
    # the side opposite to the extreme ends at 7 of 8 steps
    ("int4", torch.float16): ErrorBound(of_block_max=1 / 8 + 2**-11, absolute=2**-22),
    # an extreme just below the next power of two saturates at 6 of 8
    ("e2m1", torch.uint8): ErrorBound(of_block_max=1 / 4, absolute=2**-129),
}


@dataclass(frozen=True)
class FourBitFormat(BlockedFormat):
    """``group_size`` weights of a row share a scale; within min(64, group_size) codes, the halves share bytes."""

    table: CodeTable
    group_size: int
    scale_dtype: torch.dtype
    pads_rows: bool

    @property
    def code(self) -> int:
        return kernels.CODES[self.table.name]

    @property
    def interleave(self) -> int:
        return min(_INTERLEAVE, self.group_size)

    @property
    def error_bound(self) -> ErrorBound:
        return _ERROR_BOUNDS[self.table.name, self.scale_dtype]

    def bits_per_weight(self) -> float:
        return 4 + 8 * self.scale_dtype.itemsize / self.group_size

    def _make_layout(self, shape: tuple[int, ...]) -> PackedLayout:
        num_rows, num_cols = matrix_shape(shape, self.spec)
        if not self.pads_rows and num_cols % self.group_size:
            raise FormatError(
                f"{self.spec} holds rows of a multiple of {self.group_size} weights, got {num_cols}; use nf4, "
                "which pads rows"
            )
        row_bytes = ceil_div(num_cols, self.group_size) * self.group_size // 2
        return PackedLayout(num_rows, num_cols, row_bytes, 1, self.group_size, self.scale_dtype)

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        num_cols = weight.shape[1]
        groups = torch.unflatten(F.pad(weight, (0, -num_cols % self.group_size)), 1, (-1, self.group_size))
        codes, scales = self._quantize_blocks(groups)
        return reference.pack_nibbles(codes.flatten(1), self.interleave), scales

    def _quantize_blocks(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is INT4_TABLE:
            return reference.quantize_int4_blocks(groups)
        if self.table is E2M1_TABLE:
            return reference.quantize_mxfp4_blocks(groups, self.table)
        return reference.quantize_table_blocks(groups, self.table, self.scale_dtype)

    def codes_to_float(self, codes: Tensor) -> Tensor:
        return self.table.to(codes.device)[reference.unpack_nibbles(codes, self.interleave).int()]


NF4 = FourBitFormat("nf4", NF4_TABLE, 64, torch.float16, True)
INT4 = FourBitFormat("int4", INT4_TABLE, 64, torch.float16, True)
MXFP4 = FourBitFormat("mxfp4", E2M1_TABLE, 32, torch.uint8, True)


def bnb_format(kind: str, block: int) -> FourBitFormat:
    """The bits of a bitsandbytes 4-bit weight: fp32 scales, blocks that do not cross rows."""
    if block not in BNB_BLOCKS:
        raise FormatError(f"bitsandbytes has no blocks of {block} weights; it has {', '.join(map(str, BNB_BLOCKS))}")
    table = NF4_TABLE if kind == "nf4" else BNB_FP4_TABLE
    return FourBitFormat(f"bnb-{kind}-{block}", table, block, torch.float32, False)
