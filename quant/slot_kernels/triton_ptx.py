"""What Triton has no words for, in PTX: tables that lie in registers, and loads that take the layout of what is near.

`PTX ISA <https://docs.nvidia.com/cuda/parallel-thread-execution/>`_: ``shfl.sync``, ``prmt``. Triton's interpreter does
not know PTX; for tests, `tests/interpreted_ptx.py` carries these very texts out.
"""

import triton
import triton.language as tl

# Of the five bits of a lane that a shuffle is told, it looks at the low four, and stays in its half of the warp: what
# lies above a code in its word need not be cut off.
_HALF_WARP = "0x101f, 0xffffffff"
_TABLE_OF_LANE = tl.constexpr(
    """{
    .reg .b32 lane;
    .reg .b64 place;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 place, lane, 4, $1;
    ld.global.nc.b32 $0, [place];
    }"""
)
_HALVES = tl.constexpr(
    """{
    .reg .b16 low;
    .reg .b16 high;
    mov.b32 {low, high}, $2;
    cvt.f32.f16 $0, low;
    cvt.f32.f16 $1, high;
    }"""
)


def _lookup(first_bit: int) -> tl.constexpr:
    """Four bytes in a word, $4, and the lane's part of the table, $5, to what stands at ``first_bit`` of each."""
    lines = [f"shfl.sync.idx.b32 $0, $5, $4, {_HALF_WARP};"] if first_bit == 0 else []
    for byte in range(len(lines), 4):
        lines += [f"shr.u32 code, $4, {8 * byte + first_bit};", f"shfl.sync.idx.b32 ${byte}, $5, code, {_HALF_WARP};"]
    return tl.constexpr("\n    ".join(["{", ".reg .b32 code;", *lines, "}"]))


_LOW_NIBBLES, _HIGH_NIBBLES = _lookup(0), _lookup(4)


@triton.jit
def table_of_lanes(table):
    """A table of sixteen fp32 in one register: that of lane ``n`` holds entry ``n % 16``."""
    return tl.inline_asm_elementwise(
        _TABLE_OF_LANE, "=f,l", [table.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def nibble_values(packed, table, HIGH: tl.constexpr):
    """fp32 of the low or the high four bits of ``uint8 packed``, by a table of `table_of_lanes`."""
    return tl.inline_asm_elementwise(
        _HIGH_NIBBLES if HIGH else _LOW_NIBBLES,
        "=f,=f,=f,=f,r,f,f,f,f",
        [packed, table],
        dtype=tl.float32,
        is_pure=True,
        pack=4,
    )


@triton.jit
def permute_bytes(low, high, selectors):
    """int32 of those of the eight bytes of ``low`` and ``high`` that the low four nibbles of ``selectors`` name."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def halves(pairs):
    """fp32 of the fp16 in the low and in the high bits of int32."""
    return tl.inline_asm_elementwise(_HALVES, "=f,=f,r", [pairs], dtype=(tl.float32, tl.float32), is_pure=True, pack=1)


@triton.jit
def load_four(place):
    """The four int32 at each of ``place``, multiples of 16 bytes, which nobody writes to."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [place.to(tl.int64)],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_word(place):
    """The int32 at each of ``place``, multiples of four bytes; in no layout of its own, as `tl.load` would have one."""
    return tl.inline_asm_elementwise(
        "ld.global.b32 $0, [$1];", "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def load_byte(place):
    """int32 of the byte at each of ``place``, as `load_word`."""
    return tl.inline_asm_elementwise(
        "ld.global.u8 $0, [$1];", "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )
