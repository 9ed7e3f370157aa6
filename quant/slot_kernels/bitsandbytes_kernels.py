"""Slot kernels for decode by bitsandbytes' product of a 4-bit matrix with a vector, where Triton cannot run."""

from dataclasses import dataclass

import bitsandbytes  # noqa: F401  (defines the operators below)
import torch
from torch import Tensor

from moe_offload.quant import reference
from moe_offload.quant.codes import BNB_FP4_TABLE, NF4_TABLE
from moe_offload.quant.four_bit import FourBitFormat
from moe_offload.quant.slot_kernels.plain import PlainKernels, with_biases
from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp, SlotPart


def takes(mlp: SlotMlp) -> bool:
    """Whether all matrices have bitsandbytes' codes."""
    return all(
        isinstance(part.format, FourBitFormat) and part.format.table in (NF4_TABLE, BNB_FP4_TABLE)
        for part in (*mlp.up, mlp.down)
    )


@dataclass(frozen=True)
class BitsandbytesKernels(PlainKernels):
    """Single rows by bitsandbytes, for experts that it `takes`; many rows in plain torch."""

    name: str = "bitsandbytes"

    def expert_output(self, mlp: SlotMlp, slot: Tensor, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return super().expert_output(mlp, slot, x)
        return with_biases(mlp, slot, x, _matrix_vector)


def _matrix_vector(part: SlotPart, slot: Tensor, x: Tensor) -> Tensor:
    """``x [1, K] @ W.T``. A byte's codes are neighbours to bitsandbytes, the higher first: x is put in that order."""
    weight_format, packed = part.format, part.packed(slot)
    assert isinstance(weight_format, FourBitFormat)
    layout, width = weight_format.layout(part.shape), weight_format.interleave // 2
    x = torch.nn.functional.pad(x, (0, 2 * layout.row_bytes - x.shape[1]))
    ordered = x.view(-1, 2, width).flip(1).transpose(1, 2).reshape(1, -1)
    scales = reference.scale_to_float(layout.scales(packed)).flatten()
    codes, shape = layout.codes(packed).reshape(-1, 1), [layout.num_rows, 2 * layout.row_bytes]
    return _gemv(ordered, codes, shape, scales, weight_format.table.to(x.device), weight_format.group_size)


def _gemv(x: Tensor, codes: Tensor, shape: list[int], scales: Tensor, table: Tensor, block: int) -> Tensor:
    product: Tensor = torch.ops.bitsandbytes.gemv_4bit(x, codes, shape, scales, table, block)
    return product
