"""Figures of what a model has done: one answer, or all since it was loaded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RunReport:
    """Counts and times; ``hits`` and ``misses`` are experts asked for by layers, misses include those without a slot.

    Of the links to devices, by the devices' clocks: ``link_busy_s`` is the time in which one was copying, each for
    itself, ``link_peak_bytes_per_s`` the fastest that they were seen to be; `link_use` is the share of that which was
    carried, ``link_use_steps`` the same of each decode step. Nobody waited for ``bytes_copied_ahead`` when they went.
    ``stall_s`` is the time in which nothing was computed because an expert was awaited. Of the experts prefetched,
    those used were hits, some of which were waited for (late); those wasted left unused, some of them cut off halfway.
    ``warmed`` experts were read back by a warm start. Of the misses, so many as ``computed_on_cpu`` were computed from
    host memory, and not copied to the GPU for it.

    Where ``num_ranks`` share the experts, counts are of all of them together, ``stall_s`` is the largest of any;
    ``peer_wait_s`` is the time in which rank 0 waited for others, ``peer_bytes`` what crossed the network.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0
    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_copied: int = 0
    bytes_copied_ahead: int = 0
    link_busy_s: float = 0.0
    link_peak_bytes_per_s: float = 0.0
    link_use_steps: Sequence[float] = ()
    stall_s: float = 0.0
    prefetch_issued: int = 0
    prefetch_used: int = 0
    prefetch_late: int = 0
    prefetch_wasted: int = 0
    prefetch_used_bytes: int = 0
    prefetch_wasted_bytes: int = 0
    prefetch_recall: float = 0.0
    warmed: int = 0
    computed_on_cpu: int = 0
    num_ranks: int = 1
    peer_wait_s: float = 0.0
    peer_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: the tokens after the first, by the time they took."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 and self.decode_s > 0 else 0.0

    @property
    def hit_ratio(self) -> float:
        """Share of the experts asked for that were resident or on their way; 0 if none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def link_use(self) -> float:
        """Share of what the links to devices could have carried that they did carry; 0 where that is not known."""
        could_bytes = (self.time_to_first_token_s + self.decode_s) * self.link_peak_bytes_per_s
        return self.bytes_copied / could_bytes if could_bytes > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, the derived ones too."""
        derived = {"tokens_per_s": self.tokens_per_s, "hit_ratio": self.hit_ratio, "link_use": self.link_use}
        return asdict(self) | derived
