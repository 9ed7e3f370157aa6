"""Every format in plain torch: the truth that kernels are tested against, and what runs where no kernel was built.

Works on any device. A *block* is the [..., size] weights that share a scale; arithmetic is fp32 throughout.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant.codes import E2M1_MAX_EXPONENT, E4M3_MAX, E8M0_BIAS, FP16_MAX, NF3_TABLES, NF3_UNIT, CodeTable

# Scaled and coded blocks: quantisers map [..., size] fp32 to codes of that shape and scales [...].
BlockQuantizer = Callable[[Tensor], tuple[Tensor, Tensor]]


def check_finite(weight: Tensor) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise nonfinite_error()


def nonfinite_error() -> FormatError:
    return FormatError("the weight holds NaN or infinity, which no format can scale; check the checkpoint")


def overflow_error() -> FormatError:
    return FormatError(
        f"a scale exceeds fp16's largest number ({FP16_MAX:.0f}); keep this weight in bf16, mxfp4 or fp8, "
        "whose scales have more range"
    )


def _to_fp16_scale(scale: Tensor) -> Tensor:
    scale_fp16 = scale.to(torch.float16)
    if bool(torch.isinf(scale_fp16).any()):
        raise overflow_error()
    return scale_fp16


def _reciprocal(scale: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, 1.0 / torch.where(where, scale, torch.ones_like(scale)), torch.zeros_like(scale))


def quantize_table_blocks(blocks: Tensor, table: CodeTable, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Absolute-maximum scaling to [-1, 1] and the nearest code, operation for operation as bitsandbytes does it."""
    absmax = blocks.abs().amax(dim=-1)
    scaled = torch.clamp(blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(-1), -1, 1)
    bounds = torch.tensor(table.bounds, dtype=torch.float32, device=blocks.device)
    order = torch.tensor(table.order, dtype=torch.uint8, device=blocks.device)
    codes = order[torch.bucketize(scaled, bounds, out_int32=True)]
    return codes, _to_fp16_scale(absmax) if scale_dtype == torch.float16 else absmax


def quantize_int4_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """GGUF Q4_0: the scale is the signed extreme / -8, so that the extreme itself is held exactly."""
    high, low = blocks.amax(dim=-1), blocks.amin(dim=-1)
    scale = torch.where(high > -low, high, low) / -8
    scale_fp16 = _to_fp16_scale(scale)
    inverse = _reciprocal(scale, scale_fp16 != 0)
    codes = torch.clamp(torch.floor(blocks * inverse.unsqueeze(-1) + 8.5), 0, 15).to(torch.uint8)
    return codes, scale_fp16 + 0.0  # an all-zero block has scale 0, not -0


def quantize_int8_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric to [-127, 127] by the scale as stored, so that its rounding to fp16 costs nothing more."""
    scale_fp16 = _to_fp16_scale(blocks.abs().amax(dim=-1) / 127)
    scale = scale_fp16.float()
    inverse = _reciprocal(scale, scale != 0)
    codes = torch.clamp(torch.round(blocks * inverse.unsqueeze(-1)), -127, 127).to(torch.int8)
    return codes.view(torch.uint8), scale_fp16


def quantize_mxfp4_blocks(blocks: Tensor, table: CodeTable) -> tuple[Tensor, Tensor]:
    """OCP MX v1.0 §6.3: the shared exponent is the extreme's less e2m1's largest; beyond 6 saturates."""
    absmax = blocks.abs().amax(dim=-1)
    # frexp's mantissa is in [0.5, 1), so floor(log2) is its exponent less one; exact, also for subnormals
    exponent = torch.frexp(absmax).exponent - 1 - E2M1_MAX_EXPONENT + E8M0_BIAS
    scale = torch.where(absmax > 0, exponent, 0).clamp(min=0).to(torch.uint8)
    # 2**(127 - scale), by its bits: pow and ldexp may flush what lies below the normal numbers
    inverse = ((2 * E8M0_BIAS - scale.to(torch.int32)) << 23).view(torch.float32)
    scaled = blocks * inverse.unsqueeze(-1)
    bounds = torch.tensor(table.bounds, dtype=torch.float32, device=blocks.device)
    order = torch.tensor(table.order, dtype=torch.uint8, device=blocks.device)
    return order[torch.bucketize(scaled, bounds, out_int32=True)], scale


def quantize_fp8_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek's block scaling: the extreme becomes 448, e4m3fn's largest, rounding to nearest even."""
    scale = blocks.abs().amax(dim=-1) / E4M3_MAX
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).unsqueeze(-1)
    scaled = torch.clamp(blocks / divisor, -E4M3_MAX, E4M3_MAX)
    scaled = torch.where(scale.unsqueeze(-1) > 0, scaled, torch.zeros_like(scaled))
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scale


def _tree_sum(values: Tensor) -> Tensor:
    """Sums over the last dimension, padded to a power of two, by halves: an order that kernels repeat."""
    size = values.shape[-1]
    values = torch.nn.functional.pad(values, (0, (1 << max(0, size - 1).bit_length()) - size))
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _nearest_nf3(groups: Tensor, is_weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For [n, G, 32] and scales [n]: codes of that shape, the tables [n, G] of least squared error, and the values."""
    scaled = groups * _reciprocal(scale, scale != 0)[:, None, None]
    least = torch.full(groups.shape[:2], torch.inf, device=groups.device)
    tables = torch.zeros(groups.shape[:2], dtype=torch.uint8, device=groups.device)
    codes = torch.zeros(groups.shape, dtype=torch.uint8, device=groups.device)
    values = torch.zeros_like(groups)
    for number, table in enumerate(torch.tensor(NF3_TABLES, dtype=torch.float32, device=groups.device) / NF3_UNIT):
        nearest = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
        difference = torch.where(is_weight, scaled - table[nearest], 0)
        error = _tree_sum(difference * difference)
        better = error < least
        least = torch.where(better, error, least)
        tables = torch.where(better, number, tables)
        codes = torch.where(better[..., None], nearest.to(torch.uint8), codes)
        values = torch.where(better[..., None], table[nearest], values)
    return codes, tables, torch.where(is_weight, values, 0)


def quantize_nf3_rows(groups: Tensor, is_weight: Tensor, num_cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """[n, G, 32] padded groups -> codes, tables [n, G] and scales [n], by one step of alternating least squares.

    Tables are picked for rows scaled by their root mean square; the scale that fits those codes best picks them anew.
    """
    mean_square = _tree_sum(_tree_sum(groups * groups)) / max(1, num_cols)
    scale = _to_fp16_scale(mean_square.sqrt()).float()
    _, _, values = _nearest_nf3(groups, is_weight, scale)
    products, squares = _tree_sum(_tree_sum(groups * values)), _tree_sum(_tree_sum(values * values))
    fitted = torch.where((products > 0) & (squares > 0), products / squares, scale)
    scale_fp16 = _to_fp16_scale(fitted)
    codes, tables, _ = _nearest_nf3(groups, is_weight, scale_fp16.float())
    return codes, tables, scale_fp16


def pack_three_bits(codes: Tensor) -> Tensor:
    """[..., 64] codes to [..., 24] bytes: 16 of low pairs of bits, 8 of high bits.

    Byte 2w + h of the former holds the codes at 32h + w, + 8, + 16 and + 24, from its lowest bits; bit p of the latter,
    as a little-endian integer, belongs to code p.
    """
    pairs = torch.unflatten(codes & 3, -1, (2, 4, 8)).movedim(-3, -1)  # [..., 4, w, h]
    low = pairs[..., 0, :, :] | pairs[..., 1, :, :] << 2 | pairs[..., 2, :, :] << 4 | pairs[..., 3, :, :] << 6
    bits = torch.arange(8, dtype=torch.uint8, device=codes.device)
    high = (torch.unflatten(codes >> 2, -1, (8, 8)) << bits).sum(-1, dtype=torch.uint8)
    return torch.cat((low.flatten(-2), high), dim=-1)


def unpack_three_bits(packed: Tensor) -> Tensor:
    """The inverse of `pack_three_bits`."""
    low, high = packed[..., :16], packed[..., 16:]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    pairs = torch.unflatten(low, -1, (8, 2)).movedim(-1, -2)[..., None, :] >> shifts[:, None] & 3  # [..., h, 4, w]
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return pairs.flatten(-3) | ((high[..., None] >> bits & 1) << 2).flatten(-2)


def scale_to_float(scales: Tensor) -> Tensor:
    """Stored scales as fp32; uint8 ones are e8m0 exponents."""
    if scales.dtype == torch.uint8:
        # 2**(scale - 127), by its bits; the smallest lies below the normal numbers
        bits = scales.to(torch.int32) << 23
        return torch.where(bits == 0, 1 << 22, bits).view(torch.float32)
    return scales.float()


def pack_nibbles(codes: Tensor, interleave: int) -> Tensor:
    """[..., K] codes to [..., K / 2] bytes: byte j of a group holds code j low and code j + interleave / 2 high."""
    halves = torch.unflatten(codes, -1, (-1, 2, interleave // 2))
    return (halves[..., 0, :] | (halves[..., 1, :] << 4)).flatten(-2)


def unpack_nibbles(packed: Tensor, interleave: int) -> Tensor:
    """The inverse of `pack_nibbles`."""
    halves = torch.unflatten(packed, -1, (-1, interleave // 2))
    return torch.stack((halves & 15, halves >> 4), dim=-2).flatten(-3)


def linear(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """What every kernel must come close to: x @ weight.T in fp32, rounded once at the end."""
    return F.linear(x.float(), weight.float()).to(out_dtype or x.dtype)
