"""Experts computed from the packed slots of a slab: a whole layer of a decode step, or a prompt's rows by expert."""

from moe_offload.quant.slot_kernels.base import SlotKernels
from moe_offload.quant.slot_kernels.choice import slot_kernels
from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp, SlotPart

__all__ = ["SlotKernels", "SlotMlp", "SlotPart", "slot_kernels"]
