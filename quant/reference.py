"""Every format in plain torch: the truth that kernels are tested against, and what runs where no kernel was built.

Works on any device. A *block* is the [..., size] weights that share a scale; arithmetic is fp32 throughout.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moe_offload.errors import FormatError
from moe_offload.quant.codes import E2M1_MAX_EXPONENT, E4M3_MAX, E8M0_BIAS, FP16_MAX, CodeTable

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
