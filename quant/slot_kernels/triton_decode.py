"""A layer of a decode step in two launches: products of packed rows with single rows of activations.

A program is one warp: it multiplies a few rows of one expert's weight with one row of x. Numbers of a table are then
exchanged between the lanes of the warp, and nothing waits at a barrier.
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
def _load_x(x, first, STEP: tl.constexpr, W: tl.constexpr, PLANE: tl.constexpr):
    """A plane's columns of a row, fp32 ``[1, units, plane width]``; zero beyond the last."""
    units, within = first + tl.arange(0, STEP), plane_start(W, PLANE) + tl.arange(0, W.plane_width)
    columns = units[:, None] * W.unit + within[None, :]
    if W.num_cols % (STEP * W.unit) == 0:
        return tl.load(x + columns).to(tl.float32)[None, :, :]
    else:
        return tl.load(x + columns, mask=columns < W.num_cols, other=0.0).to(tl.float32)[None, :, :]


@triton.jit
def _add_units(sums, slot, table, x, rows, first, ROWS: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr):
    """``sums [rows, units]`` and the products of some units, those of a unit added up before they are scaled."""
    WIDTH: tl.constexpr = W.plane_width
    terms = tl.zeros([ROWS, STEP, WIDTH], dtype=tl.float32)
    for plane in tl.static_range(W.unit // W.plane_width):
        terms += plane_values(slot, table, rows, first, ROWS, STEP, W, plane) * _load_x(x, first, STEP, W, plane)
    if W.scale_kind == 0:
        return sums + tl.sum(terms, axis=2)
    else:
        return sums + tl.sum(terms, axis=2) * unit_scales(slot, rows, first, ROWS, STEP, W)


@triton.jit
def _products(slot, table, x, rows, ROWS: tl.constexpr, STEP: tl.constexpr, W: tl.constexpr):
    """Rows of a weight times x, fp32 ``[rows]``."""
    sums = tl.zeros([ROWS, STEP], dtype=tl.float32)
    for first in range(0, W.num_units, STEP):
        sums = _add_units(sums, slot, table, x, rows, first, ROWS, STEP, W)
    return tl.sum(sums, axis=1)


@triton.jit
def _gate_and_up(
    slot, gate_table, up_table, x, index, ROWS: tl.constexpr, STEP: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr
):
    gate_rows, up_rows = weight_rows(index, ROWS, GATE), weight_rows(index, ROWS, UP)
    if GATE.unit == UP.unit and GATE.plane_width == UP.plane_width:
        gate_sums = tl.zeros([ROWS, STEP], dtype=tl.float32)
        up_sums = tl.zeros([ROWS, STEP], dtype=tl.float32)
        for first in range(0, GATE.num_units, STEP):
            gate_sums = _add_units(gate_sums, slot, gate_table, x, gate_rows, first, ROWS, STEP, GATE)
            up_sums = _add_units(up_sums, slot, up_table, x, up_rows, first, ROWS, STEP, UP)
        return tl.sum(gate_sums, axis=1), tl.sum(up_sums, axis=1)
    else:
        return _products(slot, gate_table, x, gate_rows, ROWS, STEP, GATE), _products(
            slot, up_table, x, up_rows, ROWS, STEP, UP
        )


# Where slots of a batch begin must not choose another kernel, whose sums may run in another order.
@triton.jit(do_not_specialize_on_alignment=["slots"])
def decode_up(
    slab,
    slots,
    gate_table,
    up_table,
    x,
    hidden,
    SLOT_BYTES: tl.constexpr,
    TOP_K: tl.constexpr,
    INNER: tl.constexpr,
    GATE: tl.constexpr,
    UP: tl.constexpr,
    GATE_BIAS: tl.constexpr,
    UP_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``hidden [R * K, INNER]``; program (pair, block of ``ROWS`` inner rows). Without a gate ``UP`` is not read."""
    pair = tl.program_id(0)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot_idx = tl.load(slots + pair)
    if slot_idx >= 0:
        slot = slab + slot_idx.to(tl.int64) * SLOT_BYTES
        row = x + (pair // TOP_K) * GATE.num_cols
        gate_values = load_table(gate_table, GATE)
        if ACTIVATION.has_gate:
            gate, up = _gate_and_up(slot, gate_values, load_table(up_table, UP), row, index, ROWS, STEP, GATE, UP)
            gate += bias_values(slot, index, GATE_BIAS)
            result = gated(gate, up + bias_values(slot, index, UP_BIAS), ACTIVATION)
        else:
            gate = _products(slot, gate_values, row, weight_rows(index, ROWS, GATE), ROWS, STEP, GATE)
            result = activate(gate + bias_values(slot, index, GATE_BIAS), ACTIVATION)
        tl.store(hidden + pair * INNER + index, result, mask=index < INNER)


@triton.jit
def _weighted_sum(outputs, slots, weights, first_pair, index, TOP_K: tl.constexpr, OUTPUT: tl.constexpr):
    """In order of k; one rounding a term, wherever it is compiled into."""
    total = tl.zeros(index.shape, dtype=tl.float32)
    for k in range(TOP_K):
        pair = first_pair + k
        is_here = tl.load(slots + pair) >= 0
        # written by other programs of the same launch: not from a cache that they do not write to
        term = tl.load(
            outputs + pair * OUTPUT + index, mask=(index < OUTPUT) & is_here, other=0.0, cache_modifier=".cg"
        )
        weight = tl.broadcast_to(tl.load(weights + pair), index.shape)
        total = tl.where(is_here, tl.fma(weight, term, total), total)
    return total


@triton.jit(
    do_not_specialize=["sums"], do_not_specialize_on_alignment=["slots", "outputs", "weights", "result", "counters"]
)
def decode_down(
    slab,
    slots,
    table,
    hidden,
    outputs,
    weights,
    result,
    counters,
    sums,
    SLOT_BYTES: tl.constexpr,
    TOP_K: tl.constexpr,
    OUTPUT: tl.constexpr,
    DOWN: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    """``outputs [R * K, OUTPUT]`` from ``hidden``; program (pair, block of ``ROWS`` output rows).

    If ``sums``, the last program of a row and block to be done also writes their weighted sum to ``result``, by
    ``counters [R, blocks]``, which are zero before and after. It is a plain number, not compiled in: there is one
    kernel, so that outputs have the same bits with and without.
    """
    pair = tl.program_id(0)
    index = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    slot_idx = tl.load(slots + pair)
    if slot_idx >= 0:
        slot = slab + slot_idx.to(tl.int64) * SLOT_BYTES
        row = hidden + pair * DOWN.num_cols
        output = _products(slot, load_table(table, DOWN), row, weight_rows(index, ROWS, DOWN), ROWS, STEP, DOWN)
        output += bias_values(slot, index, BIAS)
        tl.store(outputs + pair * OUTPUT + index, output, mask=index < OUTPUT)
    if sums != 0:
        token = pair // TOP_K
        counter = counters + token * tl.num_programs(1) + tl.program_id(1)
        tl.debug_barrier()  # the whole program has stored before it is counted
        num_done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if num_done == TOP_K - 1:
            total = _weighted_sum(outputs, slots, weights, token * TOP_K, index, TOP_K, OUTPUT)
            tl.store(result + token * OUTPUT + index, total.to(result.dtype.element_ty), mask=index < OUTPUT)
            tl.store(counter, 0)


@triton.jit
def combine_outputs(outputs, slots, weights, result, TOP_K: tl.constexpr, OUTPUT: tl.constexpr, BLOCK: tl.constexpr):
    """``result [R, OUTPUT]``; program (row, block of columns)."""
    token = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = _weighted_sum(outputs, slots, weights, token * TOP_K, index, TOP_K, OUTPUT)
    tl.store(result + token * OUTPUT + index, total.to(result.dtype.element_ty), mask=index < OUTPUT)
