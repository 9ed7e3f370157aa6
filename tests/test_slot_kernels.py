"""Experts computed from the slots of a slab, in plain torch; and how kernels are chosen."""

import math

import pytest
import torch
from slot_slabs import GPT_OSS, SILU, assert_near, random_slab

from moe_offload.errors import FormatError
from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation
from moe_offload.quant.slot_kernels import SlotMlp, SlotPart
from moe_offload.quant.slot_kernels.plain import PlainKernels

KERNELS = PlainKernels()
SLOTS = torch.tensor([[3, 0], [1, -1], [0, 2]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("spec", "activation", "bias"),
    [("nf4", SILU, None), ("mxfp4", GPT_OSS, "bf16"), ("int8", Activation("relu", "none"), "fp16")],
)
def test_outputs_of_few_rows(spec: str, activation: Activation, bias: str | None) -> None:
    slab = random_slab(spec, activation=activation, bias=bias)
    x, outputs = torch.randn(3, 128), torch.full((3, 2, 128), math.nan)
    KERNELS.decode_experts(slab.mlp, slab.data, SLOTS, x, outputs)
    for row, k in SLOTS.ge(0).nonzero().tolist():
        assert_near(outputs[row, k], slab.reference(int(SLOTS[row, k]), x[row]), 1e-3)
    assert outputs[1, 1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_that_come_one_by_one_sum_to_the_same_bits(dtype: torch.dtype) -> None:
    slab = random_slab("nf4")
    x, weights = torch.randn(3, 128).to(dtype), torch.rand(3, 2)
    whole, result = torch.empty(3, 128, dtype=dtype), torch.empty(3, 128, dtype=dtype)
    KERNELS.decode_layer(slab.mlp, slab.data, SLOTS, x, weights, whole)
    outputs = torch.full((3, 2, 128), math.nan)
    for slot in (2, 0, 3, 1):
        KERNELS.decode_experts(slab.mlp, slab.data, SLOTS.where(slot == SLOTS, -1), x, outputs)
    KERNELS.combine(outputs, SLOTS, weights, result)
    assert torch.equal(result, whole)


def test_many_rows_by_expert() -> None:
    slab = random_slab("nf4", activation=GPT_OSS, bias="bf16")
    x, outputs = torch.randn(5, 128), torch.full((9, 128), math.nan)
    slots, offsets = torch.tensor([2, -1, 0, 1]), torch.tensor([0, 3, 5, 5, 8])
    x_rows, out_rows = torch.tensor([0, 4, 1, 2, 3, 3, 0, 2]), torch.tensor([8, 0, 1, 2, 3, 4, 5, 6])
    arguments = [tensor.int() for tensor in (slots, offsets, x_rows, out_rows)]
    KERNELS.grouped_experts(slab.mlp, slab.data, *arguments[:2], x, arguments[2], outputs, arguments[3])
    for slot, begin, end in ((2, 0, 3), (1, 5, 8)):
        assert_near(outputs[out_rows[begin:end]], slab.reference(slot, x[x_rows[begin:end]]), 1e-3)
    assert outputs[[2, 3, 7]].isnan().all()


def test_shapes_that_are_no_mlp_are_refused() -> None:
    nf4, bf16 = get_format("nf4"), get_format("bf16")
    up, down = SlotPart(nf4, (128, 64), 0), SlotPart(nf4, (64, 64), 8192)
    assert SlotMlp((up,), down, SILU).inner_size == 64
    with pytest.raises(FormatError, match="no MLP"):
        SlotMlp((up,), down, Activation("relu", "none"))
    with pytest.raises(FormatError, match="no MLP"):
        SlotMlp((up, SlotPart(nf4, (128, 32), 0)), down, SILU)
    with pytest.raises(FormatError, match="no MLP"):
        SlotMlp((up,), down, SILU, up_bias=SlotPart(bf16, (64,), 0))
    with pytest.raises(FormatError, match="no MLP"):
        SlotMlp((up,), down, SILU, down_bias=SlotPart(nf4, (64, 1), 0))
