"""The device that a name stands for."""

import torch

from moe_offload.errors import ConfigError


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """``auto`` is a GPU where there is one. Processes on one machine that are numbered have a GPU each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"{name!r} is not a device; use auto, cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu or cuda")
    if device.type != "cuda":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("this machine, or this build of torch, has no CUDA device; use --device cpu")
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if local_rank is None else local_rank
    if index >= torch.cuda.device_count():
        raise ConfigError(f"there is no device cuda:{index}, but {torch.cuda.device_count()}, counted from 0")
    return torch.device("cuda", index)
