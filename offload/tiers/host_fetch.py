"""What was asked of the host tier and is under way: fetches, and the reads that they wait for."""

from collections.abc import Callable
from typing import Protocol

import torch

from moe_offload.cache import Lease
from moe_offload.offload.streaming.reader import Read
from moe_offload.offload.tiers.device_queue import Event
from moe_offload.offload.tiers.host_expert import HostExpert

Landed = Callable[[HostExpert], None]
Failed = Callable[[BaseException], None]


class Flow(Protocol):
    """Takes the bytes of an expert on while it is still being read; called by reader's threads."""

    def flow(self, data: torch.Tensor, chunk: range) -> None:
        """These bytes of ``data`` (``uint8 [slot_bytes]``) are there, and not verified."""

    def flow_again(self) -> None:
        """They were wrong, and are read once more: returns when nothing reads them any more."""

    def last_copy(self) -> Event | None:
        """What is behind all that has flowed; until it is over, ``data`` must not change."""


class _Tier(Protocol):
    def cancel(self, fetch: "HostFetch") -> bool: ...
    def promote(self, fetch: "HostFetch") -> bool: ...
    def chunk_landed(self, reading: "Reading", chunk: range) -> None: ...
    def begins_again(self, reading: "Reading") -> None: ...


class HostFetch:
    """One expert that was asked for. The tier's lock guards the fields, the tier changes them."""

    def __init__(
        self,
        tier: _Tier,
        key: tuple[int, int],
        *,
        speculative: bool,
        for_copy: bool,
        landed: Landed,
        failed: Failed,
        flow: Flow | None,
    ) -> None:
        self.key = key
        self.speculative, self.for_copy = speculative, for_copy
        self.landed, self.failed, self.flow = landed, failed, flow
        self.cancelled = False
        self.ended = False
        self.lease: Lease | None = None  # on the host slot that it is read into, or that its bytes are in
        self.reading: Reading | None = None  # None: it waits for a staging slot, or has ended
        self._tier = tier

    def cancel(self) -> bool:
        """Give it up if it is speculative: ``failed`` gets a `ReadCancelledError`, later. False if it is too late."""
        return self._tier.cancel(self)

    def promote(self) -> bool:
        """Make it demand; False if it was cancelled before."""
        return self._tier.promote(self)


class Reading:
    """One read, into the host slot of its fetches' leases, or into a staging slot: from the disk or a host slot."""

    def __init__(self, fetch: HostFetch, staging_slot: int | None = None) -> None:
        self.key = fetch.key
        self.fetches = [fetch]
        self.staging_slot = staging_slot
        self.read: Read | None = None  # None: an interrupt struck before the reader was known to have it
        self.cancelled = False

    @property
    def goes_on(self) -> bool:
        """Whether its end can be waited for."""
        return self.read is not None and not self.cancelled


class Landing:
    """Watches one read for the tier: a `ReadWatcher`."""

    def __init__(self, tier: _Tier, reading: Reading) -> None:
        self._tier, self._reading = tier, reading

    def chunk_landed(self, chunk: range) -> None:
        """See `ReadWatcher`."""
        self._tier.chunk_landed(self._reading, chunk)

    def begins_again(self) -> None:
        """See `ReadWatcher`."""
        self._tier.begins_again(self._reading)
