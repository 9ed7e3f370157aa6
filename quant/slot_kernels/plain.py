"""Slot kernels in plain torch, on any device: what the others are tested against, and what runs without them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp, SlotPart

Linear = Callable[[SlotPart, Tensor, Tensor], Tensor]
"""A matrix, the slot it lies in, and rows ``x [T, K]``, to ``x @ W.T``."""


@dataclass(frozen=True)
class PlainKernels:
    """Each pair on its own with the formats' own ``linear``; numbers of slots are read on the host."""

    name: str = "torch"
    reads_slots: ClassVar[bool] = True

    def decode_experts(self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, outputs: Tensor) -> None:
        for row, row_slots in enumerate(slots.tolist()):
            for k, slot in enumerate(row_slots):
                if slot >= 0:
                    outputs[row, k] = self.expert_output(mlp, slab[slot], x[row : row + 1].float())[0]

    def decode_layer(
        self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, weights: Tensor, result: Tensor
    ) -> None:
        outputs = torch.empty(*slots.shape, mlp.output_size, device=x.device)
        self.decode_experts(mlp, slab, slots, x, outputs)
        self.combine(outputs, slots, weights, result)

    def combine(self, outputs: Tensor, slots: Tensor, weights: Tensor, result: Tensor) -> None:
        total = torch.zeros(result.shape, device=result.device)
        for k in range(slots.shape[1]):
            term = weights[:, k, None] * outputs[:, k]
            total = torch.where(slots[:, k, None] >= 0, total + term, total)
        result.copy_(total)

    def grouped_experts(
        self,
        mlp: SlotMlp,
        slab: Tensor,
        slots: Tensor,
        offsets: Tensor,
        x: Tensor,
        x_rows: Tensor,
        outputs: Tensor,
        out_rows: Tensor,
    ) -> None:
        ends = offsets.tolist()
        for slot, begin, end in zip(slots.tolist(), ends, ends[1:], strict=False):
            if slot >= 0 and begin < end:
                y = self.expert_output(mlp, slab[slot], x[x_rows[begin:end]])
                outputs[out_rows[begin:end]] = y.to(outputs.dtype)

    def expert_output(self, mlp: SlotMlp, slot: Tensor, x: Tensor) -> Tensor:
        """One expert's MLP, from the bytes of its slot: ``x [T, in]`` to ``[T, H]`` in the dtype of x."""
        return with_biases(mlp, slot, x, _linear)


def with_biases(mlp: SlotMlp, slot: Tensor, x: Tensor, linear: Linear) -> Tensor:
    """One expert's MLP, ``x [T, in]`` to ``[T, H]`` in the dtype of x, by whatever multiplies with its matrices."""
    hidden = [linear(part, slot, x) for part in mlp.up]
    inner = torch.cat(hidden, dim=1) if len(hidden) > 1 else hidden[0]
    if mlp.up_bias is not None:
        inner = inner + mlp.up_bias.vector(slot).to(inner.dtype)
    output = linear(mlp.down, slot, mlp.activation(inner))
    if mlp.down_bias is not None:
        output = output + mlp.down_bias.vector(slot).to(output.dtype)
    return output


def _linear(part: SlotPart, slot: Tensor, x: Tensor) -> Tensor:
    return part.format.linear(x, part.packed(slot), (part.shape[0], part.shape[1]))
