"""The view of an expert in the bytes of a slot."""

import pytest
import torch
from torch.nn.functional import linear

from moe_offload.errors import PackCorruptError
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts, PartLayout
from moe_offload.offload.pack.manifest import LayerLayout, PartSpec
from moe_offload.quant import get_format
from moe_offload.quant.activation import Activation


def test_pieces_of_a_parameter_are_stacked_by_rows():
    gate, up, bias = torch.randn(5, 64), torch.randn(3, 64), torch.randn(8)
    parts = [("gate_up_proj#0", gate, "fp32"), ("gate_up_proj#1", up, "fp32"), ("gate_up_proj_bias", bias, "fp32")]
    layout = LayerLayout.of(
        "experts", 1, [(n, tuple(w.shape), f, get_format(f).nbytes(tuple(w.shape))) for n, w, f in parts]
    )
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    for part, (_, weight, name) in zip(layout.parts, parts, strict=True):
        slot[part.offset_bytes : part.offset_bytes + part.size_bytes] = get_format(name).quantize(weight)
    weights = ExpertWeights(PartLayout(layout.parts), slot)
    x = torch.randn(2, 64)
    torch.testing.assert_close(weights.linear("gate_up_proj", x), linear(x, torch.cat([gate, up])))
    assert torch.equal(weights.tensor("gate_up_proj_bias", torch.float32), bias)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (PartSpec("w", (4, 64), "nf4", 0, 64), "takes"),
        (PartSpec("w", (4, 64), "nf5", 0, 192), "nf5"),
    ],
)
def test_a_part_of_another_size_than_its_format_gives_is_refused(part, message):
    with pytest.raises(PackCorruptError, match=message):
        PartLayout([part])


def test_an_mlp_is_told_to_kernels_by_its_parts():
    shapes = {"up#0": (8, 64), "up#1": (8, 64), "down": (64, 8), "down#1": (64, 8), "up_bias": (16,)}
    parts, end = [], 0
    for name, shape in shapes.items():
        parts.append(PartSpec(name, shape, "bf16", end, get_format("bf16").nbytes(shape)))
        end += parts[-1].size_bytes
    activation = Activation("sigmoid")
    mlp = PartLayout(parts[:3] + parts[4:]).slot_mlp(MlpParts(("up",), "down", activation, "up_bias"))
    assert mlp is not None
    assert [part.offset_bytes for part in mlp.up] == [0, 1024]
    assert (mlp.down.offset_bytes, mlp.up_bias.offset_bytes) == (2048, 4096)
    assert mlp.down_bias is None
    assert PartLayout(parts).slot_mlp(MlpParts(("up",), "down", activation)) is None
    assert PartLayout(parts[:3]).slot_mlp(MlpParts(("down",), "down", activation)) is None
