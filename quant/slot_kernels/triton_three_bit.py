"""The numbers behind the codes of nf3, four at a time, out of a table in registers.

`docs/pack-format.md` says where the bits are.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.quant.codes import NF3_TABLES, NF3_UNIT
from moe_offload.quant.slot_kernels.triton_ptx import halves, load_byte, load_four, load_word, permute_bytes

_UNIT_BYTES = tl.constexpr(24)


@functools.cache
def three_bit_tables(device: torch.device) -> Tensor:
    """``int32 [16, 4]``: of each table's eight numbers in fp16, which holds them all, the low bytes, then the high."""
    numbers = (torch.tensor(NF3_TABLES, dtype=torch.float32) / NF3_UNIT).half()
    return (
        numbers.view(torch.uint8).view(16, 8, 2).transpose(1, 2).contiguous().view(16, 16).view(torch.int32).to(device)
    )


@triton.jit
def _low_bits(unit_codes, within, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    """The byte with the low bits of codes ``within``, ``+ 8``, ``+ 16`` and ``+ 24`` of a half of a unit."""
    if ALIGNED:  # both halves at once, several of them a load
        both = tl.load(unit_codes.to(tl.pointer_type(tl.uint16)) + within).to(tl.int32)
        return (both >> (8 * HALF)) & 255
    else:
        return tl.load(unit_codes + (2 * within + HALF)).to(tl.int32)


@triton.jit
def _high_bits(unit_codes, HALF: tl.constexpr, ALIGNED: tl.constexpr):
    """The high bits of a half's codes, in their order."""
    place = unit_codes + (16 + 4 * HALF)
    if ALIGNED:
        return load_word(place)
    else:
        bits = load_byte(place)
        for byte in tl.static_range(1, 4):
            bits |= load_byte(place + byte) << (8 * byte)
        return bits


@triton.jit
def three_bit_values(row_codes, tables, unit, within, W: tl.constexpr, PLANE: tl.constexpr):
    """fp32 of a plane's codes, ``32 * (PLANE // 4) + 8 * (PLANE % 4) + within`` of ``unit``.

    What planes of a half share stands here for each of them, and is computed once.
    """
    half: tl.constexpr = PLANE // 4
    ALIGNED: tl.constexpr = W.row_bytes % 4 == 0
    unit_codes = row_codes + unit * _UNIT_BYTES
    numbers = load_byte(row_codes + (W.num_units * _UNIT_BYTES + unit))
    entries = load_four(tables + ((numbers >> (4 * half)) & 15) * 4)
    # the two low bits of four codes into four bytes, and a high bit to each
    low = _low_bits(unit_codes, within, half, ALIGNED)
    low = (low | (low << 12)) & 0x000F000F
    low = (low | (low << 6)) & 0x03030303
    high = (_high_bits(unit_codes, half, ALIGNED) >> within) & 0x01010101
    # a selector has four bits: those between two codes' select what is left out below
    selectors = (low | (high << 2)) >> (16 * (PLANE % 4 // 2))
    low_bytes = permute_bytes(entries[0], entries[1], selectors)
    high_bytes = permute_bytes(entries[2], entries[3], selectors)
    return halves(permute_bytes(low_bytes, high_bytes, 0x6240))[PLANE % 2]
