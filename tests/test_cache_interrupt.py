"""Ctrl-C may strike between any two lines of the cache; afterwards nothing is lost and nothing is wrong."""

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import moe_offload.cache
from moe_offload.cache import ExpertCache

PACKAGE = Path(moe_offload.cache.__file__).parent


class InterruptAt:
    """Raises KeyboardInterrupt before the n-th line that runs inside the package.

    Not on the lines of the lock itself, where the interpreter delivers no signal between taking (or returning) the
    lock and entering (or leaving) the block; and not in `Lease.__del__`, which cannot raise.
    """

    def __init__(self, countdown: int) -> None:
        self.countdown = countdown

    def __enter__(self) -> "InterruptAt":
        self._before = sys.gettrace()
        sys.settrace(self.trace)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.settrace(self._before)

    def trace(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if Path(code.co_filename).parent != PACKAGE or code.co_name == "__del__":
            return None
        if event == "line" and "with self._lock" not in linecache.getline(code.co_filename, frame.f_lineno):
            self.countdown -= 1
            if not self.countdown:
                raise KeyboardInterrupt
        return self.trace


def scenario(cache: ExpertCache, in_flight: set[tuple[int, int]]) -> None:
    """Hits, evictions, a bypass, a failure, prefetches of every fate, and resizes."""
    for ids in ([0, 1], [1, 2, 3], [0, 3]):
        lease = cache.acquire(0, ids)
        for miss in lease.misses:
            in_flight.add((0, miss.expert_idx))
        for miss in lease.misses:
            cache.mark_loaded(0, miss.expert_idx)
            in_flight.discard((0, miss.expert_idx))
        cache.release(lease)
    for placement in cache.admit_prefetch(0, [4, 5]):
        in_flight.add((0, placement.expert_idx))
    for expert_idx in (4, 5):
        cache.drop_prefetch(0, expert_idx)
        in_flight.discard((0, expert_idx))
    cache.resize(0, 5)
    cache.admit_prefetch(0, [5])
    lease = cache.acquire(0, [5, 2])
    cache.mark_failed(0, 5)
    del lease
    cache.resize(0, 2)
    cache.new_sequence()


def test_an_interrupt_anywhere_loses_nothing():
    num_interrupts = 0
    while True:
        cache = ExpertCache([6], [3], "decay")
        in_flight: set[tuple[int, int]] = set()
        try:
            with InterruptAt(num_interrupts + 1):
                scenario(cache, in_flight)
            break
        except KeyboardInterrupt:
            num_interrupts += 1
        # The reads that were under way come to their end, before or after the recovery.
        if num_interrupts % 2:
            for layer_idx, expert_idx in in_flight:
                cache.mark_loaded(layer_idx, expert_idx)
            in_flight.clear()
        cache.recover(in_flight)
        cache.check_integrity()
        for layer_idx, expert_idx in in_flight:
            cache.mark_loaded(layer_idx, expert_idx)
        cache.check_integrity()
        lease = cache.acquire(0, list(range(cache.num_slots(0))))
        assert lease.bypassed == []
        assert not any(hit.loading for hit in lease.hits)
        cache.release(lease)
        cache.check_integrity()
    assert num_interrupts > 200
