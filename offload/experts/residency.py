"""Bringing experts to where they are computed: the cache decides, the tier moves, a step waits for what it needs.

A step at one layer asks for its experts once. All misses are issued together; then the resident experts are computed,
then each arriving one. What finds no slot goes through staging slots, which no policy knows and nothing else uses.
"""

import _thread
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from moe_offload.cache import Admit, ExpertCache, Lease
from moe_offload.offload.experts.arrivals import Arrival, Arrivals, patiently
from moe_offload.offload.experts.interrupts import InterruptShield
from moe_offload.offload.experts.weights import ExpertWeights
from moe_offload.offload.streaming.reader import ReadCancelledError
from moe_offload.offload.tiers.compute_tier import ComputeTier, Transfer

Compute = Callable[[int, ExpertWeights], None]
ComputeTogether = Callable[[Sequence[tuple[int, ExpertWeights]]], None]


@dataclass(eq=False)
class _Load:
    """A transfer into a cache slot, and the steps that wait for it."""

    slot: int
    speculative: bool
    waiting: list[Arrivals] = field(default_factory=list)
    transfer: Transfer | None = None


class Residency:
    """The experts of all layers, asked for by steps and by prefetching. Every method may be called from any thread."""

    def __init__(self, cache: ExpertCache, tier: ComputeTier) -> None:
        self.cache = cache
        self._tier = tier
        self._lock = threading.RLock()  # a transfer may be done before it has been begun
        self._loads: dict[tuple[int, int], _Load] = {}  # (layer_idx, expert_idx)
        self._expert_in: dict[tuple[int, int], int] = {}  # (layer_idx, slot) -> the expert whose bytes are there
        self._free_staging: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(tier.num_staging_slots):
            self._free_staging.put(-1 - index)
        self._interrupted = False
        self.stall_s = 0.0
        # Who forgets to close leaves no threads and files behind. By a thread: garbage is collected in the middle of
        # anything, perhaps under the very locks that closing takes. The lowest way to start one takes none.
        self._forgotten = weakref.finalize(self, _thread.start_new_thread, tier.close, ())
        self._forgotten.atexit = False

    @property
    def bytes_read(self) -> int:
        """Bytes that came from the disk."""
        return self._tier.bytes_read

    @property
    def bytes_copied(self) -> int:
        """Bytes that were copied to the device."""
        return self._tier.bytes_copied

    def new_sequence(self) -> None:
        """Another text begins."""
        self.cache.new_sequence()

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
    ) -> None:
        """Call ``compute(expert_idx, weights)`` once for each expert, in no particular order.

        ``issued`` is called when all misses are on their way and before anything is computed. Raises what a failed
        transfer raised; the slots are given back in any case. Ctrl-C comes through between two experts.
        """

        def compute_one(experts: Sequence[tuple[int, ExpertWeights]]) -> None:
            compute(*experts[0])

        with InterruptShield() as shield:
            self._step(layer_idx, expert_ids, compute_one, False, weights, prefill, issued, shield)

    def run_together(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        compute: ComputeTogether,
        *,
        weights: Sequence[float] | None = None,
        prefill: bool = False,
        issued: Callable[[], None] | None = None,
    ) -> None:
        """As `run`, with all experts that are there in one call, then those that have come meanwhile, and so on."""
        with InterruptShield() as shield:
            self._step(layer_idx, expert_ids, compute, True, weights, prefill, issued, shield)

    def _step(
        self,
        layer_idx: int,
        expert_ids: Sequence[int],
        compute: ComputeTogether,
        together: bool,
        weights: Sequence[float] | None,
        prefill: bool,
        issued: Callable[[], None] | None,
        shield: InterruptShield,
    ) -> None:
        if self._interrupted:
            self._recover()
        lease = self.cache.acquire(
            layer_idx,
            expert_ids,
            weights=weights,
            admit=Admit.IF_HOTTER if prefill else Admit.ALWAYS,
            phase="prefill" if prefill else "decode",
        )
        arrivals = Arrivals(self._free_staging)
        try:
            self._run(lease, compute, together, issued, arrivals, shield)
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
        shield: InterruptShield,
    ) -> None:
        layer_idx, bypassed = lease.layer_idx, list(lease.bypassed)
        for miss in lease.misses:
            load = self._register(layer_idx, miss.expert_idx, _Load(miss.slot, False, [arrivals]))
            self._transfer(layer_idx, miss.expert_idx, load)
        num_pending = len(lease.misses)
        ready: list[tuple[int, int]] = []
        for hit in lease.hits:
            if not hit.loading or self._is_there(layer_idx, hit.expert_idx, hit.slot):
                ready.append((hit.expert_idx, hit.slot))
            elif self._wait_for(layer_idx, hit.expert_idx, arrivals):
                num_pending += 1
            elif self._is_there(layer_idx, hit.expert_idx, hit.slot):  # it arrived between the two questions
                ready.append((hit.expert_idx, hit.slot))
            else:
                bypassed.append(hit.expert_idx)  # its transfer failed, or an interrupted step never began it
        num_pending += self._begin_staged(layer_idx, bypassed, arrivals)
        if issued is not None:
            issued()
        for experts in [ready] if together and ready else [[one] for one in ready]:
            shield.check()
            self._compute(layer_idx, experts, compute)
        while num_pending or bypassed:
            if not num_pending:
                num_pending = self._begin_staged(layer_idx, bypassed, arrivals, wait=shield)
            arrived = [self._next(arrivals, shield)]
            if together:
                arrived += arrivals.get_all()
            num_pending -= len(arrived)
            try:
                for _, _, error in arrived:
                    if error is not None:
                        raise error
                self._compute(layer_idx, [(expert_idx, slot) for expert_idx, slot, _ in arrived], compute)
            finally:
                for _, slot, _ in arrived:
                    if slot < 0:
                        self._free_staging.put(slot)
            num_pending += self._begin_staged(layer_idx, bypassed, arrivals)

    def _compute(self, layer_idx: int, experts: list[tuple[int, int]], compute: ComputeTogether) -> None:
        weights = [(expert_idx, self._tier.use(layer_idx, slot)) for expert_idx, slot in experts]
        try:
            compute(weights)
        finally:
            for _, slot in experts:
                self._tier.used(layer_idx, slot)  # also if it failed midway: what it has launched still reads the slot

    def _next(self, arrivals: Arrivals, shield: InterruptShield) -> Arrival:
        shield.check()
        try:
            return arrivals.get(0)
        except queue.Empty:
            begin_s = time.perf_counter()
            try:
                return patiently(arrivals.get, shield)
            finally:
                self.stall_s += time.perf_counter() - begin_s

    # -- transfers --

    def _register(self, layer_idx: int, expert_idx: int, load: _Load) -> _Load:
        """Put on the books that a slot which the cache has just given to an expert is going to be filled."""
        with self._lock:
            self._loads[layer_idx, expert_idx] = load
            self._expert_in.pop((layer_idx, load.slot), None)
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
                self.cache.mark_loaded(layer_idx, expert_idx)
            else:
                self.cache.mark_failed(layer_idx, expert_idx)
            waiting = load.waiting
        for arrivals in waiting:
            arrivals.put(expert_idx, load.slot, error)

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
            try:
                slot = self._free_staging.get_nowait()
            except queue.Empty:
                if wait is None or num_begun:
                    break
                slot = patiently(lambda timeout_s: self._free_staging.get(timeout=timeout_s), wait)
            expert_idx = expert_ids.pop(0)

            def done(error: BaseException | None, expert_idx: int = expert_idx, slot: int = slot) -> None:
                arrivals.put(expert_idx, slot, error)

            try:
                self._tier.begin(layer_idx, expert_idx, slot, speculative=False, done=done)
            except Exception as error:
                done(error)
            num_begun += 1
        return num_begun

    # -- speculation --

    def prefetch(self, layer_idx: int, expert_ids: Sequence[int]) -> None:
        """Start bringing experts that a step may ask for, behind all demand."""
        with self._lock:  # no step is to recover meanwhile: it would take back slots that nothing is known to fill
            loads = [
                (placement.expert_idx, self._register(layer_idx, placement.expert_idx, _Load(placement.slot, True)))
                for placement in self.cache.admit_prefetch(layer_idx, expert_ids)
            ]
        for expert_idx, load in loads:
            self._transfer(layer_idx, expert_idx, load)

    def cancel_prefetches(self, layer_idx: int, wanted: Iterable[int]) -> None:
        """Give up prefetches of a layer that are not ``wanted`` and that nobody waits for."""
        keep = set(wanted)
        with self._lock:
            for (layer, expert_idx), load in self._loads.items():
                stale = layer == layer_idx and load.speculative and expert_idx not in keep
                if stale and load.transfer is not None:
                    load.transfer.cancel()

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
