"""What has been counted at one moment, and the figures of what has happened between two."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moe_offload.cache import PrefetchCounts, StatsSnapshot
from moe_offload.offload.experts.lookahead import Lookahead, LookaheadCounts
from moe_offload.offload.experts.residency import Residency
from moe_offload.offload.reports import RunReport
from moe_offload.offload.tiers.link_meter import LinkTotals

_SUMMED = (
    "hits",
    "misses",
    "bytes_read",
    "bytes_copied",
    "bytes_copied_ahead",
    "link_busy_s",
    "prefetch_issued",
    "prefetch_used",
    "prefetch_late",
    "prefetch_wasted",
    "prefetch_used_bytes",
    "prefetch_wasted_bytes",
    "warmed",
    "computed_on_cpu",
)


class Reading(NamedTuple):
    """All counts at one moment."""

    cache: StatsSnapshot
    guesses: PrefetchCounts
    prefetch_used_bytes: int
    prefetch_wasted_bytes: int
    bytes_read: int
    link: LinkTotals
    link_peak_bytes_per_s: float
    stall_s: float
    num_warmed: int
    computed_on_cpu: int
    lookahead: LookaheadCounts
    peer_wait_s: float = 0.0
    peer_bytes: int = 0
    peers: Sequence[RunReport] = ()


class Meter:
    """What residency and lookahead have counted, and the difference between two moments."""

    def __init__(self, residency: Residency, lookahead: Lookahead | None = None) -> None:
        self.residency, self._lookahead = residency, lookahead

    def read(self) -> Reading:
        """The counts now."""
        residency, peers, lookahead = self.residency, self.residency.peers, self._lookahead
        return Reading(
            cache=residency.cache.stats.snapshot(),
            guesses=residency.guesses.counts,
            prefetch_used_bytes=residency.prefetch_used_bytes,
            prefetch_wasted_bytes=residency.prefetch_wasted_bytes,
            bytes_read=residency.bytes_read,
            link=residency.link_totals,
            link_peak_bytes_per_s=_together(residency.link_peaks_bytes_per_s),
            stall_s=residency.stall_s,
            num_warmed=residency.num_warmed,
            computed_on_cpu=residency.computed_on_cpu,
            lookahead=LookaheadCounts() if lookahead is None else lookahead.counts,
            peer_wait_s=0.0 if peers is None else peers.wait_s,
            peer_bytes=0 if peers is None else peers.num_bytes,
            peers=() if peers is None else peers.reports(),
        )

    def since(self, earlier: Reading, **times: Any) -> RunReport:
        """The figures of what has happened since ``earlier``, with the tokens and times given."""
        return self.between(earlier, self.read(), **times)

    @staticmethod
    def between(earlier: Reading, later: Reading, **times: Any) -> RunReport:
        """The same between two readings."""
        counts = later.cache.diff(earlier.cache)
        guesses = later.guesses - earlier.guesses
        prefetch = counts.prefetch + guesses
        guessed = guesses.used + guesses.late  # to the cache they were misses: it does not know of staging
        link = later.link - earlier.link
        own = RunReport(
            hits=counts.total.hits + guessed,
            misses=counts.total.misses + counts.total.bypassed - guessed,
            bytes_read=later.bytes_read - earlier.bytes_read,
            bytes_copied=link.num_bytes,
            bytes_copied_ahead=link.ahead_bytes,
            link_busy_s=link.busy_ns * 1e-9,
            link_peak_bytes_per_s=later.link_peak_bytes_per_s,
            stall_s=later.stall_s - earlier.stall_s,
            prefetch_issued=prefetch.issued,
            prefetch_used=prefetch.used + prefetch.late,
            prefetch_late=prefetch.late,
            prefetch_wasted=prefetch.wasted,
            prefetch_used_bytes=later.prefetch_used_bytes - earlier.prefetch_used_bytes,
            prefetch_wasted_bytes=later.prefetch_wasted_bytes - earlier.prefetch_wasted_bytes,
            prefetch_recall=(later.lookahead - earlier.lookahead).recall,
            warmed=later.num_warmed - earlier.num_warmed,
            computed_on_cpu=later.computed_on_cpu - earlier.computed_on_cpu,
            peer_wait_s=later.peer_wait_s - earlier.peer_wait_s,
            peer_bytes=later.peer_bytes - earlier.peer_bytes,
            **times,
        )
        return _with_peers(own, earlier.peers, later.peers)


def _together(peaks_bytes_per_s: Sequence[float]) -> float:
    """What links carry at most; 0 while one of them is not known."""
    return sum(peaks_bytes_per_s) if all(peaks_bytes_per_s) else 0.0


def _with_peers(own: RunReport, earlier: Sequence[RunReport], later: Sequence[RunReport]) -> RunReport:
    """What all ranks have done between two readings of theirs."""
    if not later:
        return own
    sums: dict[str, Any] = {name: getattr(own, name) for name in _SUMMED}
    stall_s = own.stall_s
    for before, after in zip(earlier or [RunReport()] * len(later), later, strict=True):
        sums = {name: value + getattr(after, name) - getattr(before, name) for name, value in sums.items()}
        stall_s = max(stall_s, after.stall_s - before.stall_s)
    peak = _together([own.link_peak_bytes_per_s, *(report.link_peak_bytes_per_s for report in later)])
    return replace(own, **sums, stall_s=stall_s, link_peak_bytes_per_s=peak, num_ranks=1 + len(later))
