"""Weights of more than 2^31 numbers: where a row is must not be computed in 32 bits."""

import mmap

import pytest
import torch
from torch import Tensor

from moe_offload.quant import get_format, kernels
from moe_offload.quant.step import LinearCall
from moe_offload.quant.step_weights import RawWeight

NUM_ROWS, NUM_COLS = 70_001, 32_768

pytestmark = pytest.mark.skipif(kernels.available() == ("torch",), reason="no kernels were built")


@pytest.fixture
def untouched() -> Tensor:
    """Zeros that take no memory as long as they are only read."""
    memory = mmap.mmap(-1, 2 * NUM_ROWS * NUM_COLS, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.uint8)


@pytest.mark.parametrize("num_tokens", [1, 25])
def test_packed(untouched: Tensor, num_tokens: int):
    fmt = get_format("int4")
    layout, of_last = fmt.layout((NUM_ROWS, NUM_COLS)), fmt.layout((1, NUM_COLS))
    packed, last = untouched[: layout.total_bytes], fmt.quantize(torch.randn(1, NUM_COLS))
    layout.codes(packed)[-1], layout.scales(packed)[-1] = of_last.codes(last)[0], of_last.scales(last)[0]
    x = torch.randn(num_tokens, NUM_COLS).bfloat16()
    product = fmt.linear(x, packed, (NUM_ROWS, NUM_COLS))
    assert torch.equal(product[:, -1:], fmt.linear(x, last, (1, NUM_COLS)))
    assert not product[:, :-1].any()
    row = torch.empty(1, NUM_COLS)
    kernels.dequantize(packed, layout, fmt.code, slice(NUM_ROWS - 1, NUM_ROWS), row)
    assert torch.equal(row, fmt.dequantize(last, (1, NUM_COLS), torch.float32))


def test_raw(untouched: Tensor):
    weight = untouched.view(torch.bfloat16).view(NUM_ROWS, NUM_COLS)
    weight[-1] = torch.randn(NUM_COLS)
    x = torch.randn(1, NUM_COLS)
    product = LinearCall(RawWeight(weight))(x)
    torch.testing.assert_close(product[:, -1], x @ weight[-1].float(), rtol=1e-3, atol=1e-2)
    assert not product[:, :-1].any()
