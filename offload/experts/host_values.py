"""A few numbers of a device, brought to the host: what a step waits for in each layer."""

from collections.abc import Sequence

import torch


def to_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same on the host, by a single copy: every copy waits for all that was launched before it.

    Whole numbers up to 2**53 and numbers of at most 64 bits come as they are. Tensors may be on several devices.
    """
    device = tensors[0].device
    if device.type == "cpu":
        return list(tensors)
    here = [each if each.device == device else each.to(device, non_blocking=True) for each in tensors]
    # A double holds any id and any weight as it is.
    flat = torch.cat([tensor.reshape(-1).double() for tensor in here]).cpu()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.to(tensor.dtype).view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
