"""Bringing experts to where they are computed: the cache decides, the tier moves, a step waits for what it needs.

A step at one layer asks for its experts once. All misses are issued together; then the resident experts are computed,
then each arriving one. What finds no slot goes through staging slots, which no policy knows and nothing else uses.
"""

import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from moe_offload.cache import Admit, ExpertCache, Lease, Placement
from moe_offload.errors import BudgetError
from moe_offload.offload.experts.arrivals import Arrival, Arrivals, patiently
from moe_offload.offload.experts.forgotten import close_apart
from moe_offload.offload.experts.guesses import Guesses
from moe_offload.offload.experts.host_step import HostStep
from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.experts.landing import StepAhead
from moe_offload.offload.experts.miss_path import MissPath, make_miss_path
from moe_offload.offload.experts.peers import Peers
from moe_offload.offload.experts.slot_experts import SlotExperts
from moe_offload.offload.experts.step_observer import StepObserver
from moe_offload.offload.experts.step_tuning import StepClock, Turn
from moe_offload.offload.experts.weights import ExpertWeights, MlpParts
from moe_offload.offload.streaming.reader import ReadCancelledError, ReadObserver
from moe_offload.offload.tiers.compute_tier import ComputeTier, Transfer
from moe_offload.offload.tiers.lender import Lender, LentExpert
from moe_offload.offload.tiers.link_meter import CopyObserver, LinkTotals
from moe_offload.quant.slot_kernels import slot_kernels


class SlotListener(Protocol):
    """Told which bytes are in which slots, from any thread; see `graphs.slot_table`."""

    def put(self, layer_idx: int, expert_idx: int, slot: int) -> None: ...
    def clear(self, layer_idx: int, slot: int) -> None: ...


# Of what the CPU computes, so many are on their way to slots at any time: a demanded copy waits for no more.
_MOST_BEHIND = 1
Compute = Callable[[int, ExpertWeights], None]
ComputeTogether = Callable[[Sequence[tuple[int, ExpertWeights]]], None]


@dataclass(eq=False)
class _Load:
    """A transfer into a cache slot, and the steps that wait for it."""

    slot: int
    speculative: bool
    waiting: list[Arrivals] = field(default_factory=list)
    transfer: Transfer | None = None
    ended: Callable[[BaseException | None], None] | None = None  # no guess of a step's, so none cancels it


class Residency:
    """The experts of all layers, asked for by steps and by prefetching. Every method may be called from any thread."""

    def __init__(self, cache: ExpertCache, tier: ComputeTier) -> None:
        self.cache = cache
        self.observer: StepObserver | None = None
        self.peers: Peers | None = None
        self.slot_listener: SlotListener | None = None
        self._slot_experts: dict[int, tuple[MlpParts, SlotExperts | None]] = {}  # by layer
        self._tier = tier
        self._lock = threading.RLock()  # a transfer may be done before it has been begun
        self._loads: dict[tuple[int, int], _Load] = {}  # (layer_idx, expert_idx)
        self._expert_in: dict[tuple[int, int], int] = {}  # (layer_idx, slot) -> the expert whose bytes are there
        self._free_staging: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(tier.num_staging_slots):
            self._free_staging.put(-1 - index)
        self.guesses = Guesses(tier, self._lock, self._free_staging)
        self.miss_path: MissPath | None = None
        self._num_behind = 0  # loads of what was computed on the CPU, for the next time
        self._interrupted = False
        self._stall_s = 0.0
        self._num_warmed = 0
        # Who forgets to close leaves no threads and files behind.
        self._forgotten = weakref.finalize(self, close_apart, tier.close)
        self._forgotten.atexit = False

    def take_miss_path(self, miss_path: str, clock: StepClock, turn: Turn) -> None:
        """Where misses are computed from now on: see `offload.experts.miss_path`."""
        self.miss_path = make_miss_path(miss_path, self._tier.lender, clock, turn)

    def observe_reads(self, observer: ReadObserver | None) -> None:
        """Tell ``observer`` of every read from the disk; None: nobody."""
        self._tier.observe_reads(observer)

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._tier.bytes_read

    @property
    def bytes_copied(self) -> int:
        """Bytes that were copied to the device."""
        return self._tier.bytes_copied

    @property
    def link_totals(self) -> LinkTotals:
        """What the links to the devices have carried, all together."""
        return self._tier.link_totals

    @property
    def link_peaks_bytes_per_s(self) -> Sequence[float]:
        """The fastest that each link was seen to be; 0 while that is not known."""
        return self._tier.link_peaks_bytes_per_s

    def observe_copies(self, observer: CopyObserver | None) -> None:
        """Tell ``observer`` of every copy to a device; None: nobody."""
        self._tier.observe_copies(observer)

    @property
    def stall_s(self) -> float:
        """Time in which steps computed nothing because an expert was awaited."""
        with self._lock:
            return self._stall_s

    @property
    def num_warmed(self) -> int:
        """Experts that a warm start has brought."""
        return self._num_warmed

    def num_missed(self) -> int:
        """Experts that decode steps have asked for and that were in no slot, here or elsewhere."""
        return self.cache.stats.num_missed("decode") + (0 if self.peers is None else self.peers.num_missed)

    @property
    def computed_on_cpu(self) -> int:
        """Experts that the CPU has computed for another device."""
        return 0 if self.miss_path is None else self.miss_path.num_computed

    @property
    def prefetch_used_bytes(self) -> int:
        """Bytes of experts that were prefetched and then asked for."""
        layers = self.cache.stats.snapshot().layers
        in_slots = sum(
            (layer.prefetch.used + layer.prefetch.late) * self._tier.expert_bytes(layer_idx)
            for layer_idx, layer in enumerate(layers)
        )
        return in_slots + self.guesses.used_bytes

    @property
    def prefetch_wasted_bytes(self) -> int:
        """Bytes that were read of experts that were prefetched, and that nobody asked for."""
        return self._tier.bytes_cancelled + self.guesses.dropped_bytes

    def new_sequence(self) -> None:
        """Another text begins."""
        self.cache.new_sequence()
        if self.peers is not None:
            self.peers.new_sequence()

    # -- a step --

    def run(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        compute: Compute,
        *,
        weights: Sequence[float] | None = None,
        prefill: bool = False,
        issued: Callable[[], None] | None = None,
        host: HostStep | None = None,
    ) -> None:
        """Call ``compute(expert_idx, weights)`` once for each expert, in no particular order.

        ``issued`` is called when all misses are on their way and before anything is computed. With ``host``, misses may
        be computed there instead, from host memory. Raises what a failed transfer raised; the slots, and what was lent,
        are given back in any case. Ctrl-C comes through between two experts.
        """

        def compute_each(experts: Sequence[tuple[int, ExpertWeights]]) -> None:
            for expert in experts:
                compute(*expert)

        with InterruptShield() as shield:
            self._step(layer_idx, expert_ids, compute_each, False, weights, prefill, issued, host, shield, None)

    def run_together(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        compute: ComputeTogether,
        *,
        weights: Sequence[float] | None = None,
        prefill: bool = False,
        issued: Callable[[], None] | None = None,
        host: HostStep | None = None,
        ahead: StepAhead | None = None,
    ) -> None:
        """As `run`, with all experts that are there in one call, then those that have come meanwhile, and so on.

        With ``ahead``, experts that are read straight into their slots are computed there while they land, before they
        are given to ``compute``.
        """
        with InterruptShield() as shield:
            self._step(layer_idx, expert_ids, compute, True, weights, prefill, issued, host, shield, ahead)

    def run_resident(
        self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float], compute: Callable[[list[int]], None]
    ) -> bool:
        """Call ``compute`` with the slots of these experts if all are there; else False, and nothing has changed."""
        with InterruptShield():
            lease = self.cache.acquire_loaded(layer_idx, expert_ids, weights=weights)
            if lease is None:
                return False
            slots = [hit.slot for hit in lease.hits]
            try:
                for slot in slots:
                    self._tier.use(layer_idx, slot)
                compute(slots)
            except BaseException:
                self._interrupted = True
                raise
            finally:
                for slot in slots:
                    self._tier.used(layer_idx, slot)
                self.cache.release(lease)
        return True

    def is_on_device(self, layer_idx: int) -> bool:
        """Whether the layer's experts are computed on a device, whose work the host has to wait for."""
        return self._tier.slab(layer_idx) is not None

    def slot_experts(self, layer_idx: int, parts: MlpParts) -> SlotExperts | None:
        """A layer's experts as kernels on its device compute them; None where the CPU computes, or none can.

        To be asked for in each step: what is kept keeps the memory of slots that have moved since.
        """
        known = self._slot_experts.get(layer_idx)
        if known is None or known[0] is not parts:
            known = self._slot_experts[layer_idx] = parts, self._make_slot_experts(layer_idx, parts)
        return known[1]

    def _make_slot_experts(self, layer_idx: int, parts: MlpParts) -> SlotExperts | None:
        slab = self._tier.slab(layer_idx)
        mlp = None if slab is None else self._tier.layout(layer_idx).slot_mlp(parts)
        if slab is None or mlp is None:
            return None
        return SlotExperts(mlp, slot_kernels(slab.device, mlp).kernels, slab)

    def resize(self, layer_idx: int, num_slots: int) -> bool:
        """Give a layer fewer slots, or more; False, and nothing changes, while anybody uses or fills one of them.

        Raises BudgetError where there is no memory for more.
        """

        def move(numbers: dict[int, int]) -> bool:
            held = [slot for layer, slot in self._expert_in if layer == layer_idx]
            self._slot_experts.pop(layer_idx, None)
            if self.slot_listener is not None:
                for slot in held:
                    self.slot_listener.clear(layer_idx, slot)
            try:
                are_there = self._tier.resize(layer_idx, num_slots, numbers)
            except BudgetError:  # for more, of which there are none: all is as it was
                if self.slot_listener is not None:
                    for slot in held:
                        self.slot_listener.put(layer_idx, self._expert_in[layer_idx, slot], slot)
                raise
            experts = {slot: self._expert_in.pop((layer_idx, slot)) for slot in held}
            for slot, new in numbers.items() if are_there else ():
                self._expert_in[layer_idx, new] = experts[slot]
                if self.slot_listener is not None:
                    self.slot_listener.put(layer_idx, experts[slot], new)
            return are_there

        with InterruptShield(), self._lock:
            return self.cache.repack(layer_idx, num_slots, move)

    def note_used(self, layer_idx: int, expert_ids: Sequence[int], weights: Sequence[float]) -> None:
        """A decode step has found these experts in their slots by itself."""
        self.cache.note_used(layer_idx, expert_ids, weights)

    def _step(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        compute: ComputeTogether,
        together: bool,
        weights: Sequence[float] | None,
        prefill: bool,
        issued: Callable[[], None] | None,
        host: HostStep | None,
        shield: InterruptShield,
        ahead: StepAhead | None,
    ) -> None:
        if self._interrupted:
            self._recover()
        num_copied: int | None = None
        most: int | None = None
        admit = Admit.IF_HOTTER if prefill else Admit.ALWAYS
        if host is not None:
            num_copied = most = self._num_copied(layer_idx, expert_ids)
            if num_copied == 0:
                most = max(0, _MOST_BEHIND - self._num_behind)
                admit = admit if prefill else Admit.IF_HOTTER_NOW
        lease = self.cache.acquire(
            layer_idx, expert_ids, weights=weights, admit=admit, most=most, phase="prefill" if prefill else "decode"
        )
        arrivals = Arrivals(self._free_staging, ahead)
        try:
            self._run(lease, compute, together, issued, arrivals, num_copied, host, shield)
        except BaseException:
            self._interrupted = True
            raise
        finally:
            arrivals.end()
            self.cache.release(lease)

    def _run(
        self,
        lease: Lease,
        compute: ComputeTogether,
        together: bool,
        issued: Callable[[], None] | None,
        arrivals: Arrivals,
        num_copied: int | None,
        host: HostStep | None,
        shield: InterruptShield,
    ) -> None:
        layer_idx, bypassed, on_host = lease.layer_idx, list(lease.bypassed), list[int]()
        num_pending = 0
        if num_copied != 0:
            for miss in lease.misses:
                self._fetch(layer_idx, miss.expert_idx, miss.slot, arrivals)
            num_pending = len(lease.misses)
        if num_copied is not None:
            num_staged = max(0, num_copied - len(lease.misses))
            bypassed, on_host = bypassed[:num_staged], bypassed[num_staged:]
            if num_copied == 0:
                on_host = [*(miss.expert_idx for miss in lease.misses), *on_host]
            assert self.miss_path is not None
            self._lend(self.miss_path.lender, layer_idx, on_host, arrivals)
            num_pending += len(on_host)
            if num_copied == 0:
                self._bring_behind(layer_idx, lease.misses)
        ready: list[Arrival] = []
        for hit in lease.hits:
            if not hit.loading or self._is_there(layer_idx, hit.expert_idx, hit.slot):
                ready.append((hit.expert_idx, hit.slot, None))
            elif self._wait_for(layer_idx, hit.expert_idx, arrivals):
                num_pending += 1
            elif self._is_there(layer_idx, hit.expert_idx, hit.slot):  # it arrived between the two questions
                ready.append((hit.expert_idx, hit.slot, None))
            else:
                bypassed.append(hit.expert_idx)  # its transfer failed, or an interrupted step never began it
        num_pending += self._take_staged(layer_idx, bypassed, arrivals)
        num_pending += self._begin_staged(layer_idx, bypassed, arrivals)
        if issued is not None:
            issued()
        shield.check()
        if together:  # no interrupt between here and _compute, which gives back the staging slots of what has come
            come = arrivals.get_all()
            num_pending -= len(come)
            ready += come
        hits = deque([ready] if together and ready else [[one] for one in ready])
        while hits or num_pending or bypassed:
            batch = arrivals.get_all() if bypassed and not together else []  # others wait for their staging slots
            num_pending -= len(batch)
            if not batch and hits:
                batch = hits.popleft()
            elif not batch:
                if not num_pending:
                    num_pending = self._begin_staged(layer_idx, bypassed, arrivals, wait=shield)
                batch = [self._next(layer_idx, arrivals, shield)]
                if together or on_host:
                    batch += arrivals.get_all()
                num_pending -= len(batch)
            self._compute(layer_idx, batch, compute, arrivals, host)
            shield.check()
            num_pending += self._begin_staged(layer_idx, bypassed, arrivals)
            if not bypassed:  # what this layer streams goes before what the next one will
                self.guesses.go_on()

    def _compute(
        self,
        layer_idx: int,
        batch: list[Arrival],
        compute: ComputeTogether,
        arrivals: Arrivals,
        host: HostStep | None,
    ) -> None:
        """Compute what has come, and give its places back whatever happens; raises what went wrong with it."""
        try:
            for _, _, error in batch:
                if error is not None:
                    raise error
            for expert_idx, _, _ in batch:
                arrivals.has_landed(expert_idx)
            slots = [(expert_idx, place) for expert_idx, place, _ in batch if isinstance(place, int)]
            lent = [(expert_idx, place.weights) for expert_idx, place, _ in batch if isinstance(place, LentExpert)]
            if slots:
                weights = [(expert_idx, self._tier.use(layer_idx, slot)) for expert_idx, slot in slots]
                try:
                    compute(weights)
                finally:
                    for _, slot in slots:  # also if it failed midway: what it has launched still reads the slot
                        self._tier.used(layer_idx, slot)
            if lent:  # last: while the CPU computes, the device is busy with what was launched
                assert host is not None
                assert self.miss_path is not None
                self.miss_path.computed(layer_idx, len(lent), host.compute(lent))
        finally:
            for _, place, _ in batch:
                arrivals.give_back(place)

    def _next(self, layer_idx: int, arrivals: Arrivals, shield: InterruptShield) -> Arrival:
        """The next expert that is whole; what has come of others is computed while it is awaited."""
        while (arrival := self._await(arrivals, shield)) is None:
            for expert_idx, slot, read in arrivals.landing():
                assert arrivals.ahead is not None
                arrivals.ahead.compute(expert_idx, self._tier.use(layer_idx, slot), read.order, read.num_landed)
        return arrival

    def _await(self, arrivals: Arrivals, shield: InterruptShield) -> Arrival | None:
        shield.check()
        try:
            return arrivals.get(0)
        except queue.Empty:
            begin_ns = time.perf_counter_ns()
            try:
                return patiently(arrivals.get, shield)
            finally:
                duration_ns = time.perf_counter_ns() - begin_ns
                with self._lock:
                    self._stall_s += duration_ns * 1e-9
                if (observer := self.observer) is not None:
                    observer.waited(duration_ns)

    # -- misses that the CPU computes --

    def _num_copied(self, layer_idx: int, expert_ids: Sequence[int]) -> int | None:
        """How many of the missing are copied, the others being computed on the CPU; None: all."""
        num_missing = len(self.cache.missing(layer_idx, expert_ids))
        if not num_missing or self.miss_path is None:
            return None
        num_copied = self.miss_path.num_copied(layer_idx, num_missing)
        return None if num_copied == num_missing else num_copied

    def _lend(self, lender: Lender, layer_idx: int, expert_ids: Sequence[int], arrivals: Arrivals) -> None:
        for expert_idx in expert_ids:

            def failed(error: BaseException, expert_idx: int = expert_idx) -> None:
                arrivals.put(expert_idx, None, error)

            try:
                lent = partial(arrivals.put, expert_idx, error=None)
                lender.lend(layer_idx, expert_idx, lent=lent, failed=failed)
            except Exception as error:
                failed(error)

    def _bring_behind(self, layer_idx: int, misses: Sequence[Placement]) -> None:
        """Fill the slots of what the CPU computes this time, behind all demand; nobody waits for it."""
        for miss in misses:
            with self._lock:
                self._num_behind += 1
            load = self._register(layer_idx, miss.expert_idx, _Load(miss.slot, True, ended=self._brought_behind))
            self._transfer(layer_idx, miss.expert_idx, load)

    def _brought_behind(self, error: BaseException | None) -> None:
        with self._lock:
            self._num_behind -= 1

    # -- transfers --

    def _fetch(self, layer_idx: int, expert_idx: int, slot: int, arrivals: Arrivals) -> None:
        """Fill a slot for a step, or let the staging slot that the expert was guessed into take its place."""
        load = self._register(layer_idx, expert_idx, _Load(slot, False, [arrivals]))
        if len(self.guesses):
            with self._lock:
                guess = self.guesses.take(layer_idx, expert_idx)
                if guess is not None:
                    self._tier.exchange(layer_idx, slot, guess.slot)
                    self._free_staging.put(guess.slot)
                    load.transfer = guess.transfer
                    guess.taken = partial(self._finish, layer_idx, expert_idx, load)
            if guess is not None:
                if (observer := self.observer) is not None:
                    observer.guessed(layer_idx, expert_idx, guess.arrived)
                arrivals.watch(expert_idx, slot, guess.transfer)
                guess.demand()
                return
        self._transfer(layer_idx, expert_idx, load)
        arrivals.watch(expert_idx, slot, load.transfer)

    def _take_staged(self, layer_idx: int, expert_ids: list[int], arrivals: Arrivals) -> int:
        """Take those off the list that were guessed right: they are computed from staging; how many."""
        num_taken = 0
        for expert_idx in list(expert_ids) if len(self.guesses) else ():
            with self._lock:
                guess = self.guesses.take(layer_idx, expert_idx)
                if guess is None:
                    continue
                guess.taken = partial(self._staged, layer_idx, expert_idx, guess.slot, arrivals)
            expert_ids.remove(expert_idx)
            num_taken += 1
            if (observer := self.observer) is not None:
                observer.guessed(layer_idx, expert_idx, guess.arrived)
            arrivals.watch(expert_idx, guess.slot, guess.transfer)
            guess.demand()
        return num_taken

    def _register(self, layer_idx: int, expert_idx: int, load: _Load) -> _Load:
        """Put on the books that a slot which the cache has just given to an expert is going to be filled."""
        with self._lock:
            self._loads[layer_idx, expert_idx] = load
            self._expert_in.pop((layer_idx, load.slot), None)
            if self.slot_listener is not None:
                self.slot_listener.clear(layer_idx, load.slot)
        return load

    def _transfer(self, layer_idx: int, expert_idx: int, load: _Load) -> None:
        def done(error: BaseException | None) -> None:
            self._finish(layer_idx, expert_idx, load, error)

        speculative = load.speculative
        try:
            transfer = self._tier.begin(layer_idx, expert_idx, load.slot, speculative=speculative, done=done)
        except Exception as error:
            done(error)
            return
        with self._lock:
            load.transfer = transfer
            if speculative and not load.speculative:  # a step came to wait for it while it was begun
                transfer.promote()

    def _finish(self, layer_idx: int, expert_idx: int, load: _Load, error: BaseException | None) -> None:
        if isinstance(error, ReadCancelledError):
            with self._lock:
                if not load.waiting and self.cache.drop_prefetch(layer_idx, expert_idx):
                    del self._loads[layer_idx, expert_idx]
                    return
                load.speculative = False
            self._transfer(layer_idx, expert_idx, load)  # a step has asked for it in the meantime
            return
        with self._lock:
            self._loads.pop((layer_idx, expert_idx), None)
            if error is None:
                self._expert_in[layer_idx, load.slot] = expert_idx
                if self.slot_listener is not None:
                    self.slot_listener.put(layer_idx, expert_idx, load.slot)
                self.cache.mark_loaded(layer_idx, expert_idx)
            else:
                self.cache.mark_failed(layer_idx, expert_idx)
            waiting = load.waiting
        for arrivals in waiting:
            arrivals.put(expert_idx, load.slot, error)
        if load.ended is not None:
            load.ended(error)

    def _is_there(self, layer_idx: int, expert_idx: int, slot: int) -> bool:
        with self._lock:
            return self._expert_in.get((layer_idx, slot)) == expert_idx

    def _wait_for(self, layer_idx: int, expert_idx: int, arrivals: Arrivals) -> bool:
        """Be told when a transfer that somebody else began is done; False if there is none."""
        with self._lock:
            load = self._loads.get((layer_idx, expert_idx))
            if load is None:
                return False
            load.waiting.append(arrivals)
            load.speculative = False
            if load.transfer is not None:
                load.transfer.promote()
            return True

    def _begin_staged(
        self, layer_idx: int, expert_ids: list[int], arrivals: Arrivals, *, wait: InterruptShield | None = None
    ) -> int:
        """Start as many of ``expert_ids`` as there are free staging slots, taking them off the list; how many.

        ``wait``: at least one. Only a step that holds no staging slot waits for one, so steps never wait in a ring.
        """
        num_begun = 0
        while expert_ids:
            slot = self._free_slot()
            if slot is None:
                if wait is None or num_begun:
                    break
                slot = self._wait_for_staging(wait)
            self._stage(layer_idx, expert_ids.pop(0), slot, arrivals)
            num_begun += 1
        return num_begun

    def _free_slot(self) -> int | None:
        """A staging slot, if one is free or is held by a guess whose bytes have come."""
        for _ in range(2):
            try:
                return self._free_staging.get_nowait()
            except queue.Empty:
                if not len(self.guesses):
                    return None
                self.guesses.make_room()
        return None

    def _wait_for_staging(self, shield: InterruptShield) -> int:
        def get(timeout_s: float) -> int:
            self.guesses.make_room()
            return self._free_staging.get(timeout=timeout_s)

        self.guesses.waiting(1)
        try:
            return patiently(get, shield)
        finally:
            self.guesses.waiting(-1)

    def _stage(self, layer_idx: int, expert_idx: int, slot: int, arrivals: Arrivals) -> None:
        done = partial(self._staged, layer_idx, expert_idx, slot, arrivals)
        try:
            transfer = self._tier.begin(layer_idx, expert_idx, slot, speculative=False, done=done)
        except Exception as error:
            done(error)
        else:
            arrivals.watch(expert_idx, slot, transfer)

    def _staged(
        self, layer_idx: int, expert_idx: int, slot: int, arrivals: Arrivals, error: BaseException | None
    ) -> None:
        if isinstance(error, ReadCancelledError):  # it was a guess that had just been given up
            self._stage(layer_idx, expert_idx, slot, arrivals)
        else:
            arrivals.put(expert_idx, slot, error)

    # -- speculation --

    def prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Start bringing experts that a step may ask for, likeliest first, behind all demand.

        Into empty slots, then into staging, from where nothing has to be evicted for a mere guess; into the slots of
        others only where a tier's staging cannot take a slot's place. Experts of other processes are brought there.
        """
        if (peers := self.peers) is not None:
            peers.prefetch(layer_idx, [expert_idx for expert_idx in expert_ids if not peers.is_here(expert_idx)])
            expert_ids = [expert_idx for expert_idx in expert_ids if peers.is_here(expert_idx)]
        exchanges = self._tier.exchanges(layer_idx)
        with self._lock:  # no step is to recover meanwhile: it would take back slots that nothing is known to fill
            loads = [
                (placement.expert_idx, self._register(layer_idx, placement.expert_idx, _Load(placement.slot, True)))
                for placement in self.cache.admit_prefetch(layer_idx, expert_ids, evict=not exchanges)
            ]
        for expert_idx, load in loads:
            self._transfer(layer_idx, expert_idx, load)
        if exchanges:
            self.guesses.want(layer_idx, self.cache.missing(layer_idx, expert_ids))

    def cancel_prefetches(self, layer_idx: int, wanted: Iterable[int]) -> None:
        """Give up prefetches of a layer that are not ``wanted`` and that nobody waits for."""
        keep = set(wanted)
        with self._lock:
            for (layer, expert_idx), load in self._loads.items():
                stale = layer == layer_idx and load.speculative and expert_idx not in keep
                if stale and load.ended is None and load.transfer is not None:
                    load.transfer.cancel()
        self.guesses.give_up(layer_idx, keep)

    def warm(self, layer_idx: int, expert_idx: int, warmed: Callable[[BaseException | None], None]) -> bool:
        """Bring an expert into an empty slot, behind all demand, and say when; False if there is none, or no need."""

        def ended(error: BaseException | None) -> None:
            with self._lock:
                self._num_warmed += error is None
            warmed(error)

        with self._lock:
            placements = self.cache.admit_warm(layer_idx, [expert_idx])
            loads = [self._register(layer_idx, expert_idx, _Load(p.slot, True, ended=ended)) for p in placements]
        for load in loads:
            self._transfer(layer_idx, expert_idx, load)
        return bool(loads)

    # -- interrupts --

    def _recover(self) -> None:
        """After a step that ended early, perhaps between two lines: let nothing be stuck."""
        with self._lock:
            self._interrupted = False
            self.cache.recover(set(self._loads))

    def close(self) -> None:
        """Stop all transfers and free the slots. May be called twice; what is only dropped closes itself, later."""
        self._forgotten.detach()
        self._tier.close()
        self._slot_experts.clear()
