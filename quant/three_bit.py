"""The three-bit format nf3: each group of 32 weights picks the best of sixteen tables of eight values."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.quant import kernels, reference
from moe_offload.quant.base import ErrorBound
from moe_offload.quant.blocked import BlockedFormat
from moe_offload.quant.codes import NF3_TABLES, NF3_UNIT
from moe_offload.quant.layout import PackedLayout, ceil_div, matrix_shape

GROUP = 32  # weights that share a table
UNIT = 64  # codes that are packed together: 16 bytes of low bits, 8 bytes of high bits
_UNIT_BYTES = 24


@dataclass(frozen=True)
class ThreeBitFormat(BlockedFormat):
    """An fp16 scale for each row, near the row's root mean square, and four bits of table for each 32 weights.

    A row is its codes, 24 bytes for each 64, then a byte for each 64 with the number of the first half's table in its
    low and of the second half's in its high four bits.
    """

    @property
    def code(self) -> int:
        return kernels.CODES["nf3"]

    @property
    def error_bound(self) -> ErrorBound:
        # tables are picked for a whole group: beside many small weights one large one may be rounded far
        return ErrorBound(of_block_max=0.75, absolute=2**-18)

    def bits_per_weight(self) -> float:
        return 3 + 8 / UNIT

    def _make_layout(self, shape: tuple[int, ...]) -> PackedLayout:
        num_rows, num_cols = matrix_shape(shape, self.spec)
        row_bytes = ceil_div(num_cols, UNIT) * (_UNIT_BYTES + 1)
        return PackedLayout(num_rows, num_cols, row_bytes, 1, max(1, num_cols), torch.float16)

    def quantize_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        num_cols = weight.shape[1]
        groups = torch.unflatten(F.pad(weight, (0, -num_cols % UNIT)), 1, (-1, GROUP))
        is_weight = (torch.arange(groups[0].numel() if len(groups) else 0) < num_cols).view(groups.shape[1:])
        codes, tables, scales = reference.quantize_nf3_rows(groups, is_weight.to(weight.device), num_cols)
        packed_tables = tables[:, 0::2] | tables[:, 1::2] << 4
        packed_codes = reference.pack_three_bits(torch.unflatten(codes.flatten(1), 1, (-1, UNIT)))
        return torch.cat((packed_codes.flatten(1), packed_tables), dim=1), scales[:, None][:, :num_cols]

    def codes_to_float(self, codes: Tensor) -> Tensor:
        num_units = codes.shape[1] // (_UNIT_BYTES + 1)
        packed_codes, packed_tables = codes[:, : num_units * _UNIT_BYTES], codes[:, num_units * _UNIT_BYTES :]
        indices = reference.unpack_three_bits(torch.unflatten(packed_codes, 1, (-1, _UNIT_BYTES))).int()
        tables = torch.stack((packed_tables & 15, packed_tables >> 4), dim=-1).int().repeat_interleave(GROUP, dim=-1)
        values = torch.tensor(NF3_TABLES, dtype=torch.float32, device=codes.device) / NF3_UNIT
        return values.flatten()[tables * 8 + indices].flatten(1)


NF3 = ThreeBitFormat("nf3")
