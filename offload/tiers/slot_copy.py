"""Copies into the slots of one device: what is needed whole and at once, what is guessed piece by piece.

A copy stream does one thing after the other, so whatever is enqueued has to be waited for. Of prefetches no more than
`PIECES_AHEAD` pieces are enqueued at any time: so much, and no more, does an expert that is needed now wait for them.
What is needed now and still being read from the disk is enqueued chunk by chunk as it lands. It counts as there when
all of it is enqueued and its checksum has matched, which is when the tier below hands it over; not before.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator

import torch

from moe_offload.errors import ExpertCopyError, ExpertReadError
from moe_offload.offload.streaming.reader import ReadCancelledError
from moe_offload.offload.tiers.compute_tier import Done
from moe_offload.offload.tiers.device_queue import DeviceQueue, Event
from moe_offload.offload.tiers.device_slot import DeviceSlot
from moe_offload.offload.tiers.host_expert import HostExpert
from moe_offload.offload.tiers.host_fetch import HostFetch

# A piece takes 0.17 ms at 25 GB/s. While a thread finds out that it is over, the second one keeps the link busy.
PIECE_BYTES = 4 << 20
PIECES_AHEAD = 2


class SlotCopy:
    """One expert on its way to a slot: fetched into host memory, then copied. The schedule's lock guards the fields."""

    def __init__(
        self, schedule: "CopySchedule", key: tuple[int, int], slot: DeviceSlot, *, speculative: bool, done: Done
    ) -> None:
        self.key, self.slot, self.speculative, self.done = key, slot, speculative, done
        self.cancelled = False
        self.fetch: HostFetch | None = None
        self.expert: HostExpert | None = None  # once it is in host memory
        self.next_bytes = 0
        self.flowed: list[range] = []  # what was enqueued before
        self.error: BaseException | None = None  # of what was
        self.event: Event | None = None  # behind what is enqueued so far
        self._schedule = schedule

    def cancel(self) -> bool:
        """See `Transfer.cancel`."""
        is_cancelled = self._schedule.cancel(self)
        return (self.fetch is not None and self.fetch.cancel()) or is_cancelled

    def promote(self) -> bool:
        """See `Transfer.promote`."""
        self._schedule.promote(self)
        return self.fetch is None or self.fetch.promote()

    def flow(self, data: torch.Tensor, chunk: range) -> None:
        """See `Flow.flow`."""
        self._schedule.flow(self, data, chunk)

    def flow_again(self) -> None:
        """See `Flow.flow_again`."""
        event = self._schedule.take_back(self)
        if event is not None:
            event.wait()

    def last_copy(self) -> Event | None:
        """See `Flow.last_copy`."""
        return self._schedule.last_copy(self)


_Ended = tuple[SlotCopy, BaseException | None]


class CopySchedule:
    """When what is copied. No lock is held while ``done`` is called; never from within `cancel`."""

    def __init__(self, queue: DeviceQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._pending: deque[SlotCopy] = deque()  # speculation with pieces left
        self._pieces_in_flight = 0
        self._closed = False

    def start(self, copy: SlotCopy, expert: HostExpert) -> None:
        """The expert is in host memory: copy it."""
        ended: list[_Ended] = []
        with self._lock:
            copy.expert = expert
            is_demand = not copy.speculative and not self._closed
            if is_demand and copy.event is not None:
                ended = [(copy, self._enqueue_rest(copy))]
            elif not is_demand:
                self._pending.append(copy)
                ended = self._advance()
        if is_demand and not ended:
            error: BaseException | None = None
            try:
                copy.slot.fill(expert)
            except Exception as failure:
                error = _typed(copy, failure)
            copy.done(error)
        self._tell(ended)

    def flow(self, copy: SlotCopy, data: torch.Tensor, chunk: range) -> None:
        """These bytes of what is being read for it are there: enqueue them, behind nothing but what is enqueued."""
        with self._lock:
            if copy.speculative or copy.error is not None or self._closed:
                return
            copy.event = self._queue.new_event()
            copy.flowed.append(chunk)
            try:
                copy.slot.copy(data, chunk, copy.event)
            except Exception as failure:
                copy.error = _typed(copy, failure)

    def take_back(self, copy: SlotCopy) -> Event | None:
        """What has flowed does not count; what is behind it."""
        with self._lock:
            copy.flowed.clear()
            return copy.event

    def last_copy(self, copy: SlotCopy) -> Event | None:
        """What is behind all that was enqueued of it; None if nothing was."""
        with self._lock:
            return copy.event

    def cancel(self, copy: SlotCopy) -> bool:
        """Stop between two pieces, if it is speculative and not all enqueued."""
        with self._lock:
            if copy.speculative and (copy.expert is None or copy in self._pending):
                copy.cancelled = True
            return copy.cancelled

    def promote(self, copy: SlotCopy) -> None:
        """Enqueue the rest of it at once."""
        ended: list[_Ended] = []
        with self._lock:
            copy.speculative = copy.cancelled = False
            if copy in self._pending:
                self._pending.remove(copy)
                ended = [(copy, self._enqueue(copy, None))]
        self._tell(ended)

    def stop(self) -> None:
        """Fail what is not enqueued yet."""
        with self._lock:
            self._closed = True
            ended = self._advance()
        self._tell(ended)

    def _piece_over(self) -> None:
        with self._lock:
            self._pieces_in_flight -= 1
            ended = self._advance()
        self._tell(ended)

    # -- the lock is held --

    def _advance(self) -> list[_Ended]:
        """Enqueue pieces as far as they may be; returns the copies that have ended."""
        ended: list[_Ended] = []
        for copy in [copy for copy in self._pending if copy.cancelled or self._closed]:
            self._pending.remove(copy)
            ended.append((copy, _closed_error(copy) if self._closed else _cancelled_error(copy)))
        while self._pending and self._pieces_in_flight < PIECES_AHEAD:
            copy = self._pending[0]
            assert copy.expert is not None
            error = self._enqueue(copy, PIECE_BYTES)
            if error is None:
                assert copy.event is not None
                self._pieces_in_flight += 1
                self._queue.when_over(copy.event, self._piece_over)
            if error is not None or copy.next_bytes == copy.expert.data.numel():
                self._pending.popleft()
                ended.append((copy, error))
        return ended

    def _enqueue(self, copy: SlotCopy, num_bytes: int | None) -> BaseException | None:
        """The next bytes, or all the rest; what went wrong."""
        assert copy.expert is not None
        size_bytes = copy.expert.data.numel()
        begin = copy.next_bytes
        copy.next_bytes = size_bytes if num_bytes is None else min(begin + num_bytes, size_bytes)
        copy.event = self._queue.new_event()
        try:
            copy.slot.copy(copy.expert.data, range(begin, copy.next_bytes), copy.event, is_ahead=copy.speculative)
        except Exception as failure:
            return _typed(copy, failure)
        return None

    def _enqueue_rest(self, copy: SlotCopy) -> BaseException | None:
        """What has not flowed; what went wrong."""
        assert copy.expert is not None
        for span in _gaps(copy.flowed, copy.expert.data.numel()):
            if copy.error is None:
                copy.event = self._queue.new_event()
                try:
                    copy.slot.copy(copy.expert.data, span, copy.event)
                except Exception as failure:
                    copy.error = _typed(copy, failure)
        return copy.error

    # -- the lock is not held --

    def _tell(self, ended: Iterable[_Ended]) -> None:
        for copy, error in ended:
            assert copy.expert is not None
            event = copy.event or self._queue.new_event()
            if error is None:
                copy.slot.filled(event)
            copy.expert.hold_until(event)
            copy.done(error)


def _gaps(spans: Iterable[range], size_bytes: int) -> Iterator[range]:
    """What lies between the spans, which do not overlap."""
    begin = 0
    for span in sorted(spans, key=lambda span: span.start):
        if begin < span.start:
            yield range(begin, span.start)
        begin = span.stop
    if begin < size_bytes:
        yield range(begin, size_bytes)


def _typed(copy: SlotCopy, error: Exception) -> ExpertCopyError:
    layer_idx, expert_idx = copy.key
    return ExpertCopyError(f"expert {expert_idx} of layer {layer_idx} could not be copied to the device: {error}")


def _cancelled_error(copy: SlotCopy) -> ReadCancelledError:
    return ReadCancelledError(f"expert {copy.key[1]} of layer {copy.key[0]}: the prefetch was cancelled")


def _closed_error(copy: SlotCopy) -> ExpertReadError:
    return ExpertReadError(f"expert {copy.key[1]} of layer {copy.key[0]} is not there: the model was closed")
