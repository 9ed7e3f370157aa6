"""An expert whose bytes are in host memory, lent to a copy."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from moe_offload.offload.tiers.device_queue import Event


class HostExpert(NamedTuple):
    """``data`` (``uint8 [slot_bytes]``) stays as it is until the event that `hold_until` is given is over.

    Whoever is handed one calls ``hold_until`` once; an event that was never recorded gives the memory back at once.
    """

    data: torch.Tensor
    hold_until: Callable[[Event], None]
