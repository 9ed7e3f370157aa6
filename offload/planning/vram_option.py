"""``--vram``: an amount for one device, or amounts for several."""

from collections.abc import Mapping

from moe_offload.errors import ConfigError

VramSize = str | int | Mapping[int, str | int]


def vram_by_device(vram: VramSize) -> dict[int, str | int] | None:
    """``{0: "10GiB", 1: "8GiB"}``, or "0=10GiB,1=8GiB", as the first; None for a single amount. `ConfigError`."""
    if isinstance(vram, Mapping):
        sizes = dict(vram)
    elif isinstance(vram, str) and "=" in vram:
        sizes = {}
        for entry in vram.split(","):
            index, _, size = (text.strip() for text in entry.partition("="))
            if not index.isdecimal() or not size or int(index) in sizes:
                raise ConfigError(
                    f"{vram!r} is no amounts of memory by GPU; write each GPU once, as in 0=10GiB,1=10GiB, "
                    "with numbers as CUDA_VISIBLE_DEVICES leaves them"
                )
            sizes[int(index)] = size
    else:
        return None
    if not sizes or any(isinstance(index, bool) or not isinstance(index, int) or index < 0 for index in sizes):
        raise ConfigError(f"vram is {vram!r}; by GPU it is written as {{0: '10GiB', 1: '10GiB'}}")
    return sizes
