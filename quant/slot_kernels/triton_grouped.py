"""Many rows in two launches: rows sorted by expert, times packed weights that are dequantised on the way.

A program has a tile of rows of one expert and some rows of its weight. It finds its expert itself, so that the host
need not know how many rows each has.
"""

import triton
import triton.language as tl

from moe_offload.quant.slot_kernels.triton_activation import activate, gated
from moe_offload.quant.slot_kernels.triton_weight import (
    bias_values,
    load_table,
    plane_start,
    plane_values,
    unit_scales,
    weight_rows,
)


@triton.jit
def _find_tile(offsets, num_groups, tile, BLOCK_M: tl.constexpr, GROUPS: tl.constexpr):
    """The group of a tile, its first row and the end of the group's rows; a group too far if there is no such tile."""
    group = tl.arange(0, GROUPS)
    begin = tl.load(offsets + group, mask=group < num_groups, other=0)
    end = tl.load(offsets + group + 1, mask=group < num_groups, other=0)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    is_before = tl.cumsum(tiles, 0) <= tile
    found = tl.sum(is_before.to(tl.int32), 0)
    tile_in_group = tile - tl.sum(tl.where(is_before, tiles, 0), 0)
    here = tl.minimum(found, num_groups - 1)
    return found, tl.load(offsets + here) + tile_in_group * BLOCK_M, tl.load(offsets + here + 1)


@triton.jit
def _add_product(
    total,
    slot,
    table,
    x,
    rows,
    first,
    plane: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
    W: tl.constexpr,
):
    """``total [BLOCK_M, BLOCK_N]`` and one plane's part of x times the weight, in the dtype of x."""
    values = plane_values(slot, table, rows, first, BLOCK_N, STEP, W, plane)
    if W.scale_kind != 0:
        values *= unit_scales(slot, rows, first, BLOCK_N, STEP, W)[:, :, None]
    weight = tl.reshape(values.to(x.dtype), [BLOCK_N, STEP * W.plane_width])
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit
def _load_x(x_rows, first, plane: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr, DTYPE: tl.constexpr):
    """Columns of a plane, of rows by their addresses ``[BLOCK_M, 1]``."""
    # not the reshaped columns of a tile: that they lie side by side would be forgotten, and all loads be single
    column = tl.arange(0, STEP * W.plane_width)
    units = first + column // W.plane_width
    columns = (units * W.unit + (plane_start(W, plane) + column % W.plane_width))[None, :]
    if W.num_cols % (STEP * W.unit) == 0:
        return tl.load(x_rows + columns).to(DTYPE)
    else:
        return tl.load(x_rows + columns, mask=columns < W.num_cols, other=0.0).to(DTYPE)


@triton.jit
def _product(
    slot,
    table,
    x_rows,
    rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    W: tl.constexpr,
    DTYPE: tl.constexpr,
):
    STEP: tl.constexpr = BLOCK_K // W.plane_width if W.plane_width <= BLOCK_K else 1
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for first in range(0, W.num_units, STEP):
        for plane in tl.static_range(W.unit // W.plane_width):
            x = _load_x(x_rows, first, plane, STEP, W, DTYPE)
            total = _add_product(total, slot, table, x, rows, first, plane, BLOCK_N, STEP, W)
    return total


@triton.jit
def _gate_and_up(
    slot,
    gate_table,
    up_table,
    x_rows,
    gate_rows,
    up_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Both products in one loop, over x that is loaded once, where their columns come in the same order."""
    if GATE.unit == UP.unit and GATE.plane_width == UP.plane_width:
        STEP: tl.constexpr = BLOCK_K // GATE.plane_width if GATE.plane_width <= BLOCK_K else 1
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(0, GATE.num_units, STEP):
            for plane in tl.static_range(GATE.unit // GATE.plane_width):
                x = _load_x(x_rows, first, plane, STEP, GATE, DTYPE)
                gate = _add_product(gate, slot, gate_table, x, gate_rows, first, plane, BLOCK_N, STEP, GATE)
                up = _add_product(up, slot, up_table, x, up_rows, first, plane, BLOCK_N, STEP, UP)
        return gate, up
    else:
        gate = _product(slot, gate_table, x_rows, gate_rows, BLOCK_M, BLOCK_N, BLOCK_K, GATE, DTYPE)
        up = _product(slot, up_table, x_rows, up_rows, BLOCK_M, BLOCK_N, BLOCK_K, UP, DTYPE)
        return gate, up


@triton.jit
def grouped_up(
    slab,
    slots,
    offsets,
    num_groups,
    gate_table,
    up_table,
    x,
    x_rows,
    hidden,
    SLOT_BYTES: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``hidden [P, INNER]``, in the order of ``x_rows``; program (tile of rows, block of ``BLOCK_N`` inner rows)."""
    group, begin, end = _find_tile(offsets, num_groups, tl.program_id(0), BLOCK_M, GROUPS)
    slot_idx = tl.load(slots + group, mask=group < num_groups, other=-1)
    if slot_idx >= 0:
        slot = slab + slot_idx.to(tl.int64) * SLOT_BYTES
        index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        pairs = begin + tl.arange(0, BLOCK_M)
        rows_of_x = tl.load(x_rows + pairs, mask=pairs < end, other=0).to(tl.int64)
        addresses = x + rows_of_x[:, None] * GATE.num_cols
        gate_values = load_table(gate_table, GATE)
        gate_rows = weight_rows(index, BLOCK_N, GATE)
        if ACTIVATION.has_gate:
            up_values = load_table(up_table, UP)
            up_rows = weight_rows(index, BLOCK_N, UP)
            gate, up = _gate_and_up(
                slot, gate_values, up_values, addresses, gate_rows, up_rows, BLOCK_M, BLOCK_N, BLOCK_K, GATE, UP, DTYPE
            )
            gate += bias_values(slot, index, GATE_BIAS)[None, :]
            result = gated(gate, up + bias_values(slot, index, UP_BIAS)[None, :], ACTIVATION)
        else:
            gate = _product(slot, gate_values, addresses, gate_rows, BLOCK_M, BLOCK_N, BLOCK_K, GATE, DTYPE)
            result = activate(gate + bias_values(slot, index, GATE_BIAS)[None, :], ACTIVATION)
        place = hidden + pairs.to(tl.int64)[:, None] * INNER + index[None, :]
        is_result = (pairs < end)[:, None] & (index < INNER)[None, :]
        tl.store(place, result.to(hidden.dtype.element_ty), mask=is_result)


@triton.jit
def grouped_down(
    slab,
    slots,
    offsets,
    num_groups,
    table,
    hidden,
    outputs,
    out_rows,
    SLOT_BYTES: tl.constexpr,
    OUTPUT: tl.constexpr,
    DOWN: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows ``out_rows`` of ``outputs [.., OUTPUT]``; program (tile of rows, block of ``BLOCK_N`` output rows)."""
    group, begin, end = _find_tile(offsets, num_groups, tl.program_id(0), BLOCK_M, GROUPS)
    slot_idx = tl.load(slots + group, mask=group < num_groups, other=-1)
    if slot_idx >= 0:
        slot = slab + slot_idx.to(tl.int64) * SLOT_BYTES
        index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        pairs = begin + tl.arange(0, BLOCK_M)
        addresses = hidden + tl.minimum(pairs, end - 1).to(tl.int64)[:, None] * DOWN.num_cols
        rows = weight_rows(index, BLOCK_N, DOWN)
        result = _product(slot, load_table(table, DOWN), addresses, rows, BLOCK_M, BLOCK_N, BLOCK_K, DOWN, DTYPE)
        result += bias_values(slot, index, BIAS)[None, :]
        rows_of_outputs = tl.load(out_rows + pairs, mask=pairs < end, other=0).to(tl.int64)
        is_result = (pairs < end)[:, None] & (index < OUTPUT)[None, :]
        place = outputs + rows_of_outputs[:, None] * OUTPUT + index[None, :]
        tl.store(place, result.to(outputs.dtype.element_ty), mask=is_result)
