"""Slot kernels of the plain kind that can be recorded: the recorder sees one operation, as it would see a kernel."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from moe_offload.quant.slot_kernels import SlotMlp
from moe_offload.quant.slot_kernels.choice import Choice
from moe_offload.quant.slot_kernels.plain import PlainKernels

_mlps: list[SlotMlp] = []


@torch.library.custom_op("moe_offload_tests::decode_layer", mutates_args=("result",))
def _decode_layer(slab: Tensor, slots: Tensor, x: Tensor, weights: Tensor, result: Tensor, mlp: int) -> None:
    PlainKernels().decode_layer(_mlps[mlp], slab, slots, x, weights, result)


@dataclass(frozen=True)
class RecordedKernels(PlainKernels):
    name: str = field(default="recorded")
    reads_slots: ClassVar[bool] = False

    def decode_layer(
        self, mlp: SlotMlp, slab: Tensor, slots: Tensor, x: Tensor, weights: Tensor, result: Tensor
    ) -> None:
        if mlp not in _mlps:
            _mlps.append(mlp)
        _decode_layer(slab, slots, x, weights, result, _mlps.index(mlp))


def recorded_kernels(device: torch.device, mlp: SlotMlp) -> Choice:
    return Choice(RecordedKernels(), "a test records it")
