"""Which kernels compute from slots, and why."""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch

from moe_offload.errors import FormatError
from moe_offload.quant.slot_kernels.base import SlotKernels
from moe_offload.quant.slot_kernels.plain import PlainKernels
from moe_offload.quant.slot_kernels.slot_mlp import SlotMlp

if TYPE_CHECKING:
    from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

_OLDEST_CAPABILITY = (7, 5)


class Choice(NamedTuple):
    """The kernels for one layer's experts on one device, and the reason in a sentence."""

    kernels: SlotKernels
    reason: str


def slot_kernels(device: torch.device, mlp: SlotMlp) -> Choice:
    """The fastest kernels that run on ``device`` and can read ``mlp``; those of one device are the same object."""
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    obstacle = triton_obstacle(device)
    if obstacle is None:
        kernels = _triton_kernels(device)
        try:
            kernels.check(mlp)
        except FormatError as error:
            obstacle = str(error)
        else:
            return Choice(kernels, f"Triton kernels on {torch.cuda.get_device_name(device)}")
    if device.type == "cuda":
        from moe_offload.quant.slot_kernels import bitsandbytes_kernels

        if bitsandbytes_kernels.takes(mlp):
            return Choice(bitsandbytes_kernels.BitsandbytesKernels(), f"bitsandbytes' 4-bit kernels: {obstacle}")
    return Choice(PlainKernels(), f"plain torch: {obstacle}")


def device_kernels(device: torch.device) -> str:
    """What computes experts on ``device``, in a phrase for people."""
    obstacle = triton_obstacle(device)
    return "Triton" if obstacle is None else f"bitsandbytes or plain torch ({obstacle})"


@cache
def triton_obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on ``device``; None if they can, as one that was tried did."""
    if device.type != "cuda":
        return f"Triton's kernels need an Nvidia GPU, the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST_CAPABILITY:
        oldest, this = (".".join(map(str, version)) for version in (_OLDEST_CAPABILITY, capability))
        return f"Triton's kernels need compute capability {oldest}, {torch.cuda.get_device_name(device)} has {this}"
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, or triton-windows on Windows)"
    try:
        _triton_kernels(device).try_out()
    except Exception as error:  # compiling needs a C compiler, Python's headers and a driver that fits
        return f"Triton could not build a kernel: {type(error).__name__}: {error}".splitlines()[0]
    return None


@cache
def _triton_kernels(device: torch.device) -> "TritonKernels":
    from moe_offload.quant.slot_kernels.triton_kernels import TritonKernels

    return TritonKernels(device)
