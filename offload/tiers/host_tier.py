"""The host tier: experts in page-locked memory, from where a copy takes them to the device.

An expert is asked for (`HostTier.fetch`) and handed over as a `HostExpert`: at once if it is in a host slot, else when
it has been read, into a host slot or, where there is none for it, into a staging slot. What is needed at once is passed
on chunk by chunk while it is read (`Flow`); that is not handing it over, for it is not verified yet. One in a host slot
that could not be page-locked is handed over by way of staging, which the reader's threads fill from memory. Whatever
memory it is in stays untouched until the copy out of it is over. Nothing here waits but a reader's thread that is to
read damaged bytes once more: a fetch that finds all staging slots in use queues up, demand before speculation, and goes
on when a read into one fails or the oldest copy out of one is over.
"""

import threading
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from moe_offload.cache import Lease
from moe_offload.errors import ExpertReadError
from moe_offload.offload.pack.manifest import PackManifest
from moe_offload.offload.streaming.reader import ExpertReader, ReadCancelledError, ReadObserver
from moe_offload.offload.streaming.slab import Slab
from moe_offload.offload.tiers.device_queue import DeviceQueue, Event
from moe_offload.offload.tiers.host_expert import HostExpert
from moe_offload.offload.tiers.host_fetch import Failed, Flow, HostFetch, Landed, Landing, Reading
from moe_offload.offload.tiers.host_slots import HostSlots
from moe_offload.offload.tiers.staging_ring import StagingRing

# So many staging slots, if there are more, are kept for demand: one is read into while the other is emptied.
_NUM_FOR_DEMAND = 2
_Failure = tuple[HostFetch, BaseException]


class HostTier:
    """Experts of all layers by way of host memory. Every method may be called from any thread.

    ``landed`` and ``failed`` are called with no lock held: on the asking thread if the expert is there, else on a
    reader's thread or whichever one finds out; never from within `HostFetch.cancel`. They must not raise.
    """

    def __init__(
        self,
        manifest: PackManifest,
        reader: ExpertReader,
        queue: DeviceQueue,
        *,
        num_slots: Sequence[int],
        num_staging_slots: int,
        policy: str = "lru",
    ) -> None:
        """Reserve and page-lock the memory: ``num_slots`` a layer, and staging. `stop` closes the reader."""
        self._reader, self._queue = reader, queue
        self._slot_bytes = [layer.slot_bytes for layer in manifest.layers]
        self._slabs: list[Slab] = []
        self._lock = threading.Lock()
        self._readings: dict[tuple[int, int], Reading] = {}  # those into host slots
        self._waiting: list[HostFetch] = []  # for a staging slot
        self._awaits_copy = False
        self._closed = False

        def reserve(slots: int, size_bytes: int) -> Slab:
            slab = Slab(slots, size_bytes, page_lock=queue.page_lock)
            self._slabs.append(slab)
            return slab

        try:
            # Staging first: where little can be page-locked, that is where it is needed.
            self._ring = StagingRing(reserve(num_staging_slots, max(self._slot_bytes)), _NUM_FOR_DEMAND)
            slabs = [
                reserve(slots, size_bytes) if slots else None
                for slots, size_bytes in zip(num_slots, self._slot_bytes, strict=True)
            ]
        except BaseException:
            self.free()
            raise
        self._slots = HostSlots([layer.num_experts for layer in manifest.layers], slabs, policy)

    @property
    def size_bytes(self) -> int:
        """All memory reserved."""
        return sum(slab.size_bytes for slab in self._slabs)

    @property
    def pageable_bytes(self) -> int:
        """Memory that was to be page-locked and is not."""
        return sum((slab.num_slots - slab.num_pinned_slots) * slab.slot_bytes for slab in self._slabs)

    @property
    def pageable_staging(self) -> bool:
        """Whether even staging is not page-locked, so that the rest has no better way to the device either."""
        return not self._ring.is_pinned

    @property
    def pin_failure(self) -> str | None:
        """Why the first piece that is not page-locked is not."""
        return next((slab.pin_failure for slab in self._slabs if slab.pin_failure is not None), None)

    def observe_reads(self, observer: ReadObserver | None) -> None:
        """The reader's."""
        self._reader.observer = observer

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._reader.stats.bytes_read

    @property
    def bytes_cancelled(self) -> int:
        """Those of them that belong to reads given up halfway."""
        return self._reader.stats.bytes_cancelled

    def has_slots(self, layer_idx: int) -> bool:
        """Whether the layer has host slots at all."""
        return self._slots.has_any(layer_idx)

    def resident(self, layer_idx: int) -> list[int]:
        """The experts in a layer's host slots."""
        with self._lock:
            return sorted(self._slots.resident(layer_idx))

    def check_integrity(self) -> None:
        """AssertionError if the books contradict themselves."""
        with self._lock:
            self._slots.check_integrity()

    # -- asking --

    def fetch(
        self,
        layer_idx: int,
        expert_idx: int,
        *,
        speculative: bool,
        keep: bool,
        for_copy: bool = True,
        landed: Landed,
        failed: Failed,
        flow: Flow | None = None,
    ) -> HostFetch:
        """Bring an expert. ``keep``: it may displace any other from its layer's host slots, else only a colder one.

        ``for_copy``: to page-locked memory, if there is any; else wherever it is. ``flow`` is given what is read on
        demand into such memory as it lands, and ``landed`` all of it in any case.

        Raises ExpertReadError, and calls nobody back, when the tier is closed.
        """
        key = (layer_idx, expert_idx)
        fetch = HostFetch(
            self, key, speculative=speculative, for_copy=for_copy, landed=landed, failed=failed, flow=flow
        )
        here: HostExpert | None = None
        failures: list[_Failure] = []
        with self._lock:
            if self._closed:
                raise _closed_error(key)
            lease = self._slots.acquire(layer_idx, expert_idx, keep=keep)
            reading = self._readings.get(key)
            if lease is not None and lease.misses:
                self._begin(Reading(fetch), lease)
            elif lease is not None and not lease.hits[0].loading:
                if self._goes_through_staging(fetch, lease):
                    fetch.lease = lease
                    self._waiting.append(fetch)
                    failures = self._start_waiting()
                else:
                    fetch.ended = True
                    here = self._from_slot(layer_idx, lease)
            elif lease is not None and reading is not None and reading.goes_on:
                self._join(fetch, reading, lease)
            else:
                # No slot; or a read that was cancelled, or that an interrupted fetch never began, still has it.
                if lease is not None:
                    self._slots.release(lease)
                self._waiting.append(fetch)
                failures = self._start_waiting()
        if here is not None:
            landed(here)
        _tell(failures)
        return fetch

    def cancel(self, fetch: HostFetch) -> bool:
        """See `HostFetch.cancel`."""
        with self._lock:
            if fetch.cancelled or fetch.ended or not fetch.speculative:
                return fetch.cancelled
            reading = fetch.reading
            if reading is not None:
                if len(reading.fetches) > 1 or reading.read is None or not reading.read.cancel():
                    return False
                reading.cancelled = True
            fetch.cancelled = True  # one that waits for a staging slot ends when its turn comes
            return True

    def promote(self, fetch: HostFetch) -> bool:
        """See `HostFetch.promote`."""
        with self._lock:
            if fetch.cancelled and (fetch.ended or fetch.reading is not None):
                return False
            fetch.speculative = fetch.cancelled = False
            failures: list[_Failure] = []
            if fetch.reading is None:
                failures = self._start_waiting()
            elif fetch.reading.read is not None:
                fetch.reading.read.promote()
                self._watch(fetch.reading)
        _tell(failures)
        return True

    # -- reads; the lock is held --

    def _join(self, fetch: HostFetch, reading: Reading, lease: Lease) -> None:
        """Wait for a read that another fetch began."""
        fetch.lease, fetch.reading = lease, reading
        reading.fetches.append(fetch)
        if not fetch.speculative and reading.read is not None:
            reading.read.promote()
            self._watch(reading)

    def _begin(self, reading: Reading, lease: Lease) -> None:
        """Read into the host slot that the cache has just given to the expert."""
        (fetch,) = reading.fetches
        fetch.lease, fetch.reading = lease, reading
        self._readings[reading.key] = reading
        try:
            self._submit(reading, self._slots.memory(reading.key[0], _slot_of(lease)))
        except Exception:
            self._give_back(reading)
            raise

    def _start_waiting(self) -> list[_Failure]:
        """Begin to read for those that wait for a staging slot, as far as there are any; returns who has failed."""
        failures: list[_Failure] = []
        for fetch in [fetch for fetch in self._waiting if fetch.cancelled or self._closed]:
            self._waiting.remove(fetch)
            failures.append((fetch, _closed_error(fetch.key) if self._closed else _cancelled_error(fetch.key)))
        while self._waiting:
            fetch = next((fetch for fetch in self._waiting if not fetch.speculative), self._waiting[0])
            try:
                slot = self._ring.take(speculative=fetch.speculative)
                if slot is None:
                    self._await_copy()
                    break
                self._begin_staged(Reading(fetch, slot), slot)
            except Exception as error:  # the reader is closed, or the device has failed
                failures.append((fetch, error))
            self._waiting.remove(fetch)
        for fetch, _ in failures:
            fetch.ended, fetch.reading = True, None
            self._let_go(fetch)
        return failures

    def _begin_staged(self, reading: Reading, slot: int) -> None:
        (fetch,) = reading.fetches
        fetch.reading = reading
        layer_idx = reading.key[0]
        source = None if fetch.lease is None else self._slots.memory(layer_idx, _slot_of(fetch.lease))
        try:
            self._submit(reading, self._ring.memory(slot, self._slot_bytes[layer_idx]), source)
        except Exception:
            self._give_back(reading)
            raise

    def _submit(self, reading: Reading, into: memoryview, source: memoryview | None = None) -> None:
        (fetch,) = reading.fetches
        done = partial(self._read_ended, reading)
        reading.read = self._reader.submit(
            *reading.key, into, speculative=fetch.speculative, on_done=done, source=source
        )
        if not fetch.speculative:
            self._watch(reading)

    def _watch(self, reading: Reading) -> None:
        """Take what is needed now on as it lands; a device fetches by itself only from memory that is page-locked."""
        if reading.read is not None and reading.read.watcher is None and self._is_pinned(reading):
            reading.read.watcher = Landing(self, reading)

    def _is_pinned(self, reading: Reading) -> bool:
        if reading.staging_slot is not None:
            return self._ring.is_pinned
        lease = reading.fetches[0].lease
        return lease is not None and self._slots.is_pinned(reading.key[0], _slot_of(lease))

    def _give_back(self, reading: Reading) -> None:
        """The bytes will not come, and nothing is written any more; copies of what had come may be under way."""
        if reading.staging_slot is None:
            del self._readings[reading.key]
            self._slots.settle(*reading.key, loaded=False)
        for fetch in reading.fetches:
            under_way = None if fetch.flow is None else fetch.flow.last_copy()
            if reading.staging_slot is not None:
                self._empty(reading.staging_slot, under_way)
            elif under_way is not None and fetch.lease is not None:
                self._slots.release_after(fetch.lease, under_way)
                fetch.lease = None
            self._let_go(fetch)

    def _empty(self, staging_slot: int, under_way: Event | None) -> None:
        if under_way is None:
            self._ring.give_back(staging_slot)
        else:
            self._ring.give_back_after(staging_slot, under_way)

    def _let_go(self, fetch: HostFetch) -> None:
        """Of the host slot that it holds, if it holds one."""
        if fetch.lease is not None:
            self._slots.release(fetch.lease)
            fetch.lease = None

    def _await_copy(self) -> None:
        """Be told when the oldest copy out of a staging slot is over."""
        event = self._ring.oldest_copy()
        if event is not None and not self._awaits_copy:
            self._awaits_copy = True
            self._queue.when_over(event, self._copy_over)

    # -- what becomes of them --

    def chunk_landed(self, reading: Reading, chunk: range) -> None:
        """On a reader's thread: let the bytes flow on for those that need them now."""
        for flow, data in self._flows(reading):
            flow.flow(data, chunk)

    def begins_again(self, reading: Reading) -> None:
        """On a reader's thread: what has flowed was wrong. Waits for the device, if that still reads it."""
        for flow, _ in self._flows(reading):
            flow.flow_again()

    def _flows(self, reading: Reading) -> list[tuple[Flow, torch.Tensor]]:
        """Who takes the bytes while they are read, and where those are."""
        layer_idx = reading.key[0]
        with self._lock:
            takers = [fetch for fetch in reading.fetches if not fetch.speculative and not fetch.ended]
            return [
                (fetch.flow, self._data(layer_idx, reading.staging_slot, fetch.lease))
                for fetch in takers
                if fetch.flow is not None
            ]

    def _data(self, layer_idx: int, staging_slot: int | None, lease: Lease | None) -> torch.Tensor:
        if staging_slot is not None:
            return self._ring.tensor(staging_slot, self._slot_bytes[layer_idx])
        assert lease is not None, "whoever reads into a host slot holds it"
        return self._slots.tensor(layer_idx, _slot_of(lease))

    def _read_ended(self, reading: Reading, error: BaseException | None) -> None:
        """On a reader's thread: the bytes are there and verified, or nothing is written there any more."""
        failures: list[_Failure] = []
        experts: list[tuple[HostFetch, HostExpert]] = []
        with self._lock:
            for fetch in reading.fetches:
                fetch.ended, fetch.reading = True, None
            if error is None:
                experts = self._arrived(reading)
            else:
                self._give_back(reading)
                failures = [(fetch, error) for fetch in reading.fetches]
            failures += self._start_waiting()
        for fetch, expert in experts:
            fetch.landed(expert)
        _tell(failures)

    def _arrived(self, reading: Reading) -> list[tuple[HostFetch, HostExpert]]:
        """The expert, once for each fetch; those that are to take it by way of staging wait for that."""
        layer_idx, expert_idx = reading.key
        if reading.staging_slot is not None:
            (fetch,) = reading.fetches
            self._let_go(fetch)
            data = self._data(layer_idx, reading.staging_slot, None)
            return [(fetch, HostExpert(data, partial(self._empty_staging, reading.staging_slot)))]
        del self._readings[reading.key]
        self._slots.settle(layer_idx, expert_idx, loaded=True)
        experts = []
        for fetch in reading.fetches:
            assert fetch.lease is not None, "whoever reads into a host slot holds it"
            if self._goes_through_staging(fetch, fetch.lease):
                fetch.ended = False
                self._waiting.append(fetch)
            else:
                experts.append((fetch, self._from_slot(layer_idx, fetch.lease)))
        return experts

    def _goes_through_staging(self, fetch: HostFetch, lease: Lease) -> bool:
        return fetch.for_copy and self._ring.is_pinned and not self._slots.is_pinned(fetch.key[0], _slot_of(lease))

    def _from_slot(self, layer_idx: int, lease: Lease) -> HostExpert:
        return HostExpert(self._data(layer_idx, None, lease), partial(self._release_after, lease))

    def _release_after(self, lease: Lease, event: Event) -> None:
        with self._lock:
            self._slots.release_after(lease, event)

    def _empty_staging(self, slot: int, event: Event) -> None:
        with self._lock:
            self._ring.give_back_after(slot, event)
            failures = self._start_waiting()
        _tell(failures)

    def _copy_over(self) -> None:
        with self._lock:
            self._awaits_copy = False
            failures = self._start_waiting()
        _tell(failures)

    # -- the end --

    def stop(self) -> None:
        """Fail what waits and what is being read, and close the reader. May be called twice."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
            for fetch in waiting:
                fetch.ended = True
                self._let_go(fetch)
        _tell((fetch, _closed_error(fetch.key)) for fetch in waiting)
        self._reader.close()

    def free(self) -> None:
        """Let go of the memory. Reads and copies have ended."""
        for slab in self._slabs:
            slab.close()


def _slot_of(lease: Lease) -> int:
    ((_, slot, _, _),) = [*lease.hits, *lease.misses]
    return slot


def _tell(failures: Iterable[_Failure]) -> None:
    for fetch, error in failures:
        fetch.failed(error)


def _cancelled_error(key: tuple[int, int]) -> ReadCancelledError:
    return ReadCancelledError(f"expert {key[1]} of layer {key[0]}: the prefetch was cancelled")


def _closed_error(key: tuple[int, int]) -> ExpertReadError:
    return ExpertReadError(f"expert {key[1]} of layer {key[0]} is not there: the model was closed")
