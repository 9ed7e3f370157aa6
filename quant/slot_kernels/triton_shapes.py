"""How work is cut into programs: by shape alone, never by timing, since the order of sums depends on it."""

from typing import NamedTuple

import torch

from moe_offload.quant.slot_kernels.triton_mlp import PackedMlp
from moe_offload.quant.slot_kernels.triton_weight import NF3, PackedWeight, unit_bytes

# A warp reads so much of a row at a time: sixteen bytes a lane.
_CHUNK_BYTES = 512
# Enough programs of one warp to keep a large device busy.
_ENOUGH_PROGRAMS = 1024
# Triton multiplies matrices by matrix units from here on.
_AMPERE = (8, 0)


class DecodeShape(NamedTuple):
    """Rows of the weight that a program multiplies, and units of columns that it takes at a time."""

    rows: int
    step: int


def decode_shape(weight: PackedWeight, top_k: int) -> DecodeShape:
    step = 1
    while 2 * step * unit_bytes(weight) <= _CHUNK_BYTES:
        step *= 2
    while step > 1 and step // 2 >= weight.num_units:
        step //= 2
    rows = 8 if weight.num_units % step == 0 else 4  # what is beyond the last column takes registers too
    if weight.kind == NF3.value:
        rows = min(rows, 4)  # each with a table in registers
    while rows > 2 and -(-weight.num_rows // rows) * top_k < _ENOUGH_PROGRAMS:
        rows //= 2
    return DecodeShape(rows, step)


class GroupedShape(NamedTuple):
    """Tiles of rows of x, of rows of the weight (twice as many where there is a gate), and columns of a product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def grouped_shape(mlp: PackedMlp, num_tokens: int, dtype: torch.dtype, capability: tuple[int, int]) -> GroupedShape:
    """By the rows of the whole call, not by those of an expert, which depend on what else is here."""
    if dtype == torch.float32 or capability < _AMPERE or any(weight.kind == NF3.value for weight in mlp[:3]):
        return GroupedShape(32, 32, 16, 4, 1)  # without matrix units a lane holds all columns of a product
    if num_tokens <= 64:
        return GroupedShape(16, 64, 64, 4, 3)
    if num_tokens <= 512:
        return GroupedShape(32, 64, 64, 4, 3)
    return GroupedShape(128, 64, 64, 8, 3)
