"""A packed weight in units of columns, as Triton kernels read it: the numbers behind its codes, and its scales.

Columns come in *units*: those of one scale, or a part of them, whose bytes lie together. A unit has *planes*, sets of
columns whose codes are at the same bits: the low and the high halves of bytes for four-bit codes. The kernels' loops
are over units, and what they load is a tile ``[rows, units, plane width]``.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.errors import FormatError
from moe_offload.quant.eight_bit import Fp8Format, Int8Format
from moe_offload.quant.four_bit import FourBitFormat
from moe_offload.quant.raw import RawFormat
from moe_offload.quant.slot_kernels.slot_mlp import SlotPart
from moe_offload.quant.slot_kernels.triton_ptx import nibble_values, table_of_lanes
from moe_offload.quant.slot_kernels.triton_three_bit import three_bit_tables, three_bit_values
from moe_offload.quant.three_bit import ThreeBitFormat

TABLE = tl.constexpr(0)
INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
NF3 = tl.constexpr(3)
BF16 = tl.constexpr(4)
FP16 = tl.constexpr(5)
FP32 = tl.constexpr(6)
NATIVE_E4M3 = tl.constexpr(7)

SCALE_NONE = tl.constexpr(0)
SCALE_FP16 = tl.constexpr(1)
SCALE_FP32 = tl.constexpr(2)
SCALE_E8M0 = tl.constexpr(3)
SCALE_ROW = tl.constexpr(4)

_RAW = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
_SCALES = {torch.float16: SCALE_FP16, torch.float32: SCALE_FP32, torch.uint8: SCALE_E8M0}
_LARGEST_UNIT = 64
_LARGEST_PART_BYTES = (1 << 31) - 1  # places in a part are int32


class PackedWeight(NamedTuple):
    """Rows ``row_start + row_step * i`` of a packed matrix, for ``i`` below ``num_rows``; all of it compiled in."""

    kind: int
    codes_offset: int
    num_rows: int
    num_cols: int
    row_bytes: int
    row_start: int
    row_step: int
    unit: int
    plane_width: int
    num_units: int
    scale_kind: int
    scales_offset: int
    scales_per_row: int
    block_rows: int
    units_per_scale: int

    def rows(self, start: int, step: int, count: int) -> "PackedWeight":
        """Some of the rows."""
        return self._replace(row_start=start, row_step=step, num_rows=count)


class PackedBias(NamedTuple):
    """Elements ``start + step * i`` of a raw vector, for ``i`` below ``num_rows``; ``kind`` -1 for none."""

    kind: int
    offset: int
    num_rows: int
    start: int
    step: int

    def rows(self, start: int, step: int, count: int) -> "PackedBias":
        """Some of the elements."""
        return self._replace(start=start, step=step, num_rows=count)


def packed_bias(part: SlotPart | None) -> PackedBias:
    if part is None:
        return PackedBias(-1, 0, 0, 0, 1)
    return PackedBias(_RAW[part.format.spec].value, part.offset_bytes, part.shape[0], 0, 1)


def packed_weight(part: SlotPart, converts_fp8: bool = False) -> PackedWeight:
    """`FormatError` for a matrix that the kernels cannot read. ``converts_fp8``: the device has instructions for it."""
    weight_format, (num_rows, num_cols) = part.format, part.shape
    assert isinstance(weight_format, FourBitFormat | Int8Format | Fp8Format | ThreeBitFormat | RawFormat)
    layout = weight_format.layout(part.shape)
    unit = plane_width = _unit(layout.block_cols)
    scale_kind, units_per_scale = _SCALES[layout.scale_dtype], layout.block_cols // unit
    if isinstance(weight_format, FourBitFormat):
        kind, unit, units_per_scale = TABLE, weight_format.interleave, layout.block_cols // weight_format.interleave
        plane_width = unit // 2
    elif isinstance(weight_format, Int8Format):
        kind = INT8
    elif isinstance(weight_format, Fp8Format):
        kind = NATIVE_E4M3 if converts_fp8 else E4M3
        if unit < 16:
            raise FormatError(f"{weight_format.spec}: blocks of {layout.block_cols} columns are no multiple of 16")
    elif isinstance(weight_format, ThreeBitFormat):
        kind, unit, plane_width, units_per_scale, scale_kind = NF3, 64, 8, 1, SCALE_ROW
    else:
        kind, unit, plane_width, units_per_scale, scale_kind = _RAW[weight_format.spec], 64, 64, 1, SCALE_NONE
    if layout.codes_bytes > _LARGEST_PART_BYTES:
        raise FormatError(
            f"the kernels read weights of up to {_LARGEST_PART_BYTES} bytes, "
            f"{list(part.shape)} in {weight_format.spec} takes {layout.codes_bytes}"
        )
    return PackedWeight(
        kind.value,
        part.offset_bytes,
        num_rows,
        num_cols,
        layout.row_bytes,
        0,
        1,
        unit,
        plane_width,
        -(-num_cols // unit),
        scale_kind.value,
        part.offset_bytes + layout.scales_offset_bytes,
        layout.scale_shape[1],
        layout.block_rows,
        units_per_scale,
    )


def narrowed(weight: PackedWeight, width: int) -> PackedWeight:
    """The same in units of up to ``width`` columns, unless its codes are such that a unit has several planes."""
    if weight.plane_width != weight.unit or weight.unit <= width:
        return weight
    return weight._replace(
        unit=width,
        plane_width=width,
        num_units=-(-weight.num_cols // width),
        units_per_scale=weight.units_per_scale * weight.unit // width,
    )


def unit_bytes(weight: PackedWeight) -> int:
    """Bytes of the codes of a unit in a row."""
    return max(1, weight.row_bytes // weight.num_units)


def _unit(block_cols: int) -> int:
    """The largest power of two that divides the columns of a block, within limits."""
    return min(block_cols & -block_cols, _LARGEST_UNIT)


def value_table(part: SlotPart, device: torch.device) -> Tensor:
    """What `load_table` takes; for codes that need no table any."""
    return part.format.table.to(device) if isinstance(part.format, FourBitFormat) else three_bit_tables(device)


@triton.jit
def load_raw(numbers, place, mask, KIND: tl.constexpr):
    """fp32 of raw numbers; zero where ``mask`` is false."""
    if KIND == BF16:
        return tl.load(numbers.to(tl.pointer_type(tl.bfloat16)) + place, mask=mask, other=0.0).to(tl.float32)
    elif KIND == FP16:
        return tl.load(numbers.to(tl.pointer_type(tl.float16)) + place, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.load(numbers.to(tl.pointer_type(tl.float32)) + place, mask=mask, other=0.0)


@triton.jit
def load_table(pointer, W: tl.constexpr):
    """The table to hand to `plane_values`."""
    if W.kind == TABLE:
        return table_of_lanes(pointer)
    else:
        return pointer


@triton.jit
def weight_rows(index, ROWS: tl.constexpr, W: tl.constexpr):
    """Rows of the matrix by their numbers in the weight, in blocks of ``ROWS``; beyond the last the last again."""
    if W.num_rows % ROWS == 0:
        return W.row_start + W.row_step * index
    else:
        return W.row_start + W.row_step * tl.minimum(index, W.num_rows - 1)


@triton.jit
def weight_units(first, STEP: tl.constexpr, W: tl.constexpr):
    """``STEP`` units from ``first`` on; beyond the last the last again, which is multiplied by zeros."""
    units = first + tl.arange(0, STEP)
    if W.num_units % STEP == 0:
        return units
    else:
        return tl.minimum(units, W.num_units - 1)


@triton.jit
def plane_start(W: tl.constexpr, PLANE: tl.constexpr):
    """The first column of a plane within its unit."""
    if W.kind == NF3:
        return PLANE % 4 * 8 + PLANE // 4 * 32
    else:
        return PLANE * W.plane_width


@triton.jit
def plane_values(
    slot, table, rows, first, ROWS: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr, PLANE: tl.constexpr
):
    """The unscaled numbers ``[rows, units, plane width]`` in fp32; whatever is finite beyond the last column."""
    codes = slot + W.codes_offset + rows[:, None, None] * W.row_bytes
    unit = weight_units(first, STEP, W)[None, :, None]
    within = tl.arange(0, W.plane_width)[None, None, :]
    if W.kind == TABLE:
        return nibble_values(tl.load(codes + (unit * W.plane_width + within)), table, PLANE == 1)
    elif W.kind == INT8:
        packed = tl.load(codes + (unit * W.unit + within)).to(tl.int32)
        return (packed ^ 0x4B000080).to(tl.float32, bitcast=True) - 8388736.0
    elif W.kind == NF3:
        return three_bit_values(codes, table, unit, within, W, PLANE)
    else:
        # whole units in a row: one plane is all
        columns = (first * W.unit + tl.arange(0, STEP)[:, None] * W.unit + tl.arange(0, W.unit)[None, :])[None, :, :]
        if W.kind == E4M3 or W.kind == NATIVE_E4M3:
            if W.num_cols % (STEP * W.unit) == 0:
                packed = tl.load(codes + columns)
            else:
                packed = tl.load(codes + columns, mask=columns < W.num_cols, other=0)
            if W.kind == NATIVE_E4M3:
                return packed.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(tl.float32)
            packed = packed.to(tl.int32)
            # fp32 has the same bits, but its exponent's bias is 120 more
            bits = ((packed & 0x80) << 24) | ((packed & 0x7F) << 20)
            values = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
            return tl.where((packed & 0x7F) == 0x7F, float("nan"), values)
        else:
            return load_raw(
                slot + W.codes_offset, rows[:, None, None] * W.num_cols + columns, columns < W.num_cols, W.kind
            )


@triton.jit
def unit_scales(slot, rows, first, ROWS: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr):
    """fp32 ``[rows, units]``."""
    scales = slot + W.scales_offset
    if W.scale_kind == SCALE_ROW:
        scale = tl.load(scales.to(tl.pointer_type(tl.float16)) + rows).to(tl.float32)
        return tl.broadcast_to(scale[:, None], [ROWS, STEP])
    else:
        unit = weight_units(first, STEP, W)
        place = (rows // W.block_rows)[:, None] * W.scales_per_row + (unit // W.units_per_scale)[None, :]
        if W.scale_kind == SCALE_FP16:
            return tl.load(scales.to(tl.pointer_type(tl.float16)) + place).to(tl.float32)
        elif W.scale_kind == SCALE_FP32:
            return tl.load(scales.to(tl.pointer_type(tl.float32)) + place)
        else:
            # 2**(scale - 127) by its bits; the smallest lies below the normal numbers
            bits = tl.load(scales + place).to(tl.int32) << 23
            return tl.where(bits == 0, 1 << 22, bits).to(tl.float32, bitcast=True)


@triton.jit
def bias_values(slot, index, BIAS: tl.constexpr):
    """fp32, for rows by their numbers in the weight; zero beyond the last, and where there is no bias."""
    if BIAS.kind < 0:
        return tl.zeros(index.shape, dtype=tl.float32)
    else:
        return load_raw(slot + BIAS.offset, BIAS.start + BIAS.step * index, index < BIAS.num_rows, BIAS.kind)
