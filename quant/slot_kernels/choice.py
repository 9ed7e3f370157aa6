"""Which kernels compute from slots, and why."""

from typing import NamedTuple

import torch

from moe_offload.quant.slot_kernels.base import SlotKernels
from moe_offload.quant.slot_kernels.plain import PlainKernels
from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp


class Choice(NamedTuple):
    """The kernels for one layer's experts on one device, and the reason in a sentence."""

    kernels: SlotKernels
    reason: str


def slot_kernels(device: torch.device, mlp: SlotMlp) -> Choice:
    """The fastest kernels that run on ``device`` and can read ``mlp``."""
    return Choice(PlainKernels(), f"{device.type} has no kernels of its own")
