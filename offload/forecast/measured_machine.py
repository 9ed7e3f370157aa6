"""The machine that this runs on: budgets as loading takes them, rates measured in seconds where none are given."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_offload.errors import ConfigError
from moe_offload.offload.bench.rates import kernel_read_rate, matrix_rate
from moe_offload.offload.forecast.machine import Machine, Rate
from moe_offload.offload.planning.memory import (
    ram_budget_bytes,
    ram_memory,
    vram_budget_bytes,
    vram_budgets_bytes,
    vram_memory,
)
from moe_offload.offload.planning.rates import disk_read_rate, host_to_device_rate
from moe_offload.offload.planning.sizes import parse_size
from moe_offload.offload.planning.vram_option import VramSize, vram_by_device
from moe_offload.quant import get_format

# What is taken for a GPU that is not here: a small one's memory, its link, and its products.
_ASSUMED_VRAM_BYTES_PER_S, _ASSUMED_COPY_BYTES_PER_S, _ASSUMED_DEVICE_OPS_PER_S = 250e9, 12e9, 20e12
_MEMORY_BYTES = 256 << 20
_MATRIX = (128, (4096, 4096))  # rows, weight
_QUANTIZE_SHAPE, _QUANTIZE_S = (2048, 2048), 0.3


@dataclass(frozen=True)
class GivenMachine:
    """What the user says: sizes as they are written, bytes (``matrix``: operations) a second; None is unsaid."""

    ram: str | int = "auto"
    vram: VramSize | None = None
    device: str = "auto"
    memory: float | None = None
    disk: float | None = None
    copy: float | None = None
    matrix: float | None = None
    download: float | None = None


def machine_of(given: GivenMachine, *, folder: Path, read_bytes: int) -> Machine:
    """The machine that ``given`` describes, all that it leaves out measured here, or assumed where that cannot be.

    The disk is read in ``folder``, which is made if need be, in pieces of ``read_bytes``. An amount of memory in GiB
    may be more than is here: the forecast is then for another machine.
    """
    has_gpu = torch.cuda.is_available()
    if given.device == "cuda" and not has_gpu and given.vram is None:
        raise ConfigError("there is no CUDA device here; say how much memory the one to plan for has with --vram 8GiB")
    by_gpu = None if given.vram is None else vram_by_device(given.vram)
    if by_gpu is not None and given.device not in ("auto", "cuda"):
        raise ConfigError(f"--vram says which GPUs to plan for; leave out --device {given.device}")
    on_gpu = given.device != "cpu" and (has_gpu or given.vram is not None)
    gpus = {} if by_gpu is None else {index: _one_vram_bytes(index, size) for index, size in sorted(by_gpu.items())}
    return Machine(
        ram_bytes=_ram_bytes(given.ram),
        vram_bytes=sum(gpus.values()) if gpus else _vram_bytes(given.vram) if on_gpu else None,
        memory=_memory_rate(given.memory, on_gpu, has_gpu),
        disk=_rate(given.disk, lambda: _disk_rate(folder, read_bytes)),
        copy=_copy_rate(given.copy, has_gpu) if on_gpu else None,
        matrix=_matrix_rate(given.matrix, on_gpu),
        quantize=Rate(_quantize_rate(), "measured"),
        download=None if given.download is None else Rate(given.download, "given"),
        gpus=tuple(gpus.items()) if len(gpus) > 1 else (),
    )


def _ram_bytes(size: str | int) -> int:
    memory = ram_memory()
    if _is_relative(size):
        return ram_budget_bytes(size, memory)
    return parse_size(size, total_bytes=memory.total_bytes, free_bytes=memory.free_bytes)


def _one_vram_bytes(index: int, size: str | int) -> int:
    """The budget of one of several GPUs."""
    if not _is_relative(size):
        return parse_size(size, total_bytes=1, free_bytes=1)
    return vram_budgets_bytes({index: size})[index]


def _vram_bytes(vram: VramSize | None) -> int:
    size = "auto" if vram is None else vram
    assert isinstance(size, str | int), "amounts by device are for several"
    memory = vram_memory()
    if not _is_relative(size):
        return parse_size(size, total_bytes=1, free_bytes=1)
    if memory is None:
        raise ConfigError(f"--vram {size} is of a CUDA device, and there is none here; give an amount such as 8GiB")
    return vram_budget_bytes(size, memory)


def _is_relative(size: str | int) -> bool:
    """Whether the amount is a share of the memory that is here."""
    return isinstance(size, str) and (size.strip().lower() == "auto" or size.strip().endswith("%"))


def _rate(given: float | None, measure: Callable[[], float]) -> Rate:
    return Rate(measure(), "measured") if given is None else Rate(given, "given")


def _disk_rate(folder: Path, read_bytes: int) -> float:
    folder.mkdir(parents=True, exist_ok=True)
    return disk_read_rate(folder, read_bytes).bytes_per_s


def _memory_rate(given: float | None, on_gpu: bool, has_gpu: bool) -> Rate:
    if given is not None:
        return Rate(given, "given")
    if not on_gpu:
        return Rate(kernel_read_rate(_MEMORY_BYTES).bytes_per_s, "measured")
    if not has_gpu:
        return Rate(_ASSUMED_VRAM_BYTES_PER_S, "assumed")
    return Rate(_device_read_rate(), "measured")


def _device_read_rate() -> float:
    numbers = torch.ones(_MEMORY_BYTES // 4, dtype=torch.float32, device="cuda")
    numbers.sum().item()  # the first sum sets things up
    start_s = time.perf_counter()
    numbers.sum().item()
    return numbers.numel() * numbers.element_size() / (time.perf_counter() - start_s)


def _copy_rate(given: float | None, has_gpu: bool) -> Rate:
    if given is not None:
        return Rate(given, "given")
    rate = host_to_device_rate() if has_gpu else None
    return Rate(_ASSUMED_COPY_BYTES_PER_S, "assumed") if rate is None else Rate(rate.bytes_per_s, "measured")


def _matrix_rate(given: float | None, on_gpu: bool) -> Rate:
    if given is not None:
        return Rate(given, "given")
    return Rate(_ASSUMED_DEVICE_OPS_PER_S, "assumed") if on_gpu else Rate(matrix_rate(*_MATRIX), "measured")


def _quantize_rate() -> float:
    """Weights a second of the default format, on all threads."""
    weight = torch.randn(_QUANTIZE_SHAPE).to(torch.bfloat16)
    quantize, num_weights = get_format("nf4").quantize, 0
    quantize(weight)
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < _QUANTIZE_S:
        quantize(weight)
        num_weights += weight.numel()
    return num_weights / (time.perf_counter() - start_s)
