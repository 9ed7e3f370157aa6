"""nf4 is bitsandbytes' nf4 up to the rounding of its scale; bnb-* formats are bitsandbytes' own bits."""

import bitsandbytes.functional as bnb
import pytest
import torch

from moe_offload.quant import get_format, kernels, reference
from moe_offload.quant.codes import BNB_FP4_TABLE, NF4_TABLE

SHAPE = (37, 512)


@pytest.fixture(params=kernels.available())
def backend(request):
    with kernels.forced(request.param):
        yield request.param


def weights(dtype: torch.dtype) -> torch.Tensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[0], weight[1, ::2], weight[2] = 0, 1, weight[2] * 1e-30
    return weight.to(dtype)


def bnb_codes(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=-1).view(SHAPE)


@pytest.mark.parametrize(("table", "name"), [(NF4_TABLE, "nf4"), (BNB_FP4_TABLE, "fp4")])
def test_tables_are_the_same(table, name):
    assert torch.equal(torch.tensor(table.values), bnb.get_4bit_type(name, device="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_has_the_same_codes_and_rounded_scales(dtype, backend):
    weight = weights(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    nf4 = get_format("nf4")
    layout = nf4.layout(SHAPE)
    packed = nf4.quantize(weight)
    assert torch.equal(reference.unpack_nibbles(layout.codes(packed), 64), bnb_codes(codes))
    assert torch.equal(layout.scales(packed).view(-1), state.absmax.to(torch.float16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [32, 64, 128, 512])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bnb_formats_quantise_to_the_same_bits(name, block, dtype, backend):
    weight = weights(dtype)
    codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=name)
    fmt = get_format(f"bnb-{name}-{block}")
    layout = fmt.layout(SHAPE)
    packed = fmt.quantize(weight)
    assert torch.equal(reference.unpack_nibbles(layout.codes(packed), fmt.interleave), bnb_codes(codes))
    assert torch.equal(layout.scales(packed).view(-1), state.absmax)
    assert torch.equal(fmt.dequantize(packed, SHAPE, dtype), bnb.dequantize_4bit(codes, state))
