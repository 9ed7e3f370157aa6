"""Importers keep a quantised checkpoint's own numbers: equal to what transformers and bitsandbytes make of them."""

import bitsandbytes.functional as bnb
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moe_offload.errors import FormatError
from moe_offload.quant import get_format
from moe_offload.quant.imported import import_bnb4, import_fp8, import_mxfp4


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "num_groups"), [(5, 1), (3, 3), (16, 90)])
def test_mxfp4_equals_transformers(num_rows, num_groups, dtype):
    blocks = torch.randint(0, 256, (num_rows, num_groups, 16), dtype=torch.uint8, generator=rng())
    scales = torch.randint(90, 160, (num_rows, num_groups), dtype=torch.uint8, generator=rng(1))
    spec, packed = import_mxfp4(blocks, scales)
    shape = (num_rows, num_groups * 32)
    assert spec == "mxfp4"
    assert packed.numel() == get_format(spec).nbytes(shape)
    # transformers holds experts [E, K, N]
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=dtype)[0].T
    assert torch.equal(get_format(spec).dequantize(packed, shape, dtype), expected)


def test_mxfp4_equals_transformers_at_the_ends_of_the_exponent():
    blocks = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    scales = torch.tensor([0, 1, 2, 24, 100, 251, 252, 253], dtype=torch.uint8).expand(2, 8).contiguous()
    spec, packed = import_mxfp4(blocks, scales)
    expected = convert_moe_packed_tensors(blocks[None], scales[None], dtype=torch.float32)[0].T
    ours = get_format(spec).dequantize(packed, (2, 256), torch.float32)
    assert torch.equal(ours[:, 32:], expected[:, 32:])
    # 2**-127 is below fp32's normal numbers, where torch's own ldexp may flush: the exact value is the one to keep
    codes = torch.arange(256)[:16]
    exact = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64) * 2**-127
    assert torch.equal(ours[0, 0:32:2].double(), exact[codes % 16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "block"), [((256, 384), (128, 128)), ((64, 96), (16, 32)), ((32, 48), (32, 48)), ((6, 7), (2, 7))]
)
def test_fp8_equals_transformers(shape, block, dtype):
    weight = (torch.randn(shape, generator=rng()) * 100).to(torch.float8_e4m3fn)
    scales = torch.rand(shape[0] // block[0], shape[1] // block[1], generator=rng(1))
    spec, packed = import_fp8(weight, scales, block)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)
    assert torch.equal(get_format(spec).dequantize(packed, shape, dtype), expected)


def test_fp8_blocks_that_do_not_divide_the_shape():
    weight = torch.randn((200, 300), generator=rng()).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3, generator=rng(1))
    spec, packed = import_fp8(weight, scales, (128, 128))
    full = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    assert spec == "fp8"
    assert torch.equal(get_format(spec).dequantize(packed, (200, 300), torch.float32), weight.float() * full)


def test_fp8_takes_scales_of_any_float_dtype():
    weight = torch.randn((4, 4), generator=rng()).to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120, 127], [130, 0]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    for scales in (exponents, exponents.float().to(torch.bfloat16)):
        _, packed = import_fp8(weight, scales, (2, 2))
        expected = weight.float() * exponents.float().repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(get_format("fp8-2x2").dequantize(packed, (4, 4), torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_bnb_equals_bitsandbytes(block, quant_type, nested, dtype):
    shape = (3, 2 * block)
    weight = torch.randn(shape, generator=rng()).to(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=quant_type, compress_statistics=nested)
    expected = bnb.dequantize_4bit(codes, state)
    absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    spec, packed = import_bnb4(codes, absmax, block, quant_type, shape)
    assert spec == f"bnb-{quant_type}-{block}"
    assert torch.equal(get_format(spec).dequantize(packed, shape, dtype), expected)


def test_refusals_say_what_is_wrong():
    blocks, scales = torch.zeros(2, 3, 16, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)
    with pytest.raises(FormatError, match=r"\[N, K/32, 16\]"):
        import_mxfp4(blocks, scales[:, :2])
    with pytest.raises(FormatError, match="NaN"):
        import_mxfp4(blocks, torch.full_like(scales, 255))
    weight = torch.zeros(4, 4).to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match=r"\[2, 2\] scales"):
        import_fp8(weight, torch.ones(2, 1), (2, 2))
    with pytest.raises(FormatError, match="NaN"):
        import_fp8(weight, torch.tensor([[float("nan")]]), (4, 4))
    with pytest.raises(FormatError, match="NaN"):
        import_fp8(torch.full((4, 4), float("nan")).to(torch.float8_e4m3fn), torch.ones(1, 1), (4, 4))
    codes, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(FormatError, match="multiple of 64"):
        import_bnb4(codes, absmax, 64, "nf4", (4, 32))
    with pytest.raises(FormatError, match="scales"):
        import_bnb4(codes, absmax[:1], 64, "nf4", (2, 64))
    with pytest.raises(FormatError, match="un-nested"):
        import_bnb4(codes, absmax.byte(), 64, "nf4", (2, 64))
    with pytest.raises(FormatError, match="no blocks of 63"):
        import_bnb4(codes, absmax, 63, "nf4", (2, 64))
