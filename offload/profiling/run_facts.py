"""What was run, on which machine: the part of a profile that explains the rest."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Machine:
    """The machine of the run; ``threads`` are those that compute."""

    cpu: str
    cores: int
    threads: int
    kernels: str
    gpu: str | None
    memory_bytes: int | None


@dataclass(frozen=True)
class Rates:
    """Bytes a second, measured or given; None where unknown. ``direct``: the disk was read past the page cache."""

    memory_bytes_per_s: float | None
    disk_bytes_per_s: float | None
    pcie_bytes_per_s: float | None
    direct: bool | None


@dataclass(frozen=True)
class SequenceFigures:
    """One prompt and its answer."""

    name: str
    prompt_tokens: int
    decode_tokens: int
    time_to_first_token_s: float | None
    tokens_per_s: float | None
    hit_ratio: float | None


@dataclass(frozen=True)
class RunFacts:
    """Model, settings and what went through; ``num_experts``, ``num_slots`` and ``expert_bytes`` are one per layer.

    ``dense_bytes`` and ``kv_bytes`` are what a token reads of them from memory.
    """

    model: str
    source: Literal["run", "trace"]
    trace_file: str | None
    recorded_at: str | None
    format: str | None
    dense_format: str | None
    device: str | None
    policy: str | None
    prefetch: str | None
    miss_path: str | None
    ram_bytes: int | None
    vram_bytes: int | None
    context_tokens: int | None
    num_experts: tuple[int, ...]
    num_slots: tuple[int, ...] | None
    expert_bytes: tuple[int, ...] | None
    top_k: int
    dense_bytes: int | None
    kv_bytes: int | None
    prefill_tokens: int
    decode_tokens: int
    prefill_steps: int
    decode_steps: int
    sequences: tuple[SequenceFigures, ...]
    rates: Rates
    machine: Machine | None
    versions: dict[str, str]

    @property
    def is_prefetch_off(self) -> bool:
        """Whether nothing was to be read ahead."""
        return self.prefetch in ("off", "0")

    @property
    def is_cuda(self) -> bool:
        """Whether experts are computed on a GPU."""
        return self.device is not None and self.device.startswith("cuda")
