"""An expert's MLP as Triton kernels are told it."""

from typing import NamedTuple

from moe_offload.errors import FormatError
from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp, SlotPart
from moe_offload.quant.slot_kernels.triton_activation import GateFunction, gate_function
from moe_offload.quant.slot_kernels.triton_weight import PackedBias, PackedWeight, packed_bias, packed_weight


class PackedMlp(NamedTuple):
    """Its weights, gates and ups apart, and the parts that these are in. Without a gate, both are the same."""

    gate: PackedWeight
    up: PackedWeight
    down: PackedWeight
    gate_bias: PackedBias
    up_bias: PackedBias
    down_bias: PackedBias
    activation: GateFunction
    gate_part: SlotPart
    up_part: SlotPart


def packed_mlp(mlp: SlotMlp, converts_fp8: bool = False) -> PackedMlp:
    """`FormatError`, saying why, for one that the kernels cannot read; see `packed_weight`."""
    first, last, inner = mlp.up[0], mlp.up[-1], mlp.inner_size
    gate, up = packed_weight(first, converts_fp8), packed_weight(last, converts_fp8)
    bias = packed_bias(mlp.up_bias)
    gate_bias = up_bias = bias
    if len(mlp.up) == 2 and mlp.activation.gating == "halves" and first.shape == last.shape:
        gate_bias, up_bias = bias.rows(0, 1, inner), bias.rows(inner, 1, inner)
    elif len(mlp.up) != 1:
        raise FormatError(f"the first product's rows are split in {len(mlp.up)} at other places than gate and up")
    elif mlp.activation.gating == "halves":
        gate, up = gate.rows(0, 1, inner), up.rows(inner, 1, inner)
        gate_bias, up_bias = bias.rows(0, 1, inner), bias.rows(inner, 1, inner)
    elif mlp.activation.gating == "interleaved":
        gate, up = gate.rows(0, 2, inner), up.rows(1, 2, inner)
        gate_bias, up_bias = bias.rows(0, 2, inner), bias.rows(1, 2, inner)
    down, down_bias = packed_weight(mlp.down, converts_fp8), packed_bias(mlp.down_bias)
    return PackedMlp(gate, up, down, gate_bias, up_bias, down_bias, gate_function(mlp.activation), first, last)
