"""What was asked of the host tier and is under way: fetches, and the reads that they wait for."""

from collections.abc import Callable
from typing import Protocol

from moe_offload.cache import Lease
from moe_offload.offload.streaming.reader import Read
from moe_offload.offload.tiers.host_expert import HostExpert

Landed = Callable[[HostExpert], None]
Failed = Callable[[BaseException], None]


class _Tier(Protocol):
    def cancel(self, fetch: "HostFetch") -> bool: ...
    def promote(self, fetch: "HostFetch") -> bool: ...


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
    ) -> None:
        self.key = key
        self.speculative, self.for_copy = speculative, for_copy
        self.landed, self.failed = landed, failed
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
