"""How fast the link to the device and its memory are, measured in the process whose run they are the bound of."""

import time
from collections.abc import Callable

import torch

_COPY_BYTES = 256 << 20
_PASSES = 5


def link_rates(device: torch.device, num_bytes: int = _COPY_BYTES) -> dict[str, float]:
    """Bytes a second from page-locked memory to the device, and out of the device's own memory; best of a few passes.

    On the CPU, where the benchmark only shows that it runs, both are copies in RAM.
    """
    is_cuda = device.type == "cuda"
    host = torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_cuda)
    target, source = torch.empty_like(host, device=device), torch.ones_like(host, device=device)

    def best_s(copy: Callable[[], object]) -> float:
        times = []
        for _ in range(_PASSES + 1):
            if is_cuda:
                torch.cuda.synchronize(device)
            begin_s = time.perf_counter()
            copy()
            if is_cuda:
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin_s)
        return min(times[1:])

    return {
        "host_to_device_bytes_per_s": num_bytes / best_s(lambda: target.copy_(host, non_blocking=True)),
        # a copy within the device reads every byte and writes it
        "device_bytes_per_s": 2 * num_bytes / best_s(lambda: target.copy_(source)),
    }
