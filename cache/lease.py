"""What `ExpertCache.acquire` answers: where each expert is, and a hold on those places."""

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple


class Admit(Enum):
    """When a miss may evict."""

    ALWAYS = "always"
    """As long as a slot can be evicted (decode)."""
    IF_HOTTER = "if-hotter"
    """Only a victim that the policy scores below the newcomer, both judged before this step (prefill)."""
    IF_HOTTER_NOW = "if-hotter-now"
    """The same, both judged with this step: for who needs no slot to be computed this time, but may the next."""


class Placement(NamedTuple):
    """One expert in one slot of its layer.

    ``victim`` is the expert that lost the slot to it, if any. ``loading``: its bytes have not all arrived.
    """

    expert_idx: int
    slot: int
    victim: int | None = None
    loading: bool = False


@dataclass(eq=False)
class Lease:
    """A hold on the slots of one step at one layer: none of them is evicted before `ExpertCache.release`.

    ``hits`` were resident (with ``loading`` set, another thread or a prefetch is still bringing the bytes); ``misses``
    got a slot that the caller has to fill; ``bypassed`` got none. ``prefetched`` are those of the hits that a prefetch
    has brought, or is bringing, and that nobody had asked for yet. A lease that is dropped without a release, by an
    interrupted step, is released by the cache's next operation.
    """

    layer_idx: int
    hits: list[Placement]
    misses: list[Placement]
    bypassed: list[int]
    lease_id: int = field(repr=False)
    abandoned: deque[int] = field(repr=False)
    is_open: bool = field(default=True, repr=False)
    prefetched: list[int] = field(default_factory=list)

    def __del__(self) -> None:
        # The garbage collector may call this while this very thread is inside the cache: no lock may be taken here.
        if self.__dict__.get("is_open", False):
            self.abandoned.append(self.lease_id)
