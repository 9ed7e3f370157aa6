"""A machine as a forecast sees it: its memory, and how fast each part of it is, measured, given or assumed."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from moe_offload.offload.forecast.band import Band

Origin = Literal["measured", "given", "assumed"]
# How far the truth may be from a figure: one measured for a second while others may have been at work; one from a data
# sheet, of which less arrives; one that nobody has looked up.
_DOUBT: dict[Origin, tuple[float, float]] = {"measured": (0.9, 1.05), "given": (0.85, 1.0), "assumed": (0.6, 1.5)}


@dataclass(frozen=True)
class Rate:
    """Bytes or operations a second, and where the figure is from."""

    per_s: float
    origin: Origin

    @property
    def band(self) -> Band:
        """What may be true."""
        low, high = _DOUBT[self.origin]
        return Band(low * self.per_s, self.per_s, high * self.per_s)


@dataclass(frozen=True)
class Machine:
    """Budgets in bytes and rates; without ``vram_bytes`` models are computed on the CPU.

    ``gpus``: number and bytes of each, where layers are divided among several; ``vram_bytes`` is then their sum, and
    rates are of one. ``memory`` is how fast the memory that computes is read (RAM, or VRAM with a GPU), ``copy`` RAM to
    VRAM, ``matrix`` operations a second of products of many rows, ``quantize`` weights a second while packing.
    """

    ram_bytes: int
    vram_bytes: int | None
    memory: Rate
    disk: Rate
    copy: Rate | None
    matrix: Rate
    quantize: Rate
    download: Rate | None = None
    gpus: tuple[tuple[int, int], ...] = ()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """What computes."""
        return "cpu" if self.vram_bytes is None else "cuda"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
