"""Weights that a checkpoint holds quantised already, repacked with their own codes and scales, bit for bit.

Each importer returns the canonical spec of a format and the packed bytes for it. What the packed weight dequantises to
is exactly what transformers and bitsandbytes make of the source; their layout differs from ours, not their numbers.
"""

import torch
from torch import Tensor

from moe_offload.errors import FormatError
from moe_offload.quant import reference
from moe_offload.quant.codes import E8M0_NAN
from moe_offload.quant.eight_bit import fp8_format
from moe_offload.quant.four_bit import MXFP4, bnb_format
from moe_offload.quant.layout import PackedLayout

_E4M3_NAN = 0x7F


def import_mxfp4(blocks: Tensor, scales: Tensor) -> tuple[str, Tensor]:
    """gpt-oss: uint8 ``blocks`` [N, K/32, 16], low nibble first, and e8m0 ``scales`` [N, K/32] -> mxfp4 [N, K]."""
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise FormatError(f"mxfp4 blocks and scales are uint8, got {blocks.dtype} and {scales.dtype}")
    if blocks.dim() != 3 or blocks.shape[2] != 16 or blocks.shape[:2] != scales.shape:
        raise FormatError(
            f"mxfp4 blocks are [N, K/32, 16] with scales [N, K/32], got {list(blocks.shape)} and {list(scales.shape)}"
        )
    if bool((scales == E8M0_NAN).any()):
        raise FormatError("an mxfp4 scale is NaN (255); check the checkpoint")
    num_rows, num_groups, _ = blocks.shape
    layout = MXFP4.layout((num_rows, num_groups * 32))
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(1)
    return MXFP4.spec, _assemble(layout, reference.pack_nibbles(codes, MXFP4.interleave), scales)


def import_fp8(weight: Tensor, weight_scale_inv: Tensor, block: tuple[int, int]) -> tuple[str, Tensor]:
    """DeepSeek: float8_e4m3fn [N, K], one scale for each ``block`` = (bn, bk) of it -> fp8 [N, K].

    Scales are multiplied with, whatever "inv" says; any float dtype (e8m0 included) is held exactly in fp32.
    """
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2:
        raise FormatError(f"block fp8 weights are float8_e4m3fn [N, K], got {weight.dtype} {list(weight.shape)}")
    packed_format = fp8_format(*block)
    layout = packed_format.layout(tuple(weight.shape))
    if tuple(weight_scale_inv.shape) != layout.scale_shape:
        raise FormatError(
            f"a {list(weight.shape)} weight in blocks of {block[0]}x{block[1]} has {list(layout.scale_shape)} scales, "
            f"got {list(weight_scale_inv.shape)}"
        )
    codes = weight.contiguous().view(torch.uint8)
    scales = weight_scale_inv.float()
    if bool(((codes & 127) == _E4M3_NAN).any()) or not bool(torch.isfinite(scales).all()):
        raise reference.nonfinite_error()
    return packed_format.spec, _assemble(layout, codes, scales)


def import_bnb4(
    codes: Tensor, absmax: Tensor, block: int, quant_type: str, shape: tuple[int, int]
) -> tuple[str, Tensor]:
    """bitsandbytes: uint8 ``codes``, high nibble first, and fp32 ``absmax`` (no longer nested) -> bnb-* [N, K]."""
    if quant_type not in ("nf4", "fp4"):
        raise FormatError(f"bitsandbytes packs nf4 or fp4, got {quant_type!r}")
    packed_format = bnb_format(quant_type, block)
    layout = packed_format.layout(shape)
    num_scales = layout.scale_shape[0] * layout.scale_shape[1]
    if codes.dtype != torch.uint8 or codes.numel() != layout.codes_bytes or absmax.numel() != num_scales:
        raise FormatError(
            f"a {list(shape)} weight in blocks of {block} has {layout.codes_bytes} bytes of codes and {num_scales} "
            f"scales, got {codes.numel()} of {codes.dtype} and {absmax.numel()}"
        )
    if absmax.dtype != torch.float32:
        raise FormatError(f"absmax must be un-nested to fp32 first, got {absmax.dtype}")
    if not bool(torch.isfinite(absmax).all()):
        raise reference.nonfinite_error()
    ordered = torch.stack((codes.reshape(-1) >> 4, codes.reshape(-1) & 15), dim=-1).view(shape)
    packed_codes = reference.pack_nibbles(ordered, packed_format.interleave)
    return packed_format.spec, _assemble(layout, packed_codes, absmax.view(layout.scale_shape))


def _assemble(layout: PackedLayout, codes: Tensor, scales: Tensor) -> Tensor:
    packed = layout.empty()
    layout.codes(packed).copy_(codes.reshape(layout.num_rows, layout.row_bytes))
    layout.scales(packed).copy_(scales)
    return packed
