"""What is compared: a shape, a limit, and who runs on it with how many bits."""

from dataclasses import dataclass, replace
from typing import Literal

from peer_runs.shapes import SHAPES, Shape

EngineName = Literal["llama.cpp", "fastllm", "moe-offload"]
GIB, MB = 1 << 30, 10**6


@dataclass(frozen=True)
class Entry:
    """One engine in a case. ``weights``: a format of GGUF, or of packs; ``threads``: None for as many as cores.

    ``repack``: llama.cpp copies the weights into the order of its kernels, and maps no file. ``cache_bytes``: fastllm
    streams experts through a cache of so much. ``unlimited``: the case's limit is not put on this engine.
    """

    engine: EngineName
    weights: str
    threads: int | None = None
    repack: bool = False
    cache_bytes: int | None = None
    unlimited: bool = False

    @property
    def label(self) -> str:
        """As the table has it."""
        notes = []
        if self.engine == "llama.cpp":
            notes.append("repacked" if self.repack else "mmap")
        if self.cache_bytes is not None:
            notes.append(f"cache {self.cache_bytes / 1e9:g} GB")
        if self.threads is not None:
            notes.append(f"{self.threads} thread{'s' * (self.threads > 1)}")
        if self.unlimited:
            notes.append("no limit")
        return ", ".join([self.engine, *notes])


@dataclass(frozen=True)
class Case:
    """One row of the comparison: its first entry is what the others are measured against."""

    name: str
    title: str
    shape: Shape
    limit_bytes: int | None
    entries: tuple[Entry, ...]
    busy_processes: int = 0
    prefill_tokens: int = 0


def _mixtral(
    name: str, title: str, limit_bytes: int | None, formats: tuple[str, ...], *, low: bool = False, prefill: int = 0
) -> Case:
    """``low``: Q3_K beside the pack format of about three bits, which is the last of ``formats``."""
    repack = limit_bytes is None
    entries = [Entry("llama.cpp", "Q4_0", repack=repack), Entry("moe-offload", formats[0])]
    if low:
        entries += [Entry("llama.cpp", "Q3_K", repack=repack), *(Entry("moe-offload", spec) for spec in formats[1:])]
    return Case(name, title, SHAPES["mixtral"], limit_bytes, tuple(entries), prefill_tokens=prefill)


def make_cases(four_bits: str, eight_bits: str, three_bits: str | None) -> list[Case]:
    """All cases, with these formats of ours; nothing of three bits where None."""
    formats = (four_bits,) if three_bits is None else (four_bits, three_bits)
    resident = _mixtral("resident", "all in memory", None, formats, prefill=512)
    qwen3_peers = [Entry("llama.cpp", "Q8_0"), Entry("fastllm", "Q8_0", cache_bytes=1000 * MB)]
    qwen3_peers.append(Entry("fastllm", "Q8_0", cache_bytes=1200 * MB, unlimited=True))
    ours_eight = Entry("moe-offload", eight_bits)
    return [
        resident,
        replace(
            resident,
            name="busy",
            title="all in memory, a busy process beside",
            entries=(resident.entries[0], replace(resident.entries[0], threads=1), resident.entries[1]),
            busy_processes=1,
            prefill_tokens=0,
        ),
        _mixtral("4GiB", "limit 4 GiB", 4 * GIB, formats, low=True, prefill=512),
        _mixtral("2GiB", "limit 2 GiB", 2 * GIB, formats, low=True),
        Case("qwen3", "limit 1.4 GB", SHAPES["qwen3"], 1400 * MB, (*qwen3_peers, ours_eight)),
        Case(
            "qwen3-resident",
            "all in memory",
            SHAPES["qwen3"],
            None,
            (Entry("llama.cpp", "Q8_0", repack=True), Entry("fastllm", "Q8_0"), ours_eight),
        ),
    ]
